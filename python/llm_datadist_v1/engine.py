# SPDX-License-Identifier: Apache-2.0
"""Engine: the rules of the older API for links, roles and memory, on the engine of llm_datadist."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Callable

from llm_datadist import _native, _options
from llm_datadist.status import LLMException, LLMStatusCode, raise_if_false, raise_if_true
from llm_datadist.utils import log
from llm_datadist.v2.config import parse_cluster_info
from llm_datadist.v2.llm_datadist import dotted

__all__ = ["OLDER_TIMEOUT", "Engine", "older_codes", "utilization"]

MOST_CLUSTERS = 16  # in one call
MOST_LINKS = 512
_PROMPT, _DECODER = "Prompt", "Decoder"
# What the engine of llm_datadist would take for its own modes.
_NOT_FOR_THE_ENGINE = (_options.CACHE_MANAGER, _options.LOCAL_COMM_RES, _options.BACKEND, _options.HOST_POOL)

_SUCCESS = LLMStatusCode.LLM_SUCCESS
OLDER_TIMEOUT = {LLMStatusCode.LLM_TIMEOUT: LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT}
# A peer that does not listen any more, or does not answer, has not been told.
_UNLINK_CODES = {
    LLMStatusCode.LLM_UNLINK_FAILED: LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED,
    LLMStatusCode.LLM_TIMEOUT: LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED,
}
Result = tuple[int, list[int]]


class Engine:
    """One engine of the older API, with the calls of the original's native module.

    They return status codes as integers; what is no result of a cluster but a failure of the call is raised, which says more.
    Clusters are dicts of id (None where it was never set), local (ips) and remote ("ip:port"s).
    """

    native: _native.Engine

    def __init__(self) -> None:
        self.devices = 1
        self._role = ""
        self._may_switch = False
        self._turn = threading.Lock()  # held by the one call that links or unlinks

    def initialize(self, cluster_id: int, options: dict[str, str]) -> int:
        """Start the engine. options has llm.ClusterInfo, which says how many devices there are and where to listen."""
        info = parse_cluster_info(options)
        self.devices = max(1, len(info.get("logic_device_id", ())))
        self._role = options[_options.ROLE]
        self._may_switch = options.get(_options.SWITCH_ROLE) == "1"
        self.native = _native.Engine(cluster_id, _native_options(options, info, self.devices))
        return 0

    def finalize(self) -> int:
        """End the engine: links, listener, memory."""
        self.native.close()
        return 0

    def listen_address(self) -> str | None:
        """Return the bound "ip:port", or None."""
        return self.native.listen_address()

    def explain(self, cluster_id: int) -> str:
        """Tell how the link to a cluster works and why it last failed."""
        return self.native.explain(cluster_id)

    def switch_role(self, role: str, options: dict[str, str]) -> int:
        """Take another role; a prompt listens where options say: llm.ListenIp, as an integer, and llm.ListenPort.

        Raises LLMException: LLM_FEATURE_NOT_ENABLED unless llm.EnableSwitchRole was set and there is one device,
        LLM_EXIST_LINK while a link is live.
        """
        raise_if_false(
            self._may_switch and self.devices == 1,
            "switch_role needs llm.EnableSwitchRole=1 at init and one device, there are {}",
            self.devices,
            status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        )
        address = ""
        if role == _PROMPT:
            address = f"{dotted(int(options[_options.LISTEN_IP]))}:{options[_options.LISTEN_PORT]}"
        self.native.switch_role(address)
        self._role = role
        return 0

    def check_link_status(self, remote_cluster_id: int) -> int:
        """Ask the peer of a link for an answer, when nothing is under way on it. DECODER only.

        Raises LLMException: LLM_NOT_YET_LINK; after llm.SyncKvCacheWaitTime LLM_LINK_BUSY where the link is still in use or
        being unlinked, LLM_WAIT_PROCESS_TIMEOUT where the peer has not answered.
        """
        raise_if_false(self._role == _DECODER, "only a DECODER checks links")
        with older_codes(OLDER_TIMEOUT):
            self.native.check_link(remote_cluster_id)
        return 0

    def link_clusters(self, clusters: Sequence[dict[str, Any]], timeout: int) -> Result:
        """Link to clusters within timeout ms: the code of the call, and of each cluster where the call as a whole is good.

        An entry that failed has left no link. LLM_ALREADY_LINK is no failure of the call.
        """
        code = self._link_refusal(clusters)
        if code != _SUCCESS:
            return int(code), []
        return self._in_turn(timeout, lambda left: self._link(clusters, left))

    def unlink_clusters(self, clusters: Sequence[dict[str, Any]], timeout: int, force: bool) -> Result:
        """Unlink clusters within timeout ms. A prompt drops its end, which ends the link; so does force."""
        if not clusters:
            return int(LLMStatusCode.LLM_PARAM_INVALID), []
        if len(clusters) > MOST_CLUSTERS:
            return int(LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT), []
        return self._in_turn(timeout, lambda left: self._unlink(clusters, left, force))

    def _link_refusal(self, clusters: Sequence[dict[str, Any]]) -> LLMStatusCode:
        """Return why a call as a whole is refused."""
        if len(clusters) > MOST_CLUSTERS:
            return LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT
        wrong = ""
        if self._role != _DECODER:
            wrong = "only a DECODER links"
        elif not clusters:
            wrong = "no clusters are given"
        elif any(not len(each["local"]) == len(each["remote"]) == self.devices for each in clusters):
            wrong = f"each cluster needs {self.devices} local and remote addresses, one for each device"
        elif any(each["local"] != clusters[0]["local"] for each in clusters):
            wrong = "the local addresses should be the same for all clusters"
        return _refused(wrong) if wrong else _SUCCESS

    def _in_turn(self, timeout: int, call: Callable[[int], Result]) -> Result:
        """Make one call at a time, with the ms that are left of timeout."""
        deadline = time.monotonic() + timeout / 1000
        if not self._turn.acquire(timeout=timeout / 1000):
            return int(LLMStatusCode.LLM_PROCESSING_LINK), []
        try:
            return call(max(1, int((deadline - time.monotonic()) * 1000)))
        finally:
            self._turn.release()

    def _link(self, clusters: Sequence[dict[str, Any]], timeout: int) -> Result:
        linked = {link["cluster"] for link in self.native.links()}
        unnamed = sum(each["id"] is None for each in clusters)
        if unnamed + len(linked | {each["id"] for each in clusters if each["id"] is not None}) > MOST_LINKS:
            return int(_refused(f"there would be more than {MOST_LINKS} links")), []
        codes: list[LLMStatusCode] = [LLMStatusCode.LLM_REPEAT_REQUEST] * len(clusters)
        firsts: dict[Any, int] = {}
        for index, each in enumerate(clusters):
            firsts.setdefault(f"unnamed {index}" if each["id"] is None else each["id"], index)
        places = list(firsts.values())
        results = self.native.link_clusters([_of_first_device(clusters[index]) for index in places], timeout)
        for index, code in zip(places, results):
            codes[index] = OLDER_TIMEOUT.get(code, code)
        return _overall(codes, LLMStatusCode.LLM_ALREADY_LINK, LLMStatusCode.LLM_LINK_FAILED)

    def _unlink(self, clusters: Sequence[dict[str, Any]], timeout: int, force: bool) -> Result:
        addresses = {link["cluster"]: link["address"] for link in self.native.links()}
        codes = [self._unlink_refusal(each, addresses, force) for each in clusters]
        places = [index for index, code in enumerate(codes) if code == _SUCCESS]
        local = force or self._role == _PROMPT
        good = [_of_first_device(clusters[index]) for index in places]
        for index, code in zip(places, self.native.unlink_clusters(good, timeout, local) if good else ()):
            codes[index] = _UNLINK_CODES.get(code, code)
        return _overall(codes, LLMStatusCode.LLM_NOT_YET_LINK, LLMStatusCode.LLM_UNLINK_FAILED)

    def _unlink_refusal(self, cluster: dict[str, Any], addresses: dict[int, str], force: bool) -> LLMStatusCode:
        """Return why a cluster can't be unlinked. addresses has those of the live links."""
        address = addresses.get(cluster["id"])
        if address is None:
            return LLMStatusCode.LLM_NOT_YET_LINK
        if not address:  # of the loopback fabric, where every address leads here
            return _SUCCESS
        remote = cluster["remote"][:1]
        if self._role == _PROMPT:  # which knows no port of a decoder
            address, remote = address.rpartition(":")[0], [each.rpartition(":")[0] for each in remote]
        fits = remote == [address] or (not remote and (force or self._role == _PROMPT))
        return _SUCCESS if fits else LLMStatusCode.LLM_PARAM_INVALID


def _refused(wrong: str) -> LLMStatusCode:
    log.error("link_clusters: %s", wrong)
    return LLMStatusCode.LLM_PARAM_INVALID


def _overall(codes: list[LLMStatusCode], harmless: LLMStatusCode, failed: LLMStatusCode) -> Result:
    good = all(code in (_SUCCESS, harmless) for code in codes)
    return int(_SUCCESS if good else failed), [int(code) for code in codes]


def _of_first_device(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return a cluster with the addresses of its first device, of which the others are aliases."""
    return {"id": cluster["id"], "local": cluster["local"][:1], "remote": cluster["remote"][:1]}


def _native_options(options: dict[str, str], info: dict[str, Any], devices: int) -> dict[str, str]:
    """Return the options of the engine below: the memory budget as its pool, the first listen address."""
    out = {key: value for key, value in options.items() if key not in _NOT_FOR_THE_ENGINE}
    budget = int(_budget(options, devices) * utilization(options))
    out[_options.DEVICE_POOL] = json.dumps({"memory_size": budget})
    _check_buffers(options.get(_options.BUFFERS, ""))
    for listen in info.get("listen_ip_info", ())[:1]:
        raise_if_false({"ip", "port"} <= set(listen), "listen_ip_info needs ip and port, but got {}", listen)
        out[_options.LISTEN_IP], out[_options.LISTEN_PORT] = dotted(listen["ip"]), str(listen["port"])
    return out


def utilization(options: dict[str, str]) -> float:
    """Return the part of the memory budget that is used. ValueError where it is no number."""
    return float(options.get(_options.UTILIZATION, "0.95"))


def _budget(options: dict[str, str], devices: int) -> int:
    """Bytes for KV cache: half of the machine's memory where nothing is said; reserved, not committed."""
    if _options.GRAPH_MEMORY in options:
        return int(options[_options.GRAPH_MEMORY]) * devices
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _check_buffers(text: str) -> None:
    """Check classes of buffers ({"buf_cfg": [{"total_size", "blk_size", "max_buf_size"}, ...]}), which nothing here needs."""
    if not text:
        return
    try:
        classes = [(each["total_size"], each["blk_size"], each["max_buf_size"]) for each in json.loads(text)["buf_cfg"]]
        good = all(isinstance(number, int) for each in classes for number in each)
    except (ValueError, KeyError, TypeError):
        good = False
    raise_if_false(good, "llm.BufPoolCfg should be JSON of classes of buffers, but got {!r}", text)
    huge = 2 << 20
    largest = 0
    for total, block, most in classes:
        power_of_two = 0 < block <= huge and block & (block - 1) == 0
        raise_if_false(power_of_two, "blk_size {} should be a power of two up to {}", block, huge)
        whole = 0 < total <= 0xFFFFFFFF and total % huge == 0 and total % block == 0
        raise_if_false(whole, "total_size {} should be a multiple of {} and of blk_size", total, huge)
        raise_if_true(most < block or most >= total, "max_buf_size {} should be from blk_size to total_size", most)
        raise_if_true(most <= largest, "max_buf_size {} should be larger than the one before", most)
        largest = most


@contextlib.contextmanager
def older_codes(codes: dict[LLMStatusCode, LLMStatusCode]) -> Iterator[None]:
    """Give failures the codes that the older API has for them."""
    try:
        yield
    except LLMException as exc:
        if exc.status_code not in codes:
            raise
        raise LLMException(
            *exc.args,
            status_code=codes[exc.status_code],
            operation=exc.operation,
            peer=exc.peer,
            address=exc.address,
            stage=exc.stage,
            cause=exc.cause,
            hint=exc.hint,
        ) from exc
