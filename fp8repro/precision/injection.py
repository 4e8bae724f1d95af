"""Puts a recipe into a model: swaps its layers in place and reports what it converted, what it left and why.

It must never change a model's mathematics in any other way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fp8repro.engines.select import select_backend
from fp8repro.errors import UserError
from fp8repro.models.parts import MatMul
from fp8repro.numerics.recipe import AUTO, Recipe
from fp8repro.precision.become import become
from fp8repro.precision.bypass import watch_first_pass
from fp8repro.precision.carrier import carry_codes
from fp8repro.precision.context import StepContext
from fp8repro.precision.function_products import FP8MatMul
from fp8repro.precision.fused_lstm import use_lstm_kernels, use_native_cells
from fp8repro.precision.fused_normalization import FusedBatchNorm2d, fuse_normalizations, use_kernels
from fp8repro.precision.fused_transformer import use_transformer_kernels
from fp8repro.precision.injection_report import InjectionReport, InjectionRow
from fp8repro.precision.layers import MasterEmbedding
from fp8repro.precision.places import FUNCTION_PRODUCTS, Places
from fp8repro.precision.registry import converted_type
from fp8repro.precision.site import Site
from fp8repro.settings.recipes import as_recipe

# Modules with parameters, or products, that stay as they are; everything else without parameters is not worth a line.
_LEFT: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.modules.batchnorm._NormBase, "normalization stays in FP32"),
    (nn.LayerNorm, "normalization stays in FP32"),
    (nn.GroupNorm, "normalization stays in FP32"),
    (nn.Embedding, "a lookup, no product; FP32 values"),
    (nn.Linear, "a subclass of Linear with a forward pass of its own: functions multiply in it"),
    (nn.modules.conv._ConvNd, "a subclass of a convolution with a forward pass of its own: functions multiply in it"),
    (nn.RNNBase, "a subclass of a recurrent layer: its products cannot be reached"),
    (nn.MultiheadAttention, "a subclass of MultiheadAttention: its products cannot be reached"),
    (nn.Bilinear, "no FP8 form of this layer"),
)


def inject(
    model: nn.Module,
    recipe: Recipe | str,
    context: StepContext | None = None,
    backend: str = "auto",
    *,
    leave: Sequence[str] = (),
    prefix: str = "",
) -> InjectionReport:
    """Convert a model's layers to a recipe, in place (paper, section 3 and figure 1).

    `Conv2d`, `Linear` and `MatMul` multiply rounded operands from then on; parameters, names and hooks stay the same.
    `model.fp8_context` is set to the context. Evaluation mode rounds everything to nearest, in a backward pass too. The
    first forward pass is watched for functions that multiply by a layer's weight without calling the layer.

    Args:
        model: any module with FP32 parameters, on the device where it will stay.
        recipe: a `Recipe`, or the name of one in `conf/precision/`.
        context: where the run stands (seed, step, rank); a new one by default. Models that share one need names that
            differ: see `prefix`.
        backend: "auto", "emulate" or "triton".
        leave: patterns (fnmatch on qualified names) of layers that stay what they are, in FP32.
        prefix: put before the layers' names, which name their random streams.

    Returns:
        A report whose `table()` can be printed.

    Raises:
        UserError: a pattern matches no layer, the backend cannot be had, parameters that are not FP32 or have no shape
            yet, a model of which a part is converted already, or names that the context has already. The model is then
            what it was before.
    """
    recipe = as_recipe(recipe)
    if context is not None and not isinstance(context, StepContext):
        raise UserError(f"context: got {context!r}, expected a StepContext")
    if isinstance(leave, str):
        raise UserError(f"leave: got {leave!r}, expected a list of patterns")
    modules = dict(model.named_modules())
    candidates = [name for name, module in modules.items() if converted_type(type(module)) is not None]
    layers = [*candidates, *_embeddings(modules)]
    left = _matching(leave, layers, "leave", [name for name in modules if name not in layers]) & set(layers)
    # torch's attention multiplies by its output's weight itself.
    left |= {f"{name}.out_proj" for name in left if isinstance(modules[name], nn.MultiheadAttention)}
    candidates = [name for name in candidates if name not in left]
    _check_fresh(modules)
    if recipe.converts:
        _check_parameters(modules, [name for name in (*candidates, *_embeddings(modules)) if name not in left])
    exempt = exempt_layers(recipe, modules, candidates) if recipe.converts else set()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    products, why = select_backend(backend, device, recipe.accumulate)
    context = context or StepContext()
    if recipe.converts:
        context.claim(prefix + name for name in candidates)
    # From here on nothing is refused.
    model.fp8_context = context  # type: ignore[assignment]
    # A recipe that rounds nothing leaves every product to torch, and the record must say so.
    report = InjectionReport(recipe.name, products.name if recipe.converts else "torch", why)
    kinds = {name: type(module).__name__ for name, module in modules.items()}
    if recipe.converts:
        places = Places(recipe, context, products, prefix, tuple(leave))
        model.fp8_places = places  # type: ignore[assignment]
        for name in candidates:
            if recipe.attention_products or type(modules[name]) is not MatMul:
                _convert(modules[name], places.site(name, name in exempt))
        if not recipe.attention_products:
            _leave_attention_products(model)
        for name in _embeddings(modules):
            if name not in left:
                become(modules[name], MasterEmbedding)
        _leave_fast_paths(modules)
        if recipe.fuse_normalization:
            fuse_normalizations(model, context)
            if products.name == "triton":
                use_kernels(model, recipe.activation, context)
                carry_codes(model)
        if products.name == "triton":
            use_lstm_kernels(model)
            use_transformer_kernels(model)
        elif device.type == "cpu":
            use_native_cells(model)
        watch_first_pass(model, places, report)
        if not candidates:
            warnings.warn(
                "inject: the model has no layer to convert; products by functions are found in its first forward pass",
                stacklevel=2,
            )
    for name, module in modules.items():
        described = ("left", "asked for") if name in left else None
        described = described or _describe(module, recipe, name in exempt, name in candidates)
        if described is not None:
            parameters = sum(p.numel() for p in module.parameters(recurse=False))
            report.rows.append(InjectionRow(name, kinds[name], *described, parameters))
    report.parameters = sum(p.numel() for p in model.parameters())
    return report


def _embeddings(modules: dict[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if type(module) is nn.Embedding]


def _check_fresh(modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        if isinstance(getattr(module, "site", None), Site):
            raise UserError(
                f"model: got one whose layer {name!r} is converted already, expected a fresh one (parts of a model "
                "may be converted apart, with one context= and a prefix= each)"
            )


def _check_parameters(modules: dict[str, nn.Module], names: list[str]) -> None:
    for name, module in modules.items():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise UserError(
                f"model: {name} ({type(module).__name__}) has no shape yet, expected one forward pass before inject"
            )
    for name in names:
        for parameter, value in modules[name].named_parameters(recurse=False):
            if value.dtype != torch.float32:
                raise UserError(
                    f"model: {name}.{parameter} is {value.dtype}, expected torch.float32 (model.float(): the recipe "
                    "rounds, and MasterWeights stores 16 bit)"
                )


def _leave_fast_paths(modules: dict[str, nn.Module]) -> None:
    """Let torch's Transformer layers evaluate through their modules, as they train.

    Their fast path multiplies by the weights of their layers without calling them.
    """
    for module in modules.values():
        if isinstance(module, nn.TransformerEncoderLayer):
            # "Neither": the fast path is for ReLU and GELU. What is computed is another attribute's.
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _leave_attention_products(model: nn.Module) -> None:
    """Give products of two activations inside converted layers back to torch."""
    for module in model.modules():
        if type(module) is FP8MatMul:
            del module.site
            become(module, MatMul)


def _describe(module: nn.Module, recipe: Recipe, exempt: bool, candidate: bool) -> tuple[str, str] | None:
    """Status and detail of a layer after conversion; None for a module that has nothing to convert or keep."""
    if candidate and not recipe.converts:
        autocast = f"; autocast {recipe.autocast}" if recipe.autocast != "none" else ""
        return "left", f"the recipe rounds nothing{autocast}"
    site = getattr(module, "site", None)
    if isinstance(site, Site):
        return "exempt" if exempt else "converted", site.formats
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
    kind = converted_type(type(module))
    assert kind is not None
    become(module, kind, site=site)
    prepare = getattr(module, "prepare", None)
    if prepare is not None:
        prepare()


def exempt_layers(recipe: Recipe, modules: dict[str, nn.Module], candidates: list[str]) -> set[str]:
    """Names of the layers that use the exempt roles.

    "auto" is the first convolution (where there is one) and the last fully connected layer (paper, section 4).

    Raises:
        UserError: a pattern matches no convertible layer.
    """
    if recipe.exempt == AUTO:
        convolutions = [name for name in candidates if isinstance(modules[name], (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
        linears = [name for name in candidates if isinstance(modules[name], nn.Linear)]
        return set(convolutions[:1] + linears[-1:])
    return _matching(recipe.exempt, candidates, "precision.exempt")


def _matching(patterns: Sequence[str], names: Sequence[str], setting: str, others: Sequence[str] = ()) -> set[str]:
    """The names, and other modules' names, that match any of the patterns.

    Raises:
        UserError: a pattern that matches none, and names no product that is found later.
    """
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in (*names, *others) if fnmatchcase(name, pattern)]
        if not hits and FUNCTION_PRODUCTS not in pattern:
            some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise UserError(f"{setting}: got {pattern!r}, which matches none of the layers ({some})")
        matched.update(hits)
    return matched


def sites(model: nn.Module) -> dict[str, Site]:
    """The injected layers' places in the recipe, by qualified name."""
    found: dict[str, Any] = {name: getattr(module, "site", None) for name, module in model.named_modules()}
    return {name: site for name, site in found.items() if isinstance(site, Site)}


def context_of(model: nn.Module) -> StepContext | None:
    """The context of a model's converted layers, wherever in the model `inject` was called; None where there is none.

    Raises:
        UserError: its parts have contexts of their own.
    """
    found = _contexts(model)
    if len(found) > 1:
        raise UserError(f"model: got parts with {len(found)} contexts, expected inject(part, recipe, context) with one")
    return found[0] if found else None


def _contexts(model: object) -> list[StepContext]:
    found: dict[int, StepContext] = {}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        site = getattr(module, "site", None)
        for context in (getattr(module, "fp8_context", None), site.context if isinstance(site, Site) else None):
            if isinstance(context, StepContext):
                found[id(context)] = context
    return list(found.values())


@contextmanager
def fixed_weights(model: object) -> Iterator[None]:
    """Promise that no weight of the model changes inside (`StepContext.fixed_weights`): each is rounded once.

    What is no module has no weights of ours.
    """
    with ExitStack() as stack:
        for context in _contexts(model):
            stack.enter_context(context.fixed_weights())
        yield
