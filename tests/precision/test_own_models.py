"""Models of other people: products by functions are rounded, reported, copied and counted; layers of one's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro import register_layer
from fp8repro.errors import UserError
from fp8repro.numerics import reference
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.precision import registry
from fp8repro.precision.context import StepContext
from fp8repro.precision.functional import LINEAR, quantized_product
from fp8repro.precision.injection import inject, sites
from fp8repro.precision.site import Site
from fp8repro.settings.recipes import load_recipe

FP8 = replace(load_recipe("fp8"), exempt=())
STOCHASTIC = Rounding(rounding="stochastic")
ALL = replace(FP8, weight=STOCHASTIC, activation=STOCHASTIC, error=STOCHASTIC, gradient=STOCHASTIC)


class Attention(nn.Module):
    """Attention as people write it: a projection by its layer, one by its weight, scores by an operator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.linear(torch.softmax(q @ k.transpose(-1, -2), -1) @ v, self.out)


def network() -> nn.Sequential:
    return nn.Sequential(Attention(), nn.LayerNorm(8), Attention())


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
PLACES = ["qkv", "fp8_products.matmul_0", "fp8_products.matmul_1", "fp8_products.linear_0"]


def gradients(model: Any, step: int = 0) -> list[Tensor]:
    model.zero_grad()
    model.fp8_context.begin(step)
    result = model(X)
    result.square().sum().backward()
    return [result, *(p.grad for p in model.parameters())]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_products_by_functions_are_rounded_once_and_named_by_their_modules() -> None:
    model = network()
    inject(model, ALL, StepContext(seed=3), backend="emulate")
    context: Any = model.fp8_context
    seen: list[tuple[str, str, tuple[Tensor, ...]]] = []

    def note(layer: str, product: str, operands: Any) -> None:
        seen.append((layer, product, tuple(o.codes for o in operands)))

    with context.observe(note):
        gradients(model)
    assert [name for name, product, _ in seen if product == "forward"] == [f"{i}.{p}" for i in (0, 2) for p in PLACES]
    assert all(codes.dtype == torch.float8_e5m2 for _, _, operands in seen for codes in operands)
    # The weight that a function uses is rounded as the reference rounds it under its name.
    (weight,) = (o[1] for name, product, o in seen if (name, product) == ("0.fp8_products.linear_0", "forward"))
    stream = context.stream_number("0.fp8_products.linear_0", 0, "weight", "weight")
    exact = reference.round_to_format(model[0].out.detach(), STOCHASTIC, RandomBits(3, stream))  # type: ignore[arg-type]
    assert torch.equal(weight.float(), exact)


def test_every_pass_draws_the_bits_of_its_step_and_the_first_is_no_exception() -> None:
    passes = []
    for first in (0, 1):
        model = network()
        inject(model, ALL, StepContext(seed=3), backend="emulate")
        for step in range(first, 3):
            passes.append((step, gradients(model, step)))
    same = {step: [found for s, found in passes if s == step] for step in (1, 2)}
    for first, second in same.values():
        assert_same(first, second)
    assert not torch.equal(same[1][0][0], same[2][0][0])


@pytest.mark.parametrize("when", ["fresh", "ran"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_give_their_products_by_functions_to_the_recipe(when: str, how: Any) -> None:
    model = network()
    inject(model, ALL, StepContext(seed=3), backend="emulate")
    if when == "ran":
        model(X)
    other = how(model)
    assert_same(gradients(model), gradients(other))
    assert list(sites(other)) == list(sites(model)) == [f"{i}.{p}" for i in (0, 2) for p in sorted(PLACES, key=order)]
    assert other.fp8_context is not model.fp8_context


def order(place: str) -> int:
    """Children come in the order in which they were made."""
    return PLACES.index(place)


def test_evaluation_rounds_products_by_functions_to_nearest() -> None:
    model = network()
    inject(model, ALL, backend="emulate")
    model(X)
    model.eval()
    assert torch.equal(model(X), model(X))
    nearest = copy.deepcopy(network())
    inject(nearest, replace(FP8, activation=Rounding(), weight=Rounding()), backend="emulate")
    assert torch.equal(model(X), nearest.eval()(X))


def test_patterns_leave_and_exempt_products_by_functions() -> None:
    model = network()
    recipe = replace(FP8, exempt=("*.fp8_products.linear_0",))
    report = inject(model, recipe, leave=["0.fp8_products.matmul_*"])
    model(X)
    assert report.names("exempt") == ["0.fp8_products.linear_0", "2.fp8_products.linear_0"]
    assert report.without_owner() == ["0: matmul"]
    assert [n for n in report.names("converted") if "matmul" in n] == [f"2.fp8_products.matmul_{i}" for i in (0, 1)]
    whole = network()
    report = inject(whole, FP8, leave=["2", "2.*"])
    whole(X)
    assert not [name for name in sites(whole) if name.startswith("2")]
    assert sorted(report.without_owner()) == ["2.qkv: linear", "2: linear", "2: matmul"]


def test_attention_products_are_an_option_in_other_peoples_modules_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theirs, self.torchs = Attention(), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.torchs(self.theirs(x), x, x)[0]

    model = Both()
    report = inject(model, replace(FP8, attention_products=False))
    model(X)
    assert not [name for name in sites(model) if "matmul" in name or "attention." in name]
    assert {line.split(": ")[1] for line in report.without_owner()} == {"matmul"}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
        (nn.ConvTranspose1d(4, 3, 3, stride=2), (2, 4, 5)),
        (nn.ConvTranspose2d(4, 3, 3, stride=2), (2, 4, 5, 3)),
        (nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 2, 3)),
    ],
)
@pytest.mark.parametrize("backend", ["emulate", "auto"])
def test_convolutions_of_all_kinds_count_channels_last(layer: nn.Module, shape: tuple[int, ...], backend: str) -> None:
    """Of small integers, whose sums are exact, so that bytes do not depend on their order."""
    generator = torch.Generator().manual_seed(0)

    def integers(sizes: Any) -> Tensor:
        return torch.randint(-40, 41, tuple(sizes), generator=generator) / 4

    plain = copy.deepcopy(layer)
    model = nn.Sequential(copy.deepcopy(layer))
    inject(model, ALL, backend=backend)
    weight: Tensor = model[0].weight  # type: ignore[assignment]
    with torch.no_grad():
        weight.copy_(integers(weight.shape))
        model[0].bias.zero_()  # type: ignore[union-attr, operator]
        plain.bias.zero_()  # type: ignore[union-attr, operator]
    context: Any = model.fp8_context
    context.begin(3)

    def rounded(x: Tensor, name: str, role: str) -> Tensor:
        bits = RandomBits(context.seed, context.stream_number("0", 0, name, role), "channels_last")
        return reference.round_to_format(x, Rounding(E5M2, "stochastic"), bits)

    x = integers(shape).requires_grad_()
    y = model(x)
    error = integers(y.shape)
    grad_x, grad_weight = torch.autograd.grad(y, [x, weight], error)
    with torch.no_grad():
        plain.weight.copy_(rounded(weight.detach(), "weight", "weight"))  # type: ignore[union-attr, operator]
    qx = rounded(x.detach(), "input", "activation").requires_grad_()
    exact = plain(qx)
    assert torch.equal(y.detach(), rounded(exact.detach(), "output", "activation"))
    right = torch.autograd.grad(exact, [qx, plain.weight], rounded(error, "output_error", "error"))  # type: ignore[list-item]
    assert torch.equal(grad_x, rounded(right[0], "input_error", "error"))
    assert torch.equal(grad_weight, rounded(right[1], "weight_gradient", "gradient"))


# Layers of one's own


class Scaled(nn.Module):
    """A layer that no one knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight)


class FP8Scaled(Scaled):
    site: Site

    def forward(self, x: Tensor) -> Tensor:
        return 2 * quantized_product(x, self.weight, None, self.site, LINEAR, self.training)

    def multiply_adds(self, inputs: tuple[Any, ...], output: Tensor) -> int:
        return output.numel() * 8


@pytest.fixture
def known() -> Iterator[None]:
    before = dict(registry._CONVERTED)
    yield
    registry._CONVERTED.clear()
    registry._CONVERTED.update(before)


@pytest.mark.usefixtures("known")
def test_layers_of_ones_own_are_converted_named_exempt_and_counted() -> None:
    register_layer(Scaled, FP8Scaled)
    for kind in (Scaled, nn.Linear):
        with pytest.raises(UserError, match=rf"register_layer: got {kind.__name__}, which is converted to"):
            register_layer(kind, type("Other", (kind,), {}))
    with pytest.raises(UserError, match=r"register_layer: got .*, expected a subclass of"):
        register_layer(nn.Bilinear, FP8Scaled)
    model = nn.Sequential(nn.Linear(8, 8), Scaled())
    report = inject(model, replace(FP8, exempt=("1",)))
    model(X)
    assert type(model[1]) is FP8Scaled
    assert report.names("exempt") == ["1"]
    assert report.share("exempt") == pytest.approx(4 / 12)
    assert report.never_ran() == []


class Stopped(Exception):
    """What ends a pass in the tests."""


class Stopping(nn.Module):
    """A layer, then a product by a function; raises `error` before or behind the product."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.layer, self.weight, self.before = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), before
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.error is not None and self.before:
            raise self.error
        x = x @ self.weight
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("which", [0, 1], ids=("first", "later"))
@pytest.mark.parametrize("before", [True, False], ids=("before", "behind"))
@pytest.mark.parametrize("error", [Stopped(), KeyboardInterrupt()], ids=("error", "interrupt"))
def test_a_pass_that_was_stopped_leaves_nothing_behind_and_misses_nothing(
    error: BaseException, before: bool, which: int
) -> None:
    torch.manual_seed(0)
    model, x = Stopping(before), torch.randn(4, 8)
    clean = copy.deepcopy(model)
    reports = [inject(each, "fp8_nearest") for each in (model, clean)]
    for _ in range(which):
        model(x)
    model.error = error
    with pytest.raises(type(error)):
        model(x)
    a, b = torch.full((2, 8), 0.3), torch.full((8, 2), 0.3)
    torch.testing.assert_close(a @ b, torch.full((2, 2), 0.72))
    model.error = None
    assert torch.equal(model(x), clean(x))
    assert torch.equal(model(x), clean(x))
    assert torch.overrides._get_current_function_mode() is None
    assert model.fp8_context.observers == []
    assert reports[0].table() == reports[1].table()
    assert not any(reports[0].without_owner())


class Scores(nn.Sequential):
    """A container with a product of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x @ x.t()


def test_containers_keep_their_children_and_their_products_are_named() -> None:
    model = Scores(nn.Linear(8, 8), nn.Linear(8, 8))
    report = inject(model, replace(load_recipe("fp8"), exempt=()))
    x = torch.randn(4, 8)
    assert torch.equal(model.eval()(x), model(x))
    assert len(model) == 2
    assert report.without_owner() == ["the model: matmul"]


def test_the_norm_of_a_weight_is_no_product_of_the_recipe() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).eval()
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))
    norm = layer.weight.clone()
    report = inject(model, "fp8_nearest")
    for _ in range(2):
        model(torch.randn(4, 8))
        assert torch.equal(layer.weight, norm)
    assert report.names("converted") == ["0", "1.fp8_products.linear_0"]


@pytest.mark.filterwarnings("ignore:inject. no product of the first")
def test_leaving_an_attention_layer_leaves_all_of_it() -> None:
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(3, 2, 8)
    model = nn.ModuleList([layer, nn.Linear(8, 8)])
    expected = layer(x, x, x)[0]
    report = inject(model, "fp8", leave=["0"])
    assert torch.equal(layer(x, x, x)[0], expected)
    assert report.names("left") == ["0", "0.out_proj"]


class Iterating(nn.Module):
    """Calls its children one after the other, and multiplies by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x @ x.t()


def test_modules_that_call_all_of_their_children_are_told_what_to_leave() -> None:
    model, x = nn.Sequential(Iterating()), torch.randn(4, 8)
    inject(model, "fp8")
    model(x)
    with pytest.raises(UserError, match=r"expected inject\(..., leave=\['0.fp8_products.\*'\]\)"):
        model(x)
    model = nn.Sequential(Iterating())
    inject(model, "fp8", leave=["0.fp8_products.*"])
    assert torch.equal(model.eval()(x), model(x))
