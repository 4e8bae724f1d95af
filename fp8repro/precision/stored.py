"""Layers whose weight may be stored in 16 bit between steps: what copies and gradients of such a weight are.

Must never change a value.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class StoredWeight(nn.Module):
    """A layer that reads a master of any dtype.

    What somebody copies, unpickles or assigns is no master: its weight is FP32. An average that is kept in a copy, or
    an optimizer of its own, would lose most moves in 16 bit.
    """

    @property
    def reads_any_dtype(self) -> bool:
        """Whether the weight may be stored in 16 bit."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        """A copy."""
        twin = self.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        _widen(twin._parameters.get("weight"))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle."""
        super().__setstate__(state)
        weight = self._parameters.get("weight")
        # Processes that share a weight write to one memory.
        if weight is not None and not weight.is_shared():
            _widen(weight)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        before = self._parameters.get("weight")
        super()._load_from_state_dict(state_dict, prefix, *rest)
        weight = self._parameters.get("weight")
        # `assign=True`; a parameter of somebody else's stays what it is there.
        if weight is not before and weight is not state_dict.get(f"{prefix}weight"):
            _widen(weight)


def _widen(weight: nn.Parameter | None) -> None:
    if weight is not None and weight.dtype in (torch.float16, torch.bfloat16):
        weight.data = weight.data.float()


def ask_full_gradient(weight: Tensor) -> None:
    """Let autograd leave the gradient of a 16-bit weight in FP32.

    The attribute is the tensor's own: parameters that replaced a master do not have it.
    """
    if weight.dtype is not torch.float32 and weight.is_leaf and weight.requires_grad:
        weight.grad_dtype = torch.float32
