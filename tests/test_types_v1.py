# SPDX-License-Identifier: Apache-2.0
"""The older package: what it shares, what differs, and its tensors."""

from __future__ import annotations

import logging
import sys

import pytest

import llm_datadist
import llm_datadist_v1
from llm_datadist import DataType, LLMException, LLMStatusCode
from llm_datadist_v1 import CacheTask, Tensor, TensorDesc, llm_wrapper
from llm_datadist_v1.utils import log

OWN = {"LlmConfig", "LLMConfig", "CacheTask", "Tensor", "TensorDesc", "KvCacheManager", "LLMDataDist"}


def test_names():
    assert len(set(llm_datadist_v1.__all__)) == len(llm_datadist_v1.__all__)
    assert set(llm_datadist_v1.__all__) | {"LLMDataDist"} == set(llm_datadist.__all__) - {"Cache"}


@pytest.mark.parametrize("name", sorted(set(llm_datadist_v1.__all__) - OWN))
def test_shared_names_are_the_same_objects(name):
    assert getattr(llm_datadist_v1, name) is getattr(llm_datadist, name)


def test_wrapper():
    assert llm_wrapper.kSuccess == 0 and llm_wrapper.kLinKFailed == LLMStatusCode.LLM_LINK_FAILED
    assert llm_wrapper.calc_tensor_size([2], 0) == 8


def test_log_has_its_own_name(capsys):
    log.error("from %s", "v1")
    line = capsys.readouterr().out
    assert line.startswith("[ERROR] LLM_ENGINE(") and "test_types_v1.py" in line and "from v1" in line
    assert log.get_logger() is logging.getLogger("LLM_ENGINE")


class Running:
    def join(self, timeout=None):
        self.waited = timeout

    def is_alive(self):
        return True

    def get_results(self):
        return [None, None]


def test_task_has_its_own_timeout_code():
    running = Running()
    assert CacheTask(running).synchronize(0) is LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
    assert CacheTask(running).get_results(1500) == [LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT] * 2
    assert running.waited == 1.5
    assert isinstance(CacheTask(running), llm_datadist.CacheTask)


# --- tensors

np = pytest.importorskip("numpy")


@pytest.mark.parity("type.tensor_desc")
def test_tensor_desc():
    shape = (1, 2)
    desc = TensorDesc(DataType.DT_FLOAT, shape)
    assert str(desc) == "TensorDesc(dtype=DataType.DT_FLOAT, shape=[1, 2])"
    assert desc.dtype is DataType.DT_FLOAT and desc.shape == [1, 2]
    source = [3]
    assert TensorDesc(DataType.DT_FLOAT, source).shape is not source
    for args in ((0, [1]), (None, [1]), (DataType.DT_FLOAT, 1), (DataType.DT_FLOAT, [1.0]), (DataType.DT_FLOAT, None)):
        with pytest.raises(TypeError):
            TensorDesc(*args)


NUMERIC = [dtype for dtype in DataType if dtype not in (DataType.DT_STRING, DataType.DT_BF16, DataType.DT_FLOAT16)]


@pytest.mark.parity("type.tensor")
@pytest.mark.parametrize("dtype", NUMERIC)
@pytest.mark.parametrize("with_desc", [False, True])
def test_numeric_tensor(dtype, with_desc):
    source = np.arange(6).reshape(2, 3).astype(llm_datadist_v1.data_type.dtype_to_np_dtype[dtype])
    tensor = Tensor(source, TensorDesc(dtype, (2, 3)) if with_desc else None)
    copied = tensor.numpy(copy=True)
    expected = source.copy()
    source[:] = 1
    for array in (copied, tensor.numpy()):
        assert array.dtype == expected.dtype and (array == expected).all()
    assert copied.flags.c_contiguous and copied.flags.writeable and copied.base is None
    copied[:] = 0
    assert (tensor.numpy() == expected).all()
    assert np.shares_memory(tensor.numpy(), tensor.numpy())
    assert str(tensor) == f"Tensor({expected},tensor_desc=TensorDesc(dtype={dtype}, shape=[2, 3]))"


@pytest.mark.parity("type.tensor")
def test_half_precision_comes_flat():
    source = np.arange(6, dtype=np.float16).reshape(2, 3)
    tensor = Tensor(source)
    for copy in (False, True):
        assert tensor.numpy(copy).dtype == np.float16
        assert tensor.numpy(copy).tolist() == [0, 1, 2, 3, 4, 5]
    assert not np.shares_memory(tensor.numpy(True), tensor.numpy())


@pytest.mark.parity("type.tensor")
def test_bf16_is_widened_and_comes_flat():
    values = np.array([[1.0, -2.5], [0.15625, 3e38]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32).reshape(-1)
    tensor = Tensor(bits.view(np.float16), TensorDesc(DataType.DT_BF16, [2, 2]))
    for copy in (False, True):
        assert tensor.numpy(copy).dtype == np.float32
        assert tensor.numpy(copy).tolist() == expected.tolist()
    assert tensor.numpy()[:3].tolist() == [1.0, -2.5, 0.15625]


@pytest.mark.parity("type.tensor")
@pytest.mark.parametrize("desc", [None, TensorDesc(DataType.DT_STRING, [2, 2])])
def test_strings(desc):
    source = np.array([["ab", "\u00e4bcd"], ["", "x"]])
    tensor = Tensor(source, desc)
    assert tensor.numpy(True).dtype == source.dtype == "<U4"
    assert (tensor.numpy(True) == source).all() and tensor.numpy(True).shape == (2, 2)
    with pytest.raises(RuntimeError):
        tensor.numpy()
    as_bytes = Tensor(np.char.encode(source, "utf-8"))
    assert (as_bytes.numpy(copy=True) == source).all()
    assert "DataType.DT_STRING, shape=[2, 2]" in str(tensor)


@pytest.mark.parity("type.tensor")
def test_a_tensor_of_a_tensor_is_independent():
    first = Tensor(np.arange(3))
    second = Tensor(first)
    first.numpy()[0] = 9
    assert second.numpy().tolist() == [0, 1, 2]
    assert str(second).endswith("tensor_desc=TensorDesc(dtype=DataType.DT_INT64, shape=[3]))")


@pytest.mark.parity("type.tensor")
def test_a_tensor_at_an_address_is_a_view():
    memory = np.arange(6, dtype=np.int32)
    tensor = Tensor.from_tensor_tuple((memory.ctypes.data, DataType.DT_INT32.value, [2, 3]))
    memory[5] = 77
    assert tensor.numpy().tolist() == [[0, 1, 2], [3, 4, 77]]
    copied = tensor.numpy(copy=True)
    memory[:] = 0
    assert copied[1, 2] == 77
    for args in ((1,), (0, TensorDesc(DataType.DT_INT8, [1])), (1, TensorDesc(DataType.DT_STRING, [1]))):
        with pytest.raises(RuntimeError):
            Tensor(*args)
    with pytest.raises(ValueError):
        Tensor.from_tensor_tuple((1, 5, [1]))
    with pytest.raises(LLMException):
        Tensor.from_tensor_tuple((1, 0, [0]))


@pytest.mark.parity("type.tensor")
@pytest.mark.parametrize(
    ("data", "desc", "error"),
    [
        ([1], None, TypeError),
        (None, None, TypeError),
        (np.float32(1), None, TypeError),
        (np.zeros(3), "desc", TypeError),
        (np.zeros(3), TensorDesc(DataType.DT_DOUBLE, [4]), RuntimeError),
        (np.zeros(3), TensorDesc(DataType.DT_FLOAT, [3]), RuntimeError),
        (np.zeros(3, np.float32), TensorDesc(DataType.DT_BF16, [3]), RuntimeError),
        (np.zeros(3), TensorDesc(DataType.DT_STRING, [3]), RuntimeError),
        (np.array(["a"]), TensorDesc(DataType.DT_INT8, [1]), RuntimeError),
        (np.zeros(3, np.complex64), None, RuntimeError),
        (np.zeros(3, object), None, RuntimeError),
        (np.zeros(3, ">f4"), None, RuntimeError),
        (np.zeros((3, 3))[:, 0], None, RuntimeError),
        (np.zeros((2, 3)).T, None, RuntimeError),
    ],
)
def test_tensor_refuses(data, desc, error):
    with pytest.raises(error) as failure:
        Tensor(data, desc)
    assert type(failure.value) is error


@pytest.mark.parity("type.tensor")
@pytest.mark.parametrize("copy", [None, 1, "yes"])
def test_copy_is_a_bool(copy):
    with pytest.raises(TypeError):
        Tensor(np.zeros(1)).numpy(copy)


def test_modules_of_the_package_are_reachable():
    for name in (
        "configs",
        "data_type",
        "kv_cache_manager",
        "llm_types",
        "llm_utils",
        "status",
        "tensor",
        "utils.utils",
    ):
        __import__(f"llm_datadist_v1.{name}")
        assert f"llm_datadist_v1.{name}" in sys.modules
