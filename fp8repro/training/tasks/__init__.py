"""Kinds of work that the loop trains: classifying images and translating."""

from __future__ import annotations

from typing import Any

from fp8repro.settings.schema import RunConfig
from fp8repro.training.distributed import World
from fp8repro.training.tasks.task import Task


def make_task(config: RunConfig, world: World) -> Task[Any]:
    """The task of a configuration, its data loaded.

    Raises:
        UserError: data that is missing or malformed, or a setting that the task does not have.
    """
    if config.model.task == "translation":
        from fp8repro.training.tasks.decode_graphs import Searches
        from fp8repro.training.tasks.translation import TranslationTask

        searches = Searches(config.graphs, config.decode)
        return TranslationTask(config.model, config.data, config.trainer, searches, config.seed, world)
    from fp8repro.training.tasks.classification import ImageTask

    return ImageTask(config.model, config.data, config.trainer, config.seed, world)
