"""The dose-response study: accuracy by loss scale, and the scale that each rounding of errors and gradients needs (C4).

The other axis is what a scale loses: the share of the reference run's errors that the format would round to zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import pairwise

from fp8repro.numerics.formats import E5M2, FP16, FloatFormat
from fp8repro.paper.plan import at_scale, plan_file
from fp8repro.results.cells import CellRuns, Cells
from fp8repro.results.lost import errors, lost_share
from fp8repro.results.sheet import Column, Sheet, stat

STUDY, REFERENCE = "doses", "dose_reference"
NEAREST, SUBNORMAL, STOCHASTIC, IN_FP16 = "dose_nearest", "dose_subnormal", "dose_stochastic", "dose_fp16"
CURVES = {
    NEAREST: "E5M2, to nearest",
    SUBNORMAL: "E5M2, subnormals to nearest",
    STOCHASTIC: "E5M2, stochastic",
    IN_FP16: "FP16, to nearest",
}
# A scale is too small where accuracy is so many points under that at the two largest scales, which are chosen before
# any run. The mean of all scales within the drop would be no steadier (what is noisy is the fall), and would lean
# towards the fall.
DROP = 5.0


def format_of(curve: str) -> FloatFormat:
    """The format of a curve's errors and gradients."""
    return FP16 if curve == IN_FP16 else E5M2


def points(cells: Cells, curve: str) -> list[tuple[int, CellRuns]]:
    """(power of two, runs) of a curve, from the smallest scale on."""
    powers = plan_file()["studies"][STUDY]["scales"][curve]
    return [(power, cells[at_scale(curve, 2.0**power)]) for power in sorted(powers)]


def names(curve: str) -> list[str]:
    """The cells of a curve."""
    return [cell.name for _, cell in points(Cells(), curve)]


def needed_power(scores: Mapping[int, float]) -> float | None:
    """log2 of the loss scale under which accuracy is lost, from scores by power of two.

    Going down from the largest scale, it is where the score falls through its mean at the two largest less `DROP`,
    between two points on a straight line; None where it never does.
    """
    powers = sorted(scores, reverse=True)
    floor = statistics.fmean(scores[power] for power in powers[:2]) - DROP
    for above, below in pairwise(powers):
        if scores[below] < floor <= scores[above]:
            return below + (above - below) * (floor - scores[below]) / (scores[above] - scores[below])
    return None


def needs(cells: Cells, curve: str) -> dict[int, float]:
    """`needed_power` of each seed that has all points of a curve and loses accuracy on it."""
    return {seed: power for seed, power in _by_seed(cells, curve).items() if power is not None}


def never_fall(cells: Cells, curve: str) -> list[int]:
    """Seeds that have all points of a curve and lose no accuracy on it: its scales say nothing of what they need."""
    return [seed for seed, power in _by_seed(cells, curve).items() if power is None]


def _by_seed(cells: Cells, curve: str) -> dict[int, float | None]:
    by_power = {power: cell.figures("score") for power, cell in points(cells, curve)}
    seeds = sorted(set.intersection(*(set(scores) for scores in by_power.values())))
    return {seed: needed_power({power: scores[seed] for power, scores in by_power.items()}) for seed in seeds}


def shares(cells: Cells, curve: str) -> dict[int, float]:
    """`lost_share` of the reference by power of two, for the format of a curve."""
    run = cells[REFERENCE].first
    rows = errors(run) if run else []
    found = {power: lost_share(rows, 2.0**power, format_of(curve)) for power, _ in points(cells, curve)}
    return {power: share for power, share in found.items() if share is not None}


def dose_sheet(cells: Cells) -> Sheet:
    """Accuracy at each scale, and what the reference would lose there."""
    rows = []
    for curve, title in CURVES.items():
        lost = shares(cells, curve)
        for power, cell in points(cells, curve)[::-1]:
            scores = cell.figures("score")
            failed = "; ".join(f"seed {seed}: {why}" for seed, why in sorted(cell.failures.items())) or None
            share = lost.get(power)
            rows.append(
                {
                    "curve": title, "power": power, "score": stat(scores), "seeds": len(scores), "failed": failed,
                    "lost": None if share is None else 100 * share,
                }
            )  # fmt: skip
    columns = [
        Column("curve", "errors and gradients"), Column("power", "log2 of the loss scale", 0),
        Column("lost", "errors of the reference lost there, %", 2), Column("score", "top-1, %", 2),
        Column("seeds", digits=0), Column("failed", "failed runs"),
    ]  # fmt: skip
    notes = [
        "mean ± standard deviation over seeds. Weights and activations in E5M2, FP16 masters, the first and the last "
        "layer in FP32: the curves differ in errors and gradients alone. Lost: the share of the non-zero errors of one "
        "FP32 run (its errors in BF16, which has FP32's range) that the format rounds to zero at that scale.",
        f"Loss scale needed (log2), where top-1 falls {DROP:g} points under the mean of the two largest scales, and "
        f"what the reference would lose there: {_needed(cells)}.",
    ]
    return Sheet(STUDY, plan_file()["studies"][STUDY]["title"], columns, rows, notes)


def _needed(cells: Cells) -> str:
    run = cells[REFERENCE].first
    rows = errors(run) if run else []
    parts = []
    for curve, title in CURVES.items():
        found = list(needs(cells, curve).values())
        if not found:
            parts.append(f"{title}: -")
            continue
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        share = lost_share(rows, 2 ** statistics.fmean(found), format_of(curve))
        lost = "" if share is None else f" ({100 * share:.1f} %)"
        parts.append(f"{title}: {statistics.fmean(found):+.1f}{spread}{lost}")
    return "; ".join(parts)
