"""Draw the README's figure from what `fp8repro report` wrote: accuracy by epoch, and underflow by loss scale.

python scripts/readme_figure.py results/embedded docs/digits.png
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

COLOURS = {"FP32": "#4c566a", "FP8": "#c2410c"}
# By epoch, a value for each seed.
Curve = dict[float, list[float]]


def main() -> None:
    """Read the report's files and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="folder of a report on the profile embedded")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    draw_accuracy(left, curves(options.report / "figures" / "embedded_accuracy.csv", "resnet18"))
    shares = json.loads((options.report / "tables" / "embedded_C4.json").read_text(encoding="utf-8"))["rows"]
    draw_underflow(right, curves(options.report / "figures" / "embedded_underflow.csv", "errors"), shares)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, dpi=150, metadata={"Software": None})


def curves(path: Path, panel: str) -> dict[str, Curve]:
    """The curves of a panel by name; a series without a name is another seed of the one before."""
    found: dict[str, Curve] = {}
    name = ""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["panel"] == panel:
                name = row["series"] or name
                found.setdefault(name, defaultdict(list))[float(row["x"])].append(float(row["y"]))
    return found


def draw_accuracy(axes: Any, found: dict[str, Curve]) -> None:
    """Validation top-1 by epoch: mean over seeds, shaded from the lowest to the highest seed."""
    for name, curve in found.items():
        epochs = sorted(curve)
        means = [statistics.mean(curve[epoch]) for epoch in epochs]
        label = f"{name}: {means[-1]:.2f} % ({len(curve[epochs[-1]])} seeds)"
        axes.plot(epochs, means, color=COLOURS[name], label=label)
        lows, highs = [min(curve[epoch]) for epoch in epochs], [max(curve[epoch]) for epoch in epochs]
        axes.fill_between(epochs, lows, highs, color=COLOURS[name], alpha=0.15, linewidth=0)
    axes.set(title="ResNet-18 on handwritten digits", xlabel="epoch", ylabel="validation top-1, %", ylim=(80, 100.5))
    axes.legend(loc="lower right", frameon=False)


def draw_underflow(axes: Any, found: dict[str, Curve], rows: list[dict[str, Any]]) -> None:
    """Share of the non-zero errors that E5M2 rounds to zero, mean over seeds; in the legend over the whole run."""
    for (name, curve), row in zip(found.items(), rows, strict=True):
        epochs = sorted(curve)
        label = f"scale {name.removeprefix('constant ')}: {row['underflow_error']:.1f} %"
        axes.plot(epochs, [statistics.mean(curve[epoch]) for epoch in epochs], label=label)
    axes.set(title="errors lost to underflow (FP8)", xlabel="epoch", ylabel="% of non-zero errors", yscale="log")
    axes.legend(frameon=False, fontsize="small")


if __name__ == "__main__":
    main()
