"""Image classification as a task of the training loop."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro.data.image_batches import ImageBatch, TrainImages, load_batches
from fp8repro.data.images import load_images
from fp8repro.errors import UserError
from fp8repro.models.resnet import make_resnet
from fp8repro.paper.examples import correct_json
from fp8repro.paper.run_folder import CORRECT
from fp8repro.settings.schema import DataConfig, ModelConfig, TrainerConfig
from fp8repro.training.distributed import World
from fp8repro.training.tasks.task import Examples, Poll, no_poll, polled


class ImageTask:
    """A `Task`: a ResNet on a data set of images; cross-entropy, top-1 and top-5 in per cent."""

    unit, why_not_replayed = "images", None

    def __init__(self, model: ModelConfig, data: DataConfig, trainer: TrainerConfig, seed: int, world: World) -> None:
        """Load the data.

        Raises:
            UserError: data that is missing or malformed, or a setting that images do not have.
        """
        if trainer.smoothing_form != "all":
            raise UserError(f"trainer.smoothing_form: got {trainer.smoothing_form!r}, expected all for images")
        for name, value in model.size.items():
            raise UserError(f"model.size.{name}: got {value!r}, expected no sizes for {model.name}")
        self.data = load_images(
            data.name, data.root, data.image_size, data.options, seed=seed, cache=data.cache, workers=data.workers
        )
        if len(self.data.classes) == 1:
            raise UserError(
                f"data.root: {data.root!r} holds one class folder ({self.data.classes[0]!r}), expected at least two, "
                "one folder of images a class"
            )
        self.network, self.world, self.workers = model, world, data.workers
        self.smoothing, self.eval_batch_size = trainer.label_smoothing, trainer.eval_batch_size
        self._pinned = world.device.type == "cuda"
        self.batches = TrainImages(
            self.data.train,
            trainer.batch_size,
            seed,
            trainer.micro_steps,
            world.rank,
            world.size,
            data.workers,
            self._pinned,
        )
        # Of the last evaluation: whether each of this rank's validation images was classified right.
        self._correct: Tensor | None = None
        self._layout = torch.channels_last if trainer.channels_last else torch.contiguous_format

    def model(self) -> nn.Module:
        """See `Task`."""
        network, data = self.network, self.data
        model = make_resnet(network.name, len(data.classes), data.channels, data.image_size, network.stem)
        return model.to(memory_format=self._layout)

    def examples(self) -> Examples:
        """See `Task`."""
        size, images = self.eval_batch_size, len(range(self.world.rank, len(self.data.val_labels), self.world.size))
        training = {len(batch) for batch in self.batches.epoch_indices(0)}
        evaluation = {min(size, images - start) for start in range(0, images, size)}
        return Examples([self._example(n) for n in sorted(training)], [self._example(n) for n in sorted(evaluation)])

    def _example(self, count: int) -> tuple[Tensor, ...]:
        shape = (count, self.data.channels, self.data.image_size, self.data.image_size)
        return (torch.empty(shape, device="meta", memory_format=self._layout),)

    def identity(self) -> dict[str, Any]:
        """See `Task`."""
        return {
            "classes": len(self.data.classes),
            "class_names": self.data.classes,
            "train_images": self.batches.size,
            "data": self.data.identity,
        }

    def batch_report(self) -> dict[str, Any]:
        """See `Task`."""
        return {}

    def count(self, batch: ImageBatch) -> int:
        """See `Task`."""
        return len(batch.labels)

    def inputs(self, batch: ImageBatch) -> tuple[Tensor, ...]:
        """See `Task`."""
        return batch.images, batch.labels

    def largest_batch(self) -> None:
        """See `Task`: batches differ by an image."""

    def loss(self, model: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task`; the figure counts 100 for each image whose highest logit is its label's."""
        logits, labels = self._logits(model, ImageBatch(*inputs))
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.smoothing)
        return loss, {"top1": 100 * _hits(logits.detach(), labels, 1).sum()}

    def _logits(self, model: nn.Module, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        batch = batch.to(self.world.device)
        images = self.data.normalized(batch.images).contiguous(memory_format=self._layout)
        return model(images).float(), batch.labels

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """See `Task`."""
        return means

    def evaluate(self, model: nn.Module, split: str, poll: Poll = no_poll) -> dict[str, float]:
        """See `Task`: loss (not smoothed), top1, top5; "nonfinite" images, where there are any."""
        dataset = self.data.val if split == "val" else self.data.train_plain
        images: int = len(dataset)  # type: ignore[arg-type]
        mine, most = range(self.world.rank, images, self.world.size), len(range(0, images, self.world.size))
        size = self.eval_batch_size
        keys = [[(0, i) for i in mine[start : start + size]] for start in range(0, len(mine), size)]
        # Loss, top-1, top-5, images that were not finite, all images.
        sums = torch.zeros(5, dtype=torch.float64, device=self.world.device)
        correct = [torch.zeros(0, dtype=torch.bool, device=self.world.device)]
        with closing(load_batches(dataset, keys, self.workers, self._pinned)) as batches:
            for batch in polled(batches, -(-most // size), poll):
                logits, labels = self._logits(model, batch)
                hits = _hits(logits, labels, 5)
                losses = F.cross_entropy(logits, labels, reduction="none")
                nonfinite = (~logits.isfinite().all(1)).sum()
                correct.append(hits[:, 0])
                count = torch.full_like(labels[0], len(labels))
                sums += torch.stack([losses.double().sum(), hits[:, 0].sum(), hits.sum(), nonfinite, count])
        if split == "val":
            self._correct = torch.cat(correct)
        loss, top1, top5, missing, total = self.world.sum(sums.tolist())
        figures = {"loss": loss / total, "top1": 100 * top1 / total, "top5": 100 * top5 / total}
        return figures | ({"nonfinite": missing} if missing else {})

    def chance(self) -> dict[str, float]:
        """See `Task`: accuracy of always predicting the largest class, plus two standard deviations."""
        images = len(self.data.val_labels)
        share = max(Counter(self.data.val_labels).values()) / images
        luck = 2 * math.sqrt(share * (1 - share) / images)
        return {"loss": math.log(len(self.data.classes)), "top1": 100 * (share + luck)}

    def score(self, metrics: dict[str, float]) -> float:
        """See `Task`."""
        return metrics["top1"]

    def finish(self, model: nn.Module, metrics: dict[str, float], folder: Path, poll: Poll = no_poll) -> dict[str, Any]:
        """See `Task`: keeps which validation images were classified right."""
        # A run that was resumed after its last evaluation has not seen it.
        if self._correct is None:
            self.evaluate(model, "val", poll)
        assert self._correct is not None
        correct = np.zeros(len(self.data.val_labels), dtype=bool)
        for rank, share in enumerate(self.world.gather(self._correct.tolist())):
            correct[rank :: self.world.size] = share
        if self.world.is_main:
            order = hashlib.sha256(f"{self.data.identity} {self.data.val_labels}".encode()).hexdigest()[:16]
            (folder / CORRECT).write_text(correct_json(correct, order), encoding="utf-8")
        return {"top1": metrics["top1"], "top5": metrics["top5"]}


def _hits(logits: Tensor, labels: Tensor, among: int) -> Tensor:
    """True at the label among the highest logits, [B, among or classes]; nowhere in rows that are not finite."""
    first = logits.topk(min(among, logits.shape[1]), dim=1).indices
    return (first == labels[:, None]) & logits.isfinite().all(1, keepdim=True)
