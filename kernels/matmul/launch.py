"""Matrix products of FP8 (or 16-bit) operands in any layout, with FP32 accumulation and an optional rounding epilogue.

Checks arguments, plans, launches. Must never round an operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp8repro.kernels.matmul.device import multiply, transpose
from fp8repro.kernels.quantize.launch import PER_CALL, random_words, raw_codes, round_into
from fp8repro.kernels.shared import configs
from fp8repro.kernels.shared.codec import Encoding, encoding
from fp8repro.kernels.shared.launch import INTERPRETED, capability, cdiv, check_device, launch
from fp8repro.kernels.shared.tiles import PROMOTED_FMA
from fp8repro.kernels.shared.tma import ALIGNMENT, describe, fits
from fp8repro.numerics.rounding import IDENTITY, RandomBits, Rounding

FP8_DTYPES = (torch.float8_e5m2, torch.float8_e4m3fn)
PROMOTE_MOST_OFTEN = 32
OPERANDS = "torch.float8_e5m2 or torch.float8_e4m3fn, or both torch.float16 or torch.bfloat16"


@dataclass(frozen=True)
class Epilogue:
    """How a product's FP32 result is rounded to a format, or left as it is.

    It is rounded on the way where that costs no registers that the product needs, else in a pass of its own; the bytes
    are the same.

    Attributes:
        how, bits: see `quantizer.round_into`; elements are counted in the result's row-major order, those of images
            channels last.
        codes: the result is the codes of an 8-bit format, not their FP32 values.
    """

    how: Rounding = IDENTITY
    bits: RandomBits = RandomBits()
    codes: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """That of the result."""
        return self.how.format.dtype if self.codes and self.how.format.dtype is not None else torch.float32

    def encoding(self, device: torch.device) -> Encoding:
        """The compile-time argument that says how a kernel rounds."""
        return encoding(self.how, capability(device))

    def words(self) -> tuple[Any, ...]:
        """The key and stream words of the random bits."""
        return random_words(self.bits)

    def round(self, result: Tensor) -> Tensor:
        """Round a product's FP32 result in a pass of its own, in place unless it becomes codes."""
        if not self.codes:
            round_into(result, self.how, self.bits, result, None, None)
            return result
        codes = torch.empty_like(result, dtype=self.dtype)
        round_into(result, self.how, self.bits, None, codes, None)
        return codes


@dataclass(frozen=True)
class ProductPlan:
    """How one product is launched.

    Attributes:
        tile: the kernel's configuration.
        step: elements of K that one step sums.
        splits, chunk: parts of K that are summed apart, and their length.
        programs: size of the grid.
        tma: TMA loads the operands.
        rounded_apart: the result is rounded in a pass of its own.
    """

    tile: configs.Tile
    step: int
    splits: int
    chunk: int
    programs: int
    tma: bool
    rounded_apart: bool


@lru_cache(maxsize=4096)
def plan_product(
    target: configs.Target,
    sizes: tuple[int, int, int, int],
    element_size: int,
    tma: bool,
    how: Rounding,
    codes: bool = False,
    splits: int | None = None,
    tile: configs.Tile | None = None,
) -> ProductPlan:
    """Plan the product [batches, M, K] @ [batches, K, N].

    Args:
        target: the GPU.
        sizes: batches, M, N, K.
        element_size: bytes of an operand's element.
        tma: the operands can be loaded by TMA.
        how, codes: how the result is rounded (see `Epilogue`).
        splits, tile: see `matmul`.
    """
    batches, m, n, k = sizes
    chosen, chosen_splits, resident = configs.choose(
        target,
        m,
        n,
        k,
        batches,
        splittable=True,
        halves=True,
        tma=configs.rounding_tiles(how.is_stochastic, codes) if tma else None,
    )
    tile = tile or chosen
    splits = chosen_splits if splits is None else splits
    step = configs.summed_step(target, tile, element_size)
    work = batches * splits * cdiv(m, tile.m) * cdiv(n, tile.n * tile.halves)
    return ProductPlan(
        tile,
        step,
        splits,
        chunk=cdiv(cdiv(k, splits), step) * step if splits > 1 else k,
        programs=min(work, resident),
        tma=tma,
        rounded_apart=not (how.is_identity or configs.takes_epilogue(target, tile, splits, how.is_stochastic, codes)),
    )


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
    target: configs.Target | None = None,
    parts_apart: bool = False,
) -> Tensor:
    """The product a @ b * inverse_scale + bias, accumulated in FP32 (paper, section 3).

    Args:
        a: [..., M, K], E5M2, E4M3, FP16 or BF16, any strides.
        b: [..., K, N] with the same leading dimensions, any strides. FP8 operands may differ in format. FP8 tensor
            cores want K contiguous in both; other layouts are right too, but slower.
        bias: FP32 [N].
        inverse_scale: power of two that undoes the operands' scales.
        accumulate: "promoted" (FP8 instructions, partial sums of 128 added in FP32), "fp16_mma" (FP16 instructions, all
            sums in FP32), or, for measurements, "unpromoted", "promoted_64", "promoted_32".
        epilogue: how the result is rounded; not at all by default.
        splits: parts of K that are summed apart, in a fixed order; None chooses.
        tile: the kernel's configuration; None takes the table's.
        target: the GPU to plan for; None: the one that holds `a`.
        parts_apart: of matrices without bias and epilogue, leave it to the caller to add the parts up.

    Returns:
        [..., M, N], contiguous, FP32 unless the epilogue makes codes; with `parts_apart` FP32 [splits, M, N].

    Raises:
        ValueError: an argument's device, dtype or shape does not fit; nothing was launched.
    """
    epilogue = epilogue or Epilogue()
    target = target or configs.target_of(a.device)
    check_operands(a, b, "a", "b")
    if a.dim() < 2 or a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"b: got shape {tuple(b.shape)}, expected {(*a.shape[:-2], a.shape[-1] if a.dim() else 'K', 'N')}"
        )
    check_bias(bias, b.shape[-1], a.device)
    if parts_apart and (a.dim() > 2 or bias is not None or not epilogue.how.is_identity):
        raise ValueError(f"parts_apart: got shape {tuple(a.shape)}, expected matrices, no bias and no epilogue")
    lead = torch.Size((1,)) if parts_apart else a.shape[:-2]
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if lead.numel() * m * n == 0:
        return torch.empty((*lead, m, n), dtype=epilogue.dtype, device=a.device)
    # Leading dimensions that do not merge into one cost a copy of the bytes.
    a = a.reshape(-1, m, k) if k else a.new_empty(lead.numel(), m, 0)
    b = b.reshape(-1, k, n) if k else b.new_empty(lead.numel(), 0, n)
    loaded = tma_operands(a, b) if target.tma and k > 0 else None
    sizes = (a.shape[0], m, n, k)
    plan = plan_product(target, sizes, a.element_size(), loaded is not None, epilogue.how, epilogue.codes, splits, tile)
    stored = Epilogue() if plan.rounded_apart else epilogue
    result = torch.empty((*lead, m, n), dtype=stored.dtype, device=a.device)
    if plan.splits == 1:
        _launch(plan, loaded or (a, b), sizes, bias, result, inverse_scale, accumulate, stored)
    else:
        parts = torch.empty((a.shape[0], plan.splits, m, n), dtype=torch.float32, device=a.device)
        _launch(plan, loaded or (a, b), sizes, None, parts, inverse_scale, accumulate, stored)
        if parts_apart:
            return parts[0]
        torch.sum(parts, 1, out=result.view(-1, m, n))
        if bias is not None:
            result += bias
    return epilogue.round(result) if plan.rounded_apart else result


def _launch(
    plan: ProductPlan,
    operands: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int, int],
    bias: Tensor | None,
    result: Tensor,
    inverse_scale: float,
    accumulate: str,
    epilogue: Epilogue,
) -> None:
    a, b = operands
    tile, step = plan.tile, plan.step
    blocks = ((1, tile.m, step), (1, tile.n, step))
    launch(
        multiply,
        (plan.programs,),
        a.device,
        *(describe(t, block) if plan.tma else t for t, block in zip(operands, blocks, strict=True)),
        bias,
        raw_codes(result) if epilogue.codes else result,
        inverse_scale,
        *sizes,
        plan.chunk,
        (0, 0, 0) if plan.tma else a.stride(),
        (0, 0, 0) if plan.tma else b.stride(),
        *epilogue.words(),
        ENCODING=epilogue.encoding(a.device),
        ACCUMULATE=accumulation_of(a, accumulate, step),
        SPLITS=plan.splits,
        BM=tile.m,
        BN=tile.n,
        BK=step,
        HALVES=tile.halves,
        GROUP=configs.GROUP,
        EVEN_K=plan.tma or (sizes[3] % step == 0 and plan.chunk % step == 0),
        TMA=plan.tma,
        WHOLE_GROUPS=sizes[2] % PER_CALL == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def tma_operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """[batch, M, K] and [batch, N, K] that TMA can load; None where it cannot.

    FP8 operands in which K is not contiguous are transposed first.
    """
    operands = []
    for t in (a, b.transpose(1, 2)):
        if not fits(t) and t.element_size() == 1:
            # FP8 instructions want K contiguous; a pass over the bytes costs far less than transposing every tile.
            t = transposed(t.transpose(1, 2) if t.stride(1) == 1 else t.transpose(1, 2).contiguous())
        if not fits(t):
            return None
        operands.append(t)
    return operands[0], operands[1]


def transposed(x: Tensor) -> Tensor:
    """[batch, rows, columns] of bytes, columns contiguous -> [batch, columns, rows], with rows as far apart as fits."""
    batch, rows, columns = x.shape
    pitch = cdiv(rows, ALIGNMENT) * ALIGNMENT
    y = torch.empty((batch, columns, pitch), dtype=x.dtype, device=x.device)[:, :, :rows]
    grid = (batch * cdiv(rows, 64) * cdiv(columns, 64),)
    arguments = (raw_codes(x), raw_codes(y), rows, columns, x.stride()[:2], y.stride()[:2])
    launch(transpose, grid, x.device, *arguments, ROWS=64, COLUMNS=64)
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
