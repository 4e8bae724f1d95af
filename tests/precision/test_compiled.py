"""`torch.compile` of converted models: the bits of a step that is not compiled, no graph broken inside a layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchvision.models import resnet18

from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

FP8 = load_recipe("fp8")
# Where a graph may break: around a layer, and around a product by a function.
BOUNDARIES = "|".join(
    (
        r"function `(FP8\w+|FusedBatchNorm2d)\.forward` should not be traced",
        # The mode of a module's products by functions.
        r"Skip calling `torch.compiler.disable\(\)`d function",
        # torch's recurrent layers are boundaries of its own.
        "Attempted to wrap RNN, GRU, or LSTM",
    )
)


class Residual(nn.Module):
    """Layers with functions in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(16, 16) for name in "abc"})

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.layers["a"](x) * 2)
        x = x + torch.tanh(self.layers["b"](x) * 2)
        return torch.tanh(self.layers["c"](x) * 2).softmax(-1)


class Attention(nn.Module):
    """Products by functions between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        result: Tensor = self.out(torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v)
        return result


class Own(nn.Module):
    """A product by a function whose result is changed before the next one takes it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-1, -2) / 4, -1) @ x


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def products() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), Own(), nn.Linear(16, 16))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    # How often a graph breaks, and how many there are: the table of docs/models.md.
    "perceptron": (perceptron, (4, 16), 1, 0),
    "ResNet-18": (lambda: resnet18(num_classes=4), (4, 3, 32, 32), 24, 0),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), (2, 5, 16), 1, 0),
    "LSTM": (lambda: nn.LSTM(8, 8, 2, batch_first=True), (2, 5, 8), 1, 0),
    "residual": (Residual, (4, 16), 3, 3),
    "attention": (Attention, (2, 5, 16), 3, 0),
    "products": (products, (2, 5, 16), 2, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_step_gives_the_bits_of_one_that_is_not(name: str) -> None:
    make, shape, breaks, graphs = MODELS[name]
    torch._dynamo.reset()
    counters.clear()
    scale = 64.0
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    inject(model, FP8, StepContext(seed=1))
    results, reasons, found_graphs = [], {}, 0
    for each, compiled in ((model, True), (copy.deepcopy(model), False)):
        masters = MasterWeights(each, torch.optim.SGD(each.parameters(), lr=0.01), FP8)
        # Finds products by functions.
        each(x)
        forward: Any = torch.compile(each, backend="aot_eager") if compiled else each
        found = []
        for step in range(2):
            masters.context.begin(step)
            each.zero_grad()
            y = forward(x)
            y = y[0] if isinstance(y, tuple) else y
            (y.square().mean() * scale).backward()
            found += [y.detach(), *(p.grad.clone() for p in each.parameters())]  # type: ignore[union-attr]
            assert masters.step(scale)
            if compiled and step == 0:
                reasons, found_graphs = dict(counters["graph_break"]), counters["stats"]["unique_graphs"]
        results.append([*found, *each.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for reason in reasons:
        assert re.search(BOUNDARIES, reason), reason
    assert (sum(reasons.values()), found_graphs) == (breaks, graphs)
