"""Layers whose weight may be stored in 16 bit between steps: what copies and gradients of such a weight are.

Must never change a value.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class StoredWeight(nn.Module):
    """A layer that reads a master of any dtype."""

    @property
    def reads_any_dtype(self) -> bool:
        """Whether the weight may be stored in 16 bit."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        """A copy with its weight in FP32: an average that is kept in a copy would lose most moves in 16 bit."""
        twin = self.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        weight = twin._parameters.get("weight")
        if weight is not None and weight.dtype in (torch.float16, torch.bfloat16):
            weight.data = weight.data.float()
        return twin


def ask_full_gradient(weight: Tensor) -> None:
    """Let autograd leave the gradient of a 16-bit weight in FP32.

    The attribute is the tensor's own: parameters that were loaded, copied or assigned have lost it.
    """
    if weight.dtype is not torch.float32 and weight.is_leaf and weight.requires_grad:
        weight.grad_dtype = torch.float32
