"""Masters in 16 bit that are copied, averaged, pickled, assigned and loaded: FP32 gradients, state and averages."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fp8repro.errors import UserError
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

FP8 = load_recipe("fp8")
TOKENS, Y = torch.arange(32).view(8, 4) % 9, torch.arange(8) % 4
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),  # has no fused form here
}


class Tied(nn.Module):
    """An embedding, a convolution, a linear layer, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(9, 8), nn.Conv1d(4, 4, 3, padding=1)
        self.inner, self.head = nn.Linear(32, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.inner(self.conv(self.embedding(tokens)).flatten(1)).relu())
        return result


def converted() -> Any:
    torch.manual_seed(0)
    model = Tied()
    inject(model, FP8, StepContext(seed=6))
    return model


def train(model: Any, masters: MasterWeights, steps: range) -> list[Tensor]:
    for step in steps:
        model.fp8_context.begin(step)
        model.zero_grad()
        (F.cross_entropy(model(TOKENS), Y) * 1e4).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        assert masters.step(1e4)
    return [p.detach().float().clone() for p in model.parameters()]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def trained(kind: str) -> tuple[Any, MasterWeights]:
    model = converted()
    masters = MasterWeights(model, OPTIMIZERS[kind](model.parameters()), FP8)
    assert model.conv.weight.dtype == model.embedding.weight.dtype == torch.float16
    train(model, masters, range(2))
    return model, masters


def saved_and_loaded(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("roundtrip", [copy.deepcopy, saved_and_loaded])
def test_a_model_and_its_masters_go_on_as_a_copy(kind: str, roundtrip: Callable[[Any], Any]) -> None:
    model, masters = trained(kind)
    other, its_masters = roundtrip((model, masters))
    assert its_masters.context is other.fp8_context is not model.fp8_context
    assert other.head.weight is other.embedding.weight
    with pytest.raises(UserError, match="step: got a call on master weights"):
        its_masters.optimizer.step()
    assert_same(train(model, masters, range(2, 5)), train(other, its_masters, range(2, 5)))


def test_weights_that_are_assigned_are_fp32_until_they_are_masters() -> None:
    model, masters = trained("adam")
    other = converted()
    state = copy.deepcopy(model.state_dict())
    other.load_state_dict(state, assign=True)
    other.head.weight = other.embedding.weight
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert state["conv.weight"].dtype == torch.float16
    its_masters = MasterWeights(other, OPTIMIZERS["adam"](other.parameters()), FP8)
    its_masters.load_state_dict(copy.deepcopy(masters.state_dict()))
    assert_same(train(model, masters, range(2, 4)), train(other, its_masters, range(2, 4)))


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("through", ["masters", "optimizer", "optimizer before"])
def test_an_optimizers_state_is_loaded_in_fp32(kind: str, through: str) -> None:
    model, masters = trained(kind)
    saved = copy.deepcopy((model.state_dict(), masters.state_dict()))
    other = converted()
    optimizer = OPTIMIZERS[kind](other.parameters())
    if through == "optimizer before":
        optimizer.load_state_dict(saved[1])
    its_masters = MasterWeights(other, optimizer, FP8)
    other.load_state_dict(saved[0])
    if through != "optimizer before":
        (its_masters if through == "masters" else optimizer).load_state_dict(saved[1])
    assert_same(train(model, masters, range(2, 5)), train(other, its_masters, range(2, 5)))


def test_a_state_that_does_not_fit_leaves_masters_in_16_bit() -> None:
    model, masters = trained("adam")
    state = masters.state_dict()
    state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:-1]
    with pytest.raises(ValueError, match="doesn't match the size"):
        masters.load_state_dict(state)
    assert model.conv.weight.dtype == torch.float16
    train(model, masters, range(2, 3))


def test_a_weight_in_16_bit_of_any_origin_gets_its_gradient_in_fp32() -> None:
    model, _ = trained("adam")
    other = converted()
    # Another model's masters themselves, and copies of them.
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    assert other.conv.weight is model.conv.weight
    for layer in (other.embedding, other.conv, other.inner, other.head):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        assert layer.weight.dtype == torch.float16
    F.cross_entropy(other(TOKENS), Y).backward()
    assert all(p.grad.dtype == torch.float32 for p in other.parameters())
    assert model.conv.weight.dtype == torch.float16


def test_processes_share_the_memory_of_masters() -> None:
    model, _ = trained("adam")
    model.share_memory()
    memory = io.BytesIO()
    ForkingPickler(memory).dump(model.conv)
    other = pickle.loads(memory.getvalue())
    assert other.weight.dtype == torch.float16
    with torch.no_grad():
        other.weight.fill_(3.0)
    assert (model.conv.weight == 3).all()


@pytest.mark.parametrize("roundtrip", [copy.deepcopy, saved_and_loaded])
def test_a_copys_weights_are_fp32_and_compute_the_same(roundtrip: Callable[[Any], Any]) -> None:
    model, _ = trained("adam")
    other = roundtrip(model)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert model.conv.weight.dtype == torch.float16
    assert_same([p.float() for p in model.parameters()], list(other.parameters()))
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS), other.eval()(TOKENS))
    # An optimizer of its own moves FP32 numbers.
    F.cross_entropy(other.train()(TOKENS), Y).backward()
    torch.optim.AdamW(other.parameters(), lr=1e-6).step()
    assert not torch.equal(other.conv.weight, other.conv.weight.half().float())


def test_averages_that_are_kept_in_a_copy_do_not_stall() -> None:
    model, masters = trained("adam")
    # Decays of 0.999 move an average by less than FP16's spacing.
    average = AveragedModel(model, avg_fn=lambda average, new, _: 0.999 * average + 0.001 * new)
    exact = None
    for step in range(2, 12):
        train(model, masters, range(step, step + 1))
        average.update_parameters(model)
        now = model.conv.weight.detach().double()
        exact = now if exact is None else 0.999 * exact + 0.001 * now
    found = average.module.conv.weight.detach().double()
    assert (found - exact).abs().max() < 1e-6
    # FP16 has a spacing of 2^-13 and more there.
    assert (found - found.half().double()).abs().max() > 1e-6


def test_torchs_average_of_masters_in_fp32_is_exact() -> None:
    model = converted()
    masters = MasterWeights(model, OPTIMIZERS["adam"](model.parameters()), FP8, narrow=False)
    average = AveragedModel(model)
    sums = torch.zeros(model.conv.weight.shape, dtype=torch.float64)
    for step in range(4):
        train(model, masters, range(step, step + 1))
        average.update_parameters(model)
        sums += model.conv.weight.detach().double()
    torch.testing.assert_close(average.module.conv.weight.double(), sums / 4, rtol=0, atol=1e-6)


def test_weights_beyond_the_masters_range_are_refused_and_nothing_is_stored() -> None:
    model = converted()
    with torch.no_grad():
        model.inner.weight[0, 0] = -1e5
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with pytest.raises(UserError, match=r"optimizer: inner.weight holds 100000, expected at most 65504, .* in fp16"):
        MasterWeights(model, optimizer, FP8)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    MasterWeights(model, optimizer, load_recipe("fp32"))


def test_a_model_that_is_converted_under_its_masters_is_refused() -> None:
    model = Tied()
    masters = MasterWeights(model, OPTIMIZERS["adam"](model.parameters()), "fp8")
    inject(model, "fp8")
    F.cross_entropy(model(TOKENS), Y).backward()
    with pytest.raises(UserError, match=r"model: got converted after MasterWeights was made of it"):
        masters.step()


def test_masters_take_the_name_of_a_recipe() -> None:
    model = converted()
    assert MasterWeights(model, OPTIMIZERS["adam"](model.parameters()), "fp8").spec == FP8.master
    for recipe, expected in (("fp9", "precision: got 'fp9', expected one of"), (None, "recipe: got None")):
        with pytest.raises(UserError, match=expected):
            MasterWeights(model, OPTIMIZERS["adam"](model.parameters()), recipe)  # type: ignore[arg-type]
