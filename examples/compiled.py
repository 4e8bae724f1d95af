"""torch.compile around a converted model: what lies between the products is compiled, the bits are the same."""

import torch
from digits import BATCH, TRAIN, load, network
from torch import nn

from fp8repro import MasterWeights, StepContext, inject, load_recipe

STEPS, SCALE = 3, 1024.0
images, labels = load()
recipe = load_recipe("fp8")
losses = []
for compiled in (False, True):
    model = network()
    inject(model, recipe, StepContext(seed=1))
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), recipe)
    # The first pass finds products by functions; it has to see them, so it is not compiled.
    model(images[:2])
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    losses.append([])
    for step in range(STEPS):
        batch = torch.arange(BATCH) + step * BATCH
        model.fp8_context.begin(step)
        model.zero_grad()
        loss = nn.functional.cross_entropy(forward(images[batch % TRAIN]), labels[batch % TRAIN])
        (loss * SCALE).backward()
        masters.step(SCALE)
        losses[-1].append(loss.item())
print(f"compiled {losses[1]}, not compiled {losses[0]}: {'the same' if losses[0] == losses[1] else 'different'}")
