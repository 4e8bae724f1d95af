"""Counts the launches of a training step of ResNet-50 on an H100, as a run replays it; no GPU takes part.

    env -u TRITON_INTERPRET python tests/kernels/launches.py resnet50 fp8

The step runs on the meta device. Prints, of each part of the step, Triton's launches by kernel and torch's by operator,
as JSON.
"""

import json
import sys
from collections import Counter
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from h100 import pretend_an_h100
from torch.utils._python_dispatch import TorchDispatchMode
from variants import BATCH, CLASSES, SIDE

from fp8repro.kernels.optimizer import launch  # noqa: F401 (imported before names of it are replaced)
from fp8repro.kernels.quantize import grouped  # noqa: F401
from fp8repro.models.resnet import make_resnet
from fp8repro.precision import graphs, grouped_weights
from fp8repro.precision.context import StepContext
from fp8repro.precision.graphs import GraphedStep, GraphedUpdate
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

# Operators that start nothing on a device.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size"}


class Launches(TorchDispatchMode):
    """Counts torch's operators that launch a kernel or a copy."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name not in FREE:
            self.found[name] += 1
        return function(*arguments, **(options or {}))


def count(name, recipe):
    """Launches of each part of a step."""
    triton_launches = Counter()
    pretend_an_h100(lambda kernel, *_, **__: triton_launches.update([kernel.fn.__name__]))
    grouped_weights.reachable = lambda weight: True
    graphs.why_not_graphed, graphs.capture = lambda model: None, lambda run, device, pool: run
    parts = {}

    @contextmanager
    def counted(part):
        triton_launches.clear()
        with Launches() as torchs:
            yield
        parts[part] = {"triton": dict(triton_launches), "torch": dict(torchs.found)}

    with torch.device("meta"):
        model = make_resnet(name, CLASSES, image_size=SIDE).to(memory_format=torch.channels_last)
        batch = torch.empty(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last), torch.empty(BATCH).long()
    recipe, context = load_recipe(recipe), StepContext(seed=1)
    inject(model, recipe, context, "triton")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    masters = MasterWeights(model, optimizer, recipe)
    step = GraphedStep(model, lambda x, labels: (F.cross_entropy(model(x), labels), {}), batch)
    # The first one makes tables.
    context.begin(1)
    step(batch, 1e4)
    optimizer.zero_grad()
    context.begin(2)
    with counted("forward and backward"):
        step(batch, 1e4)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
    update = GraphedUpdate(masters, masters.capturable())

    def replayed():
        update._launch()
        raise StopIteration  # The host would wait here.

    update._replay = replayed
    with counted("update"), suppress(StopIteration):
        update(1e4, None)
    return parts


if __name__ == "__main__":
    print(json.dumps(count(*sys.argv[1:])))
