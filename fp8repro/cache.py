"""Where everything that can be made again lives: prepared data, compiled engines."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fp8repro.errors import UserError


def cache_root() -> Path:
    """`$FP8REPRO_CACHE`, else `$XDG_CACHE_HOME/fp8repro`, else `~/.cache/fp8repro`.

    Raises:
        UserError: none of them says a folder: there is no home.
    """
    own, shared = os.environ.get("FP8REPRO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    # The specification has a relative one ignored.
    if shared and Path(shared).is_absolute():
        return Path(shared) / "fp8repro"
    try:
        return Path.home() / ".cache" / "fp8repro"
    except RuntimeError:
        raise UserError("FP8REPRO_CACHE: missing where there is no home, expected a folder for prepared data") from None


def writable_cache(kind: str) -> Path:
    """The cache's folder for one kind of thing, made where it is missing.

    Raises:
        UserError: it cannot be written.
    """
    folder = cache_root() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    # A name with a null byte is a ValueError.
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"FP8REPRO_CACHE: {str(folder)!r} cannot be written ({reason}), expected a folder with room"
        ) from None
    return folder
