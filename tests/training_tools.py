"""A small network and small data with which the whole training loop runs in a second."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

import fp8repro.training.tasks.classification
from fp8repro.settings.recipes import load_recipe
from fp8repro.settings.schema import (
    DataConfig,
    LossScalingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
)


def tiny_network(name, classes, channels=3, image_size=224, stem="auto"):
    """Convolutions, normalization and dropout: everything that a resumed run has to bring back."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 16),
        nn.Linear(16, classes),
    )


def use_tiny_network(patch=None):
    """Let the image task build the tiny network instead of a ResNet."""
    if patch is None:
        fp8repro.training.tasks.classification.make_resnet = tiny_network
    else:
        patch.setattr(fp8repro.training.tasks.classification, "make_resnet", tiny_network)


def tiny_config(run_dir, precision="fp32", scaling=None, data=None, **trainer):
    settings = {"epochs": 2, "batch_size": 128, "log_every": 1, "checkpoint_every_minutes": None} | trainer
    return RunConfig(
        model=ModelConfig("resnet18"),
        data=data or DataConfig("digits"),
        precision=load_recipe(precision),
        loss_scaling=scaling or LossScalingConfig(),
        optimizer=OptimizerConfig(lr=0.05),
        schedule=ScheduleConfig("cosine"),
        trainer=TrainerConfig(**settings),
        logger="none",
        device="cpu",
        run_dir=str(run_dir),
    )


def resuming(config):
    return replace(config, resume="auto")


def write_images(root: Path, count: int = 60, size: int = 16) -> Path:
    """Two classes of PNGs, told apart by which half is brighter."""
    generator = np.random.default_rng(0)
    for split, share in (("train", count), ("val", count // 3)):
        for label, name in enumerate(("left", "right")):
            (root / split / name).mkdir(parents=True)
            for i in range(share // 2):
                pixels = generator.integers(0, 100, (size, size, 3), dtype=np.uint8)
                half = slice(0, size // 2) if label == 0 else slice(size // 2, size)
                pixels[:, half] += 120
                Image.fromarray(pixels).save(root / split / name / f"{i:03d}.png")
    return root


def untimed(run_dir, kind=None):
    """Rows without what a clock says: two runs of the same bits have the same."""
    clocks = ("seconds", "images_per_second", "tokens_per_second")
    return [{name: value for name, value in row.items() if name not in clocks} for row in rows(run_dir, kind)]


def rows(run_dir, kind=None, timed=False):
    """Of a run's metrics; `timed`: with the seconds of evaluations, which differ each time."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if kind in (None, row["kind"])]
    return [{k: v for k, v in row.items() if timed or (row["kind"], k) != ("eval", "seconds")} for row in found]
