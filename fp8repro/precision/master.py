"""Master weights in 16 bit around any torch optimizer: FP32 arithmetic, one rounding on the way back.

Which format and rounding is the recipe's choice, never this module's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fp8repro.engines.cpu import update as native_update
from fp8repro.engines.quantizer import round_into
from fp8repro.errors import UserError
from fp8repro.fields import Bound, convert
from fp8repro.numerics.formats import FP16
from fp8repro.numerics.recipe import Recipe
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.precision.bypass import watch_first_pass
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_step import Engine, fused_step, guard_step, has_state, unsupported
from fp8repro.precision.injection import context_of, sites
from fp8repro.precision.sharded import is_sharded, round_shard
from fp8repro.precision.stored import StoredWeight
from fp8repro.settings.recipes import as_recipe

# Beyond, gradients would be divided by 0 or infinity: they are FP32.
Scale = Annotated[float, Bound("a number from 2^-126 to under 2^128", lambda x: 2.0**-126 <= x < 2.0**128)]


class UpdateGraph(Protocol):
    """A captured step (`graphs.GraphedUpdate`)."""

    def fits(self, moving: Mapping[str, nn.Parameter]) -> bool:
        """Whether it is the step of these parameters, by name, with the gradients that they have now."""

    def __call__(self, scale: float, clip_norm: float | None) -> float | None:
        """What `fused_step` gives."""


class MasterWeights:
    """Keeps what an optimizer moves in the recipe's master format (paper, section 3 and claim C7).

    Weights of injected layers and embeddings are stored in the format's dtype between steps, half the size of FP32.
    The other parameters (normalization, biases, and those outside of the model) are kept in FP32 tensors, rounded to
    the same set of values, because torch's own layers compute with them. Gradients stay FP32, and the optimizer's state
    is made from FP32 parameters.

    What counts is what the optimizer holds when `step` is called: parameters that are unfrozen or added later are kept
    from then on, those of another optimizer are left to a `MasterWeights` of its own.

    Attributes:
        grad_norm: norm of the unscaled gradient in the last step, before clipping; NaN or inf if it was skipped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe | str,
        context: StepContext | None = None,
        *,
        narrow: bool | None = None,
    ) -> None:
        """Round the optimizer's parameters to the master format, to nearest.

        Args:
            model: the model, after `inject`; its names name the random bits.
            optimizer: any optimizer whose step needs no closure.
            recipe: whose master role to follow, or its name.
            context: the one of the model by default.
            narrow: store weights in 16 bit where their layers can read them. By default where no process group is
                there: `DistributedDataParallel` takes gradients in a parameter's own dtype only.

        Raises:
            UserError: parameters that are not FP32, no plain tensors, or beyond the master format's range; an optimizer
                that needs a closure; or a context that is not the model's.
        """
        self.model, self.optimizer = model, optimizer
        self.spec: Rounding = as_recipe(recipe).master
        own = context_of(model)
        # Only a rounding asks where the run stands.
        self._knows_context = own is not None or self.spec.is_identity
        if context is not None and own is not None and context is not own:
            raise UserError("context: got another than the model's, expected the one that inject was given, or none")
        self.context = context or own or StepContext()
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(f"optimizer: got {type(optimizer).__name__}, whose step needs a closure, expected another")
        self.grad_norm = math.nan
        self._parameters: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}
        self._real_products = any(site.backend.name == "triton" for site in sites(model).values())
        self._convolutions = _convolution_weights(model)
        fresh = [(name, p) for name, p in self._held() if p.requires_grad]
        for name, parameter in fresh:
            self._check(name, parameter)
        if narrow is None:
            narrow = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        stored = _stored_parameters(model) if narrow and self.spec.format.dtype is not None else set()
        for name, parameter in fresh:
            self._keep(name, parameter)
            if not self.spec.is_identity:
                self._convert(name, parameter, narrow=id(parameter) in stored)
        if stored:
            watch_first_pass(model)
        if not self.spec.is_identity:
            guard_step(optimizer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's parameters are other objects, and optimizers leave their hooks behind."""
        self.__dict__.update(state)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._convolutions = _convolution_weights(self.model)
        if not self.spec.is_identity:
            guard_step(self.optimizer)

    def _held(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer holds now, by name; the model's names where it is the model's."""
        names: dict[int, str] | None = None
        for g, group in enumerate(self.optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                if id(parameter) not in self._names and names is None:
                    names = {id(p): name for name, p in _unwrapped(self.model).named_parameters()}
                name = self._names.get(id(parameter)) or (names or {}).get(id(parameter))
                name = name or f"param_groups.{g}.params.{i}"
                while self._parameters.get(name, parameter) is not parameter:
                    # Its place was another's, which left the optimizer.
                    name += "'"
                yield name, parameter

    def _keep(self, name: str, parameter: nn.Parameter) -> None:
        # Held, so that its address is never another's.
        self._parameters[name], self._names[id(parameter)] = parameter, name
        if self.spec.is_identity or parameter not in self.optimizer.state:
            return
        state = self.optimizer.state[parameter]
        for key, value in state.items():
            # Made by an optimizer that found the parameter in 16 bit already.
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                state[key] = value.float()

    def _check(self, name: str, parameter: nn.Parameter) -> None:
        """Raise UserError for a parameter whose values could not be kept."""
        if self.spec.is_identity:
            return
        plain = type(parameter.data) is Tensor or is_sharded(parameter.data)
        if not plain or parameter.layout != torch.strided:
            given = f"{type(parameter.data).__name__} ({parameter.layout})"
            raise UserError(f"optimizer: {name} is a {given}, expected a plain dense tensor")
        if parameter.dtype != torch.float32 and id(parameter) not in _stored_parameters(self.model):
            raise UserError(f"optimizer: {name} is {parameter.dtype}, expected torch.float32")
        if parameter.is_meta or self.spec.overflow == "saturate":
            return
        # NaN and infinity are the caller's own, and are what `step` looks for.
        values: Any = parameter.data
        values = values.to_local() if is_sharded(values) else values
        low, high = (float(bound) for bound in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
        largest = max(-low, high)
        if self.spec.format.max < largest < math.inf:
            raise UserError(
                f"optimizer: {name} holds {largest:g}, expected at most {self.spec.format.max:g}, the range of masters "
                f"in {self.spec.format.name}"
            )

    def _convert(self, name: str, parameter: nn.Parameter, narrow: bool) -> None:
        """Round a parameter to nearest into the storage that it will have."""
        values, dtype = parameter.data, self.spec.format.dtype if narrow else torch.float32
        if values.dtype != dtype:
            parameter.data = torch.empty_like(values, dtype=dtype)
        if narrow:
            parameter.grad_dtype = torch.float32
        self._round(name, parameter, values, self.spec.to_nearest)

    def _moving(self) -> dict[str, nn.Parameter]:
        """What the next step of the optimizer moves, by name."""
        held = dict(self._held())
        moving = {name: p for name, p in held.items() if p.grad is not None}
        if any(p.grad is None and p.requires_grad for p in held.values()):
            self._check_gradients()
        for name, parameter in moving.items():
            if id(parameter) not in self._names:
                # Unfrozen or added since: it keeps its tensor, which others may have seen, and is rounded by its first
                # update.
                self._check(name, parameter)
                self._keep(name, parameter)
        return moving

    @torch.no_grad()
    def step(self, scale: float = 1.0, clip_norm: float | None = None, graph: UpdateGraph | None = None) -> bool:
        """Update the masters from the gradients of `scale` times the loss, which stay as they are.

        Args:
            scale: what the loss was multiplied by.
            clip_norm: largest norm of the unscaled gradient, or None.
            graph: replayed where it fits; the bits are the same without.

        Returns:
            False, with nothing changed, when a gradient is not finite.

        Raises:
            UserError: a scale that FP32 cannot apply, a norm that is no number over 0, a parameter that cannot be kept,
                or a model that was converted after this was made.
        """
        scale = convert(scale.item() if isinstance(scale, Tensor) else scale, Scale, "scale")
        if clip_norm is not None and not clip_norm > 0:
            raise UserError(f"clip_norm: got {clip_norm}, expected a number over 0")
        if not self._knows_context and context_of(self.model) is not None:
            raise UserError("model: got converted after MasterWeights was made of it, expected inject(model) first")
        moving = self._moving()
        engine = self._engine(moving)
        if engine is not None:
            what = (moving, self.optimizer, self.spec, self.context)
            if graph is not None and not self.context.telemetry.active and graph.fits(moving):
                norm = graph(scale, clip_norm)
            else:
                norm = fused_step(engine, *what, scale, clip_norm, self.orders)
            applied, self.grad_norm = norm is not None, math.inf if norm is None else norm
        else:
            applied = self._step_of_torch(moving, scale, clip_norm)
        self.context.updates += applied
        return applied

    def capturable(self) -> dict[str, nn.Parameter] | None:
        """What the next step moves, by name; None where a graph cannot repeat it.

        It can where Triton's kernels make the step, nothing measures it, and the optimizer has all its state.
        """
        moving = self._moving()
        if not moving or self.context.telemetry.active or self._engine(moving) in (None, native_update):
            return None
        return moving if has_state(self.optimizer, moving) else None

    def _check_gradients(self) -> None:
        """Raise UserError where a parameter of the model has the gradient that one of its name is held for."""
        held = {id(p) for _, p in self._held()}
        for name, p in _unwrapped(self.model).named_parameters():
            # What an optimizer gave away is the model's all the same.
            if p.grad is not None and id(p) not in held and self._parameters.get(name, p) is not p:
                raise UserError(
                    f"optimizer: it holds another {name} than the model, expected the model's own parameters "
                    "(load_state_dict(assign=True) replaces them)"
                )

    def _engine(self, moving: dict[str, nn.Parameter]) -> Engine | None:
        """What does the optimizer's step in one pass, where that can be had."""
        if self.spec.is_identity or unsupported(self.optimizer) is not None:
            return None
        if any(is_sharded(p) or p.grad.layout != torch.strided for p in moving.values()):  # type: ignore[union-attr]
            return None
        if self._real_products:
            if self.spec.format != FP16:
                return None
            if len({p.device for p in moving.values()}) > 1:
                return None
            from fp8repro.kernels.optimizer import launch as update

            return update
        return native_update if native_update.takes([p.data for p in moving.values()]) else None

    def _step_of_torch(self, moving: dict[str, nn.Parameter], scale: float, clip_norm: float | None) -> bool:
        kept = [p.grad for p in moving.values()]
        grads = [grad.coalesce() if grad.is_sparse else grad for grad in kept if grad is not None]
        if not all_finite([_values(grad) for grad in grads]):
            self.grad_norm = math.inf
            return False
        unscaled = grads if scale == 1.0 else [grad / scale for grad in grads]
        self.grad_norm = _norm([_values(grad) for grad in unscaled])
        if clip_norm is not None and self.grad_norm > clip_norm:
            factor = clip_norm / (self.grad_norm + 1e-6)
            unscaled = [grad * factor for grad in unscaled]
        # Other optimizers may hold the same parameters, and find their gradients scaled as they left the backward pass.
        for parameter, grad in zip(moving.values(), unscaled, strict=True):
            parameter.grad = grad
        try:
            self._update(moving)
        finally:
            for parameter, own in zip(moving.values(), kept, strict=True):
                parameter.grad = own
        return True

    def _update(self, moving: dict[str, nn.Parameter]) -> None:
        if self.spec.is_identity:
            self.optimizer.step()
            return
        guard = guard_step(self.optimizer)
        masters = {name: p.data for name, p in moving.items()}
        measuring = self.context.telemetry.active
        for name, master in masters.items():
            if master.dtype != torch.float32 or measuring:
                moving[name].data = master.to(torch.float32, copy=True)
        with guard.open():
            self.optimizer.step()
        for name, master in masters.items():
            parameter = moving[name]
            updated = parameter.data
            before = master.clone() if measuring else None
            parameter.data = master
            self._round(name, parameter, updated, self.spec)
            if before is not None:
                self.context.telemetry.record_update(name, before, updated, master)

    def _round(self, name: str, parameter: nn.Parameter, values: Tensor, how: Rounding) -> None:
        """Round FP32 values once into a parameter's storage."""
        target: Any = parameter.data
        stream = self.context.stream_number(name, self.context.updates, "master", "master")
        values_out, codes = (target, None) if target.dtype == torch.float32 else (None, target)
        bits = RandomBits(self.context.seed, stream, self._order(parameter))
        if is_sharded(target):
            round_shard(values, how, bits, target)
            return
        round_into(values, how, bits, values=values_out, codes=codes)

    def _order(self, parameter: nn.Parameter) -> str:
        return "channels_last" if id(parameter) in self._convolutions else "row_major"

    @property
    def orders(self) -> dict[str, str]:
        """How the elements of each parameter are counted for their random bits, by name."""
        return {name: self._order(p) for name, p in self._parameters.items()}

    def finite(self) -> bool:
        """True when no parameter holds NaN or infinity."""
        return all_finite([p.data for p in self._parameters.values()])

    def bytes(self) -> int:
        """Bytes that the parameters occupy between steps."""
        return sum(p.numel() * p.element_size() for p in self._parameters.values())

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; the masters themselves are the model's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.optimizer.load_state_dict(state)


def _stored_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that may be stored in 16 bit: every module that uses them reads such a master."""
    able: set[int] = set()
    unable: set[int] = set()
    for module in model.modules():
        reads = isinstance(module, StoredWeight) and module.reads_any_dtype
        for name, parameter in module.named_parameters(recurse=False):
            (able if reads and name == "weight" else unable).add(id(parameter))
    return able - unable


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that a compiler or `DistributedDataParallel` wraps: its names, and random bits, are those without."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _norm(grads: list[Tensor]) -> float:
    """Euclidean norm over all of them."""
    norm = float(get_total_norm(grads))
    # Squares of FP32 numbers may overflow in FP32, or be lost under its smallest number.
    return norm if 1e-12 < norm < math.inf else float(get_total_norm([grad.double() for grad in grads]))


def _values(grad: Tensor) -> Tensor:
    """What a gradient holds, of a coalesced sparse one too."""
    return grad.values() if grad.is_sparse else grad


def _convolution_weights(model: nn.Module) -> set[int]:
    """Ids of the kernels of convolutions, whose elements count channels last."""
    return {id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}


def all_finite(tensors: list[Tensor]) -> bool:
    """True when no tensor holds NaN or infinity."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return True
    # Of a tensor with NaN or infinity no norm is finite. The Euclidean one is the faster, but may overflow by itself.
    for order in (2.0, math.inf):
        norms = torch._foreach_norm(tensors, order)
        if bool(torch.stack([norm.isfinite().to(norms[0].device) for norm in norms]).all()):
            return True
    return False
