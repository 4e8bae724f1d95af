"""Training: the loop and its parts, evaluation, checkpoints, the records of a run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8repro.training.loop import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """`train`, found at first use: reading records or scoring text must not wait for the loop's imports."""
    if name != "train":
        raise AttributeError(f"module 'fp8repro.training' has no attribute {name!r}")
    return import_module("fp8repro.training.loop").train
