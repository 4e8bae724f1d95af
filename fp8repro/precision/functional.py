"""The recipe's autograd: quantize, multiply, quantize, forward and backward, driven by one table of roles.

                 operands                        result
    forward      activation x weight             activation (output)
    error        error x weight                  error (gradient of the input)
    gradient     error x activation              gradient (of the weight)

Every tensor is rounded once and used for all its products. Nothing here may know where a tensor comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

# `torch.compiler.disable`, but the compiler is imported by the first call: `import fp8repro` must not take that second.
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from fp8repro.engines.products import Backend, Conv2dGeometry, Operand
from fp8repro.numerics.formats import FloatFormat
from fp8repro.precision.site import Site, refuse_traced_training
from fp8repro.precision.stored import ask_full_gradient


@dataclass(frozen=True)
class Op:
    """The products of one kind of layer.

    Attributes:
        forward, grad_a, grad_b: result, gradients of the operands (shaped and laid out as the last argument).
        b_is_weight: the second operand is a weight, not a second activation.
        both_layouts: operands are matrices, needed in both layouts by two products each.
        bias_dims: dimensions of the error that the bias' gradient sums over; None for all but the last.
    """

    forward: Callable[[Backend, Operand, Operand, Tensor | None], Tensor]
    grad_a: Callable[[Backend, Operand, Operand, Tensor], Tensor]
    grad_b: Callable[[Backend, Operand, Operand, Tensor], Tensor]
    b_is_weight: bool = True
    both_layouts: bool = False
    bias_dims: tuple[int, ...] | None = None


LINEAR = Op(
    forward=lambda backend, x, w, bias: backend.linear(x, w, bias),
    grad_a=lambda backend, e, w, like: backend.linear_error(e, w),
    grad_b=lambda backend, e, x, like: backend.linear_gradient(e, x),
    both_layouts=True,
)
MATMUL = Op(
    forward=lambda backend, a, b, bias: backend.matmul(a, b),
    grad_a=lambda backend, e, b, like: backend.matmul_error_a(e, b),
    grad_b=lambda backend, e, a, like: backend.matmul_error_b(e, a),
    b_is_weight=False,
)


def conv2d_op(geometry: Conv2dGeometry) -> Op:
    """The products of a convolution."""
    # No closures: a model that holds them could not be pickled.
    return Op(
        forward=partial(_conv2d_forward, geometry),
        grad_a=partial(_conv2d_error, geometry),
        grad_b=partial(_conv2d_gradient, geometry),
        bias_dims=(0, 2, 3),
    )


def _conv2d_forward(g: Conv2dGeometry, backend: Backend, x: Operand, w: Operand, bias: Tensor | None) -> Tensor:
    return backend.conv2d(x, w, bias, g)


def _conv2d_error(g: Conv2dGeometry, backend: Backend, e: Operand, w: Operand, like: Tensor) -> Tensor:
    return backend.conv2d_error(e, w, g, like)


def _conv2d_gradient(g: Conv2dGeometry, backend: Backend, e: Operand, x: Operand, like: Tensor) -> Tensor:
    return backend.conv2d_gradient(e, x, g, like)


@dataclass
class GatheredGradient:
    """The gradient of a weight that a forward pass uses many times: one product over all uses, rounded once.

    It must hold no tensor of the graph that holds it: such a circle is never freed.

    Attributes:
        inputs, errors: codes of both operands, of each use whose backward pass has run.
    """

    site: Site
    training: bool
    inputs: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    call: int = 0
    formats: tuple[FloatFormat, FloatFormat] | None = None

    def add(self, x: Operand, error: Operand, call: int, needs_weight: bool, needs_bias: bool) -> None:
        """Note one use."""
        self.inputs.append(x.codes.flatten(0, -2))
        self.errors.append(error.codes.flatten(0, -2))
        self.call, self.formats = call, (x.fmt, error.fmt)

    def products(self, needs_weight: bool, needs_bias: bool) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias over all uses, which are then forgotten."""
        if self.formats is None:
            return None, None
        x, error = (
            Operand(_join(codes), fmt) for codes, fmt in zip((self.inputs, self.errors), self.formats, strict=True)
        )
        self.inputs, self.errors, self.formats = [], [], None
        weight = _weight_gradient(self.site, x, error, self.call, self.training) if needs_weight else None
        return weight, error.decoded().sum(0) if needs_bias else None


@dataclass
class SummedGradient:
    """The same, but a product for each use, rounded and added to those before it while the cache has it.

    Autograd would add them up in this very order, each from memory. Attributes are the sums so far.
    """

    site: Site
    training: bool
    weight: Tensor | None = None
    bias: Tensor | None = None

    def add(self, x: Operand, error: Operand, call: int, needs_weight: bool, needs_bias: bool) -> None:
        """Add one use."""
        if needs_weight:
            self.weight = _weight_gradient(self.site, x, error, call, self.training, self.weight)
        if needs_bias:
            bias = _bias_gradient(error)
            self.bias = bias if self.bias is None else self.bias.add_(bias)

    def products(self, needs_weight: bool, needs_bias: bool) -> tuple[Tensor | None, Tensor | None]:
        """The sums, which are then forgotten."""
        sums = self.weight if needs_weight else None, self.bias if needs_bias else None
        self.weight = self.bias = None
        return sums


def _weight_gradient(
    site: Site, x: Operand, error: Operand, call: int, training: bool, total: Tensor | None = None
) -> Tensor:
    site.announce("gradient", error, x)
    multiply = lambda backend: backend.linear_gradient(error, x)  # noqa: E731
    return site.product(multiply, "gradient", "weight_gradient", call, training, total)


def _bias_gradient(error: Operand, dims: tuple[int, ...] | None = None) -> Tensor:
    """Summed over `dims`; None: all but the last."""
    values = error.decoded() if error.values is None else error.values
    return values.sum(dims or tuple(range(values.dim() - 1)), dtype=torch.float32)


def _join(codes: list[Tensor]) -> Tensor:
    """Matrices of codes, one under the other."""
    dtype = codes[0].dtype
    return torch.cat([c.view(torch.uint8) for c in codes]).view(dtype) if dtype.itemsize == 1 else torch.cat(codes)


@dataclass(frozen=True)
class SharedWeight:
    """What all uses of a weight in one forward pass have in common.

    Attributes:
        weight, bias: through these the gradients go.
        rounded: the weight, rounded once.
        gathered: what makes the gradients of all uses together; None where each has one of its own.
    """

    weight: Tensor
    bias: Tensor | None
    rounded: Operand
    gathered: GatheredGradient | SummedGradient | None


# What it gathers lives outside of any graph.
@_disable_dynamo
def share_weight(weight: Tensor, bias: Tensor | None, site: Site, training: bool) -> SharedWeight:
    """Round a weight for all uses of one forward pass, and say what makes their gradients."""
    site.check(weight, weight, bias)
    ask_full_gradient(weight)
    gathered = _gathering(weight, site, training)
    # Products of one use need it transposed; those of all uses together do not.
    rounded = site.weight(weight, training, LINEAR.both_layouts and training)
    if gathered is None:
        return SharedWeight(weight, bias, rounded, None)
    weight, bias = _Gather.apply(weight, bias, gathered)
    return SharedWeight(weight, bias, rounded, gathered)


def _gathering(weight: Tensor, site: Site, training: bool) -> GatheredGradient | SummedGradient | None:
    """None where nobody asks for a gradient, and on a GPU where each use has one (or a scale) of its own."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return None
    scaled = any(site.spec(role, training).scaling != "none" for role in ("activation", "error"))
    if site.recurrent_gradients == "sequence" and not scaled:
        return GatheredGradient(site, training)
    return SummedGradient(site, training) if weight.device.type == "cpu" else None


class _Gather(torch.autograd.Function):
    """Its backward pass runs when that of every use has."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, gathered: GatheredGradient | SummedGradient
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.gathered, ctx.device, ctx.place = gathered, weight.device.type, gathered.site.context.place
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        with without_autocast(ctx.device), ctx.gathered.site.context.at(ctx.place):
            return (*ctx.gathered.products(*ctx.needs_input_grad[:2]), None)


# A compiler would take a step's random streams for constants; it gets what lies between the products.
@_disable_dynamo
def quantized_product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    site: Site,
    op: Op,
    training: bool,
    shared: SharedWeight | None = None,
) -> Tensor:
    """Multiply under a recipe (paper, section 3 and figure 1).

    Args:
        a: activation; FP32, FP16 or BF16.
        b: weight (FP32, or the FP16 master) or second activation.
        bias: FP32, never rounded, or None.
        site: the layer's place in the recipe.
        op: `LINEAR`, `MATMUL` or a `conv2d_op`.
        training: False rounds everything to nearest, in a backward pass too.
        shared: what stands for `b` and the bias in all uses of a forward pass.

    Returns:
        FP32 tensor, rounded to the activation role's format where the recipe rounds outputs.

    Raises:
        UserError: a tensor of another dtype.
    """
    if shared is not None:
        b, bias = shared.weight, shared.bias
    site.check(a, b, bias)
    if training:
        refuse_traced_training(f"layer {site.name}")
    if op.b_is_weight:
        ask_full_gradient(b)
    call = site.next_call(training)
    # Modes that give a module's own products to the recipe must not see these.
    with torch._C.DisableTorchFunction():
        result: Tensor = _QuantizedProduct.apply(a, b, bias, site, op, training, shared, call, False)
    return result


def product_of_codes(codes: Tensor, weight: Tensor, site: Site, op: Op) -> tuple[Tensor, int]:
    """`quantized_product` of a training step that takes an activation's codes and gives those of its result.

    Gradients of both are codes too: the caller rounds that of the result as the layer's operand "output_error" of this
    call (`Site.rounding`).

    Returns:
        Codes of the result, in the activation role's dtype, and the call's index.

    Raises:
        UserError: the recipe does not round errors to the dtype of `codes`.
    """
    site.check(codes, weight, None)
    ask_full_gradient(weight)
    call = site.next_call(True)
    return _QuantizedProduct.apply(codes, weight, None, site, op, True, None, call, True), call


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast off inside: products take what the recipe rounded, and sums are FP32."""
    # Asked first: an autocast block costs every call microseconds.
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return _NOTHING
    return torch.autocast(device, enabled=False)


_NOTHING: AbstractContextManager[Any] = nullcontext()


@cache
def _has_autocast(device: str) -> bool:
    # Tensors without data have none.
    return torch.amp.is_autocast_available(device)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        site: Site,
        op: Op,
        training: bool,
        shared: SharedWeight | None,
        call: int,
        codes: bool,
    ) -> Tensor:
        with without_autocast(a.device.type):
            gathered = None if shared is None else shared.gathered
            # The layout that backward multiplies.
            both_a, both_b = (
                op.both_layouts and ctx.needs_input_grad[1] and gathered is None,
                op.both_layouts and training,
            )
            qa = site.operand(a, "activation", "input", call, training, both_a)
            if shared is not None:
                qb = shared.rounded
            elif op.b_is_weight:
                qb = site.weight(b, training, both_b)
            else:
                qb = site.operand(b, "activation", "input_b", call, training)
            site.announce("forward", qa, qb)
            role = "activation" if site.round_outputs else None
            multiply = lambda b: op.forward(b, qa, qb, bias)  # noqa: E731
            result = site.product(multiply, role, "output", call, training, codes=codes)
        if result._is_view():
            # Autograd forbids changing a view from a custom function in place, which torch's own layers allow.
            result = torch.ops.aten._unsafe_view(result, result.shape)
        # A rounded weight is no saved tensor, so that what its backend made of it stays with it; one that is not
        # rounded is the parameter, and autograd sees to it that nobody changes it before the backward pass. An
        # activation's values are decoded again from its bytes.
        ctx.weight = qb if op.b_is_weight and qb.values is not qb.codes else None
        ctx.save_for_backward(
            qa.codes if qa.transposed is None else qa.transposed, None if ctx.weight is not None else qb.codes
        )
        ctx.transposed = qa.transposed is not None
        ctx.formats = ((qa.fmt, qa.scale), (qb.fmt, qb.scale))
        ctx.site, ctx.op, ctx.call, ctx.training, ctx.gathered = site, op, call, training, gathered
        ctx.place = site.context.place
        # Autograd would cast an FP32 gradient of an 8-bit tensor silently.
        ctx.codes_wanted = (a.dtype.itemsize == 1, b.dtype.itemsize == 1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device.type), ctx.site.context.at(ctx.place):
            gradients = _backward(ctx, grad)
        ctx.site.context.returned(ctx.site.name)
        return *gradients, *[None] * 6


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of both operands and the bias, as far as they are wanted."""
    site, op, call, training = ctx.site, ctx.op, ctx.call, ctx.training
    codes_a, codes_b = ctx.saved_tensors
    (format_a, scale_a), (format_b, scale_b) = ctx.formats
    needs_a, needs_b, needs_bias = ctx.needs_input_grad[:3]
    gathered: GatheredGradient | SummedGradient | None = ctx.gathered
    qb = ctx.weight or Operand(codes_b, format_b, scale_b)
    transposed = codes_a if ctx.transposed else None
    codes_a = codes_a if transposed is None else transposed.t()
    error = site.operand(
        grad, "error", "output_error", call, training, op.both_layouts and needs_a and needs_b and not gathered
    )
    grad_a = grad_b = grad_bias = None
    if needs_a:
        site.announce("error", error, qb)
        role = "error" if site.round_input_errors else None
        multiply = lambda b: op.grad_a(b, error, qb, codes_a)  # noqa: E731
        grad_a = site.product(multiply, role, "input_error", call, training, codes=ctx.codes_wanted[0])
    if gathered is not None:
        gathered.add(Operand(codes_a, format_a, scale_a, transposed=transposed), error, call, needs_b, needs_bias)
        return grad_a, None, None
    if needs_b:
        qa = Operand(codes_a, format_a, scale_a, transposed=transposed)
        site.announce("gradient" if op.b_is_weight else "error", error, qa)
        role, name = ("gradient", "weight_gradient") if op.b_is_weight else ("error", "input_b_error")
        wanted = role if op.b_is_weight or site.round_input_errors else None
        multiply = lambda b: op.grad_b(b, error, qa, qb.codes)  # noqa: E731
        grad_b = site.product(multiply, wanted, name, call, training, codes=ctx.codes_wanted[1])
    if needs_bias:
        grad_bias = _bias_gradient(error, op.bias_dims)
    return grad_a, grad_b, grad_bias
