"""`nn.MultiheadAttention` that multiplies under a recipe, with every option of torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fp8repro.precision.function_products import FP8Attention, WeightProduct
from fp8repro.precision.site import Site


class FP8MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose products follow a recipe; `out_proj` is a layer of its own.

    It evaluates by the operations that it trains by. torch's fast path adds in another order: a last bit that differs
    may fall on the other side of the next rounding.

    Attributes:
        site: the layer's place; its products have places of their own, named after it.
        projection: of self-attention, one product for query, key and value.
        query, key, value: the products of everything else.
        attention: scores and contexts.
    """

    site: Site
    projection: WeightProduct
    query: WeightProduct
    key: WeightProduct
    value: WeightProduct
    attention: FP8Attention

    def prepare(self) -> None:
        """Make the products."""
        for name in ("projection", "query", "key", "value"):
            setattr(self, name, WeightProduct(self.site.part(name)))
        self.attention = FP8Attention(self.site.part("attention"))

    @_disable_dynamo
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        same = query is key and key is value
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value, same)
        # As torch: where nothing else is masked the hint stands for the mask, and hides what is added to the keys, too.
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else self._mask(query, key_padding_mask, attn_mask)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([t, b.expand(len(t), 1, -1)], 1) for t, b in ((k, self.bias_k), (v, self.bias_v)))
            mask = None if mask is None else F.pad(mask, (0, 1))
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
            mask = None if mask is None else F.pad(mask, (0, 1))
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        dropout = self.dropout if self.training else 0.0
        context, weights = self.attention.attend(heads[0], heads[1], heads[2], mask, dropout, hint)
        result = self.out_proj(context.transpose(1, 2).flatten(-2))
        given = None
        if need_weights:
            given = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return result.squeeze(0), None if given is None else given.squeeze(0)
        return result if self.batch_first else result.transpose(0, 1), given

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, L, width]."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif same:
            q, k, v = self.projection(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return q, k, v
        else:
            weights = self.in_proj_weight.chunk(3)
        products = zip((self.query, self.key, self.value), (query, key, value), weights, biases, strict=True)
        q, k, v = (product(x, weight, bias) for product, x, weight, bias in products)
        return q, k, v

    def _mask(self, query: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """What to add to scores [B, heads, L, S]; None where everything is allowed."""
        parts = []
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            added = F._canonical_mask(mask, name, None, "", query.dtype, check_other=False)
            if added is None:
                continue
            if name == "key_padding_mask":
                added = added[:, None, None, :]
            elif added.dim() == 3:
                added = added.unflatten(0, (-1, self.num_heads))
            parts.append(added)
        return sum(parts[1:], parts[0]) if parts else None
