# SPDX-License-Identifier: Apache-2.0
"""The process that the benchmark pulls from: owns the tensors of one workload until its standard input ends."""

from __future__ import annotations

import sys

import numpy as np
from workloads import WORKLOADS, fill

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, LLMConfig, LLMDataDist, LLMRole

CLUSTER = 1


def main() -> None:
    workload = WORKLOADS[sys.argv[1]]
    config = LLMConfig()
    config.enable_cache_manager = True
    config.listen_ip_info = "127.0.0.1:0"
    config.transport = sys.argv[2]
    datadist = LLMDataDist(LLMRole.PROMPT, CLUSTER)
    datadist.init(config.generate_options())
    tensors = [np.empty(workload.blocks * workload.block_bytes // 8, dtype=np.uint64) for _ in range(workload.tensors)]
    for index, words in enumerate(tensors):
        fill(index, words)
    desc = CacheDesc(workload.tensors, [workload.blocks, workload.block_bytes], DataType.DT_INT8)
    addrs = [words.ctypes.data for words in tensors]
    if workload.is_row:
        datadist.cache_manager.register_cache(desc, addrs, [CacheKey(CLUSTER, req_id=1)])
    else:
        datadist.cache_manager.register_blocks_cache(desc, addrs, BlocksCacheKey(CLUSTER))
    print(datadist.listen_address, flush=True)
    sys.stdin.read()
    datadist.finalize()


if __name__ == "__main__":
    main()
