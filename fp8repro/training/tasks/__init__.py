"""Kinds of work that the loop trains: classifying images and translating."""

from __future__ import annotations

from typing import Any

from fp8repro.settings.schema import RunConfig
from fp8repro.training.distributed import World
from fp8repro.training.tasks.task import Task


def make_task(config: RunConfig, world: World) -> Task[Any]:
    """The task of a configuration."""
    if config.model.task == "translation":
        from fp8repro.training.tasks.translation import TranslationTask

        return TranslationTask(config, world)
    from fp8repro.training.tasks.classification import ImageTask

    return ImageTask(config, world)
