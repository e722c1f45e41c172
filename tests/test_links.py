# SPDX-License-Identifier: Apache-2.0
"""link_clusters, unlink_clusters, switch_role and explain between processes, and what happens when the other one is not there."""

from __future__ import annotations

import contextlib
import random
import socket
import threading

import numpy as np
import pytest

from links import refused, refused_address
from llm_datadist import CacheKey, CacheKeyByIdAndIndex, LLMClusterInfo, LLMException, LLMRole, LLMStatusCode, _native
from llm_datadist.utils import log
from peers import ADDRESS, Background, Peer, cluster, desc, pattern, wait_until

SUCCESS = LLMStatusCode.LLM_SUCCESS
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
ALREADY_LINK = LLMStatusCode.LLM_ALREADY_LINK
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
FAILED = LLMStatusCode.LLM_FAILED

pytestmark = pytest.mark.usefixtures("quiet")  # links fail here, on purpose

OURS, THEIRS = 2, 1  # cluster ids
ROW = [1, 64]


@pytest.fixture
def linked(local, remote):
    """Two ends that are linked, each with a cache of its own to give and one to take into."""
    address = remote.open(THEIRS)
    local.open(OURS)
    assert local.link(address, THEIRS) is SUCCESS
    for number, end in enumerate((local, remote)):
        give_and_take(end, number)
    return address


def give_and_take(end, number):
    end.add("give", desc(ROW), number)
    end.add("take", desc(ROW), 50 + number)


def pull(end, source, cache_id=1):
    end.manage("pull_cache", CacheKeyByIdAndIndex(source, cache_id), "take")


def pulls(end, source, number):
    """Check that end pulls what the other one gives."""
    end.fill("take", 99)
    pull(end, source)
    assert np.array_equal(end.content("take")[0], pattern(number, 0, 64))


@contextlib.contextmanager
def server(answer):
    """A listener that hands each connection to answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        open_connections = []

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                open_connections.append(connection)
                with contextlib.suppress(OSError):
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in open_connections:
                connection.close()


# --- arguments


def info(**fields):
    made = LLMClusterInfo()
    if fields.get("id", THEIRS) is not None:
        made.remote_cluster_id = fields.get("id", THEIRS)
    for ip in fields.get("local", ["127.0.0.1"]):
        made.append_local_ip_info(ip, 0)
    for ip in fields.get("remote", ["127.0.0.1"]):
        made.append_remote_ip_info(ip, 1)
    return made


BAD_LINKS = [
    (([info()], 1.0), TypeError),
    (([info()], None), TypeError),
    (([info()], "1"), TypeError),
    (([info()], 2**31), ValueError),
    (([info()], 0), LLMException),
    (([info()], -1), LLMException),
    ((None, 0), LLMException),  # the timeout is looked at first
    ((None, 1), TypeError),
    ((info(), 1), TypeError),
    (({info()}, 1), TypeError),
    (([3], 1), TypeError),
    (([info(), None], 1), TypeError),
]


@pytest.mark.parity("engine.link_clusters", "engine.unlink_clusters")
@pytest.mark.parametrize(("arguments", "error"), BAD_LINKS)
@pytest.mark.parametrize("call", ["link_clusters", "unlink_clusters"])
def test_arguments_are_refused(local, call, arguments, error):
    local.open(OURS, listen=None)
    with pytest.raises(error):
        local.ask(call, *arguments)


@pytest.mark.parametrize("force", [1, None, "yes"])
def test_force_is_a_bool(local, force):
    local.open(OURS, listen=None)
    with pytest.raises(TypeError):
        local.ask("unlink_clusters", [info(id=None)], 1000, force)  # before the id, which is missing


@pytest.mark.parametrize("comm_res", [None, ""])
def test_link_needs_a_local_ip(local, comm_res):
    local.open(OURS, listen=None, one_sided=True, local_comm_res=comm_res)
    with pytest.raises(LLMException, match="local_ip_info_list is empty"):
        local.ask("link_clusters", [info(), info(local=[])], 1000)


def test_an_ip_beyond_32_bits_is_a_type_error(local):
    local.open(OURS, listen=None)
    for bad in (2**32, -1, None):
        with pytest.raises(TypeError):
            local.ask("link_clusters", [info(remote=[bad])], 1000)
        with pytest.raises(TypeError):
            local.ask("link_clusters", [info(local=[bad])], 1000)


def test_no_clusters_are_param_invalid(local):
    local.open(OURS, listen=None)
    for clusters in ([], ()):
        assert local.ask("link_clusters", clusters, 1000) == (PARAM_INVALID, [])
        assert local.ask("unlink_clusters", clusters, 1000) == (PARAM_INVALID, [])


@pytest.mark.parametrize("remotes", [[], ["127.0.0.1", "127.0.0.1"]])
def test_a_cluster_has_one_remote_address(local, remotes):
    local.open(OURS, listen=None)
    assert local.ask("link_clusters", [info(remote=remotes)], 1000) == (PARAM_INVALID, [PARAM_INVALID])
    assert local.ask("unlink_clusters", [info(remote=remotes)], 1000) == (PARAM_INVALID, [PARAM_INVALID])
    assert local.ask("unlink_clusters", [info(remote=remotes)], 1000, True) == (SUCCESS, [SUCCESS])


def test_only_a_listener_may_have_several_local_addresses(local, remote):
    address = remote.open(THEIRS)
    two = cluster(address, THEIRS)
    two.append_local_ip_info("127.0.0.1", 0)
    local.open(OURS, listen=None)
    assert local.ask("link_clusters", [two], 5000) == (PARAM_INVALID, [PARAM_INVALID])
    local.close()
    local.open(OURS)
    assert local.ask("link_clusters", [two], 5000) == (SUCCESS, [SUCCESS])


@pytest.mark.parametrize(
    ("comm_res", "code"),
    [
        ('{"version": "1.0"}', SUCCESS),
        ('{"version": "1.2", "server_list": []}', SUCCESS),
        ('{"version": "1.3"}', PARAM_INVALID),
        ("{}", PARAM_INVALID),
        ("not JSON", PARAM_INVALID),
        ('{"version": "1.0", "filler": "' + "x" * (64 << 10) + '"}', PARAM_INVALID),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_local_comm_res_is_checked_when_it_links(local, remote, comm_res, code):
    address = remote.open(THEIRS, one_sided=True)
    local.open(OURS, listen=None, one_sided=True, local_comm_res=comm_res)
    without_local = cluster(address, THEIRS, local=None)  # not needed with a resource
    assert local.ask("link_clusters", [without_local], 5000) == (code, [code])


def test_unlink_needs_an_id(local):
    local.open(OURS, listen=None)
    for force in (False, True):
        with pytest.raises(TypeError):
            local.ask("unlink_clusters", [info(), info(id=None)], 1000, force)


# --- one link


@pytest.mark.parity("engine.link_clusters")
def test_one_link_serves_both_directions(linked, local, remote):
    pulls(local, THEIRS, number=1)
    pulls(remote, OURS, number=0)


def test_a_link_needs_no_listener_at_the_end_that_dials(local, remote):
    address = remote.open(THEIRS)
    local.open(OURS, listen=None)
    assert local.link(address, THEIRS) is SUCCESS
    give_and_take(local, 0)
    give_and_take(remote, 1)
    pulls(remote, OURS, number=0)
    pulls(local, THEIRS, number=1)


def test_caches_made_before_the_link_are_reached(local, remote):
    address = remote.open(THEIRS)
    local.open(OURS)
    give_and_take(local, 0)
    give_and_take(remote, 1)
    assert local.link(address, THEIRS) is SUCCESS
    pulls(local, THEIRS, number=1)
    pulls(remote, OURS, number=0)


@pytest.mark.parametrize("theirs", [0, 2**64 - 1, 2**63])
def test_cluster_ids_have_64_bits(local, remote, theirs):
    address = remote.open(theirs)
    local.open(OURS)
    assert local.link(address, theirs) is SUCCESS
    give_and_take(local, 0)
    give_and_take(remote, 1)
    pulls(local, theirs, number=1)
    pulls(remote, OURS, number=0)
    assert f"cluster {theirs}: linked" in local.ask("explain", theirs)


def test_a_second_link_is_already_there(linked, local, remote):
    assert local.ask("link_clusters", [cluster(linked, THEIRS)], 5000) == (ALREADY_LINK, [ALREADY_LINK])
    ours = local.ask("listen_address")
    assert remote.ask("link_clusters", [cluster(ours, OURS)], 5000) == (ALREADY_LINK, [ALREADY_LINK])
    assert local.link(linked, None) is ALREADY_LINK
    pulls(local, THEIRS, number=1)


def test_a_wrong_cluster_id_makes_the_link_under_the_reported_one(local, remote):
    address = remote.open(THEIRS)
    local.open(OURS)
    give_and_take(local, 0)
    give_and_take(remote, 1)
    assert local.link(address, 777) is SUCCESS
    pulls(local, THEIRS, number=1)
    refused(pull, local, 777)
    assert "cluster 1: linked" in local.ask("explain", THEIRS)
    assert local.link(address, 777) is ALREADY_LINK


def test_a_wrong_cluster_id_is_one_warning(local, remote, monkeypatch):
    warnings = []
    logger = log.get_logger()
    monkeypatch.setattr(logger, "warning", lambda text, *args, **_: warnings.append(text % args))
    address = remote.open(THEIRS)
    local.open(OURS)
    assert local.link(address, 777) is SUCCESS
    local.close()
    assert len([line for line in warnings if "777" in line and "reports cluster id 1" in line]) == 1, warnings


def test_a_cluster_id_that_was_never_set_is_that_of_the_peer(local, remote):
    address = remote.open(THEIRS)
    local.open(OURS)
    give_and_take(local, 0)
    give_and_take(remote, 1)
    assert local.link(address, None) is SUCCESS
    pulls(local, THEIRS, number=1)


@pytest.mark.parametrize("ours_one_sided", [False, True])
def test_access_modes_that_differ_are_refused_on_both_sides(local, remote, ours_one_sided):
    address = remote.open(THEIRS, one_sided=not ours_one_sided)
    local.open(OURS, one_sided=ours_one_sided)
    assert local.ask("link_clusters", [cluster(address, THEIRS)], 5000) == (PARAM_INVALID, [PARAM_INVALID])
    for end, other in ((local, THEIRS), (remote, OURS)):
        assert "access modes differ" in wait_until(lambda end=end, other=other: end.ask("explain", other), "it is known")


@pytest.mark.parity("failure.own_cluster")
def test_an_engine_links_to_itself_but_does_not_pull_from_itself(local):
    address = local.open(OURS)
    give_and_take(local, 0)
    assert local.ask("link_clusters", [cluster(address, OURS)], 5000) == (SUCCESS, [SUCCESS])
    assert local.link(address, OURS) is ALREADY_LINK
    refused(pull, local, OURS, code=PARAM_INVALID)
    refused(local.ask, "switch_role", LLMRole.PROMPT, code=LLMStatusCode.LLM_EXIST_LINK)
    assert local.ask("unlink_clusters", [cluster(address, OURS)], 5000) == (SUCCESS, [SUCCESS])
    local.ask("switch_role", LLMRole.PROMPT)


def test_a_link_to_oneself_under_another_id_is_no_source_either(local):
    address = local.open(OURS)
    give_and_take(local, 0)
    assert local.link(address, 55) is SUCCESS
    refused(pull, local, 55)
    refused(pull, local, OURS, code=PARAM_INVALID)


def test_two_engines_that_link_to_each_other_at_once_have_one_link(local, remote):
    for _ in range(8):
        theirs, ours = remote.open(THEIRS), local.open(OURS)
        give_and_take(local, 0)
        give_and_take(remote, 1)
        at_the_same_time = remote.begin("link", ours, OURS)
        codes = {local.link(theirs, THEIRS), at_the_same_time.result()}
        assert codes <= {SUCCESS, ALREADY_LINK} and SUCCESS in codes
        pulls(local, THEIRS, number=1)
        pulls(remote, OURS, number=0)
        local.close()
        remote.close()


# --- several links in one call


@pytest.mark.parity("engine.link_clusters")
def test_the_last_failure_of_several_links_is_the_overall_code(local, remote):
    address = remote.open(THEIRS)
    held, nobody = refused_address()
    local.open(OURS, listen=None)
    give_and_take(local, 0)
    give_and_take(remote, 1)
    with held:
        good, missing, invalid = cluster(address, THEIRS), cluster(nobody, 8), info(remote=[])
        invalid.remote_cluster_id = 9
        codes = [PARAM_INVALID, SUCCESS, LINK_FAILED]
        assert local.ask("link_clusters", [invalid, good, missing], 10_000) == (LINK_FAILED, codes)
        pulls(local, THEIRS, number=1)  # no roll-back
        codes = [LINK_FAILED, PARAM_INVALID, ALREADY_LINK]
        assert local.ask("link_clusters", (missing, invalid, good), 10_000) == (ALREADY_LINK, codes)
        unlinked = [LLMStatusCode.LLM_UNLINK_FAILED, SUCCESS]
        assert local.ask("unlink_clusters", [missing, good], 10_000) == (unlinked[0], unlinked)
    refused(pull, local, THEIRS)


def test_more_than_16_clusters_in_one_call(local, remote):
    address = remote.open(THEIRS)
    held, nobody = refused_address()
    local.open(OURS, listen=None)
    with held:
        clusters = [cluster(nobody, 100 + i) for i in range(39)] + [cluster(address, THEIRS)]
        assert local.ask("link_clusters", clusters, 20_000) == (LINK_FAILED, [LINK_FAILED] * 39 + [SUCCESS])


def test_one_silent_peer_does_not_keep_the_others(local, remote):
    address = remote.open(THEIRS)
    local.open(OURS, listen=None)
    with server(lambda connection: None) as silent:
        codes = local.ask("link_clusters", [cluster(silent, 7), cluster(address, THEIRS)], 1000)
    assert codes == (TIMEOUT, [TIMEOUT, SUCCESS])


# --- whom one can not link with


@pytest.mark.parity("engine.link_clusters")
def test_a_refused_port_is_link_failed(local):
    local.open(OURS, listen=None)
    held, nobody = refused_address()
    with held:
        assert local.ask("link_clusters", [cluster(nobody, 7)], 20_000) == (LINK_FAILED, [LINK_FAILED])
    told = local.ask("explain", 7)
    assert "cluster 7: never linked" in told and "last failure" in told and nobody in told and "refused" in told


def test_an_unreachable_address_fails_within_the_timeout(local):
    local.open(OURS, listen=None)
    call = Background(local.ask, "link_clusters", [cluster("203.0.113.1:9", 7)], 500)
    overall, codes = call.result()
    assert codes[0] in (TIMEOUT, LINK_FAILED) and overall is codes[0]
    assert call.seconds < 5


def test_a_peer_that_says_nothing_is_a_timeout(local):
    local.open(OURS, listen=None)
    with server(lambda connection: None) as address:
        call = Background(local.ask, "link_clusters", [cluster(address, 7)], 300)
        assert call.result() == (TIMEOUT, [TIMEOUT])
        assert 0.2 < call.seconds < 3
    assert "deadline" in local.ask("explain", 7)


def http(connection):
    connection.recv(1)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    connection.close()


def random_bytes(seed):
    def answer(connection):
        connection.sendall(random.Random(seed).randbytes(100_000))
        connection.shutdown(socket.SHUT_WR)

    return answer


STRANGERS = {
    "http": http,
    "hangs up": lambda connection: connection.close(),
    "zeros": lambda connection: connection.sendall(bytes(100_000)),
    "ones": lambda connection: connection.sendall(b"\xff" * 100_000),
    **{f"random bytes {seed}": random_bytes(seed) for seed in range(5)},
}


@pytest.mark.parametrize("answer", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_link_failed(local, answer):
    local.open(OURS, listen=None)
    with server(answer) as address:
        assert local.ask("link_clusters", [cluster(address, 7)], 20_000) == (LINK_FAILED, [LINK_FAILED])
    assert "stage handshake" in local.ask("explain", 7)


def test_strangers_at_our_listener_hurt_nobody(linked, local):
    ip, port = local.ask("listen_address").split(":")
    said = [b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\xff" * 1000, *(random.Random(n).randbytes(1000) for n in range(20))]
    for text in said:
        with socket.create_connection((ip, int(port)), 10) as stranger, contextlib.suppress(OSError):
            stranger.sendall(text)
    pulls(local, THEIRS, number=1)


# --- unlink


@pytest.mark.parity("engine.unlink_clusters", "failure.not_linked")
def test_unlink_ends_the_link_on_both_sides(linked, local, remote):
    assert local.ask("unlink_clusters", [cluster(linked, THEIRS)], 5000) == (SUCCESS, [SUCCESS])
    refused(pull, local, THEIRS)
    refused(pull, remote, OURS)
    assert "not linked (unlinked)" in local.ask("explain", THEIRS)
    assert "not linked (unlinked by the peer)" in remote.ask("explain", OURS)


def test_unlink_may_be_repeated(linked, local):
    for _ in range(3):
        assert local.ask("unlink_clusters", [cluster(linked, THEIRS)], 5000) == (SUCCESS, [SUCCESS])


@pytest.mark.parity("engine.unlink_clusters")
def test_what_was_never_linked_is_unlinked_with_success(local, remote):
    address = remote.open(THEIRS)
    local.open(OURS, listen=None)
    assert local.ask("unlink_clusters", [cluster(address, THEIRS)], 5000) == (SUCCESS, [SUCCESS])
    assert local.ask("unlink_clusters", [info(id=12345, remote=[])], 5000, True) == (SUCCESS, [SUCCESS])


def test_the_end_that_was_dialed_may_unlink(linked, local, remote):
    ours = cluster(local.ask("listen_address"), OURS)
    assert remote.ask("unlink_clusters", [ours], 5000) == (SUCCESS, [SUCCESS])
    refused(pull, remote, OURS)
    refused(pull, local, THEIRS)


def test_unlink_and_link_again_and_again(linked, local, remote):
    for _ in range(5):
        assert local.ask("unlink_clusters", [cluster(linked, THEIRS)], 5000)[0] is SUCCESS
        assert local.link(linked, THEIRS) is SUCCESS
        pulls(local, THEIRS, number=1)
        pulls(remote, OURS, number=0)


def test_an_unlink_that_finds_nobody_leaves_the_link(linked, local, remote):
    held, nobody = refused_address()
    with held:
        unlinked = local.ask("unlink_clusters", [cluster(nobody, THEIRS)], 20_000)
    assert unlinked == (LLMStatusCode.LLM_UNLINK_FAILED, [LLMStatusCode.LLM_UNLINK_FAILED])
    pulls(local, THEIRS, number=1)
    pulls(remote, OURS, number=0)


def test_an_unlink_that_nobody_answers_is_a_timeout_and_leaves_the_link(linked, local, remote):
    with server(lambda connection: None) as silent:
        call = Background(local.ask, "unlink_clusters", [cluster(silent, THEIRS)], 300)
        assert call.result() == (TIMEOUT, [TIMEOUT])
        assert call.seconds < 3
    pulls(local, THEIRS, number=1)
    pulls(remote, OURS, number=0)


@pytest.mark.parity("engine.unlink_clusters")
def test_a_forced_unlink_is_local_and_the_link_can_be_made_again_at_once(linked, local, remote):
    for number in range(5):
        assert local.ask("unlink_clusters", [info(remote=[], local=[])], 5000, True) == (SUCCESS, [SUCCESS])
        refused(pull, local, THEIRS)
        assert local.link(linked, THEIRS) is SUCCESS, number
        pulls(local, THEIRS, number=1)
        pulls(remote, OURS, number=0)


def test_after_a_forced_unlink_the_peers_link_is_dead(linked, local, remote):
    local.ask("unlink_clusters", [info(remote=[])], 5000, True)
    wait_until(lambda: "dead" in remote.ask("explain", OURS), "the peer sees it")
    refused(pull, remote, OURS)
    ours = local.ask("listen_address")
    assert remote.link(ours, OURS) is SUCCESS  # a dead link is not in the way
    pulls(local, THEIRS, number=1)


def test_unlink_waits_for_a_transfer(local, remote):
    address = remote.open(THEIRS)
    local.open(OURS)
    remote.add("give", desc([1, 1 << 26]), 1)
    local.add("take", desc([1, 1 << 26]), 2)
    wanted = pattern(1, 0, 1 << 26)
    assert local.link(address, THEIRS) is SUCCESS
    transfer = Background(pull, local, THEIRS)
    transfer.reaches(local.tensors("take")[0], wanted)
    assert local.ask("unlink_clusters", [cluster(address, THEIRS)], 20_000) == (SUCCESS, [SUCCESS])
    transfer.result()
    assert np.array_equal(local.content("take")[0], wanted)


# --- switch_role and explain


@pytest.mark.parity("engine.switch_role", "failure.live_links")
def test_a_live_link_keeps_the_role(linked, local, remote):
    for end in (local, remote):
        failure = refused(end.ask, "switch_role", LLMRole.PROMPT, code=LLMStatusCode.LLM_EXIST_LINK)
        assert failure.hint == "unlink first"
    pulls(local, THEIRS, number=1)
    address = local.ask("listen_address")
    assert address is not None
    local.ask("unlink_clusters", [cluster(linked, THEIRS)], 5000)
    local.ask("switch_role", LLMRole.DECODER)
    remote.ask("switch_role", LLMRole.PROMPT, {"llm.listenIpInfo": ADDRESS})
    assert local.link(remote.ask("listen_address"), THEIRS) is SUCCESS
    pulls(local, THEIRS, number=1)  # caches are unaffected


def test_explain_tells_of_both_ends(linked, local, remote, transport):
    ours, theirs = local.ask("explain", THEIRS), remote.ask("explain", OURS)
    assert f"cluster {THEIRS}: linked, dialed at {linked}" in ours
    assert f"cluster {OURS}: linked, accepted from 127.0.0.1:" in theirs
    for text in (ours, theirs):
        assert f"transport: {transport}" in text and "same host: shown" in text and "data connection 0" in text
    assert local.ask("explain", 12345) == ""


@pytest.mark.parametrize("bad", [None, "1", -1, 2**64])
def test_explain_takes_a_cluster_id(local, bad):
    local.open(OURS, listen=None)
    with pytest.raises((TypeError, ValueError)):
        local.ask("explain", bad)


# --- peers that go away


@pytest.mark.parity("engine.finalize", "failure.not_linked")
def test_the_link_to_a_finalized_peer_is_dead(linked, local, remote):
    remote.close()
    wait_until(lambda: "dead" in local.ask("explain", THEIRS), "it is seen")
    failure = refused(pull, local, THEIRS)
    assert failure.peer == THEIRS
    local.ask("switch_role", LLMRole.MIX)  # a dead link is not in the way
    # nobody answers there any more: there is nothing to ask for
    assert local.ask("unlink_clusters", [cluster(linked, THEIRS)], 5000) == (SUCCESS, [SUCCESS])


@pytest.mark.parity("failure.transport", "failure.not_linked")
def test_a_killed_peer_fails_the_calls_in_flight_and_those_after(local, transport):
    with Peer() as peer:
        address = peer.open(THEIRS)
        local.open(OURS, sync_kv_timeout=60_000)
        give_and_take(local, 0)
        give_and_take(peer, 1)
        assert local.link(address, THEIRS) is SUCCESS
        with peer.stopped():
            idle = _native.held()
            calls = [Background(pull, local, THEIRS) for _ in range(3)]
            wait_until(lambda: _native.held() == idle + len(calls), "the pulls are under way")
            # a stopped peer is slow, not dead
            assert "cluster 1: linked" in local.ask("explain", THEIRS)
            peer.kill()
            for call in calls:
                failure = refused(call.result, 20, code=FAILED)
                assert "peer died" in failure.cause
                assert (failure.operation, failure.peer, failure.address) == ("pull_cache", THEIRS, address)
        failure = refused(pull, local, THEIRS)
        assert failure.operation == "pull_cache" and failure.peer == THEIRS
        assert "dead" in local.ask("explain", THEIRS)
        assert local.link(address, THEIRS) is LINK_FAILED
        assert local.ask("unlink_clusters", [cluster(address, THEIRS)], 5000) == (SUCCESS, [SUCCESS])


def test_a_restarted_peer_gives_new_bytes_and_no_old_ones(local, transport):
    local.open(OURS)
    local.add("take", desc(ROW), 50)
    address = ADDRESS
    key = CacheKey(THEIRS, req_id=5)
    for life in range(3):
        with Peer() as peer:
            address = peer.open(THEIRS, listen=address)
            if life < 2:
                peer.add("give", desc(ROW), life, [key], owned=True)
            assert local.link(address, THEIRS) is SUCCESS, life
            if life == 2:  # the old lives had such a cache, this one has none
                refused(local.manage, "pull_cache", key, "take", code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
                refused(pull, local, THEIRS, code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
                continue
            local.manage("pull_cache", key, "take")
            assert np.array_equal(local.content("take")[0], pattern(life, 0, 64))
            peer.kill()
        wait_until(lambda: "dead" in local.ask("explain", THEIRS), "it is seen")
        before = local.content("take")[0]
        refused(local.manage, "pull_cache", key, "take")
        assert np.array_equal(local.content("take")[0], before)


def test_a_client_that_was_killed_links_again_without_an_unlink(remote):
    address = remote.open(THEIRS)
    give_and_take(remote, 1)
    for _ in range(2):
        with Peer() as client:
            client.open(OURS, listen=None)
            give_and_take(client, 0)
            assert client.link(address, THEIRS) is SUCCESS
            pulls(client, THEIRS, number=1)
            pulls(remote, OURS, number=0)
            client.kill()


# --- the directional backend


@pytest.fixture
def hixl(local, remote):
    backend = {"one_sided": True, "transfer_backend": "hixl"}
    theirs, ours = remote.open(THEIRS, **backend), local.open(OURS, **backend)
    give_and_take(local, 0)
    give_and_take(remote, 1)
    return ours, theirs


def test_on_hixl_each_end_links_for_itself(hixl, local, remote):
    ours, theirs = hixl
    assert local.link(theirs, THEIRS) is SUCCESS
    assert local.link(theirs, THEIRS) is ALREADY_LINK
    pulls(local, THEIRS, number=1)
    refused(pull, remote, OURS)
    assert remote.link(ours, OURS) is SUCCESS
    pulls(remote, OURS, number=0)
    pulls(local, THEIRS, number=1)


def test_on_hixl_a_link_has_the_id_that_was_given(hixl, local):
    _, theirs = hixl
    assert local.link(theirs, 777) is SUCCESS
    pulls(local, 777, number=1)
    refused(pull, local, THEIRS)
    assert local.link(theirs, 777) is ALREADY_LINK
    assert "linked" in local.ask("explain", 777)


def test_on_hixl_unlink_is_local_and_needs_no_address(hixl, local, remote):
    ours, theirs = hixl
    assert local.ask("unlink_clusters", [info(remote=[])], 1000) == (SUCCESS, [SUCCESS])
    assert local.link(theirs, THEIRS) is SUCCESS
    assert remote.link(ours, OURS) is SUCCESS
    assert local.ask("unlink_clusters", [info(remote=[])], 1000) == (SUCCESS, [SUCCESS])
    refused(pull, local, THEIRS)
    pulls(remote, OURS, number=0)
    assert local.link(theirs, THEIRS) is SUCCESS
    pulls(local, THEIRS, number=1)


def test_on_hixl_failures_are_not_told_apart(hixl, local):
    held, nobody = refused_address()
    with held:
        assert local.ask("link_clusters", [cluster(nobody, 7)], 20_000) == (FAILED, [FAILED])
    with server(lambda connection: None) as silent:
        assert local.ask("link_clusters", [cluster(silent, 7)], 300) == (TIMEOUT, [TIMEOUT])


def test_on_hixl_a_link_does_not_keep_the_role(hixl, local):
    assert local.link(hixl[1], THEIRS) is SUCCESS
    local.ask("switch_role", LLMRole.PROMPT)
    pulls(local, THEIRS, number=1)
