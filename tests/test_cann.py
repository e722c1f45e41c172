# SPDX-License-Identifier: Apache-2.0
"""Whole processes whose DEVICE memory is that of NPUs: what the stand-in of the vendor's library has, which no host can touch.

The shown programs run word for word. Each kind of transfer brings the very bytes that it brings where DEVICE memory is the
host's, from and to each kind of memory; and an engine with NPUs and one without move bytes both ways.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import pytest

import programs
from devices import DEVICE_KINDS, KINDS, TENSORS
from links import OURS, THEIRS, link
from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from peers import SOURCE, TARGET, Peer, pattern, refused

pytestmark = pytest.mark.timeout(300)

SUCCESS = LLMStatusCode.LLM_SUCCESS
HOST = {"LLM_DATADIST_DEVICE": "host"}
BLOCK = 32  # bytes


@pytest.fixture(scope="module")
def npus(libraries: Path) -> dict[str, str]:
    """The environment of a process whose device is an NPU."""
    return {"LLM_DATADIST_DEVICE": "cann", "LD_LIBRARY_PATH": str(libraries)}


# ---- the shown programs


@pytest.fixture
def on_npus(npus: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that a test starts have NPUs."""
    for name, value in npus.items():
        monkeypatch.setenv(name, value)


TOUCH = """
import ctypes
from llm_datadist import *
config = LLMConfig()
config.enable_cache_manager, config.mem_pool_cfg = True, '{"memory_size": 1048576}'
engine = LLMDataDist(LLMRole.PROMPT, 1)
engine.init(config.generate_options())
cache = engine.cache_manager.allocate_cache(CacheDesc(1, [1, 8], DataType.DT_INT8))
print("allocated", flush=True)
ctypes.string_at(cache.tensor_addrs[0], 1)
print("touched", flush=True)
"""


@pytest.mark.usefixtures("on_npus")
def test_a_process_that_touches_device_memory_dies() -> None:
    """Else none of these tests would prove anything."""
    done = subprocess.run([sys.executable, "-c", TOUCH], capture_output=True, text=True, timeout=60)
    assert done.stdout == "allocated\n", done.stdout + done.stderr
    assert done.returncode not in (0, 1)


@pytest.mark.usefixtures("on_npus")
def test_the_demo_runs_on_npus() -> None:
    done = programs.run_demo(*programs.SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transport: cann" in done.stdout
    assert "demo: everything was verified, 2,490,368 bytes in 7 steps, " in done.stdout
    assert done.stderr == ""


@pytest.mark.usefixtures("on_npus")
def test_the_bench_measures_host_memory_where_there_are_npus() -> None:
    command = [sys.executable, "-m", "llm_datadist", "bench", "--workloads", "block,tiny,row", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench: every byte was verified" in done.stdout


@pytest.mark.usefixtures("on_npus")
@pytest.mark.parametrize(("name", "options"), programs.EXAMPLE_RUNS, ids=programs.EXAMPLE_NAMES)
def test_an_example_runs_on_npus(name: str, options: list[str], tmp_path: Path) -> None:
    programs.run_example(name, options, tmp_path)


@pytest.mark.usefixtures("on_npus")
def test_the_two_processes_of_the_readme_run_on_npus(tmp_path: Path) -> None:
    assert any(line.strip() == "transport: cann" for line in programs.run_two_processes(tmp_path))


@pytest.mark.usefixtures("on_npus")
def test_the_older_program_of_the_readme_runs_on_npus(tmp_path: Path) -> None:
    programs.run_older(tmp_path)


@pytest.mark.usefixtures("on_npus")
def test_the_program_of_the_guide_brings_bytes_to_an_npu_and_back(tmp_path: Path) -> None:
    programs.run_fill(tmp_path)


# ---- the same bytes as on the host


class Pair(NamedTuple):
    """Two linked processes: one that pulls and pushes, and the other one, which it knows under a cluster id."""

    mover: Peer
    other: Peer
    cluster_id: int
    one_sided: bool

    def add(self, peer: Peer, name: str, kind: str, shape: list[int], keys: Any = (), *, blocks: bool = False) -> int:
        """Make the source or the target, and return its id."""
        number = SOURCE if name == "source" else TARGET
        given = {"blocks": blocks, "accessible": True if self.one_sided else None}
        cache_id: int = peer.run(
            "import devices; result = devices.add(end, *what, **given)", what=(name, kind, shape, number, keys), given=given
        )
        return cache_id

    def target(self, peer: Peer) -> list[np.ndarray]:
        """Return what lies in the target."""
        tensors: list[np.ndarray] = peer.run("import devices; result = devices.content(end, 'target')")
        return tensors

    def transfer(self, config: Any, **blocks: Any) -> None:
        code = "import devices; result = devices.transfer(end, config, **blocks)"
        assert self.mover.run(code, config=config, blocks=blocks) == (SUCCESS, [SUCCESS])

    def clear(self) -> None:
        for peer in (self.mover, self.other):
            peer.run("import devices; devices.drop(end)")

    def reversed(self) -> Pair:
        return Pair(self.other, self.mover, OURS + THEIRS - self.cluster_id, self.one_sided)


@contextlib.contextmanager
def linked(mover: dict[str, str], other: dict[str, str], one_sided: bool = False) -> Iterator[Pair]:
    with Peer(mover) as here, Peer(other) as there:
        link(here, there, one_sided=one_sided)
        yield Pair(here, there, THEIRS, one_sided)


def pull_by_key(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    keys = [CacheKey(pair.cluster_id, req_id=1), CacheKey(pair.cluster_id, req_id=2)]
    pair.add(pair.other, "source", source, [2, 100], keys)
    pair.add(pair.mover, "target", target, [2, 100])
    pair.mover.manage("pull_cache", keys[1], "target", 0)
    if source.endswith("pool"):
        refused(pair.mover.manage, "pull_cache", keys[1], "target", code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
    return pair.target(pair.mover)


def pull_by_id(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    cache_id = pair.add(pair.other, "source", source, [2, 100])
    pair.add(pair.mover, "target", target, [3, 60])
    pair.mover.manage("pull_cache", CacheKeyByIdAndIndex(pair.cluster_id, cache_id, 1), "target", 2, 50)
    return pair.target(pair.mover)


def pull_layers(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    cache_id = pair.add(pair.other, "source", source, [2, 100])
    pair.add(pair.mover, "target", target, [1, 100])
    layers = {"src_layer_range": range(1), "dst_layer_range": range(1, 2)}
    pair.mover.manage("pull_cache", CacheKeyByIdAndIndex(pair.cluster_id, cache_id, 1), "target", **layers)
    return pair.target(pair.mover)


def pull_blocks(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    key = BlocksCacheKey(pair.cluster_id, model_id=4)
    pair.add(pair.other, "source", source, [8, BLOCK], key, blocks=True)
    pair.add(pair.mover, "target", target, [5, BLOCK], blocks=True)
    pair.mover.manage("pull_blocks", key, "target", [5, 6, 1], [0, 1, 3])
    return pair.target(pair.mover)


def pull_layers_of_blocks(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    key = BlocksCacheKey(pair.cluster_id, model_id=4)
    pair.add(pair.other, "source", source, [8, BLOCK], key, blocks=True)
    pair.add(pair.mover, "target", target, [5, BLOCK], blocks=True)
    layers = {"src_layer_range": range(1, 2), "dst_layer_range": range(1)}
    pair.mover.manage("pull_blocks", key, "target", [7, 2], [4, 0], **layers)
    return pair.target(pair.mover)


def pull_row_into_blocks(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    key = CacheKey(pair.cluster_id, req_id=5)
    pair.add(pair.other, "source", source, [1, 100], [key])
    pair.add(pair.mover, "target", target, [4, 40], blocks=True)
    pair.mover.manage("pull_blocks", key, "target", [], [3, 0, 1])
    return pair.target(pair.mover)


def transfer_row(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    pair.add(pair.mover, "source", source, [1, 100])
    pair.add(pair.other, "target", target, [2, 100])
    pair.transfer(TransferConfig(pair.cluster_id, target_addresses(pair), range(2)))
    return pair.target(pair.other)


def transfer_blocks(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    pair.add(pair.mover, "source", source, [8, BLOCK], blocks=True)
    pair.add(pair.other, "target", target, [5, BLOCK], blocks=True)
    blocks = {"src_block_indices": [6, 1, 0], "dst_block_indices": [4, 0, 3], "dst_block_memory_size": BLOCK}
    pair.transfer(TransferConfig(pair.cluster_id, target_addresses(pair), range(2)), **blocks)
    return pair.target(pair.other)


def target_addresses(pair: Pair) -> list[int]:
    addresses: list[int] = pair.other.run("result = list(end.caches['target'].tensor_addrs)")
    return addresses


def push_cache(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    pair.add(pair.mover, "source", source, [2, 60])
    cache_id = pair.add(pair.other, "target", target, [3, 100])
    pair.mover.manage("push_cache", CacheKeyByIdAndIndex(pair.cluster_id, cache_id, 2), "source", 1)
    return pair.target(pair.other)


def push_blocks(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    key = BlocksCacheKey(pair.cluster_id, model_id=4)
    pair.add(pair.mover, "source", source, [8, BLOCK], blocks=True)
    pair.add(pair.other, "target", target, [5, BLOCK], key, blocks=True)
    layers = {"src_layer_range": range(1, 2), "dst_layer_range": range(1)}
    pair.mover.manage("push_blocks", key, "source", [5, 6, 1], [0, 1, 3], **layers)
    return pair.target(pair.other)


def transfer_by_id(pair: Pair, source: str, target: str) -> list[np.ndarray]:
    pair.add(pair.mover, "source", source, [1, 100])
    cache_id = pair.add(pair.other, "target", target, [2, 100])
    pair.transfer(TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(pair.cluster_id, cache_id, 1), range(2), range(2)))
    return pair.target(pair.other)


Operation = Callable[[Pair, str, str], "list[np.ndarray]"]

PULLS: list[Operation] = [pull_by_key, pull_by_id, pull_layers, pull_blocks, pull_layers_of_blocks, pull_row_into_blocks]
TRANSFERS: list[Operation] = [transfer_row, transfer_blocks]
TWO_SIDED = [(each, source, target) for each in PULLS for source in KINDS for target in KINDS]
TWO_SIDED += [(each, source, target) for each in TRANSFERS for source in DEVICE_KINDS for target in KINDS]
ONE_SIDED = [(each, source, target) for each in (pull_by_id, pull_layers, pull_blocks) for source in KINDS for target in KINDS]
ONE_SIDED += [(each, source, target) for each in (push_cache, push_blocks) for source in KINDS for target in KINDS]
ONE_SIDED += [(transfer_by_id, source, target) for source in DEVICE_KINDS for target in KINDS]


def names(cases: list[tuple[Operation, str, str]]) -> list[str]:
    return [f"{operation.__name__}, {source} to {target}" for operation, source, target in cases]


def moved(pair: Pair, operation: Operation, source: str, target: str) -> list[np.ndarray]:
    """Return what lies in the target after an operation, of which some bytes have changed and some have not."""
    try:
        got = operation(pair, source, target)
    finally:
        pair.clear()
    before = [pattern(TARGET, tensor, found.size) for tensor, found in enumerate(got)]
    same = [found == wanted for found, wanted in zip(got, before)]
    assert len(got) == TENSORS and any(each.any() for each in same) and not all(each.all() for each in same)
    return got


def compare(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for tensor, (found, expected) in enumerate(zip(got, wanted)):
        np.testing.assert_array_equal(found, expected, f"tensor {tensor}")


class Devices(NamedTuple):
    host: Pair
    npu: Pair


@pytest.fixture(scope="module")
def two_sided(npus: dict[str, str]) -> Iterator[Devices]:
    with linked(HOST, HOST) as host, linked(npus, npus) as npu:
        yield Devices(host, npu)


@pytest.fixture(scope="module")
def one_sided(npus: dict[str, str]) -> Iterator[Devices]:
    with linked(HOST, HOST, one_sided=True) as host, linked(npus, npus, one_sided=True) as npu:
        yield Devices(host, npu)


def test_both_ends_say_that_their_link_is_over_cann(two_sided: Devices) -> None:
    assert two_sided.npu.mover.told(THEIRS)["transport"] == "cann"
    assert two_sided.npu.other.told(OURS)["transport"] == "cann"


@pytest.mark.parametrize(("operation", "source", "target"), TWO_SIDED, ids=names(TWO_SIDED))
def test_bytes_are_those_of_the_host(two_sided: Devices, operation: Operation, source: str, target: str) -> None:
    compare(moved(two_sided.npu, operation, source, target), moved(two_sided.host, operation, source, target))


@pytest.mark.parametrize(("operation", "source", "target"), ONE_SIDED, ids=names(ONE_SIDED))
def test_bytes_are_those_of_the_host_in_one_sided_mode(
    one_sided: Devices, operation: Operation, source: str, target: str
) -> None:
    compare(moved(one_sided.npu, operation, source, target), moved(one_sided.host, operation, source, target))


# ---- one end with NPUs, one without


@pytest.fixture(scope="module")
def mixed(npus: dict[str, str]) -> Iterator[Pair]:
    with linked(HOST, npus) as pair:
        yield pair


def test_both_ends_say_that_a_link_to_a_host_is_over_tcp(mixed: Pair) -> None:
    assert mixed.mover.told(THEIRS)["transport"] == "tcp"
    assert mixed.other.told(OURS)["transport"] == "tcp"


@pytest.mark.parametrize(("operation", "source", "target"), TWO_SIDED, ids=names(TWO_SIDED))
def test_bytes_go_both_ways_between_a_host_and_an_npu(
    two_sided: Devices, mixed: Pair, operation: Operation, source: str, target: str
) -> None:
    wanted = moved(two_sided.host, operation, source, target)
    compare(moved(mixed, operation, source, target), wanted)
    compare(moved(mixed.reversed(), operation, source, target), wanted)
