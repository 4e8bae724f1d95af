"""What the examples share: handwritten digits, and a small network."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

TRAIN, BATCH = 1500, 64


def load() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] and labels; the first `TRAIN` are for training."""
    digits = load_digits()
    return torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)


def network() -> nn.Sequential:
    """Two blocks of convolutions, then linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def accuracy(model: nn.Module) -> float:
    """Share of the digits held out that are recognized."""
    images, labels = load()
    model.eval()
    with torch.no_grad():
        found = model(images[TRAIN:]).argmax(1)
    model.train()
    return (found == labels[TRAIN:]).float().mean().item()
