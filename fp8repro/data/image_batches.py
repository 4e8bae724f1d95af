"""Batches of images for one rank: which examples, in which order, is a function of (seed, epoch) alone.

The state of an iteration is (epoch, position), counted in batches that were handed out, so a run resumes in the
middle of an epoch without skipping or repeating an example, whatever the workers had prepared.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fp8repro.data.keys import permutation
from fp8repro.errors import RunFailure, UserError

Sample = tuple[Tensor, int]
# Normalization needs more than one value a channel, and the smallest feature map has one pixel.
SMALLEST_BATCH = 2


@dataclass(frozen=True)
class ImageBatch:
    """Images [B, C, H, W] and class indices [B] in int64.

    Images are FP32, or pixels in uint8, a quarter of the bytes to move: `ImageData.normalized` makes FP32 of them.
    """

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> ImageBatch:
        """The same batch on another device."""
        return ImageBatch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> ImageBatch:
        """The same batch in pinned memory, as torch's loader calls it."""
        return ImageBatch(self.images.pin_memory(), self.labels.pin_memory())


def even_parts(count: int, parts: int) -> NDArray[np.int64]:
    """Boundaries [parts + 1] that divide `count` items into parts whose sizes differ by at most one."""
    return np.arange(parts + 1, dtype=np.int64) * count // parts


class TrainImages:
    """Endless training batches; iterate one epoch at a time.

    An epoch is cut into ceil(images / batch_size) steps of nearly equal size: every image is seen once, and no last
    batch is tiny. Each step is cut likewise into `micro_steps` times `world_size` batches.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        batch_size: int,
        seed: int,
        micro_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`dataset` is indexed by (epoch, index) and has a length; `batch_size` is over all micro-steps and ranks.

        Raises:
            UserError: a batch would hold fewer than two images.
        """
        self.dataset, self.seed = dataset, seed
        self.micro_steps, self.rank, self.world_size = micro_steps, rank, world_size
        self.workers, self.pin_memory = workers, pin_memory
        self.epoch, self.position = 0, 0
        self.size: int = len(dataset)  # type: ignore[arg-type]
        self.steps = -(-self.size // batch_size)
        parts = micro_steps * world_size
        if self.size // self.steps < SMALLEST_BATCH * parts:
            raise UserError(
                f"trainer.batch_size: got {batch_size} for {parts} micro-steps and processes and {self.size} images, "
                f"expected at least {SMALLEST_BATCH} images in each"
            )

    def __len__(self) -> int:
        """Batches of one rank in an epoch."""
        return self.steps * self.micro_steps

    def epoch_indices(self, epoch: int) -> list[NDArray[np.int64]]:
        """This rank's batches of an epoch, as indices."""
        order = permutation(self.size, "order", self.seed, epoch)
        bounds = even_parts(self.size, self.steps)
        batches = []
        for start, stop in pairwise(bounds):
            cuts = start + even_parts(int(stop - start), self.micro_steps * self.world_size)
            for micro_step in range(self.micro_steps):
                part = micro_step * self.world_size + self.rank
                batches.append(order[cuts[part] : cuts[part + 1]])
        return batches

    def __iter__(self) -> Iterator[ImageBatch]:
        """The rest of the current epoch; then the next epoch is current."""
        rest = self.epoch_indices(self.epoch)[self.position :]
        keys = [[(self.epoch, int(i)) for i in batch] for batch in rest]
        for batch in load_batches(self.dataset, keys, self.workers, self.pin_memory):
            # Counted before it is yielded: a checkpoint after this batch must not repeat it.
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Epoch, and the number of its batches yielded so far."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]


def load_batches(
    dataset: Dataset[Sample], keys: Sequence[Sequence[Any]], workers: int = 0, pin_memory: bool = False
) -> Generator[ImageBatch, None, None]:
    """The batches named by lists of keys, in order, prepared by worker processes.

    Raises:
        UserError: an image that cannot be read.
        RunFailure: a worker process died.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
        # Else the loader draws from torch's global generator.
        generator=torch.Generator(),
    )
    return fetched(loader, len(keys))


def fetched(loader: DataLoader[Any], count: int) -> Generator[Any, None, None]:
    """The first results of a loader, whose dataset returns errors as values: torch would add a traceback to their text.

    Raises:
        UserError: such a value.
        RunFailure: a worker process died.
    """
    results = iter(loader)
    try:
        for _ in range(count):
            try:
                result = next(results)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise RunFailure(f"data.workers: a worker process died ({str(error).splitlines()[0]})") from error
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        # Now, not when garbage is collected: the workers ignore the signal that would end them at exit.
        if loader.num_workers:
            results._shutdown_workers()  # type: ignore[attr-defined]


def _collate(samples: list[Sample] | ImageBatch | UserError) -> ImageBatch | UserError:
    """Stack samples, unless the dataset made a batch of them itself."""
    if isinstance(samples, (ImageBatch, UserError)):
        return samples
    images, labels = zip(*samples, strict=True)
    return ImageBatch(torch.stack(images), torch.tensor(labels, dtype=torch.int64))


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore signals that a terminal or a cluster sends to all processes of a job: the loop decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
