"""What each format loses of an FP32 run's errors at given loss scales; at the paper's size, layer by layer (C4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fp8repro.numerics.formats import E5M2, FP16, FloatFormat
from fp8repro.paper.plan import plan_file
from fp8repro.results.cells import Cells, Run
from fp8repro.results.sheet import Column, Sheet

STUDY, REFERENCE = "lost", "resnet50_reference"
# The paper's scales of convolutional networks, and none.
SCALES = (1, 1_000, 4_000, 10_000)
FORMATS = (E5M2, FP16)
ALL_LAYERS = "all layers"


def lost_share(rows: Iterable[Mapping[str, Any]], scale: float, format: FloatFormat) -> float | None:
    """Share of non-zero values that rounding to nearest in a format makes zero at a loss scale; None without any.

    From the exponents in rows of telemetry. Half of the smallest subnormal is where values become zero; where it lies
    inside of an octave, the values there count as evenly spread.
    """
    least = format.min_exponent - format.mantissa_bits - 1 - math.log2(scale)
    whole = math.floor(least)
    lost = total = 0.0
    for row in rows:
        lowest, counts = row.get("exponents") or (0, [])
        counted = sum(counts)
        if counted:
            below = float(sum(counts[: max(0, whole - lowest)]))
            if 0 <= whole - lowest < len(counts):
                below += counts[whole - lowest] * (2 ** (least - whole) - 1)
            lost += row["nonzero"] * below / counted
            total += row["nonzero"]
    return lost / total if total else None


def errors(run: Run) -> list[Mapping[str, Any]]:
    """Rows of telemetry of a run's errors, over all measured steps."""
    return [row for _, rows in run.telemetry("error") for row in rows]


def reference(cells: Cells) -> Run | None:
    """The run whose errors are counted; one that is not finished stands until another is."""
    cell = cells[REFERENCE]
    return cell.first or next((run for _, run in sorted(cell.begun.items())), None)


def lost_by_layer(run: Run) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of telemetry of a run's errors by layer, from the input on."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in errors(run):
        rows.setdefault(row["layer"], []).append(row)
    return {layer: rows[layer] for layer in run.layers_in_order(rows)}


def lost_sheet(cells: Cells) -> Sheet:
    """For each layer and for all, the share of errors that a format loses at each scale."""
    run = reference(cells)
    by_layer = lost_by_layer(run) if run else {}
    rows = []
    for layer, found in {ALL_LAYERS: [row for rows in by_layer.values() for row in rows], **by_layer}.items():
        row: dict[str, Any] = {"layer": layer}
        for format in FORMATS:
            for scale in SCALES:
                share = lost_share(found, scale, format)
                row[_key(format, scale)] = None if share is None else 100 * share
        rows.append(row)
    columns = [Column("layer")]
    columns += [Column(_key(f, s), f"{f.name.upper()}, scale {s:,}: lost, %", 3) for f in FORMATS for s in SCALES]
    return Sheet(STUDY, plan_file()["studies"][STUDY]["title"], columns, rows, _notes(cells, run, rows[0]))


def _key(format: FloatFormat, scale: int) -> str:
    return f"{format.name}_{scale}"


def _notes(cells: Cells, run: Run | None, overall: Mapping[str, Any]) -> list[str]:
    if run is None or overall[_key(E5M2, 1)] is None:
        return [f"{REFERENCE}: not run."]
    said = "; ".join(
        f"at {scale:,}, {overall[_key(E5M2, scale)]:.3g} % in E5M2 and {overall[_key(FP16, scale)]:.3g} % in FP16"
        for scale in SCALES
    )
    return [
        f"Errors that rounding to nearest makes zero, over {ALL_LAYERS}: {said}. It says what is lost, not what that "
        "does to accuracy.",
        f"{described(cells, run)} Errors in BF16, which has FP32's range; the share is of those that are not zero. "
        "The first and the last layer, which stay out of 8 bits, are no part.",
    ]


def described(cells: Cells, run: Run) -> str:
    """What ran, for how many steps, and whether that was all."""
    trainer, data = run.section("trainer"), run.section("data")
    steps = [step for step, _ in run.telemetry("error")]
    parts = trainer.get("micro_steps")
    unfinished = "" if run in cells[REFERENCE].runs.values() else "; the run is not finished"
    return (
        f"One FP32 run of {run.record.model} on {run.record.data}, seed {run.record.seed}, {data.get('image_size')} "
        f"pixels a side (smaller images are scaled up), loss averaged over {trainer.get('batch_size')} images "
        f"(normalized in {parts} parts), {len(steps)} measured steps up to step {max(steps, default=0)}{unfinished}."
    )
