"""Products that a module computes through functions: one small module without parameters for each, which has its site.

So whoever holds the weights keeps them, names and `state_dict` stay what they are, and everything that knows layers by
their sites (telemetry, streams, copies, training and evaluation mode) knows these products too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fp8repro.engines.products import Conv2dGeometry, ConvolutionGeometry, EmulateBackend
from fp8repro.models.parts import MatMul
from fp8repro.precision.convolutions import conv1d_op, convolution_op
from fp8repro.precision.functional import (
    LINEAR,
    MATMUL,
    SharedWeight,
    conv2d_op,
    quantized_product,
    share_weight,
)
from fp8repro.precision.site import Site


class FP8MatMul(MatMul):
    """Product of two activations (attention scores and contexts) under a recipe."""

    site: Site

    @_disable_dynamo
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[..., M, K] @ [..., K, N] -> [..., M, N], FP32; leading dimensions must agree."""
        return quantized_product(a, b, None, self.site, MATMUL, self.training)

    def keep(self, b: Tensor) -> Tensor:
        """The codes of `b`, where they are all that later products take."""
        return self.site.codes(b, self.training)

    def multiply_adds(self, inputs: tuple[Any, ...], output: Tensor) -> int:
        """Of one forward pass."""
        return output.numel() * int(inputs[0].shape[-1])


class Product(nn.Module):
    """A product with a site of its own."""

    site: Site

    def __init__(self, site: Site) -> None:
        """The site names the random streams."""
        super().__init__()
        self.site = site


def matmul_product(site: Site) -> FP8MatMul:
    """A product of two activations with that site."""
    product = FP8MatMul()
    product.site = site
    return product


class WeightProduct(Product):
    """`F.linear` under a recipe, with a weight that somebody else holds."""

    @_disable_dynamo
    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, shared: SharedWeight | None = None
    ) -> Tensor:
        """x [..., K], weight [N, K], bias [N] -> [..., N], FP32; `shared`: see `share_weight`."""
        rows = x if x.dim() > 1 else x.unsqueeze(0)
        result = quantized_product(rows, weight, bias, self.site, LINEAR, self.training, shared)
        return result if x.dim() > 1 else result.squeeze(0)

    def repeated(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The product for all calls of one forward pass: the weight is rounded once (see `share_weight`)."""
        shared = share_weight(weight, bias, self.site, self.training)
        return partial(self, weight=weight, bias=bias, shared=shared)

    def multiply_adds(self, inputs: tuple[Any, ...], output: Tensor) -> int:
        """Of one forward pass."""
        return output.numel() * int(inputs[0].shape[-1])


class ConvolutionProduct(Product):
    """`F.conv1d` to `F.conv3d` and the transposed ones under a recipe, with a weight that somebody else holds."""

    def __init__(self, site: Site) -> None:
        """The site counts channels last."""
        super().__init__(replace(site, order="channels_last"))
        self.fast = self.site.backend

    @_disable_dynamo
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
        """x [B, C, ...] (or [C, ...]) -> [B, O, ...], FP32."""
        g, spatial = geometry, weight.dim() - 2
        if g.transposed or spatial == 3:
            self.site.backend, op = EmulateBackend(), convolution_op(g)
        elif spatial == 2:
            image = Conv2dGeometry(g.stride, g.padding, g.dilation, g.groups)  # type: ignore[arg-type]
            self.site.backend, op = self.fast, conv2d_op(image)
        else:
            (stride,), (padding,), (dilation,) = g.stride, g.padding, g.dilation
            row = Conv2dGeometry((1, stride), (0, padding), (1, dilation), g.groups)
            self.site.backend, op = self.fast, conv1d_op(row)
        batched = x.dim() == weight.dim()
        result = quantized_product(x if batched else x.unsqueeze(0), weight, bias, self.site, op, self.training)
        return result if batched else result.squeeze(0)

    def multiply_adds(self, inputs: tuple[Any, ...], output: Tensor) -> int:
        """Of one forward pass."""
        x, weight, _, geometry = inputs
        return int((x if geometry.transposed else output).numel() * weight[0].numel())


class FP8Attention(nn.Module):
    """`F.scaled_dot_product_attention` as two products under a recipe; scores are kept, softmax is FP32.

    Attributes:
        scores, context: the products q k^T and softmax(...) v.
    """

    def __init__(self, site: Site) -> None:
        """The products are named after the site's layer."""
        super().__init__()
        self.scores = matmul_product(site.part("scores"))
        self.context = matmul_product(site.part("context"))

    @_disable_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[..., L, V]; takes what `attend` does."""
        return self.attend(*args, **kwargs)[0]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Arguments of `F.scaled_dot_product_attention`; the query is scaled before it is rounded.

        Returns:
            Its result [..., L, V], and the attention weights [..., L, S], after dropout.
        """
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        query, key, value = (t.expand(*leading, *t.shape[-2:]) for t in (query, key, value))
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = self.scores(query * scale, key.transpose(-1, -2))
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -math.inf)
        if attn_mask is not None:
            forbids = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if forbids else scores + attn_mask
        # Zeros, as torch gives, where a row may attend to nothing.
        weights = torch._safe_softmax(scores, -1)
        dropped = F.dropout(weights, dropout_p) if dropout_p > 0 else weights
        return self.context(dropped, value), dropped


def matmul(product: FP8MatMul, a: Tensor, b: Tensor) -> Tensor:
    """`torch.matmul` of two activations of any dimensions, broadcast as torch does."""
    left = a.unsqueeze(0) if a.dim() == 1 else a
    right = b.unsqueeze(1) if b.dim() == 1 else b
    if right.dim() == 2 and left.dim() > 2:
        # One product of all rows: a batch of them would repeat the second operand.
        result: Tensor = product(left.flatten(0, -2), right).unflatten(0, left.shape[:-1])
    else:
        leading = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        left, right = (t.expand(*leading, *t.shape[-2:]) for t in (left, right))
        result = product(left, right)
    result = result.squeeze(-1) if b.dim() == 1 else result
    return result.squeeze(-2 if b.dim() > 1 else -1) if a.dim() == 1 else result
