"""The precision recipe: for each role its format, rounding and overflow, and the layers that stay in 16 bit.

A recipe is data. It must not know any model, and no other module may hold a numerics default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fp8repro.errors import UserError
from fp8repro.numerics.formats import FP16
from fp8repro.numerics.rounding import Rounding, one_of

ROLES = ("weight", "activation", "error", "gradient", "master")
ACCUMULATIONS = ("promoted", "fp16_mma")
AUTO = "auto"
# E4M3 and E5M2 lack the range and the significand of a sum of updates, and no engine stores masters in them.
MASTER_FORMATS = ("fp16", "bf16", "fp16_1_6_9", "fp32")
SWITCHES = ("round_outputs", "round_input_errors", "attention_products", "fuse_normalization")


@dataclass(frozen=True)
class Recipe:
    """Formats by role, in the paper's words (paper, section 3 and figure 1).

    Attributes:
        name: what records call it.
        weight, activation, error, gradient: rounding of the four kinds of operands and results.
        master: how the FP32 result of a weight update is stored: in 16 bit or FP32, without a scale.
        round_outputs: the activation role applies to layer outputs too, not only to layer inputs.
        round_input_errors: the error role applies to gradients of layer inputs too, not only of layer outputs.
        attention_products: attention scores and contexts are converted too.
        fuse_normalization: batch normalization, residual and ReLU become one node that keeps bytes for backward.
        exempt: patterns (fnmatch on qualified module names) of layers that use `exempt_roles` instead;
            "auto" stands for the first convolution and the last fully connected layer (paper, section 4).
        exempt_roles: the exempt layers' own rounding, for all their roles but the master.
        autocast: "bf16" to run torch's autocast instead of injected layers, else "none".
        accumulate: how a real FP8 product accumulates: "promoted" or "fp16_mma", which emulation has not.
        recurrent_gradients: the gradient of a weight that is used at every time step is rounded at each "step" and the
            parts summed in FP32, or summed over the "sequence" in one product and rounded once, which is faster; where
            activations or errors have a scale per tensor, each step has its own, and "sequence" is "step".
    """

    name: str = "fp8"
    weight: Rounding = Rounding()
    activation: Rounding = Rounding()
    error: Rounding = Rounding(rounding="stochastic")
    gradient: Rounding = Rounding(rounding="stochastic")
    master: Rounding = Rounding(FP16, "stochastic")
    round_outputs: bool = True
    round_input_errors: bool = True
    attention_products: bool = True
    fuse_normalization: bool = True
    exempt: tuple[str, ...] | str = AUTO
    exempt_roles: Rounding = Rounding(FP16)
    autocast: str = "none"
    accumulate: str = "promoted"
    recurrent_gradients: str = "step"

    def __post_init__(self) -> None:
        """Raise UserError for a combination that nothing carries out; the message names the setting."""
        for name in (*ROLES, "exempt_roles"):
            if not isinstance(getattr(self, name), Rounding):
                raise UserError(f"{name}: got {getattr(self, name)!r}, expected a Rounding")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}: got {getattr(self, name)!r}, expected true or false")
        if isinstance(self.exempt, str) and self.exempt != AUTO:
            raise UserError(f"exempt: got {self.exempt!r}, expected {AUTO} or a list of module name patterns")
        one_of("autocast", self.autocast, ("none", "bf16"))
        one_of("accumulate", self.accumulate, ACCUMULATIONS)
        one_of("recurrent_gradients", self.recurrent_gradients, ("step", "sequence"))
        one_of("master.format", self.master.format.name, MASTER_FORMATS)
        if self.master.scaling != "none":
            raise UserError(f"master.scaling: got {self.master.scaling!r}, expected none: masters are stored unscaled")
        if self.autocast != "none" and self.converts:
            raise UserError(
                f"autocast: got {self.autocast!r} with roles that are rounded, expected none, or fp32 in all roles"
            )

    @property
    def converts(self) -> bool:
        """True when layers have to be swapped at all."""
        return not all(getattr(self, role).is_identity for role in ROLES[:4])


def recipe_to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Plain values, from which `recipe_from_mapping` builds the recipe again."""
    return {f.name: _plain(getattr(recipe, f.name)) for f in fields(Recipe)}


def _plain(value: Any) -> Any:
    if not isinstance(value, Rounding):
        return value
    return {f.name: getattr(value, f.name) for f in fields(Rounding)} | {"format": value.format.name}


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
        elif key in SWITCHES:
            arguments[key] = value
        else:
            arguments[key] = str(value)
    try:
        return Recipe(**arguments)
    except UserError as error:
        raise UserError(f"{setting}.{error}") from None


def _role_from_mapping(values: Any, setting: str) -> Rounding:
    if not isinstance(values, Mapping):
        raise UserError(f"{setting}: got {values!r}, expected a mapping such as {{format: e5m2, rounding: nearest}}")
    known = [f.name for f in fields(Rounding)]
    for key in values:
        if key not in known:
            raise UserError(f"{setting}.{key}: unknown setting, expected one of {', '.join(known)}")
    # Hydra and YAML read a bare inf as a number.
    texts: dict[str, Any] = {
        key: "inf" if isinstance(value, float) and value == math.inf else value for key, value in values.items()
    }
    try:
        return Rounding(**texts)
    except UserError as error:
        raise UserError(f"{setting}.{error}") from None


def _patterns(value: Any, setting: str) -> tuple[str, ...] | str:
    if value == AUTO:
        return AUTO
    if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
        raise UserError(f"{setting}: got {value!r}, expected auto or a list of module name patterns")
    return tuple(value)
