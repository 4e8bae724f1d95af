"""Compiles the C++ sources beside this file for this very machine, once, into the user's cache.

A library's name holds a hash of everything its code depends on, so a shared home never runs another machine's code.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fp8repro.cache import cache_root, writable_cache
from fp8repro.errors import UserError

SOURCES = Path(__file__).parent
# No contraction: a fused multiply-add would round differently from machine to machine.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-w", "-fvisibility=hidden")


@functools.cache
def load(name: str, march: str = "native") -> ctypes.CDLL | None:
    """The library of `<name>.cpp`, or None where it cannot be built; one line on stderr says why.

    Args:
        name: source file without its ending.
        march: the compiler's -march; tests build the code of lesser machines.
    """
    if os.environ.get("FP8REPRO_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_library(name, march)))
    except (OSError, UserError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:300]
        print(f"fp8repro: no native CPU engine ({name}): {reason}; using torch, same results, slower", file=sys.stderr)
        return None


def _library(name: str, march: str) -> Path:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        raise OSError("no C++ compiler (g++, c++ or clang++) found")
    path = cache_root() / "native" / f"{name}-{_key(compiler, name, march)}.so"
    if not path.exists():
        writable_cache("native")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            _compile(compiler, SOURCES / f"{name}.cpp", built, march)
            # Atomic: another process sees the whole library or none, and two builders leave the same one.
            built.replace(path)
    return path


def _key(compiler: str, name: str, march: str) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    for part in (version, torch.__version__, march, repr(FLAGS), platform.machine(), _cpu()):
        digest.update(part.encode())
    for source in sorted([*SOURCES.glob("*.h"), SOURCES / f"{name}.cpp"]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def _cpu() -> str:
    """Model and instruction sets of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, source: Path, library: Path, march: str) -> None:
    common = [compiler, *FLAGS, f"-march={march}"]
    # OpenMP only when compiling: linking it would load a second runtime beside the one that torch brings.
    for openmp in (["-fopenmp"], []):
        compiled = library.with_suffix(".o")
        commands = (
            [*common, *openmp, "-c", str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(library)],
        )
        results = [subprocess.run(command, capture_output=True, text=True) for command in commands]
        if all(result.returncode == 0 for result in results) and _loads(library):
            return
    complaints = [line for result in results for line in result.stderr.splitlines() if "error" in line]
    raise OSError(complaints[0] if complaints else f"{compiler} failed on {source.name}")


def _loads(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOW)
    except OSError:
        return False
    return True
