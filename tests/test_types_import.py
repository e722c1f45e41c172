# SPDX-License-Identifier: Apache-2.0
"""What importing the packages does and does not do. Each case runs in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llm_datadist

ROOT = Path(llm_datadist.__file__).parent.parent

V1_NAMES = ["TensorDesc", "Tensor", "KvCacheManager"]
V2_NAMES = [
    "LLMClusterInfo", "LLMStatusCode", "LLMException", "LLMRole", "LlmConfig", "LLMConfig", "DataType", "Status",
    "CacheDesc", "CacheKey", "CacheKeyByIdAndIndex", "KvCache", "Cache", "BlocksCacheKey", "LLMDataDist", "Placement",
    "RegisterMemStatus", "LayerSynchronizer", "TransferConfig", "CacheTask", "TransferWithCacheKeyConfig", "Memtype",
    "MemInfo",
]


def run(program, *paths, **env):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "AUTO_USE_UC_MEMORY")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths or [ROOT]))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env={**environment, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parity("module.import")
def test_star_import_binds_every_name_and_loads_neither_numpy_nor_the_engine():
    program = f"""
from llm_datadist import *
import llm_datadist, sys
missing = [name for name in llm_datadist.__all__ if name not in globals()]
heavy = [name for name in sys.modules if name.split(".")[0] in ("numpy", "torch")]
native = [
    name for name, module in sys.modules.items()
    if name.startswith("llm_datadist") and not str(module.__file__).endswith(".py")
]
maps = open("/proc/self/maps").read()
print(missing, heavy, native, "{ROOT}/llm_datadist/" in maps)
"""
    assert run(program) == "[] [] [] False\n"


@pytest.mark.parity("module.all", "module.v2_list", "module.unknown_attribute")
def test_names():
    assert llm_datadist.__all__ == [*V2_NAMES, *V1_NAMES]
    assert llm_datadist.v2_list == V2_NAMES
    assert all(hasattr(llm_datadist, name) for name in llm_datadist.v2_list)
    assert llm_datadist.__version__ == "0.1.0"
    assert not {*V1_NAMES} & {*vars(llm_datadist)}  # looked up anew each time
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        llm_datadist.Nothing  # noqa: B018
    with pytest.raises(ImportError):
        from llm_datadist import Nothing  # noqa: F401


@pytest.mark.parity("module.lazy_names")
def test_lazy_names_are_those_of_v1():
    import llm_datadist_v1

    for name in V1_NAMES:
        assert getattr(llm_datadist, name) is getattr(llm_datadist_v1, name)


@pytest.mark.parity("module.lazy_names")
def test_without_v1_the_lazy_names_are_import_errors():
    program = f"""
import sys
sys.modules["llm_datadist_v1"] = None  # what import finds where the package is missing
import llm_datadist
def attempts():
    for name in {V1_NAMES}:
        yield lambda: getattr(llm_datadist, name)
        yield lambda: exec(f"from llm_datadist import {{name}}")
    yield lambda: exec("from llm_datadist import *")
for attempt in attempts():
    try:
        attempt()
        print("no error")
    except ImportError:
        pass
print([name for name in llm_datadist.v2_list if not hasattr(llm_datadist, name)])
"""
    assert run(program) == "[]\n"


@pytest.mark.parity("module.import")
@pytest.mark.parametrize("package", ["llm_datadist", "llm_datadist_v1"])
def test_uc_memory_variable(package):
    program = f"import {package}, os; print(os.environ['AUTO_USE_UC_MEMORY'])"
    assert run(program) == "0\n"
    assert run(program, AUTO_USE_UC_MEMORY="1") == "1\n"


@pytest.mark.parity("module.numpy_tables")
@pytest.mark.parametrize("name", ["dtype_to_np_dtype", "valid_np_dtypes", "np_dtype_to_dtype"])
def test_numpy_tables_are_built_on_first_need(name):
    pytest.importorskip("numpy")
    program = f"""
import sys
from llm_datadist import data_type
before = "{name}" in vars(data_type), "numpy" in sys.modules
table = data_type.{name}
print(*before, "{name}" in vars(data_type), data_type.{name} is table)
"""
    assert run(program) == "False False True True\n"


VENDOR = [
    "llm_datadist-0.0.1.dist-info",
    "LLM_DataDist-0.0.1-py3.9.egg-info",
    "llm-datadist-1.2.dist-info",
    "llm_datadist.egg-info",
]
OTHERS = [
    "llm_datadist_open-0.1.0.dist-info",
    "llm_datadist_open.egg-info",
    "llm-datadist-open-0.1.0.dist-info",
    "llm_datadist",
]


@pytest.mark.parametrize(("names", "warns"), [*(([name], True) for name in VENDOR), (OTHERS, False)])
def test_a_vendor_package_beside_ours_is_told(tmp_path, names, warns):
    for name in names:
        (tmp_path / name).mkdir()
    out = run("import llm_datadist", ROOT, tmp_path, ASCEND_GLOBAL_LOG_LEVEL="2")
    assert ("in use is llm-datadist-open 0.1.0 at" in out) is warns
    assert (str(tmp_path) in out) is warns
    assert str(ROOT) in out or not warns


def test_unreadable_path_entries_do_not_matter():
    assert run("import llm_datadist; print(1)", ROOT, "/nowhere", "/dev/null") == "1\n"


def test_types_are_marked_as_typed():
    assert (ROOT / "llm_datadist" / "py.typed").exists() and (ROOT / "llm_datadist_v1" / "py.typed").exists()
