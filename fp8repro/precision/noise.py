"""How much of a tensor a rounding loses: rows by layer and role, which of them hurt most, as a table and a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp8repro.numerics.formats import FloatFormat

ROLES = ("weight", "activation", "error", "gradient")


@dataclass(frozen=True)
class NoiseRow:
    """What one rounding did to one operand of a layer.

    Attributes:
        layer, role, operand: as in telemetry.
        snr: signal to noise in dB, of the values that are finite; inf where nothing was lost.
        underflow: share of the values other than zero that became zero.
        overflow: share of them that exceed the format's range.
    """

    layer: str
    role: str
    operand: str
    snr: float
    underflow: float
    overflow: float


def decibels(signal: float, noise: float) -> float:
    """Signal to noise of two sums of squares; NaN without a signal, -inf where the noise is not finite."""
    if not signal > 0:
        return math.nan
    if not math.isfinite(noise):
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def expected_snr(lowest: int, counts: Sequence[int], format: FloatFormat, rounding: str) -> float:
    """Signal to noise, in dB, of rounding values of which only the binary exponents are known.

    Args:
        lowest: exponent of the first count.
        counts: how many values lie in [2^e, 2^(e + 1)), for e = lowest, lowest + 1, ...; there their logarithms are
            taken as uniform. Those beyond the format's range are left out.
        format, rounding: how they are rounded.
    """
    signal = noise = 0.0
    for exponent, count in enumerate(counts, lowest):
        if exponent > format.max_exponent:
            continue
        square = 1.5 / math.log(2) * 4.0**exponent
        signal += count * square
        noise += count * _expected_noise(exponent, square, format, rounding)
    return decibels(signal, noise)


def _expected_noise(exponent: int, square: float, format: FloatFormat, rounding: str) -> float:
    """Mean squared error of one value of that exponent; `square` is its mean square."""
    step = max(exponent, format.min_exponent) - format.mantissa_bits
    quantum = 2.0**step
    if exponent >= step:
        return quantum**2 / {"nearest": 12, "stochastic": 6}.get(rounding, 3)
    if rounding == "stochastic":
        # Up with probability x / quantum, else to zero.
        return quantum * 2.0**exponent / math.log(2) - square
    return quantum**2 / 12 if rounding == "nearest" and exponent == step - 1 else square


def worst_first(rows: Iterable[NoiseRow]) -> list[NoiseRow]:
    """The rows by signal to noise, the least first; what loses values to overflow comes before all."""
    known = [row for row in rows if not math.isnan(row.snr)]
    return sorted(known, key=lambda row: (-row.overflow, row.snr))


def layers_to_exempt(rows: Iterable[NoiseRow]) -> list[str]:
    """Layers in the order in which to exempt them: those whose worst operand has lost most come first."""
    return list(dict.fromkeys(row.layer for row in worst_first(rows)))


def table(rows: Iterable[NoiseRow], limit: int | None = None) -> str:
    """One operand a line, the worst first."""
    from fp8repro.tabular import aligned

    cells = [
        (row.layer, row.role, row.operand, f"{row.snr:.1f}", f"{row.underflow:.2%}", f"{row.overflow:.2%}")
        for row in worst_first(rows)[:limit]
    ]
    return aligned(("layer", "role", "operand", "SNR (dB)", "underflow", "overflow"), cells)


def draw(rows: Iterable[NoiseRow], path: str | Path) -> None:
    """A figure: layers from top to bottom, roles from left to right, the worst operand's signal to noise as colour.

    Args:
        rows: in the order of the layers.
        path: where to write it; the ending says in which format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.role in ROLES and not math.isnan(row.snr)]
    layers = list(dict.fromkeys(row.layer for row in rows))
    worst = [[math.nan] * len(ROLES) for _ in layers]
    for row in rows:
        i, j = layers.index(row.layer), ROLES.index(row.role)
        # What loses nothing, and what is kept in 16 bit, is as good as the figure shows.
        worst[i][j] = min(row.snr, 60.0) if math.isnan(worst[i][j]) else min(worst[i][j], row.snr)
    figure = Figure(figsize=(5, 1.2 + 0.2 * max(len(layers), 4)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if layers:
        image = axes.imshow(worst, aspect="auto", cmap="viridis", vmin=0, vmax=40)
        figure.colorbar(image, label="signal to noise (dB), 40 and over alike")
    axes.set_xticks(range(len(ROLES)), ROLES)
    axes.set_yticks(range(len(layers)), layers, fontsize=6)
    figure.savefig(path, dpi=150)
