"""Sums and products of an LSTM cell in one pass of C++, to the bits of torch's operators one by one.

Sigmoids and hyperbolic tangents stay torch's, whose vector library rounds as no other does.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fp8repro.engines.cpu import build
from fp8repro.engines.guards import address, plain

_GRAIN = 32768


@functools.cache
def _library() -> Any:
    found = build.load("lstm")
    if found is None:
        return None
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.fp8repro_lstm_forward.argtypes = [pointer] * 3 + [int64] * 2 + [int32] * 2
    found.fp8repro_lstm_backward.argtypes = [pointer] * 7 + [int64] * 2 + [int32] * 2
    return found


@functools.cache
def _fused() -> bool | None:
    """Whether torch multiplies and adds with one rounding here; None where it does neither that nor two."""
    # Sums of nearly opposite values show every rounding.
    b, c = (torch.linspace(low, 1.9, 1021) for low in (0.3, 1.1))
    given = torch.addcmul(-b * c, b, c)
    once = (b.double() * c.double() - (b * c).double()).float()
    if torch.equal(given, once):
        return True
    return False if torch.equal(given, torch.zeros_like(b)) else None


def takes(*tensors: Tensor) -> bool:
    """Whether the engine computes a cell of these: contiguous FP32 matrices on a CPU, and nobody traces."""
    fit = all(t.is_cpu and t.dtype == torch.float32 and t.dim() == 2 and t.is_contiguous() for t in tensors)
    return fit and plain(*tensors) and _library() is not None and _fused() is not None


def cell_state(activated: Tensor, cell: Tensor) -> Tensor:
    """The new cell state, torch.addcmul(f * cell, i, g).

    Args:
        activated: gates after activation [B, 4 * width]: input, forget, cell, output; the engine `takes` all.
        cell: [B, width].
    """
    rows, width = cell.shape
    new = torch.empty_like(cell)
    arguments = (rows, width, bool(_fused()), _threads(activated))
    _library().fp8repro_lstm_forward(address(activated), address(cell), address(new), *arguments)
    return new


def cell_gradients(
    activated: Tensor, cell: Tensor, squashed: Tensor, grad_hidden: Tensor, grad_cell: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates before activation and of the cell state.

    Args:
        activated, cell: as `cell_state` got them.
        squashed: tanh of the new cell state [B, width].
        grad_hidden: gradient of the hidden state, output gate * squashed.
        grad_cell: gradient of the new cell state.
    """
    rows, width = cell.shape
    gates, state = torch.empty_like(activated), torch.empty_like(cell)
    tensors = (activated, cell, squashed, grad_hidden, grad_cell, gates, state)
    arguments = (rows, width, bool(_fused()), _threads(activated))
    _library().fp8repro_lstm_backward(*(address(t) for t in tensors), *arguments)
    return gates, state


def _threads(t: Tensor) -> int:
    return torch.get_num_threads() if t.numel() > _GRAIN else 1
