"""Counts the kernels that a training step of a ResNet has Triton compile for an H100; no GPU takes part.

    env -u TRITON_INTERPRET python tests/kernels/variants.py resnet18 fp8 resnet50 fp8

Prints the numbers as JSON, those of each kernel and recipe.
"""

import json
import sys
from collections import Counter
from importlib import import_module

import torch
import torch.nn.functional as F

from fp8repro.kernels.listing import Gpu, pretend
from fp8repro.models.resnet import make_resnet
from fp8repro.precision import carrier  # noqa: F401 (imported before its names are replaced)
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject
from fp8repro.settings.recipes import load_recipe

BATCH, SIDE, CLASSES = 256, 224, 1000


def variants(name, recipe):
    """Launches one step."""
    with torch.device("meta"):
        model = make_resnet(name, CLASSES, image_size=SIDE).to(memory_format=torch.channels_last)
        images = torch.empty(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
        labels = torch.empty(BATCH, dtype=torch.long)
    inject(model, load_recipe(recipe), StepContext(seed=1), "triton")
    model.fp8_context.begin(0)
    F.cross_entropy(model(images), labels).backward()


if __name__ == "__main__":
    found = []
    pretend(Gpu((9, 0), 132), found.append)
    counts = {}
    for name, recipe in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        variants(name, recipe)
        counts[f"{name} {recipe}"] = Counter(kernel.name for kernel in found)
        for kernel in found:
            # Else the next case would find it compiled.
            getattr(import_module(kernel.module), kernel.name).device_caches.clear()
        found.clear()
    print(json.dumps(counts))
