"""A run's folder: config, environment, metrics, summary. Locked while open; nothing is written outside of it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from fp8repro.errors import RunFailure, UserError
from fp8repro.paper.run_folder import (
    CHECKPOINTS,
    CONFIG,
    CORRECT,
    ENVIRONMENT,
    LOCK,
    METRICS,
    SUMMARY,
    TENSORBOARD,
    metrics_rows,
    read_or_empty,
)
from fp8repro.settings.run_name import run_name
from fp8repro.settings.schema import RunConfig
from fp8repro.training.environment import describe_environment

# Warnings of evaluations: they are repeated when the evaluation is.
GUESSING, NONFINITE_EVALUATION = "guessing", "nonfinite_evaluation"
EVALUATION_EVENTS = (GUESSING, NONFINITE_EVALUATION)


def run_folder(config: RunConfig) -> Path:
    """Where a run is recorded; without `run_dir`, named after model, data, precision, loss scaling and seed."""
    if config.run_dir:
        return Path(config.run_dir)
    scaling = config.loss_scaling
    parts = [config.model.name, config.data.name, config.precision.name]
    if scaling.policy != "none":
        parts.append(scaling.policy + (f"{scaling.scale:g}" if scaling.policy == "constant" else ""))
    return Path("runs") / run_name(parts, config.seed)


class RunFolder:
    """The records of one run; with `writes=False` (every process but the first) it does nothing."""

    def __init__(self, config: RunConfig, writes: bool = True) -> None:
        """Claim the folder.

        Raises:
            UserError: another run is in it, an earlier one was and neither `overwrite` nor `resume` says what to do,
                or it cannot be written.
        """
        self.config, self.writes = config, writes
        self.folder = run_folder(config)
        self._lock: Any = None
        if not writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("a")
        # A name with a null byte is a ValueError.
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"run_dir: {str(self.folder)!r} cannot be written ({reason})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"run_dir: {str(self.folder)!r} is in use by another run") from None
        if config.overwrite and config.resume == "never":
            self._clear()
        if self.exists and config.resume == "never":
            self.close()
            raise UserError(
                f"run_dir: {str(self.folder)!r} holds a run, expected overwrite=true, resume=auto or another run_dir"
            )

    @property
    def exists(self) -> bool:
        """True when the folder holds a run."""
        return (self.folder / METRICS).exists() or (self.folder / CHECKPOINTS).exists()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    def _clear(self) -> None:
        """Remove a former run's own files and nothing else."""
        for name in (METRICS, SUMMARY, CONFIG, ENVIRONMENT, CORRECT):
            (self.folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, TENSORBOARD):
            path = self.folder / name
            # The target of a link is not the run's own.
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)

    def begin(self, step: int, evaluated: int = 0) -> None:
        """Write config and environment; drop rows that will be written again.

        Args:
            step: where the run continues.
            evaluated: step of the last evaluation in its checkpoint; rows of later ones are dropped.
        """
        if not self.writes:
            return
        rows = [row for row in metrics_rows(self.folder) if isinstance(row.get("step"), int)] if step else []
        kept = [row for row in rows if row["step"] <= (evaluated if _is_of_evaluation(row) else step)]
        self._write(METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        (self.folder / SUMMARY).unlink(missing_ok=True)
        self._write(CONFIG, yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True))
        self._write(ENVIRONMENT, json.dumps(describe_environment(), indent=2) + "\n")

    def row(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        if not self.writes:
            return
        line = json.dumps(_finite({"kind": kind, "step": step, **values})) + "\n"
        try:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise RunFailure(_unwritable(self.folder / METRICS, error)) from error

    def event(self, step: int, what: str, text: str) -> None:
        """Append something that happened."""
        self.row("event", step, what=what, text=text)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json."""
        if self.writes:
            self._write(SUMMARY, json.dumps(_finite(dict(values)), indent=2) + "\n")

    def finished_summary(self) -> dict[str, Any] | None:
        """The summary of a run that finished here with the same decode settings, or None."""
        if not self.writes:
            return None
        values, config = read_or_empty(self.folder / SUMMARY), read_or_empty(self.folder / CONFIG)
        same = config.get("decode") == self.config.to_dict()["decode"]
        return values if same and values.get("status") == "finished" else None

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        temporary = path.with_name(name + ".tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise RunFailure(_unwritable(path, error)) from error

    def close(self) -> None:
        """Release the folder; remove it if no run began in it."""
        if self._lock is None:
            return
        if not self.exists:
            (self.folder / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        self._lock.close()
        self._lock = None

    def __enter__(self) -> RunFolder:
        """The record itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the folder."""
        self.close()


def _unwritable(path: Path, error: OSError) -> str:
    return f"run_dir: {str(path)!r} cannot be written ({error.strerror})"


def _is_of_evaluation(row: Mapping[str, Any]) -> bool:
    return row.get("kind") == "eval" or row.get("what") in EVALUATION_EVENTS


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
