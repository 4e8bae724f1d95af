"""The optimizer's step in one pass over memory on a CPU; see update.cpp and `fp8repro.precision.fused_step`.

Arithmetic is FP32, in the order of torch's optimizers: SGD gives their bits. Adam's differ from torch's in the last
one, where the latter takes roots that are not always rounded right.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp8repro.engines.cpu import build
from fp8repro.engines.cpu.layout import counted_matrices
from fp8repro.engines.cpu.native import format_address
from fp8repro.engines.guards import address, addressable
from fp8repro.engines.updates import Parameter, Rule
from fp8repro.numerics.rounding import ORDERS, Rounding
from fp8repro.numerics.streams import signed64

_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_KINDS = {"sgd": 0, "adam": 1, "adamw": 2}
# Members of `Parameter` in update.cpp: five addresses, a stream, the master's type and the layout.
_COLUMNS = 10


class _Rule(ctypes.Structure):
    """Mirrors `Rule` in update.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "nesterov", "first")),
        *((name, ctypes.c_float) for name in ("scale", "factor", "rate", "decay", "momentum")),
        *((name, ctypes.c_float) for name in ("beta2", "rest2", "root2", "eps")),
    )


@functools.cache
def _library() -> Any:
    found = build.load("update")
    if found is None:
        return None
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.fp8repro_sum_of_squares.argtypes = [pointer, int64, int32]
    found.fp8repro_sum_of_squares.restype = ctypes.c_double
    found.fp8repro_update.argtypes = [pointer, int64, pointer, pointer, ctypes.c_uint64, int32]
    return found


def takes(parameters: Sequence[Tensor]) -> bool:
    """Whether the engine is there, and can update these parameters: dense CPU tensors with values of 16 or 32 bits."""
    fits = all(
        p.device.type == "cpu" and p.dtype in _TYPES and all(_layout(p, order) is not None for order in ORDERS)
        for p in parameters
    )
    return fits and addressable(*parameters) and _library() is not None


def gradient_control(parameters: Sequence[Parameter], scale: float = 1.0, clip_norm: float | None = None) -> Tensor:
    """See `updates.Engine`; the same sums at any number of threads."""
    table, count = _table(parameters)
    square = _library().fp8repro_sum_of_squares(table, count, torch.get_num_threads())
    # The squares of FP32 values do not overflow in FP64.
    if not math.isfinite(square):
        return torch.tensor([1.0, 1.0, math.inf], dtype=torch.float64, device="cpu")
    norm = math.sqrt(square) / scale
    factor = 1.0 if clip_norm is None or norm <= clip_norm else clip_norm / (norm + 1e-6)
    return torch.tensor([0.0, factor, norm], dtype=torch.float64, device="cpu")


def update(
    parameters: Sequence[Parameter],
    rule: Rule,
    step: int,
    master: Rounding,
    weight: Rounding,
    control: Tensor,
    scale: float = 1.0,
    seed: int = 0,
) -> None:
    """See `updates.Engine`; writes no next step's weights, and rounds to 16 bit or less."""
    if master.is_identity:
        raise ValueError(f"master.format: got {master.format.name}, expected one that rounds")
    bad, factor, _ = control.tolist()
    if bad:
        return
    table, count = _table(parameters, ordered=master.is_stochastic)
    adam = rule.name != "sgd"
    native = _Rule(
        kind=_KINDS[rule.name],
        nesterov=rule.nesterov,
        first=step == 1,
        scale=scale,
        factor=factor,
        rate=-rule.lr / (1 - rule.momentum**step) if adam else -rule.lr,
        decay=1 - rule.lr * rule.weight_decay if rule.name == "adamw" else rule.weight_decay,
        momentum=1 - rule.momentum if adam else rule.momentum,
        beta2=rule.beta2,
        rest2=1 - rule.beta2,
        root2=math.sqrt(1 - rule.beta2**step),
        eps=rule.eps,
    )
    address = format_address(master)
    _library().fp8repro_update(table, count, ctypes.byref(native), address, seed, torch.get_num_threads())


def _table(parameters: Sequence[Parameter], ordered: bool = False) -> tuple[Any, int]:
    """The parameters as update.cpp reads them, and how many there are; empty ones are left out."""
    columns: list[int] = []
    for p in parameters:
        if not p.master.numel():
            continue
        layout = _check(p)
        states = [address(t) for t in p.state] + [0] * (2 - len(p.state))
        updated = 0 if p.updated is None else address(p.updated)
        where = layout if ordered else (1, 0, p.master.numel())
        stream = signed64(p.master_stream)
        columns += (address(p.grad), address(p.master), *states, updated, stream, _TYPES[p.master.dtype], *where)
    return (ctypes.c_int64 * len(columns))(*columns), len(columns) // _COLUMNS


def _check(p: Parameter) -> tuple[int, int, int]:
    """The master's layout, if all else fits it."""
    layout = _layout(p.master, p.order)
    if p.master.device.type != "cpu" or p.master.dtype not in _TYPES or layout is None or not addressable(p.master):
        given = f"{p.master.dtype}, strides {p.master.stride()}, on {p.master.device}"
        raise ValueError(f"master: got {given}, expected a dense tensor of 16 or 32 bits on the CPU")
    if p.weight is not None:
        raise ValueError("weight: got a tensor, expected None on the CPU")
    shape, strides = p.master.shape, p.master.stride()
    others = [("grad", p.grad), *(("state", t) for t in p.state)]
    for name, tensor in others if p.updated is None else [*others, ("updated", p.updated)]:
        fits = tensor.dtype == torch.float32 and tensor.shape == shape and tensor.stride() == strides
        if not fits or tensor.device.type != "cpu" or not addressable(tensor):
            given = f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
            place = f"shape {tuple(shape)}, strides {strides}"
            raise ValueError(f"{name}: got {given}, expected torch.float32 of {place}")
    return layout


def _layout(t: Tensor, order: str) -> tuple[int, int, int] | None:
    """`layout.counted_matrices` of a tensor."""
    return counted_matrices(t.shape, t.stride(), order)
