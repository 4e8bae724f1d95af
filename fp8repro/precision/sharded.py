"""Masters of which each process holds a part (FSDP2's `DTensor`): rounded to the bits that one process would give.

Random bits count elements in the unsharded tensor. Nothing here may communicate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8repro.engines.quantizer import round_into
from fp8repro.numerics.rounding import RandomBits, Rounding


def is_sharded(x: Any) -> bool:
    """Whether a tensor is distributed; without the package that distributes it, none is."""
    if type(x) in (Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def round_shard(values: Any, how: Rounding, bits: RandomBits, target: Any) -> None:
    """Round this process' part of FP32 `values` into its part of `target`, FP32 and distributed alike.

    Engines count from a tensor's first element, so what lies before the part is rounded along, as zeros: a process
    spends time on up to the whole tensor, and memory on one such tensor at a time.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    part: Tensor = values.to_local()
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    if not part.numel():
        return
    if not how.is_stochastic:
        round_into(part, how, bits, values=target.to_local())
        return
    ends = [first + size for first, size in zip(offset, shape, strict=True)]
    # Rows behind the part are not counted before it; all other dimensions are whole.
    whole = torch.zeros((ends[0], *target.shape[1:]), dtype=torch.float32, device=part.device)
    place = tuple(slice(first, end) for first, end in zip(offset, ends, strict=True))
    whole[place] = part
    round_into(whole, how, bits, values=whole)
    target.to_local().copy_(whole[place])
