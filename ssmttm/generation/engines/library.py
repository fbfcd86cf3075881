"""The compiled library of the fused step: built at first use with the compiler at hand, and kept in a cache folder.

The instruction set is that of the processor at hand; all flags and the source are part of the file's name, so that
machines that share a home folder do not share a library that one of them cannot run.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from ssmttm.errors import UserError
from ssmttm.files import atomic_write

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
INSTRUCTION_SETS = {  # best first: the processor's features that each needs, and its flags
    "avx512vnni": ({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}, (*AVX512, "-mavx512vnni")),
    "avx512": ({"avx512f", "avx512bw", "avx512dq", "avx512vl"}, AVX512),
    "avx2": ({"avx2", "fma"}, AVX2),
    "baseline": (set(), ()),  # SSE2 on x86, NEON on Arm
}
TUNING = {"AuthenticAMD": ("-DAMD",)}  # by the processor's maker: how the memory is read, see step.cpp
BUILD_SECONDS = 300


class Unavailable(Exception):
    """Why an engine cannot run; the message is one line."""


@cache
def instruction_set() -> str:
    """The best of INSTRUCTION_SETS that this processor has."""
    features = _features()
    return next(name for name, (needed, _) in INSTRUCTION_SETS.items() if needed <= features)


@cache
def library(name: str | None = None) -> ctypes.CDLL:
    """The library for an instruction set (default: the best), built if it is not in the cache. Raises Unavailable."""
    path = _build(name or instruction_set())
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded ({error})") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lib.ssmttm_size.argtypes, lib.ssmttm_size.restype = [ctypes.c_int], number
    lib.ssmttm_open.argtypes, lib.ssmttm_open.restype = [ctypes.c_int], pointer
    lib.ssmttm_close.argtypes, lib.ssmttm_close.restype = [pointer], None
    lib.ssmttm_step.argtypes, lib.ssmttm_step.restype = [*[pointer] * 6, ctypes.c_int], ctypes.c_int
    lib.ssmttm_draw.argtypes, lib.ssmttm_draw.restype = [pointer, pointer, number, pointer, pointer], None
    lib.ssmttm_run.argtypes = [*[pointer] * 6, number, pointer, pointer, number, number, ctypes.c_int, pointer, pointer]
    lib.ssmttm_run.restype = ctypes.c_int
    lib.ssmttm_convolve.argtypes = [*[pointer] * 3, number, number, pointer, pointer, *[number] * 4, pointer]
    lib.ssmttm_convolve.restype = None
    lib.ssmttm_scan.argtypes, lib.ssmttm_scan.restype = [*[pointer] * 9, number, pointer], None
    lib.ssmttm_read.argtypes, lib.ssmttm_read.restype = [pointer, number], ctypes.c_float
    return lib


class Pool:
    """The library's worker threads, which start with the first work that is worth it and sleep between jobs."""

    def __init__(self, lib: ctypes.CDLL, threads: int) -> None:
        self._close = lib.ssmttm_close
        self.address = lib.ssmttm_open(threads)

    def __del__(self) -> None:
        self._close(self.address)


def cache_folder() -> Path:
    """$SSMTTM_CACHE, or ssmttm in the user's cache folder."""
    if chosen := os.environ.get("SSMTTM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssmttm"


def _build(name: str) -> Path:
    """The path of the library, compiled if it is not there. Builds of several processes do not disturb each other: each
    compiles into a file of its own and renames it."""
    compiler = _compiler()
    flags = (*FLAGS, *INSTRUCTION_SETS[name][1], *TUNING.get(_processor("vendor_id"), ()))
    digest = hashlib.sha256(" ".join((platform.machine(), *flags)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    try:
        path = cache_folder() / f"step-{name}-{digest}.so"
        if path.is_file():
            return path
        if compiler is None:
            raise Unavailable("no C++ compiler was found (c++, g++ or clang++)")
        with atomic_write(path) as temporary:
            command = [compiler, *flags, str(SOURCE), "-o", str(temporary)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
            if run.returncode:
                raise Unavailable(f"{compiler} failed: {(run.stderr.strip() or 'no message').splitlines()[0]}")
    except (OSError, UserError, RuntimeError) as error:  # Path.home() raises RuntimeError where there is none
        raise Unavailable(f"it cannot be built in the cache folder ({error})") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{compiler} took longer than {BUILD_SECONDS} s") from error
    return path


def _compiler() -> str | None:
    names = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    return next((found for found in map(shutil.which, names) if found), None)


def _features() -> set[str]:
    """The processor's features as Linux names them; none elsewhere, where the baseline is used."""
    return set(_processor("flags").split())


def _processor(field: str) -> str:
    """What Linux tells of the first processor; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
