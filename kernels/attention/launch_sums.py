"""Sums of products' parts, rounded: weight gradients with those of biases, and gradients of inputs.

Checks arguments and launches. Roundings are those of the arguments; must never keep generator state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8repro.kernels.attention import device as kernels
from fp8repro.kernels.quantize.launch import PER_CALL
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import block_size, capability, cdiv, check_device, launch, signed_words
from fp8repro.numerics.rounding import RandomBits, Rounding

FLAT_BLOCK = 1024
GRADIENT_ROWS, GRADIENT_COLUMNS, GRADIENT_STEP = 16, 64, 256
_NO_BITS = RandomBits()


def finish_gradients(
    parts: Tensor, turned: Tensor | None, how: Rounding, bits: Sequence[RandomBits]
) -> tuple[Tensor, Tensor | None]:
    """Weight gradients that one product gave in parts, added up and rounded each; and the sums of the errors.

    Args:
        parts: FP32 [parts, weights * M, N], contiguous.
        turned: the transposed errors, FP8 [weights * M, rows], columns contiguous, for the biases' gradients; or None.
        how: how each weight's gradient is rounded.
        bits: of each weight; elements count row-major in [M, N].

    Returns:
        FP32 [weights, M, N] and [weights, M], or None.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    check_device("parts", parts)
    count = len(bits)
    if parts.dim() != 3 or not 0 < count <= 3 or parts.shape[1] % count or not parts.is_contiguous():
        raise ValueError(f"parts: got shape {tuple(parts.shape)} for {count} weights, expected [parts, weights * M, N]")
    m, n = parts.shape[1] // count, parts.shape[2]
    gradient = parts.new_empty(count, m, n)
    bias = None if turned is None else parts.new_empty(count, m)
    height, block = block_size(GRADIENT_ROWS, m, 256), block_size(GRADIENT_COLUMNS, n, 256)
    words = [signed_words(b.stream) for b in (*bits, *[_NO_BITS] * (3 - count))]
    launch(
        kernels.finish_gradients,
        (cdiv(m, height) * cdiv(n, block), count),
        parts.device,
        parts,
        turned,
        gradient,
        bias,
        parts.shape[0],
        m,
        n,
        0 if turned is None else turned.shape[1],
        0 if turned is None else turned.stride(0),
        *signed_words(bits[0].seed),
        *(word for pair in words for word in pair),
        ENCODING=codec.encoding(how, capability(parts.device)),
        WHOLE_GROUPS=n % PER_CALL == 0,
        BM=height,
        BN=block,
        BK=GRADIENT_STEP,
    )
    return gradient, bias


def sum_rounded(added: Tensor | None, terms: Sequence[Tensor], how: Rounding, bits: Sequence[RandomBits]) -> Tensor:
    """added + terms, in this order, where each term comes in parts and is rounded when they are added up.

    Args:
        added: FP32 [M, N], contiguous, or None.
        terms: one to three, FP32 [parts, M, N] of one shape, contiguous.
        how: how each term is rounded.
        bits: of each term; elements count row-major in [M, N].

    Returns:
        FP32 [M, N].

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    first = terms[0]
    check_device("terms", first)
    alike = all(t.shape == first.shape and t.is_contiguous() for t in terms)
    if first.dim() != 3 or not alike or not 0 < len(terms) <= 3 or len(bits) != len(terms):
        raise ValueError(f"terms: got {[tuple(t.shape) for t in terms]}, expected one to three of one [parts, M, N]")
    if added is not None and (added.shape != first.shape[1:] or not added.is_contiguous()):
        raise ValueError(f"added: got shape {tuple(added.shape)}, expected {tuple(first.shape[1:])}, contiguous")
    result = torch.empty(first.shape[1:], dtype=torch.float32, device=first.device)
    absent = [None] * (3 - len(terms))
    words = [signed_words(b.stream) for b in (*bits, *[_NO_BITS] * len(absent))]
    block = block_size(FLAT_BLOCK, result.numel())
    launch(
        kernels.sum_rounded,
        (cdiv(result.numel(), block),),
        first.device,
        added,
        *terms,
        *absent,
        result,
        result.numel(),
        first.shape[0],
        *signed_words(bits[0].seed),
        *(word for pair in words for word in pair),
        ENCODING=codec.encoding(how, capability(first.device)),
        BLOCK=block,
    )
    return result
