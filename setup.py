# SPDX-License-Identifier: Apache-2.0
"""Builds the Go engine into one extension module, llm_datadist._pyext, and the C face of the vendor's library beside it.

The recipe of the engine: gopy writes a C boundary for the Go package ``pyext``; Go compiles it once for its C header; the
``build.py`` that gopy wrote (pybindgen) writes the Python side in C; Go compiles both into one shared library.
All of it happens in a temporary copy of the sources, so that a build leaves nothing behind in the tree.

The face, libcann_face.so, is C++ and loaded only where DEVICE memory is that of NPUs. Where it can't be compiled the
build says so and the wheel goes without it: everything else works.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import PlatformError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
GO_SOURCES = ("go.mod", "go.sum", "pyext", "core", "capi", "vendor")

ENGINE, FACE = "llm_datadist._pyext", "llm_datadist.libcann_face"
FACE_SOURCES = ROOT / "capi" / "cann" / "face"
CXX_COMPILERS = ("g++", "c++")  # which are tried, in this order, where CXX names none

# Without Python's link flags the module would look for libpython and carry an rpath; the interpreter that
# loads it has every symbol already.
CGO_LINE = re.compile(r"^#cgo .*\n", re.MULTILINE)

# How far a line of a failing tool's output is worth showing.
SHOWN_LINES = 40


def run(command, cwd, env, what, given=""):
    """Runs one step on what it is given and returns what it printed; one that fails raises with that step's own words."""
    try:
        done = subprocess.run(command, cwd=cwd, env=env, input=given, capture_output=True, text=True)
    except OSError as exc:
        raise PlatformError(f"{what}: cannot run {command[0]}: {exc.strerror}") from None
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-SHOWN_LINES:])
        raise PlatformError(f"{what} failed (exit status {done.returncode}): {shlex.join(command)}\n{tail}")
    return done.stdout


def wanted_go():
    """The Go version that go.mod asks for, as a tuple."""
    found = re.search(r"^go (\d+)\.(\d+)", (ROOT / "go.mod").read_text(), re.MULTILINE)
    return int(found.group(1)), int(found.group(2))


def need_go():
    """Ends with what to do unless a Go command that can build this module is on PATH."""
    wanted = wanted_go()
    want = "Go %d.%d or newer" % wanted
    if shutil.which("go") is None:
        raise PlatformError(f"the Go compiler is missing: install {want} and put its `go` command on PATH")
    asked = subprocess.run(["go", "env", "GOVERSION"], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode:
        raise PlatformError(f"{want} is needed, and the `go` command on PATH cannot be used: {asked.stderr.strip()}")
    found = re.match(r"go(\d+)\.(\d+)", asked.stdout.strip())  # a development build says "devel ...": trust it
    if found and (int(found.group(1)), int(found.group(2))) < wanted:
        raise PlatformError(f"the Go compiler is too old: {asked.stdout.strip()} is on PATH, and {want} is needed")


def need_c_compiler():
    compiler = os.environ.get("CC") or run(["go", "env", "CC"], ROOT, None, "asking Go for its C compiler").strip() or "cc"
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise PlatformError(f"the C compiler is missing: `{compiler}` is not on PATH (install gcc, or set CC)")


def need_python_parts():
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise PlatformError("free-threaded Python builds are not supported: use an ordinary build of CPython")
    if "musl" in (sysconfig.get_config_var("SOABI") or "") or not sys.platform.startswith("linux"):
        raise PlatformError("only Linux with glibc is supported")
    try:
        import pybindgen  # noqa: F401
    except ImportError:
        raise PlatformError(
            f"the Python package pybindgen is missing from {sys.executable}: `pip install pybindgen` there "
            "(or build without --no-build-isolation)"
        ) from None
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise PlatformError(f"Python's headers are missing: no {header} (install python3-dev)")


def go_environment():
    env = dict(os.environ)
    env["CGO_ENABLED"] = "1"
    env["CGO_CFLAGS"] = shlex.join(["-O2", "-I" + sysconfig.get_path("include")]) + " -w"
    env["CGO_LDFLAGS"] = ""
    if (ROOT / "vendor" / "modules.txt").is_file():
        env["GOFLAGS"] = (env.get("GOFLAGS", "") + " -mod=vendor").strip()
    return env


def build_engine(target):
    """Writes the extension module to the path target."""
    need_go()
    need_c_compiler()
    need_python_parts()
    with tempfile.TemporaryDirectory(prefix="llm-datadist-build-") as temp:
        work = Path(temp)
        for name in GO_SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, work / name)
            elif source.exists():
                shutil.copy2(source, work / name)
        env = go_environment()
        boundary = work / "boundary"
        gopy = ["go", "tool", "gopy", "gen", "-name=pyext", "-no-make", f"-vm={sys.executable}", f"-output={boundary}"]
        run([*gopy, "./pyext"], work, env, "generating the binding")
        stubs = boundary / "pyext.go"
        stubs.write_text(CGO_LINE.sub("", stubs.read_text()))
        run(["go", "tool", "goimports", "-w", str(stubs)], work, env, "tidying the binding's imports")
        compile_shared = ["go", "build", "-buildmode=c-shared", "-trimpath", "-buildvcs=false", "-ldflags=-s -w"]
        run([*compile_shared, "-o", "pyext_go.so", "."], boundary, env, "compiling the engine")  # for pyext_go.h
        (boundary / "pyext_go.so").unlink()
        run([sys.executable, "build.py"], boundary, env, "generating the Python side")
        run([*compile_shared, "-o", "_pyext.so", "."], boundary, env, "linking the extension module")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(boundary / "_pyext.so", target)


def cxx_compiler():
    """The C++ compiler as a command, or None where there is none."""
    asked = os.environ.get("CXX")
    for compiler in [shlex.split(asked)] if asked else [[name] for name in CXX_COMPILERS]:
        if shutil.which(compiler[0]) is not None:
            return compiler
    return None


def build_face(target):
    """Writes libcann_face.so to the path target, as its Makefile does. Raises where that can't be done."""
    left_out = f"this build goes without {target.name}, which only NPUs need"
    compiler = cxx_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX") or " or ".join(CXX_COMPILERS)
        raise PlatformError(f"{left_out}: the C++ compiler is missing, {wanted} is not on PATH (install g++, or set CXX)")
    # One translation unit: most of what there is to compile is the standard headers.
    unit = "".join(f'#include "{source.name}"\n' for source in sorted(FACE_SOURCES.glob("*.cc")))
    command = [*compiler, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-I.", "-shared", "-s", "-Wl,-z,defs"]
    command += ["-Wl,--version-script=exports.map", "-o", str(target), "-x", "c++", "-", "-ldl", "-pthread"]
    target.parent.mkdir(parents=True, exist_ok=True)
    run(command, FACE_SOURCES, None, f"{left_out}: compiling it", unit)


class BuildLibraries(build_ext):
    """build_ext whose extensions are the Go engine, and a library that no interpreter imports: its name is that of a library."""

    def get_ext_filename(self, fullname):
        if fullname in (FACE, FACE.rpartition(".")[2]):  # it is asked for with and without the package
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        build = build_face if ext.name == FACE else build_engine
        build(Path(self.get_ext_fullpath(ext.name)).resolve())


class SourceWithVendor(sdist):
    """An sdist that carries the Go modules, so that a wheel can be built from it without a network."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        vendored = Path(base_dir, "vendor").resolve()
        if (ROOT / "vendor" / "modules.txt").is_file():
            shutil.copytree(ROOT / "vendor", vendored, dirs_exist_ok=True)
            return
        need_go()
        run(["go", "mod", "vendor", "-o", str(vendored)], ROOT, None, "collecting the Go modules")


class WheelForGlibc(bdist_wheel):
    """A wheel whose tag says which glibc its libraries ask for (manylinux_2_X, PEP 600)."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        built = sorted(Path(self.bdist_dir).glob("llm_datadist/*.so"))
        needed = max((newest_glibc(path) for path in built), default=None)
        if needed and platform.startswith("linux_"):
            platform = "manylinux_%d_%d_%s" % (*needed, platform[len("linux_"):])
        return python, abi, platform


def newest_glibc(library):
    """The newest GLIBC_x.y symbol version that a library names: each stands in its string table between two zeros."""
    names = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)", library.read_bytes())
    return max(((int(major), int(minor)) for major, minor in names), default=(2, 17))


setup(
    ext_modules=[Extension(ENGINE, sources=[]), Extension(FACE, sources=[], optional=True)],  # optional: a failure is a warning
    cmdclass={"build_ext": BuildLibraries, "sdist": SourceWithVendor, "bdist_wheel": WheelForGlibc},
)
