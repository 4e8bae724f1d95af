"""Steps with and without CUDA graphs, and what stands in for graphs where there is no GPU.

Kernels run in Triton's interpreter, and for a graph the same Python runs again, on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from fp8repro.engines import quantizer
from fp8repro.kernels import ops
from fp8repro.kernels.quantize.launch import round_into
from fp8repro.precision import graphs, grouped_weights
from fp8repro.precision.context import StepContext
from fp8repro.precision.graphs import GraphedStep, why_not_graphed
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.precision.telemetry import Telemetry
from fp8repro.settings.recipes import load_recipe
from fp8repro.training import replays

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SCALE = 1024.0


def stand_in_for_a_gpu(patch: Callable[[Any, str, Any], None]) -> None:
    """Replace, by `patch(object, name, value)`, what a CPU lacks; a replay finds its streams and numbers in memory."""
    patch(quantizer.native, "available", lambda: False)
    patch(quantizer, "_torch_round_into", round_into)
    patch(quantizer, "_round_both_layouts", ops.transpose_engine)
    patch(grouped_weights, "reachable", lambda weight: True)
    patch(graphs, "capture", capture)
    for module in (graphs, replays):
        patch(module, "why_not_graphed", reason_other_than_the_device)
    patch(torch.cuda, "mem_get_info", lambda device: (1, 1))


def capture(run: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """What a replay does is what was captured; gradients lie where those of the capture did."""
    run()
    step = run.__self__ if isinstance(run.__self__, GraphedStep) else None
    if step is None:
        return run
    own = step._gradients

    def replay() -> None:
        run()
        for target, gradient in zip(own, step._gradients, strict=True):
            if target is not None:
                target.copy_(gradient)
        step._gradients = own

    return replay


def reason_other_than_the_device(model: nn.Module) -> str | None:
    reason = why_not_graphed(model)
    return None if reason is not None and reason.endswith("need a GPU") else reason


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def resnet():
    """Two stages, the second strided; no pooling, whose gradient torch adds by atomics."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 5)
    return model.to(memory_format=torch.channels_last), (2, 3, 12, 12)


def linear():
    layers = nn.Linear(24, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 5)
    return nn.Sequential(*layers), (6, 24)


class Trained:
    """A converted model with masters and an optimizer."""

    def __init__(self, build, recipe="fp8", telemetry=0, optimizer=None):
        torch.manual_seed(0)
        model, self.shape = build()
        self.model = model.to(DEVICE)
        recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
        self.context = StepContext(seed=3, telemetry=Telemetry(telemetry))
        inject(self.model, recipe, self.context, "triton")
        parameters = self.model.parameters()
        self.optimizer = optimizer(parameters) if optimizer else torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        self.masters = MasterWeights(self.model, self.optimizer, recipe)

    def batch(self, step):
        return draw(*self.shape, seed=step), torch.arange(self.shape[0]) % 5

    def loss_of(self, x, labels):
        logits = self.model(x)
        return F.cross_entropy(logits, labels), {"hits": (logits.detach().argmax(1) == labels).sum()}

    def eager(self, batch, scale=SCALE):
        loss, figures = self.loss_of(*(t.to(DEVICE) for t in batch))
        (loss * scale).backward()
        return loss.detach(), figures

    def gradients(self):
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}


def assert_same(given, expected):
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name
