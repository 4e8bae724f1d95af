"""CUDA graphs in the training loop: which passes and updates are replayed, and why others are not.

A replay computes the same bits as the eager pass; nothing here may decide numerics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fp8repro.data.translation.buckets import MOST_SHAPES
from fp8repro.numerics.recipe import Recipe
from fp8repro.precision.context import StepContext
from fp8repro.precision.graphs import GraphedStep, why_not_graphed
from fp8repro.precision.master import MasterWeights
from fp8repro.training.distributed import World
from fp8repro.training.running_statistics import SyncBatchNorm2d
from fp8repro.training.tasks.task import Task

# Batches of images have four at most: those of an epoch differ by one image, and so do the micro-batches cut from each.
MOST_GRAPHS = MOST_SHAPES
Shapes = tuple[torch.Size, ...]


class Replays:
    """Replays passes instead of the loop where that is possible.

    Attributes:
        why_not: why nothing is replayed, in one line; None if something may be.
    """

    def __init__(self, graphs: str, recipe: Recipe, world: World, task: Task[Any], model: nn.Module) -> None:
        """Nothing is captured yet; `graphs` is the setting "auto" or "off", `model` the converted one."""
        self.why_not = _why_never(graphs, recipe, task, model)
        self._task, self._model, self._device = task, model, world.device
        self._graphs: dict[Shapes, GraphedStep] = {}
        self._last: GraphedStep | None = None
        self._most = MOST_GRAPHS
        self._why_no_more: str | None = None
        self._first_step: int | None = None
        # Elements of the largest batch whose eager pass was made, for what it says of the others' memory.
        self._measured = 1

    def take(self, batch: Any, factor: float) -> tuple[Tensor, dict[str, Tensor]] | None:
        """What `Task.loss` gives, with the gradients of `factor` times the loss added; None where the loop must do it.

        The context has begun the micro-step. Steps that telemetry measures are the loop's, and the first one, whose
        memory says whether there is room for a graph.
        """
        self._last = None
        if self.why_not is not None:
            return None
        context: StepContext = self._model.fp8_context  # type: ignore[assignment]
        inputs = self._task.inputs(batch)
        if self._first_step is None:
            self._first_step = context.step
        if context.step == self._first_step:
            self._measured = max(self._measured, _elements(inputs))
        if context.telemetry.active or context.step == self._first_step:
            return None
        graph = self._graphs.get(_shapes(inputs)) or self._capture(inputs)
        if graph is None or not graph.fits(inputs):
            return None
        self._last = graph
        return graph(inputs, factor)

    def step(self, masters: MasterWeights, scale: float, clip_norm: float | None) -> bool:
        """`masters.step`, by a graph where the last pass was replayed and left all gradients.

        They may have been summed over processes since, in their memory.
        """
        if self._last is None:
            return masters.step(scale, clip_norm)
        return self._last.step(masters, scale, clip_norm)

    def summary(self) -> str:
        """One line for the run's record."""
        if not self._graphs:
            return self.why_not or "nothing was replayed"
        rows = ", ".join(str(shapes[0][0]) for shapes in self._graphs)
        alike = len({tuple(shape[1:] for shape in shapes) for shapes in self._graphs}) == 1
        what = f"replayed for batches of {rows}" if alike else f"replayed for {len(self._graphs)} shapes of batches"
        return what + (f", not for others: {self._why_no_more}" if self._why_no_more else "")

    def _capture(self, inputs: tuple[Tensor, ...]) -> GraphedStep | None:
        """The graph for inputs of these shapes, where there can be one."""
        largest = None if self._graphs else self._task.largest_batch()
        # First, because larger tensors find no room in what smaller ones left of the pool in pieces.
        for each in (inputs,) if largest is None else (self._task.inputs(largest), inputs):
            if _shapes(each) not in self._graphs and len(self._graphs) < self._most:
                self._capture_one(each)
        return self._graphs.get(_shapes(inputs))

    def _capture_one(self, inputs: tuple[Tensor, ...]) -> None:
        if not self._has_room(inputs):
            self._give_up("no memory for a graph beside a step")
            return
        beside = next(iter(self._graphs.values()), None)
        try:
            graph = GraphedStep(self._model, self._loss, inputs, beside)
        # Out of memory, an operation that cannot be captured, or too many streams: the loop makes the pass itself.
        except (RuntimeError, ValueError) as error:
            self._give_up(f"a step could not be captured ({str(error).splitlines()[0][:200]})")
            return
        self._graphs[_shapes(inputs)] = graph

    def _has_room(self, inputs: Sequence[Tensor]) -> bool:
        """Whether an eager pass (another shape, a measured step) still has the memory that it needs beside a graph."""
        # The capture would do so.
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        step = torch.cuda.max_memory_allocated(self._device) * max(1.0, _elements(inputs) / self._measured)
        # The first graph takes as much as a step, the others next to nothing.
        return free >= (1 if self._graphs else 2) * step

    def _give_up(self, reason: str) -> None:
        self._most, self._why_no_more = len(self._graphs), reason
        if not self._graphs:
            self.why_not = reason

    def _loss(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._task.loss(self._model, *inputs)


def _shapes(inputs: Sequence[Tensor]) -> Shapes:
    return tuple(t.shape for t in inputs)


def _elements(inputs: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in inputs)


def _why_never(graphs: str, recipe: Recipe, task: Task[Any], model: nn.Module) -> str | None:
    if graphs == "off":
        return "graphs=off"
    if task.why_not_replayed is not None:
        return task.why_not_replayed
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNorm2d):
            return f"{name}: normalization over all processes communicates inside the model"
    if recipe.autocast != "none":
        return "autocast"
    return why_not_graphed(model)
