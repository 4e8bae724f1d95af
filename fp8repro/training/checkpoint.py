"""Checkpoints that survive a crash at any moment. Nothing in one is ever executed, and a damaged one is never used."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fp8repro.errors import RunFailure, UserError
from fp8repro.fields import Effect
from fp8repro.settings.lengths import with_units
from fp8repro.settings.schema import LATER_SETTINGS, settings_with
from fp8repro.training.untrusted import Harmful, require_harmless_file, require_plain

FORMAT = 1
CONTENT: dict[str, type] = {
    "format": int,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "data": dict,
    "identity": dict,
    "config": dict,
    "seconds": float,
    "results": dict,
}
# A resumed run may have others. `task.class_names` is part of task.data too; checkpoints did not always have it.
FREE_SETTINGS = settings_with(Effect.RECORD, Effect.PLACE, Effect.OUTCOME) | {"task.class_names"}


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return folder / f"step-{step:09d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def save_checkpoint(folder: Path, content: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint and remove old ones: the last `keep` stay, and the last one before the present skipped steps.

    Args:
        folder: the run's `checkpoints/`.
        content: plain values and tensors, as `CONTENT` says.
        keep: how many to leave.

    Raises:
        RunFailure: it cannot be written (a full disk); the ones before stay whole.
    """
    path = checkpoint_path(folder, content["step"])
    write_tensors(path, content)
    present = list_checkpoints(folder)
    sound = content["step"] - content["scaler"]["skipped_in_a_row"]
    # A rollback would need it.
    spared = [old for old in present if old <= checkpoint_path(folder, sound)][-1:]
    for old in present[:-keep]:
        if old not in spared:
            old.unlink(missing_ok=True)
            checksum_path(old).unlink(missing_ok=True)
    return path


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values and tensors so that `path` and its checksum exist whole or not at all.

    Raises:
        RunFailure: the file system refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        # The checksum comes first: a checkpoint that is there always has one.
        _write_text(checksum_path(path), f"{_sha256(temporary)}  {path.name}\n")
        temporary.replace(path)
        _flush_folder(path.parent)
    # torch.save reports a failing write as a RuntimeError.
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise RunFailure(f"checkpoints: {path.name} cannot be written ({reason}); the ones before are whole") from error


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a file of `write_tensors`; a file without a checksum beside it (a copy) is read too.

    Raises:
        UserError: it is missing or damaged.
    """
    if path.is_dir():
        raise UserError(
            f"checkpoint: {str(path)!r} is a folder, expected a file (resume=auto goes on with the run in run_dir)"
        )
    if not path.is_file():
        raise UserError(f"checkpoint: {str(path)!r} is missing, expected a file")
    expected = checksum_path(path)
    try:
        if expected.is_file() and expected.read_text().split()[:1] != [_sha256(path)]:
            raise UserError(f"checkpoint: {path.name} is damaged (its checksum differs)")
        require_harmless_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        require_plain(content)
    except UserError:
        raise
    # The unpickler and the archive reader raise all kinds of exceptions.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint: {path.name} cannot be read ({reason[:200]})") from None
    if not isinstance(content, dict):
        raise UserError(f"checkpoint: {path.name} holds a {type(content).__name__}, expected a dictionary")
    return content


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A whole checkpoint of a run.

    Raises:
        UserError: it is missing, damaged, or no checkpoint of this format.
    """
    content = read_tensors(path)
    wrong = [key for key, kind in CONTENT.items() if not isinstance(content.get(key), kind)]
    wrong += [] if isinstance(content.get("bits", 1), int) else ["bits"]
    if wrong or content["format"] != FORMAT:
        reason = f"{wrong[0]} is missing" if wrong else f"format {content['format']}"
        raise UserError(
            f"checkpoint: {path.name} is not a checkpoint of this version ({reason}, expected format {FORMAT})"
        )
    try:
        # They are read as settings.
        require_plain([content["identity"], content["config"]], tensors=False)
    except Harmful as error:
        raise UserError(f"checkpoint: {path.name} cannot be used ({error} among its settings)") from None
    return content | {name: with_units(content[name]) for name in ("identity", "config")}


def bits_of(content: Mapping[str, Any]) -> int:
    """The version of the bits (`reference.BITS_VERSION`) that made a checkpoint; version 1 was not recorded."""
    return int(content.get("bits", 1))


def newest_checkpoint(folder: Path, report: Callable[[str], None], until: int | None = None) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run, or None; damaged ones are reported, renamed and skipped.

    Args:
        folder: the run's `checkpoints/`.
        report: told of damage.
        until: latest step accepted.
    """
    for path in reversed(list_checkpoints(folder)):
        if until is not None and path > checkpoint_path(folder, until):
            continue
        try:
            return read_checkpoint(path)
        except UserError as error:
            report(f"{error}; the one before is used")
            path.replace(path.with_name(path.name + ".damaged"))
            checksum_path(path).unlink(missing_ok=True)
    return None


def require_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model, recipe, data set or schedule.

    Args:
        saved, wanted: the `identity` in the checkpoint and of the run.

    Raises:
        UserError: names the first setting that differs, and both values.
    """
    old, new = LATER_SETTINGS | flat(saved), LATER_SETTINGS | flat(wanted)
    if "task.batches" in new and "task.batches" not in old:
        raise UserError(
            "resume: the checkpoint is of an earlier version, which made other batches of sentences, expected a fresh "
            "run (fp8repro evaluate reads its weights)"
        )
    for name in sorted(old.keys() | new.keys()):
        if name not in FREE_SETTINGS and old.get(name) != new.get(name):
            raise UserError(
                f"resume: {name:.99} is {old.get(name)!r:.200} in the checkpoint and "
                f"{new.get(name)!r:.200} in this run, expected the same"
            )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def checksum_path(path: Path) -> Path:
    """Where a file's SHA-256 lies, in `sha256sum`'s form."""
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
