"""What the figures show: series and matrices taken from run records, each with its data as CSV. Draws nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fp8repro.numerics.formats import E5M2
from fp8repro.paper.plan import plan_file, study_cells, study_models
from fp8repro.results import doses, lost
from fp8repro.results.cells import Cells, Run
from fp8repro.results.sheet import stat
from fp8repro.tabular import comma_separated

FLOOR_SHARE = 1e-6
E5M2_RANGE = (
    (E5M2.min_exponent - E5M2.mantissa_bits, "smallest subnormal"),
    (E5M2.min_exponent, "smallest normal"),
    (E5M2.max_exponent + 1, "largest"),
)
ROLE_OPERANDS = (
    ("activation", "input"),
    ("weight", "weight"),
    ("error", "output_error"),
    ("gradient", "weight_gradient"),
)
# Where the curves of the dose-response study have room for their names.
DOSE_LABELS = {
    doses.NEAREST: (0.62, "right"), doses.SUBNORMAL: (0.42, "right"), doses.STOCHASTIC: (0.12, "left"),
    doses.IN_FP16: (0.5, "right"),
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Label, points, and hue, shared with others; `spread`: half of each error bar (or NaN).

    `beside`: the label stands next to the line, at a share of the axis' height, on its "left" or "right".
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    hue: int
    faint: bool = False
    dashed: bool = False
    spread: Sequence[float] = ()
    beside: tuple[float, str] | None = None


@dataclass(frozen=True)
class Panel:
    """Axes with lines; `names`: of x = 0, 1, ..., where those are no numbers."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log: bool = False
    log_x: bool = False
    names: Sequence[str] = ()


@dataclass(frozen=True)
class HeatMap:
    """A matrix: rows by name, columns by x; values in [low, high]; `missing` is NaN."""

    title: str
    x_label: str
    rows: Sequence[str]
    x: Sequence[float]
    values: Sequence[Sequence[float]]
    value_label: str
    log: bool = False
    spans: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Figure:
    """A figure: file name, title, caption, its panels or heat maps; `shared`: all on one scale of values."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel] = field(default_factory=tuple)
    maps: Sequence[HeatMap] = field(default_factory=tuple)
    shared: bool = False

    @property
    def empty(self) -> bool:
        """True when there is nothing to draw."""
        return not any(panel.lines for panel in self.panels) and not any(len(map.rows) for map in self.maps)

    def csv(self) -> str:
        """The data: one line for each point or each entry of a matrix."""
        points: list[tuple[Any, ...]] = []
        for panel in self.panels:
            for line in panel.lines:
                spread = [None if math.isnan(half) else half for half in line.spread] or [None] * len(line.x)
                x = [panel.names[int(at)] for at in line.x] if panel.names else line.x
                points += [(panel.title, line.label, *point) for point in zip(x, line.y, spread, strict=True)]
        for map in self.maps:
            for row, values in zip(map.rows, map.values, strict=True):
                points += [
                    (map.title, row, x, y, None) for x, y in zip(map.x, values, strict=True) if not math.isnan(y)
                ]
        keys = ("panel", "series", "x", "y", "spread")
        return comma_separated(keys, (dict(zip(keys, point, strict=True)) for point in points))


def figures(cells: Cells, profile: str) -> list[Figure]:
    """All figures of a profile that have something to show."""
    convnet = plan_file()["profiles"][profile]["convnet"]
    found = [
        dose_response(cells, profile),
        lost_errors(cells, profile),
        accuracy_curves(cells, profile),
        underflow_by_scale(cells, profile),
        underflow_map(cells, [f"{convnet}_fp8", "fp8_scale_1"]),
        exponent_map(cells, f"{convnet}_fp8"),
        exponent_map(cells, "transformer_fp8"),
        loss_scales(cells, profile),
        rounding_curves(cells, profile),
    ]
    return [figure for figure in found if not figure.empty]


def accuracy_curves(cells: Cells, profile: str) -> Figure:
    """Validation accuracy (images) and perplexity (translation) of each model in FP32 and FP8."""
    panels = []
    for study, metric, label in (("C1", "top1", "top-1, %"), ("C2", "perplexity", "perplexity")):
        for model in study_models(study, profile):
            lines = [
                line
                for hue, precision in enumerate(("fp32", "fp8"))
                for line in _curves(cells, f"{model}_{precision}", precision.upper(), hue, "eval", metric, "val")
            ]
            panels.append(Panel(model, "epoch", label, lines, log=metric == "perplexity"))
    caption = (
        "Validation over training, one line for each seed. BLEU is measured once, after the last epoch, and stands in "
        "the table."
    )
    return Figure("accuracy", "Training in FP32 and FP8", caption, [panel for panel in panels if panel.lines])


def dose_response(cells: Cells, profile: str) -> Figure:
    """Accuracy by loss scale and by what that scale keeps, for each rounding of errors and gradients (C4)."""
    by_scale: list[Line] = []
    by_share: list[Line] = []
    seeds: set[int] = set()
    for hue, (curve, label) in enumerate(doses.CURVES.items() if study_cells(doses.STUDY, profile) else ()):
        scores = {power: stat(cell.figures("score")) for power, cell in doses.points(cells, curve)}
        kept = {power: 100 * (1 - share) for power, share in doses.shares(cells, curve).items() if share < 1}
        for lines, axis in ((by_scale, {power: float(power) for power in scores}), (by_share, kept)):
            there = [(axis[power], score) for power, score in scores.items() if score is not None and power in axis]
            if there:
                x, means = [at for at, _ in there], [score.mean for _, score in there]
                # A single seed has no deviation, which is not one of zero.
                spread = [math.nan if score.sd is None else score.sd for _, score in there]
                seeds |= {score.seeds for _, score in there}
                # It is expected to lie on another one.
                dashed = curve == doses.SUBNORMAL
                beside = DOSE_LABELS[curve] if lines is by_scale else None
                lines.append(Line(label, x, means, hue, dashed=dashed, spread=spread, beside=beside))
    left = "errors of an FP32 run that do not round to zero, %"
    panels = [
        Panel("by loss scale", "log2 of the loss scale", "top-1, %", by_scale),
        Panel("by what is left of the errors", left, "top-1, %", by_share, log_x=True),
    ]
    count = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds, default=0)}"
    caption = (
        f"Final validation accuracy, mean over seeds ({count} a point); bars: standard deviation. Curves differ in the "
        "rounding of errors and gradients alone; colours and marks are the same on both sides. FP16's smallest value "
        "lies eight octaves under E5M2's: if errors that become zero are what does the harm, its curve lies as far to "
        "the left, and to nearest both fall alike by what is left."
    )
    return Figure(
        "doses", "C4: accuracy by loss scale", caption, [panel for panel in panels if panel.lines], shared=True
    )


def lost_errors(cells: Cells, profile: str) -> Figure:
    """Share of an FP32 run's errors that a format loses at each loss scale, layer by layer (C4)."""
    run = lost.reference(cells) if study_cells(lost.STUDY, profile) else None
    by_layer = lost.lost_by_layer(run) if run else {}
    panels = []
    for format in lost.FORMATS:
        lines = []
        for hue, scale in enumerate(lost.SCALES):
            shares = [lost.lost_share(rows, scale, format) for rows in by_layer.values()]
            there = [(at, max(share, FLOOR_SHARE)) for at, share in enumerate(shares) if share is not None]
            if there:
                x, y = [float(at) for at, _ in there], [100 * share for _, share in there]
                lines.append(Line(f"scale {scale:,}", x, y, hue))
        name = format.name.upper()
        panels.append(Panel(name, "layer, from input to output", "errors lost, %", lines, True, names=list(by_layer)))
    caption = lost.described(cells, run) if run and by_layer else ""
    return Figure(
        "lost", "C4: errors that each format loses, layer by layer",
        f"{caption} Lost: rounded to nearest, they become zero. What that does to accuracy is not measured here.",
        [panel for panel in panels if panel.lines], shared=True,
    )  # fmt: skip


def underflow_by_scale(cells: Cells, profile: str) -> Figure:
    """Share of errors that underflow over time, by loss scale (C4)."""
    lines = []
    for hue, name in enumerate(study_cells("C4", profile)):
        for number, run in enumerate(cells[name].in_order):
            points = [(step / run.steps_per_epoch, share) for step, share in _shares(run, "error")]
            label = run.record.loss_scaling if number == 0 else ""
            x, y = zip(*points, strict=True) if points else ((), ())
            lines.append(Line(label, x, [max(100 * share, 100 * FLOOR_SHARE) for share in y], hue, number > 0))
    caption = "Errors of all converted layers that are not zero before rounding and zero after it, one line a seed."
    panel = Panel("errors", "epoch", "errors that underflow, %", [line for line in lines if line.x], log=True)
    return Figure("underflow", "C4: underflow by loss scale", caption, [panel])


def underflow_map(cells: Cells, names: Sequence[str]) -> Figure:
    """Share of errors that underflow, per layer over time (C4)."""
    maps = []
    for name in names:
        run = cells[name].first
        telemetry = run.telemetry("error") if run else []
        layers = run.layers_in_order({row["layer"] for _, rows in telemetry for row in rows}) if run else []
        if run is None or not layers:
            continue
        shares = [_by_layer(rows) for _, rows in telemetry]
        values = [[max(100 * share[layer], 100 * FLOOR_SHARE) if layer in share else math.nan for share in shares]
                  for layer in layers]  # fmt: skip
        x = [step / run.steps_per_epoch for step, _ in telemetry]
        title = f"{run.record.model}, loss scale {run.record.loss_scaling.removeprefix('constant ')}"
        maps.append(HeatMap(title, "epoch", layers, x, values, "errors that underflow, %", log=True))
    caption = "Layers from input (top) to output. Only layers in E5M2."
    return Figure("underflow_map", "C4: underflow per layer over time", caption, maps=maps, shared=True)


def exponent_map(cells: Cells, name: str) -> Figure:
    """Histograms of binary exponents per layer and role, against E5M2's range."""
    run = cells[name].first
    maps = []
    for role, operand in ROLE_OPERANDS if run else ():
        totals: dict[str, dict[int, float]] = {}
        for _, rows in run.telemetry(role) if run else []:
            for row in rows:
                if row.get("operand") == operand and any((row.get("exponents") or (0, []))[1]):
                    lowest, counts = row["exponents"]
                    histogram = totals.setdefault(row["layer"], {})
                    for exponent, count in enumerate(counts, lowest):
                        histogram[exponent] = histogram.get(exponent, 0.0) + count
        if not totals:
            continue
        layers = run.layers_in_order(totals) if run else []
        low = min(min(h) for h in totals.values())
        x = list(range(min(max(low, -40), 0), 20))
        values = []
        for histogram in (totals[layer] for layer in layers):
            total = sum(histogram.values())
            values.append([100 * histogram.get(e, 0.0) / total or math.nan for e in x])
        maps.append(
            HeatMap(f"{role}s" if role != "activation" else "activations (layer inputs)", "binary exponent",
                    layers, x, values, "values, %", spans=E5M2_RANGE)
        )  # fmt: skip
    model = run.record.model if run else name
    caption = (
        "Sampled values before rounding, loss scale included, over the whole run; each row adds up to 100 %. Lines: "
        "E5M2's smallest subnormal, its smallest normal value and its largest value."
    )
    return Figure(f"range_{model}", f"{model}: values against E5M2's range", caption, maps=maps)


def loss_scales(cells: Cells, profile: str) -> Figure:
    """The loss scale at every step of the C5 runs, with the floor in force."""
    panels = []
    for name in study_cells("C5", profile):
        lines = []
        for number, run in enumerate(cells[name].in_order):
            replay = run.loss_scale
            if replay is None:
                continue
            x = [step / run.steps_per_epoch for step in range(len(replay.scale))]
            lines.append(Line(f"seed {run.record.seed}", *_thinned(x, replay.scale), number))
            if number == 0 and run.record.loss_scaling == "enhanced":
                lines.append(Line("floor", *_thinned(x, replay.floors), 7, dashed=True))
        if lines:
            policy = cells[name].in_order[0].record.loss_scaling
            panels.append(Panel(policy, "epoch", "loss scale", lines, log=True))
    caption = "GNMT. The scale in force at each step, followed from the recorded skipped steps."
    return Figure("loss_scale", "C5: loss scale over time", caption, panels, shared=True)


def rounding_curves(cells: Cells, profile: str) -> Figure:
    """Training error, validation error and L2 loss over time, nearest and stochastic, FP16 and FP32 masters (C6)."""
    headlines = {
        "fp8_nearest": "nearest, FP16 masters",
        "fp8_nearest_fp32_master": "nearest, FP32 masters",
        "fp8_stochastic": "stochastic, FP16 masters",
        "fp8_stochastic_fp32_master": "stochastic, FP32 masters",
    }
    panels = []
    for title, kind, metric, split in (
        ("training error", "eval", "top1", "train"),
        ("validation error", "eval", "top1", "val"),
        ("L2 loss", "train", "l2", None),
    ):
        lines = []
        for hue, (name, label) in enumerate(headlines.items()):
            for line in _curves(cells, name, label, hue, kind, metric, split):
                y = [100 - value for value in line.y] if metric == "top1" else line.y
                lines.append(Line(line.label, line.x, y, hue, line.faint, dashed="FP32" in label))
        panels.append(Panel(title, "epoch", "%" if metric == "top1" else "sum of squared weights / 2", lines))
    caption = "One line for each seed; the others of a cell are fainter. Dashed: FP32 masters."
    return Figure("rounding", "C6: rounding", caption, [panel for panel in panels if panel.lines])


def _curves(cells: Cells, name: str, label: str, hue: int, kind: str, metric: str, split: str | None) -> list[Line]:
    lines = []
    for number, run in enumerate(cells[name].in_order):
        points = run.series(kind, metric, split)
        if points:
            x, y = zip(*points, strict=True)
            lines.append(Line(label if number == 0 else "", *_thinned(x, y), hue, faint=number > 0))
    return lines


def _shares(run: Run, role: str) -> list[tuple[int, float]]:
    points = []
    for step, rows in run.telemetry(role):
        nonzero = sum(row["nonzero"] for row in rows)
        if nonzero:
            points.append((step, sum(row["underflow"] for row in rows) / nonzero))
    return points


def _by_layer(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    counts: dict[str, tuple[int, int]] = {}
    for row in rows:
        nonzero, underflow = counts.get(row["layer"], (0, 0))
        counts[row["layer"]] = (nonzero + row["nonzero"], underflow + row["underflow"])
    return {layer: underflow / nonzero for layer, (nonzero, underflow) in counts.items() if nonzero}


def _thinned(x: Sequence[float], y: Sequence[float], most: int = 400) -> tuple[list[float], list[float]]:
    """At most `most` points and the last one."""
    stride = -(-len(x) // most)
    kept = sorted({*range(0, len(x), stride), len(x) - 1}) if x else []
    return [x[i] for i in kept], [y[i] for i in kept]
