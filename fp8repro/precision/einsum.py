"""`torch.einsum` of two operands as one matrix product, so that it can follow a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_SPARE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Contraction:
    """Labels of an equation by what becomes of them.

    Attributes:
        a, b, out: those of the operands and of the result.
        batch: in both operands and the result.
        contracted: in both operands only.
        rows, columns: in the first (second) operand and the result.
    """

    a: str
    b: str
    out: str
    batch: str
    contracted: str
    rows: str
    columns: str


def contraction(equation: str, a: Tensor, b: Tensor) -> Contraction | None:
    """What an equation says of two operands; None where it is no matrix product of theirs.

    It is none without a common label that is summed, with a label twice in one operand, or with sizes that torch
    would broadcast.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != 2:
        return None
    spelled = [_spelled(part, t.dim(), equation) for part, t in zip(parts, (a, b), strict=True)]
    if spelled[0] is None or spelled[1] is None:
        return None
    (first, more_a), (second, more_b) = spelled
    more = max(more_a, more_b, key=len)
    if not arrow:
        both = parts[0].replace("...", "") + parts[1].replace("...", "")
        out = "..." + "".join(sorted(c for c in set(both) if both.count(c) == 1))
    out = out.replace("...", more)
    sizes = dict(zip(first, a.shape, strict=True))
    if len(set(first)) < len(first) or len(set(second)) < len(second):
        return None
    if any(sizes.get(label, size) != size for label, size in zip(second, b.shape, strict=True)):
        return None
    common = [c for c in first if c in second]
    contracted = "".join(c for c in common if c not in out)
    if math.prod(sizes[c] for c in contracted) == 1:
        return None
    return Contraction(
        first,
        second,
        out,
        "".join(c for c in common if c in out),
        contracted,
        "".join(c for c in first if c not in second and c in out),
        "".join(c for c in second if c not in first and c in out),
    )


def _spelled(part: str, dimensions: int, equation: str) -> Any:
    """An operand's labels with those that an ellipsis stands for, and the latter; None for nonsense."""
    named = part.replace("...", "")
    spare = [c for c in _SPARE if c not in equation]
    count = dimensions - len(named)
    if count < 0 or (count and "..." not in part) or count > len(spare):
        return None
    more = "".join(spare[:count][::-1])
    return part.replace("...", more), more


def as_matrices(how: Contraction, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The operands as [batch, M, K] and [batch, N, K], and what makes the result of their product [batch, M, N]."""
    # A label in one operand alone is summed there.
    first, second = how.a, how.b
    for label in [c for c in first if c not in second and c not in how.out]:
        a, first = a.sum(first.index(label)), first.replace(label, "")
    for label in [c for c in second if c not in how.a and c not in how.out]:
        b, second = b.sum(second.index(label)), second.replace(label, "")
    sizes = dict(zip(first, a.shape, strict=True)) | dict(zip(second, b.shape, strict=True))
    left = a.permute([first.index(c) for c in how.batch + how.rows + how.contracted])
    right = b.permute([second.index(c) for c in how.batch + how.columns + how.contracted])
    batch, rows, columns, inner = (
        math.prod(sizes[c] for c in part) for part in (how.batch, how.rows, how.columns, how.contracted)
    )
    shape = [sizes[c] for c in how.batch + how.rows + how.columns]
    order = [(how.batch + how.rows + how.columns).index(c) for c in how.out]
    matrices = left.reshape(batch, rows, inner), right.reshape(batch, columns, inner)
    return *matrices, lambda result: result.reshape(shape).permute(order)
