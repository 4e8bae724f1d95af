"""Where prepared data lives: a folder per content hash in the user's cache, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fp8repro.cache import cache_root, writable_cache
from fp8repro.errors import UserError


def content_key(settings: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Hash of plain settings and of the contents (not names or times) of files, in order."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:24]


def cached_folder(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `<cache>/<kind>/<key>`; `build` fills it where it is missing.

    It is built beside and renamed, so that an interrupted or a concurrent build is never read.
    """
    parent = cache_root() / kind
    folder = parent / key
    if folder.is_dir():
        return folder
    writable_cache(kind)
    building = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=parent))
    try:
        try:
            build(building)
        except OSError as error:
            # What cannot be read is a user's file, and keeps its name.
            if error.filename is not None and not str(error.filename).startswith(str(building)):
                raise
            raise UserError(f"FP8REPRO_CACHE: {str(folder)!r} cannot be written ({error.strerror})") from None
        try:
            building.rename(folder)
        except OSError:
            # Another process was faster; its folder holds the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder
