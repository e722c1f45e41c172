# SPDX-License-Identifier: Apache-2.0
"""What a caller configures: the role, the clusters to link, and the options of an engine.

A config class is a list of :class:`Option` declarations. Each says under which key a property is emitted, what may be
assigned to it and when it is emitted at all. Which values make sense together is judged by the engine at init.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, Callable, Generic, Optional, TypeVar, Union, overload

from . import _options
from .status import raise_if_false
from .utils.utils import (
    UINT32_MAX,
    check_dict,
    check_int32,
    check_isinstance,
    check_uint16,
    check_uint32,
    check_uint64,
)

__all__ = ["BaseConfig", "LLMClusterInfo", "LLMConfig", "LLMRole", "LlmConfig", "Option", "trans_str_ip"]

T = TypeVar("T")


class LLMRole(IntEnum):
    """What an engine does in a disaggregated deployment. It does not limit who may pull or push."""

    PROMPT = 1
    DECODER = 2
    MIX = 3

    def __str__(self) -> str:  # IntEnum's own changed with Python 3.11
        return f"LLMRole.{self.name}"


def trans_str_ip(ip: str | int) -> int:
    """Return an IPv4 address as the documented integer: its first byte is the lowest. An integer is returned as it is.

    A string is read by the rules of C's inet_aton; RuntimeError if it is no address.
    """
    if not isinstance(ip, str):
        return ip
    try:
        return int.from_bytes(socket.inet_aton(ip), "little")
    except (OSError, ValueError) as exc:
        raise RuntimeError(f"{ip!r} is not an IPv4 address") from exc


class LLMClusterInfo:
    """One cluster to link or unlink: its id, where it listens, and the local addresses to use."""

    def __init__(self) -> None:
        self._remote_cluster_id: int | None = None
        self._remote_role_type: LLMRole | int | None = None
        self._local_ip_info_list: list[tuple[int, int]] = []
        self._remote_ip_info_list: list[tuple[int, int]] = []

    @property
    def remote_cluster_id(self) -> int | None:
        return self._remote_cluster_id

    @remote_cluster_id.setter
    def remote_cluster_id(self, remote_cluster_id: int) -> None:
        self._remote_cluster_id = check_uint64("remote_cluster_id", remote_cluster_id)

    @property
    def remote_role_type(self) -> LLMRole | int | None:
        return self._remote_role_type

    @remote_role_type.setter
    def remote_role_type(self, remote_role_type: LLMRole | int | None) -> None:
        self._remote_role_type = check_isinstance("remote_role_type", remote_role_type, [LLMRole, int])

    @property
    def local_ip_info_list(self) -> list[tuple[int, int]]:
        return self._local_ip_info_list

    @property
    def remote_ip_info_list(self) -> list[tuple[int, int]]:
        return self._remote_ip_info_list

    def append_local_ip_info(self, ip: str | int, port: int) -> None:
        """Add a local address; port 0 leaves the choice of the port to the system."""
        self._local_ip_info_list.append(_ip_info(ip, port))

    def append_remote_ip_info(self, ip: str | int, port: int) -> None:
        """Add an address that the remote cluster listens on."""
        self._remote_ip_info_list.append(_ip_info(ip, port))


def _ip_info(ip: str | int, port: int) -> tuple[int, int]:
    check_isinstance("ip", ip, [str, int])
    check_uint16("port", port)
    return trans_str_ip(ip), port


class Option(Generic[T]):
    """One property of a config, and the entry that it becomes in the options dict.

    The value lies in the config's attribute ``_<name>``, which starts as ``initial``; the property reads as ``unset``
    while that is None. ``check`` gets name and value and returns what is stored. ``emits`` tells whether a stored value
    is emitted, ``text`` how it is written.
    """

    def __init__(
        self,
        key: str,
        check: Callable[[str, Any], Any],
        *,
        initial: T | None = None,
        unset: Any = None,
        emits: Callable[[Any], bool] = lambda value: value is not None,
        text: Callable[[Any], str] = str,
    ) -> None:
        self.key = key
        self.__doc__ = f"Emitted as `{key}`."
        self._check = check
        self._initial = initial
        self._unset = unset
        self._emits = emits
        self._text = text

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._field = f"_{name}"

    @overload
    def __get__(self, config: None, owner: type) -> Option[T]: ...

    @overload
    def __get__(self, config: BaseConfig, owner: type | None = None) -> T: ...

    def __get__(self, config: BaseConfig | None, owner: type | None = None) -> T | Option[T]:
        if config is None:
            return self
        value = getattr(config, self._field)
        return self._unset if value is None else value  # type: ignore[no-any-return]

    def __set__(self, config: BaseConfig, value: T) -> None:
        setattr(config, self._field, self._check(self._name, value))

    def reset(self, config: BaseConfig) -> None:
        """Store the initial value."""
        setattr(config, self._field, self._initial)

    def entries(self, config: BaseConfig) -> Iterator[tuple[str, str]]:
        """Yield what goes into the options dict."""
        value = getattr(config, self._field)
        if self._emits(value):
            yield self.key, self._text(value)


DeviceIds = Union[int, Sequence[int]]


class _DeviceOption(Option[Optional[DeviceIds]]):
    """The device ids, and the first of them once more as the session's device."""

    def entries(self, config: BaseConfig) -> Iterator[tuple[str, str]]:
        value = getattr(config, self._field)
        if value is not None:
            ids = [value] if isinstance(value, int) else value
            yield self.key, ";".join(map(str, ids))
            yield "ge.session_device_id", str(ids[0])


class _EntriesOption(Option[dict[str, str]]):
    """Entries that are passed on word for word."""

    def reset(self, config: BaseConfig) -> None:
        setattr(config, self._field, {})

    def entries(self, config: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from getattr(config, self._field).items()


def _of(*classes: type) -> Callable[[str, Any], Any]:
    return lambda name, value: check_isinstance(name, value, classes)


def _string(key: str) -> Option[str]:
    return Option(key, _of(str), initial="", emits=bool)


def _string_once_set(key: str) -> Option[str]:
    return Option(key, _of(str), unset="")


def _flag_text(value: bool) -> str:
    return "1" if value else "0"


def _flag_once_set(key: str) -> Option[bool]:
    return Option(key, _of(bool), unset=False, text=_flag_text)


def _uint32(key: str) -> Option[int | None]:
    return Option(key, check_uint32)


def _open_string(key: str) -> Option[str | None]:
    return Option(key, _of(str))


def _open_flag(key: str) -> Option[bool | None]:
    return Option(key, _of(bool), text=_flag_text)


def _open_number(key: str) -> Option[int | None]:
    return Option(key, _check_number)


def _check_number(name: str, value: Any) -> Any:
    if isinstance(value, bool):  # "True" would be refused at init, far from the line that wrote it
        raise TypeError(f"{name} only support int, but got bool")
    return check_isinstance(name, value, int)


def _check_device_id(name: str, value: Any) -> Any:
    check_isinstance(name, value, [int, list, tuple])
    ids = value if isinstance(value, (list, tuple)) else [value]
    check_isinstance(name, ids, [list, tuple], None if value is None else int)
    raise_if_false(ids, "{} should name at least one device", name)
    for device in ids:
        raise_if_false(device >= 0, "{} should not be negative, but got {}", name, device)
        check_int32(name, device)
    return value


def _check_sync_kv_timeout(name: str, value: Any) -> Any:
    check_isinstance(name, value, [int, str])
    if isinstance(value, str):
        raise_if_false(value.isascii() and value.isdigit(), "{} should be digits, but got {!r}", name, value)
    millis = int(value)
    raise_if_false(millis > 0, "{} should be greater than 0, but got {}", name, value)
    check_int32(name, millis)
    return value


def _check_ge_options(name: str, value: Any) -> Any:
    return check_dict(name, value, str, str)


def _check_cluster_info(name: str, value: Any) -> str:
    """Return the JSON text with each listening address in integer form."""
    check_isinstance(name, value, str)
    info = json.loads(value)
    for listen in info.get("listen_ip_info", ()) if isinstance(info, dict) else ():
        if "ip" in listen:
            listen["ip"] = trans_str_ip(listen["ip"])
    return json.dumps(info)


def _in_range(kind: type, low: float, high: float) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        check_isinstance(name, value, kind)
        raise_if_false(low <= value <= high, "{} should be in range [{}, {}], but got {}", name, low, high, value)
        return value

    return check


def output_max_size(unset: Any = None) -> Option[Any]:
    """Declare the property of that name, which reads differently in the two packages while it is not set."""
    return Option("llm.OutputMaxSize", _of(int), unset=unset)


class BaseConfig:
    """The properties that the configs of both packages have."""

    ge_options = _EntriesOption("*", _check_ge_options)  # first: what follows overwrites its entries
    device_id = _DeviceOption("ge.exec.deviceId", _check_device_id)
    sync_kv_timeout: Option[int | str | None] = Option("llm.SyncKvCacheWaitTime", _check_sync_kv_timeout)
    deploy_res_path = _string(_options.DEPLOY_PATH)
    cluster_info: Option[str] = Option(_options.CLUSTER_INFO, _check_cluster_info, initial="", emits=bool)
    mem_utilization: Option[float] = Option(_options.UTILIZATION, _in_range(float, 0.0, 1.0), initial=0.95)
    buf_pool_cfg = _string(_options.BUFFERS)
    mem_pool_cfg = _string(_options.DEVICE_POOL)
    host_mem_pool_cfg = _string(_options.HOST_POOL)
    listen_ip_info = _string(_options.LISTEN_INFO)
    enable_switch_role: Option[bool] = Option(
        _options.SWITCH_ROLE, _of(bool), initial=False, emits=bool, text=_flag_text
    )
    enable_cache_manager = _flag_once_set(_options.CACHE_MANAGER)
    enable_remote_cache_accessible = _flag_once_set(_options.ONE_SIDED)
    rdma_traffic_class = _uint32("llm.RdmaTrafficClass")
    rdma_service_level = _uint32("llm.RdmaServiceLevel")
    local_comm_res = _string_once_set(_options.LOCAL_COMM_RES)

    # This implementation's own. None leaves the choice to the environment or the default.
    device = _open_string("open.Device")
    cann_path = _open_string("open.CannPath")
    transport = _open_string("open.Transport")
    fabric = _open_string("open.Fabric")
    multiple_engines = _open_flag(_options.MULTIPLE_ENGINES)
    rendezvous_port = _open_number("open.RendezvousPort")
    copy_threads = _open_number("open.CopyThreads")
    tcp_connections = _open_number("open.TcpConnections")
    spin_micros = _open_number("open.SpinMicros")
    peer_dead_millis = _open_number("open.PeerDeadMillis")
    relink = _open_flag("open.Relink")
    integrity = _open_string("open.Integrity")
    auth_secret_file = _open_string("open.AuthSecretFile")
    tls_cert_file = _open_string("open.TlsCertFile")
    tls_key_file = _open_string("open.TlsKeyFile")
    tls_ca_file = _open_string("open.TlsCaFile")
    metrics_address = _open_string("open.MetricsAddress")

    def __init__(self) -> None:
        self._options: dict[str, str] = {}
        for option in self._declared():
            option.reset(self)

    @property
    def options(self) -> dict[str, str]:
        """The dict that generate_options fills."""
        return self._options

    def generate_options(self) -> dict[str, str]:
        """Bring the options dict up to date and return it.

        It is the same dict each time: keys that the caller or an earlier call put there stay.
        """
        for option in self._declared():
            self._options.update(option.entries(self))
        return self._options

    def gen_options(self) -> dict[str, str]:
        """The same as generate_options."""
        return self.generate_options()

    @classmethod
    def _declared(cls) -> list[Option[Any]]:
        """The options of all base classes, the most basic class first."""
        members = {name: member for base in reversed(cls.__mro__) for name, member in vars(base).items()}
        return [member for member in members.values() if isinstance(member, Option)]


class LlmConfig(BaseConfig):
    """The options of an engine."""

    output_max_size: Option[int | None] = output_max_size()
    link_total_time: Option[int] = Option("llm.LinkTotalTime", _in_range(int, 0, UINT32_MAX), unset=0)
    link_retry_count: Option[int] = Option("llm.LinkRetryCount", _in_range(int, 1, 100), unset=1)
    transfer_backend = _string_once_set(_options.BACKEND)
    global_resource_config = _string_once_set("llm.GlobalResourceConfig")


LLMConfig = LlmConfig
