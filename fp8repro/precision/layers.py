"""Drop-in modules that multiply under a recipe. They hold no default of it; `inject` gives each its place (`Site`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro.engines.products import Conv2dGeometry
from fp8repro.models.parts import MatMul
from fp8repro.precision.functional import LINEAR, MATMUL, Op, SharedWeight, conv2d_op, quantized_product, share_weight
from fp8repro.precision.site import Site


class FP8Linear(nn.Linear):
    """`nn.Linear` whose three products follow a recipe."""

    site: Site

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], FP32."""
        x = input if input.dim() > 1 else input.unsqueeze(0)
        result = quantized_product(x, self.weight, self.bias, self.site, LINEAR, self.training)
        return result if input.dim() > 1 else result.squeeze(0)


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


class FP8Conv2d(nn.Conv2d):
    """`nn.Conv2d` (strided, dilated, grouped, any padding mode) whose three products follow a recipe."""

    site: Site
    op: Op

    def prepare(self) -> None:
        """Fix the geometry, and the order in which elements are counted, once."""
        self.site.order = "channels_last"
        padding = (0, 0) if self.pads_apart() else tuple(self.padding)
        geometry = Conv2dGeometry(tuple(self.stride), padding, tuple(self.dilation), self.groups)  # type: ignore[arg-type]
        self.op = conv2d_op(geometry)

    def pads_apart(self) -> bool:
        """True where the product's own zero padding cannot serve."""
        return self.padding_mode != "zeros" or isinstance(self.padding, str)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] (or [C, H, W]) -> [B, O, P, Q], FP32."""
        x = input if input.dim() == 4 else input.unsqueeze(0)
        if self.pads_apart():
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        result = quantized_product(x, self.weight, self.bias, self.site, self.op, self.training)
        return result if input.dim() == 4 else result.squeeze(0)


class FP8MatMul(MatMul):
    """Product of two activations (attention scores and contexts) under a recipe."""

    site: Site

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[..., M, K] @ [..., K, N] -> [..., M, N], FP32; leading dimensions must agree."""
        return quantized_product(a, b, None, self.site, MATMUL, self.training)

    def keep(self, b: Tensor) -> Tensor:
        """The codes of `b`, where they are all that later products take."""
        return self.site.codes(b, self.training)


class MasterEmbedding(nn.Embedding):
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


class SteadyMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that evaluates by the operations that it trains by.

    torch's fast path adds in another order: a last bit that differs may fall on the other side of the next rounding.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention`."""
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return super().forward(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
