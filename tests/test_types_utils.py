# SPDX-License-Identifier: Apache-2.0
"""Argument checks, data types, sizes and the small helpers."""

from __future__ import annotations

import enum
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm_datadist_v1.llm_utils
import llm_datadist_v1.utils.utils
from llm_datadist import (
    CacheDesc,
    DataType,
    LLMException,
    LLMStatusCode,
    Placement,
    llm_datadist_wrapper,
    metadef_wrapper,
)
from llm_datadist import data_type as data_types
from llm_datadist.utils import utils
from llm_datadist.v2 import llm_utils

PACKAGES = pytest.mark.parametrize("checks", [utils, llm_datadist_v1.utils.utils], ids=["v2", "v1"])

RANGES = {
    "check_uint8": (0, 2**8 - 1),
    "check_uint16": (0, 2**16 - 1),
    "check_uint32": (0, 2**32 - 1),
    "check_uint64": (0, 2**64 - 1),
    "check_int32": (-(2**31), 2**31 - 1),
    "check_int64": (-(2**63), 2**63 - 1),
}
LISTS = {
    name: RANGES[name.replace("list_", "")] for name in ("check_list_int32", "check_list_int64", "check_list_uint64")
}


@pytest.mark.parity("module.checks")
@PACKAGES
@pytest.mark.parametrize("name", RANGES)
def test_integer_checks(checks, name):
    check, (low, high) = getattr(checks, name), RANGES[name]
    for value in (low, high, 0, True):
        assert check("arg", value) is value
    for value in (low - 1, high + 1, 2**80, -(2**80)):
        with pytest.raises(ValueError, match="arg should be in range"):
            check("arg", value)
    for value in (None, "1", 1.0, [1], b"1"):
        with pytest.raises(TypeError, match="arg only support int"):
            check("arg", value)


@pytest.mark.parity("module.checks")
@pytest.mark.parametrize("name", LISTS)
def test_integer_list_checks(name):
    check, (low, high) = getattr(utils, name), LISTS[name]
    for values in ([], (), [low, high], (low, high, True)):
        assert check("arg", values) is values
    for values in ([low - 1, 0], [0, high + 1], (2**80,)):
        with pytest.raises(ValueError, match="arg elements should be in range"):
            check("arg", values)
    for values in (None, 1, {1}, range(2), "1"):
        with pytest.raises(TypeError, match="arg only support list or tuple"):
            check("arg", values)
    for values in ([None], ["1"], [0, 1.0]):
        with pytest.raises(TypeError, match="arg inner type only support int"):
            check("arg", values)


@given(st.lists(st.one_of(st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=1))))
def test_list_check_agrees_with_its_elements(values):
    expected = None
    if not all(isinstance(value, int) for value in values):
        expected = TypeError
    elif not all(0 <= value < 2**64 for value in values):
        expected = ValueError
    if expected is None:
        utils.check_list_uint64("arg", values)
    else:
        with pytest.raises(expected):
            utils.check_list_uint64("arg", values)


@pytest.mark.parity("module.checks")
@PACKAGES
def test_check_isinstance(checks):
    check = checks.check_isinstance
    value = [1, True]
    assert check("arg", value, list, int) is value
    assert check("arg", value, [tuple, list], [int, str]) is value
    assert check("arg", {"k": 1}, dict, str) == {"k": 1}
    assert check("arg", None, int) is None
    assert check("arg", None, list, int) is None
    for args, text in [
        ((1, str), "arg only support str, but got int"),
        (([], [int, str]), "arg only support int or str, but got list"),
        (([1, "2"], list, int), "arg inner type only support int, but got str"),
        (([None], list, int), "arg inner type only support int, but got NoneType"),
        (({1: "v"}, dict, str), "arg inner type only support str, but got int"),
    ]:
        with pytest.raises(TypeError) as failure:
            check("arg", *args)
        assert str(failure.value) == text
        with pytest.raises(TypeError, match="see here"):
            check("arg", *args, extra_fmt="see here")
    with pytest.raises(TypeError, match="arg only support int"):
        check("arg", None, int, allow_none=False)


@pytest.mark.parity("module.checks")
@PACKAGES
def test_check_inner_and_dict(checks):
    checks.check_inner("arg", (1, 2), int)
    with pytest.raises(TypeError, match="inner type only support"):
        checks.check_inner("arg", [1, "2"], int)
    good = {1: [2, 3], 4: []}
    assert checks.check_dict("arg", good, int, list, int) is good
    for bad in ({"1": [2]}, {1: (2,)}, {1: ["2"]}, {1: None}, {None: [1]}, [(1, [2])]):
        with pytest.raises(TypeError, match="only support"):
            checks.check_dict("arg", bad, int, list, int)
    with pytest.raises(AttributeError):
        checks.check_dict("arg", None, int, list)


@pytest.mark.parity("module.checks")
def test_positive_or_default():
    assert utils.check_positive_or_set_default("arg", None) == -1
    assert utils.check_positive_or_set_default("arg", None, 7) == 7
    assert utils.check_positive_or_set_default("arg", 0) == 0
    assert utils.check_positive_or_set_default("arg", 2**63 - 1) == 2**63 - 1
    for value, error in [("1", TypeError), (1.0, TypeError), (-1, ValueError), (2**63, ValueError)]:
        with pytest.raises(error):
            utils.check_positive_or_set_default("arg", value)


def test_v1_checks_know_classes_by_name():
    class Cache:
        pass

    ours = Cache

    class Cache:
        pass

    class Derived(Cache):
        pass

    checks = llm_datadist_v1.utils.utils
    assert checks.check_type(Derived(), ours) and checks.check_type(Cache(), [int, ours])
    assert not checks.check_type(1, ours) and not checks.check_type(None, [ours])
    checks.check_isinstance("arg", [Derived()], list, ours)
    with pytest.raises(TypeError):
        utils.check_isinstance("arg", Derived(), ours)


# --- data types

TYPES = {  # value, bytes, numpy
    "DT_FLOAT": (0, 4, "float32"),
    "DT_FLOAT16": (1, 2, "float16"),
    "DT_BF16": (27, 2, "float16"),
    "DT_INT8": (2, 1, "int8"),
    "DT_INT16": (6, 2, "int16"),
    "DT_UINT16": (7, 2, "uint16"),
    "DT_UINT8": (4, 1, "uint8"),
    "DT_INT32": (3, 4, "int32"),
    "DT_INT64": (9, 8, "int64"),
    "DT_UINT32": (8, 4, "uint32"),
    "DT_UINT64": (10, 8, "uint64"),
    "DT_BOOL": (12, 1, "bool"),
    "DT_DOUBLE": (11, 8, "float64"),
    "DT_STRING": (13, 16, "S"),
}


@pytest.mark.parity("enum.data_type")
def test_data_types_stand_in_the_documented_order():
    assert list(DataType.__members__) == list(TYPES)
    assert not issubclass(DataType, enum.IntEnum)


@pytest.mark.parity("enum.data_type", "module.dtype_from_wrapper", "module.calc_tensor_size")
@pytest.mark.parametrize("name", TYPES)
def test_data_type(name):
    np = pytest.importorskip("numpy")
    value, size, np_name = TYPES[name]
    dtype = DataType[name]
    assert dtype.value == value and dtype != value
    assert str(dtype) == f"DataType.{name}"
    assert getattr(metadef_wrapper, name) == value
    assert data_types.python_dtype_2_dwrapper_dtype[dtype] == value
    assert data_types._dwrapper_dtype_to_python_dtype[value] is dtype
    assert data_types.get_python_dtype_from_wrapper_dtype(value) is dtype
    assert llm_datadist_wrapper.calc_tensor_size([3, 2], value) == 6 * size
    assert llm_utils.calc_tensor_size((3, 2), dtype) == 6 * size
    assert llm_utils.to_data_type(str(value)) is dtype
    assert np.dtype(data_types.dtype_to_np_dtype[dtype]) == np.dtype(np_name)
    if name != "DT_BF16":
        assert data_types.np_dtype_to_dtype[np.dtype(np_name)] is dtype


@pytest.mark.parity("module.dtype_from_wrapper")
def test_unknown_data_types():
    with pytest.raises(ValueError):
        data_types.get_python_dtype_from_wrapper_dtype(5)
    for text in ("5", "", "DT_FLOAT", "00"):
        with pytest.raises(LLMException):
            llm_utils.to_data_type(text)


@pytest.mark.parity("module.numpy_tables")
@pytest.mark.parametrize("module", ["llm_datadist.data_type", "llm_datadist_v1.data_type"])
def test_numpy_tables(module):
    pytest.importorskip("numpy")
    types = __import__(module, fromlist=["x"])
    assert [len(getattr(types, name)) for name in data_types.NUMPY_TABLES] == [14, 14, 13]
    assert types.valid_np_dtypes == list(types.dtype_to_np_dtype.values())
    assert types.dtype_to_np_dtype is data_types.dtype_to_np_dtype
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        types.other  # noqa: B018


@pytest.mark.parity("module.calc_tensor_size")
@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [
        ([], 0, 4),
        ([1], 5, -1),
        ([0], 0, -1),
        ([-1, -1], 0, -1),
        ([2**63 - 1], 2, 2**63 - 1),
        ([2**63], 2, -1),
        ([2**61], 0, -1),
        ([2**40, 2**40], 2, -1),
    ],
)
def test_sizes_at_the_limits(shape, dtype, size):
    assert llm_datadist_wrapper.calc_tensor_size(shape, dtype) == size
    if dtype != 5 and size < 0:
        with pytest.raises(LLMException):
            llm_utils.calc_tensor_size(shape, data_types.get_python_dtype_from_wrapper_dtype(dtype))


# --- llm_utils


@pytest.mark.parity("module.llm_utils")
def test_clone():
    desc = CacheDesc(3, [4, 5], DataType.DT_BF16, Placement.HOST, 1, 0, "x")
    clone = llm_utils.clone_cache_desc(desc)
    assert repr(clone) == repr(desc) and clone is not desc
    clone.update_dim(0, 9)
    assert desc.shape == [4, 5]
    assert llm_utils.clone_cache_desc(CacheDesc(1, (2,), DataType.DT_INT8)).shape == (2,)


@pytest.mark.parity("module.llm_utils")
@pytest.mark.parametrize(
    ("shape", "code"),
    [([1, -1], None), ([], "LLM_PARAM_INVALID"), ([1, 0], "LLM_PARAM_INVALID"), ([-2], "LLM_SUCCESS")],
)
def test_verify_cache_shape(shape, code):
    if code is None:
        llm_utils.verify_cache_shape(shape)
        return
    with pytest.raises(LLMException) as failure:
        llm_utils.verify_cache_shape(shape)
    assert failure.value.status_code is LLMStatusCode[code]


@pytest.mark.parity("module.llm_utils")
@pytest.mark.parametrize(("value", "invalid"), [(-1, True), (2**64 - 1, True), (0, False), (2**64 - 2, False)])
def test_ids(value, invalid):
    assert llm_utils.is_invalid_id(value) is invalid
    assert llm_utils.is_valid_id(value) is not invalid


@pytest.mark.parity("module.llm_utils")
@pytest.mark.parametrize(
    ("src", "dst", "number", "expected"),
    [
        (range(1, 2), None, 2, ([2, 3], [])),
        (range(2), range(3, 4), 1, ([0, 1], [3])),
        (range(0), range(5, 5), 2, ([], [])),
        (range(-1, -1), None, 2, ([], [])),
        (range(2, 4), range(1), 3, ([6, 7, 8, 9, 10, 11], [0, 1, 2])),
        (range(2**31 - 1, 2**31), None, 2, ([2**32 - 2, 2**32 - 1], [])),
    ],
)
def test_tensor_indices(src, dst, number, expected):
    assert llm_utils.layer_range_to_tensor_indices(src, dst, number) == expected
    if number == 2:
        assert llm_utils.layer_range_to_tensor_indices(src, dst) == expected


@pytest.mark.parity("module.llm_utils")
@pytest.mark.parametrize(
    ("layers", "error"),
    [
        ([1], TypeError),
        (1, TypeError),
        (range(0, 4, 2), LLMException),
        (range(0, 0, 2), LLMException),
        (range(-1, 2), LLMException),
        (range(2**31 + 1), ValueError),
        (range(2**40, 2**40 + 1), ValueError),
    ],
)
def test_tensor_indices_refuse(layers, error):
    for args in ((layers, None), (None, layers)):
        with pytest.raises(error) as failure:
            llm_utils.layer_range_to_tensor_indices(*args)
        assert type(failure.value) is error


@pytest.mark.parity("module.llm_utils")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:26000", ("127.0.0.1", 26000)),
        ("22:33", ("22", 33)),
        (":1", ("", 1)),
        ("127.0.0.1", LLMException),
        ("1:2:3", LLMException),
        ("[::1]:5", LLMException),
        ("1.2.3.4:x", ValueError),
        ("1.2.3.4:", ValueError),
    ],
)
def test_parse_listen_ip_info(text, expected):
    if isinstance(expected, tuple):
        assert llm_utils.parse_listen_ip_info(text) == expected
        return
    with pytest.raises(expected) as failure:
        llm_utils.parse_listen_ip_info(text)
    assert type(failure.value) is expected


def options(shapes="2,4;2,4", dtypes="1;1", seq=None, tensor_format=None):
    given_ = {
        "llm.RefInputShapes": shapes,
        "llm.RefInputDtypes": dtypes,
        "llm.RefInputSeqLenDimIndex": seq,
        "llm.kvTensorFormat": tensor_format,
    }
    return {key: value for key, value in given_.items() if value is not None}


@pytest.mark.parity("module.llm_utils")
@pytest.mark.parametrize(
    ("given_", "shape", "seq"),
    [
        (options(), [2, 4], -1),
        (options("-1,4;-1,4"), [-1, 4], -1),
        (options("2,-1;2,-1"), [2, -1], 1),
        (options("-1,3,-1;-1,3,-1", seq="1"), [-1, 3, -1], 1),
    ],
)
def test_desc_by_options(given_, shape, seq):
    desc = llm_utils.CacheDescParser.parse_by_options({**given_, "llm.kvTensorFormat": "NZ"})
    assert (desc.num_tensors, desc.shape, desc.seq_len_dim_index) == (2, shape, seq)
    assert (desc.data_type, desc.placement, desc.batch_dim) == (DataType.DT_FLOAT16, Placement.DEVICE, 0)
    assert desc.kv_tensor_format == "NZ"
    assert llm_utils.CacheDescParser.parse_by_options(given_).kv_tensor_format is None


@pytest.mark.parity("module.llm_utils")
@pytest.mark.parametrize(
    "given_",
    [
        {},
        options(shapes=None),
        options(dtypes=None),
        options("2,4;2,5"),
        options("2,4"),
        options(dtypes="1;2"),
        options(dtypes="1;x"),
        options("2,0;2,0"),
        options("2,a;2,a"),
        options("", "1"),
        options("1,-1,-1;1,-1,-1"),
        options(seq="2"),
        options(seq="-1"),
        options(seq="x"),
    ],
)
def test_desc_by_options_refuses(given_):
    with pytest.raises(LLMException):
        llm_utils.CacheDescParser.parse_by_options(given_)


def test_v1_helpers_are_the_same_objects():
    own = {"build_npu_tensors"}
    for name in set(llm_datadist_v1.llm_utils.__all__) - own:
        assert getattr(llm_datadist_v1.llm_utils, name) is getattr(llm_utils, name)


def test_every_documented_check_is_there():
    for name in [*RANGES, *LISTS, "check_isinstance", "check_inner", "check_dict", "check_positive_or_set_default"]:
        assert inspect.isfunction(getattr(utils, name)) and inspect.isfunction(
            getattr(llm_datadist_v1.utils.utils, name)
        )
