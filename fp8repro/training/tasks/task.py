"""The interface between the training loop and a kind of work: classifying images, translating."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fp8repro.numerics.recipe import Recipe


class TrainBatches(Protocol):
    """Endless training batches of one rank; iterating gives the rest of the current epoch.

    Every epoch has the same number of batches. The state counts the batches that were yielded.
    """

    epoch: int

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """The rest of the current epoch; then the next epoch is current."""
        ...

    def state_dict(self) -> dict[str, int]:
        """Plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken."""
        ...


@dataclass(frozen=True)
class Examples:
    """Arguments of a model on the meta device: one tuple for each shape that it meets on this rank.

    Attributes:
        training: of training batches.
        evaluation: of the batches whose loss is evaluated.
    """

    training: list[tuple[Tensor, ...]]
    evaluation: list[tuple[Tensor, ...]]


B = TypeVar("B", contravariant=True)
T = TypeVar("T")
# Called before each batch of an evaluation, equally often on every rank; may raise to end the evaluation.
Poll = Callable[[], None]


def no_poll() -> None:
    """Never end an evaluation."""


def polled(batches: Iterable[T], count: int, poll: Poll) -> Iterator[T]:
    """Batches of an evaluation, with a poll before each.

    Args:
        batches: of this rank.
        count: largest number of batches of any rank; every rank polls so often.
        poll: see `Poll`.
    """
    rest = iter(batches)
    for _ in range(count):
        poll()
        yield from islice(rest, 1)


class Task(Protocol[B]):
    """A kind of work; `B` is its batch.

    Attributes:
        unit: what is counted: "images" or "tokens". The loss is a mean over these.
        batches: the training batches.
    """

    unit: str

    @property
    def batches(self) -> TrainBatches:
        """The training batches."""
        ...

    @property
    def why_not_replayed(self) -> str | None:
        """Why no training step can be replayed as a CUDA graph, in one line.

        None where batches have few shapes, and what a step does on the host depends on those alone.
        """
        ...

    def model(self) -> nn.Module:
        """A fresh model on the CPU, drawn from torch's global generator."""
        ...

    def examples(self) -> Examples:
        """What the model is called with."""
        ...

    def identity(self) -> dict[str, Any]:
        """Plain values that tell this data from other data, as a checkpoint must know it (vocabulary, classes)."""
        ...

    def batch_report(self) -> dict[str, Any]:
        """Number, shapes and padding of an epoch's batches of all ranks, for the record; empty if nothing is padded."""
        ...

    def count(self, batch: B) -> int:
        """Images or target tokens in a batch."""
        ...

    def inputs(self, batch: B) -> tuple[Tensor, ...]:
        """What `loss` computes with, on the CPU."""
        ...

    def largest_batch(self) -> Any:
        """A training batch of the shape that takes most memory; None where all shapes take about the same."""
        ...

    def loss(self, model: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass of a training batch: sum of the loss in FP32, and sums of other figures.

        Args:
            model: in training mode.
            inputs: what `inputs` gave, on any device.
        """
        ...

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """The other figures of `loss` as people read them, from their means over images or tokens."""
        ...

    def evaluate(self, model: nn.Module, split: str, poll: Poll = no_poll) -> dict[str, float]:
        """Figures of a model in evaluation mode on "val" or "train" (not augmented), over all ranks; polls.

        Outputs that are not finite are no hits; where there are any, "nonfinite" says how many, or the loss is not
        finite either.
        """
        ...

    def chance(self) -> dict[str, float]:
        """The "loss" of guessing, and for a figure of `evaluate` (more is better) the most that guessing explains."""
        ...

    def score(self, metrics: dict[str, float]) -> float:
        """The figure of `evaluate` by which models are compared; more is better."""
        ...

    def finish(self, model: nn.Module, metrics: dict[str, float], folder: Path, poll: Poll = no_poll) -> dict[str, Any]:
        """The summary's figures, after the last step; may write files into the run's folder on the first rank.

        Args:
            model: in evaluation mode; with `trainer.average_checkpoints`, its weights are the averaged ones.
            metrics: of the last `evaluate`.
            folder: the run's.
            poll: called as often as the work allows.
        """
        ...


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Torch's autocast where the recipe asks for it, else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.autocast == "bf16")
