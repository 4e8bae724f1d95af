"""What tests of training steps share: membership in a format's set by ml_dtypes, a recorder of torch's own products.

The recorder sits under autograd, at torch's dispatcher, so it sees what is multiplied whatever a layer claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
_BIAS_FIRST = ("addmm", "baddbmm")
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward")


def in_set(x: Tensor, fmt: str) -> bool:
    """True when every value is one of the format's (NaN and infinities included)."""
    values = x.detach().to(torch.float32).numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(DTYPES[fmt]).astype(np.float32)
    return bool(np.array_equal(values, rounded, equal_nan=True))


@dataclass
class Recorder(TorchDispatchMode):
    """Records the operands of every matrix product and convolution that torch computes."""

    products: list[tuple[str, tuple[Tensor, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            operands = args[1:3] if name in _BIAS_FIRST else args[:2]
            if name == "convolution_backward":
                error, x, weight, *_, wanted = args
                # The tensor that is not read (see EmulateBackend) carries a shape alone.
                operands = (error, *([weight] if wanted[0] else []), *([x] if wanted[1] else []))
            self.products.append((name, tuple(t.detach().clone() for t in operands)))
        return func(*args, **(kwargs or {}))
