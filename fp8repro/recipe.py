"""The precision recipe: for each role its format, rounding and overflow, and the layers that stay in 16 bit.

A recipe is data. It must not know any model, and no other module may hold a numerics default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fp8repro.errors import UserError
from fp8repro.formats import FORMATS, FloatFormat, get_format
from fp8repro.reference import OVERFLOWS, ROUNDINGS, SUBNORMAL_ROUNDINGS

ROLES = ("weight", "activation", "error", "gradient", "master")
SCALINGS = ("none", "tensor")
ACCUMULATIONS = ("promoted", "fp16_mma")
AUTO = "auto"


@dataclass(frozen=True)
class RoleSpec:
    """How the tensors of one role are rounded.

    Attributes:
        format: name of a `FloatFormat`; "fp32" leaves the tensor as it is.
        rounding: "nearest", "stochastic" or "toward_zero".
        overflow: "inf" or "saturate".
        subnormal_rounding: "same", or "nearest" (the authors' toolkit) in stochastic mode.
        scaling: "none", or "tensor": multiply by the power of two that brings the largest magnitude
            just under the format's maximum, and divide it out again after the product.
    """

    format: str = "e5m2"
    rounding: str = "nearest"
    overflow: str = "inf"
    subnormal_rounding: str = "same"
    scaling: str = "none"

    @property
    def float_format(self) -> FloatFormat:
        """The format itself."""
        return get_format(self.format)

    @property
    def is_identity(self) -> bool:
        """True when the role is left in FP32."""
        return self.format == "fp32"

    def for_evaluation(self) -> RoleSpec:
        """The same role without randomness: evaluation always rounds to nearest."""
        return replace(self, rounding="nearest") if self.rounding == "stochastic" else self


@dataclass(frozen=True)
class Recipe:
    """Formats by role, in the paper's words (paper, section 3 and figure 1).

    Attributes:
        name: what records call it.
        weight, activation, error, gradient: rounding of the four kinds of operands and results.
        master: how the FP32 result of a weight update is stored.
        round_outputs: the activation role applies to layer outputs too, not only to layer inputs.
        round_input_errors: the error role applies to gradients of layer inputs too, not only of layer outputs.
        attention_products: attention scores and contexts are converted too.
        fuse_normalization: batch normalization, residual and ReLU become one node that keeps bytes for backward.
        exempt: patterns (fnmatch on qualified module names) of layers that use `exempt_roles` instead;
            "auto" stands for the first convolution and the last fully connected layer (paper, section 4).
        exempt_roles: the exempt layers' own rounding, for all their roles but the master.
        autocast: "bf16" to run torch's autocast instead of injected layers, else "none".
        accumulate: how a real FP8 product accumulates: "promoted" or "fp16_mma".
        recurrent_gradients: the gradient of a weight that is used at every time step is rounded at each "step" and the
            parts summed in FP32, or summed over the "sequence" in one product and rounded once, which is faster.
    """

    name: str = "fp8"
    weight: RoleSpec = RoleSpec()
    activation: RoleSpec = RoleSpec()
    error: RoleSpec = RoleSpec(rounding="stochastic")
    gradient: RoleSpec = RoleSpec(rounding="stochastic")
    master: RoleSpec = RoleSpec(format="fp16", rounding="stochastic")
    round_outputs: bool = True
    round_input_errors: bool = True
    attention_products: bool = True
    fuse_normalization: bool = True
    exempt: tuple[str, ...] | str = AUTO
    exempt_roles: RoleSpec = RoleSpec(format="fp16")
    autocast: str = "none"
    accumulate: str = "promoted"
    recurrent_gradients: str = "step"

    @property
    def converts(self) -> bool:
        """True when layers have to be swapped at all."""
        return not all(getattr(self, role).is_identity for role in ROLES[:4])


def recipe_from_mapping(values: Mapping[str, Any], setting: str = "precision") -> Recipe:
    """Build a recipe from plain values, as read from `conf/precision/*.yaml`.

    Raises:
        UserError: an unknown key or a value that is not accepted; the message names the setting.
    """
    known = {f.name for f in fields(Recipe)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{setting}.{key}: unknown setting, expected one of {', '.join(sorted(known))}")
        if key in ROLES or key == "exempt_roles":
            arguments[key] = _role_from_mapping(value, f"{setting}.{key}")
        elif key == "exempt":
            arguments[key] = _patterns(value, f"{setting}.exempt")
        elif key in ("round_outputs", "round_input_errors", "attention_products", "fuse_normalization"):
            if not isinstance(value, bool):
                raise UserError(f"{setting}.{key}: got {value!r}, expected true or false")
            arguments[key] = value
        else:
            arguments[key] = str(value)
    recipe = Recipe(**arguments)
    _one_of(f"{setting}.autocast", recipe.autocast, ("none", "bf16"))
    _one_of(f"{setting}.accumulate", recipe.accumulate, ACCUMULATIONS)
    _one_of(f"{setting}.recurrent_gradients", recipe.recurrent_gradients, ("step", "sequence"))
    return recipe


def load_recipe(name: str) -> Recipe:
    """The recipe `conf/precision/<name>.yaml`.

    Raises:
        UserError: there is no such recipe.
    """
    # Imported here: a user's own training loop that passes a Recipe needs no Hydra.
    from fp8repro.config import compose_group

    values = compose_group("precision", name)
    values.pop("default_loss_scaling", None)
    return recipe_from_mapping(values)


def _role_from_mapping(values: Any, setting: str) -> RoleSpec:
    if not isinstance(values, Mapping):
        raise UserError(f"{setting}: got {values!r}, expected a mapping such as {{format: e5m2, rounding: nearest}}")
    accepted = {
        "format": tuple(FORMATS),
        "rounding": ROUNDINGS,
        "overflow": OVERFLOWS,
        "subnormal_rounding": SUBNORMAL_ROUNDINGS,
        "scaling": SCALINGS,
    }
    for key, value in values.items():
        if key not in accepted:
            raise UserError(f"{setting}.{key}: unknown setting, expected one of {', '.join(accepted)}")
        _one_of(f"{setting}.{key}", value, accepted[key])
    return RoleSpec(**values)


def _patterns(value: Any, setting: str) -> tuple[str, ...] | str:
    if value == AUTO:
        return AUTO
    if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
        raise UserError(f"{setting}: got {value!r}, expected auto or a list of module name patterns")
    return tuple(value)


def _one_of(setting: str, given: Any, accepted: tuple[str, ...]) -> None:
    if given not in accepted:
        raise UserError(f"{setting}: got {given!r}, expected one of {', '.join(accepted)}")
