"""Software and hardware of a run, as plain values. Never a path, a host name or a user name."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fp8repro
from fp8repro.numerics.reference import BITS_VERSION

PACKAGES = ("torch", "torchvision", "triton", "numpy", "scikit-learn", "hydra-core")


def describe_environment() -> dict[str, Any]:
    """Versions, hardware, thread count and code version of this process."""
    cuda = torch.cuda.is_available()
    return {
        "fp8repro": fp8repro.__version__,
        "bits": BITS_VERSION,
        "commit": git_commit(),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def cpu_model() -> str:
    """The processor's name as it gives it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str | None:
    """The commit of the code's own checkout, "-dirty" appended if changed; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    # An installed package may lie inside somebody else's repository.
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return f"{head}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
