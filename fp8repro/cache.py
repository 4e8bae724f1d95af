"""Where everything that can be made again lives: prepared data, compiled engines."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$FP8REPRO_CACHE`, else `$XDG_CACHE_HOME/fp8repro`, else `~/.cache/fp8repro`."""
    own, shared = os.environ.get("FP8REPRO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared) / "fp8repro" if shared else Path.home() / ".cache" / "fp8repro"
