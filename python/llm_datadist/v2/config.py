# SPDX-License-Identifier: Apache-2.0
"""The cluster description and the resource file of the older API.

Both are JSON. The description names the process's devices by logical ids ("0:0:1:0") and says where it listens; the
resource file says which device each logical id is. Where a caller gives none they are made of the other options.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from .. import _options
from ..configs import LLMRole, trans_str_ip
from ..status import raise_if_false
from ..utils import log
from .llm_utils import parse_listen_ip_info

__all__ = ["ClusterConfig", "EngineConfig"]

_DEVICE_ID = "ge.exec.deviceId"
_RANK_ID = "ge.exec.rankId"
_RESOURCE_PATH = "ge.resourceConfigPath"
_RESOURCE_VARIABLE = "RESOURCE_CONFIG_PATH"
_ROLE_NAMES = {LLMRole.PROMPT: "prompt", LLMRole.DECODER: "decoder", LLMRole.MIX: "mix"}


class ClusterConfig:
    """The devices of a process."""

    def __init__(self, rank_id_to_device_id: dict[int, int]) -> None:
        raise_if_false(rank_id_to_device_id, "no rank has a device: {} and the resource file do not fit", _options.CLUSTER_INFO)
        self.rank_id_to_device_id = rank_id_to_device_id


class EngineConfig:
    """What the options of the older API say of a process."""

    def __init__(self, cluster_config: ClusterConfig) -> None:
        self.cluster_config = cluster_config

    @classmethod
    def from_engine_options(cls, is_prompt: bool, engine_options: dict[str, str]) -> EngineConfig:
        """Read the description and the resource file that the options name; LLMException where one is missing.

        is_prompt changes nothing: the devices are those of either role.
        """
        for key in (_options.CLUSTER_INFO, _RESOURCE_PATH):
            raise_if_false(key in engine_options, "option {} is required", key)
        info = parse_cluster_info(engine_options)
        with open(engine_options[_RESOURCE_PATH], encoding="utf-8") as file:
            devices = _devices_by_logical_id(json.load(file))
        found = [devices[name] for name in info.get("logic_device_id", ()) if name in devices]
        ranks = dict(enumerate(found))
        if found and _DEVICE_ID in engine_options and _RANK_ID in engine_options:
            ranks = {_integer(_RANK_ID, engine_options[_RANK_ID]): found[0]}
        return cls(ClusterConfig(ranks))

    @classmethod
    def gen_cluster_info_if_not_exist(cls, cluster_id: int, role: LLMRole, engine_options: dict[str, str]) -> None:
        """Add llm.ClusterInfo, and ge.resourceConfigPath where there is none, to the options, unless the former is there.

        KeyError without ge.exec.deviceId; LLMException for a PROMPT without one llm.listenIpInfo for each device.
        """
        if _options.CLUSTER_INFO in engine_options:
            return
        ids = engine_options[_DEVICE_ID]
        devices = ids.split(";")
        info: dict[str, Any] = {
            "cluster_id": cluster_id,
            "logic_device_id": [f"0:0:{place}:0" for place in range(len(devices))],
        }
        if role == LLMRole.PROMPT:
            info["listen_ip_info"] = cls._listen_infos(engine_options, len(devices))
        resources = cls.gen_numa_config(ids, engine_options.get(_options.DEPLOY_PATH))
        engine_options[_options.CLUSTER_INFO] = json.dumps(info)
        if _RESOURCE_PATH in engine_options:
            return
        path = os.environ.get(_RESOURCE_VARIABLE)
        if path is None:
            path = f"/tmp/stub_numa_config_{_ROLE_NAMES[role]}_{'_'.join(devices)}.json"
            _write(path, resources)
        engine_options[_RESOURCE_PATH] = path

    @classmethod
    def _listen_infos(cls, engine_options: dict[str, str], count: int) -> list[dict[str, int]]:
        raise_if_false(_options.LISTEN_INFO in engine_options, "a PROMPT needs option {}", _options.LISTEN_INFO)
        infos = engine_options[_options.LISTEN_INFO].split(";")
        raise_if_false(
            len(infos) == count, "{} has {} addresses for {} devices", _options.LISTEN_INFO, len(infos), count
        )
        return [dict(zip(("ip", "port"), cls.parse_listen_ip_info(info))) for info in infos]

    @staticmethod
    def parse_listen_ip_info(listen_ip_info: str) -> tuple[int, int]:
        """Split "ip:port"; the ip as the documented integer, whose lowest byte comes first."""
        ip, port = parse_listen_ip_info(listen_ip_info)
        return trans_str_ip(ip), port

    @staticmethod
    def gen_numa_config(device_id_str: str, deploy_res_path: str | None = None) -> str:
        """Return the JSON of a resource file that has the devices of device_id_str ("0;1") on this host."""
        items = [{"item_id": _integer(_DEVICE_ID, device)} for device in device_id_str.split(";")]
        node: dict[str, Any] = {"is_local": True, "item_list": items}
        if deploy_res_path is not None:
            node["deploy_res_path"] = deploy_res_path
        return json.dumps({"cluster": [{"cluster_nodes": [node]}]})


def parse_cluster_info(engine_options: dict[str, str]) -> dict[str, Any]:
    """Return the description in the options; LLMException where it is no JSON object."""
    try:
        info = json.loads(engine_options[_options.CLUSTER_INFO])
    except ValueError:
        info = None
    raise_if_false(isinstance(info, dict), "{} is not a JSON object", _options.CLUSTER_INFO)
    checked: dict[str, Any] = info
    return checked


def _devices_by_logical_id(resources: Any) -> dict[str, int]:
    """Return the device of each logical id "i:j:k:0": item k of the local node j of cluster i."""
    return {
        f"{i}:{j}:{k}:0": item["item_id"]
        for i, cluster in enumerate(resources["cluster"])
        for j, node in enumerate(cluster["cluster_nodes"])
        if node.get("is_local")
        for k, item in enumerate(node["item_list"])
    }


def _integer(key: str, text: str) -> int:
    raise_if_false(text.isascii() and text.isdigit(), "{} should be digits, but got {!r}", key, text)
    return int(text)


def _write(path: str, text: str) -> None:
    """Replace the file at path, which is the same for every process with these devices. Never follows a link that is there."""
    try:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as directory:
            new = os.path.join(directory, "new")
            with open(new, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(new, path)
    except OSError as exc:  # another user's file: this engine does not need it
        log.warn("the resource file %s could not be written: %s", path, exc)
