"""The optimizer step in one pass over memory: FP32 or E5M2 gradient, 16-bit master, FP32 state -> master, FP8 weight.

Arithmetic is FP32 and follows torch's optimizers; roundings are the recipe's. Never synchronizes with the host: a
non-finite gradient makes the kernel leave everything as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8repro.fused_step import Parameter, Rule
from fp8repro.kernels import codec, updates
from fp8repro.kernels.launch import INTERPRETED, check_device, launch, signed64, signed_words
from fp8repro.kernels.quantize import raw_codes
from fp8repro.recipe import RoleSpec

BLOCK = (1 << 15) if INTERPRETED else 1024
MASTER_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16}


def gradient_control(parameters: Sequence[Parameter], scale: float = 1.0, clip_norm: float | None = None) -> Tensor:
    """See `fp8repro.fused_step.Engine`; counts the values that are not finite, and does not wait for the result."""
    partials = []
    for members in _groups(parameters):
        table, chunks = _tables(members)
        partial = torch.empty((len(chunks), 2), dtype=torch.float64, device=table.device)
        options = {"FP8_GRADIENT": members[0].grad.dtype != torch.float32, "ALIGNED": _aligned(members)}
        device, arguments = table.device, (table, chunks, partial, 1 / scale)
        launch(updates.gradient_norms, (len(chunks),), device, *arguments, **options, BLOCK=BLOCK)
        partials.append(partial)
    if not partials:
        raise ValueError("parameters: got none, expected at least one")
    # One order of addition whatever the scheduling.
    square, bad = torch.cat(partials).sum(0)
    norm = square.sqrt()
    factor = torch.ones_like(norm) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.stack([bad, factor, norm])


def update(
    parameters: Sequence[Parameter],
    rule: Rule,
    step: int,
    master: RoleSpec,
    weight: RoleSpec,
    control: Tensor,
    scale: float = 1.0,
    seed: int = 0,
) -> None:
    """See `fp8repro.fused_step.Engine`; launches nothing before all arguments are checked."""
    if rule.name not in ("sgd", "adam", "adamw"):
        raise ValueError(f"rule.name: got {rule.name!r}, expected one of sgd, adam, adamw")
    states = 2 if rule.name != "sgd" else 1 if rule.momentum else 0
    for parameter in parameters:
        _check(parameter, states, weight)
    master_format, weight_format = master.float_format, weight.float_format
    for members in _groups(parameters):
        table, chunks = _tables(members)
        launch(
            updates.update,
            (len(chunks),),
            table.device,
            table,
            chunks,
            control,
            1 / scale,
            rule.lr,
            rule.weight_decay,
            rule.momentum,
            rule.beta2,
            rule.eps,
            1 - rule.momentum**step,
            1 - rule.beta2**step,
            *signed_words(seed),
            RULE={"sgd": 0, "adam": 1, "adamw": 2}[rule.name],
            NESTEROV=rule.nesterov,
            HAS_MOMENTUM=rule.momentum != 0,
            FIRST=step == 1,
            FP8_GRADIENT=members[0].grad.dtype != torch.float32,
            MASTER_TYPE=MASTER_TYPES[members[0].master.dtype],
            MASTER_EB=master_format.exponent_bits,
            MASTER_MB=master_format.mantissa_bits,
            MASTER_ROUNDING=codec.ROUNDING_CODES[master.rounding],
            MASTER_SATURATE=master.overflow == "saturate",
            MASTER_SUBNORMAL_NEAREST=master.subnormal_rounding == "nearest",
            HAS_WEIGHT=members[0].weight is not None,
            WEIGHT_EB=weight_format.exponent_bits,
            WEIGHT_MB=weight_format.mantissa_bits,
            WEIGHT_INF=weight_format.has_infinity,
            WEIGHT_ROUNDING=codec.ROUNDING_CODES[weight.rounding],
            WEIGHT_SATURATE=weight.overflow == "saturate",
            WEIGHT_SUBNORMAL_NEAREST=weight.subnormal_rounding == "nearest",
            PERMUTED=_permuted(members[0].master),
            ALIGNED=_aligned(members),
            BLOCK=BLOCK,
        )


def _groups(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """Parameters that one launch can take: the same dtypes and kind of layout. Empty ones are left out."""
    groups: dict[Any, list[Parameter]] = {}
    for p in parameters:
        if p.master.numel():
            key = (p.master.device, p.master.dtype, p.grad.dtype, p.weight is not None, _permuted(p.master))
            groups.setdefault(key, []).append(p)
    return list(groups.values())


def _permuted(t: Tensor) -> bool:
    return not t.is_contiguous()


def _aligned(members: Sequence[Parameter]) -> bool:
    tensors = [t for p in members for t in (p.master, p.grad, *p.state, *([] if p.weight is None else [p.weight]))]
    return all(t.data_ptr() % 16 == 0 for t in tensors)


def _tables(members: Sequence[Parameter]) -> tuple[Tensor, Tensor]:
    """The table of tensors (`updates.COLUMNS` int64 columns), and each chunk's (tensor, block)."""
    rows = []
    for p in members:
        state = [t.data_ptr() for t in p.state] + [0] * (2 - len(p.state))
        weight = 0 if p.weight is None else raw_codes(p.weight).data_ptr()
        channels, taps = (p.master.shape[1], p.master.shape[2:].numel()) if _permuted(p.master) else (1, 1)
        streams = (signed64(p.master_stream), signed64(p.weight_stream))
        rows.append(
            (p.grad.data_ptr(), p.master.data_ptr(), *state, weight, p.master.numel(), *streams, channels, taps)
        )
    device = members[0].master.device
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cuda":
        # From pinned memory the copy does not make the host wait.
        table = table.pin_memory().to(device, non_blocking=True)
    return table, _chunks(tuple(r[5] for r in rows), device)


@lru_cache(maxsize=64)
def _chunks(counts: tuple[int, ...], device: torch.device) -> Tensor:
    blocks = torch.tensor([triton.cdiv(count, BLOCK) for count in counts])
    tensor = torch.repeat_interleave(torch.arange(len(counts)), blocks)
    first = blocks.cumsum(0) - blocks
    return torch.stack([tensor, torch.arange(len(tensor)) - first[tensor]], 1).contiguous().to(device)


def _check(p: Parameter, states: int, weight: RoleSpec) -> None:
    check_device("master", p.master)
    if p.master.dtype not in MASTER_TYPES:
        raise ValueError(f"master: got {p.master.dtype}, expected torch.float16 or torch.float32")
    dense = p.master.is_contiguous() or (
        p.master.dim() == 4 and p.master.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense:
        raise ValueError(f"master: got strides {p.master.stride()}, expected contiguous or channels_last")
    if len(p.state) != states:
        raise ValueError(f"state: got {len(p.state)} tensors, expected {states}")
    wanted = [("grad", p.grad, (torch.float32, torch.float8_e5m2))]
    wanted += [("state", t, (torch.float32,)) for t in p.state]
    if p.weight is not None:
        wanted.append(("weight", p.weight, (weight.float_format.dtype,)))  # type: ignore[arg-type]
        if not weight.float_format.is_fp8:
            raise ValueError(f"weight: got format {weight.format}, expected e5m2 or e4m3")
    for name, tensor, dtypes in wanted:
        like = (tensor.shape, tensor.stride(), tensor.device) == (p.master.shape, p.master.stride(), p.master.device)
        if not like or tensor.dtype not in dtypes:
            given = f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
            place = f"of shape {tuple(p.master.shape)}, strides {p.master.stride()}, on {p.master.device}"
            raise ValueError(f"{name}: got {given}, expected {' or '.join(map(str, dtypes))} {place}")
