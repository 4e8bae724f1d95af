"""A layer's place in the recipe: rounds its operands and results, each with the random stream that its name gives.

It must never choose a rounding, nor keep a rounded weight unless nobody can have changed the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fp8repro.engines.guards import INPUT_DTYPES, plain
from fp8repro.engines.products import Backend, Operand
from fp8repro.engines.quantizer import round_into
from fp8repro.errors import UserError
from fp8repro.numerics.formats import FloatFormat
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.precision.context import StepContext


@dataclass(frozen=True)
class KeptWeight:
    """A rounded weight, and what must be as it was for it to be the weight's.

    Attributes:
        scope: the `StepContext.fixed_weights` block in which it was rounded, or None.
        weight: the tensor itself, inside a block: an address alone may be another tensor's by now.
        state: step, version, address, dtype and mode.
    """

    operand: Operand
    scope: int | None
    weight: Tensor | None
    state: tuple[Any, ...]


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
    roles: dict[str, Rounding]
    context: StepContext
    backend: Backend
    round_outputs: bool = True
    round_input_errors: bool = True
    recurrent_gradients: str = "step"
    order: str = "row_major"
    _kept: KeptWeight | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the rounded weight: a copy makes its own."""
        return {**self.__dict__, "_kept": None}

    def part(self, name: str) -> Site:
        """The place of one of several products of the layer."""
        return replace(self, name=f"{self.name}.{name}".lstrip("."))

    @property
    def formats(self) -> str:
        """For people: what each role is rounded to."""
        return ", ".join(f"{role} {spec}" for role, spec in self.roles.items())

    def next_call(self, training: bool) -> int:
        """See `StepContext.next_call`; evaluation draws no bits, and its calls are not counted."""
        if not training:
            return 0
        return self.context.next_call(self.name, self.roles["activation"].is_stochastic)

    def check(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Raise UserError for tensors whose values, or transforms whose gradients, the layer would not honour."""
        refuse_transforms(f"layer {self.name}")
        usual = x.dtype == torch.float32 and (weight is None or weight.dtype in (torch.float16, torch.float32))
        if usual and (bias is None or bias.dtype == torch.float32):
            return
        for what, tensor in (("an input", x), ("a weight", weight)):
            if tensor is not None and tensor.dtype not in INPUT_DTYPES and not _is_code(tensor):
                raise UserError(
                    f"layer {self.name}: got {what} of {tensor.dtype}, expected float32, float16 or bfloat16"
                )
            if tensor is not None and _is_code(tensor) and tensor.requires_grad and not self.takes_codes(tensor.dtype):
                raise UserError(
                    f"layer {self.name}: got {what} of {tensor.dtype} that requires a gradient, which this recipe does "
                    "not round to that dtype, expected float32"
                )
        if bias is not None and bias.dtype != torch.float32:
            raise UserError(
                f"layer {self.name}: got a bias of {bias.dtype}, expected float32 (a converted model is never cast: "
                "the recipe rounds, and MasterWeights stores 16 bit)"
            )

    def takes_codes(self, dtype: torch.dtype) -> bool:
        """True where an input's gradient is rounded to codes of the input's dtype, which autograd asks of it."""
        return self.round_input_errors and self.gives_codes("error") and self.roles["error"].format.dtype == dtype

    def spec(self, role: str, training: bool) -> Rounding:
        """The role's rounding; evaluation always rounds to nearest."""
        spec = self.roles[role]
        return spec if training else spec.to_nearest

    def operand(
        self, x: Tensor, role: str, name: str, call: int, training: bool = True, both_layouts: bool = False
    ) -> Operand:
        """Round `x` in one pass to codes and to the values that the backend computes with.

        With `both_layouts`, the codes of the transposed matrix are written too where the backend wants them.
        """
        spec = self.spec(role, training)
        if spec.is_identity:
            return Operand(x, values=x)
        fmt = spec.format
        if x.dtype == fmt.dtype and fmt.is_fp8:
            return Operand(x, fmt)
        # A step that is measured rounds by itself: what was offered was not counted.
        offer = None if self.context.telemetry.active else self.context.offers.find(x, spec)
        if offer is not None:
            return Operand(offer.codes, fmt, transposed=offer.transposed)
        bits = self.bits(spec, role, name, call)
        if fmt.dtype is None:
            # Without a storage dtype the FP32 values are the codes.
            rounded = torch.empty_like(x, dtype=torch.float32)
            scale = self._round(x, spec, role, name, bits, values=rounded)
            return Operand(rounded, fmt, scale)
        values = transposed = None
        # Random bits count elements row-major, in which rows of a matrix and their tensor agree.
        if (
            both_layouts
            and self.backend.wants_transposed(fmt)
            and (x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1))
        ):
            rows = x.flatten(0, -2)
            codes, transposed = (torch.empty(m.shape, dtype=fmt.dtype, device=x.device) for m in (rows, rows.t()))
            scale = self._round(rows, spec, role, name, bits, codes=codes, transposed=transposed)
            codes = codes.view(x.shape)
        else:
            dtype = self.backend.value_dtype(fmt)
            codes = torch.empty_like(x, dtype=fmt.dtype)
            values = None if dtype is None else torch.empty_like(x, dtype=dtype)
            scale = self._round(x, spec, role, name, bits, values=values, codes=codes)
            if scale is not None and values is not None:
                values.div_(scale)
        fresh = x.grad_fn is not None or self.context.scope is not None
        if values is None and scale is None and not spec.is_stochastic and fresh:
            # Queries, keys and values are projections of one tensor. What a loop feeds may be a buffer of its own,
            # which it fills again behind autograd's back.
            self.context.offers.make(x, spec, codes, transposed)
        return Operand(codes, fmt, scale, values, transposed)

    def codes(self, x: Tensor, training: bool) -> Tensor:
        """The codes of an activation that many calls will take, or `x` itself where each call has to round it.

        Each call does where it draws random bits, has a scale, is measured, or wants a gradient.
        """
        # A compiler cannot look into a rounding.
        if torch.compiler.is_compiling():
            return x
        spec = self.spec("activation", training)
        alike = not spec.is_stochastic and spec.scaling == "none" and not self.context.telemetry.active
        if not alike or x.requires_grad or not spec.format.is_fp8:
            return x
        return self.operand(x, "activation", "input_b", 0, training).codes

    def weight(self, weight: Tensor, training: bool, both_layouts: bool = False) -> Operand:
        """The rounded weight: of this call, or of the `fixed_weights` block around it."""
        call = self.context.weight_call(self.name)
        if not plain(weight):
            # What a tracer or a tensor without data leaves behind is of no use to the next call.
            return self.operand(weight.detach(), "weight", "weight", call, training, both_layouts)
        kept, scope = self._kept, self.context.scope
        state = (self.context.step, weight._version, weight.data_ptr(), weight.dtype, training)
        in_block = kept is not None and scope is not None and kept.scope == scope
        if kept is not None and in_block and kept.weight is weight and kept.state == state:
            return kept.operand
        operand = self.operand(weight.detach(), "weight", "weight", call, training, both_layouts)
        if kept is not None and kept.state == state and _same_codes(kept.operand, operand):
            # Calls that lie in one graph share its memory, and what the backend packed for itself.
            operand = kept.operand
        self._kept = KeptWeight(operand, scope, None if scope is None else weight, state)
        return operand

    def has_weight(self, scope: int) -> bool:
        """Whether the weight was rounded in that `fixed_weights` block."""
        return self._kept is not None and self._kept.scope == scope

    def keep_weight(self, weight: Tensor, operand: Operand) -> None:
        """Take a weight that was rounded elsewhere, in training, as `operand` and for the open `fixed_weights` block.

        Its bytes must be those that `weight` would give now.
        """
        state = (self.context.step, weight._version, weight.data_ptr(), weight.dtype, True)
        self._kept = KeptWeight(operand, self.context.scope, weight, state)

    def forget_weight(self) -> None:
        """Round the weight again at its next use."""
        self._kept = None

    @property
    def working_weight(self) -> Tensor | None:
        """Encoding of the weight as it was rounded last, or None."""
        return None if self._kept is None else self._kept.operand.codes

    def product(
        self,
        multiply: Callable[[Backend], Tensor],
        role: str | None,
        name: str,
        call: int,
        training: bool = True,
        total: Tensor | None = None,
        codes: bool = False,
    ) -> Tensor:
        """A product's result, rounded on the way where the backend can do that, else in place; no role: not rounded.

        With `total`, an FP32 tensor on a CPU, the rounded result is added to it, and it is the result. With `codes`,
        the result is the codes of the role's 8-bit format, which has no scale.
        """
        spec = None if role is None else self.spec(role, training)
        if role is None or spec is None or spec.is_identity:
            return multiply(self.backend) if total is None else total.add_(multiply(self.backend))
        backend = None
        bits = self.bits(spec, role, name, call)
        # A scale and statistics need the result first.
        if spec.scaling == "none" and not self.context.telemetry.active:
            backend = self.backend.rounding(spec, bits, codes)
        if backend is not None:
            if total is None:
                return multiply(backend)
            adding = getattr(backend, "adding", None)
            return total.add_(multiply(backend)) if adding is None else multiply(adding(total))
        result = multiply(self.backend)
        if codes:
            rounded = torch.empty_like(result, dtype=spec.format.dtype)
            self._round(result, spec, role, name, bits, codes=rounded)
            return rounded
        if total is not None and spec.scaling == "none":
            self._round(result, spec, role, name, bits, values=total, add=True)
            return total
        scale = self._round(result, spec, role, name, bits, values=result)
        result = result if scale is None else result.div_(scale)
        return result if total is None else total.add_(result)

    def gives_codes(self, role: str) -> bool:
        """True where the role's codes say all: an 8-bit format without a scale."""
        spec = self.roles[role]
        return spec.format.is_fp8 and spec.scaling == "none"

    def rounding(self, role: str, name: str, call: int) -> tuple[Rounding, RandomBits]:
        """How an operand of a training step is rounded, for whoever rounds it on the layer's behalf."""
        spec = self.spec(role, True)
        return spec, self.bits(spec, role, name, call)

    def announce(self, product: str, *operands: Operand) -> None:
        """Tell the context's observers of a product (forward, error or gradient) that is about to be computed."""
        for observer in self.context.observers:
            observer(self.name, product, operands)

    def bits(self, spec: Rounding, role: str, name: str, call: int) -> RandomBits:
        """Where the random bits come from with which a call rounds an operand."""
        stream = self.context.stream(self.name, call, name, role) if spec.is_stochastic else 0
        return RandomBits(self.context.seed, stream, self.order)

    def _round(
        self,
        x: Tensor,
        spec: Rounding,
        role: str,
        name: str,
        bits: RandomBits,
        values: Tensor | None = None,
        codes: Tensor | None = None,
        transposed: Tensor | None = None,
        add: bool = False,
    ) -> float | None:
        scale = tensor_scale(x, spec.format) if spec.scaling == "tensor" else None
        # In FP32: the product of a 16-bit tensor and the scale may be no 16-bit number.
        x = x if scale is None else x.float() * scale
        # Before rounding: `values` may be x itself.
        self.context.telemetry.count_exponents(self.name, role, name, x)
        stats = self.context.telemetry.buffer(self.name, role, name, x.device)
        round_into(x, spec, bits, values=values, codes=codes, transposed=transposed, stats=stats, add=add, fresh=True)
        return scale


def refuse_transforms(what: str) -> None:
    """Raise UserError inside of `torch.func`'s transforms: a rounding that draws by position has no rule for them."""
    if torch._C._are_functorch_transforms_active():
        raise UserError(
            f"{what}: got called in a transform of torch.func (grad, vjp, vmap, ...), expected torch.autograd: these "
            "need products without random bits (functional_call alone works)"
        )


def refuse_traced_training(what: str) -> None:
    """Raise UserError where a graph would keep a step's random bits as constants, and lose the backward pass."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        raise UserError(f"{what}: got traced (jit.trace, export) in training mode, expected model.eval() before")


def tensor_scale(x: Tensor, fmt: FloatFormat) -> float:
    """The largest power of two by which `x` can be multiplied without overflow; 1 for zeros and non-finite tensors."""
    absmax = float(x.abs().amax()) if x.numel() else 0.0
    if absmax == 0.0 or not math.isfinite(absmax):
        return 1.0
    # Kept within FP32's normal range, so that scaling and its inverse are exact.
    exponent = math.floor(math.log2(fmt.max / absmax))
    return 2.0 ** max(-100, min(100, exponent))


def _is_code(x: Tensor) -> bool:
    return x.dtype.is_floating_point and x.dtype.itemsize == 1


def _same_codes(kept: Operand, fresh: Operand) -> bool:
    """Whether two rounded weights are the same bytes; False where that would wait for a device, or one is no copy."""
    a, b = kept.codes, fresh.codes
    if b.device.type != "cpu" or fresh.values is b or (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
        return False
    bits = torch.uint8 if b.element_size() == 1 else b.dtype
    same_layouts = (kept.transposed is None) == (fresh.transposed is None)
    return same_layouts and kept.scale == fresh.scale and torch.equal(a.view(bits), b.view(bits))
