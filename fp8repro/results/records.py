"""Finds the folders that training wrote and reads what they hold. Read-only; trusts no byte of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8repro.errors import UserError
from fp8repro.paper.plan import cell_name
from fp8repro.paper.run_folder import (
    CONFIG,
    METRICS,
    SUMMARY,
    Unreadable,
    flat,
    metrics_rows,
    read_file,
    read_or_empty,
    settings_of,
)

SCORES = ("top1", "bleu")


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


def read_records(roots: Iterable[str | Path]) -> tuple[list[RunRecord], list[str]]:
    """All finished runs under some folders, sorted by folder, and a line for each folder that holds no usable record.

    Raises:
        UserError: a root that is not a folder.
    """
    records, problems = [], []
    for folder in _run_folders(roots):
        try:
            records.append(_read_record(folder))
        except Unreadable as error:
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
    """Summaries of the runs under some folders that ended in failure, unreadable ones left out; "cell" says whose."""
    found = []
    for folder in _run_folders(roots):
        summary = read_or_empty(folder / SUMMARY)
        if summary.get("status") == "failed" and isinstance(summary.get("experiment"), str):
            with suppress(Unreadable):
                settings = flat(read_or_empty(folder / CONFIG))
                found.append(summary | {"cell": cell_name(summary["experiment"], settings)})
    return found


def read_begun(roots: Iterable[str | Path]) -> list[RunRecord]:
    """Runs of an experiment under some folders that have no summary yet: without a score, unreadable ones left out."""
    found = []
    for folder in _run_folders(roots):
        if (folder / SUMMARY).exists():
            continue
        with suppress(Unreadable):
            config = read_file(folder / CONFIG)
            settings = flat(config)
            names = ("model.name", "data.name", "precision.name", "loss_scaling.policy", "profile", "experiment")
            texts = [settings.get(name) for name in names]
            seed = settings.get("seed")
            if all(isinstance(text, str) for text in texts) and isinstance(seed, int) and not isinstance(seed, bool):
                model, data, precision, policy, profile, experiment = map(str, texts)
                found.append(
                    RunRecord(
                        folder, model, data, precision, _policy(policy, settings), profile, seed, "", math.nan,
                        settings_of(config), {"experiment": experiment},
                    )
                )  # fmt: skip
    return found


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
        raise Unreadable(f"unfinished, it has no {SUMMARY} yet")
    summary = read_file(folder / SUMMARY)
    config = read_file(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if summary.get("status", "finished") != "finished":
        raise Unreadable(f"its status is {summary['status']!r:.40}, only finished runs count")
    texts: dict[str, str] = {}
    for key in ("model", "data", "precision", "loss_scaling", "profile"):
        text = summary.get(key)
        if not isinstance(text, str):
            raise Unreadable(f"{SUMMARY}: {key}: got {text!r:.40}, expected a text")
        texts[key] = text
    seed = summary.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise Unreadable(f"{SUMMARY}: seed: got {seed!r:.40}, expected a whole number")
    metric = next((name for name in SCORES if summary.get(name) is not None), None)
    if metric is None:
        raise Unreadable(f"{SUMMARY}: it has neither {' nor '.join(SCORES)}")
    score = summary[metric]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 100:
        raise Unreadable(f"{SUMMARY}: {metric}: got {score!r:.40}, expected a number from 0 to 100")
    settings = flat(config)
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
        raise Unreadable(f"{SUMMARY}: bits: got {last!r:.40}, expected a version's number")
    return first, last


def _policy(policy: str, settings: Mapping[str, Any]) -> str:
    scale = settings.get("loss_scaling.scale")
    if policy == "constant" and isinstance(scale, (int, float)) and math.isfinite(scale):
        return f"constant {scale:,.10g}"
    return policy
