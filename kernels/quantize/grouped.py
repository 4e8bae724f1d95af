"""Rounds many tensors in few launches, which a captured graph can repeat: their streams lie in device memory.

Bytes are those of each tensor's own launch (launch.py). Knows nothing of weights, to which it is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fp8repro.engines.cpu.layout import counted_matrices
from fp8repro.engines.guards import address
from fp8repro.kernels.quantize import device_grouped as kernels
from fp8repro.kernels.quantize.launch import FLAT_BLOCK, PER_CALL, TILE_COLUMNS, TILE_ROWS
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import INTERPRETED, capability, cdiv, check_device, launch, signed_words
from fp8repro.kernels.shared.tables import blocks_of, table_of
from fp8repro.numerics.rounding import Rounding
from fp8repro.numerics.streams import StreamSlot

BLOCK = (1 << 15) if INTERPRETED else FLAT_BLOCK
TILE = (256, 256) if INTERPRETED else (TILE_ROWS, TILE_COLUMNS)
INPUT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16}


@dataclass(frozen=True)
class Job:
    """One tensor of a grouped rounding.

    Attributes:
        x: FP32 or FP16, dense.
        how: the rounding.
        codes: laid out as `x`, in the format's storage dtype.
        transposed: of a contiguous matrix with FP8 codes, [columns, rows]; or None.
        stream: where the random bits' stream lies; None without random bits.
        order: how elements are counted for them.
    """

    x: Tensor
    how: Rounding
    codes: Tensor
    transposed: Tensor | None = None
    stream: StreamSlot | None = None
    order: str = "row_major"


@dataclass(frozen=True)
class Launch:
    """One launch over the tensors of a table."""

    kernel: Any
    table: Tensor
    programs: Tensor
    seed: int
    options: dict[str, Any]

    def run(self) -> None:
        """Round all of them."""
        device = self.table.device
        arguments = (self.table, self.programs, *signed_words(self.seed))
        launch(self.kernel, (len(self.programs),), device, *arguments, **self.options)


def takes(x: Tensor, order: str = "row_major") -> bool:
    """True where a `Job` may have such a tensor."""
    return x.dtype in INPUT_TYPES and counted_matrices(x.shape, x.stride(), order) is not None and not x.is_neg()


def prepare(jobs: Sequence[Job], seed: int) -> list[Launch]:
    """The launches that round tensors, their tables in device memory. Empty tensors are left out.

    Raises:
        ValueError: a tensor's device, dtype or layout is not what the kernels take.
    """
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        _check(job)
        if job.x.numel():
            groups.setdefault(_kind(job), []).append(job)
    return [(_flat if members[0].transposed is None else _tiled)(members, seed) for members in groups.values()]


def _kind(job: Job) -> Any:
    """What all tensors of a launch have in common."""
    flat = job.transposed is None
    layout: Any = (_permuted(job), _whole(job.x)) if flat else (_whole_groups(job.x), _packed(job))
    return job.x.device, job.x.dtype, job.how, flat, layout


def _permuted(job: Job) -> bool:
    """Where the order of elements counts, and is not that in memory."""
    return job.how.is_stochastic and _matrix(job)[0] > 0


def _matrix(job: Job) -> tuple[int, int]:
    _, rows, columns = counted_matrices(job.x.shape, job.x.stride(), job.order) or (1, 0, 0)
    return (rows, columns) if rows else (0, 0)


def _whole(x: Tensor) -> bool:
    return x.numel() % 16 == 0


def _whole_groups(x: Tensor) -> bool:
    return x.shape[1] % PER_CALL == 0


def _packed(job: Job) -> int:
    """Rows whose codes are stored as one 32-bit integer; codes of 8 bits."""
    assert job.transposed is not None
    return 4 if job.x.shape[0] % 4 == 0 and address(job.transposed) % 4 == 0 else 1


def _table(members: Sequence[Job], matrices: Sequence[tuple[int, int]]) -> tuple[Tensor, bool]:
    rows = []
    for job, matrix in zip(members, matrices, strict=True):
        transposed = 0 if job.transposed is None else address(job.transposed)
        stream = 0 if job.stream is None else address(job.stream.words()[0])
        rows.append((address(job.x), address(job.codes), transposed, stream, job.x.numel(), *matrix))
    columns = (kernels.X, kernels.CODES, kernels.TRANSPOSED)
    return table_of(tuple(rows), members[0].x.device), all(row[c.value] % 16 == 0 for row in rows for c in columns)


def _flat(members: Sequence[Job], seed: int) -> Launch:
    first = members[0]
    table, aligned = _table(members, list(map(_matrix, members)))
    # Where threads cannot store vectors, each mask takes a register.
    block = BLOCK if _whole(first.x) else BLOCK // 2
    programs = blocks_of(tuple(job.x.numel() for job in members), block, table.device)
    options = {
        **_types(first),
        "CODE_TYPE": tl.uint8 if first.codes.element_size() == 1 else tl.int16,
        "PERMUTED": _permuted(first),
        "WHOLE": _whole(first.x),
        "ALIGNED": aligned,
        "BLOCK": block,
    }
    return Launch(kernels.round_group, table, programs, seed, options)


def _tiled(members: Sequence[Job], seed: int) -> Launch:
    first = members[0]
    shapes = [(job.x.shape[0], job.x.shape[1]) for job in members]
    table, aligned = _table(members, shapes)
    tiles = tuple(cdiv(rows, TILE[0]) * cdiv(columns, TILE[1]) for rows, columns in shapes)
    options = {
        **_types(first),
        "WHOLE_GROUPS": _whole_groups(first.x),
        "PACKED": _packed(first),
        "ALIGNED": aligned,
        "TILE_ROWS": TILE[0],
        "TILE_COLUMNS": TILE[1],
    }
    return Launch(kernels.round_group_transposed, table, blocks_of(tiles, 1, table.device), seed, options)


def _types(job: Job) -> dict[str, Any]:
    return {"X_TYPE": INPUT_TYPES[job.x.dtype], "ENCODING": codec.encoding(job.how, capability(job.x.device))}


def _check(job: Job) -> None:
    x, codes, dtype = job.x, job.codes, job.how.format.dtype
    check_device("x", x)
    if not takes(x, job.order):
        given = f"{x.dtype}, strides {x.stride()}"
        raise ValueError(f"x: got {given}, expected dense torch.float16 or torch.float32, contiguous or channels_last")
    if dtype is None or job.how.is_identity:
        raise ValueError(f"how: got {job.how}, expected a format of 8 or 16 bits with a storage dtype")
    if (codes.dtype, codes.shape, codes.stride(), codes.device) != (dtype, x.shape, x.stride(), x.device):
        given = f"{codes.dtype} of shape {tuple(codes.shape)}, strides {codes.stride()}, on {codes.device}"
        raise ValueError(f"codes: got {given}, expected {dtype}, in shape and strides of x, on {x.device}")
    t = job.transposed
    if t is not None and not (
        x.dim() == 2
        and x.is_contiguous()
        and t.is_contiguous()
        and (t.dtype, t.shape) == (codes.dtype, x.t().shape)
        and job.how.format.is_fp8
        and t.device == x.device
    ):
        given = f"{t.dtype} of shape {tuple(t.shape)} for {codes.dtype} of shape {tuple(x.shape)}, strides {x.stride()}"
        raise ValueError(f"transposed: got {given}, expected FP8 codes of a contiguous matrix and of its transpose")
    if job.how.is_stochastic and job.stream is None:
        raise ValueError("stream: got None with stochastic rounding, expected a slot in device memory")
