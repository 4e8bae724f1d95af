"""The recipe's autograd: quantize, multiply, quantize, forward and backward, driven by one table of roles.

                 operands                        result
    forward      activation x weight             activation (output)
    error        error x weight                  error (gradient of the input)
    gradient     error x activation              gradient (of the weight)

Every tensor is rounded once and used for all its products. Nothing here may know where a tensor comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8repro import products
from fp8repro.context import StepContext
from fp8repro.formats import FloatFormat
from fp8repro.products import Backend, Conv2dGeometry, Operand, Rounding
from fp8repro.quantizer import round_into
from fp8repro.recipe import RoleSpec
from fp8repro.streams import Stream


@dataclass
class Site:
    """A layer's place in the recipe: its name, the rounding of each role there, and what multiplies.

    Attributes:
        name: qualified module name, the key of random streams and telemetry.
        roles: role -> rounding ("weight", "activation", "error", "gradient").
        context: where the run stands.
        backend: what multiplies.
        round_outputs, round_input_errors, recurrent_gradients: see `Recipe`.
        order: how the elements of the layer's tensors are counted for their random bits (`reference.counted`).
    """

    name: str
    roles: dict[str, RoleSpec]
    context: StepContext
    backend: Backend
    round_outputs: bool = True
    round_input_errors: bool = True
    recurrent_gradients: str = "step"
    order: str = "row_major"
    _call: int = 0
    _generation: int = -1
    _weight: Operand | None = None
    _weight_key: tuple[Any, ...] = field(default=())

    def next_call(self) -> int:
        """Index of this call since the context's last `begin`, so that reused layers never share random bits."""
        if self._generation != self.context.generation:
            self._generation, self._call = self.context.generation, 0
        self._call += 1
        return self._call - 1

    def spec(self, role: str, training: bool) -> RoleSpec:
        """The role's rounding; evaluation always rounds to nearest."""
        spec = self.roles[role]
        return spec if training else spec.for_evaluation()

    def operand(self, x: Tensor, role: str, name: str, call: int, training: bool = True, turn: bool = False) -> Operand:
        """Round `x` in one pass to codes and to the values that the backend computes with.

        With `turn`, the codes of the transposed matrix are written too where the backend wants them.
        """
        spec = self.spec(role, training)
        if spec.is_identity:
            return Operand(x, values=x)
        fmt = spec.float_format
        if x.dtype == fmt.dtype and fmt.is_fp8:
            return Operand(x, fmt)
        offered = getattr(x, "offered_codes", None)
        # Who rounded it already has counted nothing.
        if offered is not None and offered[:2] == (x._version, spec) and not self.context.telemetry.active:
            return Operand(offered[2], fmt, turned=offered[3])
        stream = self._stream(spec, role, name, call)
        if fmt.dtype is None:
            # Without a storage dtype the FP32 values are the codes.
            rounded = torch.empty_like(x, dtype=torch.float32)
            scale = self._round(x, spec, role, name, stream, values=rounded)
            return Operand(rounded, fmt, scale)
        values = turned = None
        # Random bits count elements row-major, in which rows of a matrix and their tensor agree.
        if turn and self.backend.turns(fmt) and (x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1)):
            rows = x.flatten(0, -2)
            codes, turned = (torch.empty(m.shape, dtype=fmt.dtype, device=x.device) for m in (rows, rows.t()))
            scale = self._round(rows, spec, role, name, stream, codes=codes, turned=turned)
            codes = codes.view(x.shape)
        else:
            dtype = self.backend.value_dtype(fmt)
            codes = torch.empty_like(x, dtype=fmt.dtype)
            values = None if dtype is None else torch.empty_like(x, dtype=dtype)
            scale = self._round(x, spec, role, name, stream, values=values, codes=codes)
            if scale is not None and values is not None:
                values.div_(scale)
        if values is None and scale is None and spec.rounding != "stochastic":
            # Queries, keys and values are projections of one tensor.
            offer(x, spec, codes, turned)
        return Operand(codes, fmt, scale, values, turned)

    def codes(self, x: Tensor, training: bool) -> Tensor:
        """The codes of an activation that many calls will take, or `x` itself where each call has to round it.

        So it is with random bits, scales, statistics and gradients; and on a GPU, which no cache of codes was made for.
        """
        # A compiler cannot look into a rounding.
        if torch.compiler.is_compiling():
            return x
        spec = self.spec("activation", training)
        alike = spec.rounding != "stochastic" and spec.scaling == "none" and not self.context.telemetry.active
        if not alike or x.requires_grad or x.device.type != "cpu" or not spec.float_format.is_fp8:
            return x
        return self.operand(x, "activation", "input_b", 0, training).codes

    def weight(self, weight: Tensor, training: bool, turn: bool = False) -> Operand:
        """The rounded weight; rounded once per update, whatever the number of calls and micro-steps."""
        context = self.context
        key = (context.step, context.weight_version, weight._version, weight.data_ptr(), weight.dtype, training)
        if self._weight is None or self._weight_key != key:
            self._weight = self.operand(weight.detach(), "weight", "weight", 0, training, turn)
            self._weight_key = key
        return self._weight

    def forget_weight(self) -> None:
        """Round the weight again at its next use."""
        self._weight = None

    def product(
        self,
        multiply: Callable[[Backend], Tensor],
        role: str | None,
        name: str,
        call: int,
        training: bool = True,
        total: Tensor | None = None,
    ) -> Tensor:
        """A product's result, rounded on the way where the backend can do that, else in place; no role: not rounded.

        With `total`, an FP32 tensor on a CPU, the rounded result is added to it, and it is the result.
        """
        spec = None if role is None else self.spec(role, training)
        if role is None or spec is None or spec.is_identity:
            return multiply(self.backend) if total is None else total.add_(multiply(self.backend))
        backend = None
        stream = self._stream(spec, role, name, call)
        # A scale and statistics need the result first.
        if spec.scaling == "none" and not self.context.telemetry.active:
            fmt, seed = spec.float_format, self.context.seed
            backend = self.backend.rounding(
                Rounding(fmt, spec.rounding, spec.overflow, spec.subnormal_rounding, seed, stream, self.order)
            )
        if backend is not None:
            if total is None:
                return multiply(backend)
            adding = getattr(backend, "adding", None)
            return total.add_(multiply(backend)) if adding is None else multiply(adding(total))
        result = multiply(self.backend)
        if total is not None and spec.scaling == "none":
            self._round(result, spec, role, name, stream, values=total, add=True)
            return total
        scale = self._round(result, spec, role, name, stream, values=result)
        result = result if scale is None else result.div_(scale)
        return result if total is None else total.add_(result)

    def _stream(self, spec: RoleSpec, role: str, name: str, call: int) -> Stream:
        return self.context.stream(self.name, call, name, role) if spec.rounding == "stochastic" else 0

    def _round(
        self,
        x: Tensor,
        spec: RoleSpec,
        role: str,
        name: str,
        stream: Stream,
        values: Tensor | None = None,
        codes: Tensor | None = None,
        turned: Tensor | None = None,
        add: bool = False,
    ) -> float | None:
        scale = tensor_scale(x, spec.float_format) if spec.scaling == "tensor" else None
        x = x if scale is None else x * scale
        # Before rounding: `values` may be x itself.
        self.context.telemetry.count_exponents(self.name, role, name, x)
        round_into(
            x,
            spec.float_format,
            spec.rounding,
            spec.overflow,
            seed=self.context.seed,
            stream=stream,
            subnormal_rounding=spec.subnormal_rounding,
            values=values,
            codes=codes,
            turned=turned,
            stats=self.context.telemetry.buffer(self.name, role, name, x.device),
            add=add,
            order=self.order,
        )
        return scale


def offer(x: Tensor, spec: RoleSpec, codes: Tensor, turned: Tensor | None = None) -> None:
    """Spare layers that get `x` a pass over it: its codes under a role that draws no random bits and has no scale.

    `turned` is what `Operand.turned` would be, or None.

    They are worth nothing once x is changed, and are not counted by telemetry: a measured step rounds again.
    """
    # Whether an inference tensor was changed nobody can tell, nor can a compiler tell versions.
    if torch.compiler.is_compiling() or x.is_inference():
        return
    x.offered_codes = (x._version, spec, codes, turned)  # type: ignore[attr-defined]


def tensor_scale(x: Tensor, fmt: FloatFormat) -> float:
    """The largest power of two by which `x` can be multiplied without overflow; 1 for zeros and non-finite tensors."""
    absmax = float(x.abs().amax()) if x.numel() else 0.0
    if absmax == 0.0 or not math.isfinite(absmax):
        return 1.0
    # Kept within FP32's normal range, so that scaling and its inverse are exact.
    exponent = math.floor(math.log2(fmt.max / absmax))
    return 2.0 ** max(-100, min(100, exponent))


@dataclass(frozen=True)
class Op:
    """The products of one kind of layer.

    Attributes:
        forward, grad_a, grad_b: result, gradients of the operands (shaped and laid out as the last argument).
        b_is_weight: the second operand is a weight, not a second activation.
        turn: operands are matrices, needed in both layouts by two products each.
        bias_dims: dimensions of the error that the bias' gradient sums over; None for all but the last.
    """

    forward: Callable[[Backend, Operand, Operand, Tensor | None], Tensor]
    grad_a: Callable[[Backend, Operand, Operand, Tensor], Tensor]
    grad_b: Callable[[Backend, Operand, Operand, Tensor], Tensor]
    b_is_weight: bool = True
    turn: bool = False
    bias_dims: tuple[int, ...] | None = None


LINEAR = Op(
    forward=lambda backend, x, w, bias: backend.linear(x, w, bias),
    grad_a=lambda backend, e, w, like: backend.linear_error(e, w),
    grad_b=lambda backend, e, x, like: backend.linear_gradient(e, x),
    turn=True,
)
MATMUL = Op(
    forward=lambda backend, a, b, bias: backend.matmul(a, b),
    grad_a=lambda backend, e, b, like: backend.matmul_error_a(e, b),
    grad_b=lambda backend, e, a, like: backend.matmul_error_b(e, a),
    b_is_weight=False,
)


def conv2d_op(geometry: Conv2dGeometry) -> Op:
    """The products of a convolution."""
    return Op(
        forward=lambda backend, x, w, bias: backend.conv2d(x, w, bias, geometry),
        grad_a=lambda backend, e, w, like: backend.conv2d_error(e, w, geometry, like),
        grad_b=lambda backend, e, x, like: backend.conv2d_gradient(e, x, geometry, like),
        bias_dims=(0, 2, 3),
    )


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
    products.announce(site.name, "gradient", error, x)
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


@torch.compiler.disable(reason="what it gathers lives outside of the graph")
def gather_gradient(
    weight: Tensor, bias: Tensor | None, site: Site, training: bool
) -> tuple[Tensor, Tensor | None, GatheredGradient | SummedGradient] | None:
    """Weight and bias for all uses of one forward pass, and what makes their gradients.

    None where nobody asks for a gradient, and on a GPU where each use has one (or a scale) of its own.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return None
    scaled = any(site.spec(role, training).scaling != "none" for role in ("activation", "error"))
    if site.recurrent_gradients == "sequence" and not scaled:
        gathered: GatheredGradient | SummedGradient = GatheredGradient(site, training)
    elif weight.device.type == "cpu":
        gathered = SummedGradient(site, training)
    else:
        return None
    return *_Gather.apply(weight, bias, gathered), gathered


class _Gather(torch.autograd.Function):
    """Its backward pass runs when that of every use has."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, gathered: GatheredGradient | SummedGradient
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.gathered = gathered
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        return (*ctx.gathered.products(*ctx.needs_input_grad[:2]), None)


# A compiler would take a step's random streams for constants; it gets what lies between the products.
@torch.compiler.disable(reason="random streams are named on the host at every call")
def quantized_product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    site: Site,
    op: Op,
    training: bool,
    gathered: GatheredGradient | SummedGradient | None = None,
) -> Tensor:
    """Multiply under a recipe (paper, section 3 and figure 1).

    Args:
        a: FP32 activation.
        b: weight (FP32, or the FP16 master) or second activation.
        bias: FP32, never rounded, or None.
        site: the layer's place in the recipe.
        op: `LINEAR`, `MATMUL` or a `conv2d_op`.
        training: False rounds everything to nearest.
        gathered: what makes the gradients of `b` and the bias, instead of this product.

    Returns:
        FP32 tensor, rounded to the activation role's format where the recipe rounds outputs.
    """
    result: Tensor = _QuantizedProduct.apply(a, b, bias, site, op, training, gathered)
    return result


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
        gathered: GatheredGradient | SummedGradient | None,
    ) -> Tensor:
        call = site.next_call()
        # The layout that backward multiplies; a weight is kept for the whole step.
        turn_a, turn_b = op.turn and ctx.needs_input_grad[1] and gathered is None, op.turn and training
        qa = site.operand(a, "activation", "input", call, training, turn_a)
        qb = (
            site.weight(b, training, turn_b)
            if op.b_is_weight
            else site.operand(b, "activation", "input_b", call, training)
        )
        products.announce(site.name, "forward", qa, qb)
        role = "activation" if site.round_outputs else None
        result = site.product(lambda b: op.forward(b, qa, qb, bias), role, "output", call, training)
        if result._is_view():
            # Autograd forbids changing a view from a custom function in place, which torch's own layers allow.
            result = torch.ops.aten._unsafe_view(result, result.shape)
        # A rounded weight lives as long as the step anyway; an activation's values are decoded again from its bytes.
        ctx.weight = qb if op.b_is_weight else None
        ctx.save_for_backward(qa.codes if qa.turned is None else qa.turned, None if op.b_is_weight else qb.codes)
        ctx.turned = qa.turned is not None
        ctx.formats = ((qa.fmt, qa.scale), (qb.fmt, qb.scale))
        ctx.site, ctx.op, ctx.call, ctx.training, ctx.gathered = site, op, call, training, gathered
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        site, op, call, training = ctx.site, ctx.op, ctx.call, ctx.training
        codes_a, codes_b = ctx.saved_tensors
        (format_a, scale_a), (format_b, scale_b) = ctx.formats
        needs_a, needs_b, needs_bias = ctx.needs_input_grad[:3]
        gathered: GatheredGradient | SummedGradient | None = ctx.gathered
        qb = ctx.weight or Operand(codes_b, format_b, scale_b)
        turned = codes_a if ctx.turned else None
        codes_a = codes_a if turned is None else turned.t()
        error = site.operand(
            grad, "error", "output_error", call, training, op.turn and needs_a and needs_b and not gathered
        )
        grad_a = grad_b = grad_bias = None
        if needs_a:
            products.announce(site.name, "error", error, qb)
            role = "error" if site.round_input_errors else None
            grad_a = site.product(lambda b: op.grad_a(b, error, qb, codes_a), role, "input_error", call, training)
        if gathered is not None:
            gathered.add(Operand(codes_a, format_a, scale_a, turned=turned), error, call, needs_b, needs_bias)
            return grad_a, *[None] * 7
        if needs_b:
            qa = Operand(codes_a, format_a, scale_a, turned=turned)
            products.announce(site.name, "gradient" if op.b_is_weight else "error", error, qa)
            role, name = ("gradient", "weight_gradient") if op.b_is_weight else ("error", "input_b_error")
            wanted = role if op.b_is_weight or site.round_input_errors else None
            grad_b = site.product(lambda b: op.grad_b(b, error, qa, qb.codes), wanted, name, call, training)
        if needs_bias:
            grad_bias = _bias_gradient(error, op.bias_dims)
        return grad_a, grad_b, grad_bias, *[None] * 5
