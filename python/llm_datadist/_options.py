# SPDX-License-Identifier: Apache-2.0
"""Keys of the options that several modules read. LLMConfig declares all of them."""

from __future__ import annotations

BACKEND = "llm.TransferBackend"
BUFFERS = "llm.BufPoolCfg"
CACHE_MANAGER = "llm.EnableCacheManager"
CLUSTER_INFO = "llm.ClusterInfo"
DEPLOY_PATH = "llm.deployResPath"
DEVICE_POOL = "llm.MemPoolConfig"
GRAPH_MEMORY = "ge.flowGraphMemMaxSize"
HOST_POOL = "llm.HostMemPoolConfig"
LISTEN_INFO = "llm.listenIpInfo"
LOCAL_COMM_RES = "llm.LocalCommRes"
MULTIPLE_ENGINES = "open.MultipleEngines"
ONE_SIDED = "llm.EnableRemoteCacheAccessible"
SWITCH_ROLE = "llm.EnableSwitchRole"
UTILIZATION = "llm.MemoryUtilization"

# Derived at init, not for callers.
LISTEN_IP, LISTEN_PORT = "llm.ListenIp", "llm.ListenPort"
ROLE = "llm.Role"
