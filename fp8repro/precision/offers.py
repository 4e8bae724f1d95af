"""Codes that travel beside FP32 tensors: who rounds a tensor first spares the layers behind it a pass.

The one place that knows of them; nothing is hung on a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fp8repro.engines.guards import spell
from fp8repro.numerics.rounding import Rounding


@dataclass(frozen=True)
class Offer:
    """The codes of a tensor as it was at a version, under a rounding without random bits and scale."""

    version: int
    how: Rounding
    codes: Tensor
    transposed: Tensor | None


class Offers:
    """Offers by tensor; one is gone with its tensor, and void once the tensor is changed."""

    def __init__(self) -> None:
        """None yet."""
        self._offers: Any = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[Offers], tuple[()]]:
        """A copy, or what is unpickled, begins without: its tensors are others."""
        return Offers, ()

    def make(self, x: Tensor, how: Rounding, codes: Tensor, transposed: Tensor | None = None) -> None:
        """Offer the codes of `x`; nothing is offered where changes of a tensor cannot be told.

        Args:
            x: FP32 tensor.
            how: the rounding; the codes are worth something to layers with this very one.
            codes: its result, in the format's storage dtype.
            transposed: `Operand.transposed`, or None.
        """
        # An inference tensor has no version, and a compiler knows none.
        if not torch.compiler.is_compiling() and not x.is_inference():
            self._offers[x] = Offer(x._version, how, codes, transposed)

    def find(self, x: Tensor, how: Rounding) -> Offer | None:
        """What is offered for a tensor under a rounding, or None."""
        offer: Offer | None = self._offers.get(x)
        return offer if offer is not None and (offer.version, offer.how) == (x._version, how) else None


def offered(consumers: Rounding) -> str:
    """How a normalization or a pooling can round for the layers behind it (`guards.spell`); "" where it cannot.

    Not to random bits, which each layer draws for itself, nor to a scale, which needs the whole tensor first.
    """
    spec = consumers
    return spell(spec) if spec.format.is_fp8 and not spec.is_stochastic and spec.scaling == "none" else ""
