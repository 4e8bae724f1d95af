"""Random bits belong to the place of a forward pass, whatever begins before its backward pass; places are numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8repro.errors import UserError
from fp8repro.models.gnmt import LSTMLayer
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

FP8, STOCHASTIC = load_recipe("fp8"), load_recipe("fp8_stochastic")
X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 4


def network(recipe: Any = STOCHASTIC) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    inject(model, recipe, StepContext(seed=4))
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def one_after_the_other(model: Any, places: list[tuple[int, int]]) -> list[Tensor]:
    for place in places:
        model.fp8_context.begin(*place)
        F.cross_entropy(model(X), Y).backward()
    return gradients(model)


@pytest.mark.parametrize("places", [[(0, 0), (0, 1)], [(3, 0), (4, 0)]])
@pytest.mark.parametrize("recipe", [FP8, STOCHASTIC, load_recipe("fp8_sequence")])
def test_a_backward_pass_draws_as_its_forward_pass_stands(places: list[tuple[int, int]], recipe: Any) -> None:
    models = [network(recipe) for _ in range(2)]
    right = one_after_the_other(models[0], places)
    losses = []
    for place in places:
        models[1].fp8_context.begin(*place)
        losses.append(F.cross_entropy(models[1](X), Y))
    (losses[0] + losses[1]).backward()
    assert all(torch.equal(a, b) for a, b in zip(right, gradients(models[1]), strict=True))
    # Both are where they were: what a loop does next is the next place's.
    assert models[1].fp8_context.place == places[1]


@pytest.mark.parametrize("recurrent_gradients", ["step", "sequence"])
def test_a_recurrent_weights_gradient_does_too(recurrent_gradients: str) -> None:
    found = []
    for together in (False, True):
        torch.manual_seed(0)
        model: Any = nn.ModuleList([LSTMLayer(8, 8)])
        inject(model, replace(FP8, exempt=(), recurrent_gradients=recurrent_gradients), StepContext(seed=4))
        losses = []
        for step in range(2):
            model.fp8_context.begin(step)
            losses.append(model[0](X.view(4, 8, 8))[0].square().sum())
            if not together:
                losses[-1].backward()
        if together:
            torch.autograd.backward(losses)
        found.append(gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_recomputation_whose_step_is_over_is_told_which_it_repeats_or_refused() -> None:
    right = one_after_the_other(network(), [(0, 0), (0, 1)])
    for told in (True, False):
        model = network()
        losses = []
        for micro_step in range(2):
            model.fp8_context.begin(0, micro_step)
            options = {"context_fn": model.fp8_context.recomputation} if told else {}
            losses.append(F.cross_entropy(checkpoint(model, X, use_reentrant=False, **options), Y))
        if told:
            (losses[0] + losses[1]).backward()
            assert all(torch.equal(a, b) for a, b in zip(right, gradients(model), strict=True))
        else:
            with pytest.raises(UserError, match=r"layer \d: got recomputed .* after context\.begin\(\) came between"):
                (losses[0] + losses[1]).backward()


def test_a_batch_that_was_left_out_is_forgotten_with_the_next_backward_pass() -> None:
    model = network()
    model.fp8_context.begin(0)
    model(X)
    model.fp8_context.begin(1)
    F.cross_entropy(model(X), Y).backward()
    model.fp8_context.begin(2)
    model.zero_grad()
    F.cross_entropy(checkpoint(model, X, use_reentrant=False), Y).backward()
    found = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(one_after_the_other(network(), [(2, 0)]), found, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_frozen_part_that_is_recomputed_waits_for_nothing(reentrant: bool) -> None:
    model = network()
    model[0].requires_grad_(False)
    for step in range(3):
        model.fp8_context.begin(step)
        x = X.clone().requires_grad_(reentrant)
        F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), Y).backward()
    assert model[2].weight.grad is not None


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "jvp"])
@pytest.mark.parametrize("first", ["linear", "embedding"])
def test_transforms_of_functions_are_refused_by_name(transform: str, first: str) -> None:
    model: Any = network(FP8)
    inputs: Any = X
    if first == "embedding":
        model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))
        inject(model, FP8)
        MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.1), FP8)
        inputs = torch.arange(8)
    weights = {name: p.detach().float() for name, p in model[1:].named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        rest = torch.func.functional_call(model[1:], weights, (model[0](inputs),))
        return rest.square().sum()  # type: ignore[no-any-return]

    call = {
        "grad": lambda: torch.func.grad(loss)(weights),
        "vmap": lambda: torch.func.vmap(model)(inputs),
        "jacrev": lambda: torch.func.jacrev(loss)(weights),
        "jvp": lambda: torch.func.jvp(loss, (weights,), (weights,)),
    }[transform]
    with pytest.raises(UserError, match=r"(layer \d|Embedding): got called in a transform of torch\.func"):
        call()
    # `functional_call` alone is none.
    assert torch.func.functional_call(model, dict(model.named_parameters()), (inputs,)).isfinite().all()


@pytest.mark.parametrize("number", [3, np.int64(3), torch.tensor(3)])
def test_steps_of_any_whole_number_are_the_same_step(number: Any) -> None:
    right = one_after_the_other(network(), [(3, 0)])
    assert all(torch.equal(a, b) for a, b in zip(right, one_after_the_other(network(), [(number, 0)]), strict=True))


@pytest.mark.parametrize(
    ("name", "given"),
    # The bits of 2^64 would be those of 0.
    [("seed", 1.0), ("seed", "1"), ("seed", -1), ("seed", 2**64), ("rank", None), ("rank", 0.5)],
)
def test_seeds_and_ranks_that_name_no_stream_of_their_own(name: str, given: Any) -> None:
    with pytest.raises(UserError, match=rf"^{name}: got .*, expected a whole number"):
        StepContext(**{name: given})


@pytest.mark.parametrize("given", [3.0, math.nan, "3", None, torch.tensor(3.0)])
def test_steps_that_are_no_whole_numbers(given: Any) -> None:
    with pytest.raises(UserError, match=r"^step: got .*, expected a whole number"):
        StepContext().begin(given)
    with pytest.raises(UserError, match=r"^micro_step: got .*, expected a whole number"):
        StepContext().begin(0, given)


def test_stochastic_weights_are_those_of_the_step_of_the_forward_pass() -> None:
    recipe = replace(FP8, weight=Rounding(rounding="stochastic"))
    right = one_after_the_other(network(recipe), [(3, 0), (4, 0)])
    model = network(recipe)
    losses = []
    for step in (3, 4):
        model.fp8_context.begin(step)
        losses.append(F.cross_entropy(model(X), Y))
    torch.autograd.backward(losses)
    assert all(torch.equal(a, b) for a, b in zip(right, gradients(model), strict=True))
