"""The C++ CPU engine, compiled for this machine at first use; absent where there is no compiler."""

from __future__ import annotations

from typing import Any


def available() -> bool:
    """True when the engine is compiled and loaded."""
    return False


def round_into(*arguments: Any) -> None:
    """See `fp8repro.quantizer.round_into`."""
    raise RuntimeError("the native engine is not available")
