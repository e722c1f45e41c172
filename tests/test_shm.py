# SPDX-License-Identifier: Apache-2.0
"""Bytes that move between processes of one host without their owner's help, and what becomes of them when something goes wrong.

What a pull means is tested over each transport elsewhere (test_pulls.py, test_caches.py, test_failures.py). Here is what is
promised of an owner that takes no part: it may be stopped, dead, or busy with giving the memory to somebody else.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import signal
import tempfile
import threading
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import living_host
from links import OURS, THEIRS, by_id, link_over_shm
from living_host import inside
from llm_datadist import BlocksCacheKey, CacheKey, LLMException, LLMStatusCode
from peers import ADDRESS, SOURCE, TARGET, Background, Peer, desc, is_pattern, pattern, ramp, refused, wait_until

SUCCESS = LLMStatusCode.LLM_SUCCESS
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
OUT_OF_MEMORY = LLMStatusCode.LLM_OUT_OF_MEMORY
FAILED = LLMStatusCode.LLM_FAILED
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
DEAD = (FAILED, NOT_YET_LINK)  # which one depends on whether the call or the link finds it out first

pytestmark = pytest.mark.usefixtures("quiet")  # peers die here, on purpose

BLOCKS = BlocksCacheKey(THEIRS)
EVERY = [0, 1, 2, 3]
LARGE = 1 << 28
LATE = 10 * 0.1  # seconds: ten times the promised 100 ms after the deadline


def key(n):
    return CacheKey(THEIRS, req_id=n)


@pytest.fixture(scope="module")
def transport():
    """None is required: the ends choose to share memory."""


# --- every pull, out of and into every kind of memory

ROW = 5000


INTO = {
    "pool": None,
    "numpy": lambda sizes: [np.empty(size, np.uint8) for size in sizes],
    "a file": lambda sizes: mapped(None, sizes),
    "a shared-memory file": lambda sizes: mapped("/dev/shm", sizes),
    "a private mapping of a file": lambda sizes: mapped(None, sizes, mmap.MAP_PRIVATE),
    "one tensor here, another there": lambda sizes: [np.empty(sizes[0], np.uint8), *mapped("/dev/shm", sizes[1:])],
}


def mapped(folder, sizes, flags=mmap.MAP_SHARED):
    """Arrays that are mapped files, each of its own."""
    arrays = []
    for size in sizes:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            arrays.append(np.frombuffer(mmap.mmap(file.fileno(), size, flags), np.uint8))
    return arrays


def take(local, name, description, into, blocks=False):
    """Give an end a cache of a kind of memory, with the pattern of TARGET."""
    if INTO[into] is None:
        local.add(name, description, TARGET, blocks=blocks, owned=True)
        return
    local.lend(name, description, INTO[into]([description.size] * description.num_tensors), blocks=blocks)
    local.fill(name, TARGET)


@pytest.mark.parametrize("into", INTO)
@pytest.mark.parametrize("one_sided", [False, True], ids=["two-sided", "one-sided"])
def test_every_pull_moves_every_byte_into_any_memory(local, owner, owned, one_sided, into):
    link_over_shm(local, owner, one_sided=one_sided)
    rows = owner.add("rows", desc([4, ROW], 4), SOURCE, [key(n) for n in range(4)], owned=owned)
    owner.add("blocks", desc([8, ROW], 4), SOURCE + 1, BLOCKS, blocks=True, owned=owned)
    take(local, "d", desc([4, ROW], 4), into)
    take(local, "b", desc([8, ROW], 4), into, blocks=True)
    there = [pattern(SOURCE, tensor, 4 * ROW).reshape(4, ROW) for tensor in range(4)]
    blocks = [pattern(SOURCE + 1, tensor, 8 * ROW).reshape(8, ROW) for tensor in range(4)]
    wanted = {name: [view.reshape(-1, ROW) for view in local.content(name)] for name in ("d", "b")}

    def moved():
        for name, tensors in wanted.items():
            for got, want in zip(local.tensors(name), tensors):
                assert np.array_equal(got.reshape(-1, ROW), want), name

    local.manage("pull_cache", by_id(rows, 0), "d", 3)
    for tensor in range(4):
        wanted["d"][tensor][3] = there[tensor][0]
    moved()
    local.manage("pull_cache", by_id(rows, 1), "d", 0, ROW - 7, src_layer_range=range(1, 2), dst_layer_range=range(1))
    for tensor in range(2):
        wanted["d"][tensor][0, : ROW - 7] = there[2 + tensor][1, : ROW - 7]
    moved()
    if not one_sided:  # there are no pulls of rows by key into rows
        local.manage("pull_cache", key(3), "d", 1)
        for tensor in range(4):
            wanted["d"][tensor][1] = there[tensor][3]
        moved()
        if owned:
            refused(local.manage, "pull_cache", key(3), "d", 1, code=NOT_EXIST)
    local.manage("pull_blocks", BLOCKS, "b", [7, 0, 7], [1, 2, 5])
    for tensor in range(4):
        wanted["b"][tensor][[1, 2, 5]] = blocks[tensor][[7, 0, 7]]
    moved()
    local.manage("pull_blocks", key(2), "b", [], [6])
    for tensor in range(4):
        wanted["b"][tensor][6] = there[tensor][2]
    moved()


@pytest.mark.parametrize("into", ["numpy", "a file"])
def test_a_large_pull(local, owner, owned, into):
    """More than is copied in one go: the pull goes on in the background while its caller waits."""
    size = LARGE if into == "numpy" else 3 * LARGE // 4
    link_over_shm(local, owner, mem_pool_cfg=f'{{"memory_size": {size}}}')
    owner.add("s", desc([4, size // 4]), SOURCE, BLOCKS, blocks=True, owned=owned, content=ramp)
    local.lend("d", desc([4, size // 4]), INTO[into]([size]), blocks=True)
    wanted = ramp(SOURCE, 0, size).reshape(4, -1)
    for order in ((3, 0, 1, 2), (1, 2, 0, 3)):  # the second time by a known key
        local.manage("pull_blocks", BLOCKS, "d", order, [0, 1, 2, 3])
        assert all(np.array_equal(local.tensors("d")[0].reshape(4, -1)[to], wanted[n]) for to, n in enumerate(order))


@pytest.mark.parametrize("threads", [1, 3, 64])
def test_any_number_of_copy_threads_moves_every_byte(local, owner, owned, threads):
    size = 40 << 20
    link_over_shm(local, owner, mem_pool_cfg=f'{{"memory_size": {size}}}', copy_threads=threads)
    owner.add("s", desc([5, size // 5]), SOURCE, BLOCKS, blocks=True, owned=owned, content=ramp)
    local.lend("d", desc([5, size // 5]), [np.zeros(size, np.uint8)], blocks=True)
    for _ in range(3):
        local.manage("pull_blocks", BLOCKS, "d", [4, 2, 0, 1, 3], [0, 1, 2, 3, 4])
        assert np.array_equal(local.tensors("d")[0].reshape(5, -1), ramp(SOURCE, 0, size).reshape(5, -1)[[4, 2, 0, 1, 3]])
        local.tensors("d")[0][:] = 0


def test_a_pull_of_a_byte(local, owner, owned):
    link_over_shm(local, owner)
    owner.add("s", desc([9, 1]), SOURCE, BLOCKS, blocks=True, owned=owned)
    local.add("d", desc([9, 1]), TARGET, blocks=True)
    for n in range(9):
        local.manage("pull_blocks", BLOCKS, "d", [n], [8 - n])
    assert np.array_equal(local.content("d")[0][::-1], pattern(SOURCE, 0, 9))


def test_what_is_made_after_the_link_is_there_at_once(local, owner, owned):
    link_over_shm(local, owner)
    local.add("d", desc([1, 300]), TARGET, blocks=True)
    for n in range(50):
        cache_id = owner.add("s", desc([1, 300]), n, BlocksCacheKey(THEIRS, n), blocks=True, owned=owned)
        assert cache_id == n + 1
        local.manage("pull_blocks", BlocksCacheKey(THEIRS, n), "d", [0], [0])
        assert is_pattern(local.content("d")[0], n)


def test_a_key_that_is_taken_over_leads_to_the_new_cache_at_once(local, owner, owned):
    link_over_shm(local, owner)
    local.add("d", desc([4, 300]), TARGET, blocks=True)
    local.add("row", desc([1, 1200]), TARGET)
    first = owner.add("s0", desc([4, 300]), 0, BLOCKS, blocks=True, owned=owned)

    def pull():
        local.manage("pull_blocks", BLOCKS, "d", EVERY, EVERY)
        return local.content("d")[0]

    for n in range(1, 20):
        for _ in range(2):
            assert is_pattern(pull(), n - 1)
        owner.add(f"s{n}", desc([4, 300]), n, BLOCKS, blocks=True)  # the former one stays registered
    assert is_pattern(pull(), 19)
    owner.drop("s0")  # its key is another's: nothing changes
    assert is_pattern(pull(), 19)
    owner.drop("s19")
    refused(pull, code=NOT_EXIST)
    assert first == 1


def test_a_cache_whose_key_was_taken_over_is_still_reached_by_id(local, owner, owned):
    link_over_shm(local, owner, one_sided=True)  # two-sided ids name rows
    local.add("row", desc([1, 1200]), TARGET)
    for n in range(10):
        owner.add(f"s{n}", desc([4, 300]), n, BLOCKS, blocks=True, owned=owned and n == 0)
        for cache_id in range(1, n + 2):
            local.manage("pull_cache", by_id(cache_id), "row", 0, 300)
            assert np.array_equal(local.content("row")[0][:300], pattern(cache_id - 1, 0, 1200)[:300])


def test_many_threads_pull_single_blocks_over_one_link(local, owner, owned):
    blocks, size, threads = 64, 16 << 10, 16
    link_over_shm(local, owner)
    owner.add("s", desc([blocks, size], 2), SOURCE, BLOCKS, blocks=True, owned=owned)
    local.add("d", desc([blocks, size], 2), TARGET, blocks=True)
    whole = [pattern(SOURCE, tensor, blocks * size).reshape(blocks, size) for tensor in range(2)]

    def repeat(thread):
        own = [n for n in range(blocks) if n % threads == thread]
        rng = np.random.default_rng(thread)
        for _ in range(50):
            src, dst = int(rng.integers(blocks)), int(rng.choice(own))
            local.manage("pull_blocks", BLOCKS, "d", [src], [dst])
            for tensor, view in enumerate(local.tensors("d")):
                assert np.array_equal(view.reshape(blocks, size)[dst], whole[tensor][src])

    for call in [Background(repeat, thread) for thread in range(threads)]:
        call.result()


# --- an owner that is stopped


@pytest.mark.parametrize("one_sided", [False, True], ids=["two-sided", "one-sided"])
def test_a_stopped_owner_is_not_needed_for_what_is_known(local, owner, owned, one_sided):
    timeout = 0.5
    link_over_shm(local, owner, one_sided=one_sided, sync_kv_timeout=int(timeout * 1000))
    owner.add("blocks", desc([4, 5000]), SOURCE, BLOCKS, blocks=True, owned=owned)
    rows = owner.add("rows", desc([2, 5000]), SOURCE + 1, owned=owned and one_sided)  # else a row may have a key to be released
    late = owner.add("late", desc([2, 5000]), SOURCE + 2, [key(1)], owned=owned)
    local.add("b", desc([4, 5000]), TARGET, blocks=True)
    local.add("d", desc([1, 5000]), TARGET)
    pulls = (
        (("pull_blocks", BLOCKS, "b", EVERY, EVERY), "b", pattern(SOURCE, 0, 20_000)),
        (("pull_cache", by_id(rows, 1), "d"), "d", pattern(SOURCE + 1, 0, 10_000)[5000:]),
    )
    for call, _, _ in pulls:
        local.manage(*call)  # from here on the link knows what the key means
    with owner.stopped():
        for (call, name, wanted), _ in itertools.product(pulls, range(20)):
            local.fill(name, TARGET)
            local.manage(*call)
            assert np.array_equal(local.content(name)[0], wanted)
        for call in (("pull_cache", by_id(late), "d"), ("pull_blocks", key(1), "b", [], [0])):
            local.fill(call[2], TARGET)
            waiting = Background(local.manage, *call)
            failure = refused(waiting.result, code=TIMEOUT)
            assert timeout - 0.1 < waiting.seconds < timeout + LATE
            assert (failure.peer, failure.hint is None) == (THEIRS, False)
            assert is_pattern(local.content(call[2])[0], TARGET), "nothing has arrived"
    assert "linked" in local.told(THEIRS)["cluster 1"]
    local.manage("pull_blocks", key(1), "b", [], [2])
    assert is_pattern(local.content("d")[0], TARGET), "nothing has arrived later"
    wanted = pattern(TARGET, 0, 20_000)
    wanted[10_000:15_000] = pattern(SOURCE + 2, 0, 10_000)[:5000]
    assert np.array_equal(local.content("b")[0], wanted)


def test_a_deadline_in_the_middle_of_a_copy_ends_it(local, owner, owned):
    """The owner has nothing to do with it: its bytes could be copied for ever."""
    size = LARGE // 2
    address = owner.open(THEIRS, mem_pool_cfg=f'{{"memory_size": {size}}}')
    owner.add("s", desc([4, size // 4]), SOURCE, BLOCKS, blocks=True, owned=owned, content=ramp)
    owner.run("end.tensors('s')[0][:] = 0xA5")
    memory = np.zeros(size, np.uint8)
    words = memory.view(np.uint64)
    ends = Counter()
    for millis in (5, 10, 20, 30, 40, 60, 80):
        local.open(OURS, listen=None, sync_kv_timeout=millis)
        assert local.link(address, THEIRS) is SUCCESS
        local.lend("d", desc([4, size // 4]), [memory], blocks=True)
        for _ in range(2):
            memory[:] = 0
            try:
                local.manage("pull_blocks", BLOCKS, "d", EVERY, EVERY)
                assert (memory == 0xA5).all()
                ends["through"] += 1
            except LLMException as exc:
                returned = np.count_nonzero(words)
                assert exc.status_code is TIMEOUT, exc
                for _ in range(4):  # some 50 ms each
                    assert np.count_nonzero(words) == returned, "written after the call had returned"
                ends["midway" if 0 < returned < words.size else "at an end"] += 1
        local.close()
        if ends["midway"] >= 3:
            break
    assert ends["midway"], ends


# --- memory that goes away


@pytest.mark.parametrize("folder", ["/dev/shm", "disk"])
def test_a_destination_file_that_is_truncated_gets_an_error_and_no_signal(remote, local, tmp_path, owned, folder):
    """The process that pulls is another one: a store beyond the end of a file would kill it."""
    owner, puller, size = local, remote, 1 << 25
    with tempfile.NamedTemporaryFile(dir=tmp_path if folder == "disk" else folder) as file:
        file.truncate(size)
        address = owner.open(THEIRS, mem_pool_cfg=f'{{"memory_size": {2 * size}}}')
        cache_id = owner.add("s", desc([1, size], 2), SOURCE, owned=owned, content=ramp)
        puller.open(OURS, listen=None)
        assert puller.link(address, THEIRS) is SUCCESS
        puller.run(
            "import mmap, numpy as np; from peers import desc\n"
            "file = open(path, 'r+b')\n"
            "parts = [np.empty(size, np.uint8), np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)]\n"
            "end.lend('d', desc([1, size], 2), parts)",
            path=file.name,
            size=size,
        )

        def pull():
            return puller.begin("manage", "pull_cache", by_id(cache_id), "d")

        def whole():
            os.truncate(file.name, size)
            pull().result()
            assert np.array_equal(np.fromfile(file.name, np.uint8), ramp(SOURCE, 1, size))

        whole()
        for left in (0, size // 2 + 1):
            os.truncate(file.name, left)
            assert refused(pull().result, code=PARAM_INVALID).stage == "transfer"
            whole()
        ends = Counter()
        for _ in range(10):
            os.truncate(file.name, 0)
            os.truncate(file.name, size)
            call = pull()
            wait_until(lambda: os.pread(file.fileno(), 1, 8) != b"\0", "bytes arrive")
            os.truncate(file.name, 0)
            try:
                call.result()
                ends["through"] += 1
            except LLMException as exc:
                assert exc.status_code is PARAM_INVALID, exc
                ends["truncated"] += 1
            if ends["truncated"] >= 3:
                break
        assert ends["truncated"], ends
        whole()


TAKEN_AWAY = {
    "read-only": "libc.mprotect(addr, ctypes.c_size_t(size), mmap.PROT_READ)",
    "not mapped": "libc.munmap(addr, ctypes.c_size_t(size))",
}


@pytest.mark.parametrize("how", TAKEN_AWAY)
def test_a_destination_that_is_taken_away_gets_an_error_and_no_signal(remote, local, owned, how):
    """The process that pulls is another one: a plain store to such memory would kill it."""
    owner, puller, size = local, remote, 1 << 20
    address = owner.open(THEIRS)
    owner.add("s", desc([4, size // 4]), SOURCE, BLOCKS, blocks=True, owned=owned)
    puller.open(OURS, listen=None)
    assert puller.link(address, THEIRS) is SUCCESS
    puller.add("good", desc([4, size // 4]), TARGET, blocks=True)
    puller.run(
        "import ctypes, mmap; from peers import desc\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS\n"
        "at = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0)\n"
        "end.caches['d'] = end.manager.register_blocks_cache(desc([4, size // 4]), [at])\n"
        "end.at = at",
        size=size,
    )
    puller.manage("pull_blocks", BLOCKS, "d", EVERY, EVERY)  # looked at once, and found to be anonymous memory
    assert is_pattern(puller.content("d")[0], SOURCE)
    code = "import ctypes, mmap; libc = ctypes.CDLL(None); addr = ctypes.c_void_p(end.at)\nassert {} == 0"
    puller.run(code.format(TAKEN_AWAY[how]), size=size)
    for _ in range(3):
        failure = refused(puller.manage, "pull_blocks", BLOCKS, "d", EVERY, EVERY, code=PARAM_INVALID)
        assert failure.stage == "transfer"
        puller.fill("good", TARGET)
        puller.manage("pull_blocks", BLOCKS, "good", EVERY, EVERY)
        assert is_pattern(puller.content("good")[0], SOURCE)


def test_a_source_file_that_its_owner_truncates_is_an_error(local, owner, tmp_path):
    link_over_shm(local, owner)
    size = 1 << 25
    path = tmp_path / "source"
    right = ramp(SOURCE, 0, size)
    path.write_bytes(right)
    cache_id = owner.run(
        "import mmap, numpy as np; from peers import desc\n"
        "file = open(path, 'r+b')\n"
        "result = end.lend('s', desc([1, size]), [np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)])",
        path=str(path),
        size=size,
    )
    small = owner.add("small", desc([1, 100]), SOURCE)
    local.add("d", desc([1, size]), TARGET)
    local.add("e", desc([1, 100]), TARGET)
    view = local.tensors("d")[0]

    def whole():
        path.write_bytes(right)
        local.manage("pull_cache", by_id(cache_id), "d")
        assert np.array_equal(view, right)

    whole()
    for left in (0, size - 1 - mmap.PAGESIZE):
        os.truncate(path, left)
        failure = refused(local.manage, "pull_cache", by_id(cache_id), "d", code=PARAM_INVALID)
        assert "not mapped" in failure.cause and failure.hint
        whole()
    ends = Counter()
    for _ in range(10):
        view[:] = ~right
        transfer = Background(local.manage, "pull_cache", by_id(cache_id), "d")
        transfer.reaches(view, right)
        os.truncate(path, 0)
        try:
            transfer.result()
            ends["through"] += 1
            assert np.array_equal(view, right)
        except LLMException as exc:
            assert exc.status_code is PARAM_INVALID, exc
            ends["truncated"] += 1
        path.write_bytes(right)
        if ends["truncated"] >= 3:
            break
    assert ends["truncated"], ends
    local.manage("pull_cache", by_id(small), "e")
    assert is_pattern(local.content("e")[0], SOURCE)
    whole()


ADD = "result = end.add('s', desc([4, size // 4]), number, key, blocks=True, owned=True, content=ramp)"
REUSE = {
    # the owner gives the memory of cache "s" to the next one, after it has been another's
    "unregister": "end.manager.unregister_cache(end.caches['s'].cache_id)\n"
    "end.memory['s'][0][:] = 0xEE\n"
    "end.memory['s'][0][:] = ramp(number, 0, size)\n"
    "result = end.lend('s', desc([4, size // 4]), end.memory['s'], key, blocks=True)",
    "unregister owned": f"end.manager.unregister_cache(end.caches['s'].cache_id)\n{ADD}",
    "deallocate": f"end.drop('s')\n{ADD}",
}


@pytest.mark.parametrize("how", REUSE)
def test_pulls_of_memory_that_is_used_again_and_again_get_no_other_bytes(local, owner, how):
    """By id, which is never used again: bytes of that cache alone, or none."""
    size, rounds, distinct = 1 << 20, 100, 7
    link_over_shm(local, owner, one_sided=True, mem_pool_cfg=f'{{"memory_size": {size}}}')  # there is room for one
    code = f"from peers import desc, ramp\n{REUSE[how]}"
    contents = [ramp(number, 0, size) for number in range(distinct)]
    first = owner.add("s", desc([4, size // 4]), 1, BLOCKS, blocks=True, owned=how != "unregister", content=ramp)
    assert first == 1  # ids count up: the cache of an id has the pattern of that number
    current, done, ends = [first], threading.Event(), Counter()

    def repeat(name):
        view = local.tensors(name)[0]
        while not done.is_set():
            cache_id = current[0]
            try:
                local.manage("pull_cache", by_id(cache_id), name)
                assert np.array_equal(view, contents[cache_id % distinct][: view.size]), "other bytes"
                ends[SUCCESS] += 1
            except LLMException as exc:
                assert exc.status_code is NOT_EXIST, exc
                ends[NOT_EXIST] += 1

    for n in range(2):
        local.add(f"d{n}", desc([1, size // 4]), TARGET)
    threads = [Background(repeat, f"d{n}") for n in range(2)]
    try:
        for number in range(2, rounds):
            seen = ends[SUCCESS]
            current[0] = owner.run(code, number=number % distinct, size=size, key=BLOCKS)
            assert current[0] == number
            wait_until(lambda seen=seen: ends[SUCCESS] > seen or not threads[0].running(), "it is pulled")
    finally:
        done.set()
        for thread in threads:
            thread.result()
    assert ends[SUCCESS] >= rounds
    assert set(ends) <= {SUCCESS, NOT_EXIST}
    print(how, dict(ends))


# --- an initiator that is stopped in the middle


@pytest.mark.parametrize("how", [*REUSE, "withdrawn"])
def test_a_pull_that_stands_still_while_its_source_changes_hands_gets_no_other_bytes(local, remote, how):
    """It finds out, asks what the key means by now, and begins again."""
    size = 1 << 26
    owner, puller = local, remote
    address = owner.open(THEIRS, mem_pool_cfg=f'{{"memory_size": {size}}}')
    puller.open(OURS, listen=None, sync_kv_timeout=60_000)
    assert puller.link(address, THEIRS) is SUCCESS
    owned = how != "unregister"
    owner.add("s", desc([4, size // 4]), 0, BLOCKS, blocks=True, owned=owned, content=ramp)
    puller.add("d", desc([4, size // 4]), TARGET, blocks=True)
    code = f"from peers import desc, ramp\n{REUSE.get(how)}"
    contents = [ramp(number, 0, size) for number in range(2)]
    sums = [zlib.crc32(content) for content in contents]
    midway = 0
    with puller.watched("d") as byte:
        for number in range(1, 12):
            old, new = (number - 1) % 2, number % 2
            first, last = contents[old][0], contents[old][-1]
            puller.run("view = end.tensors('d')[0]; view[0], view[-1] = ends", ends=(~first, ~last))
            call = puller.begin("manage", "pull_blocks", BLOCKS, "d", EVERY, EVERY)
            wait_until(lambda first=first, call=call: byte(0) == first or call.ended(), "bytes arrive")
            with puller.stopped():
                unfinished = byte(size - 1) != last
                if how == "withdrawn":
                    owner.drop("s")
                else:
                    owner.run(code, number=new, size=size, key=BLOCKS)
            midway += unfinished
            try:
                call.result()
                ending = puller.checksum("d")
            except LLMException as exc:
                ending = exc.status_code
            allowed = {NOT_EXIST} if how == "withdrawn" else {sums[new]}
            assert ending in (allowed if unfinished else {*allowed, sums[old]})
            if how == "withdrawn":
                owner.add("s", desc([4, size // 4]), new, BLOCKS, blocks=True, owned=owned, content=ramp)
            if midway == 3:
                break
    assert midway, "no pull was stopped in the middle"


def test_a_pull_that_stands_still_beyond_its_lease_fails(local, remote):
    """The owner takes the memory back one second after the deadline, whatever the puller does."""
    size = 1 << 26
    owner, puller = local, remote
    address = owner.open(THEIRS, mem_pool_cfg=f'{{"memory_size": {size}}}')
    puller.open(OURS, listen=None, sync_kv_timeout=500)
    assert puller.link(address, THEIRS) is SUCCESS
    puller.add("d", desc([1, size]), TARGET)
    first, last = ramp(SOURCE, 0, size)[[0, -1]]
    with puller.watched("d") as byte:
        for _ in range(10):
            owner.add("s", desc([1, size]), SOURCE, [key(1)], owned=True, content=ramp)
            puller.run("view = end.tensors('d')[0]; view[0], view[-1] = ends", ends=(~first, ~last))
            call = puller.begin("manage", "pull_cache", key(1), "d")
            wait_until(lambda call=call: byte(0) == first or call.ended(), "bytes arrive")
            with puller.stopped():
                unfinished = byte(0) == first and byte(size - 1) != last
                owner.drop("s")
                owner.manage("remove_cache_key", key(1))
                wait_until(lambda: room_for_another(owner, size), "the memory is free")
                owner.drop("new")
            if unfinished:
                break
            with contextlib.suppress(LLMException):
                call.result()
        else:
            pytest.fail("no pull was stopped in the middle")
        refused(call.result, code=TIMEOUT)


def room_for_another(owner, size):
    try:
        return owner.add("new", desc([1, size]), SOURCE + 1, owned=True, content=ramp)
    except LLMException as exc:
        assert exc.status_code is OUT_OF_MEMORY, exc


# --- an owner that dies


def shared_mappings():
    """Count the mappings that this process has of its own pools and directory, and of those of its peers."""
    return sum("/memfd:llm_datadist" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def puller(local):
    """The local end, with four blocks to pull into."""
    local.open(OURS, listen=None)
    local.add("d", desc([4, 5000]), TARGET, blocks=True)
    return local


def offer(puller, owner, number, owned, listen=ADDRESS, block=5000):
    """Open the owner with four blocks that have the pattern of number, link the puller to it, and return its address."""
    address = owner.open(THEIRS, listen=listen)
    owner.add("s", desc([4, block]), number, BLOCKS, blocks=True, owned=owned)
    assert puller.link(address, THEIRS) is SUCCESS
    return address


def pull(puller):
    """Pull the four blocks and return them."""
    puller.manage("pull_blocks", BLOCKS, "d", EVERY, EVERY)
    return puller.content("d")[0]


def finds_it_dead(puller):
    with pytest.raises(LLMException) as failure:
        pull(puller)
    assert failure.value.status_code in DEAD, failure.value


def sees_the_death(puller):
    wait_until(lambda: "dead" in puller.told(THEIRS)["cluster 1"], "it is known")


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_nothing_is_read_of_a_dead_owner_and_its_successor_serves(puller, owned, known):
    """Killed with nothing under way; the next pull may come before any socket has told."""
    address, mapped_before = ADDRESS, shared_mappings()
    for life in range(3):
        with Peer() as peer:
            address = offer(puller, peer, life, owned, address)
            assert puller.told(THEIRS)["transport"] == "shm"
            assert shared_mappings() > mapped_before
            if known:
                assert is_pattern(pull(puller), life)
            peer.kill()  # and waited for
            for _ in range(3):
                finds_it_dead(puller)
        sees_the_death(puller)
        failure = refused(puller.manage, "pull_blocks", BLOCKS, "d", [0], [0], code=NOT_YET_LINK)
        assert failure.peer == THEIRS
        wait_until(lambda: shared_mappings() == mapped_before, "nothing of it is mapped any more")


def test_an_owner_that_nobody_has_waited_for_is_dead_all_the_same(puller, owned):
    with Peer() as peer:
        offer(puller, peer, SOURCE, owned)
        pull(puller)
        peer.process.send_signal(signal.SIGKILL)
        sees_the_death(puller)
        assert living_host.process_state(peer.process.pid) == "Z"
        refused(pull, puller, code=NOT_YET_LINK)
        peer.kill()


def test_an_owner_that_has_become_another_program_is_dead(puller, owned):
    """Its process lives, under the same number, and keeps some of its files."""
    with Peer() as peer:
        offer(puller, peer, SOURCE, owned)
        pull(puller)
        peer.begin("run", "import os; os.execvp('sleep', ['sleep', '600'])")
        wait_until(lambda: Path(f"/proc/{peer.process.pid}/cmdline").read_bytes().startswith(b"sleep"), "it is another program")
        for _ in range(3):
            finds_it_dead(puller)
        assert peer.process.poll() is None
        sees_the_death(puller)
        peer.kill()


def test_nothing_is_read_of_an_engine_that_was_finalized(puller, owner, owned):
    """Its process lives, with the same memory, and the next engine of it has the same address."""
    address = ADDRESS
    for life in range(5):
        address = offer(puller, owner, life, owned, address)
        assert is_pattern(pull(puller), life)
        owner.close()
        for _ in range(3):
            finds_it_dead(puller)


def test_no_pull_that_begins_after_the_owners_death_succeeds(local, owned):
    size = 1 << 22
    local.open(OURS, listen=None)
    threads = range(3)
    for n in threads:
        local.add(f"d{n}", desc([4, size // 4]), TARGET, blocks=True)
    address = ADDRESS

    def until_it_fails(name, right, counts, dead):
        view = local.tensors(name)[0]
        while True:
            began_after = dead.is_set()
            try:
                local.manage("pull_blocks", BLOCKS, name, EVERY, EVERY)
            except LLMException as exc:
                return exc
            assert not began_after, "a pull from a dead process has succeeded"
            assert np.array_equal(view, right)
            counts[name] += 1

    for life in range(3):
        right, counts, dead = pattern(life, 0, size), Counter(), threading.Event()
        with Peer() as peer:
            address = offer(local, peer, life, owned, address, size // 4)
            calls = [Background(until_it_fails, f"d{n}", right, counts, dead) for n in threads]
            wait_until(lambda calls=calls, counts=counts: len(counts) == 3 or not calls[0].running(), "all pull")
            peer.kill()
            dead.set()
            for call in calls:
                assert call.result().status_code in DEAD


def test_a_killed_owner_is_dead_though_a_forked_child_of_it_lives(puller, owned):
    """The child has all memory of its parent, but for what shows whose it is."""
    address = ADDRESS
    for life in range(2):
        with Peer() as peer:
            address = offer(puller, peer, life, owned, address)
            child = inside(peer, living_host.fork_a_child_that_stays)
            try:
                assert is_pattern(pull(puller), life)
                peer.kill()
                finds_it_dead(puller)
                sees_the_death(puller)
                assert living_host.process_state(child) in "SR"
                wait_until(lambda child=child: not of_engines(child), "the child has closed what it had of the engine")
            finally:
                os.kill(child, signal.SIGKILL)


def of_engines(pid):
    """The descriptors of a process that only an engine can have opened."""
    names = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(fd))
    return [name for name in names if name.startswith(("/memfd:", "socket:"))]


@pytest.mark.parametrize("whose", ["owner", "puller"])
def test_an_engine_that_is_finalized_during_pulls_ends_them(owned, whose):
    """Calls beside a finalize of the same engine are not promised a code, but an end."""
    size = 1 << 22
    allowed = {"LLM_FAILED", "LLM_NOT_YET_LINK"}
    if whose == "puller":
        allowed |= {"LLM_PARAM_INVALID", "LLM_KV_CACHE_NOT_EXIST"}
    with Peer() as puller, Peer() as owner:
        for life in range(3):
            link_over_shm(puller, owner)
            owner.add("s", desc([4, size // 4]), life, BLOCKS, blocks=True, owned=owned)
            for n in range(3):
                puller.add(f"d{n}", desc([4, size // 4]), TARGET, blocks=True)
            if whose == "owner":
                calls = puller.begin("run", PULL_UNTIL_FAILURE, key=BLOCKS, life=life, size=size, close=False)
                owner.close()
                ends = calls.result()
            else:
                ends = puller.run(PULL_UNTIL_FAILURE, key=BLOCKS, life=life, size=size, close=True)
            assert set(ends) <= allowed, ends
            puller.close()
            owner.close()


PULL_UNTIL_FAILURE = """
import threading
import numpy as np
from llm_datadist import LLMException
from peers import Background, pattern, wait_until
right = pattern(life, 0, size)
manager, caches, memory = end.manager, dict(end.caches), dict(end.memory)
pulled = set()
def until_it_fails(name):
    while True:
        try:
            manager.pull_blocks(key, caches[name], [0, 1, 2, 3], [0, 1, 2, 3])
        except LLMException as exc:
            return exc.status_code.name
        assert np.array_equal(memory[name][0], right)
        pulled.add(name)
calls = [Background(until_it_fails, f"d{n}") for n in range(3)]
if close:
    wait_until(lambda: len(pulled) == 3, "all pull")
    end.close()
result = [call.result() for call in calls]
"""


