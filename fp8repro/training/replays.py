"""CUDA graphs in the training loop: which passes and updates are replayed, and why others are not.

A replay computes the same bits as the eager pass; nothing here may decide numerics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fp8repro.data.image_batches import ImageBatch
from fp8repro.numerics.recipe import Recipe
from fp8repro.precision.context import StepContext
from fp8repro.precision.graphs import GraphedStep, why_not_graphed
from fp8repro.precision.master import MasterWeights
from fp8repro.training.distributed import World
from fp8repro.training.running_statistics import SyncBatchNorm2d
from fp8repro.training.tasks.task import Task

# Batches of an epoch differ by one image at most, and so do the micro-batches cut from each.
MOST_SHAPES = 4


class Replays:
    """Replays passes instead of the loop where that is possible.

    Attributes:
        why_not: why nothing is replayed, in one line; None if something may be.
    """

    def __init__(self, graphs: str, recipe: Recipe, world: World, task: Task[ImageBatch], model: nn.Module) -> None:
        """Nothing is captured yet; `graphs` is the setting "auto" or "off", `model` the converted one."""
        self.why_not = _why_never(graphs, recipe, task, model)
        self._task, self._model, self._device = task, model, world.device
        self._graphs: dict[torch.Size, GraphedStep] = {}
        self._last: GraphedStep | None = None
        self._most = MOST_SHAPES
        self._first_step: int | None = None
        self._pool = torch.cuda.graph_pool_handle() if self.why_not is None else None

    def take(self, batch: ImageBatch, factor: float) -> tuple[Tensor, dict[str, Tensor]] | None:
        """What `Task.loss` gives, with the gradients of `factor` times the loss added; None where the loop must do it.

        The context has begun the micro-step. Steps that telemetry measures are the loop's, and the first one, whose
        memory says whether there is room for a graph.
        """
        self._last = None
        if self.why_not is not None:
            return None
        context: StepContext = self._model.fp8_context  # type: ignore[assignment]
        if self._first_step is None:
            self._first_step = context.step
        if context.telemetry.active or context.step == self._first_step:
            return None
        tensors = (batch.images, batch.labels)
        graph = self._graphs.get(batch.images.shape)
        if graph is None and len(self._graphs) < self._most:
            graph = self._capture(tensors)
        if graph is None or not graph.fits(tensors):
            return None
        self._last = graph
        return graph(tensors, factor)

    def step(self, masters: MasterWeights, scale: float, clip_norm: float | None) -> bool:
        """`masters.step`, by a graph where the last pass was replayed and left all gradients.

        They may have been summed over processes since, in their memory.
        """
        if self._last is None:
            return masters.step(scale, clip_norm)
        return self._last.step(masters, scale, clip_norm)

    def summary(self) -> str:
        """One line for the run's record."""
        if self._graphs:
            return "replayed for batches of " + ", ".join(str(shape[0]) for shape in self._graphs)
        return self.why_not or "nothing was replayed"

    def _capture(self, tensors: tuple[Tensor, Tensor]) -> GraphedStep | None:
        # A graph keeps its memory, and eager passes (another shape, a measured step) need as much beside it.
        free, _ = torch.cuda.mem_get_info(self._device)
        if not self._graphs and free < torch.cuda.max_memory_allocated(self._device):
            self._give_up("no memory for a graph beside a step")
            return None
        try:
            graph = GraphedStep(self._model, self._loss, tensors, self._pool)
        # Out of memory, or an operation that cannot be captured: the loop makes the pass itself.
        except RuntimeError as error:
            self._give_up(f"a step could not be captured ({str(error).splitlines()[0][:200]})")
            return None
        self._graphs[tensors[0].shape] = graph
        return graph

    def _give_up(self, reason: str) -> None:
        self._most = len(self._graphs)
        if not self._graphs:
            self.why_not = reason

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._task.loss(self._model, ImageBatch(images, labels))


def _why_never(graphs: str, recipe: Recipe, task: Task[Any], model: nn.Module) -> str | None:
    if graphs == "off":
        return "graphs=off"
    if not task.fixed_shapes:
        return "batches of sentences differ in shape"
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNorm2d):
            return f"{name}: normalization over all processes communicates inside the model"
    if recipe.autocast != "none":
        return "autocast"
    return why_not_graphed(model)
