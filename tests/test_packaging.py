# SPDX-License-Identifier: Apache-2.0
"""What the installed wheel holds, what its extension asks of the machine, and when that is loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def installed_extension() -> Path:
    package = importlib.util.find_spec("llm_datadist")
    assert package is not None and package.origin is not None
    found = sorted(Path(package.origin).parent.glob("_pyext*"))
    assert len(found) == 1, found
    return found[0]


def python(code: str) -> str:
    """What a fresh interpreter prints for code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dynamic_section(library: Path) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    return subprocess.run(["readelf", "-dW", str(library)], capture_output=True, text=True, check=True).stdout


def glibc_of_tag(tag: str) -> tuple[int, int]:
    found = re.search(r"-manylinux_(\d+)_(\d+)_", tag)
    assert found, tag
    return int(found.group(1)), int(found.group(2))


def test_tests_run_against_the_installed_wheel() -> None:
    assert ROOT / "python" not in installed_extension().parents


def test_wheel_holds_one_extension_and_both_packages() -> None:
    files = importlib.metadata.files("llm-datadist-open") or []
    names = [str(name) for name in files]
    extensions = [name for name in names if ".so" in name]
    assert len(extensions) == 1 and extensions[0].startswith("llm_datadist/_pyext."), extensions
    for package in ("llm_datadist", "llm_datadist_v1"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= set(names)
    assert not [name for name in names if name.endswith((".go", ".c", ".h"))]


def test_wheel_has_no_runtime_dependencies() -> None:
    required = importlib.metadata.requires("llm-datadist-open") or []
    assert [line for line in required if "extra ==" not in line] == []


def test_extension_needs_only_libc() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic_section(installed_extension()))
    others = [name for name in needed if name != "libc.so.6" and not name.startswith("ld-linux")]
    assert "libc.so.6" in needed and others == []


def test_extension_carries_no_search_path() -> None:
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic_section(installed_extension()))


def test_extension_names_no_path_of_the_machine_that_built_it() -> None:
    content = installed_extension().read_bytes()
    assert str(ROOT).encode() not in content
    assert b"llm-datadist-build-" not in content


def test_wheel_tag_names_the_newest_glibc_that_is_needed() -> None:
    text = importlib.metadata.distribution("llm-datadist-open").read_text("WHEEL") or ""
    tag = re.search(r"^Tag: (.*)$", text, re.MULTILINE)
    assert tag
    library = installed_extension()
    dynamic_section(library)  # skips where there is no readelf
    versions = subprocess.run(["readelf", "-VW", str(library)], capture_output=True, text=True, check=True).stdout
    needed = max((int(major), int(minor)) for major, minor in re.findall(r"GLIBC_(\d+)\.(\d+)", versions))
    assert glibc_of_tag(tag.group(1)) == needed


@pytest.mark.parametrize("package", ["llm_datadist", "llm_datadist_v1"])
def test_import_does_not_load_the_go_runtime(package: str) -> None:
    asked = "[n for n in sys.modules if '_pyext' in n], '_pyext' in open('/proc/self/maps').read()"
    assert python(f"import sys, {package}; print({asked})") == "[] False"


def test_extension_loads_from_inside_the_package() -> None:
    assert "/_pyext." in python("from llm_datadist import _pyext; print(_pyext.__file__)")


def test_loading_leaves_the_working_directory() -> None:
    assert python("import os; a = os.getcwd(); from llm_datadist import _pyext; print(os.getcwd() == a)") == "True"


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
    assert [n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("llm_datadist/_pyext.")]
    assert list(modules.iterdir()) == []
