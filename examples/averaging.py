"""An exponential moving average of FP8 masters, kept in FP32; saving both, and going on from the file."""

import io

import torch
from digits import BATCH, TRAIN, accuracy, load, network
from torch import nn

from fp8repro import MasterWeights, StepContext, inject, load_recipe

STEPS, DECAY, SCALE = 120, 0.95, 1024.0
images, labels = load()
recipe = load_recipe("fp8")


def prepared() -> tuple[nn.Module, MasterWeights]:
    """A converted network and its masters."""
    model = network()
    inject(model, recipe, StepContext(seed=1))
    return model, MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), recipe)


def train(model: nn.Module, masters: MasterWeights, average: dict[str, torch.Tensor], steps: range) -> None:
    """Some steps; the average moves after each."""
    for step in steps:
        batch = torch.randint(TRAIN, (BATCH,), generator=torch.Generator().manual_seed(step))
        model.fp8_context.begin(step)
        model.zero_grad()
        (nn.functional.cross_entropy(model(images[batch]), labels[batch]) * SCALE).backward()
        masters.step(SCALE)
        for name, value in model.state_dict().items():
            # Masters may lie in FP16: an average in FP16 would lose most of its moves.
            average[name].lerp_(value.float(), 1 - DECAY) if value.is_floating_point() else average[name].copy_(value)


model, masters = prepared()
average = {n: v.float() if v.is_floating_point() else v.clone() for n, v in model.state_dict().items()}
train(model, masters, average, range(STEPS // 2))
file = io.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": masters.state_dict(), "average": average}, file)
train(model, masters, average, range(STEPS // 2, STEPS))

file.seek(0)
saved = torch.load(file)
resumed, resumed_masters = prepared()
resumed.load_state_dict(saved["model"])
resumed_masters.load_state_dict(saved["optimizer"])
train(resumed, resumed_masters, saved["average"], range(STEPS // 2, STEPS))
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
print(f"resumed to the same bits: {same}")
# `load_state_dict` rounds the averages to the masters' FP16.
averaged, _ = prepared()
averaged.load_state_dict(average)
print(f"top-1 on held-out digits: {100 * accuracy(model):.1f} %, of the average {100 * accuracy(averaged):.1f} %")
