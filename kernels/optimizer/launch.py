"""The optimizer step in one pass over memory: FP32 gradient, 16-bit master, FP32 state -> master, FP8 weight.

Arithmetic is FP32 and follows torch's optimizers; roundings are the recipe's. Never synchronizes with the host: with a
non-finite gradient the kernel changes nothing. What changes from step to step lies in device memory, so that a captured
update can be repeated (`Check`, `Group`). Where somebody traces, the same is done by torch
operators, so that compiled graphs and the profiler know it by name.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from fp8repro.engines.cpu.layout import counted_matrices
from fp8repro.engines.guards import address, read, spell, untraced
from fp8repro.engines.updates import Parameter, Rule
from fp8repro.kernels.optimizer import device as updates
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import INTERPRETED, capability, check_device, launch, signed_words
from fp8repro.kernels.shared.tables import blocks_of, table_of, to_device
from fp8repro.numerics.rounding import Rounding
from fp8repro.numerics.streams import signed64

BLOCK = (1 << 15) if INTERPRETED else 1024
# Partial sums that one program adds at a time.
SUMS, SUM_WARPS = 4096, 16
TERMS, NUMBERS = updates.TERMS, updates.NUMBERS
RULES = {"sgd": 0, "adam": 1, "adamw": 2}
MASTER_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16}


def terms_of(scale: float, clip_norm: float | None) -> list[float]:
    """Loss scale and clipping as `Check` and `Group` find them in device memory (FP64)."""
    return [1 / scale, sys.float_info.max if clip_norm is None else min(clip_norm, sys.float_info.max)]


def numbers_of(rule: Rule, step: int) -> list[float]:
    """A rule's numbers at a step as `Group` finds them in device memory (FP64)."""
    corrections = (1 - rule.momentum**step, 1 - rule.beta2**step)
    return [rule.lr, rule.weight_decay, rule.momentum, rule.beta2, rule.eps, *corrections, float(step == 1)]


@dataclass(frozen=True)
class Group:
    """Parameters of an optimizer's group that one launch takes: the same dtypes and kind of layout.

    Attributes:
        table, chunks: the tensors, and which block of which one a program takes.
        aligned: every address is a multiple of 16.
    """

    members: tuple[Parameter, ...]
    table: Tensor
    chunks: Tensor
    aligned: bool

    def update(
        self,
        rule: Rule,
        numbers: Tensor,
        terms: Tensor,
        control: Tensor,
        streams: tuple[Tensor, Tensor | None],
        master: Rounding,
        weight: Rounding,
        seed: int,
    ) -> None:
        """One launch.

        Args:
            rule: its name, and whether it has momentum, count; its numbers do not.
            numbers, terms: FP64, `numbers_of` and `terms_of`.
            control: `Check.control`.
            streams: int64, of each member's master and, where there is one, weight.
            master, weight, seed: see `updates.Engine`.
        """
        first = self.members[0]
        device = self.table.device
        weight_encoding = None if first.weight is None else codec.encoding(weight, capability(device))
        launch(
            updates.update,
            (len(self.chunks),),
            device,
            self.table,
            self.chunks,
            terms,
            control,
            numbers,
            *streams,
            *signed_words(seed),
            RULE=RULES[rule.name],
            NESTEROV=rule.nesterov,
            HAS_MOMENTUM=rule.momentum != 0,
            MASTER_TYPE=MASTER_TYPES[first.master.dtype],
            # Without the GPU's own conversion, which may drop a NaN's sign.
            MASTER_ENCODING=codec.encoding(master, (0, 0)),
            WEIGHT_ENCODING=weight_encoding,
            HAS_UPDATED=first.updated is not None,
            PERMUTED=_matrix(first)[0] > 0,
            ALIGNED=self.aligned,
            BLOCK=BLOCK,
        )


def prepare(members: Sequence[Parameter]) -> Group:
    """The launch of one of `groups_of`, its table in device memory."""
    rows = []
    for p in members:
        state = [address(t) for t in p.state] + [0] * (2 - len(p.state))
        weight, updated = (0 if t is None else address(t) for t in (p.weight, p.updated))
        rows.append((address(p.grad), address(p.master), *state, weight, p.master.numel(), *_matrix(p), updated))
    device = members[0].master.device
    columns = (updates.GRAD, updates.MASTER, updates.STATE0, updates.STATE1, updates.WEIGHT, updates.UPDATED)
    aligned = all(row[column.value] % 16 == 0 for row in rows for column in columns)
    chunks = blocks_of(tuple(p.master.numel() for p in members), BLOCK, device)
    return Group(tuple(members), table_of(tuple(rows), device), chunks, aligned)


def groups_of(parameters: Sequence[Parameter], rule: Rule, weight: Rounding) -> list[list[Parameter]]:
    """Parameters that share a rule, by what one launch can take. Empty ones are left out.

    Raises:
        ValueError: see `updates.Engine`.
    """
    if rule.name not in RULES:
        raise ValueError(f"rule.name: got {rule.name!r}, expected one of {', '.join(RULES)}")
    states = 2 if rule.name != "sgd" else 1 if rule.momentum else 0
    for parameter in parameters:
        _check(parameter, states, weight)
    groups: dict[Any, list[Parameter]] = {}
    for p in parameters:
        if p.master.numel():
            outputs = (p.weight is not None, p.updated is not None)
            key = (p.master.device, p.master.dtype, outputs, _matrix(p)[0] > 0)
            groups.setdefault(key, []).append(p)
    return list(groups.values())


def _tensors(p: Parameter) -> list[Tensor]:
    return [t for t in (p.grad, p.master, *p.state, p.weight, p.updated) if t is not None]


def _matrix(p: Parameter) -> tuple[int, int]:
    """Rows and columns of the matrices that lie in a master whose elements count in another order than they lie."""
    _, rows, columns = counted_matrices(p.master.shape, p.master.stride(), p.order) or (1, 0, 0)
    return (rows, columns) if rows else (0, 0)


@dataclass(frozen=True)
class Check:
    """The launches that check and measure gradients, whatever their optimizer's groups.

    Attributes:
        table, chunks, aligned: as those of `Group`.
        partial: FP64 [chunks, 2], for sums.
        control: FP64 [3], the result; see `updates.Engine`.
    """

    table: Tensor
    chunks: Tensor
    aligned: bool
    partial: Tensor
    control: Tensor

    def run(self, terms: Tensor) -> None:
        """Two launches; `terms`: FP64, `terms_of`."""
        device, count = self.table.device, len(self.chunks)
        arguments = (self.table, self.chunks, terms, self.partial)
        launch(updates.gradient_norms, (count,), device, *arguments, ALIGNED=self.aligned, BLOCK=BLOCK)
        sums = {"BLOCK": SUMS, "num_warps": SUM_WARPS}
        launch(updates.gradient_control, (1,), device, self.partial, count, terms, self.control, **sums)


def prepare_check(grads: Sequence[Tensor]) -> Check:
    """The check of dense gradients, its table in device memory. Empty ones are left out.

    Raises:
        ValueError: there is none, or it is not FP32.
    """
    grads = [grad for grad in grads if grad.numel()]
    if not grads:
        raise ValueError("parameters: got none, expected at least one")
    for grad in grads:
        check_device("grad", grad)
        if grad.dtype != torch.float32:
            raise ValueError(f"grad: got {grad.dtype}, expected torch.float32")
    device, counts = grads[0].device, tuple(grad.numel() for grad in grads)
    # As the table of an update, of which no other column is read.
    rows = tuple((address(grad), 0, 0, 0, 0, count, 0, 0, 0) for grad, count in zip(grads, counts, strict=True))
    table, chunks = table_of(rows, device), blocks_of(counts, BLOCK, device)
    partial = torch.empty((len(chunks), 2), dtype=torch.float64, device=device)
    control = torch.empty(3, dtype=torch.float64, device=device)
    return Check(table, chunks, all(row[0] % 16 == 0 for row in rows), partial, control)


def gradient_control(parameters: Sequence[Parameter], scale: float = 1.0, clip_norm: float | None = None) -> Tensor:
    """See `updates.Engine`; counts the values that are not finite, and does not wait for the result."""
    grads = [p.grad for p in parameters]
    checked: Tensor = (_control if untraced(*grads) else control_of)(grads, scale, clip_norm)
    return checked


def _control(grads: list[Tensor], scale: float, clip_norm: float | None) -> Tensor:
    check = prepare_check(grads)
    check.run(_in_memory(terms_of(scale, clip_norm), [], check.table.device)[0])
    return check.control


@torch.library.custom_op("fp8repro::gradient_control", mutates_args=())
def control_of(grads: list[Tensor], scale: float, clip_norm: float | None) -> Tensor:
    """Number of non-finite values, clipping factor and norm of the unscaled gradients; FP64 [3]."""
    return _control(grads, scale, clip_norm)


@control_of.register_fake
def _(grads: list[Tensor], scale: float, clip_norm: float | None) -> Tensor:
    return grads[0].new_empty(3, dtype=torch.float64)


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
    groups = groups_of(parameters, rule, weight)
    if untraced(control, *(t for members in groups for p in members for t in _tensors(p))):
        _update(groups, rule, step, master, weight, control, scale, seed)
        increment_version([t for members in groups for p in members for t in _tensors(p) if t is not p.grad])
        return
    for members in groups:
        update_group(
            [p.grad for p in members],
            [p.master for p in members],
            [t for p in members for t in p.state],
            [p.weight for p in members if p.weight is not None],
            [p.updated for p in members if p.updated is not None],
            control,
            [signed64(stream) for p in members for stream in (p.master_stream, p.weight_stream)],
            rule.name,
            [rule.lr, rule.momentum, rule.beta2, rule.eps, rule.weight_decay],
            rule.nesterov,
            step,
            spell(master),
            spell(weight),
            scale,
            signed64(seed),
            [p.order == "channels_last" for p in members],
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
    channels_last: list[bool],
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
        channels_last: whether the elements of a parameter are counted so for their random bits, else row-major.
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
            order="channels_last" if channels_last[i] else "row_major",
        )
        for i in range(count)
    ]
    lr, momentum, beta2, eps, weight_decay = numbers
    how = Rule(rule, lr, momentum, beta2, eps, weight_decay, nesterov)
    _update([members], how, step, read(master_rounding), read(weight_rounding), control, scale, seed)


def _update(
    groups: Sequence[Sequence[Parameter]],
    rule: Rule,
    step: int,
    master: Rounding,
    weight: Rounding,
    control: Tensor,
    scale: float,
    seed: int,
) -> None:
    """A launch for each group, after one copy of what changes from step to step."""
    floats = [*terms_of(scale, None), *numbers_of(rule, step)]
    words = [signed64(p.master_stream) for members in groups for p in members]
    if weight.is_stochastic:
        words += [signed64(p.weight_stream) for members in groups for p in members]
    memory, streams = _in_memory(floats, words, control.device)
    count = sum(len(members) for members in groups)
    first = 0
    for group in map(prepare, groups):
        last = first + len(group.members)
        weight_streams = streams[count + first : count + last] if weight.is_stochastic else None
        both = (streams[first:last], weight_streams)
        group.update(rule, memory[TERMS:], memory, control, both, master, weight, seed)
        first = last


def _in_memory(floats: Sequence[float], words: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """FP64 and int64 values in device memory, by one copy."""
    on_host = torch.frombuffer(bytearray(array("d", floats).tobytes() + array("q", words).tobytes()), dtype=torch.int64)
    there = to_device(on_host, device)
    return there[: len(floats)].view(torch.float64), there[len(floats) :]


def _strides(t: Tensor) -> tuple[int, ...]:
    """Strides of dimensions of more than one element; torch's optimizers set the others as they like."""
    return tuple(stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)


def _check(p: Parameter, states: int, weight: Rounding) -> None:
    check_device("master", p.master)
    if p.master.dtype not in MASTER_TYPES:
        raise ValueError(f"master: got {p.master.dtype}, expected torch.float16 or torch.float32")
    if counted_matrices(p.master.shape, p.master.stride(), p.order) is None:
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
