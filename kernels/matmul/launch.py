"""Matrix products of FP8 (or 16-bit) operands in any layout, with FP32 accumulation and an optional rounding epilogue.

Checks arguments and picks tiles (products.py holds the kernel). Must never round an operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8repro.kernels.matmul.device import multiply, turn
from fp8repro.kernels.quantize.launch import PER_CALL, random_words, raw_codes, round_into, rounding_options
from fp8repro.kernels.shared import configs
from fp8repro.kernels.shared.launch import INTERPRETED, capability, cdiv, check_device, launch
from fp8repro.kernels.shared.tiles import PROMOTED_FMA
from fp8repro.kernels.shared.tma import ALIGNMENT, describe, fits
from fp8repro.numerics.rounding import IDENTITY, RandomBits, Rounding

FP8_DTYPES = (torch.float8_e5m2, torch.float8_e4m3fn)
PROMOTE_MOST_OFTEN = 32
OPERANDS = "torch.float8_e5m2 or torch.float8_e4m3fn, or both torch.float16 or torch.bfloat16"


@dataclass(frozen=True)
class Epilogue:
    """How a product's FP32 result is stored: rounded once, or as it is.

    Attributes:
        how, bits: see `quantizer.round_into`; elements are counted in the result's row-major order, those of images
            channels last.
        overflows: int32 tensor of one value that finite results beyond the format's largest value are added to.
        values: store FP32 values of the format, not its codes. Such results are rounded on the way where that costs
            no registers that the product needs, else in a pass of their own; the bytes are the same.
    """

    how: Rounding = IDENTITY
    bits: RandomBits = RandomBits()
    overflows: Tensor | None = None
    values: bool = False

    @property
    def plain(self) -> bool:
        """True when nothing is rounded."""
        return self.how.is_identity

    def options(self, device: torch.device) -> dict[str, Any]:
        """Compile-time arguments."""
        return rounding_options(self.how, capability(device))

    def words(self) -> tuple[Any, ...]:
        """The key and stream words of the random bits."""
        return random_words(self.bits)

    def empty(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """A tensor for the result."""
        if self.values:
            return torch.empty(shape, dtype=torch.float32, device=device)
        format = self.how.format
        if format.dtype is None:
            raise ValueError(f"format: got {format.name}, expected a format with a storage dtype")
        return torch.empty(shape, dtype=format.dtype, device=device)

    def round(self, result: Tensor) -> None:
        """Round a product's FP32 result in a pass of its own."""
        stats = None if self.overflows is None else torch.zeros(4, dtype=torch.float64, device=result.device)
        round_into(result, self.how, self.bits, result, None, stats)
        if self.overflows is not None and stats is not None:
            self.overflows.add_(stats[2].to(torch.int32))


def raw_result(t: Tensor) -> Tensor:
    """What a kernel takes for its result: FP32, or the integers of the codes."""
    return t if t.dtype == torch.float32 else raw_codes(t)


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    inverse_scale: float = 1.0,
    accumulate: str = "promoted",
    epilogue: Epilogue | None = None,
    splits: int | None = None,
    tile: configs.Tile | None = None,
    bulk: bool | None = None,
) -> Tensor:
    """The product a @ b * inverse_scale + bias, accumulated in FP32 (paper, section 3).

    Args:
        a: [..., M, K], E5M2, E4M3, FP16 or BF16, any strides.
        b: [..., K, N] with the same leading dimensions, any strides. FP8 operands may differ in format. FP8 tensor
            cores want K contiguous in both; other layouts are right too, but slower.
        bias: FP32 [N].
        inverse_scale: power of two that undoes the operands' scales.
        accumulate: "promoted" (FP8 instructions, partial sums of 128 added in FP32), "fp16_mma" (FP16 instructions, all
            sums in FP32), or, for measurements, "unpromoted", "promoted_64",
            "promoted_32".
        epilogue: how the result is stored; FP32 by default.
        splits: parts of K that are summed apart, in a fixed order; None chooses.
        tile: the kernel's configuration; None takes the table's.
        bulk: the GPU's bulk copy engine brings the operands, of which FP8 ones are turned first where K is not
            contiguous; None: where it can.

    Returns:
        [..., M, N], contiguous.

    Raises:
        ValueError: an argument's device, dtype or shape does not fit; nothing was launched.
    """
    epilogue = epilogue or Epilogue()
    check_operands(a, b, "a", "b")
    if a.dim() < 2 or a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"b: got shape {tuple(b.shape)}, expected {(*a.shape[:-2], a.shape[-1] if a.dim() else 'K', 'N')}"
        )
    check_bias(bias, b.shape[-1], a.device)
    lead = a.shape[:-2]
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    # Leading dimensions that do not merge into one cost a copy of the bytes.
    a3 = a.reshape(-1, m, k) if a.numel() else a.new_empty(lead.numel(), m, k)
    b3 = b.reshape(-1, k, n) if b.numel() else b.new_empty(lead.numel(), k, n)
    result = epilogue.empty((*lead, m, n), a.device)
    if result.numel() == 0:
        return result
    batches = a3.shape[0]
    fp32 = epilogue.plain or epilogue.values
    if bulk is None:
        bulk = configs.bulk_available(a.device)
    described = _described(a3, b3) if bulk and k > 0 else None
    small = not fp32 and (described is None or epilogue.how.is_stochastic)
    chosen, chosen_splits, programs = configs.choose(
        a.device,
        m,
        n,
        k,
        batches,
        splittable=fp32,
        halves=True,
        small=small,
        bulk=configs.BULK_TILES if described else None,
    )
    tile = tile or chosen
    splits = chosen_splits if splits is None else splits
    room = configs.takes_epilogue(a.device, tile, splits, epilogue.how.rounding)
    apart = epilogue.values and not epilogue.plain and not room
    stored = Epilogue() if apart else epilogue
    if splits > 1 and not fp32:
        raise ValueError(f"splits: got {splits}, expected 1 with a rounded result")
    step = summed_step(tile, a)
    chunk = cdiv(cdiv(k, splits), step) * step if splits > 1 else k
    target = result if splits == 1 else torch.empty((batches, splits, m, n), dtype=torch.float32, device=a.device)
    work = batches * splits * cdiv(m, tile.m) * cdiv(n, tile.n * tile.halves)
    operands: tuple[Any, Any] = (a3, b3)
    if described is not None:
        operands = describe(described[0], (1, tile.m, step)), describe(described[1], (1, tile.n, step))
    launch(
        multiply,
        (min(work, programs),),
        a.device,
        *operands,
        bias if splits == 1 else None,
        raw_result(target),
        stored.overflows,
        inverse_scale,
        batches,
        m,
        n,
        k,
        chunk,
        *(a3.stride() if described is None else (0, 0, 0)),
        *(b3.stride() if described is None else (0, 0, 0)),
        *stored.words(),
        **stored.options(a.device),
        ACCUMULATE=accumulation_of(a, accumulate, step),
        SPLITS=splits,
        BM=tile.m,
        BN=tile.n,
        BK=step,
        HALVES=tile.halves,
        GROUP=configs.GROUP,
        EVEN_K=described is not None or (k % step == 0 and chunk % step == 0),
        BULK=described is not None,
        WHOLE_GROUPS=n % PER_CALL == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        torch.sum(target, 1, out=result.view(batches, m, n))
        if bias is not None:
            result += bias
    if apart:
        epilogue.round(result)
    return result


def summed_step(tile: configs.Tile, operand: Tensor) -> int:
    """Elements of the summed dimension in one step of a tile."""
    return tile.k if operand.element_size() == 1 or INTERPRETED else tile.k // 2


def _described(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """[batch, M, K] and [batch, N, K] that descriptors can stand for; None where the bulk copy engine cannot help."""
    operands = []
    for t in (a, b.transpose(1, 2)):
        if not fits(t) and t.element_size() == 1:
            # FP8 instructions want K contiguous; a pass over the bytes costs far less than turning every tile.
            t = turned(t.transpose(1, 2) if t.stride(1) == 1 else t.transpose(1, 2).contiguous())
        if not fits(t):
            return None
        operands.append(t)
    return operands[0], operands[1]


def turned(x: Tensor) -> Tensor:
    """[batch, rows, columns] of bytes, columns contiguous -> [batch, columns, rows], with rows as far apart as fits."""
    batch, rows, columns = x.shape
    pitch = cdiv(rows, ALIGNMENT) * ALIGNMENT
    y = torch.empty((batch, columns, pitch), dtype=x.dtype, device=x.device)[:, :, :rows]
    grid = (batch * cdiv(rows, 64) * cdiv(columns, 64),)
    arguments = (raw_codes(x), raw_codes(y), rows, columns, x.stride(0), x.stride(1), y.stride(0), y.stride(1))
    launch(turn, grid, x.device, *arguments, ROWS=64, COLUMNS=64)
    return y


def accumulation_of(operand: Tensor, accumulate: str, step: int = 128) -> int:
    """The accumulation code for the GPU that holds `operand`; `step`: elements of K in one step of the tile."""
    code = configs.accumulation(accumulate, capability(operand.device))
    # Sums cannot be promoted less often than once a step.
    return min(code, step) if code >= PROMOTE_MOST_OFTEN else code


def promoted_by_steps(code: int) -> int:
    """The accumulation code where an operand reaches the tensor core from registers.

    Triton (3.6 to 3.8) splits such products along K and forgets their promotion; adding each step's product does not.
    """
    return PROMOTED_FMA.value if code >= PROMOTE_MOST_OFTEN else code


def check_operands(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    """Raise ValueError unless both operands are on one device that can multiply them."""
    check_device(name_a, a)
    if b.device != a.device:
        raise ValueError(f"{name_b}: got a tensor on {b.device}, expected {a.device}")
    both_fp8 = a.dtype in FP8_DTYPES and b.dtype in FP8_DTYPES
    if not both_fp8 and (a.dtype != b.dtype or a.dtype not in (torch.float16, torch.bfloat16)):
        raise ValueError(f"{name_a}, {name_b}: got {a.dtype} and {b.dtype}, expected {OPERANDS}")
    if not INTERPRETED and torch.float8_e4m3fn in (a.dtype, b.dtype):
        major, minor = capability(a.device)
        if (major, minor) < (8, 9):
            raise ValueError(f"{name_a}, {name_b}: got E4M3 on sm_{major}{minor}, expected sm_89 or later")


def check_bias(bias: Tensor | None, size: int, device: torch.device) -> None:
    """Raise ValueError unless the bias is FP32 [size] on the device."""
    if bias is not None and (bias.shape != (size,) or bias.dtype != torch.float32 or bias.device != device):
        given = f"{bias.dtype} of shape {tuple(bias.shape)} on {bias.device}"
        raise ValueError(f"bias: got {given}, expected torch.float32 of shape ({size},) on {device}")
