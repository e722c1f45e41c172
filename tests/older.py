# SPDX-License-Identifier: Apache-2.0
"""Ends of the older API: a PROMPT in a process of its own, a DECODER in the test's."""

from __future__ import annotations

import pytest

from llm_datadist import CacheKey, LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode
from peers import ADDRESS, memory_at, pattern

SUCCESS = LLMStatusCode.LLM_SUCCESS
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK

PROMPT, DECODER = 1, 2  # cluster ids
U64MAX = 2**64 - 1
BUDGET = 1 << 20
KEY = CacheKey(PROMPT, req_id=1)
PLACEHOLDER = CacheKey(PROMPT, req_id=U64MAX)

# The documented example of the prompt's side, in a process of its own.
SERVE = """
from llm_datadist import *
config = LLMConfig()
config.device_id, config.listen_ip_info = 0, "127.0.0.1:0"
config.ge_options = {"ge.flowGraphMemMaxSize": str(1 << 20)}
end.engine = LLMDataDist(LLMRole.PROMPT, 1)
end.engine.init(config.generate_options())
end.kv_caches = []
result = end.engine.listen_address
"""
OFFER = """
from peers import memory_at, pattern
cache = end.engine.kv_cache_manager.allocate_cache(described, keys)
for tensor, addr in enumerate(cache.per_device_tensor_addrs[0]):
    view = memory_at(addr, described.size)
    view[:] = pattern(number, tensor, view.size)
end.kv_caches.append(cache)
result = cache.cache_id
"""
OFFER_BLOCKS = OFFER.replace("allocate_cache(described, keys)", "allocate_blocks_cache(described, key)")
FILL_THE_BUDGET = OFFER + "end.engine.kv_cache_manager.deallocate_cache(cache)"
TRY_TO_ALLOCATE = """
from llm_datadist import LLMException, LLMStatusCode
try:
    end.engine.kv_cache_manager.allocate_cache(described)
    result = LLMStatusCode.LLM_SUCCESS
except LLMException as exc:
    result = exc.status_code
"""


def settings(role=LLMRole.DECODER, **given):
    config = LLMConfig()
    config.device_id = 0
    config.ge_options = {"ge.flowGraphMemMaxSize": str(given.pop("budget", BUDGET))}
    if role is LLMRole.PROMPT:
        config.listen_ip_info = ADDRESS
    for name, value in given.items():
        setattr(config, name, value)
    return config.generate_options()


def opened(role, cluster_id=DECODER, **given):
    engine = LLMDataDist(role, cluster_id)
    engine.init(settings(role, **given))
    return engine


@pytest.fixture
def decoder(request):
    engine = opened(LLMRole.DECODER, **getattr(request, "param", {}))
    yield engine
    engine.finalize()


def content(cache, tensor=0, device=0):
    return memory_at(cache.per_device_tensor_addrs[device][tensor], cache.cache_desc.size)


def fill(cache, number):
    for tensor in range(cache.cache_desc.num_tensors):
        view = content(cache, tensor)
        view[:] = pattern(number, tensor, view.size)


def several(addresses, cluster_id=PROMPT):
    """The info of a cluster that has a device for each address."""
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    for each in addresses:
        ip, port = each.split(":")
        info.append_local_ip_info("127.0.0.1", 0)
        info.append_remote_ip_info(ip, int(port))
    return info
