# SPDX-License-Identifier: Apache-2.0
"""Status codes, the one exception that carries them, and the checks that raise it.

Values are facts of the documented API (layout: runtime 1 << 30 | type 1 << 28 | system 8 << 17 | module 11 << 12 |
number). Python never looks behind a code: what else is known about a failure travels in LLMException's own fields.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from .utils import log

__all__ = [
    "LLMStatusCode",
    "LLMException",
    "Status",
    "code_2_status",
    "handle_llm_status",
    "raise_if_false",
    "raise_if_true",
]


class LLMStatusCode(IntEnum):
    """How a call ended."""

    LLM_SUCCESS = 0
    LLM_FAILED = 0xFFFFFFFF
    LLM_PARAM_INVALID = 0x5010B005
    LLM_WAIT_PROCESS_TIMEOUT = 0x5010B001
    LLM_KV_CACHE_NOT_EXIST = 0x5010B002
    LLM_REPEAT_REQUEST = 0x5010B003
    LLM_REQUEST_ALREADY_COMPLETED = 0x5010B004
    LLM_ENGINE_FINALIZED = 0x5010B006
    LLM_NOT_YET_LINK = 0x5010B007
    LLM_ALREADY_LINK = 0x5010B008
    LLM_LINK_FAILED = 0x5010B009
    LLM_UNLINK_FAILED = 0x5010B00A
    LLM_NOTIFY_PROMPT_UNLINK_FAILED = 0x5010B00B
    LLM_CLUSTER_NUM_EXCEED_LIMIT = 0x5010B00C
    LLM_PROCESSING_LINK = 0x5010B00D
    LLM_DEVICE_OUT_OF_MEMORY = 0x5010B00E
    LLM_PREFIX_ALREADY_EXIST = 0x5010B00F
    LLM_PREFIX_NOT_EXIST = 0x5010B010
    LLM_SEQ_LENOVERLIMIT = 0x5010B011
    LLM_NO_FREE_BLOCK = 0x5010B012
    LLM_BLOCKS_OUT_OF_MEMORY = 0x5010B013
    LLM_EXIST_LINK = 0x5010B018
    LLM_FEATURE_NOT_ENABLED = 0x5010B019
    LLM_TIMEOUT = 0x5010B01A
    LLM_LINK_BUSY = 0x5010B01B
    LLM_OUT_OF_MEMORY = 0x5010B01C
    LLM_DEVICE_MEM_ERROR = 507053
    LLM_SUSPECT_REMOTE_ERROR = 507057
    LLM_UNKNOWN_ERROR = -1  # Python only: no value is mapped to it

    def __str__(self) -> str:  # IntEnum's own changed with Python 3.11
        return f"LLMStatusCode.{self.name}"


class LLMException(RuntimeError):
    """A documented failure. str() of it is the message; the rest is there for programs and for the operator's eyes.

    It survives pickling and copying with everything it carries, because all of that lives in args and __dict__.
    """

    def __init__(
        self,
        *args: object,
        status_code: LLMStatusCode = LLMStatusCode.LLM_SUCCESS,
        operation: str | None = None,
        peer: int | None = None,
        address: str | None = None,
        stage: str | None = None,
        cause: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(*args)
        self._status_code = status_code
        self._operation = operation
        self._peer = peer
        self._address = address
        self._stage = stage
        self._cause = cause
        self._hint = hint

    @property
    def status_code(self) -> LLMStatusCode:
        """The documented code."""
        return self._status_code

    @property
    def operation(self) -> str | None:
        """The call that failed."""
        return self._operation

    @property
    def peer(self) -> int | None:
        """Cluster id of the other side."""
        return self._peer

    @property
    def address(self) -> str | None:
        """Network address of the other side."""
        return self._address

    @property
    def stage(self) -> str | None:
        """How far the call had come: check, resolve, dial, handshake, register, lookup, transfer, verify or close."""
        return self._stage

    @property
    def cause(self) -> str | None:
        """What was seen to go wrong."""
        return self._cause

    @property
    def hint(self) -> str | None:
        """What to do about it."""
        return self._hint


class Status:
    """A status code as an object."""

    def __init__(self, status: LLMStatusCode) -> None:
        self._status_code = status

    def is_ok(self) -> bool:
        return self._status_code == LLMStatusCode.LLM_SUCCESS

    @property
    def status_code(self) -> LLMStatusCode:
        return self._status_code


_code_2_status: dict[int, LLMStatusCode] = {
    int(code): code for code in LLMStatusCode if code is not LLMStatusCode.LLM_UNKNOWN_ERROR
}


def code_2_status(value: int) -> LLMStatusCode:
    """Return the member with this value; LLM_FAILED for a value that has none."""
    return _code_2_status.get(value, LLMStatusCode.LLM_FAILED)


def handle_llm_status(status: int, func_name: str, other_info: object) -> None:
    """Raise LLMException for a status other than 0."""
    if status == LLMStatusCode.LLM_SUCCESS:
        return
    code = code_2_status(status)
    _raise(f"{func_name} failed, error code is {code!s}, {other_info}.", code)


def raise_if_false(
    pred: object,
    fmt: str,
    *args: Any,
    status_code: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID,
    **kwargs: Any,
) -> None:
    """Log and raise LLMException with the message fmt.format(*args, **kwargs) unless pred holds."""
    if not pred:
        _raise(fmt.format(*args, **kwargs), status_code)


def raise_if_true(
    pred: object,
    fmt: str,
    *args: Any,
    status_code: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID,
    **kwargs: Any,
) -> None:
    """Log and raise LLMException with the message fmt.format(*args, **kwargs) if pred holds."""
    if pred:
        _raise(fmt.format(*args, **kwargs), status_code)


def _raise(message: str, code: LLMStatusCode) -> None:
    log.error("%s", message)
    raise LLMException(message, status_code=code, stage="check", cause=message)
