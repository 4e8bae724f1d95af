"""Evaluation of a model: within a run, or of a checkpoint or torchvision's weights. Always rounds to nearest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8repro.errors import UserError
from fp8repro.numerics.recipe import Recipe
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import fixed_weights, inject
from fp8repro.settings.schema import RunConfig, run_config
from fp8repro.training.checkpoint import FORMAT, read_checkpoint, read_tensors
from fp8repro.training.distributed import World, choose_device
from fp8repro.training.tasks import make_task
from fp8repro.training.tasks.task import Poll, Task, autocast, no_poll


@torch.no_grad()
def measure(
    task: Task[Any], model: nn.Module, recipe: Recipe, world: World, split: str = "val", poll: Poll = no_poll
) -> dict[str, float]:
    """Figures of a model on a split; the model's mode is the same afterwards."""
    training = model.training
    model.eval()
    # Telemetry counts training steps only.
    model.fp8_context.telemetry.active = False  # type: ignore[union-attr]
    try:
        with autocast(recipe, world.device), fixed_weights(model):
            return task.evaluate(model, split, poll)
    finally:
        model.train(training)


def evaluate(path: str | Path, config: RunConfig, split: str = "val") -> dict[str, float]:
    """Figures of saved weights on a split, in the configuration's precision.

    Args:
        path: a checkpoint of a run, or a state dict with torchvision's names (`.pth`).
        config: data, model and precision; see `checkpoint_config` for a checkpoint's own.
        split: val | train; of translation models also test, which they translate.

    Raises:
        UserError: a file that is missing or damaged, weights of another model, data of other classes than a checkpoint
            was trained on, or an unknown split.
    """
    accepted = ("val", "train", "test") if config.model.task == "translation" else ("val", "train")
    if split not in accepted:
        raise UserError(f"--split: got {split!r}, expected one of {', '.join(accepted)}")
    world = World(device=choose_device(config.device))
    content = read_tensors(Path(path))
    weights = content["model"] if content.get("format") == FORMAT and "model" in content else content
    task = make_task(config, world)
    require_same_classes(content.get("identity"), task.identity(), str(path))
    model = task.model()
    load_weights(model, weights, str(path))
    model.to(world.device)
    inject(model, config.precision, StepContext(config.seed), config.backend)
    return measure(task, model, config.precision, world, split)


def checkpoint_config(path: str | Path) -> RunConfig:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        UserError: a file that is missing or damaged, or no checkpoint of a run.
    """
    return run_config(read_checkpoint(Path(path))["config"])


def require_same_classes(saved: Any, own: Mapping[str, Any], where: str) -> None:
    """Refuse data whose classes have other names than a checkpoint's: its outputs would mean other classes.

    Args:
        saved: the checkpoint's `identity`; not checked if it has no class names.
        own: `Task.identity` of the data.
        where: the checkpoint.

    Raises:
        UserError: names the first difference.
    """
    task = saved.get("task") if isinstance(saved, Mapping) else None
    names = task.get("class_names") if isinstance(task, Mapping) else None
    classes = own.get("class_names")
    # Another number of classes is another shape of weights.
    if not isinstance(names, list) or classes is None or len(names) != len(classes):
        return
    for index, (name, wanted) in enumerate(zip(classes, names, strict=True)):
        if name != wanted:
            raise UserError(
                f"data.root: class {index} is {name!r}, and {wanted!r:.200} in {where!r}, expected the same classes "
                "(a .pth of the weights alone goes by their order)"
            )


def load_weights(model: nn.Module, weights: dict[str, Any], where: str) -> None:
    """Copy a state dict into a model of the same architecture.

    Raises:
        UserError: names the first difference.
    """
    own = model.state_dict()
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise UserError(f"checkpoint: {where!r} holds no weights by name, expected a state dict")
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights or name not in own:
            place = "the file" if name not in weights else "the model"
            raise UserError(f"checkpoint: {name} is missing in {place} ({where!r}), expected weights of this model")
        if not isinstance(weights[name], torch.Tensor) or weights[name].shape != own[name].shape:
            got = tuple(getattr(weights[name], "shape", ()))
            raise UserError(f"checkpoint: {name} has shape {got} in {where!r}, expected {tuple(own[name].shape)}")
    model.load_state_dict(weights)
