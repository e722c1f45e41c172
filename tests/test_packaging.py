# SPDX-License-Identifier: Apache-2.0
"""What the installed wheel holds, what its libraries ask of the machine, when they are loaded, and how it is built."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def installed(pattern: str) -> Path:
    package = importlib.util.find_spec("llm_datadist")
    assert package is not None and package.origin is not None
    found = sorted(Path(package.origin).parent.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def installed_extension() -> Path:
    return installed("_pyext*")


def installed_face() -> Path:
    return installed("libcann_face*")


def python(code: str) -> str:
    """What a fresh interpreter prints for code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dynamic_section(library: Path) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    return subprocess.run(["readelf", "-dW", str(library)], capture_output=True, text=True, check=True).stdout


def needed(library: Path) -> set[str]:
    """The libraries that one asks the loader for, without their versions."""
    names = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic_section(library))
    return {name.split(".")[0] for name in names if not name.startswith("ld-linux")}


def glibc_of_tag(tag: str) -> tuple[int, int]:
    found = re.search(r"-manylinux_(\d+)_(\d+)_", tag)
    assert found, tag
    return int(found.group(1)), int(found.group(2))


def test_tests_run_against_the_installed_wheel() -> None:
    assert ROOT / "python" not in installed_extension().parents


def test_wheel_holds_one_extension_one_library_and_both_packages() -> None:
    files = importlib.metadata.files("llm-datadist-open") or []
    names = [str(name) for name in files]
    libraries = sorted(name for name in names if ".so" in name)
    assert len(libraries) == 2 and libraries[0].startswith("llm_datadist/_pyext."), libraries
    assert libraries[1] == "llm_datadist/libcann_face.so"
    for package in ("llm_datadist", "llm_datadist_v1"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= set(names)
    assert not [name for name in names if name.endswith((".go", ".c", ".cc", ".h"))]


def test_wheel_has_no_runtime_dependencies() -> None:
    required = importlib.metadata.requires("llm-datadist-open") or []
    assert [line for line in required if "extra ==" not in line] == []


def test_extension_needs_only_libc() -> None:
    assert needed(installed_extension()) == {"libc"}


def test_face_needs_the_c_and_cxx_runtimes_only() -> None:
    runtimes = {"libc", "libm", "libstdc++", "libgcc_s", "libdl", "libpthread"}
    assert {"libc", "libstdc++"} <= needed(installed_face()) <= runtimes


def test_face_exports_what_its_header_declares_and_nothing_else() -> None:
    header = (ROOT / "capi" / "cann" / "face" / "cann_face.h").read_text()
    declared = set(re.findall(r"\b(cann_[a-z_]+)\(", header))
    dynamic_section(installed_face())  # skips where there are no binutils
    command = ["nm", "-D", "--defined-only", "--format=posix", str(installed_face())]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == declared


@pytest.mark.parametrize("library", [installed_extension, installed_face])
def test_libraries_carry_no_search_path(library: Callable[[], Path]) -> None:
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic_section(library()))


@pytest.mark.parametrize("library", [installed_extension, installed_face])
def test_libraries_name_no_path_of_the_machine_that_built_them(library: Callable[[], Path]) -> None:
    content = library().read_bytes()
    assert str(ROOT).encode() not in content
    assert b"llm-datadist-build-" not in content


def test_wheel_tag_names_the_newest_glibc_that_is_needed() -> None:
    text = importlib.metadata.distribution("llm-datadist-open").read_text("WHEEL") or ""
    tag = re.search(r"^Tag: (.*)$", text, re.MULTILINE)
    assert tag
    libraries = [installed_extension(), installed_face()]
    dynamic_section(libraries[0])  # skips where there is no readelf
    versions = subprocess.run(["readelf", "-VW", *map(str, libraries)], capture_output=True, text=True, check=True).stdout
    newest = max((int(major), int(minor)) for major, minor in re.findall(r"GLIBC_(\d+)\.(\d+)", versions))
    assert glibc_of_tag(tag.group(1)) == newest


@pytest.mark.parametrize("package", ["llm_datadist", "llm_datadist_v1"])
def test_import_does_not_load_the_go_runtime(package: str) -> None:
    asked = "[n for n in sys.modules if '_pyext' in n], '_pyext' in open('/proc/self/maps').read()"
    assert python(f"import sys, {package}; print({asked})") == "[] False"


def test_face_is_not_loaded_where_device_memory_is_the_hosts() -> None:
    """Nor is the C++ runtime, which it needs."""
    started = (
        "from llm_datadist import *; config = LLMConfig(); config.enable_cache_manager, config.device = True, 'host'\n"
        "engine = LLMDataDist(LLMRole.PROMPT, 1); engine.init(config.generate_options())\n"
        "maps = open('/proc/self/maps').read(); print([name in maps for name in ('_pyext', 'cann_face', 'stdc++')])\n"
        "engine.finalize()"
    )
    assert python(started) == "[True, False, False]"


def test_extension_loads_from_inside_the_package() -> None:
    assert "/_pyext." in python("from llm_datadist import _pyext; print(_pyext.__file__)")


def test_loading_leaves_the_working_directory() -> None:
    assert python("import os; a = os.getcwd(); from llm_datadist import _pyext; print(os.getcwd() == a)") == "True"


# setup.py without the engine, which takes long.
BUILD_THE_FACE = """
import runpy, setuptools, sys
setup = setuptools.setup
setuptools.setup = lambda ext_modules, **more: setup(ext_modules=ext_modules[1:], **more)
sys.argv = ["setup.py", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


def build_the_face(folder: Path, cxx: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUILD_THE_FACE, str(folder)]
    return subprocess.run(command, env={**os.environ, "CXX": cxx}, capture_output=True, text=True, timeout=100, cwd=ROOT)


def test_face_is_built_with_the_compiler_that_cxx_names(tmp_path: Path) -> None:
    done = build_the_face(tmp_path, "g++ -DNAMED")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "llm_datadist").iterdir()] == ["libcann_face.so"]


@pytest.mark.parametrize(
    ("cxx", "said"),
    [
        ("no-such-compiler -O1", "the C++ compiler is missing, no-such-compiler -O1 is not on PATH"),
        ("g++ -fno-such-option", "fno-such-option"),
    ],
    ids=["missing", "failing"],
)
def test_build_goes_on_without_the_face_and_says_so(cxx: str, said: str, tmp_path: Path) -> None:
    done = build_the_face(tmp_path, cxx)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this build goes without libcann_face.so" in done.stderr and said in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_sdist_builds_a_wheel_without_a_network(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, "--sdist", str(ROOT)], check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(tmp_path)], check=True)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (source / "vendor" / "modules.txt").is_file()
    modules = tmp_path / "no-modules"
    modules.mkdir()
    env = {**os.environ, "GOPROXY": "off", "GOFLAGS": "-mod=vendor", "GOMODCACHE": str(modules)}
    done = subprocess.run([*build, "--wheel", str(source)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith("llm_datadist/_pyext.")]
    assert "llm_datadist/libcann_face.so" in names
    assert list(modules.iterdir()) == []
