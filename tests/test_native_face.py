# SPDX-License-Identifier: Apache-2.0
"""The C face of the vendor's library (capi/cann/face), against a stand-in that was written from its documentation alone.

Face and stand-in are compiled for both C++ string ABIs (natives.py). All but the checks of what was compiled happens in processes
of their own: libraries that were loaded stay loaded.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from native_face import (
    BAD_ARGUMENT,
    CANNOT_LOAD,
    DEVICE_TO_HOST,
    FACE,
    FUNCTIONS,
    HOST_TO_DEVICE,
    LIBRARY,
    MISSING_SYMBOL,
    NOT_LOADED,
    ON_DEVICE,
    ON_HOST,
    RUNTIME,
    UNKNOWN_OBJECT,
    WRONG_ABI,
    Refused,
    RemoteSide,
    remote_side,
)
from natives import ABIS, FACE_SOURCES, ROOT, STANDIN_SOURCES, finish, make
from peers import Peer, free_port, pattern

FAILED, NOT_EXIST, PARAM_INVALID, NOT_YET_LINK, ALREADY_LINK = 0xFFFFFFFF, 0x5010B002, 0x5010B005, 0x5010B007, 0x5010B008
LINK_FAILED, UNLINK_FAILED, EXIST_LINK, NOT_ENABLED, TIMEOUT = 0x5010B009, 0x5010B00A, 0x5010B018, 0x5010B019, 0x5010B01A
DEVICE_MEM_ERROR, SUSPECT_REMOTE_ERROR = 507053, 507057

STATUSES = {
    0xFFFFFFFF: "LLM_FAILED",
    0x5010B001: "LLM_WAIT_PROC_TIMEOUT",
    0x5010B002: "LLM_KV_CACHE_NOT_EXIST",
    0x5010B003: "LLM_REPEAT_REQUEST",
    0x5010B004: "LLM_REQUEST_ALREADY_COMPLETED",
    0x5010B005: "LLM_PARAM_INVALID",
    0x5010B006: "LLM_ENGINE_FINALIZED",
    0x5010B007: "LLM_NOT_YET_LINK",
    0x5010B008: "LLM_ALREADY_LINK",
    0x5010B009: "LLM_LINK_FAILED",
    0x5010B00A: "LLM_UNLINK_FAILED",
    0x5010B00B: "LLM_NOTIFY_PROMPT_UNLINK_FAILED",
    0x5010B00C: "LLM_CLUSTER_NUM_EXCEED_LIMIT",
    0x5010B00D: "LLM_PROCESSING_LINK",
    0x5010B00E: "LLM_DEVICE_OUT_OF_MEMORY",
    0x5010B00F: "LLM_PREFIX_ALREADY_EXIST",
    0x5010B010: "LLM_PREFIX_NOT_EXIST",
    0x5010B011: "LLM_SEQ_LEN_OVER_LIMIT",
    0x5010B012: "LLM_NO_FREE_BLOCK",
    0x5010B013: "LLM_BLOCKS_OUT_OF_MEMORY",
    0x5010B014: "LLM_CACHE_INCOMPATIBLE",
    0x5010B015: "LLM_CACHE_KEY_ALREADY_EXIST",
    0x5010B016: "LLM_COPY_CACHE_FAILED",
    0x5010B017: "LLM_CACHE_ID_ALREADY_EXIST",
    0x5010B018: "LLM_EXIST_LINK",
    0x5010B019: "LLM_FEATURE_NOT_ENABLED",
    0x5010B01A: "LLM_TIMEOUT",
    0x5010B01B: "LLM_LINK_BUSY",
    0x5010B01C: "LLM_OUT_OF_MEMORY",
    507053: "LLM_DEVICE_MEM_ERROR",
    507057: "LLM_SUSPECT_REMOTE_ERROR",
}
UNDOCUMENTED = 0x1234

# The exported names of the documentation, without parameters.
MEMBERS = [
    *("Initialize", "Finalize", "SetRole", "LinkLlmClusters", "UnlinkLlmClusters", "AllocateCache", "DeallocateCache"),
    *("PullKvCache", "PullKvBlocks", "CopyKvCache", "CopyKvBlocks", "PushKvCache", "PushKvBlocks"),
    *("RegisterKvCache", "UnregisterKvCache"),
]
RUNTIME_FUNCTIONS = [
    *("aclInit", "aclrtGetDeviceCount", "aclrtSetDevice", "aclrtResetDevice", "aclrtMalloc", "aclrtFree"),
    *("aclrtMallocHost", "aclrtFreeHost", "aclrtMemcpy"),
]
EXPORTS = {
    "libllm_datadist.so": Counter(
        {
            "llm_datadist::LlmDataDist::LlmDataDist": 2,  # C1 and C2
            "llm_datadist::LlmDataDist::~LlmDataDist": 2,  # D1 and D2
            **{f"llm_datadist::LlmDataDist::{name}": 1 for name in MEMBERS},
        }
    ),
    "libmetadef.so": Counter(
        {
            "ge::AscendString::AscendString": 4,  # two of them, C1 and C2
            "ge::AscendString::GetString": 1,
            "ge::AscendString::GetLength": 1,
            "ge::AscendString::operator<": 1,
        }
    ),
    "libacl_rt.so": Counter(RUNTIME_FUNCTIONS),
    "libascendcl.so": Counter(),
}
# Compiling takes its time on a machine that is busy.
pytestmark = pytest.mark.timeout(300)

VENDOR_NAMES = re.compile(r"(llm_datadist::|ge::|acl)")

SERVER, CLIENT, VICTIM = 11, 12, 13


# What most tests use: our default ABI; the stand-in has that of the vendor's own consumers.
@pytest.fixture(scope="module")
def face(faces: dict[str, Path]) -> Path:
    return faces["1"]


@pytest.fixture(scope="module")
def processes(face: Path, libraries: Path) -> Iterator[tuple[RemoteSide, RemoteSide]]:
    with remote_side(face, libraries) as one, remote_side(face, libraries) as other:
        yield one, other


@pytest.fixture
def side(processes: tuple[RemoteSide, RemoteSide]) -> Iterator[RemoteSide]:
    """A process without an object."""
    yield processes[0]
    processes[0].close()


class Pair(NamedTuple):
    server: RemoteSide
    client: RemoteSide
    port: int


@pytest.fixture
def pair(processes: tuple[RemoteSide, RemoteSide]) -> Iterator[Pair]:
    """Two objects with a cache "a" of 4 tensors of 8 rows of 64 bytes each, id 1; not linked."""
    pair = Pair(*processes, free_port())
    pair.server.open(SERVER, pair.port)
    pair.client.open(CLIENT)
    pair.server.add("a", 1, 4, (8, 64))
    pair.client.add("a", 2, 4, (8, 64))
    yield pair
    pair.client.close()
    pair.server.close()


def refused(call: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """Return who refuses a call, with which number."""
    with pytest.raises(Refused) as caught:
        call(*args, **kwargs)
    return caught.value.who, caught.value.code


def patterns(number: int, tensors: int, size: int) -> list[np.ndarray]:
    return [pattern(number, tensor, size) for tensor in range(tensors)]


def same(side: RemoteSide, name: str, wanted: Sequence[np.ndarray]) -> None:
    for tensor, (found, expected) in enumerate(zip(side.content(name), wanted)):
        np.testing.assert_array_equal(found, expected, f"tensor {tensor} of {name}")


# ---- what was compiled


def symbols(*args: str) -> list[str]:
    """The names that nm prints, without addresses and types."""
    lines = subprocess.run(["nm", "--format=posix", *args], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r" [A-Za-z]( [0-9a-f]+){0,2} *$", "", line) for line in lines]


@pytest.mark.parametrize("abi", ABIS)
def test_stand_in_exports_exactly_the_documented_names(standins: dict[str, Path], abi: str) -> None:
    for library, wanted in EXPORTS.items():
        names = symbols("-DC", "--defined-only", str(standins[abi] / library))
        assert Counter(name.split("(")[0] for name in names if VENDOR_NAMES.match(name)) == wanted, library
        assert [name for name in names if not VENDOR_NAMES.match(name) and not name.startswith("standin_")] == []


@pytest.mark.parametrize("abi", ABIS)
def test_face_exports_its_functions_only_and_needs_no_vendor_library(faces: dict[str, Path], abi: str) -> None:
    library = str(faces[abi])
    assert set(symbols("-D", "--defined-only", library)) == {f"cann_{name}" for name in [*FUNCTIONS, "status_name"]}
    assert [name for name in symbols("-DC", "--undefined-only", library) if VENDOR_NAMES.match(name)] == []
    section = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    needed = {name.split(".")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", section)}
    assert {"libstdc++", "libc"} <= needed <= {"libstdc++", "libgcc_s", "libc", "libm", "ld-linux-x86-64", "ld-linux-aarch64"}


def test_names_that_the_face_looks_up_are_those_of_its_declarations(tmp_path: Path) -> None:
    members = re.findall(r'X\((\w+),\s*\\?\s*"(\w+)"\)', (FACE_SOURCES / "library.h").read_text())
    assert [name for name, _ in members] == MEMBERS
    pointers = "".join(f"auto p{name} = &llm_datadist::LlmDataDist::{name};\n" for name in MEMBERS)
    source = tmp_path / "names.cc"
    source.write_text('#include "vendor.h"\n' + pointers)
    subprocess.run(["g++", "-std=c++17", f"-I{FACE_SOURCES}", "-c", "-o", str(tmp_path / "names.o"), str(source)], check=True)
    assert set(symbols("-u", str(tmp_path / "names.o"))) == {mangled for _, mangled in members}


def test_header_is_plain_c(tmp_path: Path) -> None:
    source = tmp_path / "header.c"
    source.write_text('#include "cann_face.h"\nint main(void) { return cann_load(0, 0); }\n')
    options = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", f"-I{FACE_SOURCES}"]
    subprocess.run(["gcc", *options, str(source)], check=True)


# ---- loading


def loading(face: Path, folder: Path | None = None, **env: str) -> str:
    """Return which library is loaded, of a process with these variables."""
    code = (
        "import native_face, ctypes; face = native_face.Face(path); face.load(folder); text = ctypes.create_string_buffer(4096);"
        " face.loaded(text, 4096); result = text.value.decode()"
    )
    with Peer(env) as peer:
        return str(peer.run(code, path=str(face), folder=str(folder).encode() if folder else None)).splitlines()[0]


def failing(code: int, face: Path, folder: Path | None = None, **env: str) -> str:
    """Return what is said where the libraries can't be loaded for a reason."""
    with pytest.raises(Refused) as caught:
        loading(face, folder, **env)
    assert (caught.value.who, caught.value.code) == (FACE, code), caught.value.text
    return caught.value.text


def test_libraries_are_found_by_path_by_name_and_in_the_toolkits_home(face: Path, libraries: Path, tmp_path: Path) -> None:
    home = tmp_path / "toolkit"
    home.mkdir()
    (home / "lib64").symlink_to(libraries)
    wanted = str(home / "lib64" / "libllm_datadist.so")
    assert loading(face, home / "lib64") == wanted
    assert loading(face, ASCEND_HOME_PATH=str(home)) == wanted
    assert loading(face, ASCEND_HOME_PATH=str(tmp_path), ASCEND_TOOLKIT_HOME=str(home)) == wanted
    by_name = loading(face, LD_LIBRARY_PATH=str(libraries), ASCEND_HOME_PATH=str(home))
    assert by_name == str(libraries / "libllm_datadist.so")


def test_runtime_may_be_split_off_alone(face: Path, libraries: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    shutil.copytree(libraries, folder)
    (folder / "libascendcl.so").unlink()
    assert loading(face, folder) == str(folder / "libllm_datadist.so")


def test_missing_library_is_named_with_the_places_that_were_tried(face: Path, libraries: Path, tmp_path: Path) -> None:
    text = failing(CANNOT_LOAD, face, ASCEND_HOME_PATH=str(tmp_path))
    assert "libllm_datadist.so" in text and "LD_LIBRARY_PATH" in text and "ASCEND_HOME_PATH" in text and str(tmp_path) in text
    for missing in ("libllm_datadist.so", "libmetadef.so"):
        folder = tmp_path / missing.split(".")[0]
        shutil.copytree(libraries, folder)
        (folder / missing).unlink()
        assert missing in failing(CANNOT_LOAD, face, folder)
    (folder / missing).write_text("no library")
    assert missing in failing(CANNOT_LOAD, face, folder)


def test_missing_symbol_is_named(face: Path, libraries: Path, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(libraries, folder)
    library = folder / "libllm_datadist.so"
    library.write_bytes(library.read_bytes().replace(b"12PushKvBlocks", b"12PushKvBl0cks"))
    text = failing(MISSING_SYMBOL, face, folder)
    assert str(folder) in text and "_ZN12llm_datadist11LlmDataDist12PushKvBlocks" in text and "version" in text


def test_library_of_another_abi_is_refused(face: Path, libraries: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    shutil.copytree(libraries, folder)
    (folder / "libmetadef.so").unlink()
    finish(make(STANDIN_SOURCES, folder, "0", "CXXFLAGS=-O0 -DSTANDIN_WIDE_STRING", str(folder / "libmetadef.so")))
    assert "ge::AscendString" in failing(WRONG_ABI, face, folder)


def test_nothing_works_before_a_load_and_a_second_one_changes_nothing(face: Path, libraries: Path, tmp_path: Path) -> None:
    with Peer() as peer:
        before = """
import native_face, ctypes
face = native_face.Face(path)
try:
    face.create(1, 3, 0, ctypes.byref(ctypes.c_int64()))
except native_face.Refused as refused:
    result = refused.who, refused.code
"""
        assert peer.run(before, path=str(face)) == (FACE, NOT_LOADED)
        assert failing(CANNOT_LOAD, face, tmp_path)
    with remote_side(face, libraries) as side:
        side.run("side.face.load(None)")
        assert refused(side.run, "side.face.load(folder)", folder=str(tmp_path).encode()) == (FACE, NOT_LOADED)


# ---- device runtime


def test_device_memory_is_copied_in_all_directions_and_every_byte_arrives(side: RemoteSide) -> None:
    moved = """
import numpy as np
from native_face import *
from peers import pattern
size = 100_000
content, back = pattern(1, 0, size), np.zeros(size, np.uint8)
first, second, pinned = side.malloc(ON_DEVICE, size), side.malloc(ON_DEVICE, size), side.malloc(ON_HOST, size)
side.copy(HOST_TO_HOST, pinned, content.ctypes.data, size)
side.copy(HOST_TO_DEVICE, first, pinned, size)
side.copy(DEVICE_TO_DEVICE, second + 1, first, size - 1)
side.copy(DEVICE_TO_DEVICE, second, first + size - 1, 1)
side.copy(DEVICE_TO_HOST, back.ctypes.data, second, size)
for placement, address in ((ON_DEVICE, first), (ON_DEVICE, second), (ON_HOST, pinned)):
    side.free(placement, address)
count = ctypes.c_uint32()
side.face.device_count(ctypes.byref(count))
side.face.device_reset(0)
result = np.array_equal(back, np.roll(content, 1)), count.value
"""
    assert side.run(moved) == (True, 2)


def test_many_copies_are_one_call_and_the_first_failure_ends_it(side: RemoteSide) -> None:
    moved = """
import numpy as np
from native_face import *
source, device = np.arange(256, dtype=np.uint8), side.malloc(ON_DEVICE, 256)
back = np.zeros(256, np.uint8)
moves = (Move * 256)(*(Move(device + 255 - i, 1, source.ctypes.data + i, 1) for i in range(256)))
side.face.copy(0, HOST_TO_DEVICE, moves, 256)
side.copy(DEVICE_TO_HOST, back.ctypes.data, device, 256)
result = np.array_equal(back, source[::-1])
short = (Move * 3)(*(Move(device + i, i != 1, source.ctypes.data + 7, 1) for i in range(3)))
try:
    side.face.copy(0, HOST_TO_DEVICE, short, 3)
except Refused as refused:
    side.copy(DEVICE_TO_HOST, back.ctypes.data, device, 256)
    result = result, refused.who, back[:3].tolist()
"""
    assert side.run(moved) == (True, RUNTIME, [7, 254, 253])


def test_runtime_errors_pass_through(side: RemoteSide) -> None:
    assert refused(side.malloc, ON_DEVICE, 1 << 40)[0] == RUNTIME
    assert refused(side.free, ON_DEVICE, 4096)[0] == RUNTIME
    assert refused(side.copy, HOST_TO_DEVICE, 4096, 4096, 1)[0] == RUNTIME
    assert refused(side.copy, DEVICE_TO_HOST + 7, 4096, 4096, 1)[0] == RUNTIME
    no_such_device = "side.face.malloc(9, 1, 0, native_face.byref(native_face.c_uint64()))"
    assert refused(side.run, no_such_device)[0] == RUNTIME
    for function, call in {
        "aclrtSetDevice": "side.malloc(1, 1)",
        "aclrtMalloc": "side.malloc(1, 1)",
        "aclrtMallocHost": "side.malloc(0, 1)",
        "aclrtFree": "side.free(1, 1)",
        "aclrtFreeHost": "side.free(0, 1)",
        "aclrtMemcpy": "side.copy(1, 1, 1, 1)",
        "aclrtResetDevice": "side.face.device_reset(0)",
        "aclrtGetDeviceCount": "side.face.device_count(native_face.byref(native_face.c_uint32()))",
    }.items():
        side.plan(f"{function}=fail:{SUSPECT_REMOTE_ERROR}")
        with pytest.raises(Refused) as caught:
            side.run(call)
        assert (caught.value.who, caught.value.code) == (RUNTIME, SUSPECT_REMOTE_ERROR) and function in caught.value.text


def test_every_thread_is_bound_to_the_device_by_the_face(side: RemoteSide) -> None:
    bare = """
import ctypes
from peers import Background
runtime = side.standin()
place = ctypes.c_void_p()
bare = lambda: runtime.aclrtMalloc(ctypes.byref(place), ctypes.c_size_t(1), 0)
result = Background(bare).result() != 0, Background(side.malloc, 1, 1).result() != 0
"""
    assert side.run(bare) == (True, True)
    side.open(CLIENT)
    unbound = """
from peers import Background
side.plan("aclrtSetDevice=fail:0")  # does nothing, and says that it has
Background(side.face.unregister, side.object, 1).result()
"""
    assert refused(side.run, unbound) == (LIBRARY, FAILED)
    side.run("from peers import Background; Background(side.face.unregister, side.object, 1).result()")


@pytest.mark.parametrize("access", ["ctypes.string_at(address, 1)", "ctypes.memset(address, 1, 1)"])
def test_host_that_follows_a_device_address_faults(side: RemoteSide, face: Path, libraries: Path, access: str) -> None:
    code = f"""
import ctypes, resource, sys
import native_face
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
side = native_face.Side({str(face)!r}, {str(libraries)!r})
address = side.malloc(native_face.ON_DEVICE, 4096)
print("before", flush=True)
{access}
print("after", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "before\n"), done.stderr


# ---- the object


@pytest.mark.parametrize("abis", ["00", "01", "10", "11"], ids=lambda abis: f"face{abis[0]}-library{abis[1]}")
def test_two_processes_move_bytes_with_every_call(faces: dict[str, Path], standins: dict[str, Path], abis: str) -> None:
    face, libraries = faces[abis[0]], standins[abis[1]]
    with remote_side(face, libraries) as server, remote_side(face, libraries) as client:
        port = free_port()
        server.open(SERVER)
        server.set_role(3, ListenIpInfo=f"127.0.0.1:{port}")
        client.open(CLIENT, SyncKvCacheWaitTime=10_000)
        assert [server.add("device", 1, 4, (8, 64)), server.add("host", 2, 4, (8, 64), ON_HOST)] == [1, 2]
        assert [client.add("device", 3, 4, (8, 64)), client.add("host", 4, 4, (8, 64), ON_HOST)] == [1, 2]
        theirs = [[], patterns(1, 4, 512), patterns(2, 4, 512)]
        ours = [[], patterns(3, 4, 512), patterns(4, 4, 512)]
        client.link(SERVER, port)
        assert refused(client.link, SERVER, port) == (LIBRARY, ALREADY_LINK)

        client.pull_cache(SERVER, 1, "device", remote_batch=5, local_batch=2)
        client.pull_cache(SERVER, 2, "host", remote_batch=7, local_batch=0, bytes=10)
        layers = {"src_first_layer": 0, "src_last_layer": 0, "dst_first_layer": 1, "dst_last_layer": 1}
        client.pull_cache(SERVER, 2, "device", remote_batch=1, local_batch=3, **layers)
        client.pull_blocks(SERVER, 1, "host", [3, 4, 0], [5, 6, 1])
        for tensor in range(4):
            ours[1][tensor][128:192] = theirs[1][tensor][320:384]
            ours[2][tensor][:10] = theirs[2][tensor][448:458]
            ours[2][tensor][320:448] = theirs[1][tensor][192:320]
            ours[2][tensor][64:128] = theirs[1][tensor][:64]
        for tensor in range(2):
            ours[1][2 + tensor][192:256] = theirs[2][tensor][64:128]
        same(client, "device", ours[1])
        same(client, "host", ours[2])

        client.push_cache(SERVER, 2, "device", remote_batch=6, local_batch=1)
        client.push_blocks(SERVER, 1, "device", [7, 0], [0, 2], **layers)
        server.push_cache(CLIENT, 1, "device", remote_batch=7, local_batch=7)  # the other direction of the same link
        server.pull_cache(CLIENT, 2, "host", remote_batch=0, local_batch=0)
        for tensor in range(4):
            theirs[2][tensor][384:448] = ours[1][tensor][64:128]
            theirs[2][tensor][:64] = ours[2][tensor][:64]
        for tensor in range(2):
            theirs[1][2 + tensor][:64] = ours[1][tensor][448:]
            theirs[1][2 + tensor][128:192] = ours[1][tensor][:64]
        for tensor in range(4):
            ours[1][tensor][448:] = theirs[1][tensor][448:]
        same(server, "host", theirs[2])
        same(server, "device", theirs[1])
        same(client, "device", ours[1])

        client.unlink(SERVER, port)
        assert refused(server.pull_cache, CLIENT, 1, "device") == (LIBRARY, NOT_YET_LINK)
        client.unregister("host")
        assert refused(client.pull_cache, SERVER, 1, "host") == (LIBRARY, NOT_EXIST)
        for end in (client, server):
            end.run("side.face.finalize(side.object); side.face.finalize(side.object)")
            end.destroy()


UNSUPPORTED = {
    "AllocateCache": "side.face.allocate_cache(side.object, byref(Description()), byref(c_int64()), None, 0, byref(c_uint64()))",
    "DeallocateCache": "side.face.deallocate_cache(side.object, 1)",
    "CopyKvCache": "side.face.copy_cache(side.object, 1, 2, 0, 0, 0, -1)",
    "CopyKvBlocks": "side.face.copy_blocks(side.object, 1, 2, *words([1, 2]), words([3, 4, 5, 6])[0], 2)",
}
CALLS = {
    "Initialize": "side.initialize()",
    "SetRole": "side.set_role(3)",
    "LinkLlmClusters": "side.link(11, 1)",
    "UnlinkLlmClusters": "side.unlink(11, 1)",
    "PullKvCache": "side.pull_cache(11, 1, 'a')",
    "PullKvBlocks": "side.pull_blocks(11, 1, 'a', [1], [1])",
    "PushKvCache": "side.push_cache(11, 1, 'a')",
    "PushKvBlocks": "side.push_blocks(11, 1, 'a', [1], [1])",
    "RegisterKvCache": "side.register(1, (1,), [4096])",
    "UnregisterKvCache": "side.face.unregister(side.object, 1)",
    **UNSUPPORTED,
}
IMPORTS = "from native_face import *\n"


def test_every_call_of_the_library_is_made_and_its_status_passed_through(side: RemoteSide) -> None:
    assert sorted([*CALLS, "Finalize"]) == sorted(MEMBERS)
    side.create(CLIENT)
    for entry, call in CALLS.items():
        side.plan(f"{entry}=fail:{UNDOCUMENTED}")
        with pytest.raises(Refused) as caught:
            side.run(IMPORTS + call)
        assert (caught.value.who, caught.value.code) == (LIBRARY, UNDOCUMENTED)
        assert caught.value.text == f"{entry}: a status that is not documented (0x00001234)"


def test_each_status_has_its_number_and_its_name(side: RemoteSide) -> None:
    side.create(CLIENT)
    every = """
texts = {}
for status in statuses:
    side.plan(f"PullKvCache=fail:{status}")
    try:
        side.pull_cache(11, 1, "a")
    except native_face.Refused as refused:
        texts[refused.code] = refused.text, side.face.status_name(refused.code)
result = texts, side.face.status_name(0), side.face.status_name(0x1234)
"""
    texts, success, unknown = side.run(every, statuses=list(STATUSES))
    assert texts == {code: (f"PullKvCache: {name} (0x{code:08X})", name) for code, name in STATUSES.items()}
    assert (success, unknown) == ("LLM_SUCCESS", "")


def test_what_is_not_supported_says_so_even_before_initialize_and_all_else_has_failed(side: RemoteSide) -> None:
    side.create(CLIENT)
    for call in UNSUPPORTED.values():
        assert refused(side.run, IMPORTS + call) == (LIBRARY, NOT_ENABLED)
    for entry, call in CALLS.items():
        if entry not in UNSUPPORTED and entry != "Initialize":
            assert refused(side.run, IMPORTS + call) == (LIBRARY, FAILED), entry


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"llm.DeviceId": ""}, PARAM_INVALID),
        ({"llm.DeviceId": "x"}, PARAM_INVALID),
        ({"llm.DeviceId": "-1"}, PARAM_INVALID),
        ({"llm.DeviceId": "0;1"}, FAILED),
        ({"llm.DeviceId": "7"}, FAILED),
        ({"llm.ListenIpInfo": "127.0.0.1"}, PARAM_INVALID),
        ({"llm.ListenIpInfo": "127.0.0.300:1"}, PARAM_INVALID),
        ({"llm.ListenIpInfo": "127.0.0.1:4294967296"}, PARAM_INVALID),
        ({"llm.ListenIpInfo": "127.0.0.1:65536"}, FAILED),
        ({"llm.SyncKvCacheWaitTime": "soon"}, PARAM_INVALID),
        ({"llm.TransferBackend": "other"}, PARAM_INVALID),
        ({"llm.TransferBackend": "hixl"}, PARAM_INVALID),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_options_that_the_library_rejects(side: RemoteSide, options: dict[str, str], code: int) -> None:
    side.create(CLIENT)
    assert refused(side.initialize, options) == (LIBRARY, code)
    side.destroy()


def test_a_role_that_is_none_and_a_second_initialize(side: RemoteSide) -> None:
    side.create(CLIENT, 4)
    assert refused(side.initialize) == (LIBRARY, PARAM_INVALID)
    side.destroy()
    side.open(CLIENT)
    side.initialize({"llm.DeviceId": "x"})  # is a success
    assert refused(side.set_role, 0) == (LIBRARY, PARAM_INVALID)
    assert refused(side.set_role, 1, ListenIpInfo="nowhere") == (LIBRARY, PARAM_INVALID)
    side.destroy()


def test_registrations_that_the_library_rejects(side: RemoteSide) -> None:
    side.open(CLIENT)
    for tensors, shape, addresses, dtype in (
        (0, (1,), [], 2),
        (2, (1,), [4096], 2),
        (1, (1,), [0], 2),
        (1, (), [4096], 2),
        (1, (1,) * 32, [4096], 2),
        (1, (0, 1), [4096], 2),
        (1, (-1,), [4096], 2),
        (1, (1,), [4096], 28),
        (241, (1,), list(range(1, 242)), 2),
    ):
        assert refused(side.register, tensors, shape, addresses, ON_DEVICE, dtype) == (LIBRARY, PARAM_INVALID)
    assert [side.register(1, (1,), [4096]), side.register(240, (1,), list(range(1, 241)))] == [1, 2]
    side.run("side.face.unregister(side.object, 99)")
    side.destroy()


def test_the_face_refuses_what_it_cannot_pass_on(side: RemoteSide) -> None:
    side.open(CLIENT)
    for call in (
        "side.face.initialize(side.object, b'key', 3)",
        "side.face.initialize(side.object, b'key\\0', 4)",
        "side.face.link(side.object, None, 1, 1000, byref(c_uint32()))",
        "side.face.link(side.object, byref(Cluster(1, b'1' * 46)), 1, 1000, byref(c_uint32()))",
        "side.face.link(side.object, byref(Cluster(1)), 1, 1000, None)",
        "side.face.pull_cache(side.object, None)",
        "side.pull_cache(1, 1, 'a', tensors_per_layer=256)",
        "side.face.pull_blocks(side.object, byref(Transfer()), None, 1, None, 1)",
        "side.face.register(side.object, byref(Description(rank=33)), None, 0, byref(c_int64()))",
        "side.face.register(side.object, None, None, 0, byref(c_int64()))",
        "side.face.copy(0, 1, None, 1)",
        "side.face.create(1, 3, 0, None)",
    ):
        assert refused(side.run, IMPORTS + call) == (FACE, BAD_ARGUMENT), call
    destroyed = side.run("result = side.object")
    side.destroy()
    for number in (destroyed, destroyed + 1, -1, 0, 1, 3):
        assert refused(side.run, "side.face.destroy(number)", number=number) == (FACE, UNKNOWN_OBJECT)


def test_links_that_cannot_be_made(pair: Pair) -> None:
    _, client, port = pair
    assert refused(client.link, SERVER, port, 0) == (LIBRARY, PARAM_INVALID)
    assert refused(client.link, SERVER, port, local=b"localhost") == (LIBRARY, PARAM_INVALID)
    assert refused(client.link, SERVER, port, local=b"") == (LIBRARY, PARAM_INVALID)  # needed without llm.LocalCommRes
    assert refused(client.link, SERVER, None) == (LIBRARY, PARAM_INVALID)
    assert refused(client.link, SERVER, free_port()) == (LIBRARY, LINK_FAILED)
    assert refused(client.unlink, SERVER, free_port()) == (LIBRARY, UNLINK_FAILED)
    assert refused(client.run, IMPORTS + "side.face.link(side.object, None, 0, 1000, None)") == (LIBRARY, PARAM_INVALID)
    client.unlink(SERVER, port)  # what is not linked can be unlinked
    client.unlink(SERVER)
    client.plan(f"link=fail:{ALREADY_LINK}")
    assert refused(client.link, SERVER, port) == (LIBRARY, ALREADY_LINK)


def test_listener_that_does_not_answer_is_a_timeout(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert refused(pair.client.link, SERVER, port, 100) == (LIBRARY, TIMEOUT)
        assert refused(pair.client.unlink, SERVER, port, 100) == (LIBRARY, TIMEOUT)


def test_many_clusters_get_their_own_statuses_and_the_last_failure_is_the_calls(pair: Pair) -> None:
    _, client, port = pair
    many = """
from native_face import *
clusters = (Cluster * 3)(Cluster(11, IP, IP, 0, port), Cluster(14, IP, IP, 0, closed), Cluster(15, IP, b"", 0, 0))
statuses = (c_uint32 * 3)()
try:
    side.face.link(side.object, clusters, 3, 10_000, statuses)
except Refused as refused:
    result = refused.code, list(statuses)
"""
    assert client.run(many, port=port, closed=free_port()) == (PARAM_INVALID, [0, LINK_FAILED, PARAM_INVALID])


def test_links_decide_whether_the_role_may_change(pair: Pair) -> None:
    server, client, port = pair
    client.link(SERVER, port)
    assert refused(server.set_role, 1) == (LIBRARY, EXIST_LINK)
    assert refused(client.set_role, 1) == (LIBRARY, EXIST_LINK)
    client.unlink(SERVER, port)
    server.set_role(2)  # stops listening
    assert refused(client.link, SERVER, port) == (LIBRARY, LINK_FAILED)
    other = free_port()
    server.set_role(1, ListenIpInfo=f"127.0.0.1:{other}")
    client.link(SERVER, other)


def test_transfers_that_the_library_rejects(pair: Pair) -> None:
    _, client, port = pair
    assert refused(client.pull_cache, SERVER, 1, "a") == (LIBRARY, NOT_YET_LINK)
    client.link(SERVER, port)
    pull = {
        NOT_EXIST: [("a", 9, {}), ("none", 1, {})],
        PARAM_INVALID: [
            ("a", 1, {"bytes": 0}),
            ("a", 1, {"bytes": 65}),
            ("a", 1, {"local_batch": 8}),
            ("a", 1, {"tensors_per_layer": 0}),
            ("a", 1, {"src_first_layer": -2}),
            ("a", 1, {"src_first_layer": 0, "src_last_layer": 1, "dst_first_layer": 0, "dst_last_layer": 0}),
            ("a", 1, {"src_first_layer": 2, "src_last_layer": 2, "dst_first_layer": 0, "dst_last_layer": 0}),
            ("a", 1, {"src_first_layer": 0, "src_last_layer": 0, "dst_first_layer": 2, "dst_last_layer": 2}),
        ],
        DEVICE_MEM_ERROR: [("a", 1, {"remote_batch": 8})],  # the library does not count the peer's rows
    }
    for code, cases in pull.items():
        for name, remote, fields in cases:
            assert refused(client.pull_cache, SERVER, remote, name, **fields) == (LIBRARY, code), fields
    assert refused(client.pull_cache, CLIENT, 1, "a") == (LIBRARY, PARAM_INVALID)  # itself
    for src, dst, fields in (
        ([], [], {}),
        ([1], [1, 2], {}),
        ([8], [1], {}),
        ([1], [8], {}),
        ([2**64 - 1], [2**64 - 1], {}),
        ([1], [1], {"remote_batch": 1}),
    ):
        assert refused(client.pull_blocks, SERVER, 1, "a", src, dst, **fields) == (LIBRARY, PARAM_INVALID), (src, dst)
        assert refused(client.push_blocks, SERVER, 1, "a", src, dst, **fields) == (LIBRARY, PARAM_INVALID), (src, dst)
    for fields in (
        {"bytes": 64},
        {"local_placement": 0},
        {"local_tensors": 0},
        {"local_tensors": 6},
        {"local_batch": 8},
        {"remote_batch": 8},
        {"tensors_per_layer": 3},
    ):
        assert refused(client.push_cache, SERVER, 1, "a", **fields) == (LIBRARY, PARAM_INVALID), fields
    assert refused(client.push_cache, SERVER, 9, "a") == (LIBRARY, NOT_EXIST)


def test_peers_table_is_the_one_of_the_first_transfer_until_the_next_link(pair: Pair) -> None:
    server, client, port = pair
    client.link(SERVER, port)
    client.pull_cache(SERVER, 1, "a")
    assert server.add("later", 7, 4, (8, 64)) == 2
    assert refused(client.pull_cache, SERVER, 2, "a") == (LIBRARY, NOT_EXIST)
    server.unregister("a")
    client.pull_cache(SERVER, 1, "a", remote_batch=3)  # the old addresses are still there
    client.unlink(SERVER, port)
    client.link(SERVER, port)
    assert refused(client.pull_cache, SERVER, 1, "a") == (LIBRARY, NOT_EXIST)
    client.pull_cache(SERVER, 2, "a")
    wanted = patterns(2, 4, 512)
    for tensor in range(4):
        wanted[tensor][:64] = pattern(7, tensor, 512)[:64]
    same(client, "a", wanted)


# ---- what fails, stalls or comes late


def test_stalled_peer_is_a_timeout_and_a_new_link_works_again(pair: Pair) -> None:
    server, client, port = pair
    client.destroy()
    client.open(CLIENT, SyncKvCacheWaitTime=200)
    client.add("a", 2, 4, (8, 64))
    client.link(SERVER, port)
    server.plan("serve=stall:0:60000")
    began = time.monotonic()
    assert refused(client.pull_cache, SERVER, 1, "a") == (LIBRARY, TIMEOUT)
    assert 0.2 <= time.monotonic() - began < 2
    assert refused(client.pull_cache, SERVER, 1, "a") == (LIBRARY, SUSPECT_REMOTE_ERROR)  # until the link is made anew
    server.run("side.standin().standin_release()")
    client.unlink(SERVER, port)
    client.link(SERVER, port)
    client.pull_cache(SERVER, 1, "a")


def test_failure_on_the_peers_side_is_the_transfers_status(pair: Pair) -> None:
    server, client, port = pair
    client.link(SERVER, port)
    server.plan(f"serve=fail:{DEVICE_MEM_ERROR}")
    assert refused(client.pull_cache, SERVER, 1, "a") == (LIBRARY, DEVICE_MEM_ERROR)
    client.pull_cache(SERVER, 1, "a")


def test_late_answer_has_moved_the_bytes(pair: Pair) -> None:
    _, client, port = pair
    client.link(SERVER, port)
    client.plan(f"PullKvCache=late:{TIMEOUT}:100")
    assert refused(client.pull_cache, SERVER, 1, "a", remote_batch=1, local_batch=1) == (LIBRARY, TIMEOUT)
    wanted = patterns(2, 4, 512)
    for tensor in range(4):
        wanted[tensor][64:128] = pattern(1, tensor, 512)[64:128]
    same(client, "a", wanted)


def test_other_calls_go_on_beside_a_stalled_one_and_destroy_waits_for_it(pair: Pair) -> None:
    _, client, port = pair
    client.link(SERVER, port)
    beside = """
from peers import Background, wait_until
runtime = side.standin()
side.plan("PullKvCache=stall:0:60000")
number = side.object
stalled = Background(side.pull_cache, 11, 1, "a")
wait_until(lambda: runtime.standin_waiting() == 1, "the call stalls")
side.pull_blocks(11, 1, "a", [1], [1])
ending = Background(side.destroy)
def forgotten():
    try:
        side.face.unregister(number, 99)
    except native_face.Refused as refused:
        return refused.code == native_face.UNKNOWN_OBJECT
wait_until(forgotten, "the object is forgotten")
before = stalled.running(), ending.running()
runtime.standin_release()
result = before, stalled.result(), ending.result()
"""
    assert client.run(beside) == ((True, True), None, None)


def test_peer_that_dies_ends_transfers_and_its_successor_can_be_linked(pair: Pair, face: Path, libraries: Path) -> None:
    client, port = pair.client, free_port()
    with remote_side(face, libraries) as victim:
        victim.open(VICTIM, port)
        victim.add("a", 6, 4, (8, 64))
        client.link(VICTIM, port)
        client.pull_cache(VICTIM, 1, "a")
        victim.peer.kill()
    assert refused(client.pull_cache, VICTIM, 1, "a") == (LIBRARY, SUSPECT_REMOTE_ERROR)
    assert refused(client.link, VICTIM, port) == (LIBRARY, LINK_FAILED)
    with remote_side(face, libraries) as successor:
        successor.open(VICTIM, port)
        successor.add("a", 5, 4, (8, 64))
        client.link(VICTIM, port)
        client.pull_cache(VICTIM, 1, "a")
        wanted = patterns(2, 4, 512)
        for tensor in range(4):
            wanted[tensor][:64] = pattern(5, tensor, 512)[:64]
        same(client, "a", wanted)


def test_environment_plans_failures_too(face: Path, libraries: Path) -> None:
    with remote_side(face, libraries, STANDIN_FAULTS=f"Initialize=fail:{FAILED} aclrtMalloc=fail:5") as side:
        side.create(CLIENT)
        assert refused(side.initialize) == (LIBRARY, FAILED)
        assert refused(side.malloc, ON_DEVICE, 1) == (RUNTIME, 5)
        side.initialize()
