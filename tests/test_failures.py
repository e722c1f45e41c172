# SPDX-License-Identifier: Apache-2.0
"""What is promised when something goes wrong in the middle: deadlines, cancelled pulls, lost memory, lost peers.

Two promises run through all of it: a pull that succeeded has the right bytes, and one that ended touches nothing any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import time
import zlib

import numpy as np
import pytest

from links import OURS, THEIRS, by_id, link
from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, LLMException, LLMStatusCode
from peers import ADDRESS, SOURCE, TARGET, Background, Peer, desc, memory_at, pattern, ramp, refused, wait_until

SUCCESS = LLMStatusCode.LLM_SUCCESS
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
FAILED = LLMStatusCode.LLM_FAILED
TIMEOUT = LLMStatusCode.LLM_TIMEOUT

SMALL = [2, 4096]
LARGE = 1 << 28
LATE = 10 * 0.1  # seconds: ten times the promised 100 ms after the deadline


def add_small(local, owner):
    """Give both ends a small cache, to see that the link still serves."""
    local.add("small", desc(SMALL), TARGET)
    return owner.add("small", desc(SMALL), SOURCE)


def serves(local, cache_id):
    local.fill("small", TARGET)
    local.manage("pull_cache", by_id(cache_id, 1), "small", 0)
    wanted = pattern(TARGET, 0, 8192)
    wanted[:4096] = pattern(SOURCE, 0, 8192)[4096:]
    assert np.array_equal(local.content("small")[0], wanted)


# --- memory that is not there


@contextlib.contextmanager
def pages(count):
    """Pages whose protection can be changed, zeros at first."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, count * mmap.PAGESIZE) as mapping:
        address = np.frombuffer(mapping, np.uint8).ctypes.data

        def protect(first, protection):
            start = ctypes.c_void_p(address + first * mmap.PAGESIZE)
            assert libc.mprotect(start, ctypes.c_size_t((count - first) * mmap.PAGESIZE), protection) == 0

        try:
            yield address, protect
        finally:
            protect(0, mmap.PROT_READ | mmap.PROT_WRITE)


def test_a_destination_that_is_not_mapped_is_refused(local, owner):
    link(local, owner)
    cache_id = add_small(local, owner)
    owner.add("blocks", desc(SMALL), SOURCE, BlocksCacheKey(THEIRS), blocks=True)
    for address in (1, 4096, 2**64 - 1, 2**47 - 4096):
        cache = local.manager.register_cache(desc(SMALL), [address])
        blocks = local.manager.register_blocks_cache(desc(SMALL), [address])
        for _ in range(2):  # asked anew each time
            refused(local.manager.pull_cache, by_id(cache_id), cache, code=PARAM_INVALID)
            refused(local.manager.pull_blocks, BlocksCacheKey(THEIRS), blocks, [0], [1], code=PARAM_INVALID)
    serves(local, cache_id)


def test_a_destination_that_can_not_be_written_is_refused_until_it_can(local, owner):
    link(local, owner)
    cache_id = add_small(local, owner)
    with pages(4) as (address, protect):
        cache = local.manager.register_cache(desc([1, 4 * mmap.PAGESIZE]), [address])
        source = owner.add("source", desc([1, 4 * mmap.PAGESIZE]), SOURCE)
        for first, protection in ((0, mmap.PROT_READ), (0, 0), (3, mmap.PROT_READ), (3, 0)):
            protect(first, protection)
            refused(local.manager.pull_cache, by_id(source), cache, code=PARAM_INVALID)
            protect(0, mmap.PROT_READ | mmap.PROT_WRITE)
            assert not memory_at(address, 4 * mmap.PAGESIZE).any()
        local.manager.pull_cache(by_id(source), cache)
        assert np.array_equal(memory_at(address, 4 * mmap.PAGESIZE), pattern(SOURCE, 0, 4 * mmap.PAGESIZE))
        # it was looked at once: what the caller takes away later is found out by the transfer
        protect(3, 0)
        refused(local.manager.pull_cache, by_id(source), cache, code=PARAM_INVALID)
        serves(local, cache_id)
        protect(0, mmap.PROT_READ | mmap.PROT_WRITE)
        local.manager.pull_cache(by_id(source), cache)
        local.manager.unregister_cache(cache.cache_id)


def test_a_source_that_is_not_mapped_is_refused(local, owner):
    link(local, owner)
    cache_id = add_small(local, owner)
    local.add("d", desc(SMALL), TARGET)
    for address in (1, 4096, 2**64 - 1, 2**64 - 8192, 2**47 - 4096):
        bad = owner.manage("register_cache", desc(SMALL), [address])
        before = local.checksum("d")
        failure = refused(local.manage, "pull_cache", by_id(bad), "d", code=PARAM_INVALID)
        assert (failure.operation, failure.peer) == ("pull_cache", THEIRS)
        assert local.checksum("d") == before
        serves(local, cache_id)


PARTLY_MAPPED = """
import mmap, ctypes, numpy as np
from peers import desc
pages, size = 64, 64 * mmap.PAGESIZE
end.mapping = mmap.mmap(-1, size)
address = np.frombuffer(end.mapping, np.uint8).ctypes.data
ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size // 2), ctypes.c_size_t(size // 2), 0)
result = end.manager.register_cache(desc([2, size // 2]), [address]).cache_id
"""


def test_a_source_that_is_mapped_in_part_serves_that_part(local, owner):
    link(local, owner)
    cache_id = add_small(local, owner)
    bad = owner.run(PARTLY_MAPPED)
    row = 32 * mmap.PAGESIZE
    local.add("d", desc([1, row]), TARGET)
    refused(local.manage, "pull_cache", by_id(bad, 1), "d", code=PARAM_INVALID)
    local.manage("pull_cache", by_id(bad, 0), "d")
    assert not local.content("d")[0].any()
    serves(local, cache_id)
    owner.run("del end.mapping")


# --- memory that goes away during a pull

REPLACE = "end.add('new', end.like, 99, blocks=True, owned=True, content=ramp)"
TAKE_BACK = {
    # what the owner does while its bytes are being pulled, and then writes into the memory
    "unregister": "end.manager.unregister_cache(cache); end.tensors('large')[0][:] = 0xEE",
    "unregister owned": f"end.manager.unregister_cache(cache)\n{REPLACE}",
    "deallocate": f"end.drop('large')\n{REPLACE}",
}
SIZE = 1 << 26


@pytest.mark.parametrize("how", TAKE_BACK)
def test_memory_that_is_taken_back_during_a_pull_gives_no_wrong_bytes(local, owner, how):
    owned = how != "unregister"
    pool = f'{{"memory_size": {SIZE}}}'  # the next allocation has to take the same memory
    address = owner.open(THEIRS, mem_pool_cfg=pool)
    local.open(OURS, listen=None)
    assert local.link(address, THEIRS) is SUCCESS
    cache_id = add_small(local, owner)
    owner.run("from peers import desc; end.like = desc([1, size])", size=SIZE)
    local.add("d", desc([1, SIZE]), TARGET, blocks=True, content=ramp)
    right = ramp(SOURCE, 0, SIZE)
    view = local.tensors("d")[0]
    ends = []
    for began in (0, 0, SIZE // 2, SIZE - SIZE // 8):
        cache = owner.add("large", desc([1, SIZE]), SOURCE, BlocksCacheKey(THEIRS), blocks=True, owned=owned, content=ramp)
        view[:] = ~right
        transfer = Background(local.manage, "pull_blocks", BlocksCacheKey(THEIRS), "d", [0], [0])
        # a guess is enough: at whatever moment the memory goes, the outcome is one of two
        transfer.reaches(view, right, began)
        with contextlib.suppress(LLMException):
            owner.run(TAKE_BACK[how], cache=cache, ramp=ramp)  # a pool that is still held has no room for the new cache
        try:
            transfer.result()
            ends.append(SUCCESS)
            assert np.array_equal(view, right)
        except LLMException as exc:
            assert exc.status_code is NOT_EXIST, exc
            ends.append(NOT_EXIST)
        settled = local.checksum("d")
        serves(local, cache_id)
        assert local.checksum("d") == settled
        owner.run(
            "for name in ('large', 'new'):\n"
            "    cache = end.caches.pop(name, None)\n"
            "    if cache: end.manager.unregister_cache(cache.cache_id)"
        )
    print(how, ends)


def test_a_pull_by_key_keeps_the_memory_until_it_has_ended(local, owner):
    address = owner.open(THEIRS, mem_pool_cfg=f'{{"memory_size": {SIZE}}}')
    local.open(OURS, listen=None)
    assert local.link(address, THEIRS) is SUCCESS
    right = ramp(SOURCE, 0, SIZE)
    local.add("d", desc([1, SIZE]), TARGET, content=ramp)
    view = local.tensors("d")[0]
    key = CacheKey(THEIRS, req_id=1)
    for _ in range(2):
        owner.add("large", desc([1, SIZE]), SOURCE, [key], owned=True, content=ramp)
        view[:] = ~right
        transfer = Background(local.manage, "pull_cache", key, "d")
        transfer.reaches(view, right)
        owner.drop("large")
        owner.manage("remove_cache_key", key)  # or the pull has released it by now
        with contextlib.suppress(LLMException):  # out of memory, unless the pull was through
            owner.add("new", desc([1, SIZE]), 99, owned=True, content=ramp)
        transfer.result()
        assert np.array_equal(view, right)
        if not owner.run("result = end.caches.pop('new', None) and end.manager.unregister_cache(2) is None"):
            owner.add("new", desc([1, SIZE]), 99, owned=True, content=ramp)  # the memory is free now
            owner.drop("new")
        owner.close()
        assert local.link(owner.open(THEIRS, mem_pool_cfg=f'{{"memory_size": {SIZE}}}'), THEIRS) is SUCCESS


def test_unregistering_a_destination_waits_for_the_pull_into_it(local, owner):
    link(local, owner, sync_kv_timeout=1000)
    cache_id = add_small(local, owner)
    local.add("d", desc(SMALL), TARGET)
    memory, target = local.memory["d"], local.caches["d"].cache_id
    with owner.stopped():
        transfer = Background(local.manage, "pull_cache", by_id(cache_id), "d")
        wait_until(lambda: local.held() > 1, "the engine knows of it")
        try:
            local.manager.unregister_cache(target)
        except LLMException as exc:  # its own deadline comes a moment after that of the pull
            assert exc.status_code is TIMEOUT and "still in use" in exc.cause
        with pytest.raises(LLMException) as failure:
            transfer.result()
        # or the memory was given up before the pull came to hold it
        assert failure.value.status_code in (TIMEOUT, NOT_EXIST)
    serves(local, cache_id)  # the answer to the first request has come by now
    assert np.array_equal(memory[0], pattern(TARGET, 0, 8192))


# --- deadlines


@pytest.mark.parity("failure.deadline")
@pytest.mark.parametrize("transport", ["tcp"], indirect=True, scope="module")  # over shm it would not need the peer
def test_a_pull_from_a_stopped_peer_ends_at_its_deadline_and_touches_nothing_after(local, owner):
    timeout = 2.0
    link(local, owner, sync_kv_timeout=int(timeout * 1000))
    small = add_small(local, owner)
    source = owner.run(
        "import numpy as np; from peers import desc\n"
        "end.large = np.full(size, 0xA5, np.uint8)\n"
        "result = end.manager.register_cache(desc([1, size]), [end.large.ctypes.data]).cache_id",
        size=LARGE,
    )
    memory = np.zeros(LARGE, np.uint8)
    words = memory.view(np.uint64)
    cache = local.manager.register_cache(desc([1, LARGE]), [memory.ctypes.data])
    for _ in range(5):  # until the peer was stopped in the middle
        memory[:] = 0
        transfer = Background(local.manager.pull_cache, by_id(source), cache)
        transfer.reaches(memory, b"\xa5")
        with owner.stopped():
            try:
                transfer.result()
                continue  # it was through before the stop
            except LLMException as exc:
                returned, left = np.count_nonzero(words), transfer.seconds - timeout
                assert exc.status_code is TIMEOUT, exc
            assert 0 < returned < words.size, "changed in part"
            assert -0.1 < left < LATE, f"{left} s after the deadline"
            unchanged(words, 2.0)
            failure = refused(local.manage, "pull_cache", by_id(small), "small", code=TIMEOUT)  # no new one is served either
            assert failure.hint
        # continued, the peer goes on sending what was under way: nothing of it may arrive
        serves(local, small)
        unchanged(words, 0.5)
        assert np.count_nonzero(words) == returned
        local.manager.pull_cache(by_id(source), cache)
        assert (memory == 0xA5).all()
        break
    else:
        pytest.fail("no pull was interrupted in the middle")
    local.manager.unregister_cache(cache.cache_id)
    owner.run("end.manager.unregister_cache(cache); del end.large", cache=source)


def unchanged(words, seconds):
    """Watch memory for a while."""
    before, until = int(words.sum(dtype=np.uint64)), time.monotonic() + seconds
    while time.monotonic() < until:
        assert int(words.sum(dtype=np.uint64)) == before, "written after the call had returned"
        time.sleep(0.02)


@pytest.mark.parity("failure.deadline")
def test_pulls_in_flight_end_each_at_its_own_deadline(local, owner):
    timeout = 0.5
    link(local, owner, sync_kv_timeout=int(timeout * 1000))
    small = add_small(local, owner)
    for n in range(4):
        local.add(f"d{n}", desc(SMALL), TARGET)
    with owner.stopped():
        calls = [Background(local.manage, "pull_cache", by_id(small), f"d{n}") for n in range(4)]
        for call in calls:
            refused(call.result, code=TIMEOUT)
            assert timeout - 0.1 < call.seconds < timeout + LATE
    for n in range(4):
        local.manage("pull_cache", by_id(small), f"d{n}")
        assert np.array_equal(local.content(f"d{n}")[0][:4096], pattern(SOURCE, 0, 8192)[:4096])


def test_a_pull_that_timed_out_releases_nothing(local, owner):
    link(local, owner, sync_kv_timeout=300)
    local.add("d", desc(SMALL), TARGET)
    key = CacheKey(THEIRS, req_id=1)
    owner.add("s", desc(SMALL), SOURCE, [key], owned=True)
    for _ in range(3):
        with owner.stopped():
            refused(local.manage, "pull_cache", key, "d", code=TIMEOUT)
        assert np.array_equal(local.content("d")[0], pattern(TARGET, 0, 8192))
    local.manage("pull_cache", key, "d")
    assert np.array_equal(local.content("d")[0][:4096], pattern(SOURCE, 0, 8192)[:4096])
    refused(local.manage, "pull_cache", key, "d", code=NOT_EXIST)


def test_a_stopped_peer_does_not_keep_another_one(local, owner):
    link(local, owner, sync_kv_timeout=1000)
    add_small(local, owner)
    with Peer() as other:
        address = other.open(3)
        cache_id = other.add("s", desc(SMALL), 7)
        local.add("d", desc(SMALL), TARGET)
        local.add("d2", desc(SMALL), TARGET)
        assert local.link(address, 3) is SUCCESS
        with owner.stopped():
            waiting = Background(local.manage, "pull_cache", by_id(1), "d")
            for _ in range(20):
                local.manage("pull_cache", CacheKeyByIdAndIndex(3, cache_id), "d2")
            assert np.array_equal(local.content("d2")[0][:4096], pattern(7, 0, 8192)[:4096])
            refused(waiting.result, code=TIMEOUT)


# --- peers that die


def ended_by_death(calls, seconds=60):
    """Calls one after the other have ended because their peer has: in one of them, or between two, when it was known already."""
    with pytest.raises(LLMException) as failure:
        calls.result(seconds)
    assert failure.value.status_code in (FAILED, NOT_YET_LINK) and "peer died" in failure.value.cause, failure.value


@pytest.mark.parity("failure.transport")
def test_a_peer_that_dies_during_pulls_ends_them_and_its_bytes_are_not_taken_for_others(local, transport):
    size = 1 << 26
    right = {life: ramp(life, 0, size) for life in range(3)}
    address = ADDRESS
    local.open(OURS, listen=None)
    local.add("d", desc([1, size]), TARGET, content=ramp)
    view = local.tensors("d")[0]
    for life in range(3):
        with Peer() as peer:
            address = peer.open(THEIRS, listen=address)
            cache_id = peer.add("s", desc([1, size]), life, content=ramp)
            assert local.link(address, THEIRS) is SUCCESS
            local.manage("pull_cache", by_id(cache_id), "d")
            assert np.array_equal(view, right[life])
            view[:] = ~right[life]
            pulls = Background.until_it_fails(local.manage, "pull_cache", by_id(cache_id), "d")
            pulls.reaches(view, right[life])
            peer.kill()
        ended_by_death(pulls, LATE + 5)
        settled = local.checksum("d")
        refused(local.manage, "pull_cache", by_id(cache_id), "d", code=NOT_YET_LINK)
        assert local.checksum("d") == settled


def test_a_puller_that_dies_in_the_middle_releases_nothing(local, transport):
    address = local.open(THEIRS, mem_pool_cfg=f'{{"memory_size": {SIZE}}}')  # there is room for one
    key = CacheKey(THEIRS, req_id=1)
    right = ramp(SOURCE, 0, SIZE)
    first, last = int(right[0]), int(right[-1])
    for _ in range(10):
        local.add("s", desc([1, SIZE]), SOURCE, [key], owned=True, content=ramp)
        local.drop("s")  # from here on the key alone holds the memory
        with Peer() as puller:
            puller.open(OURS, listen=None)
            puller.add("d", desc([1, SIZE]), TARGET, content=ramp)
            puller.run("view = end.tensors('d')[0]; view[0], view[-1] = ends", ends=(~first & 0xFF, ~last & 0xFF))
            assert puller.link(address, THEIRS) is SUCCESS
            with puller.watched("d") as byte:
                call = puller.begin("manage", "pull_cache", key, "d")
                wait_until(lambda byte=byte, call=call: byte(0) == first or call.ended(), "bytes arrive")
                with puller.stopped():
                    unfinished = byte(SIZE - 1) != last
                    puller.kill()
        if unfinished:
            break
        wait_until(lambda: "dead" in local.ask("explain", OURS), "it is seen")
        local.manage("remove_cache_key", key)  # or the pull had released it
    else:
        pytest.fail("no puller died in the middle")
    wait_until(lambda: "dead" in local.ask("explain", OURS), "it is seen")
    with Peer() as puller:
        puller.open(OURS, listen=None)
        puller.add("d", desc([1, SIZE]), TARGET, content=ramp)
        assert puller.link(address, THEIRS) is SUCCESS
        puller.manage("pull_cache", key, "d")
        assert puller.checksum("d") == zlib.crc32(right)
        refused(puller.manage, "pull_cache", key, "d", code=NOT_EXIST)
    local.add("new", desc([1, SIZE]), 99, owned=True, content=ramp)  # and the memory is free


def test_an_engine_that_is_finalized_during_pulls_ends_them(local, owner):
    right = ramp(SOURCE, 0, SIZE)
    for _ in range(3):
        address = owner.open(THEIRS)
        if local.engine is None:
            local.open(OURS, listen=None)
            local.add("d", desc([1, SIZE]), TARGET, content=ramp)
        cache_id = owner.add("s", desc([1, SIZE]), SOURCE, content=ramp)
        assert local.link(address, THEIRS) is SUCCESS
        view = local.tensors("d")[0]
        view[:] = ~right
        pulls = Background.until_it_fails(local.manage, "pull_cache", by_id(cache_id), "d")
        pulls.reaches(view, right)
        owner.close()
        ended_by_death(pulls)
        wait_until(lambda: "dead" in local.ask("explain", THEIRS), "the link is dead")


def test_the_death_of_one_peer_leaves_the_link_to_another(local, owner):
    link(local, owner)
    small = add_small(local, owner)
    with Peer() as other:
        address = other.open(3)
        other.add("s", desc(SMALL), 7)
        assert local.link(address, 3) is SUCCESS
        local.add("d", desc(SMALL), TARGET)
        local.manage("pull_cache", CacheKeyByIdAndIndex(3, 1), "d")
        other.kill()
    wait_until(lambda: "dead" in local.ask("explain", 3), "it is seen")
    refused(local.manage, "pull_cache", CacheKeyByIdAndIndex(3, 1), "d", code=NOT_YET_LINK)
    serves(local, small)
