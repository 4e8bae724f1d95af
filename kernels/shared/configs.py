"""Tile sizes for each GPU generation, and which of them a product takes. Checked in, small, not tuned at run time.

No entry spills registers (sm_100: 8 bytes in one or two kernels). Those of sm_90 were measured on an H200
(results/gpu/nvidia-h200.md); which are the fastest elsewhere is to be measured with `fp8repro bench kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from fp8repro.kernels.shared.launch import INTERPRETED, cdiv
from fp8repro.kernels.shared.tiles import EXACT, FP16_MMA, PROMOTED, PROMOTED_FMA, UNPROMOTED

GROUP = 8  # tile rows that share operands in the L2 cache


@dataclass(frozen=True)
class Tile:
    """Output tile, step along the summed dimension (elements of FP8), warps, pipeline stages.

    `halves` = 2: a matrix product computes two such tiles side by side (see `matmul.device.multiply`).
    `resident`: programs that a multiprocessor runs at a time.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    halves: int = 1
    resident: int = 1


# From large to small. Wider tiles than 128 x 128 spill once partial sums are promoted: they need two accumulators.
TILES: dict[str, tuple[Tile, ...]] = {
    "sm_80": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4, resident=2)),
    "sm_89": (Tile(64, 128, 128, 8, 3), Tile(64, 64, 128, 8, 3, resident=2)),
    "sm_90": (Tile(128, 128, 128, 8, 4, halves=2), Tile(128, 128, 128, 8, 4), Tile(64, 64, 128, 4, 4, resident=2)),
    "sm_100": (Tile(128, 128, 128, 8, 4), Tile(64, 64, 128, 8, 4, resident=2)),
    "sm_120": (Tile(64, 128, 128, 8, 2), Tile(64, 64, 128, 8, 3, resident=2)),
}

# Where TMA loads the operands: no registers for addresses, so that two or three programs of four warps share a
# multiprocessor, and one multiplies while another adds its partial sums or stores. Measured on an H200.
TMA_TILES: dict[str, tuple[Tile, ...]] = {
    "sm_90": (
        Tile(128, 128, 128, 4, 3, resident=2),
        Tile(64, 128, 128, 4, 3, resident=3),
        Tile(128, 64, 128, 4, 3, resident=3),
        Tile(64, 64, 128, 4, 4, resident=3),
    ),
}

# A box of pixels passes through registers to become a matrix, so a larger tile has no room for its sums.
TMA_CONVOLUTION_TILES: dict[str, tuple[Tile, ...]] = {
    "sm_90": (
        Tile(64, 128, 128, 4, 3, resident=2),
        Tile(128, 64, 128, 4, 3, resident=2),
        Tile(64, 64, 128, 4, 4, resident=3),
    ),
}


@dataclass(frozen=True)
class Target:
    """The GPU that launches are planned for; tests plan for others than the one that runs them.

    Attributes:
        capability: compute capability; (0, 0): the interpreter.
        processors: multiprocessors.
        tma: operands are loaded by TMA where it can (sm_90 and later); else threads compute addresses.
    """

    capability: tuple[int, int] = (0, 0)
    processors: int = 1
    tma: bool = False

    @property
    def interpreted(self) -> bool:
        """True for the interpreter, whose cost is per operation, whatever the tile."""
        return self.capability == (0, 0)


@lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """The target that a device is, which takes TMA where tiles for it were measured."""
    if INTERPRETED:
        return Target()
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Target(capability, properties.multi_processor_count, generation(capability) in TMA_TILES)


def generation(capability: tuple[int, int]) -> str:
    """The newest entry of `TILES` that is not newer than the GPU."""
    number = capability[0] * 10 + capability[1]
    known = sorted(int(name[3:]) for name in TILES)
    return f"sm_{max([k for k in known if k <= number], default=known[0])}"


def accumulation(accumulate: str, capability: tuple[int, int]) -> int:
    """How the kernels of a GPU do what the recipe's `accumulate` says.

    Raises:
        ValueError: an unknown name.
    """
    codes = {"promoted": PROMOTED.value, "fp16_mma": FP16_MMA.value, "unpromoted": UNPROMOTED.value}
    codes |= {"promoted_64": 64, "promoted_32": 32}
    if accumulate not in codes:
        raise ValueError(f"accumulate: got {accumulate!r}, expected one of {', '.join(codes)}")
    if INTERPRETED:
        return EXACT.value
    if capability < (8, 9):
        return FP16_MMA.value
    if accumulate == "promoted" and generation(capability) in ("sm_89", "sm_120"):
        return PROMOTED_FMA.value
    return codes[accumulate]


def choose(
    target: Target,
    m: int,
    n: int,
    k: int,
    batches: int,
    *,
    splittable: bool,
    halves: bool,
    tma: dict[str, tuple[Tile, ...]] | None = None,
) -> tuple[Tile, int, int]:
    """Tile, number of splits of the summed dimension, and number of resident programs.

    Args:
        target: whose table to use.
        m, n, k, batches: the product's sizes.
        splittable: partial sums over parts of k may be added afterwards.
        halves: the kernel can compute two tiles side by side.
        tma: the table to use where TMA loads the operands.
    """
    if target.interpreted:
        rows, columns, step = (min(512, max(16, triton.next_power_of_2(side))) for side in (m, n, k))
        return Tile(rows, columns, step, 4, 1), 1, 1
    table = (tma or TILES)[generation(target.capability)]
    fitting = [
        t for t in table if (t.halves == 1 or halves) and n > t.n // 2 and _tiles(t, m, n, batches) >= target.processors
    ]
    tile = fitting[0] if fitting else table[-1]
    splits = 1
    if splittable:
        # Enough programs to fill the GPU, but at least eight steps each: partial sums cost memory traffic.
        programs = _tiles(tile, m, n, batches)
        while splits < 64 and programs * splits <= target.processors and k >= splits * 16 * tile.k:
            splits *= 2
    return tile, splits, target.processors * tile.resident


def wgrad_tile(target: Target, outputs: int, channels: int, taps: int) -> tuple[Tile, int]:
    """Tile of a convolution's weight gradient by TMA (`k`: pixels in one step), and programs wanted."""
    if target.interpreted:
        rows, columns = (min(64, max(16, triton.next_power_of_2(side))) for side in (outputs, channels))
        return Tile(rows, columns, 16, 4, 1), 2
    m = 128 if outputs > 64 else 64
    # With several taps pixels come from the cache, and narrow tiles leave room for a third program.
    n = 128 if channels > 64 and taps == 1 else 64
    tile = Tile(m, n, 64, 4, 3, resident=2 if n == 128 else 3)
    return tile, target.processors * tile.resident


def rounding_tiles(stochastic: bool, codes: bool) -> dict[str, tuple[Tile, ...]]:
    """The table for matrix products by TMA whose results are rounded: tiles with registers left for random bits."""
    return TMA_CONVOLUTION_TILES if stochastic and codes else TMA_TILES


def takes_epilogue(target: Target, tile: Tile, splits: int, stochastic: bool, codes: bool = False) -> bool:
    """True when the kernel of a product can round its result without spilling registers.

    From sm_90 on only the small tiles have registers left. Where TMA leaves more, stochastic rounding to FP32 values
    takes what further resident programs need, and larger tiles spill; `codes` need fewer. A sum in parts is rounded
    when complete.
    """
    if target.interpreted or splits > 1:
        return splits == 1
    name = generation(target.capability)
    if any(tile in table.get(name, ()) for table in (TMA_TILES, TMA_CONVOLUTION_TILES)):
        return not stochastic or (codes and tile in TMA_CONVOLUTION_TILES[name])
    return tile == TILES[name][-1] or name in ("sm_80", "sm_89")


def summed_step(target: Target, tile: Tile, element_size: int) -> int:
    """Elements of the summed dimension in one step of a tile."""
    return tile.k if element_size == 1 or target.interpreted else tile.k // 2


def _tiles(tile: Tile, m: int, n: int, batches: int) -> int:
    return batches * cdiv(m, tile.m) * cdiv(n, tile.n * tile.halves)
