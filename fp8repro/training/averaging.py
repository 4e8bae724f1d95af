"""The mean of the weights of the last epochs, for a run's final score. The training itself does not use it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fp8repro.training.checkpoint import checksum_path, read_tensors, write_tensors
from fp8repro.training.record import RunFolder


def save_epoch_weights(model: nn.Module, record: RunFolder, epoch: int, keep: int) -> None:
    """Write the weights after an epoch; those of the last `keep` epochs stay."""
    if not record.writes:
        return
    write_tensors(record.checkpoints / f"epoch-{epoch:05d}.pt", {"model": model.state_dict()})
    for old in epoch_weights(record.checkpoints)[:-keep]:
        old.unlink(missing_ok=True)
        checksum_path(old).unlink(missing_ok=True)


def epoch_weights(folder: Path) -> list[Path]:
    """Files of `save_epoch_weights`, oldest first."""
    return sorted(folder.glob("epoch-*.pt"))


def load_averaged_weights(model: nn.Module, record: RunFolder, count: int) -> bool:
    """Load the mean of the weights of the last `count` epochs, taken in FP64, into a model.

    Returns:
        False, with nothing changed, when no epoch was completed.
    """
    paths = epoch_weights(record.checkpoints)[-count:]
    if not paths:
        return False
    sums: dict[str, Tensor] = {}
    for path in paths:
        for name, value in read_tensors(path)["model"].items():
            sums[name] = sums[name] + value.double() if name in sums else value.double()
    means = {name: total / len(paths) for name, total in sums.items()}
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(means[name])
    return True
