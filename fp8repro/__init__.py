"""Reproduction of *Mixed Precision Training With 8-bit Floating Point* (arXiv 1905.12334)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8repro.engines.quantizer import quantize
    from fp8repro.numerics.recipe import Recipe
    from fp8repro.precision.context import StepContext
    from fp8repro.precision.injection import inject
    from fp8repro.precision.loss_scaling import make_scaler
    from fp8repro.precision.master import MasterWeights
    from fp8repro.precision.registry import register_layer
    from fp8repro.precision.sensitivity import sensitivity
    from fp8repro.settings.recipes import load_recipe

__version__ = "0.1.0"
__all__ = [
    "MasterWeights",
    "Recipe",
    "StepContext",
    "inject",
    "load_recipe",
    "make_scaler",
    "quantize",
    "register_layer",
    "sensitivity",
]

_HOMES = {
    "MasterWeights": "precision.master",
    "Recipe": "numerics.recipe",
    "StepContext": "precision.context",
    "inject": "precision.injection",
    "load_recipe": "settings.recipes",
    "make_scaler": "precision.loss_scaling",
    "quantize": "engines.quantizer",
    "register_layer": "precision.registry",
    "sensitivity": "precision.sensitivity",
}


def __getattr__(name: str) -> Any:
    """The public names, found at first use: the command line's help must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fp8repro' has no attribute {name!r}")
    return getattr(import_module(f"fp8repro.{_HOMES[name]}"), name)
