"""Puts fused sublayers into a Transformer's layers, and says which passes take them.

What is measured, observed, hooked, traced, evaluated or decoded takes the modules. Nothing here may choose a rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# As in `functional`.
from torch._compile import _disable_dynamo

from fp8repro.engines.guards import plain
from fp8repro.models.parts import MatMul
from fp8repro.models.transformer import DecoderLayer, EncoderLayer, Layer, LayerCache, MultiheadAttention
from fp8repro.precision.become import become
from fp8repro.precision.bypass import has_hooks, is_observed
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_sublayers import Attention, FeedForward, run
from fp8repro.precision.site import Site


class FusedEncoderLayer(EncoderLayer):
    """`EncoderLayer` whose sublayers are one node each in training."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        if not _taken(self, x, mask):
            return super().forward(x, mask)
        return _feed_forward(self, _attend(self, self.self_attn, self.self_attn_layer_norm, x, None, mask))


class FusedDecoderLayer(DecoderLayer):
    """`DecoderLayer` whose sublayers are one node each in training."""

    def cache(self, encoded: Tensor) -> LayerCache:
        """See `DecoderLayer`; keys and values are projected when somebody decodes."""
        return LaterCache(encoded) if _taken(self, encoded) else super().cache(encoded)

    def forward(self, x: Tensor, cache: LayerCache, source_mask: Tensor, mask: Tensor | None) -> Tensor:
        """See `DecoderLayer`."""
        encoded = cache.encoded if isinstance(cache, LaterCache) and cache.fed is None else None
        if encoded is None or not _taken(self, x, source_mask, mask):
            if isinstance(cache, LaterCache):
                cache.project(self)
            return super().forward(x, cache, source_mask, mask)
        assert isinstance(cache, LaterCache)
        cache.fed = x
        x = _attend(self, self.self_attn, self.self_attn_layer_norm, x, None, mask)
        x = _attend(self, self.encoder_attn, self.encoder_attn_layer_norm, x, encoded, source_mask)
        return _feed_forward(self, x)


class LaterCache(LayerCache):
    """A cache of what keys and values are made of, as long as nobody asks for them.

    Attributes:
        encoded: the encoder's output [S, B, width]; None once it has been projected.
        fed: what was fed to the layer [T, B, width], if anything was.
    """

    def __init__(self, encoded: Tensor) -> None:
        """Nothing was fed."""
        # Nobody reads these before they are projected.
        super().__init__(encoded, encoded)
        self.encoded: Tensor | None = encoded
        self.fed: Tensor | None = None

    def project(self, layer: DecoderLayer) -> None:
        """Become the cache that `DecoderLayer` knows."""
        if self.encoded is not None:
            self.cross_key, self.cross_value = layer.encoder_attn.keys_and_values(self.encoded)
            if self.fed is not None:
                self.key, self.value = layer.self_attn.keys_and_values(self.fed)
            self.encoded = self.fed = None

    def select(self, rows: Tensor) -> None:
        """See `LayerCache`; rows of what was not projected are its second dimension."""
        if self.encoded is None:
            super().select(rows)
        else:
            self.encoded = self.encoded.index_select(1, rows)
            self.fed = None if self.fed is None else self.fed.index_select(1, rows)


def _taken(layer: Layer, *tensors: Tensor | None) -> bool:
    """Whether the kernels compute a layer's pass."""
    present = [t for t in tensors if t is not None]
    if not (layer.training and torch.is_grad_enabled() and plain(*present)):
        return False
    if any(t.dtype != torch.float32 or t.numel() == 0 for t in present) or layer.activation_dropout.p:
        return False
    if not all(p.requires_grad for p in layer.parameters()):
        return False
    context: StepContext = layer.fc1.site.context  # type: ignore[union-attr,assignment]
    if context.telemetry.active or is_observed(context):
        return False
    attentions = [m for m in layer.children() if isinstance(m, MultiheadAttention)]
    return not has_hooks(list(layer.children())) and not any(a.product.dropout.p for a in attentions)


# A compiler would take a step's random streams for constants.
@_disable_dynamo
def _attend(
    layer: Layer, module: MultiheadAttention, norm: nn.LayerNorm, x: Tensor, source: Tensor | None, mask: Tensor | None
) -> Tensor:
    sublayer = Attention(module, norm, layer.dropout.p, mask)
    modules = (module.q_proj, module.k_proj, module.v_proj, module.out_proj, norm)
    return run(sublayer, x, source, modules)


@_disable_dynamo
def _feed_forward(layer: Layer, x: Tensor) -> Tensor:
    return run(FeedForward(layer), x, None, (layer.fc1, layer.fc2, layer.final_layer_norm))


FUSED: dict[type[nn.Module], type[nn.Module]] = {EncoderLayer: FusedEncoderLayer, DecoderLayer: FusedDecoderLayer}


def use_transformer_kernels(model: nn.Module) -> None:
    """Let Triton kernels do what lies between the products of Transformer layers under one FP8 recipe, in place."""
    for module in model.modules():
        if type(module) in FUSED and _fusible(module):
            become(module, FUSED[type(module)])


def _fusible(layer: nn.Module) -> bool:
    """Whether one recipe holds in the whole layer, and it is one that the kernels carry out."""
    sites = [getattr(m, "site", None) for m in layer.modules() if isinstance(m, (nn.Linear, MatMul))]
    first = sites[0]
    if not isinstance(first, Site) or any(not isinstance(s, Site) or s.roles != first.roles for s in sites):
        return False
    fp8 = all(first.roles[role].format.is_fp8 for role in ("activation", "error"))
    unscaled = all(spec.scaling == "none" for spec in first.roles.values())
    plain_norms = all(
        m.weight is not None and m.bias is not None for m in layer.modules() if isinstance(m, nn.LayerNorm)
    )
    return fp8 and unscaled and plain_norms and first.round_outputs and not first.roles["activation"].is_stochastic
