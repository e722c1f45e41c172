# SPDX-License-Identifier: Apache-2.0
"""transfer_cache_async between processes: what arrives, when, and how a transfer ends that does not go well."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest

from links import THEIRS, by_id, link
from living_host import in_child
from llm_datadist import BlocksCacheKey, LayerSynchronizer, LLMException, TransferConfig, TransferWithCacheKeyConfig
from peers import SOURCE, TARGET, Background, Peer, desc, wait_until
from pushes import (
    FAILED,
    NOT_EXIST,
    NOT_YET_LINK,
    PARAM_INVALID,
    SUCCESS,
    TIMEOUT,
    Ready,
    arrived,
    source,
)

LAYERS, TENSORS = 3, 6
ROW = 4096
SECONDS = 60_000  # ms; no transfer here is expected to take a tenth of it
BLOCKS = BlocksCacheKey(THEIRS)


class Gates(LayerSynchronizer):
    """Lets a layer through when it is told to; tells which ones it was asked for."""

    def __init__(self):
        self._open = [threading.Event() for _ in range(LAYERS)]
        self._asked = [threading.Event() for _ in range(LAYERS)]

    def synchronize_layer(self, layer_index, timeout_in_millis):
        self._asked[layer_index].set()
        return self._open[layer_index].wait(SECONDS / 1000)

    def open(self, *layers):
        for layer in layers:
            self._open[layer].set()

    def asked(self, layer):
        assert self._asked[layer].wait(SECONDS / 1000), f"layer {layer} was not asked for"


@pytest.fixture
def gates():
    gates = Gates()
    yield gates
    gates.open(*range(LAYERS))  # a test that fails must not leave the thread


@pytest.fixture
def two_sided(owner, local):
    link(local, owner)
    return local, owner


@pytest.fixture
def one_sided(owner, local):
    link(local, owner, one_sided=True)
    return local, owner


def addresses(end, name):
    return end.run("result = end.caches[cache].tensor_addrs", cache=name)


def to_rows(end, name, row=0, size=ROW, **kwargs):
    """Return a config for a row of a peer's cache, by the addresses of its tensors."""
    return TransferConfig(THEIRS, [addr + row * size for addr in addresses(end, name)], **kwargs)


def to_key(key, src=range(LAYERS), dst=None, batch=0):
    return TransferWithCacheKeyConfig(key, src, dst or src, batch)


def start(local, name, configs, *blocks, synchronizer=None):
    return local.manage("transfer_cache_async", name, synchronizer or Ready(), configs, *blocks)


def transferred(*args, **kwargs):
    task = start(*args, **kwargs)
    assert task.synchronize(SECONDS) is SUCCESS
    assert set(task.get_results()) == {SUCCESS}


def every(row, content):
    """What of a cache has changed when its row has got new bytes in every tensor."""
    return {(tensor, row): content(tensor) for tensor in range(TENSORS)}


def add_rows(local, owner, count=2):
    local.add("s", desc([2, ROW], tensors=TENSORS), SOURCE)
    return owner.add("d", desc([count, ROW], tensors=TENSORS), TARGET)


def row(tensor, at=0):
    return source(SOURCE, tensor, (2, ROW))[at]


def first_layers(count, to=0):
    """What of a cache has changed when a row has got so many layers."""
    return {(tensor, to): row(tensor) for tensor in range(2 * count)}


def start_and_move_a_layer(local, owner, gates):
    """Start a transfer between rows of both ends, and return it when layer 0 has arrived and it waits for layer 1."""
    add_rows(local, owner)
    task = start(local, "s", [to_rows(owner, "d")], synchronizer=gates)
    gates.open(0)
    gates.asked(1)
    return task


# --- by raw addresses


def test_rows_go_to_addresses(two_sided, owned):
    local, owner = two_sided
    local.add("s", desc([2, ROW], tensors=TENSORS), SOURCE, owned=owned)
    owner.add("d", desc([3, ROW], tensors=TENSORS), TARGET, owned=owned)
    config = to_rows(owner, "d", 2, src_batch_index=1)
    transferred(local, "s", [config])
    assert config.src_layer_range == range(LAYERS)
    arrived(owner, "d", every(2, lambda tensor: row(tensor, 1)))


def test_some_layers_go_to_their_addresses(two_sided):
    local, owner = two_sided
    add_rows(local, owner)
    addrs = addresses(owner, "d")
    transferred(local, "s", (TransferConfig(THEIRS, (addrs[5], addrs[0]), range(1, 2)),))
    arrived(owner, "d", {(5, 0): row(2), (0, 0): row(3)})


def test_blocks_go_to_blocks_at_addresses(two_sided):
    local, owner = two_sided
    local.add("s", desc([4, ROW], tensors=TENSORS), SOURCE, blocks=True)
    owner.add("d", desc([6, ROW], tensors=TENSORS), TARGET, blocks=True)
    src, dst = [0, 3, 1], [5, 0, 2]
    transferred(local, "s", [to_rows(owner, "d")], src, dst)
    wanted = {(tensor, to): source(SOURCE, tensor, (4, ROW))[of] for tensor in range(TENSORS) for of, to in zip(src, dst)}
    arrived(owner, "d", wanted)
    transferred(local, "s", [to_rows(owner, "d")], [2], [1], ROW)
    wanted.update(every(1, lambda tensor: source(SOURCE, tensor, (4, ROW))[2]))
    arrived(owner, "d", wanted)


def test_a_row_goes_to_blocks_in_pieces(two_sided):
    local, owner = two_sided
    local.add("s", desc([2, 10], tensors=TENSORS), SOURCE)
    owner.add("d", desc([4, 4], tensors=TENSORS), TARGET, blocks=True)
    transferred(local, "s", [to_rows(owner, "d", src_batch_index=1)], None, np.array([3, 0, 2]), 4)
    wanted = {}
    for tensor in range(TENSORS):
        content = source(SOURCE, tensor, (2, 10))[1]
        wanted.update({(tensor, to): content[4 * n : 4 * n + 4] for n, to in enumerate((3, 0, 2))})
    arrived(owner, "d", wanted)  # of the last block only the remainder of the row


def test_a_blocks_cache_without_blocks_is_its_block_0(two_sided):
    local, owner = two_sided
    local.add("s", desc([4, ROW], tensors=TENSORS), SOURCE, blocks=True)
    owner.add("d", desc([2, ROW], tensors=TENSORS), TARGET)
    transferred(local, "s", [to_rows(owner, "d")])
    arrived(owner, "d", every(0, lambda tensor: source(SOURCE, tensor, (4, ROW))[0]))


@pytest.mark.parametrize("where", ["nowhere", "before", "beyond", "between"])
def test_addresses_outside_every_cache_are_refused(two_sided, where):
    local, owner = two_sided
    add_rows(local, owner)
    addrs = addresses(owner, "d")
    shift = {"nowhere": 4096 - addrs[3], "before": -1, "beyond": ROW + 1, "between": 2 * ROW - 1}[where]
    config = TransferConfig(THEIRS, [*addrs[:3], addrs[3] + shift, *addrs[4:]])
    task = start(local, "s", [config])
    assert task.synchronize(SECONDS) is PARAM_INVALID
    assert task.get_results() == [PARAM_INVALID]
    arrived(owner, "d", first_layers(1))
    transferred(local, "s", [to_rows(owner, "d")])


def test_addresses_of_a_cache_that_is_gone_are_refused(two_sided):
    local, owner = two_sided
    add_rows(local, owner)
    config = to_rows(owner, "d")
    owner.run("end.kept = end.caches['d']; end.manager.unregister_cache(end.kept.cache_id)")
    assert start(local, "s", [config]).synchronize(SECONDS) is PARAM_INVALID
    arrived(owner, "d", {})


def test_a_source_that_is_gone_ends_the_transfer(two_sided, gates):
    local, owner = two_sided
    task = start_and_move_a_layer(local, owner, gates)
    local.manager.unregister_cache(local.caches["s"].cache_id)
    gates.open(1)
    assert task.get_results(SECONDS) == [NOT_EXIST]
    arrived(owner, "d", first_layers(1))


# --- by keys


def test_rows_go_to_the_row_of_a_key(one_sided):
    local, owner = one_sided
    to = add_rows(local, owner)
    transferred(local, "s", [to_key(by_id(to, 1), batch=1)])
    arrived(owner, "d", every(1, lambda tensor: row(tensor, 1)))


def test_layers_go_to_the_layers_that_a_config_names(one_sided):
    local, owner = one_sided
    local.add("s", desc([2, ROW], tensors=TENSORS), SOURCE)
    to = owner.add("d", desc([1, ROW], tensors=10), TARGET)
    transferred(local, "s", [to_key(by_id(to), range(1, 3), range(3, 5))])
    arrived(owner, "d", {(6 + n, 0): row(2 + n) for n in range(4)})


def test_blocks_go_to_the_blocks_of_a_key(one_sided):
    local, owner = one_sided
    local.add("s", desc([4, ROW], tensors=TENSORS), SOURCE, blocks=True)
    owner.add("d", desc([6, ROW], tensors=TENSORS), TARGET, BLOCKS, blocks=True)
    transferred(local, "s", [to_key(BLOCKS)], [3, 1], [0, 5])
    wanted = {(tensor, to): source(SOURCE, tensor, (4, ROW))[of] for tensor in range(TENSORS) for of, to in ((3, 0), (1, 5))}
    arrived(owner, "d", wanted)
    transferred(local, "s", [to_key(BLOCKS)])
    wanted.update(every(0, lambda tensor: source(SOURCE, tensor, (4, ROW))[0]))
    arrived(owner, "d", wanted)


def test_a_row_goes_to_the_blocks_of_a_key(one_sided):
    local, owner = one_sided
    local.add("s", desc([1, 8], tensors=TENSORS), SOURCE)
    owner.add("d", desc([4, 4], tensors=TENSORS), TARGET, BLOCKS, blocks=True)
    transferred(local, "s", [to_key(BLOCKS)], None, [2, 1], 4)
    rows = {(tensor, at): source(SOURCE, tensor, (2, 4))[n] for tensor in range(TENSORS) for n, at in enumerate((2, 1))}
    arrived(owner, "d", rows)
    task = start(local, "s", [to_key(BLOCKS)], None, [0], 2)  # not the size of the peer's blocks
    assert task.synchronize(SECONDS) is PARAM_INVALID
    arrived(owner, "d", rows)


def test_refusals_are_results(one_sided):
    local, owner = one_sided
    to = add_rows(local, owner)
    local.add("private", desc([2, ROW], tensors=TENSORS), SOURCE, accessible=False)
    closed = owner.add("private", desc([2, ROW], tensors=TENSORS), TARGET, accessible=False)
    for name, config, code in (
        ("s", to_key(by_id(99)), NOT_EXIST),
        ("s", to_key(BLOCKS), NOT_EXIST),
        ("s", to_key(by_id(to, 2)), PARAM_INVALID),
        ("s", to_key(by_id(to), batch=2), PARAM_INVALID),
        ("s", to_key(by_id(to), range(2), range(3, 5)), PARAM_INVALID),
        ("s", to_key(by_id(closed)), PARAM_INVALID),
        ("private", to_key(by_id(to)), PARAM_INVALID),
        ("s", to_key(BlocksCacheKey(77)), NOT_YET_LINK),
    ):
        task = start(local, name, [config])
        assert task.get_results(SECONDS) == [code], config
        assert task.synchronize() is code
    arrived(owner, "d", {})
    arrived(owner, "private", {})


# --- layers that come one after the other


def test_layers_arrive_when_they_are_there(two_sided, gates):
    local, owner = two_sided
    add_rows(local, owner)
    configs = [to_rows(owner, "d"), to_rows(owner, "d", 1)]
    task = start(local, "s", configs, synchronizer=gates)
    here = {}
    for layer in range(LAYERS):
        gates.asked(layer)  # so the layers before it have been pushed
        assert task.synchronize(0) is task.synchronize(1) is TIMEOUT
        assert task.get_results(0) == task.get_results(1) == [TIMEOUT] * 2
        arrived(owner, "d", here)
        here.update({(2 * layer + n, at): row(2 * layer + n) for n in range(2) for at in range(2)})
        gates.open(layer)
    for _ in range(2):
        assert task.synchronize(SECONDS) is task.synchronize() is SUCCESS
        assert task.get_results() == task.get_results(0) == [SUCCESS] * 2
    arrived(owner, "d", here)


class Until(LayerSynchronizer):
    """Has the layers before one; at that one it does what it is told."""

    def __init__(self, layer, then):
        self._layer, self._then = layer, then

    def synchronize_layer(self, layer_index, timeout_in_millis):
        return layer_index < self._layer or self._then()


def fail():
    raise ZeroDivisionError("no layer")


@pytest.mark.parametrize(("then", "results"), [(lambda: False, [SUCCESS, PARAM_INVALID, None]), (fail, [SUCCESS, None, None])])
def test_a_synchronizer_that_gives_up_ends_the_transfer(two_sided, then, results, quiet):
    local, owner = two_sided
    add_rows(local, owner)
    addrs = addresses(owner, "d")
    with Peer() as other:
        address = other.open(3)
        other.add("d", desc([2, ROW], tensors=TENSORS), TARGET)
        assert local.link(address, 3) is SUCCESS
        configs = [
            TransferConfig(THEIRS, addrs[:2], range(1)),
            TransferConfig(3, addresses(other, "d")[:4], range(2)),
            TransferConfig(4, addrs[4:], range(2, 3)),
        ]
        task = start(local, "s", configs, synchronizer=Until(1, then))
        assert task.get_results(SECONDS) == results
        assert task.synchronize() is next((code for code in results if code not in (SUCCESS, None)), SUCCESS)
        arrived(owner, "d", first_layers(1))
        arrived(other, "d", first_layers(1))


def test_several_clusters_get_their_layers_side_by_side(one_sided, gates):
    local, owner = one_sided
    to = add_rows(local, owner)
    with Peer() as other:
        address = other.open(3, one_sided=True)
        other.add("d", desc([2, ROW], tensors=TENSORS), TARGET, BlocksCacheKey(3), blocks=True)
        assert local.link(address, 3) is SUCCESS
        configs = (to_key(by_id(to)), to_key(BlocksCacheKey(3), range(1)), to_key(by_id(to, 1), range(2)))
        task = start(local, "s", configs, synchronizer=gates)
        gates.open(0)
        gates.asked(1)
        arrived(other, "d", first_layers(1))
        gates.open(1, 2)
        assert task.get_results(SECONDS) == [SUCCESS] * 3
        arrived(owner, "d", {**every(0, row), **first_layers(2, to=1)})


def test_transfers_of_many_threads_do_not_mix(one_sided):
    local, owner = one_sided
    shape = desc([2, ROW], tensors=TENSORS)
    ids = {}
    for n in range(6):
        local.add(f"s{n}", shape, n)
        ids[n] = owner.add(f"d{n}", shape, TARGET)
    tasks = [start(local, f"s{n}", [to_key(by_id(ids[n], 1))]) for n in ids]
    assert [task.synchronize(SECONDS) for task in tasks] == [SUCCESS] * len(ids)
    for n in ids:
        arrived(owner, f"d{n}", {(tensor, 1): source(n, tensor, (2, ROW))[0] for tensor in range(TENSORS)})


# --- transfers that do not go well


def test_each_layer_has_a_deadline(local, owner, gates):
    link(local, owner, sync_kv_timeout=300)
    add_rows(local, owner)
    task = start(local, "s", [to_rows(owner, "d")], synchronizer=gates)
    gates.open(0, 2)
    gates.asked(1)
    with owner.stopped():
        gates.open(1)
        began = Background(task.synchronize, SECONDS)
        assert began.result() is TIMEOUT
        assert began.seconds < 10 * 1.3  # the deadline, and the second in which the receiver may confirm
        assert task.get_results() == [TIMEOUT]
    for tensor, content in enumerate(owner.content("d")[:2]):
        assert np.array_equal(content[:ROW], row(tensor))


def test_a_receiver_that_dies_ends_the_transfer(local, transport, gates):
    local.open(2, listen=None)
    with Peer() as owner:
        assert local.link(owner.open(THEIRS), THEIRS) is SUCCESS
        task = start_and_move_a_layer(local, owner, gates)
        owner.kill()
        gates.open(1)
    assert task.get_results(SECONDS)[0] in (FAILED, NOT_YET_LINK)
    assert task.synchronize() is not SUCCESS


def test_an_unlink_ends_the_transfer_at_its_next_layer(two_sided, gates):
    local, owner = two_sided
    task = start_and_move_a_layer(local, owner, gates)
    assert local.unlink(THEIRS) is SUCCESS
    gates.open(1)
    assert task.get_results(SECONDS) == [NOT_YET_LINK]
    arrived(owner, "d", first_layers(1))


def test_finalize_ends_the_transfer_at_its_next_layer(two_sided, gates):
    local, owner = two_sided
    task = start_and_move_a_layer(local, owner, gates)
    memory = local.memory["s"]
    local.close()
    gates.open(1)
    assert task.get_results(SECONDS) == [PARAM_INVALID]
    arrived(owner, "d", first_layers(1))
    del memory


def test_finalize_ends_the_push_of_a_layer(local, owner):
    """It waits for the receiver, which is stopped, for a second at most."""
    link(local, owner, sync_kv_timeout=30_000)
    add_rows(local, owner)
    config, memory = to_rows(owner, "d"), local.memory["s"]
    with owner.stopped():
        task = start(local, "s", [config])
        wait_until(lambda: local.held() > 1, "the engine knows of the push")
        closing = Background(local.close)
        closing.result()
        assert closing.seconds < 10
        code = task.synchronize(SECONDS)
    assert code not in (SUCCESS, TIMEOUT), code
    del memory


def test_an_interrupt_ends_the_wait_and_not_the_transfer(two_sided, gates):
    local, owner = two_sided
    add_rows(local, owner)
    waiting = threading.Event()

    def strike():
        assert waiting.wait(SECONDS / 1000)
        os.kill(os.getpid(), signal.SIGINT)
        return True

    class Striking(LayerSynchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            return (layer_index != 1 or strike()) and gates.synchronize_layer(layer_index, timeout_in_millis)

    task = start(local, "s", [to_rows(owner, "d")], synchronizer=Striking())
    gates.open(0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            waiting.set()
            task.synchronize()
    finally:
        signal.signal(signal.SIGINT, before)
    assert task.get_results(0) == [TIMEOUT]
    gates.open(1, 2)
    assert task.synchronize(SECONDS) is SUCCESS
    arrived(owner, "d", every(0, row))


def test_a_forked_child_is_told_that_the_transfer_is_its_parents(two_sided, gates):
    local, owner = two_sided
    add_rows(local, owner)
    config = to_rows(owner, "d")
    task = start(local, "s", [config], synchronizer=gates)
    gates.asked(0)

    def ask():
        told = []
        for call in (task.synchronize, task.get_results, lambda: start(local, "s", [config])):
            try:
                told.append(str(call()))
            except LLMException as exc:
                told.append(exc.status_code.name)
        return told

    assert in_child(ask) == (["LLM_FAILED"] * 3, 0)
    gates.open(*range(LAYERS))
    assert task.synchronize(SECONDS) is SUCCESS
    arrived(owner, "d", every(0, row))


TRANSFER_AT_EXIT = """
import threading
from llm_datadist import LayerSynchronizer, TransferConfig

class AtExit(LayerSynchronizer):
    def synchronize_layer(self, layer_index, timeout_in_millis):
        threading.main_thread().join()
        return True

end.manager.transfer_cache_async(end.caches["s"], AtExit(), [TransferConfig(1, addrs)])
"""


def test_a_process_that_ends_has_first_made_its_transfer(local, transport):
    address = local.open(THEIRS)
    local.add("d", desc([2, ROW], tensors=TENSORS), TARGET)
    with Peer() as pusher:
        pusher.open(2, listen=None)
        assert pusher.link(address, THEIRS) is SUCCESS
        pusher.add("s", desc([2, ROW], tensors=TENSORS), SOURCE)
        pusher.run(TRANSFER_AT_EXIT, addrs=addresses(local, "d"))
        arrived(local, "d", {})
        pusher.process.stdin.close()
        assert pusher.process.wait(SECONDS / 1000) == 0
    arrived(local, "d", every(0, row))
