"""FP8 in a loop of Accelerate: its precision stays "no", the recipe's masters make the step."""

import torch
from accelerate import Accelerator
from digits import BATCH, TRAIN, accuracy, load, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fp8repro import MasterWeights, inject, load_recipe

EPOCHS, SCALE = 5, 1024.0
# Not "fp8": that is TransformerEngine's, and a second loss scale would stand beside ours.
accelerator = Accelerator(mixed_precision="no", cpu=True)
images, labels = load()
model = network()
recipe = load_recipe("fp8")
inject(model, recipe)
loader = DataLoader(TensorDataset(images[:TRAIN], labels[:TRAIN]), BATCH, shuffle=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
model, loader = accelerator.prepare(model, loader)
masters = MasterWeights(model, optimizer, recipe)
step = 0
for _ in range(EPOCHS):
    for x, y in loader:
        masters.context.begin(step)
        model.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(x), y) * SCALE)
        masters.step(SCALE)
        step += 1
print(f"top-1 on held-out digits: {100 * accuracy(accelerator.unwrap_model(model)):.1f} %")
