# SPDX-License-Identifier: Apache-2.0
"""Which transport a link takes, what explain says of it, which peers share memory and which can't, and what links use up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import living_host
from links import OURS, THEIRS, link_over_shm
from living_host import inside
from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, LLMStatusCode
from peers import ADDRESS, SOURCE, TARGET, Peer, desc, is_pattern, refused, wait_until

SUCCESS = LLMStatusCode.LLM_SUCCESS
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
FAILED = LLMStatusCode.LLM_FAILED
TIMEOUT = LLMStatusCode.LLM_TIMEOUT

pytestmark = pytest.mark.usefixtures("quiet")  # links fail here, on purpose

BLOCKS = BlocksCacheKey(THEIRS)
OTHER_UID = 65533
SLOTS = 4096  # of a directory
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def transport():
    """None is required: the ends choose to share memory."""


# --- which transport is taken, and what is said about it

CONNECTIONS = ["data connection 0", "data connection 1"]


def can_read(peer):
    """Tell whether this process may read the memory of a peer: a container's rules may forbid it."""
    address = peer.run("import ctypes; end.probe = ctypes.create_string_buffer(b'probe'); result = ctypes.addressof(end.probe)")

    class Span(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]

    found = ctypes.create_string_buffer(5)
    into, of = Span(ctypes.addressof(found), 5), Span(address, 5)
    read = ctypes.CDLL(None).process_vm_readv
    return read(peer.process.pid, ctypes.byref(into), 1, ctypes.byref(of), 1, 0) == 5 and found.raw == b"probe"


def shared_mappings():
    """What this process may do with each piece of memory that engines share, by its inode."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:llm_datadist" in line]
    return {inode: rights for _, rights, _, _, inode, *_ in lines}


def test_auto_takes_shm_on_one_host_and_explain_says_how(local, owner):
    address = owner.open(THEIRS)
    local.open(OURS, host_mem_pool_cfg=None)
    assert local.link(address, THEIRS) is SUCCESS
    ours, theirs = local.told(THEIRS), owner.told(OURS)
    for lines in (ours, theirs):
        assert list(lines)[1:] == ["transport", "same host", "memory of pools", "private memory", *CONNECTIONS]
        assert lines["transport"] == "shm"
        assert lines["same host"].startswith("shown: ")
    assert ours["cluster 1"] == f"linked, dialed at {address}"
    assert ours["memory of pools"] == "mapped, 2 of them"
    assert theirs["memory of pools"] == "mapped, 1 of them"
    assert (ours["private memory"] == "read with process_vm_readv") is can_read(owner)
    # this process's own directory and pool can be written, the peer's directory and pools can't
    assert Counter(shared_mappings().values()) == {"rw-s": 2, "r--s": 3}


@pytest.mark.parametrize("pool", ["mapped, 0 of them", "mapped, 2 of them"])
def test_pools_are_not_needed(local, owner, pool):
    pools = {"mem_pool_cfg": None, "host_mem_pool_cfg": None} if "0" in pool else {}
    link_over_shm(local, owner, **pools)
    assert local.told(THEIRS)["memory of pools"] == pool
    owner.add("s", desc([2, 5]), SOURCE, BLOCKS, blocks=True)
    local.add("d", desc([2, 5]), TARGET, blocks=True)
    local.manage("pull_blocks", BLOCKS, "d", [0, 1], [0, 1])
    assert is_pattern(local.content("d")[0], SOURCE)


OFFERS = [
    # what each end asks for, what the link is over, and what is said of the one that was not taken
    (None, None, "shm", None),
    ("shm", "shm", "shm", "tcp: shm is required"),
    ("shm", None, "shm", "tcp: shm is required"),
    (None, "shm", "shm", "tcp: shm is required"),
    ("auto", "tcp", "tcp", "shm: only one end offers it"),
    ("tcp", "auto", "tcp", "shm: only one end offers it"),
]


@pytest.mark.parametrize(("ours", "theirs", "taken", "not_taken"), OFFERS)
def test_the_best_transport_of_both_is_taken(local, owner, ours, theirs, taken, not_taken):
    address = owner.open(THEIRS, transport=theirs)
    local.open(OURS, listen=None, transport=ours)
    assert local.link(address, THEIRS) is SUCCESS
    for lines in (local.told(THEIRS), owner.told(OURS)):
        assert lines["transport"] == taken
        assert lines.get("not taken") == not_taken
        for name in CONNECTIONS:
            assert lines[name].endswith(", Unix sockets") is (taken == "shm"), lines[name]
            assert (", congestion control " in lines[name]) is (taken == "tcp"), lines[name]
    for end, other, source in ((local, owner, THEIRS), (owner, local, OURS)):
        cache_id = other.add("give", desc([1, 300]), source)
        end.add("take", desc([1, 300]), TARGET)
        end.manage("pull_cache", CacheKeyByIdAndIndex(source, cache_id), "take")
        assert is_pattern(end.content("take")[0], source)


@pytest.mark.parametrize(("ours", "theirs"), [("shm", "tcp"), ("tcp", "shm")])
def test_a_required_transport_that_the_peer_has_not_is_link_failed(local, owner, ours, theirs):
    address = owner.open(THEIRS, transport=theirs)
    local.open(OURS, listen=None, transport=ours)
    assert local.link(address, THEIRS) is LINK_FAILED
    for end, other in ((local, THEIRS), (owner, OURS)):
        text = wait_until(lambda end=end, other=other: end.ask("explain", other), "it is known")
        assert f"cluster {other}: never linked" in text
        assert 'transport "shm" is required, both ends can use: tcp' in text
    local.close()
    local.open(OURS, listen=None, transport="auto")
    assert local.link(address, THEIRS) is SUCCESS
    assert local.told(THEIRS)["transport"] == theirs


# --- peers that do not share what is needed


def pulls_both_ways(puller, owner):
    """Check pulls of pool and of private memory in both directions over a link, every byte."""
    for number, (end, other, source) in enumerate(((puller, owner, THEIRS), (owner, puller, OURS))):
        for owned in (False, True):
            model = 10 * number + owned
            other.add(f"give {model}", desc([8, 5000], 2), model, BlocksCacheKey(source, model), blocks=True, owned=owned)
            end.add(f"take {model}", desc([8, 5000], 2), TARGET, blocks=True)
            end.manage("pull_blocks", BlocksCacheKey(source, model), f"take {model}", list(range(8)), list(range(8)))
            for tensor, view in enumerate(end.content(f"take {model}")):
                assert is_pattern(view, model, tensor), (number, owned, tensor)


def stranger_to_shared_memory(local, peer, listen, reason):
    """A peer that can't share memory with this process is served over tcp, or not at all where shm is required."""
    local.open(OURS, listen=listen)
    address = local.ask("listen_address")
    for transport in ("auto", "shm"):
        peer.open(THEIRS, listen=None, transport=transport)
        code = peer.link(address, OURS)
        text = peer.ask("explain", OURS)
        assert reason in text, text
        if transport == "shm":
            assert code is LINK_FAILED
            assert "no transport works: shm: the shared host was not shown: " in text
        else:
            assert code is SUCCESS
            ours, theirs = local.told(THEIRS), peer.told(OURS)
            for lines in (ours, theirs):
                assert lines["transport"] == "tcp"
                assert lines["same host"].startswith("not shown: ")
                assert lines["not taken"] == "shm: the shared host was not shown: " + lines["same host"][len("not shown: ") :]
                assert "memory of pools" not in lines
            pulls_both_ways(local, peer)
        peer.close()


@needs_root
def test_a_peer_under_another_uid_is_served_over_tcp(local):
    with Peer() as peer:
        inside(peer, living_host.become, OTHER_UID)
        stranger_to_shared_memory(local, peer, ADDRESS, f"uid {os.getuid()}, this process under {OTHER_UID}")


@pytest.fixture
def other_network():
    """The command that runs a program in another network namespace, and the address of this one that it reaches."""
    name, ours, theirs = f"llm{os.getpid()}", f"llm{os.getpid()}a", f"llm{os.getpid()}b"
    ip = f"ip -n {name}"
    steps = [
        f"ip netns add {name}",
        f"ip link add {ours} type veth peer name {theirs} netns {name}",
        f"ip addr add 10.231.79.1/30 dev {ours}",
        f"ip link set {ours} up",
        f"{ip} addr add 10.231.79.2/30 dev {theirs}",
        f"{ip} link set {theirs} up",
    ]
    try:
        for step in steps:
            done = subprocess.run(step.split(), capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"{step}: {done.stderr.strip()}")
        yield ["ip", "netns", "exec", name], "10.231.79.1:0"
    except FileNotFoundError:
        pytest.skip("no ip")
    finally:
        for step in (f"ip link del {ours}", f"ip netns del {name}"):
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(step.split(), capture_output=True)


@needs_root
def test_a_peer_in_another_network_namespace_is_served_over_tcp(local, other_network):
    under, listen = other_network
    with Peer(under=under) as peer:
        stranger_to_shared_memory(local, peer, listen, "reach the Unix socket of the peer")


@needs_root
def test_a_peer_in_another_pid_namespace_reads_what_it_can(local):
    """Pools can be mapped whatever the number of a process; to read its memory one has to know the number."""
    with Peer(under=["unshare", "--pid", "--fork", "--kill-child"]) as peer:
        local.open(OURS)
        peer.open(THEIRS, listen=None)
        assert peer.link(local.ask("listen_address"), OURS) is SUCCESS
        ours, theirs = local.told(THEIRS), peer.told(OURS)
        assert (ours["transport"], theirs["transport"]) == ("shm", "shm")
        assert ours["memory of pools"] == theirs["memory of pools"] == "mapped, 2 of them"
        assert theirs["private memory"].startswith("streamed over the data connections, it can't be read: ")
        pulls_both_ways(local, peer)


# --- private memory that can't be read


DUMPABLE = "import ctypes; assert ctypes.CDLL(None).prctl(4, int(yes), 0, 0, 0) == 0"  # PR_SET_DUMPABLE
READ, STREAMED = "read with process_vm_readv", "streamed over the data connections, it can't be read: "


@pytest.fixture
def two_of_one_user():
    """Two processes of one ordinary user, without the rights of root, that may read each other's memory."""
    with Peer() as puller, Peer() as owner:
        for peer in (puller, owner):
            if os.getuid() == 0:
                inside(peer, living_host.become, OTHER_UID)
            peer.run(DUMPABLE, yes=True)
        yield puller, owner


def test_ordinary_users_read_each_others_memory(two_of_one_user):
    puller, owner = two_of_one_user
    link_over_shm(puller, owner)
    if not can_read(owner):
        pytest.skip("this machine does not allow it")
    assert puller.told(THEIRS)["private memory"] == owner.told(OURS)["private memory"] == READ
    pulls_both_ways(puller, owner)


def test_memory_that_can_not_be_read_is_streamed(two_of_one_user):
    puller, owner = two_of_one_user
    owner.run(DUMPABLE, yes=False)
    link_over_shm(puller, owner)
    assert puller.told(THEIRS)["private memory"].startswith(STREAMED)
    assert puller.told(THEIRS)["memory of pools"] == "mapped, 2 of them"
    for told in (puller.told(THEIRS), owner.told(OURS)):
        assert all(told[name].endswith(", Unix sockets") for name in CONNECTIONS)
    pulls_both_ways(puller, owner)


def test_memory_that_can_not_be_read_any_more_is_streamed_from_then_on(two_of_one_user):
    puller, owner = two_of_one_user
    link_over_shm(puller, owner)
    pulls_both_ways(puller, owner)
    owner.run(DUMPABLE, yes=False)
    for number in range(3):
        owner.fill("give 0", number)
        puller.fill("take 0", TARGET)
        puller.manage("pull_blocks", BlocksCacheKey(THEIRS, 0), "take 0", list(range(8)), list(range(8)))
        for tensor, view in enumerate(puller.content("take 0")):
            assert is_pattern(view, number, tensor)
    assert puller.told(THEIRS)["private memory"].startswith(STREAMED)
    assert puller.told(THEIRS)["transport"] == "shm"


# --- what is used up


def usage(pid):
    """What a process has: descriptors, shared mappings, all mappings, threads."""
    root = Path(f"/proc/{pid}")
    maps = (root / "maps").read_text().splitlines()
    return {
        "descriptors": Counter(os.readlink(fd).split(":")[0] for fd in (root / "fd").iterdir()),
        "shared mappings": sum("/memfd:" in line for line in maps),
        "mappings": len(maps),
        "threads": len(list((root / "task").iterdir())),
    }


RUNTIMES = {"threads": 4, "mappings": 20}  # what Go's own runtime may still take


def test_links_that_come_and_go_leave_nothing_behind():
    with Peer() as puller, Peer() as owner:
        address = link_over_shm(puller, owner)
        owner.add("s", desc([2, 5000]), SOURCE, BLOCKS, blocks=True, owned=True)
        owner.add("private", desc([2, 5000]), SOURCE + 1, BlocksCacheKey(THEIRS, 1), blocks=True)
        puller.add("d", desc([2, 5000]), TARGET, blocks=True)
        rounds = """
from peers import cluster
for number in range(times):
    assert end.engine.unlink_clusters([cluster(address, 1)], 10_000, number % 2 == 1)[1][0].name == "LLM_SUCCESS"
    code = end.link(address, 1)
    assert code.name == "LLM_SUCCESS", (number, code)
    for key in keys:
        end.manage("pull_blocks", key, "d", [0, 1], [1, 0])
"""
        keys = [BLOCKS, BlocksCacheKey(THEIRS, 1)]
        puller.run(rounds, times=20, address=address, keys=keys)
        before = [usage(peer.process.pid) for peer in (puller, owner)]
        puller.run(rounds, times=200, address=address, keys=keys)

        def settled():
            after = [usage(peer.process.pid) for peer in (puller, owner)]
            same = all(now[what] == was[what] for now, was in zip(after, before) for what in ("descriptors", "shared mappings"))
            few = all(now[what] <= was[what] + more for now, was in zip(after, before) for what, more in RUNTIMES.items())
            return same and few

        try:
            wait_until(settled, "nothing is left behind", 20)
        except AssertionError:
            pytest.fail(f"before {before}, after {[usage(peer.process.pid) for peer in (puller, owner)]}")


def resident(pid):
    """Resident memory and page tables of a process, in MiB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) >> 10 for name in ("VmRSS", "RssShmem", "VmPTE")}


@pytest.mark.parametrize("blocks", [False, True], ids=["rows", "blocks"])
def test_a_large_pool_is_reserved_and_not_committed(blocks):
    """On neither end, also where a cache takes half of it and one block of that is there."""
    pool = f'{{"memory_size": {4 << 30}}}'
    block = 1 << 20
    with Peer() as puller, Peer() as owner:
        before = [resident(peer.process.pid) for peer in (puller, owner)]
        link_over_shm(puller, owner, mem_pool_cfg=pool, host_mem_pool_cfg=pool)
        call = "allocate_blocks_cache" if blocks else "allocate_cache"
        keys = BLOCKS if blocks else [CacheKey(THEIRS, req_id=n) for n in range(2048)]
        code = (
            "from peers import desc, pattern\n"
            "cache = end.caches['s'] = getattr(end.manager, call)(desc([2048, block]), keys)\n"
            "end.tensors('s')[0].reshape(2048, -1)[1500] = pattern(1, 0, block)\n"
            "result = cache.cache_id"
        )
        owner.run(code, call=call, keys=keys, block=block)
        puller.add("d", desc([1, block]), TARGET, blocks=blocks, owned=True)
        if blocks:
            puller.manage("pull_blocks", BLOCKS, "d", [1500], [0])
            puller.manage("pull_blocks", BLOCKS, "d", [1500], [0])
        else:
            puller.manage("pull_cache", CacheKey(THEIRS, req_id=1500), "d")
        assert is_pattern(puller.content("d")[0], 1)
        for peer, was in zip((puller, owner), before):
            now = resident(peer.process.pid)
            grown = {name: now[name] - was[name] for name in now}
            assert grown["RssShmem"] <= 64 and grown["VmRSS"] <= 128 and grown["VmPTE"] <= 16, grown
        puller.leave()
        owner.leave()


def test_caches_beyond_the_directory_are_streamed(local, owner):
    """The directory has room for 4096; one that is not in it is pulled all the same, but with the owner's help."""
    link_over_shm(local, owner, sync_kv_timeout=1000)
    owner.run(
        "from peers import desc, pattern\n"
        "from llm_datadist import BlocksCacheKey\n"
        "for n in range(count):\n"
        "    end.lend(f's{n}', desc([1, 64]), [pattern(n, 0, 64)], BlocksCacheKey(1, n), blocks=True)",
        count=SLOTS + 10,
    )
    local.add("d", desc([1, 64]), TARGET, blocks=True)

    def pull(n):
        local.manage("pull_blocks", BlocksCacheKey(THEIRS, n), "d", [0], [0])
        assert is_pattern(local.content("d")[0], n)

    for n in (0, SLOTS - 1, SLOTS, SLOTS + 9, 0, SLOTS + 9):
        pull(n)
    with owner.stopped():
        pull(0)
        pull(SLOTS - 1)
        refused(pull, SLOTS, code=TIMEOUT)
    owner.drop("s5")
    owner.add("late", desc([1, 64]), 99, BlocksCacheKey(THEIRS, 99_999), blocks=True)  # there is room again
    local.manage("pull_blocks", BlocksCacheKey(THEIRS, 99_999), "d", [0], [0])
    with owner.stopped():
        local.fill("d", TARGET)
        local.manage("pull_blocks", BlocksCacheKey(THEIRS, 99_999), "d", [0], [0])
    assert is_pattern(local.content("d")[0], 99)


def test_a_pool_that_can_not_be_mapped_is_served_over_tcp():
    """The address space of the puller is too small for the pool of the owner."""
    with Peer() as puller, Peer() as owner:
        address = owner.open(THEIRS, mem_pool_cfg=f'{{"memory_size": {8 << 30}}}')
        puller.open(OURS, listen=None)
        puller.run(
            "import resource\n"
            "pages = int(open('/proc/self/statm').read().split()[0])\n"
            "end.limits = resource.getrlimit(resource.RLIMIT_AS)\n"
            "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), end.limits[1]))"
        )
        assert puller.link(address, THEIRS) is SUCCESS
        lines = puller.told(THEIRS)
        assert lines["transport"] == "tcp"
        assert lines["not taken"].startswith("shm: map pool ") and "cannot allocate memory" in lines["not taken"]
        pulls_both_ways(puller, owner)
        puller.run("import resource; resource.setrlimit(resource.RLIMIT_AS, end.limits)")
        assert puller.unlink(THEIRS) is SUCCESS
        assert puller.link(address, THEIRS) is SUCCESS
        assert puller.told(THEIRS)["transport"] == "shm"


STARVE = """
import os, resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1 + spare, hard))
end.limits, end.plugs = (soft, hard), []
while True:
    try:
        end.plugs.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        break
for _ in range(spare):
    os.close(end.plugs.pop())
"""
RELIEVE = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, end.limits)
for fd in end.plugs:
    os.close(fd)
"""


@pytest.mark.parametrize("whose", ["puller", "owner"])
def test_without_descriptors_a_link_fails_or_does_without_and_works_again_later(whose):
    with Peer() as puller, Peer() as owner:
        address = owner.open(THEIRS)
        puller.open(OURS, listen=None)
        starved = {"puller": puller, "owner": owner}[whose]
        for n, owned in enumerate((False, True)):
            owner.add(f"s{n}", desc([2, 5000]), n, BlocksCacheKey(THEIRS, n), blocks=True, owned=owned)
        puller.add("d", desc([2, 5000]), TARGET, blocks=True)

        def serves():
            for n in range(2):
                puller.fill("d", TARGET)
                puller.manage("pull_blocks", BlocksCacheKey(THEIRS, n), "d", [1, 0], [1, 0])
                assert is_pattern(puller.content("d")[0], n)

        ends = {}
        for spare in range(24):
            starved.run(STARVE, spare=spare)
            try:
                code = puller.link(address, THEIRS, 500)
                ends[spare] = code.name
                if code is SUCCESS:
                    lines = puller.told(THEIRS)
                    ends[spare] = lines["transport"], lines.get("not taken")
                    assert lines["transport"] == "shm" or lines["not taken"].startswith("shm: ")
                    serves()
                else:
                    assert code in (LINK_FAILED, TIMEOUT, FAILED)
                    assert "last failure" in puller.ask("explain", THEIRS)
            finally:
                starved.run(RELIEVE)
            assert puller.unlink(THEIRS) is SUCCESS
            assert puller.link(address, THEIRS) is SUCCESS
            assert puller.told(THEIRS)["transport"] == "shm"
            serves()
            assert puller.unlink(THEIRS) is SUCCESS
        print(whose, ends)
        assert ends[23] == ("shm", None), ends
