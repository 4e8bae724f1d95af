"""Draws figures: SVG whose colours are the page's own (light and dark), and PNG. Knows nothing of runs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from fp8repro.results.figures import Figure, HeatMap, Panel


@dataclass(frozen=True)
class Palette:
    """Colours on a background: of text, of frames and grids, and of lines."""

    paper: str
    ink: str
    grid: str
    hues: tuple[str, ...]

    def variables(self) -> dict[str, str]:
        """By their names in the page's style sheet."""
        hues = {f"--hue{number}": hue for number, hue in enumerate(self.hues)}
        return {"--paper": self.paper, "--ink": self.ink, "--line": self.grid, **hues}


# Okabe and Ito's hues, which colour-blind readers tell apart, in their order of contrast; each with 3 to 1 or more.
LIGHT = Palette(
    "#ffffff", "#1f2328", "#d0d7de",
    ("#0072b2", "#d55e00", "#009e73", "#b5528a", "#b27700", "#3f9bd0", "#8c6d31", "#6e7781"),
)  # fmt: skip
DARK = Palette(
    "#0d1117", "#e6edf3", "#3d444d",
    ("#58a6e8", "#ff8a3d", "#3fc79a", "#e59cc6", "#f2b84b", "#8fd0f5", "#c9a86a", "#8b949e"),
)  # fmt: skip
# Fades into the page, so that it reads on white and on black.
MAP_COLOURS = LinearSegmentedColormap.from_list("share", [(0.10, 0.45, 0.80, 0.03), (0.10, 0.45, 0.80, 1.0)])
# Of lines with error bars, which may lie on each other.
MARKERS = "os^D"
PANELS_IN_A_ROW = 3
LABEL_SIZE = 8
PLAIN = FuncFormatter(lambda value, _: f"{value:,.7g}")


def svg(figure: Figure) -> str:
    """The figure as an SVG element for a page that defines --ink, --line and --hue0 to --hue7."""
    out = io.StringIO()
    with matplotlib.rc_context({**_style(LIGHT), "svg.hashsalt": figure.name}):
        _draw(figure, LIGHT).savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for variable, colour in LIGHT.variables().items():
        text = text.replace(colour, f"var({variable})")
    # Several pictures share a page, so their names must differ; equal rasters carry equal names that nothing refers to.
    text = re.sub(r'(<image\b[^>]*?)\sid="[^"]*"', r"\1", text)
    text = re.sub(r'\bid="', f'id="{figure.name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{figure.name}-", text)
    size = re.search(r'width="([\d.]+)pt"', text)
    width = float(size.group(1)) if size else 720.0
    label = figure.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg role="img" aria-label="{label}" style="width:{width * 4 / 3:.0f}px" '
    return re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2).replace("<svg ", head, 1)


def png(figure: Figure, palette: Palette = LIGHT) -> bytes:
    """The figure as a PNG on a palette's background."""
    out = io.BytesIO()
    with matplotlib.rc_context(_style(palette)):
        _draw(figure, palette).savefig(out, format="png", dpi=150, facecolor=palette.paper, metadata={"Software": None})
    return out.getvalue()


def download(text: str, kind: str = "text/csv") -> str:
    """A text as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


def _style(palette: Palette) -> dict[Any, Any]:
    ink = ("axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "text.color")
    return {
        "font.size": 9,
        "font.family": ["sans-serif"],
        "svg.fonttype": "none",
        "axes.facecolor": palette.paper,
        "axes.edgecolor": palette.grid,
        "axes.titlesize": 10,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": palette.grid,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": LABEL_SIZE,
        **dict.fromkeys(ink, palette.ink),
    }


def _draw(figure: Figure, palette: Palette) -> Canvas:
    count = len(figure.panels) + len(figure.maps)
    columns = min(PANELS_IN_A_ROW if figure.panels else 2, count)
    rows = -(-count // columns)
    heights = [_map_height(map) for map in figure.maps]
    height = sum(max(heights[i : i + columns]) for i in range(0, count, columns)) if heights else 2.7 * rows
    canvas = Canvas(figsize=(10.4 if columns > 1 else 6.4, height), layout="constrained")
    ratios = [max(heights[i : i + columns]) for i in range(0, count, columns)] if heights else None
    axes = canvas.subplots(
        rows, columns, squeeze=False, height_ratios=ratios, sharey=bool(figure.shared and figure.panels)
    ).flatten()
    named: set[tuple[str, ...]] = set()
    for ax, panel in zip(axes, figure.panels, strict=False):
        _lines(ax, panel, _decades(figure.panels if figure.shared else [panel]), palette)
        labels = tuple(line.label for line in panel.lines)
        if any(line.beside for line in panel.lines):
            _name(ax, panel, palette)
        # Panels on one scale that show the same lines share the labels of the first.
        elif any(labels) and not (figure.shared and labels in named):
            ax.legend()
        named.add(labels)
    for ax, map in zip(axes, figure.maps, strict=False):
        _map(canvas, ax, map, figure.maps if figure.shared else [map], palette)
    for ax in axes[count:]:
        ax.set_axis_off()
    return canvas


def _lines(ax: Axes, panel: Panel, decades: float, palette: Palette) -> None:
    for line in panel.lines:
        hue = palette.hues[line.hue % len(palette.hues)]
        ax.plot(
            line.x, line.y, color=hue, label=line.label or "_", alpha=0.35 if line.faint else 1,
            linewidth=1.0 if line.faint else 1.6, linestyle="--" if line.dashed else "-",
            marker=MARKERS[line.hue % len(MARKERS)] if line.spread else "o" if len(line.x) == 1 else "",
            # A ring around the point of the line under it.
            markersize=8 if line.dashed else 4, fillstyle="none" if line.dashed else "full",
        )  # fmt: skip
        if line.spread:
            ax.errorbar(line.x, line.y, line.spread, color=hue, linestyle="", elinewidth=1.2, capsize=3)
    ax.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.log and decades >= 1:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(PLAIN)
    if panel.log_x:
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(PLAIN)
    if panel.names:
        # Where a stage of the model begins; the names of all layers are in the data.
        stages = [name.partition(".")[0] for name in panel.names]
        begins = [at for at, stage in enumerate(stages) if at == 0 or stage != stages[at - 1]]
        ax.set_xticks(begins, [stages[at] for at in begins], ha="left")


def _name(ax: Axes, panel: Panel, palette: Palette) -> None:
    """Write the labels that stand beside their lines, at the points where those pass a height."""
    low, high = ax.get_ylim()
    for line in panel.lines:
        if line.beside is None:
            continue
        share, side = line.beside
        # A curve that does not come so low is named at its lowest point.
        height = max(low + share * (high - low), min(line.y))
        order = np.argsort(line.y)
        at = float(np.interp(height, np.asarray(line.y)[order], np.asarray(line.x)[order]))
        ax.annotate(
            line.label, (at, height), (7 if side == "right" else -7, 0), textcoords="offset points", va="center",
            ha="left" if side == "right" else "right", color=palette.hues[line.hue % len(palette.hues)],
            fontsize=LABEL_SIZE,
        )  # fmt: skip


def _map(canvas: Canvas, ax: Axes, map: HeatMap, together: Sequence[HeatMap], palette: Palette) -> None:
    values = np.array(map.values, dtype=float)
    finite = np.concatenate([np.array(other.values, dtype=float).flatten() for other in together])
    finite = finite[np.isfinite(finite)]
    if map.log:
        low = max(float(finite.min()), 1e-4)
        norm: Normalize = LogNorm(low, max(float(finite.max()), 10 * low))
        values = np.where(np.isfinite(values), np.maximum(values, low), values)
    else:
        norm = Normalize(0, float(finite.max()))
    edges = _edges(map.x)
    # One picture instead of thousands of rectangles.
    mesh = ax.pcolormesh(edges, np.arange(len(map.rows) + 1), values, cmap=MAP_COLOURS, norm=norm, rasterized=True)
    ax.invert_yaxis()
    ax.grid(False)
    step = -(-len(map.rows) // 40)
    ax.set_yticks(np.arange(0, len(map.rows), step) + 0.5, list(map.rows)[::step], fontsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set(title=map.title, xlabel=map.x_label)
    for position, _ in map.spans:
        if edges[0] < position < edges[-1]:
            ax.axvline(position, color=palette.hues[1], linewidth=1.2)
    bar = canvas.colorbar(mesh, ax=ax, label=map.value_label, pad=0.01, fraction=0.04)
    if map.log:
        bar.ax.yaxis.set_major_formatter(PLAIN)
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.outline.set_edgecolor(palette.grid)  # type: ignore[operator]


def _edges(x: Any) -> Any:
    """Borders of the cells around x; an exponent e stands for [e, e + 1)."""
    x = np.asarray(x, dtype=float)
    step = float(np.median(np.diff(x))) if len(x) > 1 else 1.0
    return np.append(x, x[-1] + (step if math.isfinite(step) and step > 0 else 1.0))


def _map_height(map: HeatMap) -> float:
    return max(1.9, 1.0 + 0.13 * min(len(map.rows), 40))


def _decades(panels: Sequence[Panel]) -> float:
    values = [value for panel in panels for line in panel.lines for value in line.y if value > 0]
    return math.log10(max(values) / min(values)) if values else 0.0
