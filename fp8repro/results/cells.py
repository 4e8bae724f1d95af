"""Finished runs by their cell of the plan, and the figures of a run that the studies compare."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fp8repro.errors import UserError
from fp8repro.fields import build_dataclass
from fp8repro.paper.plan import cell_name
from fp8repro.paper.run_folder import CONFIG, metrics_rows, read_or_empty
from fp8repro.precision.loss_scaling import make_scaler
from fp8repro.results.records import RunRecord, read_begun, read_failures, read_records, require_same_bits
from fp8repro.results.rows import MOST_STEPS, number, usable
from fp8repro.settings.lengths import with_units
from fp8repro.settings.schema import LossScalingConfig

# No kind of line that training writes.
UNUSABLE = ""


@dataclass(frozen=True)
class Run:
    """A finished run with its curves, read at first use."""

    record: RunRecord

    @cached_property
    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in metrics_rows(self.record.folder):
            kinds.setdefault(row["kind"] if usable(row) else UNUSABLE, []).append(row)
        return kinds

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of a kind."""
        return self._rows.get(kind, [])

    @property
    def unusable(self) -> int:
        """Lines of metrics.jsonl that are left out, for they say what no run does."""
        return len(self.rows(UNUSABLE))

    @cached_property
    def _config(self) -> dict[str, Any]:
        return with_units(read_or_empty(self.record.folder / CONFIG))

    def section(self, name: str) -> Mapping[str, Any]:
        """A group of the resolved configuration's settings; empty where the record has none."""
        found = self._config.get(name)
        return found if isinstance(found, Mapping) else {}

    def series(self, kind: str, name: str, split: str | None = None) -> list[tuple[float, float]]:
        """(epoch, value) of a curve, missing values left out."""
        rows = [row for row in self.rows(kind) if split in (None, row.get("split"))]
        return [(float(row["epoch"]), float(row[name])) for row in rows if number(row.get(name)) and "epoch" in row]

    def last(self, kind: str, name: str, split: str | None = None) -> float | None:
        """Value of the last line of a kind; None where it is missing there or was not finite, whatever came before."""
        rows = [row for row in self.rows(kind) if split in (None, row.get("split"))]
        return float(rows[-1][name]) if rows and number(rows[-1].get(name)) else None

    def seconds_to(self, name: str, target: float) -> float | None:
        """Seconds of training until validation first reaches a target: "top1" from below, "perplexity" from above.

        None where it never did, or the record says no seconds.
        """
        for row in self.rows("eval"):
            value = row.get(name)
            if row.get("split") == "val" and number(value) and (value >= target if name == "top1" else value <= target):
                return float(row["seconds"]) if number(row.get("seconds")) else None
        return None

    @cached_property
    def converted(self) -> list[dict[str, Any]]:
        """Rows of the injection report."""
        return [row for line in self.rows("convert") for row in line["rows"]]

    @cached_property
    def steps_per_epoch(self) -> float:
        """Updates in an epoch."""
        steps, epochs = _steps(self.record), self.record.summary.get("epochs", 1)
        return (steps or 1.0) / (epochs if number(epochs) and epochs > 0 else 1.0)

    def telemetry(self, role: str) -> list[tuple[int, list[dict[str, Any]]]]:
        """(step, rows) of the layers that were converted, for a role."""
        names = {row["name"] for row in self.converted if row.get("status") == "converted"}
        return [
            (line["step"], [row for row in line["rows"] if row["role"] == role and row["layer"] in names])
            for line in self.rows("telemetry")
        ]

    def layers_in_order(self, names: Collection[str]) -> list[str]:
        """Those of some layers that the injection report has, from the input on; telemetry goes the other way."""
        return [row["name"] for row in self.converted if row["name"] in names]

    def underflow_share(self, role: str) -> float | None:
        """Share of the non-zero operands of a role that became zero, over the whole run; None without telemetry."""
        rows = [row for _, rows in self.telemetry(role) for row in rows]
        nonzero = sum(row["nonzero"] for row in rows)
        return sum(row["underflow"] for row in rows) / nonzero if nonzero else None

    def memory(self, name: str) -> float | None:
        """A figure of the memory measurement, in bytes."""
        rows = self.rows("memory")
        return float(rows[-1][name]) if rows and number(rows[-1].get(name)) else None

    def figure(self, name: str) -> float | None:
        """A figure that studies compare, by its name in their tables; None where it was not recorded."""
        if name == "score":
            return self.record.score
        if name in ("val_error", "train_error"):
            top1 = self.last("eval", "top1", name.removesuffix("_error"))
            return None if top1 is None else 100 - top1
        if name == "l2":
            return self.last("train", "l2")
        if name.startswith("underflow_"):
            return self.underflow_share(name.removeprefix("underflow_"))
        if name.endswith("_bytes"):
            return self.memory(name)
        value = self.record.summary.get(name)
        return float(value) if number(value) else None

    @cached_property
    def loss_scale(self) -> LossScale | None:
        """The loss scale at every step."""
        return replay_loss_scale(self)


@dataclass(frozen=True)
class LossScale:
    """The loss scale of a run at every step.

    Attributes:
        scale: at each step. floors: in force at each step.
        skipped: steps that were skipped.
        met_floor: steps at which a back-off was stopped by a floor over the policy's least scale.
    """

    scale: list[float]
    floors: list[float]
    skipped: list[int]
    met_floor: list[int]


@dataclass
class CellRuns:
    """What is recorded of a cell: finished runs by seed, reasons of failed ones, what was left out, and notes.

    `begun`: runs that are not finished; they have curves and no score.
    """

    name: str
    runs: dict[int, Run] = field(default_factory=dict)
    begun: dict[int, Run] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def figures(self, name: str) -> dict[int, float]:
        """A figure by seed."""
        found = {seed: run.figure(name) for seed, run in sorted(self.runs.items())}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def in_order(self) -> list[Run]:
        """The runs by seed."""
        return [run for _, run in sorted(self.runs.items())]

    @property
    def first(self) -> Run | None:
        """The run with the least seed."""
        return next(iter(self.in_order), None)

    @property
    def empty(self) -> bool:
        """True when no run was ever started, or none left a record."""
        return not (self.runs or self.failures)


class Cells(dict[str, CellRuns]):
    """Cells of a profile by name; one that was never run is empty."""

    def __missing__(self, name: str) -> CellRuns:
        """Nothing is recorded of it."""
        return CellRuns(name)


def read_cells(roots: Iterable[str | Path]) -> tuple[dict[str, Cells], list[RunRecord], list[str]]:
    """Cells by profile and experiment, all finished runs, and a line for each folder without a usable record.

    Runs of a cell that differ in more than their seed are not mixed: the kind with most seeds stands, then the longest.

    Raises:
        UserError: a root that is not a folder; runs with different versions of the random bits.
    """
    roots = list(roots)
    records, problems = read_records(roots)
    require_same_bits(records)
    cells: dict[str, Cells] = {}
    kinds: dict[tuple[str, str], dict[str, list[RunRecord]]] = {}
    for record in records:
        experiment = record.summary.get("experiment")
        if isinstance(experiment, str):
            kind = repr(sorted((key, repr(value)) for key, value in record.settings.items()))
            name = cell_name(experiment, record.settings)
            kinds.setdefault((record.profile, name), {}).setdefault(kind, []).append(record)
    for (profile, name), by_kind in kinds.items():
        cell = cells.setdefault(profile, Cells()).setdefault(name, CellRuns(name))
        ranked = sorted(by_kind.values(), key=lambda group: (-len({r.seed for r in group}), -_steps(group[0])))
        for record in ranked[0]:
            # Done twice, a run is one seed; the first folder stands, and the others are named.
            if record.seed in cell.runs:
                cell.left_out.append(f"{name}: seed {record.seed} again in {record.folder.name}")
            cell.runs.setdefault(record.seed, Run(record))
        versions = {str(run.record.summary.get("version")) for run in cell.runs.values()}
        if len(versions) > 1:
            cell.notes.append(f"{name}: runs of different versions: {', '.join(sorted(versions))}")
        for group in ranked[1:]:
            cell.left_out.append(f"{name}: {len(group)} run(s) with {_differing(ranked[0][0], group[0])}")
    for record in read_begun(roots):
        name = cell_name(str(record.summary["experiment"]), record.settings)
        cell = cells.setdefault(record.profile, Cells()).setdefault(name, CellRuns(name))
        cell.begun.setdefault(record.seed, Run(record))
    for summary in read_failures(roots):
        where, whose, seed = (summary.get(key) for key in ("profile", "cell", "seed"))
        if isinstance(where, str) and isinstance(whose, str) and isinstance(seed, int):
            cell = cells.setdefault(where, Cells()).setdefault(whose, CellRuns(whose))
            if seed not in cell.runs:
                cell.failures[seed] = str(summary.get("reason", "no reason was recorded"))
    return cells, records, problems


def comparable(a: CellRuns, b: CellRuns) -> bool:
    """True when two cells' runs differ in precision and loss scaling only."""
    if a.first is None or b.first is None:
        return False
    return _shared(a.first.record) == _shared(b.first.record)


def replay_loss_scale(run: Run) -> LossScale | None:
    """Put the recorded skipped steps through the policy once more; None where its scales are not those on record."""
    steps = int(_steps(run.record))
    skips = {row["step"] for row in run.rows("event") if row.get("what") in ("skipped", "nonfinite_forward")}
    # The last step is always logged.
    if steps != max((row["step"] for row in run.rows("train")), default=0) or not steps:
        return None
    trainer = run.section("trainer")
    if trainer.get("max_steps") is not None:
        return None
    epochs = trainer.get("epochs")
    try:
        config: LossScalingConfig = build_dataclass(LossScalingConfig, run.section("loss_scaling"), "loss_scaling")
        scaler = make_scaler(config, steps, epochs if number(epochs) and epochs > 0 else None)
    # A record that says nothing that can be followed.
    except UserError:
        return None
    scales, floors, met = [], [], []
    for step in range(1, steps + 1):
        scales.append(scaler.scale)
        floors.append(scaler.floor)
        floor_stops = scaler.scale / config.factor < scaler.floor > config.min_scale
        if step in skips and floor_stops and config.policy == "enhanced":
            met.append(step)
        scaler.update(step in skips)
    for row in run.rows("train"):
        logged = row.get("loss_scale")
        if number(logged) and not (row["step"] and math.isclose(logged, scales[row["step"] - 1])):
            return None
    return LossScale(scales, floors, sorted(skips), met)


def _shared(record: RunRecord) -> dict[str, Any]:
    apart = ("precision.", "loss_scaling.", "backend")
    return {key: value for key, value in record.settings.items() if not key.startswith(apart)}


def _differing(a: RunRecord, b: RunRecord) -> str:
    keys = sorted({*a.settings, *b.settings})
    return ", ".join(f"{k}={b.settings.get(k)}" for k in keys if a.settings.get(k) != b.settings.get(k)) or "its seed"


def _steps(record: RunRecord) -> float:
    steps = record.summary.get("steps")
    return float(steps) if number(steps) and 0 < steps <= MOST_STEPS else 0.0
