"""FP16 master weights: where they are stored, how an update is rounded, and what a skipped step leaves alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from recording import in_set
from torch import Tensor, nn

from fp8repro.numerics.recipe import Recipe
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights, all_finite
from fp8repro.settings.recipes import load_recipe

FP8 = load_recipe("fp8")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def train_step(model: nn.Module, masters: MasterWeights, step: int, scale: float = 64.0) -> bool:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(7, (32,), generator=generator)
    masters.context.begin(step)
    model.zero_grad()
    (model(tokens).square().mean() * scale).backward()
    return masters.step(scale)


def make(recipe: Recipe, kind: str = "sgd", lr: float = 0.1) -> tuple[nn.Module, MasterWeights]:
    model = network()
    inject(model, recipe)
    classes = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    options = {"sgd": {"momentum": 0.9, "weight_decay": 1e-2}, "adam": {}}
    return model, MasterWeights(model, classes[kind](model.parameters(), lr=lr, **options[kind]), recipe)


def test_weights_are_stored_in_half_the_bytes_and_all_parameters_lie_in_the_fp16_set() -> None:
    model, masters = make(FP8)
    assert {n: p.dtype for n, p in model.named_parameters() if p.dim() == 2} == {
        "0.weight": torch.float16,
        "1.weight": torch.float16,
        "3.weight": torch.float16,
    }
    weights = 7 * 8 + 8 * 16 + 16 * 4
    others = 16 + 16 + 16 + 4
    assert masters.bytes() == 2 * weights + 4 * others
    for step in range(3):
        assert train_step(model, masters, step)
        assert all(in_set(p, "fp16") for p in model.parameters())
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_an_update_is_fp32_arithmetic_and_one_rounding(kind: str) -> None:
    recipe = replace(FP8, master=Rounding(format="fp16", rounding="nearest"))
    model, masters = make(recipe, kind)
    oracle = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    parameters = [nn.Parameter(value) for value in oracle.values()]
    optimizer = type(masters.optimizer)(parameters, **masters.optimizer.defaults)
    for step in range(4):
        assert train_step(model, masters, step)
        for parameter, ours in zip(parameters, model.parameters(), strict=True):
            parameter.grad = ours.grad / 64.0  # the scale of `train_step`
        optimizer.step()
        for parameter, ours in zip(parameters, model.parameters(), strict=True):
            parameter.data.copy_(parameter.data.half().float())
            assert torch.equal(parameter.data, ours.detach().float())


def test_optimizer_state_is_fp32() -> None:
    model, masters = make(FP8, "adam")
    train_step(model, masters, 0)
    for state in masters.optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


def test_stochastic_masters_keep_small_updates_on_average_and_nearest_ones_lose_them() -> None:
    # A weight of 1 moves by a tenth of an ulp (2^-10 above 1) in each of 200 steps.
    update, steps, count = 2.0**-10 / 10, 200, 4096
    means = {}
    for rounding in ("nearest", "stochastic"):
        layer = nn.Linear(count, 1, bias=False)
        nn.init.ones_(layer.weight)
        model = nn.Sequential(layer)
        recipe = replace(FP8, master=Rounding(format="fp16", rounding=rounding), exempt=())
        inject(model, recipe)
        masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=1.0), recipe)
        for step in range(steps):
            masters.context.begin(step)
            layer.weight.grad = torch.full((1, count), -update)
            masters.step()
        means[rounding] = float(layer.weight.detach().double().mean())
    assert means["nearest"] == 1.0
    # Each step rounds up with probability 0.1 by an ulp: a binomial sum.
    deviation = 2.0**-10 * math.sqrt(steps * 0.1 * 0.9 / count)
    assert abs(means["stochastic"] - (1 + steps * update)) < 3 * deviation


def test_lost_updates_are_counted() -> None:
    layer = nn.Linear(4, 1, bias=False)
    nn.init.ones_(layer.weight)
    model = nn.Sequential(layer)
    recipe = replace(FP8, master=Rounding(format="fp16", rounding="nearest"), exempt=())
    inject(model, recipe)
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=1.0), recipe)
    telemetry = masters.context.telemetry
    telemetry.every = 1
    telemetry.begin(0)
    # A quarter ulp twice (lost), a whole ulp, and no update at all.
    layer.weight.grad = torch.tensor([[-(2.0**-12), -(2.0**-12), -(2.0**-10), 0.0]])
    masters.step()
    assert telemetry.lost_share() == pytest.approx(2 / 3)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_nonfinite_gradient_changes_nothing(bad: float) -> None:
    model, masters = make(FP8)
    train_step(model, masters, 0)
    before = copy.deepcopy((model.state_dict(), masters.state_dict()))
    masters.context.begin(1)
    model.zero_grad()
    model(torch.arange(7)).sum().backward()
    model[1].weight.grad[3, 2] = bad  # type: ignore[index,union-attr]
    assert not masters.step(2.0)
    after = (model.state_dict(), masters.state_dict())
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    for index, state in before[1]["state"].items():
        assert torch.equal(state["momentum_buffer"], after[1]["state"][index]["momentum_buffer"])


def test_the_norm_is_clipped_after_unscaling() -> None:
    recipe = Recipe(**dict.fromkeys(("weight", "activation", "error", "gradient", "master"), Rounding(format="fp32")))
    ours, theirs = network(), network()
    masters = MasterWeights(ours, torch.optim.SGD(ours.parameters(), lr=0.5), recipe)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    tokens = torch.arange(7)
    (ours(tokens).square().sum() * 4096.0).backward()
    assert masters.step(4096.0, clip_norm=0.25)
    theirs(tokens).square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.25)
    optimizer.step()
    assert masters.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_fp32_masters_are_the_plain_optimizer_to_the_bit() -> None:
    recipe = load_recipe("fp32")
    ours, theirs = network(), network()
    inject(ours, recipe)
    masters = MasterWeights(ours, torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), recipe)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        assert train_step(ours, masters, step, scale=1.0)
        generator = torch.Generator().manual_seed(step)
        theirs.zero_grad()
        theirs(torch.randint(7, (32,), generator=generator)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_restored_run_goes_on_to_the_bit() -> None:
    model, masters = make(FP8, "adam")
    for step in range(2):
        train_step(model, masters, step)
    saved = copy.deepcopy((model.state_dict(), masters.state_dict()))
    for step in range(2, 5):
        train_step(model, masters, step)
    other, others = make(FP8, "adam")
    other.load_state_dict(saved[0])
    others.load_state_dict(saved[1])
    for step in range(2, 5):
        train_step(other, others, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_wang_2018_masters_lie_in_the_1_6_9_set() -> None:
    recipe = replace(FP8, master=Rounding(format="fp16_1_6_9", rounding="stochastic"))
    model, masters = make(recipe)
    for step in range(2):
        assert train_step(model, masters, step)
    for parameter in model.parameters():
        significand, _ = torch.frexp(parameter.detach())
        scaled = significand * 2**10  # 9 stored bits and the implicit one
        assert torch.equal(scaled, scaled.round())


def test_tied_weights_collect_both_gradients_in_fp32() -> None:
    embedding, output = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
    output.weight = embedding.weight
    tied = nn.Sequential(embedding, output)
    inject(tied, replace(FP8, exempt=(), gradient=Rounding(format="fp32")))
    masters = MasterWeights(tied, torch.optim.SGD(tied.parameters(), lr=0.1), FP8)
    assert embedding.weight.dtype == torch.float16
    assert output.weight is embedding.weight
    (tied(torch.zeros(64, dtype=torch.int64)).sum() * 4096.0).backward()
    grad: Tensor = embedding.weight.grad  # type: ignore[assignment]
    # Far over FP16's range, so a gradient in FP16 would be infinite.
    assert grad.dtype == torch.float32
    assert float(grad.abs().max()) > 65504
    assert masters.step(4096.0)


def test_finiteness() -> None:
    assert all_finite([])
    assert all_finite([torch.tensor([3e38, -3e38]), torch.zeros(0)])
    for bad in (math.nan, math.inf, -math.inf):
        assert not all_finite([torch.ones(3), torch.tensor([0.0, bad, 1.0])])
