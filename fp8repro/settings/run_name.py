"""The one rule for the name of a run's folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

MAX_LENGTH = 120


def run_name(parts: Iterable[str], seed: int) -> str:
    """A folder name from what runs: any text can be a part, and none leads out of the parent folder or needs quotes."""
    name = "-".join(re.sub(r"[^\w.+]+", "_", part).strip("_") for part in parts).lstrip(".")
    if len(name) > MAX_LENGTH:
        name = f"{name[: MAX_LENGTH - 10]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}-seed{seed}"
