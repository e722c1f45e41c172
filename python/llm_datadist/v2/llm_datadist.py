# SPDX-License-Identifier: Apache-2.0
"""LLMDataDist: one engine, its links, and the manager of its caches.

What the LLMDataDist of the older package shares with this one is in :class:`BaseDataDist`. Outside cache-manager mode both
run the engine of the older API, which is in that package.
"""

from __future__ import annotations

import atexit
import importlib
import socket
import struct
from collections.abc import Sequence
from typing import Any

from .. import _native, _options
from ..configs import LLMClusterInfo, LLMRole
from ..status import LLMException, LLMStatusCode, code_2_status, handle_llm_status, raise_if_false, raise_if_true
from ..utils import log
from ..utils.utils import check_dict, check_int32, check_isinstance, check_uint32, check_uint64
from .cache_manager import CacheManager
from .config import ClusterConfig, EngineConfig
from .llm_types import RegisterMemStatus, int_to_mem_status_dict
from .llm_utils import parse_listen_ip_info

__all__ = ["BaseDataDist", "LLMDataDist"]

_MOST_NAME = 127  # characters
_MOST_MEMBERS = 4

_ROLE_NAMES = {LLMRole.PROMPT: "Prompt", LLMRole.DECODER: "Decoder", LLMRole.MIX: "Mix"}


class BaseDataDist:
    """One end of the transfer of KV cache, in either package.

    A process has at most one that is initialised, or any number of those with open.MultipleEngines=1.
    role says what the process is for (PROMPT computes, DECODER fetches); in cache-manager mode it does not limit what may
    be called. cluster_id is the id by which peers know this end.

    llm_engine_instance is the one that is initialised; those with open.MultipleEngines are not in it.
    """

    llm_engine_instance: BaseDataDist | None = None

    def __init__(self, role: LLMRole, cluster_id: int) -> None:
        self._role = check_isinstance("role", role, LLMRole)
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._is_initialized = False
        self._enable_cache_mgr = False
        self._enable_local_comm_res = False
        self._engine_options: dict[str, str] = {}
        self._llm_datadist: Any = None
        self._cache_manager: CacheManager | None = None
        self._kv_cache_manager: Any = None

    def init(self, options: dict[str, str]) -> None:
        """Start the engine. options is what LLMConfig.generate_options returns.

        Raises LLMException: LLM_FAILED where the process has another engine or the listen address can't be bound,
        LLM_OUT_OF_MEMORY where a pool can't be had, LLM_PARAM_INVALID for options, LLM_FEATURE_NOT_ENABLED for those that this
        version does not have.
        """
        _native.refuse_in_child()
        if self._is_initialized:
            return
        several = isinstance(options, dict) and options.get(_options.MULTIPLE_ENGINES) == "1"
        _native.close_dropped()
        alone = all(package.llm_engine_instance in (None, self) for package in BaseDataDist.__subclasses__())
        raise_if_false(
            alone and (several or not _native.several()),
            "another LLMDataDist of this process is initialised: finalize it first, or give both {}=1",
            _options.MULTIPLE_ENGINES,
            status_code=LLMStatusCode.LLM_FAILED,
        )
        check_isinstance("options", options, dict, allow_none=False)
        _check_graph_memory(options)
        check_dict("options", options, str, str)
        engine_options = self._options_of_its_own(options)
        engine_options[_options.ROLE] = self._role_to_str(self._role)
        self._imply_modes(engine_options)
        self._engine_options = engine_options
        self._start()
        self._is_initialized = True
        if not several:
            self._package().llm_engine_instance = self

    @staticmethod
    def _package() -> type[BaseDataDist]:
        """Return the class that keeps the initialised object."""
        raise NotImplementedError

    @staticmethod
    def _options_of_its_own(options: dict[str, str]) -> dict[str, str]:
        """Return the dict that init may add to."""
        return dict(options)

    def _imply_modes(self, options: dict[str, str]) -> None:
        """Set the options that others imply, and check that they fit together."""
        self._enable_local_comm_res = _options.LOCAL_COMM_RES in options
        if self._enable_local_comm_res:
            options.setdefault(_options.CACHE_MANAGER, "1")
            options.setdefault(_options.ONE_SIDED, "1")
        self._enable_cache_mgr = options.get(_options.CACHE_MANAGER) == "1"
        raise_if_true(
            self._enable_local_comm_res and not self._enable_cache_mgr,
            "{} needs {}=1",
            _options.LOCAL_COMM_RES,
            _options.CACHE_MANAGER,
        )
        if _options.BACKEND in options:
            raise_if_false(self._enable_cache_mgr, "{} needs {}=1", _options.BACKEND, _options.CACHE_MANAGER)
            options.setdefault(_options.ONE_SIDED, "1")
            raise_if_false(options[_options.ONE_SIDED] == "1", "{} needs {}=1", _options.BACKEND, _options.ONE_SIDED)
            raise_if_false(_options.LISTEN_INFO in options, "{} needs {}", _options.BACKEND, _options.LISTEN_INFO)

    def _start(self) -> None:
        """Start the engine of the older API."""
        EngineConfig.gen_cluster_info_if_not_exist(self._cluster_id, self._role, self._engine_options)
        manager = importlib.import_module("llm_datadist_v1.kv_cache_manager")
        engine = importlib.import_module("llm_datadist_v1.engine").Engine()
        code = engine.initialize(self._cluster_id, self._engine_options)
        handle_llm_status(code, "init", f"cluster_id is {self._cluster_id}")
        self._llm_datadist = engine
        self._kv_cache_manager = manager.KvCacheManager(engine, self._role)

    def finalize(self) -> None:
        """End the engine: links, listener, memory. Peers see this end die. Caches become invalid. May be repeated."""
        if not self._is_initialized:
            return
        self._is_initialized = False
        if self._package().llm_engine_instance is self:
            self._package().llm_engine_instance = None
        for manager in (self._cache_manager, self._kv_cache_manager):
            if manager is not None:
                manager._initialized = False
        end = self._llm_datadist.close if self._cache_manager is not None else self._llm_datadist.finalize
        self._cache_manager = self._kv_cache_manager = None
        end()

    @property
    def cluster_id(self) -> int:
        return self._cluster_id

    @property
    def kv_cache_manager(self) -> Any:
        """The manager of the older API, outside cache-manager mode."""
        self._check_initialized()
        raise_if_true(self._enable_cache_mgr, "kv_cache_manager is not available with {}=1", _options.CACHE_MANAGER)
        return self._kv_cache_manager

    @property
    def listen_address(self) -> str | None:
        """The bound "ip:port", or None where this end does not listen."""
        self._check_initialized()
        address: str | None = self._engine.listen_address()
        return address

    def explain(self, cluster_id: int) -> str:
        """Tell how the link to a cluster works and why it last failed; "" for an id never met."""
        self._check_initialized()
        return str(self._engine.explain(check_uint64("cluster_id", cluster_id)))

    def link_clusters(
        self, clusters: list[LLMClusterInfo] | tuple[LLMClusterInfo, ...], timeout: int = 3000
    ) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        """Link to clusters in parallel, within timeout ms.

        Returns (code, codes): the code of each cluster in their order, and before them the last one that is not LLM_SUCCESS,
        if any. Never raises for a link that fails: explain says why.
        """
        self._check_initialized()
        _check_timeout(timeout)
        check_isinstance("clusters", clusters, [list, tuple], LLMClusterInfo, allow_none=False)
        needs_local = self._cache_manager is not None and not self._engine_options.get(_options.LOCAL_COMM_RES)
        for cluster in clusters:
            raise_if_true(needs_local and not cluster.local_ip_info_list, "local_ip_info_list is empty")
            if cluster.remote_cluster_id is not None:
                check_isinstance("remote_cluster_id", cluster.remote_cluster_id, int, allow_none=False)
        plain = [_plain(cluster) for cluster in clusters]
        if self._cache_manager is None:
            return _told(self._llm_datadist.link_clusters(plain, timeout))
        if not clusters:
            return LLMStatusCode.LLM_PARAM_INVALID, []
        return _overall(self._engine.link_clusters(plain, timeout))

    def unlink_clusters(
        self,
        clusters: list[LLMClusterInfo] | tuple[LLMClusterInfo, ...],
        timeout: int = 3000,
        force: bool = False,
    ) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        """Unlink from clusters, within timeout ms. What is not linked is a success.

        The peer is asked, at its remote_ip_info, to drop the link too; with force it is not, and sees this end die. Returns codes
        as link_clusters does: LLM_UNLINK_FAILED where nobody could be asked, LLM_TIMEOUT where operations on the link did not
        end in time; the link stays then.
        """
        self._check_initialized()
        self._check_either_manager("unlink_clusters")
        _check_timeout(timeout)
        check_isinstance("clusters", clusters, [list, tuple], LLMClusterInfo, allow_none=False)
        check_isinstance("force", force, bool, allow_none=False)
        for cluster in clusters:
            check_isinstance("remote_cluster_id", cluster.remote_cluster_id, int, allow_none=False)
        plain = [_plain(cluster) for cluster in clusters]
        if self._cache_manager is None:
            return _told(self._llm_datadist.unlink_clusters(plain, timeout, force))
        if not clusters:
            return LLMStatusCode.LLM_PARAM_INVALID, []
        return _overall(self._engine.unlink_clusters(plain, timeout, force))

    def switch_role(self, role: LLMRole, switch_options: dict[str, str] | None = None) -> None:
        """Change the role, and listen where switch_options["llm.listenIpInfo"] says or stop listening.

        Outside cache-manager mode the role has to be another one, only a PROMPT listens and has to, and enable_switch_role
        and one device are needed (LLM_FEATURE_NOT_ENABLED). Raises LLMException with LLM_EXIST_LINK while a link is live.
        """
        self._check_initialized()
        check_isinstance("role", role, LLMRole, allow_none=False)
        if self._cache_manager is None:
            self._switch_older_role(role, switch_options)
        else:
            check_isinstance("switch_options", switch_options, dict)
            self._listen_anew(switch_options)
        log.info("role switched from %s to %s", self._role, role)
        self._role = role

    def _listen_anew(self, switch_options: dict[str, str] | None) -> None:
        info = (switch_options or {}).get(_options.LISTEN_INFO)
        address = ""
        if info is not None:
            ip, port = parse_listen_ip_info(info)
            address = f"{ip}:{port}"
        self._engine.switch_role(address)

    def _switch_older_role(self, role: LLMRole, switch_options: dict[str, str] | None) -> None:
        raise_if_true(role == self._role, "the role is {!s} already", role)
        check_isinstance("switch_options", switch_options, dict)
        options = dict(switch_options or {})
        if role == LLMRole.PROMPT:
            self._check_listens(switch_options)
            ip, port = EngineConfig.parse_listen_ip_info(options[_options.LISTEN_INFO])
            options[_options.LISTEN_IP], options[_options.LISTEN_PORT] = str(ip), str(port)
        code = self._llm_datadist.switch_role(self._role_to_str(role), options)
        handle_llm_status(code, "switch_role", f"role is {role!s}")
        self._kv_cache_manager._switch_role(role)

    @staticmethod
    def _check_listens(switch_options: dict[str, str] | None) -> None:
        raise_if_false(_options.LISTEN_INFO in (switch_options or {}), "a PROMPT needs option {}", _options.LISTEN_INFO)

    def check_link_status(self, remote_cluster_id: int) -> None:
        """Return when the link to a cluster works; only a DECODER may ask, outside cache-manager mode.

        Raises LLMException: LLM_NOT_YET_LINK; after sync_kv_timeout LLM_LINK_BUSY where the link is in use until then, and
        LLM_WAIT_PROCESS_TIMEOUT where the peer does not answer.
        """
        self._check_initialized()
        raise_if_true(self._enable_cache_mgr, "check_link_status is not available with {}=1", _options.CACHE_MANAGER)
        check_uint64("remote_cluster_id", remote_cluster_id)
        code = self._llm_datadist.check_link_status(remote_cluster_id)
        handle_llm_status(code, "check_link_status", f"remote_cluster_id is {remote_cluster_id}")

    def _cluster_config(self) -> ClusterConfig:
        return EngineConfig.from_engine_options(self._role == LLMRole.PROMPT, self._engine_options).cluster_config

    def _check_either_manager(self, operation: str) -> None:
        wrong = self._enable_cache_mgr and self._cache_manager is None
        raise_if_true(wrong, "{} is not available in the older package with {}=1", operation, _options.CACHE_MANAGER)

    @property
    def _engine(self) -> Any:
        return self._llm_datadist

    @staticmethod
    def _role_to_str(role: LLMRole) -> str:
        return _ROLE_NAMES[role]

    def _check_initialized(self) -> None:
        if not self._is_initialized:
            raise RuntimeError("LLMDataDist is not initialized")


class LLMDataDist(BaseDataDist):
    """One end of the transfer of KV cache. With llm.EnableCacheManager=1 it has a cache_manager, else a kv_cache_manager."""

    llm_engine_instance: BaseDataDist | None = None

    @staticmethod
    def _package() -> type[BaseDataDist]:
        return LLMDataDist

    def _start(self) -> None:
        if not self._enable_cache_mgr:
            return super()._start()
        options = self._engine_options
        if _options.LISTEN_INFO in options:
            ip, port = parse_listen_ip_info(options[_options.LISTEN_INFO])
            options[_options.LISTEN_IP], options[_options.LISTEN_PORT] = ip, str(port)
        self._llm_datadist = _native.Engine(self._cluster_id, options)
        self._cache_manager = CacheManager(self._llm_datadist, options)

    @property
    def cache_manager(self) -> CacheManager:
        """The manager of caches, in cache-manager mode."""
        self._check_initialized()
        raise_if_false(self._cache_manager is not None, "cache_manager needs {}=1", _options.CACHE_MANAGER)
        assert self._cache_manager is not None
        return self._cache_manager

    def link(self, comm_name: str, cluster_rank_info: dict[int, int], rank_table: str) -> int:
        """Begin to link a group of 2 to 4 engines, each of which calls this with the same arguments, and return an id.

        cluster_rank_info maps cluster ids, the own one among them, to ranks that do not decrease; rank_table is the JSON
        text that tells the address of each rank. query_register_mem_status tells when the links are there.
        Raises LLMException: LLM_PARAM_INVALID for arguments, LLM_LINK_FAILED for what is no rank table.
        """
        self._check_initialized()
        raise_if_false(self._enable_cache_mgr, "link needs {}=1", _options.CACHE_MANAGER)
        check_isinstance("comm_name", comm_name, str, allow_none=False)
        raise_if_false(comm_name, "comm_name should not be empty")
        raise_if_false(len(comm_name) <= _MOST_NAME, "comm_name should have at most {} characters", _MOST_NAME)
        check_isinstance("cluster_rank_info", cluster_rank_info, dict, allow_none=False)
        check_dict("cluster_rank_info", cluster_rank_info, int, int)
        raise_if_false(len(cluster_rank_info) <= _MOST_MEMBERS, "cluster_rank_info should have at most {} members", _MOST_MEMBERS)
        for cluster_id, rank in cluster_rank_info.items():
            check_uint64("cluster_rank_info key", cluster_id)
            check_uint32("cluster_rank_info value", rank)
        check_isinstance("rank_table", rank_table, str, allow_none=False)
        raise_if_false(len(cluster_rank_info) >= 2, "cluster_rank_info should have at least 2 members")
        ranks = list(cluster_rank_info.values())
        raise_if_false(ranks == sorted(ranks), "the ranks of cluster_rank_info should not decrease, but got {}", ranks)
        comm_id: int = self._groups.group_link(comm_name, list(cluster_rank_info.items()), rank_table)
        self.cache_manager.set_is_call_linked()
        return comm_id

    def unlink(self, comm_id: int) -> None:
        """End what link began: a running preparation and this end of the links, save those of another group.

        Raises LLMException with LLM_NOT_YET_LINK for an id that link did not return, or that was unlinked.
        """
        self._check_initialized()
        self._groups.group_unlink(check_uint64("comm_id", comm_id))

    def query_register_mem_status(self, comm_id: int) -> RegisterMemStatus:
        """Tell how far link has come: PREPARING, then OK or FAILED for good. explain and the log tell why it failed.

        Raises LLMException with LLM_NOT_YET_LINK for an id that link did not return, or that was unlinked.
        """
        self._check_initialized()
        state = self._groups.group_status(check_uint64("comm_id", comm_id))
        return int_to_mem_status_dict.get(state, RegisterMemStatus.FAILED)

    @property
    def _groups(self) -> _native.Engine:
        """The engine that knows the groups of link; that of the older API has none."""
        engine: _native.Engine = self._engine if self._enable_cache_mgr else self._engine.native
        return engine


def _check_graph_memory(options: dict[str, str]) -> None:
    if _options.GRAPH_MEMORY not in options:
        return
    value = check_isinstance(_options.GRAPH_MEMORY, options[_options.GRAPH_MEMORY], str, allow_none=False)
    raise_if_true("," in value, "{} should be one value, but got {!r}", _options.GRAPH_MEMORY, value)
    raise_if_false(value.isascii() and value.isdigit(), "{} should be digits, but got {!r}", _options.GRAPH_MEMORY, value)


def _check_timeout(timeout: int) -> None:
    check_int32("timeout", timeout)
    raise_if_false(timeout > 0, "timeout should be positive, but got {}", timeout)


def _plain(cluster: LLMClusterInfo) -> dict[str, Any]:
    """Return a cluster as the engine takes it."""
    return {
        "id": cluster.remote_cluster_id,
        "local": [dotted(ip) for ip, _ in cluster.local_ip_info_list],
        "remote": [f"{dotted(ip)}:{port}" for ip, port in cluster.remote_ip_info_list],
    }


def dotted(ip: int) -> str:
    """Return the text of an ip whose network-order bytes are a little-endian integer."""
    try:
        return socket.inet_ntoa(struct.pack("<I", ip))
    except struct.error:
        raise TypeError(f"ip should be an integer of 32 bits, but got {ip!r}") from None


def _overall(codes: Sequence[LLMStatusCode]) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
    failed = [code for code in codes if code != LLMStatusCode.LLM_SUCCESS]
    return (failed[-1] if failed else LLMStatusCode.LLM_SUCCESS), list(codes)


def _told(result: tuple[int, list[int]]) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
    overall, codes = result
    return code_2_status(overall), [code_2_status(code) for code in codes]


def shut_down(instance: BaseDataDist | None) -> None:
    """Finalize what is left at exit."""
    try:
        if instance is not None:
            instance.finalize()
    except LLMException as exc:
        log.warn("finalize at exit: %s", exc)
    finally:
        _native.close_all()


def _shutdown_handler() -> None:
    shut_down(LLMDataDist.llm_engine_instance)


atexit.register(_shutdown_handler)
