"""Masters move exactly what the optimizers hold, by the unscaled gradient, with fresh random bits at every update."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8repro.errors import UserError
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import context_of, inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

FP8 = load_recipe("fp8")
SCALE = 1e4
X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 4
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),  # has no fused form here
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, foreach=True, maximize=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def converted(model: nn.Module | None = None) -> Any:
    model = model or network()
    inject(model, FP8, StepContext(seed=2))
    return model


def within_one_rounding(found: Tensor, exact: Tensor) -> bool:
    """Both FP16 neighbours of a value are at most one spacing away from it."""
    spacing = 2.0 ** (exact.abs().clamp(min=2.0**-14).log2().floor() - 10)
    return bool(((found.float() - exact).abs() <= spacing).all())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_parameters_in_any_optimizers_move_as_torch_moves_them(data: st.DataObject) -> None:
    model, outside = converted(), nn.Parameter(torch.linspace(-1, 1, 4))
    parameters = [*model.parameters(), outside]
    count = data.draw(st.integers(1, 3))
    memberships = [data.draw(st.sets(st.integers(0, count - 1))) for _ in parameters]
    kinds = [data.draw(st.sampled_from(sorted(OPTIMIZERS))) for _ in range(count)]
    frozen = data.draw(st.sets(st.integers(0, len(parameters) - 1)))
    scale = data.draw(st.sampled_from([1.0, 3.0, SCALE]))
    held = [[i for i, where in enumerate(memberships) if o in where] for o in range(count)]
    held = [indices or [0] for indices in held]
    for index in frozen:
        parameters[index].requires_grad_(False)
    masters = [
        MasterWeights(model, OPTIMIZERS[kind]([parameters[i] for i in indices]), FP8)
        for kind, indices in zip(kinds, held, strict=True)
    ]
    for index in frozen:
        parameters[index].requires_grad_(True)
    twins = [nn.Parameter(p.detach().float().clone()) for p in parameters]
    optimizers = [OPTIMIZERS[kind]([twins[i] for i in indices]) for kind, indices in zip(kinds, held, strict=True)]
    for step in range(2):
        context_of(model).begin(step)  # type: ignore[union-attr]
        for p in parameters:
            p.grad = None
        (F.cross_entropy(model(X) + outside, Y) * scale).backward()
        given = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
        for own, theirs, indices in zip(masters, optimizers, held, strict=True):
            for p, twin in zip(parameters, twins, strict=True):
                # Only the present update is judged: what came before is the masters'.
                twin.data.copy_(p.detach().float())
                assert p.grad is not None
                twin.grad = p.grad / scale
            before = [p.detach().clone() for p in parameters]
            assert own.step(scale)
            theirs.step()
            for i, (p, twin) in enumerate(zip(parameters, twins, strict=True)):
                if i in indices:
                    assert within_one_rounding(p.detach(), twin.detach())
                else:
                    assert torch.equal(p.detach(), before[i])
        # Whoever comes next finds them as the backward pass left them.
        assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, given, strict=True))


@pytest.mark.parametrize("kind", ["sgd", "rmsprop"])
def test_an_infinity_anywhere_in_what_moves_skips_the_step(kind: str) -> None:
    model, outside = converted(), nn.Parameter(torch.zeros(4))
    masters = MasterWeights(model, OPTIMIZERS[kind]([*model.parameters(), outside]), FP8)
    (F.cross_entropy(model(X) + outside, Y) * SCALE).backward()
    outside.grad[2] = math.inf  # type: ignore[index]
    before = copy.deepcopy(model.state_dict())
    assert not masters.step(SCALE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert outside.abs().max() == 0


@pytest.mark.parametrize("kind", ["sgd", "rmsprop"])
def test_what_lies_outside_of_the_model_counts_in_the_norm(kind: str) -> None:
    model, outside = converted(), nn.Parameter(torch.zeros(4))
    masters = MasterWeights(model, OPTIMIZERS[kind]([*model.parameters(), outside]), FP8)
    (F.cross_entropy(model(X) + outside, Y) * SCALE).backward()
    grads = [p.grad / SCALE for p in (*model.parameters(), outside)]
    assert masters.step(SCALE, clip_norm=1e-3)
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert masters.grad_norm == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "rmsprop"])
def test_a_norm_whose_square_is_beyond_fp32_clips_and_does_not_stop(kind: str) -> None:
    model = converted()
    masters = MasterWeights(model, OPTIMIZERS[kind](model.parameters()), FP8)
    for parameter in model.parameters():
        parameter.grad = torch.full(parameter.shape, 1e20)
    before = copy.deepcopy(model.state_dict())
    assert masters.step(clip_norm=1.0)
    assert masters.grad_norm == pytest.approx(1e20 * math.sqrt(sum(p.numel() for p in model.parameters())))
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("size", [1e-25, 1e-40, 3e38])
def test_a_norm_is_that_of_fp64(kind: str, size: float) -> None:
    model = converted()
    masters = MasterWeights(model, OPTIMIZERS[kind](model.parameters()), FP8)
    for parameter in model.parameters():
        parameter.grad = torch.full(parameter.shape, size)
    assert masters.step()
    value, count = float(torch.tensor(size)), sum(p.numel() for p in model.parameters())
    assert masters.grad_norm == pytest.approx(value * math.sqrt(count), rel=1e-6)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_a_group_that_is_added_later_moves_by_the_unscaled_gradient(kind: str) -> None:
    model, head = converted(), nn.Parameter(torch.ones(4))
    masters = MasterWeights(model, OPTIMIZERS[kind](model.parameters()), FP8)
    masters.optimizer.add_param_group({"params": [head]})
    twin = nn.Parameter(torch.ones(4))
    theirs = OPTIMIZERS[kind]([twin])
    (F.cross_entropy(model(X) * head, Y) * SCALE).backward()
    twin.grad = head.grad / SCALE  # type: ignore[operator]
    assert masters.step(SCALE)
    theirs.step()
    assert within_one_rounding(head.detach(), twin.detach())


def test_sparse_gradients_are_unscaled_and_checked() -> None:
    model = converted(nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4)))
    table = model[0].weight
    masters = MasterWeights(model, torch.optim.SparseAdam([table], lr=0.1), FP8)
    assert table.dtype == torch.float32
    twin = nn.Parameter(table.detach().clone())
    theirs = torch.optim.SparseAdam([twin], lr=0.1)
    (model(torch.tensor([1, 3, 3])).square().sum() * SCALE).backward()
    assert table.grad.is_sparse
    twin.grad = table.grad / SCALE
    assert masters.step(SCALE)
    theirs.step()
    assert within_one_rounding(table.detach(), twin.detach())
    table.grad = table.grad * math.inf
    assert not masters.step(SCALE)


def hooks() -> Iterator[list[str]]:
    called: list[str] = []
    handle = register_optimizer_step_post_hook(lambda *_: called.append("step"))
    yield called
    handle.remove()


def test_hooks_of_all_optimizers_and_a_step_that_was_replaced_are_honoured() -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masters = MasterWeights(model, optimizer, FP8)
    for called in hooks():
        F.cross_entropy(model(X), Y).backward()
        assert masters.step()
        assert called == ["step"]
    calls = []
    own = optimizer.step
    optimizer.step = lambda *arguments: (calls.append("mine"), own(*arguments))[1]  # type: ignore[method-assign]
    assert masters.step()
    assert calls == ["mine"]


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_a_step_past_the_masters_is_refused(kind: str) -> None:
    model = converted()
    masters = MasterWeights(model, OPTIMIZERS[kind](model.parameters()), FP8)
    scaler = torch.amp.GradScaler("cpu")
    F.cross_entropy(model(X), Y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"step: got a call on master weights, expected MasterWeights.step\(scale\)"):
        masters.optimizer.step()
    scaler.scale(torch.zeros(()))
    with pytest.raises(UserError, match="step: got a call on master weights"):
        scaler.step(masters.optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert masters.step()


def test_parameters_that_were_replaced_under_the_optimizer_are_named() -> None:
    model = converted()
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.1), FP8)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(UserError, match=r"optimizer: it holds another 0.weight than the model"):
        masters.step()


def test_a_single_layer_that_was_replaced_is_named_too() -> None:
    model = converted()
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.1), FP8)
    model[2] = copy.deepcopy(model[2])
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(UserError, match=r"optimizer: it holds another 2.weight than the model"):
        masters.step()
    # What has no gradient is not missed, what is frozen later neither, nor what another optimizer took over.
    model = converted()
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.1), FP8)
    model[0].requires_grad_(False)
    F.cross_entropy(model(X), Y).backward()
    assert masters.step()
    masters.optimizer.param_groups[0]["params"].pop(2)
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    assert masters.step()


def test_every_update_draws_its_own_bits_where_no_step_is_begun() -> None:
    count, updates = 20_000, 64
    layer = nn.Linear(count, 1, bias=False)
    nn.init.ones_(layer.weight)
    model = nn.Sequential(layer)
    recipe = replace(FP8, exempt=())
    inject(model, recipe)
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=1.0), recipe)
    for _ in range(updates):
        # An eighth of the spacing above 1.
        layer.weight.grad = torch.full((1, count), -(2.0**-13))
        assert masters.step()
    moved = (layer.weight.detach().double() - 1) * 2**10
    # A binomial sum: mean 8, variance 64 * 1/8 * 7/8.
    assert abs(float(moved.mean()) - updates / 8) < 3 * math.sqrt(updates * 7 / 64 / count)
    assert float(moved.var()) == pytest.approx(updates * 7 / 64, rel=0.05)


def test_stochastic_weights_draw_new_bits_behind_a_backward_pass_where_no_step_is_begun() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    inject(model, replace(FP8, weight=Rounding(rounding="stochastic"), exempt=()))
    site = model[0].site
    codes = []
    for _ in range(2):
        result = model(torch.ones(1, 64)) + model(torch.ones(1, 64))
        codes.append(site.working_weight.clone())  # type: ignore[operator, union-attr]
        result.sum().backward()
    differing = (codes[0].float() != codes[1].float()).float().mean()
    assert 0.2 < float(differing) < 0.6


def test_settings_that_cannot_be_honoured_are_refused() -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="optimizer: got LBFGS, whose step needs a closure"):
        MasterWeights(model, torch.optim.LBFGS(model.parameters()), FP8)
    with pytest.raises(UserError, match="context: got another than the model's"):
        MasterWeights(model, optimizer, FP8, StepContext())
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        centres = nn.Parameter(torch.zeros(4, dtype=dtype))
        with pytest.raises(UserError, match=rf"optimizer: param_groups.0.params.0 is {dtype}, expected torch.float32"):
            MasterWeights(model, torch.optim.SGD([centres], lr=0.1), FP8)
    masters = MasterWeights(model, optimizer, FP8)
    # By 2^200 FP32 gradients would be divided to zeros.
    for scale in (0.0, -1.0, math.nan, math.inf, 2.0**200, 2**200, 1e-45, "x", None):
        with pytest.raises(UserError, match=r"scale: got .*, expected a number from 2\^-126 to under 2\^128"):
            masters.step(scale)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"clip_norm: got 0\.0, expected a number over 0"):
        masters.step(1.0, clip_norm=0.0)
