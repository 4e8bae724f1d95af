"""What a trained model made of each example, in a run's folder: training writes it, results trust no byte of it."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fp8repro.paper.run_folder import CORRECT, HYPOTHESES, REFERENCES, Unreadable, read_file

MOST_EXAMPLES = 4_000_000
# Translations of a test set are some thousand lines of some hundred kilobytes.
MAX_TEXT_BYTES, MOST_LINES = 10_000_000, 20_000


def correct_json(correct: NDArray[np.bool_], order: str) -> str:
    """The content of `CORRECT`: a bit for each example.

    Args:
        correct: [N].
        order: a hash of the examples in their order; only equal ones can be compared one by one.
    """
    bits = base64.b64encode(np.packbits(correct).tobytes()).decode()
    return json.dumps({"examples": len(correct), "order": order, "correct": bits}, indent=2) + "\n"


def read_correct(folder: Path) -> tuple[str, NDArray[np.bool_]] | None:
    """Order and correctness [N] of a run's validation examples; None where there is no usable record of them."""
    try:
        values = read_file(folder / CORRECT)
        count, order, bits = values.get("examples"), values.get("order"), values.get("correct")
        if not isinstance(count, int) or not isinstance(order, str) or not isinstance(bits, str):
            return None
        packed = np.frombuffer(base64.b64decode(bits, validate=True), dtype=np.uint8)
    except (Unreadable, binascii.Error, ValueError):
        return None
    if isinstance(count, bool) or not 0 < count <= MOST_EXAMPLES or len(packed) != -(-count // 8):
        return None
    return order, np.unpackbits(packed, count=count).astype(bool)


def read_translations(folder: Path) -> tuple[list[str], list[str]] | None:
    """A run's translations of the test split and their references; None where there is no usable record of them."""
    hypotheses, references = (_lines(folder / name) for name in (HYPOTHESES, REFERENCES))
    if not hypotheses or references is None or len(hypotheses) != len(references) or len(hypotheses) > MOST_LINES:
        return None
    return hypotheses, references


def examples_recorded(folder: Path) -> bool:
    """True when a run's folder has a record of its examples, usable or not."""
    return any((folder / name).exists() for name in (CORRECT, HYPOTHESES))


def _lines(path: Path) -> list[str] | None:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        # What does not end with a line's end was cut off.
        whole = len(content) <= MAX_TEXT_BYTES and content.endswith(b"\n")
        return content.decode("utf-8").split("\n")[:-1] if whole else None
    except (OSError, ValueError):
        return None
