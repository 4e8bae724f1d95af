"""Which lines of a run's metrics.jsonl can be used. A line that says something impossible is left out, and counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

MOST_STEPS, MOST_EPOCHS, MOST_COUNTED = 10**7, 10**6, 2**62
# FP32's exponents with its subnormals.
LEAST_EXPONENT, MOST_EXPONENTS = -149, 280


def number(value: Any) -> TypeGuard[float]:
    """True for a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def usable(row: Mapping[str, Any]) -> bool:
    """True when a line's step, epoch and lists are what training writes; figures may still be missing."""
    if not _count(row.get("step"), MOST_STEPS) or not isinstance(row.get("kind"), str):
        return False
    if "epoch" in row and not (number(row["epoch"]) and 0 <= row["epoch"] <= MOST_EPOCHS):
        return False
    if row["kind"] not in ("telemetry", "convert"):
        return True
    rows = row.get("rows")
    sound = _of_telemetry if row["kind"] == "telemetry" else _of_report
    return isinstance(rows, list) and all(isinstance(inner, dict) and sound(inner) for inner in rows)


def _of_report(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("name"), str)


def _of_telemetry(row: Mapping[str, Any]) -> bool:
    if not isinstance(row.get("layer"), str) or not isinstance(row.get("role"), str):
        return False
    nonzero, underflow = row.get("nonzero"), row.get("underflow")
    # Of the updates of masters, other things are counted.
    if not _count(nonzero) or (row["role"] != "master" and not (_count(underflow) and _count(nonzero - underflow))):
        return False
    exponents = row.get("exponents")
    if exponents is None:
        return True
    if not isinstance(exponents, list) or len(exponents) != 2:
        return False
    lowest, counts = exponents
    if not isinstance(lowest, int) or not isinstance(counts, list) or len(counts) > MOST_EXPONENTS:
        return False
    return LEAST_EXPONENT <= lowest <= -LEAST_EXPONENT and all(map(_count, counts))


def _count(value: Any, most: int = MOST_COUNTED) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
