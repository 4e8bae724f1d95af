"""Drop-in modules that multiply under a recipe. They hold no default of it; `inject` gives each its place (`Site`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fp8repro.precision.functional import LINEAR, SharedWeight, quantized_product, share_weight
from fp8repro.precision.site import Site, refuse_transforms
from fp8repro.precision.stored import StoredWeight, ask_full_gradient


class FP8Linear(StoredWeight, nn.Linear):
    """`nn.Linear` whose three products follow a recipe."""

    site: Site

    # A compiler takes each layer as it is: of its own, it would compile a few views.
    @_disable_dynamo
    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], FP32."""
        x = input if input.dim() > 1 else input.unsqueeze(0)
        result = quantized_product(x, self.weight, self.bias, self.site, LINEAR, self.training)
        return result if input.dim() > 1 else result.squeeze(0)

    def multiply_adds(self, inputs: tuple[Any, ...], output: Tensor) -> int:
        """Of one forward pass."""
        return output.numel() * self.in_features


class FP8RepeatedLinear(FP8Linear):
    """`RepeatedLinear` under a recipe: one weight gradient for all calls of a forward pass, rounded once."""

    def repeated(self) -> Callable[[Tensor], Tensor]:
        """The layer for one forward pass; call what is returned as the layer itself."""
        return partial(self, shared=share_weight(self.weight, self.bias, self.site, self.training))

    def forward(self, input: Tensor, shared: SharedWeight | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], FP32; `shared`: see `share_weight`."""
        if shared is None:
            return super().forward(input)
        return quantized_product(input, self.weight, self.bias, self.site, LINEAR, self.training, shared)


class MasterEmbedding(StoredWeight, nn.Embedding):
    """`nn.Embedding` that looks up in a master of any dtype and gives FP32 values; nothing is rounded here.

    Masters of embeddings that write to their weight (`max_norm`) or give sparse gradients stay in FP32 tensors.
    """

    @property
    def reads_any_dtype(self) -> bool:
        """Whether the weight may be stored in 16 bit."""
        return self.max_norm is None and not self.sparse

    def forward(self, input: Tensor) -> Tensor:
        """Indices [...] -> [..., embedding_dim], FP32."""
        if self.weight.dtype == torch.float32:
            return super().forward(input)
        refuse_transforms("Embedding")
        ask_full_gradient(self.weight)
        result: Tensor = _Lookup.apply(input, self.weight, self.padding_idx, self.scale_grad_by_freq)
        return result


class _Lookup(torch.autograd.Function):
    # torch's own lookup would round the scaled gradient to the master's FP16.
    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, padding_idx: int | None, by_frequency: bool) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows, ctx.padding_idx, ctx.by_frequency = weight.shape[0], padding_idx, by_frequency
        return F.embedding(indices, weight).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        padding = -1 if ctx.padding_idx is None else ctx.padding_idx
        gradient = torch.ops.aten.embedding_dense_backward(grad, indices, ctx.rows, padding, ctx.by_frequency)
        return None, gradient, None, None
