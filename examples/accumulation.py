"""Gradient accumulation and activation checkpointing in FP8: micro-steps share weights, draw bits of their own."""

import torch
from digits import TRAIN, accuracy, load, network
from torch import nn
from torch.utils.checkpoint import checkpoint

from fp8repro import MasterWeights, inject, load_recipe

STEPS, MICRO_STEPS, SCALE = 80, 4, 1024.0
images, labels = load()
model = network()
recipe = load_recipe("fp8")
inject(model, recipe)
masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), recipe)
for step in range(STEPS):
    model.zero_grad()
    # No weight changes inside: each is rounded once.
    with model.fp8_context.fixed_weights():
        for micro_step in range(MICRO_STEPS):
            model.fp8_context.begin(step, micro_step)
            batch = torch.randint(TRAIN, (16,))
            x = model[0](images[batch])
            # Recomputed in the backward pass, with the bits that it drew before.
            x = checkpoint(model[1], x, use_reentrant=False)
            loss = nn.functional.cross_entropy(model[2:](x), labels[batch]) / MICRO_STEPS
            (loss * SCALE).backward()
    masters.step(SCALE, clip_norm=1.0)
print(f"top-1 on held-out digits: {100 * accuracy(model):.1f} %")
