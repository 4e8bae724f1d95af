"""A run's folder: the names of its files and how they are read. Training writes it, results read it.

No byte of a file is trusted: what is damaged, too large or foreign is an `Unreadable`, never a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fp8repro.errors import UserError
from fp8repro.settings.lengths import with_units
from fp8repro.settings.schema import LATER_SETTINGS, NO_EFFECT

SUMMARY, CONFIG, METRICS, ENVIRONMENT = "summary.json", "config.yaml", "metrics.jsonl", "environment.json"
# Bits of the last evaluation's images; translations of the test split and what they are scored against.
CORRECT, HYPOTHESES, REFERENCES = "val.correct.json", "test.hypotheses.txt", "test.references.txt"
CHECKPOINTS, TENSORBOARD, LOCK = "checkpoints", "tensorboard", ".lock"
# A record's own files are a few kilobytes; whatever is larger is something else.
MAX_BYTES = 1_000_000
MAX_SETTINGS, MAX_NAME = 2_000, 500
# A line of metrics: the telemetry of a large model takes some hundred kilobytes.
MAX_LINE = 4_000_000


class Unreadable(UserError):
    """Why a file or folder is no record: one line."""


class _Loader(yaml.SafeLoader):
    """YAML without merge keys, which our files never have and which can make a small file unfold without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave a merge key as it stands; constructing it then fails."""


def read_file(path: Path) -> dict[str, Any]:
    """What a run's .json or .yaml file holds.

    Raises:
        Unreadable: it is missing, damaged, over `MAX_BYTES`, or no mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise Unreadable(f"{path.name} is over {MAX_BYTES} bytes, not a run's record")
        text = content.decode("utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unreadable(f"{path.name} cannot be read ({reason:.100})") from None
    if not isinstance(values, dict):
        raise Unreadable(f"{path.name} holds no mapping, not a run's record")
    return values


def read_or_empty(path: Path) -> dict[str, Any]:
    """What a run's .json or .yaml file holds; nothing where it cannot be read."""
    try:
        return read_file(path)
    except Unreadable:
        return {}


def metrics_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one at a time; none where there is no such file.

    A line that a crash cut short, or that is longer than any of ours, is left out.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with (folder / METRICS).open("rb") as file:
            while line := file.readline(MAX_LINE):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{folder}: {METRICS} cannot be read ({error.strerror})") from None


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration's plain values that decide a result, flat, seed left out.

    Raises:
        Unreadable: they are more than any run has.
    """
    settings = {**LATER_SETTINGS, **flat(with_units(config))}
    return {key: value for key, value in settings.items() if key not in NO_EFFECT}


def saved_settings(folder: Path) -> dict[str, Any]:
    """`settings_of` a run's config.yaml.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return settings_of(read_file(folder / CONFIG))
    except Unreadable as error:
        raise UserError(f"{folder}: {error}") from None


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as {"trainer.epochs": 30, "optimizer.betas[0]": 0.9, ...}.

    Raises:
        Unreadable: they are more than any run has.
    """
    found: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", values)]
    while pending:
        prefix, value = pending.pop()
        if isinstance(value, Mapping) and value:
            pending += [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
        elif isinstance(value, list) and value:
            pending += [(f"{prefix}[{number}]", item) for number, item in enumerate(value)]
        else:
            found[prefix] = value
        # YAML's references can make a small file unfold without end.
        if len(found) + len(pending) > MAX_SETTINGS or len(prefix) > MAX_NAME:
            raise Unreadable(f"{CONFIG} has over {MAX_SETTINGS} settings or names over {MAX_NAME} characters")
    return found
