"""Master weights in 16 bit around any torch optimizer: FP32 arithmetic, one rounding on the way back.

Which format and rounding is the recipe's choice, never this module's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fp8repro.context import StepContext
from fp8repro.fused_step import Engine, fused_step, unsupported
from fp8repro.injection import sites
from fp8repro.layers import FP8Conv2d, FP8Linear, MasterEmbedding
from fp8repro.native import update as native_update
from fp8repro.quantizer import round_into
from fp8repro.recipe import Recipe, RoleSpec


class MasterWeights:
    """Keeps a model's parameters in the recipe's master format (paper, section 3 and claim C7).

    Weights of injected layers and embeddings are stored in the format's dtype between steps, half the size of FP32.
    The other parameters (normalization, biases) are kept in FP32 tensors, rounded to the same set of values, because
    torch's own layers compute with them. Gradients stay FP32, and the optimizer's state is made from FP32 parameters.

    Attributes:
        orders: how the elements of each parameter are counted for their random bits, by name.
        grad_norm: norm of the unscaled gradient in the last step, before clipping; NaN or inf if it was skipped.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, context: StepContext | None = None
    ) -> None:
        """Round all parameters to the master format, to nearest.

        Args:
            model: the model, after `inject`.
            optimizer: any optimizer over the model's parameters.
            recipe: whose master role to follow.
            context: the one of the model by default.
        """
        self.model, self.optimizer = model, optimizer
        self.spec: RoleSpec = recipe.master
        self.context = context or getattr(model, "fp8_context", None) or StepContext()
        self.grad_norm = math.nan
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        convolutions = _convolution_weights(model)
        self.orders = {
            name: "channels_last" if id(p) in convolutions else "row_major" for name, p in self._parameters.items()
        }
        self._real_products = any(site.backend.name == "triton" for site in sites(model).values())
        stored = _stored_parameters(model) if self.spec.float_format.dtype is not None else set()
        for name, parameter in self._parameters.items():
            if self.spec.is_identity:
                continue
            values = parameter.data
            if id(parameter) in stored and not self.spec.is_identity:
                parameter.data = torch.empty_like(values, dtype=self.spec.float_format.dtype)
                parameter.grad_dtype = torch.float32
            self._round(name, parameter, values, "nearest")
        self.context.weight_version += 1

    @torch.no_grad()
    def step(self, scale: float = 1.0, clip_norm: float | None = None) -> bool:
        """Update the masters from the gradients of `scale` times the loss.

        Args:
            scale: what the loss was multiplied by; gradients may be divided by it in place.
            clip_norm: largest norm of the unscaled gradient, or None.

        Returns:
            False, with nothing changed, when a gradient is not finite.
        """
        engine = self._engine()
        if engine is not None:
            what = (self._parameters, self.optimizer, self.spec, self.context)
            norm = fused_step(engine, *what, scale, clip_norm, self.orders)
            self.grad_norm = math.inf if norm is None else norm
            self.context.weight_version += 1
            return norm is not None
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        if not all_finite(grads):
            self.grad_norm = math.inf
            return False
        if scale != 1.0:
            torch._foreach_div_(grads, scale)
        self.grad_norm = float(get_total_norm(grads))
        if clip_norm is not None and self.grad_norm > clip_norm:
            torch._foreach_mul_(grads, clip_norm / (self.grad_norm + 1e-6))
        self._update()
        return True

    def _engine(self) -> Engine | None:
        """What does the optimizer's step in one pass, where that can be had."""
        if self.spec.is_identity or unsupported(self.optimizer) is not None:
            return None
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        if not held <= {id(p) for p in self._parameters.values()}:
            return None
        if self._real_products:
            # Telemetry compares masters before and after, which the kernels do not keep.
            if self.spec.format != "fp16" or self.context.telemetry.active:
                return None
            from fp8repro.kernels import update

            return update
        return native_update if native_update.takes([p.data for p in self._parameters.values()]) else None

    def _update(self) -> None:
        if self.spec.is_identity:
            self.optimizer.step()
            return
        masters = {name: p.data for name, p in self._parameters.items() if p.grad is not None}
        measuring = self.context.telemetry.active
        for name, master in masters.items():
            if master.dtype != torch.float32 or measuring:
                self._parameters[name].data = master.to(torch.float32, copy=True)
        self.optimizer.step()
        for name, master in masters.items():
            parameter = self._parameters[name]
            updated = parameter.data
            before = master.clone() if measuring else None
            parameter.data = master
            self._round(name, parameter, updated, self.spec.rounding)
            if before is not None:
                self.context.telemetry.record_update(name, before, updated, master)
        self.context.weight_version += 1

    def _round(self, name: str, parameter: nn.Parameter, values: Tensor, rounding: str) -> None:
        """Round FP32 values once into a parameter's storage."""
        target = parameter.data
        round_into(
            values,
            self.spec.float_format,
            rounding,
            self.spec.overflow,
            seed=self.context.seed,
            stream=self.context.stream_number(name, 0, "master", "master"),
            subnormal_rounding=self.spec.subnormal_rounding,
            values=target if target.dtype == torch.float32 else None,
            codes=None if target.dtype == torch.float32 else target,
            order=self.orders[name],
        )

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
        # The optimizer casts its FP32 state to each parameter's dtype, which must therefore be FP32 while it loads.
        masters = {name: p.data for name, p in self._parameters.items()}
        for name, master in masters.items():
            self._parameters[name].data = master.float()
        self.optimizer.load_state_dict(state)
        for name, master in masters.items():
            self._parameters[name].data = master
        self.context.weight_version += 1


def _stored_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that may be stored in 16 bit: every module that uses them reads such a master."""
    readers = (FP8Linear, FP8Conv2d, MasterEmbedding)
    able: set[int] = set()
    unable: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (able if isinstance(module, readers) and name == "weight" else unable).add(id(parameter))
    return able - unable


def _convolution_weights(model: nn.Module) -> set[int]:
    """Ids of the kernels of convolutions, whose elements count channels last."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)}


def all_finite(tensors: list[Tensor]) -> bool:
    """True when no tensor holds NaN or infinity."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return True
    # Of a tensor with NaN or infinity no norm is finite. The Euclidean one is the faster, but may overflow by itself.
    for order in (2.0, math.inf):
        norms = torch._foreach_norm(tensors, order)
        if bool(torch.stack([norm.isfinite() for norm in norms]).all()):
            return True
    return False
