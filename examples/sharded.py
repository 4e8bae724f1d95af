"""FP8 with FSDP2: each process holds a part of the masters, and rounds it to the bits that one process would give.

torchrun --nproc-per-node 2 examples/sharded.py
"""

import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fp8repro import MasterWeights, StepContext, inject, load_recipe

STEPS, SCALE = 3, 1024.0
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Flatten()),
    *(nn.Linear(7 * 16, 17), nn.ReLU(), nn.Linear(17, 4)),
)
images, labels = torch.randn(STEPS, 8, 1, 8, 8), torch.arange(8) % 4
recipe = load_recipe("fp8")
# Inject first, then shard: the layers stay, only their parameters become parts.
inject(model, recipe, StepContext(seed=1, rank=rank))
mesh = init_device_mesh("cpu", (size,))
fully_shard(model[5], mesh=mesh)
fully_shard(model, mesh=mesh)
masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), recipe)
for step in range(STEPS):
    model.fp8_context.begin(step)
    model.zero_grad()
    own = slice(rank * 8 // size, (rank + 1) * 8 // size)
    loss = nn.functional.cross_entropy(model(images[step, own]), labels[own])
    (loss * SCALE).backward()
    assert masters.step(SCALE)
digest = hashlib.sha256()
for parameter in model.parameters():
    digest.update(parameter.full_tensor().detach().numpy().tobytes())
if rank == 0:
    print(f"masters {digest.hexdigest()}")
dist.destroy_process_group()
