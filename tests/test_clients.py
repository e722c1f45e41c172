# SPDX-License-Identifier: Apache-2.0
"""What client code in the wild relies on beyond single calls: threads, event loops, memory over time, ends that return."""

from __future__ import annotations

import asyncio
import socket

import numpy as np
import pytest

from links import OURS, THEIRS, link, table
from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, LLMException, LLMStatusCode, _native
from peers import ADDRESS, SOURCE, TARGET, Background, Peer, cluster, desc, memory_at, options, pattern, refused, wait_until

SUCCESS = LLMStatusCode.LLM_SUCCESS
FAILED = LLMStatusCode.LLM_FAILED
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST

BLOCKS, BLOCK = 64, 4096  # of a cache: blocks, and bytes of one
MODELS = 3
SOON = 10  # seconds: a sixth of the deadlines of the calls that finalize does not wait for


def offer(local, owner):
    """Have the owner register a cache of blocks for each model, and register one to pull each of them into."""
    for model in range(MODELS):
        owner.add(f"s{model}", desc([BLOCKS, BLOCK], 2), model, BlocksCacheKey(THEIRS, model), blocks=True)
        local.add(f"d{model}", desc([BLOCKS, BLOCK], 2), TARGET, blocks=True)


def pull_and_compare(local, model, src, dst):
    local.manage("pull_blocks", BlocksCacheKey(THEIRS, model), f"d{model}", src, dst)
    for tensor, view in enumerate(local.tensors(f"d{model}")):
        wanted = pattern(model, tensor, view.size).reshape(BLOCKS, -1)
        assert np.array_equal(view.reshape(BLOCKS, -1)[dst], wanted[src])


def test_32_threads_pull_single_blocks_of_several_models_over_one_link(local, owner):
    threads = 32
    link(local, owner)
    offer(local, owner)

    def repeat(thread):
        random = np.random.default_rng(thread)
        own = range(thread, BLOCKS, threads)
        for number in range(30):
            pull_and_compare(local, number % MODELS, [int(random.integers(BLOCKS))], [int(random.choice(own))])

    for call in [Background(repeat, thread) for thread in range(threads)]:
        call.result()


def test_an_event_loop_goes_on_while_its_threads_pull(local, owner):
    link(local, owner)
    offer(local, owner)
    turns = 0

    async def turn():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def pull_all():
        turning = asyncio.create_task(turn())
        pulls = [asyncio.to_thread(pull_and_compare, local, n % MODELS, [BLOCKS - 1 - n], [n]) for n in range(BLOCKS)]
        await asyncio.gather(*pulls)
        turning.cancel()

    asyncio.run(pull_all())
    assert turns > 1


def test_a_pull_that_fails_in_a_thread_of_an_event_loop_raises_there(local, owner):
    link(local, owner)
    local.add("d", desc([1, 64]), TARGET, blocks=True)

    async def pull():
        await asyncio.to_thread(local.manage, "pull_blocks", BlocksCacheKey(THEIRS, 9), "d", [0], [0])

    refused(asyncio.run, pull(), code=NOT_EXIST)


ROUNDS = """
from llm_datadist import CacheKey
from peers import desc, memory_at, pattern

def allocate(number):
    cache = end.manager.allocate_cache(desc([1, 65536], 2), [CacheKey(1, req_id=number)])
    for tensor, addr in enumerate(cache.tensor_addrs):
        memory_at(addr, 65536)[:] = pattern(number % 8, tensor, 65536)
    end.manager.deallocate_cache(cache)  # lives until its key has been pulled

end.allocate = allocate
"""


def resident_kib(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))


def test_memory_is_flat_over_a_thousand_rounds_of_allocate_pull_and_free(local, owner):
    link(local, owner)
    owner.run(ROUNDS)

    def rounds(numbers):
        for number in numbers:
            owner.run("end.allocate(number)", number=number)
            target = local.manager.allocate_cache(desc([1, 65536], 2))
            local.manager.pull_cache(CacheKey(THEIRS, req_id=number), target)
            for tensor, addr in enumerate(target.tensor_addrs):
                assert np.array_equal(memory_at(addr, 65536), pattern(number % 8, tensor, 65536))
            local.manager.deallocate_cache(target)

    pids = ["self", owner.process.pid]
    rounds(range(100))
    before = [resident_kib(pid) for pid in pids]
    rounds(range(100, 1100))
    grown = [resident_kib(pid) - was for pid, was in zip(pids, before)]
    assert max(grown) < 16 << 10, grown  # KiB; the rounds move 128 MiB


def test_pools_of_tens_of_gib_are_reserved_and_not_committed(local, owner):
    pool = f'{{"memory_size": {32 << 30}}}'
    pids = ["self", owner.process.pid]
    before = [resident_kib(pid) for pid in pids]
    link(local, owner, mem_pool_cfg=pool, host_mem_pool_cfg=pool)
    owner.add("s", desc([16, 65536]), 1, BlocksCacheKey(THEIRS), blocks=True, owned=True)
    local.add("d", desc([16, 65536]), TARGET, blocks=True, owned=True)
    local.manage("pull_blocks", BlocksCacheKey(THEIRS), "d", list(range(16)), list(range(16)))
    assert np.array_equal(local.content("d")[0], pattern(1, 0, 16 * 65536))
    grown = [resident_kib(pid) - was for pid, was in zip(pids, before)]
    assert max(grown) < 256 << 10, grown


def test_12_threads_push_blocks_over_a_link_that_the_other_end_has_dialed(local, owner):
    """owner, the prefill side, pushes; local, the decode side, has linked and has no listener."""
    threads, rounds = 12, 10
    link(local, owner, one_sided=True)
    owner.add("s", desc([BLOCKS, BLOCK], 2), 1, BlocksCacheKey(THEIRS), blocks=True, accessible=True)
    local.add("d", desc([BLOCKS, BLOCK], 2), TARGET, BlocksCacheKey(OURS), blocks=True, accessible=True)
    wanted = [content.reshape(BLOCKS, BLOCK).copy() for content in local.content("d")]
    sent = [pattern(1, tensor, BLOCKS * BLOCK).reshape(BLOCKS, BLOCK) for tensor in range(2)]
    # Each thread has blocks of its own to push into; what is pushed last stays.
    src = np.random.default_rng(1).integers(BLOCKS, size=(threads, rounds, 5)).tolist()
    dst = [list(range(5 * thread, 5 * thread + 5)) for thread in range(threads)]
    owner.run(PUSH, src=src, dst=dst)
    for thread in range(threads):
        for tensor in range(2):
            wanted[tensor][dst[thread]] = sent[tensor][src[thread][-1]]
    for content, want in zip(local.content("d"), wanted):
        assert np.array_equal(content.reshape(BLOCKS, BLOCK), want)


PUSH = """
from concurrent.futures import ThreadPoolExecutor
from llm_datadist import BlocksCacheKey

def push(thread):
    for blocks in src[thread]:
        end.manage("push_blocks", BlocksCacheKey(2), "s", blocks, dst[thread])

with ThreadPoolExecutor(len(dst)) as pool:
    list(pool.map(push, range(len(dst))))
"""


class Size(tuple):
    """A shape as torch has it: a tuple, of a class of its own that calls itself otherwise."""

    __slots__ = ()

    def __repr__(self):
        return f"torch.Size({list(self)})"


class Tensor:
    """As much of a tensor as a connector asks for."""

    def __init__(self, array):
        self.array = array
        self.shape = Size(array.shape)

    def data_ptr(self):
        return self.array.ctypes.data


BY_HAND = {
    "llm.EnableCacheManager": "1",
    "llm.EnableRemoteCacheAccessible": "0",
    "ge.exec.deviceId": "0",
    "ge.session_device_id": "0",
    "llm.SyncKvCacheWaitTime": "20000",
    "llm.MemPoolConfig": '{"memory_size": 1048576}',
    "llm.RdmaTrafficClass": "132",
    "llm.RdmaServiceLevel": "4",
    "llm.LinkTotalTime": "60",
    "llm.LinkRetryCount": "80",
}


def test_options_by_hand_shapes_of_torch_and_raw_bytes(local, owner):
    address = owner.open(THEIRS, raw={**BY_HAND, "llm.listenIpInfo": ADDRESS})
    local.open(OURS, raw=BY_HAND)
    assert local.link(address, THEIRS) is SUCCESS
    layers = [Tensor(pattern(SOURCE, layer, 8 * 2 * 256).reshape(8, 2, 256)) for layer in range(3)]
    before = [layer.array.copy() for layer in layers]
    described = CacheDesc(num_tensors=len(layers), shape=layers[0].shape, data_type=DataType.DT_UINT8)
    assert described.size == 8 * 2 * 256 and described.batch_size == 8
    addrs = [layer.data_ptr() for layer in layers]
    cache = local.manager.register_blocks_cache(described, addrs, BlocksCacheKey(OURS))
    owner.add("theirs", desc([8, 512], 3, DataType.DT_UINT8), TARGET, BlocksCacheKey(THEIRS), blocks=True)
    owner.manage("pull_blocks", BlocksCacheKey(OURS), "theirs", [7, 2], [0, 1])
    local.manager.pull_blocks(BlocksCacheKey(THEIRS), cache, [7, 3], [4, 6])
    for layer, (theirs, was) in enumerate(zip(owner.content("theirs"), before)):
        wanted = pattern(TARGET, layer, 8 * 512).reshape(8, 512)
        was.reshape(8, 512)[[4, 6]] = wanted[[7, 3]]
        wanted[[0, 1]] = pattern(SOURCE, layer, 8 * 512).reshape(8, 512)[[7, 2]]
        assert np.array_equal(theirs, wanted.reshape(-1))
        assert np.array_equal(layers[layer].array, was)


def test_finalize_during_calls_ends_each_of_them_with_a_clear_error(local, owner, quiet):
    link(local, owner, sync_kv_timeout=60_000)
    offer(local, owner)
    engine, manager, cache = local.engine, local.manager, local.caches["d0"]
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, owner.stopped():
        idle = _native.held()
        # What model 9 is only the owner could tell, so that these wait for it over every transport.
        calls = [Background(manager.pull_blocks, BlocksCacheKey(THEIRS, 9), cache, [n], [n]) for n in range(16)]
        linking = Background(engine.link_clusters, [cluster(f"127.0.0.1:{silent.getsockname()[1]}", 7)], 60_000)
        wait_until(lambda: _native.held() == idle + len(calls) + 1, "all calls are under way")
        engine.link("group", {OURS: 0, 5: 1}, table(2))  # and a group that waits for a member
        finalizing = Background(engine.finalize)
        assert finalizing.result() is None
        assert finalizing.seconds < SOON
        for call in calls:
            assert "finalized" in refused(call.result, code=FAILED).cause
        code, codes = linking.result()
        assert code is codes[0] and code is not SUCCESS
    refused(manager.pull_blocks, BlocksCacheKey(THEIRS), cache, [0], [0], code=PARAM_INVALID)
    refused(engine.link_clusters, [], error=RuntimeError)
    local.close()
    local.open(OURS, listen=None)  # and the next one serves
    wait_until(lambda: local.link(owner.ask("listen_address"), THEIRS) is SUCCESS, "the peer has seen the old one end")
    local.add("d0", desc([BLOCKS, BLOCK], 2), TARGET, blocks=True)
    pull_and_compare(local, 0, [3], [5])


def test_finalize_while_threads_call_whatever_they_like_ends_them_all(local, owner, quiet):
    """Calls that begin before, during and after it: each returns or raises what is documented."""
    link(local, owner)
    offer(local, owner)
    address, memory = owner.ask("listen_address"), np.zeros(64, np.uint8)
    for _ in range(5):
        engine, manager, cache = local.engine, local.manager, local.caches["d0"]
        counts = {}

        def own(manager=manager):
            made = manager.allocate_cache(desc([2, 64]), [CacheKey(OURS, req_id=1)])
            manager.copy_cache(made, made, 1, 0)
            manager.remove_cache_key(CacheKey(OURS, req_id=1))
            manager.deallocate_cache(made)

        def register(manager=manager):
            manager.unregister_cache(manager.register_cache(desc([1, 64]), [memory.ctypes.data]).cache_id)

        kinds = {
            "pull": lambda manager=manager, cache=cache: manager.pull_blocks(BlocksCacheKey(THEIRS), cache, [1, 2], [3, 4]),
            "own": own,
            "register": register,
            "link": lambda engine=engine: engine.link_clusters([cluster(address, THEIRS)], 5000),
        }

        def repeat(kind, call, counts=counts):
            while True:
                try:
                    call()
                except (LLMException, RuntimeError) as exc:
                    return exc
                counts[kind] = counts.get(kind, 0) + 1

        # One thread of each kind, and of pulls some: keys and caches of "own" are one thread's own.
        threads = [Background(repeat, *each) for each in [*kinds.items(), *[("pull", kinds["pull"])] * 4]]
        wait_until(lambda counts=counts, kinds=kinds: counts.keys() == kinds.keys(), "all kinds of calls have worked")
        engine.finalize()
        for thread in threads:
            ending = thread.result()
            if type(ending) is RuntimeError:
                assert "not initialized" in str(ending)
            else:
                assert ending.status_code in (FAILED, PARAM_INVALID, LLMStatusCode.LLM_NOT_YET_LINK), ending
                assert ending.cause
        local.close()
        local.open(OURS, listen=None)
        assert local.link(address, THEIRS) is SUCCESS
        local.add("d0", desc([BLOCKS, BLOCK], 2), TARGET, blocks=True)
        pull_and_compare(local, 0, [3], [5])


@pytest.mark.parametrize("one_sided", [False, True], ids=["two-sided", "one-sided"])
def test_what_is_registered_over_the_same_memory_after_linking_is_used_at_once(local, owner, one_sided):
    link(local, owner, one_sided=one_sided)
    owner.add("first", desc([8, 256]), 1, BlocksCacheKey(THEIRS, 0), blocks=True, accessible=True)
    local.add("d", desc([8, 256]), TARGET, blocks=True, accessible=True)
    # A second group in the upper half of the same memory, as frameworks register views of one tensor.
    owner.run(
        "end.lend('second', half, [end.memory['first'][0][1024:]], key, blocks=True, accessible=True)",
        half=desc([4, 256]),
        key=BlocksCacheKey(THEIRS, 1),
    )
    wanted = pattern(1, 0, 2048).reshape(8, 256)
    for model, src, dst in ((0, 5, 1), (1, 1, 2), (1, 3, 3)):
        local.manage("pull_blocks", BlocksCacheKey(THEIRS, model), "d", [src], [dst])
    assert np.array_equal(local.content("d")[0].reshape(8, 256)[1:4], wanted[[5, 5, 7]])

    owner.drop("second")
    refused(local.manage, "pull_blocks", BlocksCacheKey(THEIRS, 1), "d", [0], [0], code=NOT_EXIST)
    local.manage("pull_blocks", BlocksCacheKey(THEIRS, 0), "d", [6], [0])
    assert np.array_equal(local.content("d")[0].reshape(8, 256)[0], wanted[6])


def test_one_object_is_initialised_and_linked_again_and_again(local, owner):
    address = owner.open(THEIRS)
    owner.add("s", desc([4, 512]), 1, BlocksCacheKey(THEIRS), blocks=True)
    settings = options()
    local.open(OURS, raw=settings)
    engine = local.engine
    for _ in range(30):
        assert local.link(address, THEIRS) is SUCCESS
        local.add("d", desc([4, 512]), TARGET, blocks=True)
        local.manage("pull_blocks", BlocksCacheKey(THEIRS), "d", [0, 1, 2, 3], [3, 2, 1, 0])
        assert np.array_equal(local.content("d")[0].reshape(4, 512), pattern(1, 0, 2048).reshape(4, 512)[::-1])
        engine.finalize()
        engine.init(settings)


def test_a_vanished_peer_is_unlinked_by_its_id_and_linked_again_on_the_same_object(local, transport):
    local.open(OURS, listen=None)
    local.add("d", desc([4, 512]), TARGET, blocks=True)
    address = ADDRESS
    for life in range(3):
        assert local.unlink(THEIRS) is SUCCESS  # by force: unknown the first time, then vanished
        with Peer() as peer:
            address = peer.open(THEIRS, listen=address)
            peer.add("s", desc([4, 512]), life, BlocksCacheKey(THEIRS), blocks=True)
            assert local.link(address, THEIRS) is SUCCESS
            local.manage("pull_blocks", BlocksCacheKey(THEIRS), "d", [0, 1, 2, 3], [0, 1, 2, 3])
            assert np.array_equal(local.content("d")[0], pattern(life, 0, 2048))
            peer.kill()
