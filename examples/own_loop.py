"""The paper's FP8 in a training loop of your own: inject the recipe, keep FP16 masters, scale the loss."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fp8repro import MasterWeights, inject, load_recipe, make_scaler
from fp8repro.settings.schema import LossScalingConfig

STEPS, TRAIN = 300, 1500
torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
)
recipe = load_recipe("fp8")
print(inject(model, recipe).table())
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
masters = MasterWeights(model, optimizer, recipe)
scaler = make_scaler(LossScalingConfig(policy="constant", scale=10_000), STEPS)
for step in range(STEPS):
    batch = torch.randint(TRAIN, (64,))
    model.fp8_context.begin(step)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    (loss * scaler.scale).backward()
    scaler.update(not masters.step(scaler.scale))
model.eval()
accuracy = (model(images[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean().item()
print(f"top-1 on {len(images) - TRAIN} held-out digits: {100 * accuracy:.1f} %, {scaler.skipped} steps skipped")
