"""Puts a recipe into a model: swaps its layers in place and reports what it converted, what it left and why.

It must never change a model's mathematics in any other way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fp8repro.backends import select_backend
from fp8repro.context import StepContext
from fp8repro.errors import UserError
from fp8repro.functional import Site
from fp8repro.layers import FP8Conv2d, FP8Linear, FP8MatMul, FP8RepeatedLinear, MasterEmbedding
from fp8repro.models.layers import MatMul, RepeatedLinear
from fp8repro.normalization import FusedBatchNorm2d, fuse_normalizations, use_kernels
from fp8repro.recipe import AUTO, ROLES, Recipe, RoleSpec, load_recipe

CONVERTED = {
    nn.Linear: FP8Linear,
    RepeatedLinear: FP8RepeatedLinear,
    nn.Conv2d: FP8Conv2d,
    MatMul: FP8MatMul,
}
OPERAND_ROLES = ROLES[:4]
# Modules with parameters, or products, that stay as they are; everything else without parameters is not worth a line.
_LEFT: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.modules.batchnorm._NormBase, "normalization stays in FP32"),
    (nn.LayerNorm, "normalization stays in FP32"),
    (nn.GroupNorm, "normalization stays in FP32"),
    (nn.Embedding, "a lookup, no product; FP32 values"),
    (nn.RNNBase, "fused recurrent layer: its products cannot be reached; build it from linear layers"),
    (nn.MultiheadAttention, "calls its products without its layers: they cannot be reached"),
    (nn.modules.conv._ConvNd, "no FP8 form of this convolution"),
    (nn.Linear, "a subclass of Linear with a forward pass of its own"),
    (nn.Bilinear, "no FP8 form of this layer"),
)


@dataclass(frozen=True)
class InjectionRow:
    """One layer: qualified name, type, "converted", "exempt" or "left", and its formats or the reason."""

    name: str
    kind: str
    status: str
    detail: str
    parameters: int


@dataclass
class InjectionReport:
    """What `inject` did.

    Attributes:
        backend: what multiplies; "torch" where nothing is converted.
        why: what kept "auto" from FP8 tensor cores, or "".
    """

    recipe: str
    backend: str
    why: str = ""
    rows: list[InjectionRow] = field(default_factory=list)

    def names(self, status: str) -> list[str]:
        """Names of the layers of that status."""
        return [row.name for row in self.rows if row.status == status]

    def table(self) -> str:
        """A plain-text table, one layer a line."""
        lines = [("layer", "type", "status", "formats or reason")]
        lines += [(row.name, row.kind, row.status, row.detail) for row in self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        body = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]) for line in lines]
        counts = ", ".join(f"{len(self.names(s))} {s}" for s in ("converted", "exempt", "left"))
        why = f" ({self.why})" if self.why else ""
        return "\n".join([f"recipe {self.recipe}, products: {self.backend}{why}; {counts}", *body])


def inject(
    model: nn.Module, recipe: Recipe | str, context: StepContext | None = None, backend: str = "auto"
) -> InjectionReport:
    """Convert a model's layers to a recipe, in place (paper, section 3 and figure 1).

    `Conv2d`, `Linear` and `MatMul` multiply rounded operands from then on; parameters, names and hooks stay the same.
    `model.fp8_context` is set to the context.

    Args:
        model: any module.
        recipe: a `Recipe`, or the name of one in `conf/precision/`.
        context: where the run stands (seed, step, rank); a new one by default.
        backend: "auto", "emulate" or "triton".

    Returns:
        A report whose `table()` can be printed.

    Raises:
        UserError: an exempt pattern matches no layer, the backend cannot be had, or the model is converted already.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if hasattr(model, "fp8_context"):
        raise UserError("model: got a model that is converted already, expected a fresh one")
    context = context or StepContext()
    model.fp8_context = context  # type: ignore[assignment]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    products, why = select_backend(backend, device, recipe.accumulate)
    # A recipe that rounds nothing leaves every product to torch, and the record must say so.
    report = InjectionReport(recipe.name, products.name if recipe.converts else "torch", why)
    modules = dict(model.named_modules())
    kinds = {name: type(module).__name__ for name, module in modules.items()}
    candidates = [name for name, module in modules.items() if type(module) in CONVERTED]
    exempt: set[str] = set()
    if recipe.converts:
        exempt = exempt_layers(recipe, modules, candidates)
        for name in candidates:
            if recipe.attention_products or type(modules[name]) is not MatMul:
                roles = _roles(recipe, name in exempt)
                options = (recipe.round_outputs, recipe.round_input_errors, recipe.recurrent_gradients)
                _convert(modules[name], Site(name, roles, context, products, *options))
        for module in modules.values():
            if type(module) is nn.Embedding:
                module.__class__ = MasterEmbedding
        if recipe.fuse_normalization:
            fuse_normalizations(model)
            if products.name == "triton":
                use_kernels(model, recipe.activation)
    for name, module in modules.items():
        described = _describe(module, recipe, name in exempt, name in candidates)
        if described is not None:
            parameters = sum(p.numel() for p in module.parameters(recurse=False))
            report.rows.append(InjectionRow(name, kinds[name], *described, parameters))
    return report


def _describe(module: nn.Module, recipe: Recipe, exempt: bool, candidate: bool) -> tuple[str, str] | None:
    """Status and detail of a layer after conversion; None for a module that has nothing to convert or keep."""
    if candidate and not recipe.converts:
        autocast = f"; autocast {recipe.autocast}" if recipe.autocast != "none" else ""
        return "left", f"the recipe rounds nothing{autocast}"
    site = getattr(module, "site", None)
    if isinstance(site, Site):
        formats = ", ".join(f"{role} {spec.format}/{spec.rounding}" for role, spec in site.roles.items())
        return "exempt" if exempt else "converted", formats
    if candidate:
        return "left", "attention_products is off"
    if isinstance(module, FusedBatchNorm2d):
        return "left", f"normalization stays in FP32; input kept in {module.input_format.name} for backward"
    for base, reason in _LEFT:
        if isinstance(module, base):
            return "left", reason
    has_parameters = any(True for _ in module.parameters(recurse=False))
    return ("left", "no product to convert") if has_parameters else None


def _convert(module: nn.Module, site: Site) -> None:
    # The class alone changes: parameters, buffers, hooks and every reference to the module stay valid.
    module.__class__ = CONVERTED[type(module)]
    module.site = site  # type: ignore[assignment]
    if isinstance(module, FP8Conv2d):
        module.prepare()


def exempt_layers(recipe: Recipe, modules: dict[str, nn.Module], candidates: list[str]) -> set[str]:
    """Names of the layers that use the exempt roles.

    "auto" is the first convolution (where there is one) and the last fully connected layer (paper, section 4).

    Raises:
        UserError: a pattern matches no convertible layer.
    """
    if recipe.exempt == AUTO:
        convolutions = [name for name in candidates if isinstance(modules[name], nn.Conv2d)]
        linears = [name for name in candidates if isinstance(modules[name], nn.Linear)]
        return set(convolutions[:1] + linears[-1:])
    matched: set[str] = set()
    for pattern in recipe.exempt:
        hits = [name for name in candidates if fnmatchcase(name, pattern)]
        if not hits:
            some = ", ".join(candidates[:4]) + (", ..." if len(candidates) > 4 else "")
            raise UserError(f"precision.exempt: got {pattern!r}, which matches none of the layers ({some})")
        matched.update(hits)
    return matched


def _roles(recipe: Recipe, exempt: bool) -> dict[str, RoleSpec]:
    return {role: recipe.exempt_roles if exempt else getattr(recipe, role) for role in OPERAND_ROLES}


def sites(model: nn.Module) -> dict[str, Site]:
    """The injected layers' places in the recipe, by qualified name."""
    found: dict[str, Any] = {name: getattr(module, "site", None) for name, module in model.named_modules()}
    return {name: site for name, site in found.items() if isinstance(site, Site)}
