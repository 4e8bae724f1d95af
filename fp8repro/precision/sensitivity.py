"""Which layers of a model suffer from a recipe: one step of it, measured operand by operand.

The model that is given is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro.engines.quantizer import quantize
from fp8repro.errors import UserError
from fp8repro.numerics.recipe import Recipe
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject, sites
from fp8repro.precision.injection_report import InjectionReport
from fp8repro.precision.noise import NoiseRow, decibels, draw, layers_to_exempt, table
from fp8repro.precision.site import Site
from fp8repro.precision.telemetry import Telemetry
from fp8repro.settings.recipes import load_recipe

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Sensitivity:
    """What a recipe does to each layer of a model in one step.

    Attributes:
        rows: what each rounding costs by itself, in the order of the layers.
        gradients: signal to noise, in dB, of the gradient of each parameter: FP32's against the recipe's, whose noise
            comes from all layers behind it too.
        report: of the `inject`, with the shares of multiply-adds.
    """

    rows: list[NoiseRow]
    gradients: dict[str, float]
    report: InjectionReport

    def layers_to_exempt(self) -> list[str]:
        """Layers in the order in which to exempt them (`precision.exempt=`, `Recipe.exempt`)."""
        exempt = set(self.report.names("exempt"))
        return [layer for layer in layers_to_exempt(self.rows) if layer not in exempt]

    def table(self, limit: int | None = None) -> str:
        """A plain-text table, the operand that lost most first."""
        return table(self.rows, limit)

    def draw(self, path: str | Path) -> None:
        """Write a figure of layers and roles."""
        draw(self.rows, path)


@dataclass
class _Noise(Telemetry):
    """Telemetry that also rounds every operand again and sums up what is lost."""

    model: nn.Module | None = None
    sums: dict[tuple[str, str, str], tuple[float, float]] = field(default_factory=dict)
    # By the names under which they count; some are made while the model runs.
    places: dict[str, Site] = field(default_factory=dict)

    def count_exponents(self, layer: str, role: str, operand: str, x: Tensor) -> None:
        assert self.model is not None
        if layer not in self.places:
            self.places = {site.name: site for site in sites(self.model).values()}
        how = self.places[layer].spec(role, True)
        exact = x.detach().float()
        # Other random bits than the step's own, of the same distribution.
        options = (how.format, how.rounding, how.overflow, 0, len(self.sums), "float32")
        rounded = quantize(exact, *options, subnormal_rounding=how.subnormal_rounding)
        finite = rounded.isfinite() & exact.isfinite()
        signal, lost = exact[finite].double(), (rounded - exact)[finite].double()
        before = self.sums.get((layer, role, operand), (0.0, 0.0))
        found = (float(signal.square().sum()), float(lost.square().sum()))
        self.sums[layer, role, operand] = (before[0] + found[0], before[1] + found[1])


def sensitivity(
    model: nn.Module, batch: Any, recipe: Recipe | str, *, loss: Loss | None = None, scale: float = 1.0, seed: int = 0
) -> Sensitivity:
    """Measure one training step of a recipe, layer by layer.

    Args:
        model: an FP32 model, not converted; it stays as it is.
        batch: what `loss` takes. Without one: a pair of inputs and class labels [B], or keyword arguments (a mapping)
            for a model that returns its loss, as those of transformers do.
        recipe: a `Recipe`, or the name of one in `conf/precision/`.
        loss: (model, batch) -> scalar.
        scale: what the loss is multiplied by; errors underflow under a small one.
        seed: of the model's own randomness (dropout) and of the recipe's.

    Returns:
        Rows by layer and role, and the gradients' signal to noise.

    Raises:
        UserError: the model is converted, or the loss is no finite scalar.
    """
    loss = loss or _usual_loss
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    converted = copy.deepcopy(model)
    measured = _Noise(model=converted)
    report = inject(converted, recipe, StepContext(seed, telemetry=measured))
    exact = copy.deepcopy(model)
    right = _gradients(exact, batch, loss, scale, seed)
    measured.measure()
    found = _gradients(converted, batch, loss, scale, seed)
    rows = []
    for row in measured.rows():
        key = (row["layer"], row["role"], row["operand"])
        share = 1 / row["nonzero"] if row["nonzero"] else 0.0
        lost = (row["underflow"] * share, row["overflow"] * share)
        rows.append(NoiseRow(*key, decibels(*measured.sums[key]), *lost))
    layers = {name: i for i, name in enumerate(measured.places)}
    rows.sort(key=lambda row: layers[row.layer])
    gradients = {
        name: decibels(float(grad.double().square().sum()), float((found[name] - grad).double().square().sum()))
        for name, grad in right.items()
        if name in found
    }
    return Sensitivity(rows, gradients, report)


def _gradients(model: nn.Module, batch: Any, loss: Loss, scale: float, seed: int) -> dict[str, Tensor]:
    """Unscaled gradients by parameter."""
    model.train()
    model.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not bool(value.isfinite()):
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"loss: got {given}, expected a finite scalar")
        (value * scale).backward()
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


def _usual_loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        loss: Tensor = model(**batch).loss
        return loss
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise UserError(f"batch: got {type(batch).__name__}, expected (inputs, labels), a mapping, or loss=")
    return F.cross_entropy(model(batch[0]), batch[1])
