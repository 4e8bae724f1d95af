"""Run records: finds the folders that training wrote and reads what they hold. Read-only; trusts no byte of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fp8repro.errors import UserError
from fp8repro.settings.lengths import with_units
from fp8repro.settings.schema import LATER_SETTINGS, NO_EFFECT

SUMMARY, CONFIG, METRICS = "summary.json", "config.yaml", "metrics.jsonl"
SCORES = ("top1", "bleu")
# A record's own files are a few kilobytes; whatever is larger is something else.
MAX_BYTES = 1_000_000
MAX_SETTINGS, MAX_NAME = 2_000, 500
# A line of metrics: the telemetry of a large model takes some hundred kilobytes.
MAX_LINE = 4_000_000


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        folder: where it lies.
        model, data, precision, loss_scaling, profile: what ran; a constant loss scale carries its value.
        seed: of the run.
        metric: "top1" (percent) or "bleu". score: its final value.
        settings: flat settings that decide the result, seed left out; runs that agree in them differ by chance only.
        bits: versions of the bits (`reference.BITS_VERSION`) that made it, at its first step and at its last.
        summary: the whole of summary.json.
    """

    folder: Path
    model: str
    data: str
    precision: str
    loss_scaling: str
    profile: str
    seed: int
    metric: str
    score: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    bits: tuple[int, int] = (1, 1)


class _Loader(yaml.SafeLoader):
    """YAML without merge keys, which our files never have and which can make a small file unfold without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave a merge key as it stands; constructing it then fails."""


class _Unreadable(Exception):
    """Why a folder's record cannot be used."""


def read_records(roots: Iterable[str | Path]) -> tuple[list[RunRecord], list[str]]:
    """All finished runs under some folders, sorted by folder, and a line for each folder that holds no usable record.

    Raises:
        UserError: a root that is not a folder.
    """
    records, problems = [], []
    for folder in _run_folders(roots):
        try:
            records.append(_read_record(folder))
        except _Unreadable as error:
            problems.append(f"{folder}: {error}")
    return records, problems


def require_same_bits(records: Iterable[RunRecord]) -> None:
    """Refuse to put runs side by side that were made with different versions of the bits.

    Raises:
        UserError: names two of them.
    """
    kinds: dict[tuple[int, int], RunRecord] = {}
    for record in records:
        kinds.setdefault(record.bits, record)
    if len(kinds) > 1:
        (a, first), (b, second), *_ = kinds.items()
        raise UserError(
            f"runs: got {first.folder} with random bits of version {_version(a)} and {second.folder} with those of "
            f"version {_version(b)}, expected one version: what differs may be chance"
        )


def _version(bits: tuple[int, int]) -> str:
    return str(bits[0]) if bits[0] == bits[1] else f"{bits[0]}, then {bits[1]}"


def read_failures(roots: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Summaries of the runs under some folders that ended in failure, unreadable ones left out."""
    failures = []
    for folder in _run_folders(roots):
        try:
            summary = _mapping(folder / SUMMARY, json.loads)
        except _Unreadable:
            continue
        if summary.get("status") == "failed":
            failures.append(summary)
    return failures


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration's plain values that decide a result, flat, seed left out."""
    flat = {**LATER_SETTINGS, **_flat(with_units(config))}
    return {key: value for key, value in flat.items() if key not in NO_EFFECT}


def saved_settings(folder: Path) -> dict[str, Any]:
    """`settings_of` a run's config.yaml.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return settings_of(_mapping(folder / CONFIG, _read_yaml))
    except _Unreadable as error:
        raise UserError(f"{folder}: {error}") from None


def read_yaml_file(path: Path) -> dict[str, Any]:
    """A record's YAML file; empty where it cannot be read."""
    try:
        return _mapping(path, _read_yaml)
    except _Unreadable:
        return {}


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json as it stands, empty where it has none yet.

    Raises:
        UserError: it cannot be read.
    """
    if not (folder / SUMMARY).exists():
        return {}
    try:
        return _mapping(folder / SUMMARY, json.loads)
    except _Unreadable as error:
        raise UserError(f"{folder}: {error}") from None


def metrics_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one at a time.

    A line that was cut short by a crash, or that is longer than any of ours, is left out.

    Raises:
        UserError: there is no such file, or it cannot be read.
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
    except OSError as error:
        raise UserError(f"{folder}: {METRICS} cannot be read ({error.strerror})") from None


def read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl of one kind; see `metrics_rows`."""
    return [row for row in metrics_rows(folder) if row.get("kind") == kind]


def _run_folders(roots: Iterable[str | Path]) -> list[Path]:
    found = set()
    for root in roots:
        if not Path(root).is_dir():
            raise UserError(f"runs: got {str(root)!r}, expected a folder that holds runs")
        for folder, folders, names in os.walk(root):
            if SUMMARY in names or (CONFIG in names and METRICS in names):
                found.add(Path(folder))
                folders.clear()
    return sorted(found)


def _read_record(folder: Path) -> RunRecord:
    if not (folder / SUMMARY).is_file():
        raise _Unreadable(f"unfinished, it has no {SUMMARY} yet")
    summary = _mapping(folder / SUMMARY, json.loads)
    config = _mapping(folder / CONFIG, _read_yaml) if (folder / CONFIG).is_file() else {}
    if summary.get("status", "finished") != "finished":
        raise _Unreadable(f"its status is {summary['status']!r:.40}, only finished runs count")
    texts: dict[str, str] = {}
    for key in ("model", "data", "precision", "loss_scaling", "profile"):
        text = summary.get(key)
        if not isinstance(text, str):
            raise _Unreadable(f"{SUMMARY}: {key}: got {text!r:.40}, expected a text")
        texts[key] = text
    seed = summary.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise _Unreadable(f"{SUMMARY}: seed: got {seed!r:.40}, expected a whole number")
    metric = next((name for name in SCORES if summary.get(name) is not None), None)
    if metric is None:
        raise _Unreadable(f"{SUMMARY}: it has neither {' nor '.join(SCORES)}")
    score = summary[metric]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 100:
        raise _Unreadable(f"{SUMMARY}: {metric}: got {score!r:.40}, expected a number from 0 to 100")
    settings = _flat(config)
    texts["loss_scaling"] = _policy(texts["loss_scaling"], settings)
    deciding = settings_of(config)
    # "auto" differs from machine to machine; the record says what it came to.
    deciding["backend"] = str(summary.get("backend"))
    if summary.get("rollbacks"):
        deciding["trainer.on_divergence"] = "rollback"
    scored = {"metric": metric, "score": float(score), "settings": deciding, "summary": summary}
    return RunRecord(folder, **texts, seed=seed, **scored, bits=_bits(summary))  # type: ignore[arg-type]


def _bits(summary: Mapping[str, Any]) -> tuple[int, int]:
    last = summary.get("bits", 1)
    first = summary.get("bits_at_first", last)
    if not all(isinstance(version, int) and not isinstance(version, bool) for version in (first, last)):
        raise _Unreadable(f"{SUMMARY}: bits: got {last!r:.40}, expected a version's number")
    return first, last


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _Unreadable(f"{path.name} is over {MAX_BYTES} bytes, not a run's record")
        values = parse(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _Unreadable(f"{path.name} cannot be read ({reason:.100})") from None
    if not isinstance(values, dict):
        raise _Unreadable(f"{path.name} holds no mapping, not a run's record")
    return values


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as {"trainer.epochs": 30, "optimizer.betas[0]": 0.9, ...}."""
    flat: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", values)]
    while pending:
        prefix, value = pending.pop()
        if isinstance(value, Mapping) and value:
            pending += [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
        elif isinstance(value, list) and value:
            pending += [(f"{prefix}[{number}]", item) for number, item in enumerate(value)]
        else:
            flat[prefix] = value
        # YAML's references can make a small file unfold without end.
        if len(flat) + len(pending) > MAX_SETTINGS or len(prefix) > MAX_NAME:
            raise _Unreadable(f"{CONFIG} has over {MAX_SETTINGS} settings or names over {MAX_NAME} characters")
    return flat


def _policy(policy: str, settings: Mapping[str, Any]) -> str:
    scale = settings.get("loss_scaling.scale")
    if policy == "constant" and isinstance(scale, (int, float)) and math.isfinite(scale):
        return f"constant {scale:,.10g}"
    return policy
