"""Bytes that a training step really keeps: saved activations, master weights, working weights (paper, claim C7)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fp8repro.precision.injection import sites


class SavedBytes:
    """Distinct storages that autograd saved for backward, in bytes; parameters and rounded weights are no part.

    Of several micro-steps, those of the first: its backward pass frees them before the next one begins.
    """

    def __init__(self, model: nn.Module) -> None:
        """The parameters and rounded weights of `model` are left out."""
        self._model = model
        # The tensors are kept alive, so that no address is reused.
        self._saved: dict[int, Tensor] = {}
        self._total: int | None = None

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd saves."""
        if self._total is None:
            self._saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        """The backward pass has begun: all is counted, and need not be kept alive any longer."""
        if self._total is None:
            self._total = self._bytes()
            self._saved.clear()
        return tensor

    def total(self) -> int:
        """Bytes up to the first backward pass."""
        return self._bytes() if self._total is None else self._total

    def _bytes(self) -> int:
        weights = [*self._model.parameters(), *_working_weights(self._model)]
        left_out = {t.untyped_storage().data_ptr() for t in weights}
        return sum(t.untyped_storage().nbytes() for address, t in self._saved.items() if address not in left_out)


@contextmanager
def counting_saved_bytes(model: nn.Module, active: bool = True) -> Iterator[SavedBytes]:
    """Count what is saved for backward inside."""
    saved = SavedBytes(model)
    if not active:
        yield saved
        return
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        yield saved


def working_weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that products read: rounded ones where layers are converted, else the parameters."""
    rounded = _working_weights(model)
    if not rounded:
        return sum(p.numel() * p.element_size() for p in model.parameters())
    replaced = {id(getattr(m, "weight", None)) for m in model.modules() if hasattr(m, "site")}
    others = [p for p in model.parameters() if id(p) not in replaced]
    return sum(t.numel() * t.element_size() for t in (*rounded, *others))


def _working_weights(model: nn.Module) -> list[Tensor]:
    """Encodings of the weights that were rounded in this step."""
    return [site.working_weight for site in sites(model).values() if site.working_weight is not None]
