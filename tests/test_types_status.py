# SPDX-License-Identifier: Apache-2.0
"""Status codes, exceptions and the log."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import llm_datadist
from llm_datadist import LLMException, LLMStatusCode, Status, llm_datadist_wrapper
from llm_datadist.status import _code_2_status, code_2_status, handle_llm_status, raise_if_false, raise_if_true
from llm_datadist.utils import log

CODES = {
    "LLM_SUCCESS": (0, "kSuccess"),
    "LLM_FAILED": (4294967295, "kFailed"),
    "LLM_PARAM_INVALID": (1343270917, "kParamInvalid"),
    "LLM_WAIT_PROCESS_TIMEOUT": (1343270913, "kLLMWaitProcessTimeOut"),
    "LLM_KV_CACHE_NOT_EXIST": (1343270914, "kLLMKVCacheNotExist"),
    "LLM_REPEAT_REQUEST": (1343270915, "kLLMRepeatRequest"),
    "LLM_REQUEST_ALREADY_COMPLETED": (1343270916, "kLLMRequestAlreadyCompleted"),
    "LLM_ENGINE_FINALIZED": (1343270918, "kLLMEngineFinalized"),
    "LLM_NOT_YET_LINK": (1343270919, "kLLMNotYetLink"),
    "LLM_ALREADY_LINK": (1343270920, "kAlreadyLink"),
    "LLM_LINK_FAILED": (1343270921, "kLinKFailed"),
    "LLM_UNLINK_FAILED": (1343270922, "kUnlinkFailed"),
    "LLM_NOTIFY_PROMPT_UNLINK_FAILED": (1343270923, "kNotifyPromptUnlinkFailed"),
    "LLM_CLUSTER_NUM_EXCEED_LIMIT": (1343270924, "kLLMClusterNumExceedLimit"),
    "LLM_PROCESSING_LINK": (1343270925, "kProcessingLink"),
    "LLM_DEVICE_OUT_OF_MEMORY": (1343270926, "kDeviceOutOfMemory"),
    "LLM_PREFIX_ALREADY_EXIST": (1343270927, "kPrefixAlreadyExist"),
    "LLM_PREFIX_NOT_EXIST": (1343270928, "kPrefixNotExist"),
    "LLM_SEQ_LENOVERLIMIT": (1343270929, "kLLMSeqLenOverLimit"),
    "LLM_NO_FREE_BLOCK": (1343270930, "kLLMNoFreeBlock"),
    "LLM_BLOCKS_OUT_OF_MEMORY": (1343270931, "kLLMBlocksOutOfMemory"),
    "LLM_EXIST_LINK": (1343270936, "kLLMExistLink"),
    "LLM_FEATURE_NOT_ENABLED": (1343270937, "kLLMFeatureNotEnabled"),
    "LLM_TIMEOUT": (1343270938, "kLLMTimeout"),
    "LLM_LINK_BUSY": (1343270939, "kLLMLinkBusy"),
    "LLM_OUT_OF_MEMORY": (1343270940, "kLLMOutOfMemory"),
    "LLM_DEVICE_MEM_ERROR": (507053, "kLLMDeviceMemError"),
    "LLM_SUSPECT_REMOTE_ERROR": (507057, "kLLMSuspectRemoteError"),
    "LLM_UNKNOWN_ERROR": (-1, None),
}


@pytest.mark.parity("enum.status_code")
def test_codes_stand_in_the_documented_order():
    assert list(LLMStatusCode.__members__) == list(CODES)


@pytest.mark.parity("enum.status_code", "module.status_constants", "module.code_2_status")
@pytest.mark.parametrize("name", CODES)
def test_code_has_its_value_text_and_constant(name):
    value, constant = CODES[name]
    code = LLMStatusCode[name]
    assert code.value == code == value
    assert str(code) == f"LLMStatusCode.{name}"
    if constant is None:
        assert code_2_status(value) is LLMStatusCode.LLM_FAILED
        assert code not in _code_2_status.values()
    else:
        assert code_2_status(value) is code
        assert getattr(llm_datadist_wrapper, constant) == value
        assert type(getattr(llm_datadist_wrapper, constant)) is int


@pytest.mark.parity("module.code_2_status")
@pytest.mark.parametrize("value", [0x5010B014, 0x5010B015, 0x5010B016, 0x5010B017, -1, 1, 507899, 2**70])
def test_a_value_without_member_is_failed(value):
    assert code_2_status(value) is LLMStatusCode.LLM_FAILED


@pytest.mark.parity("error.status")
def test_status_tells_success():
    assert Status(LLMStatusCode.LLM_SUCCESS).is_ok() is True
    failed = Status(LLMStatusCode.LLM_TIMEOUT)
    assert failed.is_ok() is False
    assert failed.status_code is LLMStatusCode.LLM_TIMEOUT


FIELDS = {
    "status_code": LLMStatusCode.LLM_TIMEOUT,
    "operation": "pull_blocks",
    "peer": 2**64 - 1,
    "address": "10.0.0.1:26000",
    "stage": "transfer",
    "cause": "connection reset",
    "hint": "is the peer alive?",
}


@pytest.mark.parity("error.exception", "error.status_code")
def test_exception_has_documented_defaults():
    error = LLMException("m", 5)
    assert isinstance(error, RuntimeError)
    assert error.args == ("m", 5)
    assert error.status_code is LLMStatusCode.LLM_SUCCESS
    assert [getattr(error, name) for name in FIELDS if name != "status_code"] == [None] * 6
    assert str(LLMException("text")) == "text"
    assert str(LLMException()) == ""


@pytest.mark.parametrize(
    "clone",
    [copy.copy, copy.deepcopy, *(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(6))],
)
def test_exception_survives_copying_and_pickling(clone):
    error = LLMException("no {answer}", **FIELDS)
    error.note = "added later"
    other = clone(error)
    assert type(other) is LLMException and other is not error
    assert str(other) == "no {answer}" and other.args == error.args
    assert {name: getattr(other, name) for name in FIELDS} == FIELDS
    assert other.note == "added later"


@pytest.mark.parity("error.exception", "error.status_code")
@pytest.mark.parametrize("name", FIELDS)
def test_exception_fields_are_read_only_and_keyword_only(name):
    error = LLMException("m", **{name: FIELDS[name]})
    assert getattr(error, name) == FIELDS[name]
    with pytest.raises(AttributeError):
        setattr(error, name, None)


@pytest.mark.parity("module.handle_llm_status")
def test_handle_llm_status():
    handle_llm_status(0, "pull", "none")
    handle_llm_status(LLMStatusCode.LLM_SUCCESS, "pull", "none")
    with pytest.raises(LLMException) as failure:
        handle_llm_status(0x5010B01A, "pull", "cache {id} = 1")
    assert failure.value.status_code is LLMStatusCode.LLM_TIMEOUT
    assert str(failure.value) == "pull failed, error code is LLMStatusCode.LLM_TIMEOUT, cache {id} = 1."
    with pytest.raises(LLMException) as failure:
        handle_llm_status(77, "pull", "")
    assert failure.value.status_code is LLMStatusCode.LLM_FAILED


@pytest.mark.parity("module.raise_if")
@pytest.mark.parametrize(("check", "good", "bad"), [(raise_if_false, [1], []), (raise_if_true, "", "x")])
def test_raise_if(check, good, bad, capsys):
    check(good, "never formatted {", 1)
    with pytest.raises(LLMException) as failure:
        check(bad, "{} of {what}", "{one}", what="{two}")
    assert str(failure.value) == "{one} of {two}"
    assert failure.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert "{one} of {two}" in capsys.readouterr().out
    with pytest.raises(LLMException) as failure:
        check(bad, "text", status_code=LLMStatusCode.LLM_LINK_BUSY)
    assert failure.value.status_code is LLMStatusCode.LLM_LINK_BUSY


# --- the log


@pytest.mark.parity("module.log")
def test_a_log_line_names_the_caller(capsys):
    log.error("50%% of %s", "all")
    line = capsys.readouterr().out
    assert line.startswith("[ERROR] LLM_DATADIST(")
    for part in ("test_types_status.py:", str(threading.get_ident()), "test_a_log_line_names_the_caller: 50% of all"):
        assert part in line
    log.get_logger().error("direct")
    assert "test_types_status.py:" in capsys.readouterr().out


@pytest.mark.parity("module.log")
def test_there_is_one_handler_and_no_propagation():
    logger = log.get_logger()
    assert logger is logging.getLogger("LLM_DATADIST") is log.get_logger()
    log.PackageLog("LLM_DATADIST").get_logger()
    ours = [handler for handler in logger.handlers if isinstance(handler, log._StdoutHandler)]  # pytest adds its own
    assert len(ours) == 1 and isinstance(ours[0], logging.StreamHandler)
    assert not logger.propagate


LEVELS = [
    ("0", "DEBUG"),
    ("1", "INFO"),
    ("2", "WARNING"),
    ("3", "ERROR"),
    (None, "ERROR"),
    ("4", "ERROR"),
    ("", "ERROR"),
]


@pytest.mark.parity("module.log")
@pytest.mark.parametrize(("value", "level"), LEVELS)
def test_level_comes_from_the_environment_once(monkeypatch, value, level):
    if value is None:
        monkeypatch.delenv(log.LEVEL_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(log.LEVEL_VARIABLE, value)
    package_log = log.PackageLog(f"test level {value}")
    assert logging.getLevelName(package_log.get_logger().level) == level
    monkeypatch.setenv(log.LEVEL_VARIABLE, "0" if level == "ERROR" else "3")
    assert logging.getLevelName(package_log.get_logger().level) == level


@pytest.mark.parity("module.log")
@pytest.mark.parametrize(("name", "shown"), [("info", False), ("warn", True), ("error", True)])
def test_levels_of_the_functions(monkeypatch, capsys, name, shown):
    monkeypatch.setenv(log.LEVEL_VARIABLE, "2")
    getattr(log.PackageLog("test functions"), name)("hello %d", 3)
    assert ("hello 3" in capsys.readouterr().out) is shown


@pytest.mark.parity("module.log")
def test_find_caller_returns_the_first_frame_outside():
    file, line, function, stack = log._find_caller()
    here = sys._getframe().f_lineno
    assert (file, function, stack) == (__file__, "test_find_caller_returns_the_first_frame_outside", None)
    assert line == here - 1
    assert log._find_caller(True)[3].startswith("Stack (most recent call last):\n")

    def helper():
        return log._find_caller(stack_level=2)

    assert helper()[2] == "test_find_caller_returns_the_first_frame_outside"


UNKNOWN = ("(unknown file)", 0, "(unknown function)", None)


def test_find_caller_does_not_raise_near_the_top_of_a_stack():
    import _thread

    results = []
    done = threading.Semaphore(0)

    def start(*args):
        results.append(log._find_caller(*args))
        done.release()

    for args in ((), (True,), (False, 2), (True, 50)):
        _thread.start_new_thread(start, args)
        assert done.acquire(timeout=10)
    assert results[0][2] == results[1][2] == "start"
    assert results[2] == results[3] == UNKNOWN


def test_logging_from_a_thread_that_starts_in_the_log_has_an_unknown_caller():
    program = (
        "import _thread, time\n"
        "from llm_datadist.utils import log\n"
        "_thread.start_new_thread(log.error, ('from a bare thread',))\n"
        "time.sleep(0.5)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(llm_datadist.__file__).parent.parent)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env)
    assert "(unknown file):0" in done.stdout and "(unknown function): from a bare thread" in done.stdout
    assert done.stderr == ""
