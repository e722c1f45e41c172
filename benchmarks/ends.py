# SPDX-License-Identifier: Apache-2.0
"""What the two processes of a measurement have in common: their engine, their memory, and how they talk to the one that measures.

They read commands from standard input and answer on standard output, JSON, one object a line. What the library logs goes to
standard error instead.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from workloads import Shape, Words

from llm_datadist import CacheDesc, DataType, LLMConfig, LLMDataDist, LLMException, LLMRole, LLMStatusCode

OWNER, PULLER = 1, 2  # cluster ids
_PAGE = 64 << 10  # of a pool
_TIMEOUT_MILLIS = 60000  # of a pull: a slow machine is measured, not failed


@dataclass(frozen=True)
class Setting:
    """How the two ends are set up. pool: the owner's memory is a pool's; else memory of its own that it registers."""

    transport: str
    pool: bool
    shapes: tuple[Shape, ...]  # of the caches; each has its place in here as model id
    spin_micros: int = 0

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Setting:
        fields = json.loads(text)
        return cls(**{**fields, "shapes": tuple(Shape(**shape) for shape in fields["shapes"])})


class Talk:
    """The child's side of the pipes."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **fields: Any) -> None:
        print(json.dumps(fields), file=self._out, flush=True)

    def commands(self) -> Iterator[dict[str, Any]]:
        for line in sys.stdin:
            yield json.loads(line)


def begin(setting: Setting, talk: Talk, role: LLMRole, cluster: int) -> LLMDataDist | None:
    """Return an engine, or None where this build has not what the setting asks for; then that has been said."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.sync_kv_timeout = _TIMEOUT_MILLIS
    config.transport = setting.transport
    if setting.spin_micros:
        config.spin_micros = setting.spin_micros
    if cluster == OWNER:
        config.listen_ip_info = "127.0.0.1:0"
        if setting.pool:
            config.mem_pool_cfg = json.dumps({"memory_size": pool_bytes(setting.shapes), "page_shift": _PAGE.bit_length() - 1})
    engine = LLMDataDist(role, cluster)
    try:
        engine.init(config.generate_options())
    except LLMException as exc:
        if exc.status_code != LLMStatusCode.LLM_FEATURE_NOT_ENABLED:
            raise
        talk.say(refused=exc.cause or str(exc))
        return None
    return engine


def pool_bytes(shapes: tuple[Shape, ...]) -> int:
    """Return the size of a pool that has room for all caches: each tensor takes whole pages."""
    return sum(shape.tensors * -(-shape.tensor_bytes // _PAGE) * _PAGE for shape in shapes)


def desc_of(shape: Shape) -> CacheDesc:
    return CacheDesc(shape.tensors, [shape.blocks, shape.block_bytes], DataType.DT_INT8)


def private_tensors(shape: Shape) -> list[Words]:
    """Return memory such as malloc gives, on whole pages and without huge ones, as that of the references is."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return [np.frombuffer(mmap.mmap(-1, shape.tensor_bytes, flags), dtype=np.uint64) for _ in range(shape.tensors)]


def pool_tensors(addrs: list[int], shape: Shape) -> list[Words]:
    """Return the tensors of an allocated cache as arrays."""
    words = ctypes.c_uint64 * (shape.tensor_bytes // 8)
    return [np.ctypeslib.as_array(words.from_address(addr)) for addr in addrs]


def cpu_seconds() -> float:
    """Return the processor time that this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
