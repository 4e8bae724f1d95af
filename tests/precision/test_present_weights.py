"""A converted layer computes with its present weight, whoever wrote to it, and the codes of its present input."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, vector_to_parameters
from training_tools import tiny_config, use_tiny_network

from fp8repro.engines import products
from fp8repro.numerics.recipe import Recipe
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import fixed_weights, inject
from fp8repro.precision.master import MasterWeights
from fp8repro.precision.site import Site
from fp8repro.settings.recipes import load_recipe
from fp8repro.training.loop import train

FP8 = load_recipe("fp8")
IDENTITY = Rounding(format="fp32")
torch.manual_seed(1)
X, Y = torch.randn(32, 8), torch.randint(0, 4, (32,))


Make = Callable[[], nn.Sequential]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


class Last(nn.Module):
    """The last state of a recurrent layer over four steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.unflatten(1, (4, 4)))[0][:, -1]
        return result


def mixed() -> nn.Sequential:
    """A convolution, a recurrent layer and a normalization among linear layers; its third layer is linear, too."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Unflatten(1, (2, 4)), nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Flatten()), nn.Linear(16, 16)),
        *(Last(), nn.LayerNorm(16), nn.Linear(16, 4)),
    )


def converted(recipe: Recipe = FP8, backend: str = "auto", make: Make = network) -> nn.Sequential:
    model = make()
    inject(model, recipe, StepContext(seed=3), backend=backend)
    return model


def fresh_copy(model: nn.Module, recipe: Recipe = FP8, backend: str = "auto", make: Make = network) -> nn.Sequential:
    """A model that was converted with the present weights of another, in FP32."""
    fresh = make()
    fresh.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    inject(fresh, recipe, StepContext(seed=3), backend=backend)
    return fresh.train(model.training)


def outputs(model: nn.Module) -> Tensor:
    """In evaluation mode, where no random bits are drawn."""
    training = model.training
    with torch.no_grad():
        result: Tensor = model.eval()(X)
    model.train(training)
    return result


class Habits:
    """What loops do to a model; each method is one thing that may happen."""

    def __init__(self, backend: str, make: Make) -> None:
        self.model = converted(backend=backend, make=make)
        self._renew(fused=False)
        self.average = copy.deepcopy(self.model)
        self.saved = copy.deepcopy(self.model.state_dict())
        self.steps = 0

    def _renew(self, fused: bool) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, fused=fused)
        self.masters: MasterWeights | None = None

    def forward(self) -> None:
        self.model(X)

    def forward_twice_with_fixed_weights(self) -> None:
        with self.model.fp8_context.fixed_weights():  # type: ignore[operator]
            self.model(X)
            self.backward()

    def begin(self) -> None:
        self.model.fp8_context.begin(self.steps)  # type: ignore[operator]
        self.steps += 1

    def backward(self) -> None:
        F.cross_entropy(self.model(X), Y).backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step() if self.masters is None else self.masters.step()
        self.optimizer.zero_grad()

    def fused(self) -> None:
        if self.masters is None:
            self._renew(fused=True)

    def keep_masters(self) -> None:
        self.masters = MasterWeights(self.model, self.optimizer, FP8)

    def write_through_data(self) -> None:
        for parameter in self.model.parameters():
            parameter.data.mul_(0.75)

    def write_through_numpy(self) -> None:
        weight = self.model[2].weight.detach().numpy()
        weight[:] = weight[::-1].copy()

    def swap_average(self) -> None:
        for own, other in zip(self.model.parameters(), self.average.parameters(), strict=True):
            own.data, other.data = own.data.clone().copy_(other.data), other.data.clone().copy_(own.data)

    def save(self) -> None:
        self.saved = copy.deepcopy(self.model.state_dict())

    def load(self) -> None:
        self.model.load_state_dict(self.saved)

    def assign(self) -> None:
        self.model.load_state_dict(copy.deepcopy(self.saved), assign=True)
        self._renew(fused=False)

    def go_on_with_a_copy(self) -> None:
        self.model = copy.deepcopy(self.model)
        self._renew(fused=False)

    def go_on_with_what_was_pickled(self) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))
        self._renew(fused=False)

    def call_with_others(self) -> None:
        others = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        assert torch.func.functional_call(self.model, others, (X,)).abs().max() == 0

    def change_mode(self) -> None:
        self.model.train(not self.model.training)


NAMES = [name for name in vars(Habits) if not name.startswith("_")]


@pytest.mark.parametrize(("backend", "make"), [("auto", network), ("emulate", network), ("auto", mixed)])
@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=12))
def test_after_any_sequence_a_layer_computes_as_a_fresh_copy_would(backend: str, make: Make, names: list[str]) -> None:
    habits = Habits(backend, make)
    for name in names:
        getattr(habits, name)()
    fresh = fresh_copy(habits.model, backend=backend, make=make)
    assert torch.equal(outputs(habits.model), outputs(fresh))
    # In training mode as well: gradients too, drawn with the same bits.
    gradients = []
    for model in (habits.model, fresh):
        model.train().zero_grad()
        model.fp8_context.begin(99)  # type: ignore[operator]
        F.cross_entropy(model(X), Y).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_write_inside_of_a_step_that_was_begun_is_seen() -> None:
    model = converted()
    model.fp8_context.begin(0)  # type: ignore[operator]
    model(X)
    vector_to_parameters(torch.zeros(sum(p.numel() for p in model.parameters())), model.parameters())
    assert model(X).abs().max() == 0


def test_masters_in_fp32_are_seen() -> None:
    recipe = replace(FP8, master=IDENTITY)
    model = converted(recipe)
    masters = MasterWeights(model, torch.optim.AdamW(model.parameters(), lr=0.05, fused=True), recipe)
    for _ in range(3):
        model.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        assert masters.step()
        assert torch.equal(outputs(model), outputs(fresh_copy(model, recipe)))


def test_parametrized_weights_are_those_of_every_call() -> None:
    model = converted()
    parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2.0)  # type: ignore[union-attr]
        found = model.eval()[0](X)
        plain = nn.Linear(8, 16)
        plain.load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
        alone = nn.Sequential(plain)
        inject(alone, replace(FP8, exempt=()))
        assert torch.equal(found, alone.eval()(X))
    model.train()(X).sum().backward()
    assert model[0].parametrizations.weight.original0.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_that_a_loop_fills_again_is_rounded_again(training: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16))
    inject(model, replace(FP8, exempt=()))
    model.train(training)
    memory = np.zeros((4, 8), dtype=np.float32)
    batch = torch.from_numpy(memory)
    first = model(batch)
    memory[:] = 1.0
    assert not torch.equal(model(batch), first)
    assert torch.equal(model(batch), model(torch.ones(4, 8)))


def count_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counted: Counter[str] = Counter()
    operand = Site.operand

    def counting(self: Site, x: Tensor, role: str, *arguments: Any, **options: Any) -> products.Operand:
        counted[self.name] += role == "weight"
        return operand(self, x, role, *arguments, **options)

    monkeypatch.setattr(Site, "operand", counting)
    return counted


def test_inside_a_block_a_weight_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    counted = count_rounded_weights(monkeypatch)
    with fixed_weights(nn.Sequential(model)):
        for micro_step in range(3):
            model.fp8_context.begin(0, micro_step)  # type: ignore[operator]
            model(X).sum().backward()
    assert counted == {"0": 1, "2": 1, "4": 1}
    with fixed_weights(model):
        model(X)
        with torch.no_grad():
            model[0].weight.add_(1.0)  # type: ignore[operator]
        model(X)
    # A change that a tensor knows of is seen here too.
    assert counted == {"0": 3, "2": 2, "4": 2}


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_a_training_step_rounds_every_weight_once(
    micro_steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counted = count_rounded_weights(monkeypatch)
    use_tiny_network(monkeypatch)
    train(tiny_config(tmp_path / "run", "fp8", micro_steps=micro_steps, max_steps=2, eval_every_epochs=0))
    # Twice in training, and once for all batches of the evaluation at the end.
    assert set(counted.values()) == {3}
    assert len(counted) == 4


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_every_training_step_makes_the_same_rounding_calls(
    micro_steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: dict[int, Counter[tuple[str, str]]] = {}
    operand, product = Site.operand, Site.product

    def count(site: Site, role: str | None, name: str, training: bool) -> None:
        if training and role is not None:
            calls.setdefault(site.context.step, Counter())[site.name, name] += 1

    def rounding(self: Site, x: Tensor, role: str, name: str, call: int, training: bool = True, *rest: Any) -> Any:
        count(self, role, name, training)
        return operand(self, x, role, name, call, training, *rest)

    def multiplying(
        self: Site, multiply: Any, role: str | None, name: str, call: int, training: bool = True, *rest: Any, **how: Any
    ) -> Tensor:
        count(self, role, name, training)
        return product(self, multiply, role, name, call, training, *rest, **how)

    monkeypatch.setattr(Site, "operand", rounding)
    monkeypatch.setattr(Site, "product", multiplying)
    use_tiny_network(monkeypatch)
    train(tiny_config(tmp_path / "run", "fp8", micro_steps=micro_steps, max_steps=3, eval_every_epochs=0))
    roundings = ("input", "output", "output_error", "input_error", "weight_gradient")
    expected = {(layer, name): micro_steps for layer in ("0", "3", "9", "10") for name in roundings}
    expected |= {(layer, "weight"): 1 for layer in ("0", "3", "9", "10")}
    # Nobody asks for the gradient of the images.
    del expected["0", "input_error"]
    assert calls == dict.fromkeys(range(3), expected)


def test_weights_that_no_recipe_rounds_must_not_change_before_the_backward_pass() -> None:
    model = converted(replace(FP8, weight=IDENTITY, exempt=()))
    loss = model(X).sum()
    with torch.no_grad():
        model[2].weight.mul_(2.0)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def twice(layer: Callable[[Tensor], Tensor]) -> Tensor:
    return layer(layer(torch.ones(2, 16)))


def test_calls_in_one_graph_share_the_rounded_weight() -> None:
    model = converted()
    kept = []
    for _ in range(2):
        twice(model[2])
        kept.append(model[2].site._kept.operand)  # type: ignore[union-attr]
    assert kept[0] is kept[1]
