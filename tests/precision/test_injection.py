"""Injection: what is converted, left and why; geometry of every kind of layer; random bits that are never shared."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from fp8repro.engines.products import Operand
from fp8repro.errors import UserError
from fp8repro.models.parts import AttentionProduct, MatMul
from fp8repro.numerics import reference
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.recipe import ROLES
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.precision.injection import inject, sites
from fp8repro.settings.recipes import load_recipe

FP8 = load_recipe("fp8")
IDENTITY = Rounding(format="fp32")


def identity_layer(layer: nn.Module) -> nn.Module:
    """The injected layer with every rounding taken out."""
    model = nn.Sequential(layer)
    inject(model, replace(FP8, exempt=()), backend="emulate")
    for site in sites(model).values():
        site.roles = dict.fromkeys(ROLES[:4], IDENTITY)
    return model


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (2, 6, 9, 7)),
        (lambda: nn.Conv2d(6, 6, 3, dilation=2, padding=(2, 0), groups=6, bias=False), (2, 6, 9, 9)),
        (lambda: nn.Conv2d(3, 4, (1, 5), padding="same"), (2, 3, 6, 8)),
        (lambda: nn.Conv2d(3, 4, 4, padding="same"), (1, 3, 6, 6)),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
        (lambda: nn.Conv2d(3, 4, 3), (3, 6, 6)),
        (lambda: nn.Linear(5, 7), (11, 5)),
        (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5)),
        (lambda: nn.Linear(5, 7), (5,)),
    ],
)
def test_layers_of_every_geometry_compute_what_torchs_do(make, shape) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    plain = make()
    converted = make()
    converted.load_state_dict(plain.state_dict())
    x = torch.randn(shape)
    ours = gradients(identity_layer(converted), x)
    for measured, expected in zip(ours, gradients(plain, x), strict=True):
        torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-6)


def test_attention_products_compute_what_torchs_matmul_does() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 4, 8) for _ in range(3))
    plain, converted = AttentionProduct(), AttentionProduct()
    model = identity_layer(converted)
    assert set(sites(model)) == {"0.scores", "0.context"}
    results = []
    for attention in (plain, converted):
        inputs = [t.clone().requires_grad_() for t in (query, key, value)]
        results.append([*torch.autograd.grad(attention(*inputs).square().sum(), inputs)])
    for measured, expected in zip(*results, strict=True):
        torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-6)


def test_resnet50_report_names_every_layer_and_the_papers_exemptions() -> None:
    model = resnet50()
    report = inject(model, "fp8")
    assert report.names("exempt") == ["conv1", "fc"]
    assert len(report.names("converted")) == 52
    left = [row for row in report.rows if row.status == "left"]
    assert len(left) == 53
    assert all(row.kind == "BatchNorm2d" and "normalization stays in FP32" in row.detail for row in left)
    table = report.table()
    assert "layer4.2.conv3" in table
    assert "weight e5m2/nearest, activation e5m2/nearest, error e5m2/stochastic" in table
    assert sum(row.parameters for row in report.rows) == sum(p.numel() for p in model.parameters())


def test_layers_that_cannot_be_reached_are_reported_with_the_reason() -> None:
    def own(kind: type[nn.Module]) -> type[nn.Module]:
        return type(f"Own{kind.__name__}", (kind,), {})

    model = nn.ModuleDict(
        {
            "lstm": own(nn.LSTM)(4, 4),
            "attention": own(nn.MultiheadAttention)(4, 2),
            "own": own(nn.Linear)(4, 4),
            "deconvolution": own(nn.ConvTranspose2d)(2, 2, 3),
            "bilinear": nn.Bilinear(4, 4, 2),
            "linear": nn.Linear(4, 4),
        }
    )
    rows = {row.name: row for row in inject(model, replace(FP8, exempt=())).rows}
    assert rows["linear"].status == "converted"
    for name, reason in (
        ("lstm", "products cannot be reached"),
        ("attention", "cannot be reached"),
        ("own", "subclass"),
        ("deconvolution", "subclass"),
        ("bilinear", "no FP8 form"),
    ):
        assert rows[name].status == "left"
        assert reason in rows[name].detail


def test_a_pattern_that_matches_nothing_stops_with_the_layers_names() -> None:
    with pytest.raises(UserError, match=r"precision.exempt: got 'conv9', which matches none of the layers \(0, 1\)"):
        inject(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), replace(FP8, exempt=("conv9",)))


def test_patterns_choose_the_exempt_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    report = inject(model, replace(FP8, exempt=("1.*",)))
    assert report.names("exempt") == ["1.0", "1.1"]
    assert report.names("converted") == ["0"]


def test_a_model_is_converted_once_only() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    inject(model, "fp8")
    with pytest.raises(UserError, match="converted already"):
        inject(model, "fp8")


def test_attention_products_are_an_option() -> None:
    report = inject(AttentionProduct(), replace(FP8, exempt=(), attention_products=False))
    assert report.names("left") == ["scores", "context"]


def recorded_streams(model: nn.Module, run) -> list[tuple[str, str, int]]:  # type: ignore[no-untyped-def]
    """(layer, role, stream) of every stochastic rounding."""
    context = model.fp8_context  # type: ignore[union-attr]
    streams: list[tuple[str, str, int]] = []
    original = type(context).stream

    def recording(self, module, call, operand, role):  # type: ignore[no-untyped-def]
        stream = original(self, module, call, operand, role)
        streams.append((module, role, stream))
        return stream

    type(context).stream = recording
    try:
        run()
    finally:
        type(context).stream = original
    return streams


def test_reused_layers_micro_steps_steps_and_ranks_never_share_random_bits() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    stochastic = Rounding(rounding="stochastic")
    inject(model, replace(FP8, exempt=(), activation=stochastic, weight=stochastic))

    def run() -> None:
        for rank in range(2):
            for step in range(2):
                for micro_step in range(2):
                    model.fp8_context.rank = rank  # type: ignore[union-attr]
                    model.fp8_context.begin(step, micro_step)  # type: ignore[union-attr,operator]
                    x = torch.ones(3, 4, requires_grad=True)
                    model(model(model(x))).sum().backward()

    streams = recorded_streams(model, run)
    moving = [stream for _, role, stream in streams if role != "weight"]
    assert len(moving) == 2 * 2 * 2 * 3 * 5
    assert len(set(moving)) == len(moving)
    # All calls and micro-steps of a step round its weights with the same bits, on both ranks.
    weights = [stream for _, role, stream in streams if role == "weight"]
    assert len(weights) == 2 * 2 * 2 * 3
    assert weights[:12] == weights[12:]
    assert [len(set(weights[:6])), len(set(weights[6:12])), len(set(weights[:12]))] == [1, 1, 2]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((3, 16, 7, 5), 1), ((16, 6, 6), 2), ((2, 3, 6, 6), 1)])
def test_convolutions_count_channels_last_in_every_role(shape, groups, channels_last) -> None:  # type: ignore[no-untyped-def]
    """All roundings stochastic; of small integers, whose sums are exact, so that bytes do not depend on their order."""
    generator = torch.Generator().manual_seed(0)

    def integers(*sizes: int) -> Tensor:
        t = torch.randint(-40, 41, sizes, generator=generator) / 4
        return t.contiguous(memory_format=torch.channels_last) if channels_last and t.dim() == 4 else t

    channels = shape[-3]
    conv = nn.Conv2d(channels, 8, 3, stride=2, padding=1, groups=groups, bias=False)
    conv.weight.data = integers(*conv.weight.shape)
    model = nn.Sequential(conv)
    spec = Rounding(rounding="stochastic")
    inject(model, replace(FP8, exempt=(), weight=spec, activation=spec, error=spec, gradient=spec), backend="emulate")
    context = model.fp8_context
    context.begin(3)

    def rounded(x: Tensor, name: str, role: str) -> Tensor:
        stream = context.stream_number("0", 0, name, role)
        return reference.round_to_format(
            x, Rounding(E5M2, "stochastic"), RandomBits(context.seed, stream, "channels_last")
        )

    x = integers(*shape).requires_grad_()
    y = model(x)
    error = integers(*y.shape)
    (grad_x, grad_weight) = torch.autograd.grad(y, [x, conv.weight], error)

    batch = x.detach() if x.dim() == 4 else x.detach().unsqueeze(0)
    qx, qw = rounded(batch, "input", "activation"), rounded(conv.weight.detach(), "weight", "weight")
    qe = rounded(error.view(-1, *error.shape[-3:]), "output_error", "error")
    options = ([2, 2], [1, 1], [1, 1], False, [0, 0], groups)
    exact = torch.convolution(qx, qw, None, *options)
    assert torch.equal(y.detach().view_as(exact), rounded(exact, "output", "activation"))
    wanted = torch.ops.aten.convolution_backward(qe, qx, qw, None, *options, (True, True, False))
    assert torch.equal(grad_x.view_as(batch), rounded(wanted[0], "input_error", "error"))
    assert torch.equal(grad_weight, rounded(wanted[1], "weight_gradient", "gradient"))


def test_evaluation_always_rounds_to_nearest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    stochastic = Rounding(rounding="stochastic")
    inject(model, replace(FP8, exempt=(), activation=stochastic, weight=stochastic))
    x = torch.randn(8, 16)
    model.eval()
    expected_x, expected_w = (t.to(torch.float8_e5m2).float() for t in (x, model[0].weight.detach()))  # type: ignore[union-attr]
    operands: list[Tensor] = []
    with model.fp8_context.observe(lambda layer, product, ops: operands.extend(o.decoded() for o in ops)):
        result = model(x)
    assert torch.equal(operands[0], expected_x)
    assert torch.equal(operands[1], expected_w)
    assert torch.equal(result, (expected_x @ expected_w.t()).to(torch.float8_e5m2).float())
    model.train()
    assert not torch.equal(model(x), result)


def test_a_weight_is_rounded_once_per_update() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, replace(FP8, exempt=()))
    seen: list[int] = []

    def weight(layer: str, product: str, operands: tuple[Operand, ...]) -> None:
        if product == "forward":
            seen.append(id(operands[1].codes))

    with model.fp8_context.observe(weight):  # type: ignore[union-attr,operator]
        for micro_step in range(3):
            model.fp8_context.begin(0, micro_step)  # type: ignore[union-attr,operator]
            model(torch.ones(2, 4))
        with torch.no_grad():
            model[0].weight.add_(1.0)  # type: ignore[union-attr,operator]
        result = model(torch.ones(1, 4))
    assert seen[0] == seen[1] == seen[2]
    weight = model[0].weight.detach().to(torch.float8_e5m2).float()  # type: ignore[union-attr]
    assert torch.equal(result, (weight.sum(1) + model[0].bias).to(torch.float8_e5m2).float()[None])  # type: ignore[union-attr]


def test_matmul_operands_both_get_rounded_errors() -> None:
    model = nn.Sequential()
    model.product = MatMul()
    inject(model, replace(FP8, exempt=()))
    a, b = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
    model.product(a, b).sum().backward()
    for grad in (a.grad, b.grad):
        assert torch.equal(grad, grad.to(torch.float8_e5m2).float())  # type: ignore[union-attr]


def test_triton_where_it_cannot_run_is_an_error_that_says_why() -> None:
    code = (
        "import torch, fp8repro\n"
        "from fp8repro.errors import UserError\n"
        "try:\n    fp8repro.inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), 'fp8', backend='triton')\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.startswith("backend: got 'triton', but ")
    assert "expected auto or emulate" in result.stdout


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(UserError, match="backend: got 'cuda', expected one of auto, emulate, triton"):
        inject(nn.Sequential(nn.Linear(2, 2)), "fp8", backend="cuda")


def test_a_recipe_that_rounds_nothing_leaves_the_products_to_torch() -> None:
    report = inject(nn.Sequential(nn.Linear(2, 2)), "fp32")
    assert (report.backend, report.names("converted")) == ("torch", [])
