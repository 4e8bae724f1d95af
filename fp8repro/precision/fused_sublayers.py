"""A Transformer's sublayers in one autograd node each: attention or feed-forward part, residual sum, normalization.

What lies between the products takes one launch, roundings and layouts included, with the roundings and random bits of
the modules. Nothing here may choose a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8repro.engines.products import Operand
from fp8repro.models.transformer import Layer, MultiheadAttention
from fp8repro.numerics.rounding import IDENTITY, RandomBits, Rounding
from fp8repro.precision.functional import without_autocast
from fp8repro.precision.fused_normalization import storage_format
from fp8repro.precision.site import Site


@dataclass
class Projection:
    """A linear layer in one pass of a fused node.

    Attributes:
        weight: rounded.
        call: which call of the layer's it is.
    """

    site: Site
    weight: Operand
    bias: Tensor | None
    call: int

    @staticmethod
    def of(layer: nn.Linear) -> Projection:
        """A layer's next call in training."""
        site: Site = layer.site  # type: ignore[assignment]
        return Projection(site, site.weight(layer.weight, True, True), layer.bias, site.next_call(True))

    def operand(self, x: Tensor) -> Operand:
        """The layer's input, rounded, in both layouts."""
        return self.site.operand(x, "activation", "input", self.call, True, True)

    def forward(self, x: Operand) -> Tensor:
        """The layer's output, rounded."""
        self.site.announce("forward", x, self.weight)
        multiply = lambda b: b.linear(x, self.weight, self.bias)  # noqa: E731
        return self.site.product(multiply, "activation", "output", self.call)

    def error_parts(self, error: Operand) -> Tensor:
        """The gradient of its input, not rounded: FP32 [parts, rows, K]."""
        parts: Tensor = self.site.backend.linear_error_parts(error, self.weight)  # type: ignore[attr-defined]
        return parts

    def bits(self, role: str, name: str) -> RandomBits:
        """Where the random bits of one of its roundings come from."""
        return self.site.bits(self.site.spec(role, True), role, name, self.call)


def _input_rounding(site: Site) -> Rounding:
    """How gradients of a layer's inputs are rounded."""
    return site.spec("error", True) if site.round_input_errors else IDENTITY


def _gradients(layers: Sequence[Projection], turned: Tensor, x: Operand) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Gradients of weight and bias of layers that got the same input; `turned`: their transposed errors, stacked."""
    from fp8repro.kernels.attention.launch_sums import finish_gradients

    site = layers[0].site
    error = Operand(turned.t(), site.spec("error", True).format, transposed=turned)
    parts = site.backend.linear_gradient_parts(error, x)  # type: ignore[attr-defined]
    has_bias = layers[0].bias is not None
    bits = [layer.bits("gradient", "weight_gradient") for layer in layers]
    weights, biases = finish_gradients(parts, turned if has_bias else None, site.spec("gradient", True), bits)
    return tuple((weights[i], None if biases is None else biases[i]) for i in range(len(layers)))


def _kept(x: Operand) -> Tensor:
    """What of an input is kept for the gradient of its layers' weights: [K, rows]."""
    return x.codes.flatten(0, -2).t() if x.transposed is None else x.transposed


class _Branch(torch.autograd.Function):
    """A sublayer, with tensors as arguments for autograd's sake."""

    @staticmethod
    def forward(ctx: Any, sublayer: Any, x: Tensor, source: Tensor | None, *parameters: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(x.device.type):
            y, codes, turned = sublayer.forward(x, source)
        ctx.sublayer = sublayer
        ctx.context = next(iter(sublayer.sites())).context
        ctx.place = ctx.context.place
        ctx.mark_non_differentiable(codes, turned)
        ctx.set_materialize_grads(False)
        # Tensors that autograd has to know of, so that memory is freed with the graph.
        ctx.save_for_backward(*sublayer.kept)
        sublayer.kept = ()
        return y, codes, turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device.type), ctx.context.at(ctx.place):
            gradients = ctx.sublayer.backward(ctx.saved_tensors, grad.contiguous())
        for site in ctx.sublayer.sites():
            site.context.returned(site.name)
        return None, *gradients


@dataclass
class Residual:
    """The end of a sublayer: y = normalization(x + dropout(branch)).

    Attributes:
        last: the layer whose output the branch is; its error is rounded here.
        p: share of the branch that is dropped.
    """

    norm: nn.LayerNorm
    last: Projection
    p: float

    def _dropout(self) -> Any:
        from fp8repro.kernels.attention.launch import Dropout

        site = self.last.site
        stream = site.context.stream(site.name, self.last.call, "dropout", "activation") if self.p else 0
        return Dropout.of(self.p, RandomBits(site.context.seed, stream))

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """[T, B, width] each -> y, its codes in both layouts, and what is kept."""
        from fp8repro.kernels.attention.launch import empty_operand, residual_norm

        width, how = x.shape[-1], self.last.site.spec("activation", True)
        rows = x.reshape(-1, width)
        codes = rows.new_empty(rows.shape, dtype=how.format.dtype)
        turned = empty_operand(width, len(rows), like=rows, dtype=how.format.dtype)
        weight, bias = self.norm.weight, self.norm.bias
        arguments = (weight, bias, self.norm.eps, self._dropout(), how, codes, turned)
        y, kept = residual_norm(rows, branch.reshape(-1, width), *arguments)
        return y.view(x.shape), codes.view(x.shape), turned, kept

    def backward(self, kept: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor, Operand]:
        """Gradients of the sum [rows, width] and of weight and bias [2, width]; the branch's error."""
        from fp8repro.kernels.attention.launch import empty_operand, residual_norm_backward

        grad, how = grad.view(-1, grad.shape[-1]), self.last.site.spec("error", True)
        codes = grad.new_empty(grad.shape, dtype=how.format.dtype)
        turned = empty_operand(grad.shape[1], grad.shape[0], like=grad, dtype=how.format.dtype)
        bits = self.last.bits("error", "output_error")
        arguments = (kept, self.norm.weight, self._dropout(), how, bits, codes, turned)
        grad_sum, grad_norm = residual_norm_backward(grad, *arguments)  # type: ignore[arg-type]
        return grad_sum, grad_norm, Operand(codes, how.format, transposed=turned)


class Attention:
    """An attention sublayer's pass; `source` [S, B, width] is x itself (None) or the encoder's output."""

    def __init__(self, module: MultiheadAttention, norm: nn.LayerNorm, p: float, mask: Tensor | None) -> None:
        """`mask` is what is added to the scores."""
        self.heads, self.scaling, self.mask = module.heads, module.scaling, mask
        # In the order of the modules, which names their streams.
        self.key, self.value, self.query = (Projection.of(m) for m in (module.k_proj, module.v_proj, module.q_proj))
        self.scores: Site = module.product.scores.site  # type: ignore[assignment]
        self.context: Site = module.product.context.site  # type: ignore[assignment]
        self.scores_call, self.context_call = self.scores.next_call(True), self.context.next_call(True)
        self.out = Projection.of(module.out_proj)
        self.end = Residual(norm, self.out, p)
        self.kept: tuple[Tensor, ...] = ()

    def sites(self) -> tuple[Site, ...]:
        """Of all its products."""
        projections = (self.query, self.key, self.value, self.out)
        return (*(p.site for p in projections), self.scores, self.context)

    def forward(self, x: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """y [T, B, width], its codes, and those of its transpose."""
        from fp8repro.kernels.attention import launch as kernels

        x = x.contiguous()
        own = self.query.operand(x)
        theirs = own if source is None else self.key.operand(source)
        query, key, value = self.query.forward(own), self.key.forward(theirs), self.value.forward(theirs)
        how = self.scores.spec("activation", True)
        format, dtype = how.format, how.format.dtype
        heads, (steps, batch, width) = self.heads, x.shape
        length, depth = key.shape[0], width // heads
        operands = []
        for t in (query, key, value):
            codes = t.new_empty(batch, heads, t.shape[0], depth, dtype=dtype)
            operands.append((codes, kernels.empty_operand(batch, heads, depth, t.shape[0], like=t, dtype=dtype)))
        views = (t.view(-1, batch, heads, depth).permute(1, 2, 0, 3) for t in (query, key, value))
        tensors = [kernels.Rerounded(v, *both) for v, both in zip(views, operands, strict=True)]
        kernels.reround(tensors, how, scale=self.scaling)
        (q, q_turned), (k, k_turned), (v, v_turned) = operands
        first, second = Operand(q, format), Operand(k.transpose(-1, -2), format)
        self.scores.announce("forward", first, second)
        scores = self.scores.product(
            lambda b: b.matmul(first, second),
            "activation",
            "output",
            self.scores_call,
        )
        weights = kernels.empty_operand(batch, heads, steps, length, like=x, dtype=dtype)
        weights_turned = kernels.empty_operand(batch, heads, length, steps, like=x, dtype=dtype)
        kept_scores = torch.empty_like(scores, dtype=storage_format(self.scores).dtype)
        kernels.softmax(scores, self.mask, how, weights, weights_turned, kept_scores)
        averaged, values = Operand(weights, format), Operand(v_turned.transpose(-1, -2), format)
        self.context.announce("forward", averaged, values)
        result = self.context.product(
            lambda b: b.matmul(averaged, values),
            "activation",
            "output",
            self.context_call,
        )
        codes = x.new_empty(steps, batch, width, dtype=dtype)
        turned = kernels.empty_operand(width, steps * batch, like=x, dtype=dtype)
        kernels.reround([kernels.Rerounded(result.permute(2, 1, 0, 3), *self._joined(codes, turned, batch))], how)
        branch = self.out.forward(Operand(codes, format))
        y, y_codes, y_turned, kept = self.end.forward(x, branch)
        self.kept = (_kept(own), _kept(theirs), q_turned, k_turned, v, weights_turned, kept_scores, turned, *kept)
        return y, y_codes, y_turned

    def _joined(self, codes: Tensor, turned: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Codes [T, B, width] (or [T * B, width]) and their transpose as [T, heads, B, d] and [T, heads, d, B]."""
        by_heads = codes.view(-1, batch, self.heads, codes.shape[-1] // self.heads).transpose(1, 2)
        return by_heads, turned.unflatten(1, (-1, batch)).unflatten(0, (self.heads, -1)).permute(2, 0, 1, 3)

    def backward(self, kept: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, source, projections (query, key, value, out) and normalization."""
        from fp8repro.kernels.attention import launch as kernels
        from fp8repro.kernels.attention.launch_sums import sum_rounded

        own, theirs, q_turned, k_turned, v, weights_turned, scores, context_turned, *normalized = kept
        steps, batch, width = grad.shape
        heads, length, depth = self.heads, v.shape[2], v.shape[3]
        how, before = self.scores.spec("error", True), _input_rounding(self.scores)
        format, dtype = how.format, how.format.dtype
        stored = self.scores.spec("activation", True).format
        backend: Any = self.scores.backend

        def bits(site: Site, call: int, name: str) -> RandomBits:
            return site.bits(how, "error", name, call)

        grad_sum, grad_norm, error = self.end.backward(tuple(normalized), grad)
        assert error.transposed is not None
        (grad_out,) = _gradients(
            [self.out], error.transposed, Operand(context_turned.t(), stored, transposed=context_turned)
        )
        product = self.out.error_parts(error).view(-1, steps, batch, heads, depth).permute(0, 2, 3, 1, 4)
        codes = v.new_empty(batch, heads, steps, depth, dtype=dtype)
        turned = kernels.empty_operand(batch, heads, depth, steps, like=v, dtype=dtype)
        drawn = (self.out.bits("error", "input_error"), bits(self.context, self.context_call, "output_error"))
        kernels.reround([kernels.Rerounded(product, codes, turned, *drawn)], how, before)
        grad_weights = backend.matmul_error_a(Operand(codes, format), Operand(v, stored))
        grad_value = backend.matmul_error_b(
            Operand(turned.transpose(-1, -2), format), Operand(weights_turned.transpose(-1, -2), stored)
        )
        codes = kernels.empty_operand(batch, heads, steps, length, like=v, dtype=dtype)
        turned = kernels.empty_operand(batch, heads, length, steps, like=v, dtype=dtype)
        kernels.softmax_backward(
            grad_weights,
            scores,
            self.mask,
            how,
            bits(self.scores, self.scores_call, "output_error"),
            codes,
            turned,
            before,
            bits(self.context, self.context_call, "input_error"),
        )
        grad_query = backend.matmul_error_a(Operand(codes, format), Operand(k_turned, stored))
        grad_key = backend.matmul_error_b(
            Operand(turned.transpose(-1, -2), format), Operand(q_turned.transpose(-1, -2), stored)
        )
        # Errors of layers that share an input are stacked, for one product gives the gradients of all.
        sizes = (steps, length, length)
        stacks = [(0, 1, 2)] if own is theirs else [(0,), (1, 2)]
        codes_of, turned_of, stacked = {}, {}, []
        for stack in stacks:
            rows = sizes[stack[0]] * batch
            codes = v.new_empty(len(stack), rows, width, dtype=dtype)
            turned = kernels.empty_operand(len(stack) * width, rows, like=v, dtype=dtype)
            stacked.append(turned)
            for i, which in enumerate(stack):
                codes_of[which], turned_of[which] = codes[i], turned[i * width : (i + 1) * width]
        products = (grad_query.permute(2, 1, 0, 3), grad_key.permute(3, 1, 0, 2), grad_value.permute(2, 1, 0, 3))
        names = (
            bits(self.scores, self.scores_call, "input_error"),
            bits(self.scores, self.scores_call, "input_b_error"),
            bits(self.context, self.context_call, "input_b_error"),
        )
        layers = (self.query, self.key, self.value)
        tensors = [
            kernels.Rerounded(
                products[i],
                *self._joined(codes_of[i], turned_of[i], batch),
                names[i],
                layers[i].bits("error", "output_error"),
            )
            for i in range(3)
        ]
        kernels.reround(tensors, how, before, scale=self.scaling)
        parts = [layer.error_parts(Operand(codes_of[i], format)) for i, layer in enumerate(layers)]
        drawn_by = [layer.bits("error", "input_error") for layer in layers]
        # In the order in which autograd would add them.
        x_terms, source_terms = ([0, 2, 1], []) if own is theirs else ([0], [2, 1])
        grad_x = sum_rounded(grad_sum, [parts[i] for i in x_terms], before, [drawn_by[i] for i in x_terms])
        grad_source = None
        if source_terms:
            given = ([parts[i] for i in source_terms], before, [drawn_by[i] for i in source_terms])
            grad_source = sum_rounded(None, *given).view(length, batch, width)
        inputs = [Operand(t.t(), stored, transposed=t) for t in (own, theirs)]
        found = [
            pair
            for stack, turned, x in zip(stacks, stacked, inputs, strict=False)
            for pair in _gradients([layers[i] for i in stack], turned, x)
        ]
        pairs = [*found, grad_out, (grad_norm[0], grad_norm[1])]
        return grad_x.view(grad.shape), grad_source, *(t for pair in pairs for t in pair)


class FeedForward:
    """A feed-forward sublayer's pass."""

    def __init__(self, layer: Layer) -> None:
        """Of a layer."""
        self.first, self.second = Projection.of(layer.fc1), Projection.of(layer.fc2)
        self.end = Residual(layer.final_layer_norm, self.second, layer.dropout.p)
        self.kept: tuple[Tensor, ...] = ()

    def sites(self) -> tuple[Site, ...]:
        """Of both layers."""
        return self.first.site, self.second.site

    def forward(self, x: Tensor, source: None) -> tuple[Tensor, Tensor, Tensor]:
        """y [T, B, width], its codes, and those of its transpose."""
        from fp8repro.kernels.attention import launch as kernels

        x = x.contiguous()
        own, how = self.first.operand(x), self.second.site.spec("activation", True)
        hidden = self.first.forward(own)
        codes = torch.empty_like(hidden, dtype=how.format.dtype)
        rows = codes.flatten(0, 1)
        turned = kernels.empty_operand(rows.shape[1], rows.shape[0], like=hidden, dtype=how.format.dtype)
        tensor = kernels.Rerounded(hidden.view(1, 1, *rows.shape), rows[None, None], turned[None, None])
        kernels.reround([tensor], how, relu=True)
        y, y_codes, y_turned, kept = self.end.forward(x, self.second.forward(Operand(codes, how.format)))
        self.kept = (_kept(own), rows, turned, *kept)
        return y, y_codes, y_turned

    def backward(self, kept: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, both layers and normalization."""
        from fp8repro.kernels.attention import launch as kernels
        from fp8repro.kernels.attention.launch_sums import sum_rounded

        own, hidden, hidden_turned, *normalized = kept
        site = self.first.site
        how, before, stored = site.spec("error", True), _input_rounding(site), site.spec("activation", True).format
        grad_sum, grad_norm, error = self.end.backward(tuple(normalized), grad)
        assert error.transposed is not None
        x = Operand(hidden_turned.t(), stored, transposed=hidden_turned)
        (grad_second,) = _gradients([self.second], error.transposed, x)
        product = self.second.error_parts(error)
        codes = hidden.new_empty(hidden.shape, dtype=how.format.dtype)
        turned = kernels.empty_operand(*hidden.shape[::-1], like=hidden, dtype=how.format.dtype)
        drawn = (self.second.bits("error", "input_error"), self.first.bits("error", "output_error"))
        tensor = kernels.Rerounded(product[:, None, None], codes[None, None], turned[None, None], *drawn)
        # What the ReLU let pass is over zero, and stayed so when it was rounded: it was rounded as an output before.
        kernels.reround([tensor], how, before, mask=hidden[None, None])
        parts = self.first.error_parts(Operand(codes, how.format))
        grad_x = sum_rounded(grad_sum, [parts], before, [self.first.bits("error", "input_error")])
        (grad_first,) = _gradients([self.first], turned, Operand(own.t(), stored, transposed=own))
        pairs = (grad_first, grad_second, (grad_norm[0], grad_norm[1]))
        return grad_x.view(grad.shape), None, *(t for pair in pairs for t in pair)


def run(sublayer: Attention | FeedForward, x: Tensor, source: Tensor | None, modules: Sequence[nn.Module]) -> Tensor:
    """A sublayer's output; that its codes are there is offered to the layers behind.

    Args:
        sublayer: made for this very pass.
        x: FP32 [T, B, width].
        source: FP32 [S, B, width], what keys and values are made of where that is not x.
        modules: the layers, then the normalization, in the order of the gradients that `backward` gives.
    """
    parameters = [p for module in modules for p in (module.weight, module.bias)]
    y, codes, turned = _Branch.apply(sublayer, x, source, *parameters)
    last = sublayer.end.last.site
    last.context.offers.make(y, last.spec("activation", True), codes.detach(), turned.detach())
    result: Tensor = y
    return result
