"""Counts what rounding did: underflow, overflow and the largest magnitude, per layer and role.

Costs nothing when off: a layer that asks for a buffer gets None, and the quantizer counts nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp8repro.numerics.rounding import Rounding

SAMPLED_VALUES = 16384
FP32_BIAS = 127


@dataclass
class Telemetry:
    """Statistics of the current step, collected every `every` steps (0: never).

    Attributes:
        roundings: how each layer rounds each role; parts of a layer round as it does.
    """

    every: int = 0
    active: bool = False
    roundings: dict[str, dict[str, Rounding]] = field(default_factory=dict)
    _buffers: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    _exponents: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    _lost: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """Decide whether this step is measured, and forget the one before."""
        self.measure()
        self.active = self.every > 0 and step % self.every == 0

    def measure(self) -> None:
        """Count from zero from now on, whatever the step."""
        self.active = True
        self._buffers.clear()
        self._exponents.clear()
        self._lost.clear()

    def buffer(self, layer: str, role: str, operand: str, device: torch.device) -> Tensor | None:
        """The float64 buffer (`quantizer.STATISTICS`) to count into, or None when off."""
        if not self.active:
            return None
        key = (layer, role, operand)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(4, dtype=torch.float64, device=device)
        return self._buffers[key]

    def count_exponents(self, layer: str, role: str, operand: str, x: Tensor) -> None:
        """Add the binary exponents of the normal FP32 values of `x` to a histogram; nothing when off.

        Of a large tensor, evenly spaced values are counted: a histogram needs no more, and rounding is much faster.
        """
        if not self.active:
            return
        values = x.detach().flatten()
        stride = max(1, values.numel() // SAMPLED_VALUES)
        # A stride that shares a factor with a dimension (3x3 kernels) would see the same places of it only.
        while math.gcd(stride, 2 * 3 * 5 * 7) > 1:
            stride += 1
        values = values[::stride].to(torch.float32)
        # The exponent field; 0 holds zeros and FP32's subnormals, 255 infinities and NaN.
        fields = values.view(torch.int32).bitwise_right_shift(23).bitwise_and(255)
        counts = torch.bincount(fields, minlength=256)
        key = (layer, role, operand)
        self._exponents[key] = self._exponents[key] + counts if key in self._exponents else counts

    def record_update(self, name: str, before: Tensor, updated: Tensor, after: Tensor) -> None:
        """Count the updates of one master tensor that rounding undid.

        Args:
            name: parameter name.
            before: master before the update.
            updated: FP32 result of the update.
            after: master after rounding, as stored.
        """
        changed = updated != before
        self._lost[name] = (changed.sum(), (changed & (after == before)).sum())

    def rows(self) -> list[dict[str, Any]]:
        """One row per (layer, role, operand): counts, shares of the non-zero inputs, absmax, exponents.

        `exponents` is [lowest, counts]: how many sampled values lie in [2^e, 2^(e + 1)) for e = lowest, lowest + 1, ...
        """
        rows: list[dict[str, Any]] = []
        for (layer, role, operand), buffer in self._buffers.items():
            nonzero, underflow, overflow, absmax = buffer.tolist()
            rows.append(
                {
                    "layer": layer,
                    "role": role,
                    "operand": operand,
                    "nonzero": int(nonzero),
                    "underflow": int(underflow),
                    "overflow": int(overflow),
                    "underflow_share": underflow / nonzero if nonzero else 0.0,
                    "absmax": absmax,
                }
            )
            how = self._rounding(layer, role)
            if how is not None:
                rows[-1] |= {"format": how.format.name, "rounding": how.rounding}
            counts = self._exponents.get((layer, role, operand))
            if counts is not None:
                rows[-1]["exponents"] = _trimmed(counts.tolist())
        for name, (changed, lost) in self._lost.items():
            rows.append(
                {
                    "layer": name,
                    "role": "master",
                    "operand": "update",
                    "nonzero": int(changed),
                    "lost": int(lost),
                    "lost_share": int(lost) / int(changed) if int(changed) else 0.0,
                }
            )
        return rows

    def _rounding(self, layer: str, role: str) -> Rounding | None:
        while layer and layer not in self.roundings:
            layer = layer.rpartition(".")[0]
        return self.roundings.get(layer, {}).get(role)

    def share(self, role: str, operand: str | None = None) -> float:
        """Underflow share of a role (and operand) over all layers of this step; NaN when nothing was counted."""
        picked = [b for (_, r, o), b in self._buffers.items() if r == role and operand in (None, o)]
        nonzero = sum(float(b[0]) for b in picked)
        return sum(float(b[1]) for b in picked) / nonzero if nonzero else float("nan")

    def lost_share(self) -> float:
        """Share of non-zero updates that the masters' rounding undid in this step; NaN when not measured."""
        changed = sum(int(c) for c, _ in self._lost.values())
        return sum(int(lost) for _, lost in self._lost.values()) / changed if changed else float("nan")


def _trimmed(counts: list[int]) -> list[Any]:
    """The exponent of the first count (by exponent field) that is not zero, and the counts from there to the last."""
    filled = [field for field in range(1, 255) if counts[field]]
    if not filled:
        return [0, []]
    return [filled[0] - FP32_BIAS, counts[filled[0] : filled[-1] + 1]]
