"""Converted layers and products by functions, roundings switched off, equal torch's: forward, gradients, options."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from fp8repro.numerics.recipe import ROLES
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.injection import inject, sites
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

FP8 = replace(load_recipe("fp8"), exempt=())
IDENTITY = Rounding(format="fp32")
# Some are a single product by a function, which is found later.
pytestmark = pytest.mark.filterwarnings("ignore:inject. the model has no layer")


def unrounded(model: nn.Module, *inputs: Any) -> nn.Module:
    """A copy of the model, converted, whose roundings are switched off; its first pass is made."""
    converted = copy.deepcopy(model)
    inject(converted, FP8, backend="emulate")
    with torch.no_grad():
        converted(*inputs)
    assert sites(converted)
    for site in sites(converted).values():
        site.roles = dict.fromkeys(ROLES[:4], IDENTITY)
    return converted


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def everything(model: nn.Module, *inputs: Any) -> list[Tensor]:
    """Results, and gradients of inputs and parameters for a loss that weighs every result differently."""
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    torch.manual_seed(5)
    results = flat(model(*leaves))
    loss = sum(((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in results), torch.zeros(()))
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad] + list(model.parameters())
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*results, *(torch.zeros(()) if g is None else g for g in grads)]


def assert_same(model: nn.Module, *inputs: Any) -> nn.Module:
    converted = unrounded(model, *inputs)
    for found, right in zip(everything(converted, *inputs), everything(model, *inputs), strict=True):
        torch.testing.assert_close(found, right, rtol=2e-5, atol=5e-6)
    assert list(converted.state_dict()) == list(model.state_dict())
    return converted


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1, groups=2), (2, 6, 9)),
        (lambda: nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 7)),
        (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="reflect", bias=False), (3, 7)),
        (lambda: nn.Conv3d(4, 6, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 1), groups=2), (2, 4, 5, 6, 3)),
        (lambda: nn.Conv3d(2, 3, 3, padding="same", dilation=2), (2, 5, 5, 5)),
        (lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"), (1, 2, 4, 4, 4)),
        (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, dilation=(2, 1), bias=False), (2, 4, 5, 3)),
        (lambda: nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1), (4, 5, 3)),
        (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, padding=1, groups=2), (2, 4, 3, 4, 3)),
    ],
)
def test_convolutions_compute_what_torchs_do(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert_same(make(), torch.randn(shape))


def test_transposed_convolutions_honour_the_size_asked_for() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[10, 11])

    assert_same(Sized(), torch.randn(2, 2, 4, 5))


RECURRENT = [
    (kind, {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias, **extra})
    for kind, extras in ((nn.LSTM, ({}, {"proj_size": 3})), (nn.GRU, ({},)), (nn.RNN, ({}, {"nonlinearity": "relu"})))
    for extra in extras
    for layers, both, first, bias in ((1, False, False, True), (2, True, True, True), (3, True, False, False))
]


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
@pytest.mark.parametrize("given", ["batch", "one", "packed", "unsorted", "states"])
def test_recurrent_layers_compute_what_torchs_do(kind: type[nn.Module], options: dict[str, Any], given: str) -> None:
    torch.manual_seed(0)
    model = kind(4, 5, **options)

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model

        def forward(self, x: Tensor, *states: Tensor) -> Any:
            steps: Any = x
            if given == "packed":
                steps = pack_padded_sequence(x, [6, 4, 1], batch_first=options["batch_first"])
            elif given == "unsorted":
                rows = x if options["batch_first"] else x.transpose(0, 1)
                steps = pack_sequence([rows[0, :2], rows[1, :6], rows[2, :5]], enforce_sorted=False)
            if not states:
                return self.layer(steps)
            return self.layer(steps, states if kind is nn.LSTM else states[0])

    x = torch.randn(6, 4) if given == "one" else torch.randn(*((3, 6) if options["batch_first"] else (6, 3)), 4)
    states = []
    if given in ("states", "unsorted"):
        directions = options["num_layers"] * (1 + options["bidirectional"])
        states = [torch.randn(directions, 3, options.get("proj_size", 5))]
        states += [torch.randn(directions, 3, 5)] if kind is nn.LSTM else []
    assert_same(Run(), x, *states)


def test_recurrent_layers_drop_between_their_layers_in_training_only() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(4, 5, num_layers=2, dropout=0.5)
    converted = unrounded(model, torch.randn(3, 2, 4))
    x = torch.randn(3, 2, 4)
    assert not torch.equal(converted(x)[0], converted(x)[0])
    assert torch.equal(converted.eval()(x)[0], converted(x)[0])
    torch.testing.assert_close(converted(x)[0], model.eval()(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_compute_what_torchs_do(kind: type[nn.Module]) -> None:
    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(4, 5)

        def forward(self, x: Tensor) -> Any:
            state = self.cell(x[0])
            return self.cell(x[1], state)

    torch.manual_seed(0)
    assert_same(Run(), torch.randn(2, 3, 4))


class Normed(nn.Module):
    """Two calls of a layer whose weight a hook computes, and a product of its own."""

    def __init__(self, norm: Callable[..., nn.Module], make: Callable[[], nn.Module], name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.weight = norm(make(), name), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        results = [(y[0] if isinstance(y, tuple) else y) @ self.weight for y in (self.layer(x), self.layer(2 * x))]
        return torch.stack(results)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [
        (lambda: nn.Linear(4, 6), "weight", (3, 4)),
        (lambda: nn.Conv2d(4, 5, 3, padding=1), "weight", (2, 4, 5, 6)),
        (lambda: nn.ConvTranspose1d(4, 5, 3, padding=1), "weight", (2, 4, 6)),
        (lambda: nn.LSTM(4, 6), "weight_hh_l0", (3, 2, 4)),
    ],
)
def test_weights_that_hooks_compute_are_torchs(
    norm: Callable[..., nn.Module], make: Callable[[], nn.Module], name: str, shape: tuple[int, ...]
) -> None:
    """Spectral norm goes on by an iteration at each call, which must not be rounded."""
    model, converted = Normed(norm, make, name), Normed(norm, make, name)
    x = torch.randn(shape)
    report = inject(converted, FP8, backend="emulate")
    for each in (model, converted):
        each(x)
    assert list(sites(converted)).count("layer") == 1
    assert [row for row in sites(converted) if "fp8_products" in row] == [f"fp8_products.linear_{i}" for i in (0, 1)]
    assert report.without_owner() == (["the model: mv", "the model: dot"] if norm is nn.utils.spectral_norm else [])
    for site in sites(converted).values():
        site.roles = dict.fromkeys(ROLES[:4], IDENTITY)
    for training in (True, False):
        pairs = zip(everything(converted.train(training), x), everything(model.train(training), x), strict=True)
        for found, right in (*pairs, *zip(converted.buffers(), model.buffers(), strict=True)):
            torch.testing.assert_close(found, right, rtol=2e-5, atol=5e-6)
    masters = MasterWeights(converted, torch.optim.SGD(converted.parameters(), lr=0.1), FP8)
    converted.train()(x).sum().backward()
    assert masters.step()


ATTENTION = [
    {"batch_first": first, "bias": bias, **extra}
    for (first, bias), extra in itertools.product(
        ((False, True), (True, False)),
        ({}, {"kdim": 6, "vdim": 10}, {"add_bias_kv": True}, {"add_zero_attn": True, "add_bias_kv": True}),
    )
]


@pytest.mark.parametrize("options", ATTENTION)
@pytest.mark.parametrize("given", ["self", "cross", "one", "masks", "float masks", "causal"])
def test_attention_computes_what_torchs_does(options: dict[str, Any], given: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, **options)
    # torch starts the biases at zero.
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    length, source = (5, 5) if given in ("self", "causal") else (5, 7)
    causal = torch.ones(length, source, dtype=torch.bool).triu(1)

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
            if given == "causal":
                hinted = self.attention(query, key, value, attn_mask=causal, is_causal=True, need_weights=False)
                return hinted, self.attention(query, key, value, attn_mask=causal)
            if given == "masks":
                padding = torch.arange(source) >= torch.tensor([[7], [4], [6]])
                return self.attention(query, key, value, padding, average_attn_weights=False, attn_mask=causal)
            if given == "float masks":
                mask = torch.linspace(-1, 1, 6 * length * source).view(6, length, source)
                return self.attention(query, key, value, attn_mask=mask)
            if given == "self" and not options.get("kdim"):
                return self.attention(query, query, query)
            return self.attention(query, key, value)

    def tensor(steps: int, width: int) -> Tensor:
        shape = (steps, width) if given == "one" else (3, steps, width) if options["batch_first"] else (steps, 3, width)
        return torch.randn(shape)

    inputs = tensor(length, 8), tensor(source, options.get("kdim", 8)), tensor(source, options.get("vdim", 8))
    assert_same(Run(), *inputs)


@pytest.mark.parametrize("first", [True, False])
def test_torchs_transformer_computes_what_it_did(first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, norm_first=first, batch_first=True)
    mask, padding = nn.Transformer.generate_square_subsequent_mask(4), torch.arange(5) >= torch.tensor([[5], [3]])

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return self.model(source, target, tgt_mask=mask, src_key_padding_mask=padding)

    converted = assert_same(Run(), torch.randn(2, 5, 8), torch.randn(2, 4, 8))
    assert "model.decoder.layers.1.multihead_attn.key" in sites(converted)


class Functions(nn.Module):
    """One product by a function, with a weight of its own."""

    def __init__(self, run: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self.weight, *inputs)


A, B, V = torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.randn(4)
HEADS = [torch.randn(2, 4, 3, 6), torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6)]
IMAGE = torch.randn(2, 4, 6, 7)
attend = F.scaled_dot_product_attention


@pytest.mark.parametrize(
    ("run", "shape", "inputs", "places"),
    [
        (lambda w, x: F.linear(x, w), (5, 4), (A,), ["linear_0"]),
        (lambda w, x: F.linear(x[0, 0], w, w[:, 0]), (5, 4), (A,), ["linear_0"]),
        (lambda w, x: x @ w, (4, 5), (A,), ["linear_0"]),
        (lambda w, x: x @ w.t(), (5, 4), (A,), ["linear_0"]),
        (lambda w, x: w @ x, (6, 4), (B,), ["linear_0"]),
        (lambda w, x: w @ x, (6, 4), (V,), ["linear_0"]),
        (lambda w, x: x.matmul(w[:, :3]) + torch.mm(x[0], w[:, :3]), (4, 5), (A,), ["linear_0", "linear_1"]),
        (lambda w, x: torch.addmm(w[0], x[0], w), (4, 5), (A,), ["linear_0"]),
        (lambda w, x: torch.addmm(x[0, :, :1], x[0], w, beta=0.5, alpha=2), (4, 5), (A,), ["linear_0"]),
        (lambda w, a, b: a @ b * w, (1,), (A, B), ["matmul_0"]),
        (lambda w, a, b: torch.bmm(a, b) * w + torch.matmul(a, b[0]), (1,), (A, B), ["matmul_0", "matmul_1"]),
        (lambda w, a, b: a[:1] @ b * w, (1,), (A, B), ["matmul_0"]),
        (lambda w, a, v: a @ v * w, (1,), (A, V), ["matmul_0"]),
        (lambda w, v, b: v @ b * w, (1,), (V, B), ["matmul_0"]),
        (lambda w, v, u: torch.dot(v, u) * w, (1,), (V, V + 1), ["matmul_0"]),
        (lambda w, a, b: torch.baddbmm(w, a, b), (2, 3, 5), (A, B), ["matmul_0"]),
        (lambda w, a, b: torch.einsum("bik,bkj->bji", a, b) * w, (1,), (A, B), ["matmul_0"]),
        (lambda w, a, b: torch.einsum("...ik,...kj->...ij", a, b) * w, (1,), (A, B), ["matmul_0"]),
        (lambda w, a, b: torch.einsum("bik,bkj", [a, b]) * w, (1,), (A, B), ["matmul_0"]),
        (lambda w, a: torch.einsum("bik,hok->bhio", a, w), (2, 3, 4), (A,), ["linear_0"]),
        (lambda w, a: torch.einsum("hok,bik->boi", w, a), (2, 3, 4), (A,), ["linear_0"]),
        (lambda w, q, k, v: attend(q, k, v, enable_gqa=True) * w, (1,), HEADS, ["attention_0"]),
        (lambda w, q, k, v: attend(q[:, :2], k, v, is_causal=True, scale=0.3) * w, (1,), HEADS, ["attention_0"]),
        (lambda w, q, k, v: attend(q[:, :2], k, v, torch.ones(3, 5).tril(-1).bool()) * w, (1,), HEADS, ["attention_0"]),
        (lambda w, q, k, v: attend(q[:, :2], k, v, q[0, 0, :, :5]) * w, (1,), HEADS, ["attention_0"]),
        (lambda w, x: F.conv2d(x, w, w[:, 0, 0, 0], 2, 1, groups=2), (6, 2, 3, 3), (IMAGE,), ["convolution_0"]),
        (lambda w, x: F.conv2d(x, w, padding="same"), (6, 4, 2, 3), (IMAGE,), ["convolution_0"]),
        (lambda w, x: F.conv1d(x[0], w, stride=2, dilation=2), (5, 6, 2), (IMAGE,), ["convolution_0"]),
        (lambda w, x: F.conv3d(x[None], w, padding=1), (3, 2, 3, 3, 3), (IMAGE,), ["convolution_0"]),
        (lambda w, x: F.conv_transpose2d(x, w, stride=2, output_padding=1), (4, 3, 3, 3), (IMAGE,), ["convolution_0"]),
    ],
)
def test_products_by_functions_compute_what_torchs_do(
    run: Callable[..., Any], shape: tuple[int, ...], inputs: tuple[Tensor, ...], places: list[str]
) -> None:
    converted = assert_same(Functions(run, *shape), *inputs)
    found = {name.removeprefix("fp8_products.").split(".")[0] for name in sites(converted)}
    assert sorted(found) == places


@pytest.mark.parametrize(
    ("run", "inputs"),
    [
        # An outer product sums nothing; positions times frequencies must not be rounded.
        (lambda w, a, b: a[:, :, :1] @ b[:, :1] * w, (A, B)),
        (lambda w, a, b: torch.einsum("i,j->ij", a[0, 0], b[0, 0]) * w, (A, B)),
        (lambda w, a, b: torch.einsum("bik,ckj->kj", a, b) * w, (A, B)),
        (lambda w, a, b: torch.einsum("bik,bkj,j->bi", a, b, w.expand(5)), (A, B)),
        (lambda w, a, b: torch.tensordot(a[0], b[0], 1) * w, (A, B)),
    ],
)
def test_products_that_no_recipe_takes_are_named(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    model = nn.Sequential()
    model.part = Functions(run, 1)
    with pytest.warns(UserWarning, match="no layer to convert"):
        report = inject(model, FP8)
    with pytest.warns(UserWarning, match="no product of the first forward pass follows the recipe"):
        found = model.part(*inputs)
    assert torch.equal(found, run(model.part.weight, *inputs))
    assert report.without_owner()[0].startswith("part: ")
    assert report.share("left") == 1.0
