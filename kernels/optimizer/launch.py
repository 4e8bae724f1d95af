"""The optimizer step in one pass over memory: FP32 gradient, 16-bit master, FP32 state -> master, FP8 weight.

Arithmetic is FP32 and follows torch's optimizers; roundings are the recipe's. Never synchronizes with the host: with a
non-finite gradient the kernel changes nothing. Both kernels are torch operators, each over a group of parameters that
one launch takes, so that CUDA graphs, compiled graphs and the profiler know them by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fp8repro.engines.cpu.layout import transposed_matrices
from fp8repro.engines.guards import address, read, spell
from fp8repro.engines.updates import Parameter, Rule
from fp8repro.kernels.optimizer import device as updates
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import INTERPRETED, capability, cdiv, check_device, launch, signed_words
from fp8repro.numerics.reference import counted
from fp8repro.numerics.rounding import Rounding
from fp8repro.numerics.streams import signed64

BLOCK = (1 << 15) if INTERPRETED else 1024
RULES = {"sgd": 0, "adam": 1, "adamw": 2}
MASTER_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16}


def gradient_control(parameters: Sequence[Parameter], scale: float = 1.0, clip_norm: float | None = None) -> Tensor:
    """See `updates.Engine`; counts the values that are not finite, and does not wait for the result."""
    partials = [
        gradient_norms([p.grad for p in members], [p.master for p in members], scale) for members in _groups(parameters)
    ]
    if not partials:
        raise ValueError("parameters: got none, expected at least one")
    # Summed here, in one order, so that scheduling changes no bit.
    square, bad = torch.cat(partials).sum(0)
    norm = square.sqrt()
    factor = torch.ones_like(norm) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.stack([bad, factor, norm])


@torch.library.custom_op("fp8repro::gradient_norms", mutates_args=())
def gradient_norms(grads: list[Tensor], masters: list[Tensor], scale: float) -> Tensor:
    """Per block of values: sum of the squares of the unscaled gradients, and number of non-finite ones; FP64 [n, 2]."""
    members = [Parameter(master, grad) for master, grad in zip(masters, grads, strict=True)]
    table, chunks = _tables(members)
    partial = torch.empty((len(chunks), 2), dtype=torch.float64, device=table.device)
    arguments = (table, chunks, partial, 1 / scale)
    launch(updates.gradient_norms, (len(chunks),), table.device, *arguments, ALIGNED=_aligned(members), BLOCK=BLOCK)
    return partial


@gradient_norms.register_fake
def _(grads: list[Tensor], masters: list[Tensor], scale: float) -> Tensor:
    return grads[0].new_empty((sum(-(-grad.numel() // BLOCK) for grad in grads), 2), dtype=torch.float64)


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
    """See `updates.Engine`; launches nothing before all arguments are checked."""
    if rule.name not in RULES:
        raise ValueError(f"rule.name: got {rule.name!r}, expected one of {', '.join(RULES)}")
    states = 2 if rule.name != "sgd" else 1 if rule.momentum else 0
    for parameter in parameters:
        _check(parameter, states, weight)
    for members in _groups(parameters):
        update_group(
            [p.grad for p in members],
            [p.master for p in members],
            [t for p in members for t in p.state],
            [p.weight for p in members if p.weight is not None],
            [p.updated for p in members if p.updated is not None],
            control,
            [signed64(stream) for p in members for stream in (p.master_stream, p.weight_stream)],
            rule.name,
            (rule.lr, rule.momentum, rule.beta2, rule.eps, rule.weight_decay),
            rule.nesterov,
            step,
            spell(master),
            spell(weight),
            scale,
            signed64(seed),
            members[0].order,
        )


@torch.library.custom_op("fp8repro::update", mutates_args=("masters", "states", "weights", "updated"))
def update_group(
    grads: list[Tensor],
    masters: list[Tensor],
    states: list[Tensor],
    weights: list[Tensor],
    updated: list[Tensor],
    control: Tensor,
    streams: list[int],
    rule: str,
    numbers: list[float],
    nesterov: bool,
    step: int,
    master_rounding: str,
    weight_rounding: str,
    scale: float,
    seed: int,
    order: str = "row_major",
) -> None:
    """One launch of `update`, for parameters of the same dtypes and kind of layout. No fake: it makes no tensor.

    Args:
        grads, masters: one a parameter.
        states: those of the first parameter, then of the second and so on.
        weights, updated: one a parameter, or none at all.
        control: what `gradient_control` gave.
        streams: of each parameter's master and weight, signed.
        rule: sgd, adam or adamw.
        numbers: learning rate, momentum or first beta, second beta, epsilon, weight decay.
        nesterov, step, scale, seed: as in `update`; the seed is signed.
        order: how elements are counted for their random bits.
        master_rounding, weight_rounding: as `guards.spell` gives them.
    """
    count = len(masters)
    each = len(states) // count
    members = [
        Parameter(
            masters[i],
            grads[i],
            tuple(states[i * each : (i + 1) * each]),
            streams[2 * i],
            weights[i] if weights else None,
            streams[2 * i + 1],
            updated[i] if updated else None,
            order=order,
        )
        for i in range(count)
    ]
    lr, momentum, beta2, eps, weight_decay = numbers
    table, chunks = _tables(members)
    launch(
        updates.update,
        (len(chunks),),
        table.device,
        table,
        chunks,
        control,
        1 / scale,
        updates.Numbers(lr, weight_decay, momentum, beta2, eps, 1 - momentum**step, 1 - beta2**step),
        *signed_words(seed),
        RULE=RULES[rule],
        NESTEROV=nesterov,
        HAS_MOMENTUM=momentum != 0,
        FIRST=step == 1,
        MASTER_TYPE=MASTER_TYPES[masters[0].dtype],
        # Without the GPU's own conversion, which may drop a NaN's sign.
        MASTER_ENCODING=codec.encoding(read(master_rounding), (0, 0)),
        WEIGHT_ENCODING=codec.encoding(read(weight_rounding), capability(table.device)) if weights else None,
        HAS_UPDATED=bool(updated),
        PERMUTED=_permuted(members[0]),
        ALIGNED=_aligned(members),
        BLOCK=BLOCK,
    )


def _groups(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """Parameters that one launch can take: the same dtypes and kind of layout. Empty ones are left out."""
    groups: dict[Any, list[Parameter]] = {}
    for p in parameters:
        if p.master.numel():
            outputs = (p.weight is not None, p.updated is not None)
            key = (p.master.device, p.master.dtype, p.grad.dtype, outputs, p.order, _permuted(p))
            groups.setdefault(key, []).append(p)
    return list(groups.values())


def _permuted(p: Parameter) -> bool:
    return not counted(p.master, p.order).is_contiguous()


def _matrix(p: Parameter) -> tuple[int, int]:
    """Rows and columns of the matrices that lie in a master whose elements count in another order than they lie."""
    in_order = counted(p.master, p.order)
    _, rows, columns = transposed_matrices(tuple(in_order.shape), in_order.stride()) or (1, 0, 0)
    return (rows, columns) if rows else (1, 1)


def _aligned(members: Sequence[Parameter]) -> bool:
    tensors = [t for p in members for t in (p.master, p.grad, *p.state, p.weight, p.updated)]
    return all(address(t) % 16 == 0 for t in tensors if t is not None)


def _tables(members: Sequence[Parameter]) -> tuple[Tensor, Tensor]:
    """The table of tensors (`updates.COLUMNS` int64 columns), and each chunk's (tensor, block)."""
    rows = []
    for p in members:
        state = [address(t) for t in p.state] + [0] * (2 - len(p.state))
        weight, updated = (0 if t is None else address(t) for t in (p.weight, p.updated))
        streams = (signed64(p.master_stream), signed64(p.weight_stream))
        where = (address(p.grad), address(p.master), *state, weight)
        rows.append((*where, p.master.numel(), *streams, *_matrix(p), updated))
    device = members[0].master.device
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cuda":
        # From pinned memory the copy does not make the host wait.
        table = table.pin_memory().to(device, non_blocking=True)
    return table, _chunks(tuple(r[5] for r in rows), device)


@lru_cache(maxsize=64)
def _chunks(counts: tuple[int, ...], device: torch.device) -> Tensor:
    blocks = torch.tensor([cdiv(count, BLOCK) for count in counts])
    tensor = torch.repeat_interleave(torch.arange(len(counts)), blocks)
    first = blocks.cumsum(0) - blocks
    return torch.stack([tensor, torch.arange(len(tensor)) - first[tensor]], 1).contiguous().to(device)


def _strides(t: Tensor) -> tuple[int, ...]:
    """Strides of dimensions of more than one element; torch's optimizers set the others as they like."""
    return tuple(stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)


def _check(p: Parameter, states: int, weight: Rounding) -> None:
    check_device("master", p.master)
    if p.master.dtype not in MASTER_TYPES:
        raise ValueError(f"master: got {p.master.dtype}, expected torch.float16 or torch.float32")
    in_order = counted(p.master, p.order)
    if not (in_order.is_contiguous() or transposed_matrices(tuple(in_order.shape), in_order.stride())):
        raise ValueError(f"master: got strides {p.master.stride()}, expected contiguous or channels_last")
    if len(p.state) != states:
        raise ValueError(f"state: got {len(p.state)} tensors, expected {states}")
    wanted = [("grad", p.grad, (torch.float32,))]
    wanted += [("state", t, (torch.float32,)) for t in p.state]
    if p.updated is not None:
        wanted.append(("updated", p.updated, (torch.float32,)))
    if p.weight is not None:
        wanted.append(("weight", p.weight, (weight.format.dtype,)))  # type: ignore[arg-type]
        if not weight.format.is_fp8:
            raise ValueError(f"weight: got format {weight.format.name}, expected e5m2 or e4m3")
    for name, tensor, dtypes in wanted:
        like = (tensor.shape, _strides(tensor), tensor.device) == (p.master.shape, _strides(p.master), p.master.device)
        if not like or tensor.is_neg() or tensor.dtype not in dtypes:
            given = f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
            place = f"of shape {tuple(p.master.shape)}, strides {p.master.stride()}, on {p.master.device}"
            raise ValueError(f"{name}: got {given}, expected {' or '.join(map(str, dtypes))} {place}")
