"""Draw the README's figure from run records: accuracy of FP32 and FP8, and what the loss scale keeps from underflow.

fp8repro train -m precision=fp32,fp8 seed=0,1,2 run_dir=runs/demo
fp8repro train -m loss_scaling=constant loss_scaling.scale=1,1000,10000 trainer.telemetry_every=20 run_dir=runs/scales
python scripts/readme_figure.py runs/demo runs/scales docs/digits.png
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from fp8repro.results.records import RunRecord, read_metrics, read_records

COLOURS = {"fp32": "#4c566a", "fp8": "#c2410c"}


def main() -> None:
    """Read the records of both folders and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("accuracy", type=Path, help="folder of runs in FP32 and FP8")
    parser.add_argument("scales", type=Path, help="folder of FP8 runs at several loss scales, with telemetry")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    draw_accuracy(left, read_records([options.accuracy])[0])
    draw_underflow(right, read_records([options.scales])[0])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, dpi=150, metadata={"Software": None})


def draw_accuracy(axes: Any, records: Iterable[RunRecord]) -> None:
    """Validation top-1 by epoch: mean over seeds, shaded from the lowest to the highest seed."""
    curves: dict[str, dict[float, list[float]]] = {}
    for record in records:
        for row in read_metrics(record.folder, "eval"):
            if row["split"] == "val":
                curves.setdefault(record.precision, {}).setdefault(row["epoch"], []).append(row["top1"])
    for precision, curve in sorted(curves.items()):
        epochs = sorted(curve)
        means = [statistics.mean(curve[epoch]) for epoch in epochs]
        colour = COLOURS.get(precision)
        seeds = max(len(values) for values in curve.values())
        axes.plot(epochs, means, color=colour, label=f"{precision.upper()}: {means[-1]:.2f} % ({seeds} seeds)")
        lows, highs = [min(curve[epoch]) for epoch in epochs], [max(curve[epoch]) for epoch in epochs]
        axes.fill_between(epochs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.set(title="ResNet-18 on handwritten digits", xlabel="epoch", ylabel="validation top-1, %", ylim=(80, 100.5))
    axes.legend(loc="lower right", frameon=False)


def draw_underflow(axes: Any, records: Iterable[RunRecord]) -> None:
    """Share of the non-zero errors that E5M2 rounds to zero, by step and loss scale."""
    for record in sorted(records, key=lambda r: r.settings["loss_scaling.scale"]):
        steps, shares = [], []
        for row in read_metrics(record.folder, "telemetry"):
            errors = [layer for layer in row["rows"] if layer["role"] == "error"]
            nonzero = sum(layer["nonzero"] for layer in errors)
            if nonzero:
                steps.append(row["step"])
                shares.append(100 * sum(layer["underflow"] for layer in errors) / nonzero)
        axes.plot(
            steps, [share or math.nan for share in shares], label=f"scale {record.settings['loss_scaling.scale']:,}"
        )
    axes.set(title="errors lost to underflow (FP8)", xlabel="step", ylabel="% of non-zero errors", yscale="log")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
