"""Fused normalizations against torch's in FP64, and their roundings against the reference; modules that use them."""

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8repro import quantize
from fp8repro.engines.guards import spell
from fp8repro.kernels.norm import launch as norm_launch
from fp8repro.kernels.norm import operators as norm_ops
from fp8repro.kernels.norm.launch import (
    batch_norm,
    batch_norm_backward,
    batch_statistics,
    layer_norm,
    layer_norm_backward,
)
from fp8repro.numerics import reference
from fp8repro.numerics.formats import BF16, E4M3, E5M2, FP16, get_format
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_normalization import FusedBatchNorm2d, FusedLayerNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 3, 5, 7), (4, 64, 4, 4), (1, 1, 1, 2), (3, 130, 1, 3)]


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def close(given, expected, tolerance=1e-5):
    expected = expected.double()
    assert_close(given, expected, tolerance, scale=1 + expected.detach().abs())


def new_running(channels):
    """Running mean, variance and number of batches of a new normalization."""
    return tuple(nn.BatchNorm2d(channels).to(DEVICE).buffers())


def normalized(x, weight, bias, **options):
    return batch_norm(x, weight, bias, *batch_statistics(x, *new_running(x.shape[1]), 0.1), **options)


# The last two are summed in many chunks of rows, with a shorter last one.
@pytest.mark.parametrize("shape", [*SHAPES, (9, 3, 37, 41), (70, 70, 31, 3)])
@pytest.mark.parametrize("offset", [0, 300])
def test_statistics_equal_those_in_fp64(shape, offset, monkeypatch):
    parts = []
    sums = norm_launch._sums
    monkeypatch.setattr(norm_launch, "_sums", lambda *given: (parts.append(sums(*given)), parts[-1])[1])
    x, running = draw(*shape) + offset, new_running(shape[1])
    count = x.numel() // shape[1]
    running_mean, running_var = (t.double() for t in running[:2])
    for batches, momentum in ((1, 0.1), (2, 0.75), (3, 1.0)):
        mean, rstd = batch_statistics(x, *running, momentum, 1e-3)
        # Of FP32 sums, of values that lie a few deviations from the one that all are compared with.
        variance = x.double().var((0, 2, 3), correction=0)
        assert_close(mean, x.double().mean((0, 2, 3)), 1e-6, scale=variance.sqrt() + mean.double().abs())
        assert_close(rstd.double().pow(-2), variance + 1e-3, 5e-6, scale=variance + 1e-3)
        # What is made of them has no error but its own rounding to FP32.
        partial, chunk = parts[-1]
        rows = (count - torch.arange(len(partial), device=DEVICE)[:, None] * chunk).clamp(max=chunk).double()
        means, squares = partial.double().unbind(1)
        expected = (rows * means).sum(0) / count
        variance = (squares + rows * (means - expected).square()).sum(0) / count
        assert_close(mean, expected, 1.2e-7, scale=expected.abs())
        assert_close(rstd, (variance + 1e-3).rsqrt(), 2e-7, scale=rstd.double())
        running_mean.lerp_(expected, momentum)
        running_var.lerp_(variance * (count / (count - 1)), momentum)
        assert_close(running[0], running_mean, 5e-7, scale=running_mean.abs() + expected.abs())
        assert_close(running[1], running_var, 5e-7, scale=running_var + variance)
        assert running[2].item() == batches
        x = x * 2


def test_equal_values_have_no_variance():
    _, rstd = batch_statistics(torch.full((7, 5, 33, 35), 1 / 3, device=DEVICE), *new_running(5), 0.1, 1e-8)
    assert_close(rstd, torch.full_like(rstd, 1e4), 1e-6, scale=1e4)


# Torch operators and launches of a pass. Beside the launches, the host only gets memory and views of it.
@pytest.mark.parametrize(("relu", "with_residual", "forward"), [(False, False, 9), (True, False, 12), (True, True, 12)])
def test_a_pass_is_three_launches_and_few_operators(relu, with_residual, forward, monkeypatch):
    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name.removeprefix("aten::"))
            return function(*args, **(kwargs or {}))

    def count_only(kernel, grid, device, *arguments, **options):
        launches.append(kernel.fn.__name__)

    launches = []
    # The mode that counts would have operators take the plain functions' place.
    monkeypatch.setattr(norm_ops, "untraced", lambda *_: True)
    monkeypatch.setattr(norm_launch, "launch", count_only)
    _, fused = modules(nn.BatchNorm2d, 64)
    fused.input_format = E5M2
    inputs = [draw(2, 64, 8, 8, seed=seed).requires_grad_() for seed in range(1 + with_residual)]
    with Record():
        y = fused(*inputs, relu=relu)
        assert launches == ["channel_statistics", "combine_statistics", "batch_apply"]
        assert len(names) <= forward
        launches.clear()
        names.clear()
        torch.autograd.grad(y, [*inputs, fused.weight, fused.bias], torch.zeros_like(y))
    assert launches == ["batch_gradient_sums", "combine_gradient_sums", "batch_gradient_apply"]
    # One of them is this test's.
    assert len(names) <= 5 + 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2])
@pytest.mark.parametrize(("relu", "with_residual"), [(False, False), (True, False), (True, True)])
def test_batch_norm_equals_torch(shape, dtype, relu, with_residual):
    # An offset that a careless variance would drown in.
    x = (draw(*shape) + 8).to(dtype)
    weight, bias, grad = draw(shape[1], seed=1), draw(shape[1], seed=2), draw(*shape, seed=3)
    residual = draw(*shape, seed=4) if with_residual else None
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, *([residual] if with_residual else []))]
    expected = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True)
    expected = expected + leaves[3] if with_residual else expected
    expected = F.relu(expected) if relu else expected
    expected.backward(grad.double())

    statistics = batch_statistics(x, *new_running(shape[1]), 0.1)
    result = batch_norm(x, weight, bias, *statistics, residual=residual, relu=relu)
    close(result.y, expected)
    close(statistics[0], x.double().mean((0, 2, 3)))
    close(statistics[1].double().pow(-2), x.double().var((0, 2, 3), correction=0) + 1e-5)
    assert result.y.is_contiguous(memory_format=torch.channels_last)
    gradients = batch_norm_backward(grad, x, weight, result.flags, *statistics, needs_residual=with_residual)
    for given, leaf in zip(gradients, leaves, strict=False):
        close(given, leaf.grad, 1e-4)


@pytest.mark.parametrize("channels", [3, 16, 70])
def test_flags_are_a_bit_a_channel(channels):
    x = draw(2, channels, 5, 7)
    result = normalized(x, torch.ones(channels, device=DEVICE), torch.zeros(channels, device=DEVICE), relu=True)
    assert result.flags.shape == (2 * 5 * 7, (channels + 7) // 8)
    bits = ((result.flags[:, :, None] >> torch.arange(8, device=DEVICE)) & 1).flatten(1).bool()
    assert_close(bits[:, :channels], result.y.permute(0, 2, 3, 1).reshape(-1, channels) > 0)
    assert not bits[:, channels:].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True])
def test_codes_alone_are_those_of_the_result(shape, relu):
    x, residual = draw(*shape).to(E5M2.dtype), draw(*shape, seed=4)
    weight, bias = draw(shape[1], seed=1), draw(shape[1], seed=2)
    both = normalized(x.float(), weight, bias, residual=residual, relu=relu, how=Rounding(E5M2))
    alone = normalized(x, weight, bias, residual=residual, relu=relu, how=Rounding(E5M2), codes_only=True)
    assert alone.y is None
    assert_close(alone.codes, both.codes)
    assert_close(alone.codes.float(), reference.round_to_format(both.y.cpu(), Rounding(E5M2)))


# The first have whole Philox blocks in each row, the others do not.
@pytest.mark.parametrize("shape", [(2, 64, 3, 5), (3, 130, 1, 3), (2, 3, 5, 7)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_gradients_of_two_terms_are_rounded_like_the_reference(shape, rounding):
    x, weight, bias = draw(*shape).to(E5M2.dtype), draw(shape[1], seed=1), draw(shape[1], seed=2)
    statistics = batch_statistics(x, *new_running(shape[1]), 0.1)
    flags = batch_norm(x, weight, bias, *statistics, relu=True).flags
    first, second = draw(*shape, seed=3), draw(*shape, seed=4).to(E5M2.dtype)
    total = first + second.float()
    exact = batch_norm_backward(total, x, weight, flags, *statistics, needs_residual=True)
    how, bits = Rounding(E5M2, rounding), RandomBits(5, 2**40 + 3)
    given = batch_norm_backward(
        first, x, weight, flags, *statistics, more=second, needs_residual=True, how=how, bits=bits
    )
    for mine, expected in zip(given[1:], exact[1:], strict=True):
        assert_close(mine, expected)
    assert given[0].dtype == E5M2.dtype
    expected = reference.round_to_format(exact[0].cpu(), how, bits._replace(order="channels_last"))
    assert_close(given[0].float(), expected)


def test_sums_of_two_tensors():
    a, b = draw(2, 6, 5, 3), draw(2, 6, 5, 3, seed=1).to(E5M2.dtype)
    assert_close(norm_launch.add(a, b), a + b.float())
    assert_close(norm_launch.add(b, b), 2 * b.float())
    with pytest.raises(ValueError, match=r"^b: got strides .*, expected "):
        norm_launch.add(a, b.contiguous())


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
@pytest.mark.parametrize("kept", [E5M2, E4M3, FP16, BF16], ids=lambda f: f.name)
def test_batch_norm_keeps_its_input_and_gives_codes_of_the_result(kept, rounding):
    x = draw(2, 6, 5, 3).to(kept.dtype).float()
    weight, bias, residual = draw(6, seed=1), draw(6, seed=2), draw(2, 6, 5, 3, seed=4)
    plain = normalized(x, weight, bias, residual=residual, relu=True)
    how = Rounding(E5M2, rounding)
    result = normalized(x, weight, bias, residual=residual, relu=True, how=how, kept=kept)
    assert_close(result.y, plain.y)
    assert_close(result.codes, reference.round_to_format(plain.y.cpu(), how))
    assert (plain.codes, plain.kept) == (None, None)
    assert (result.codes.dtype, result.kept.dtype) == (E5M2.dtype, kept.dtype)
    assert result.codes.stride() == result.kept.stride() == x.stride()
    assert_close(result.kept, x)


def modules(kind, *arguments):
    """A normalization of torch and the same one by kernels."""
    pair = [kind(*arguments).to(DEVICE) for _ in range(2)]
    for module in pair:
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-1, 2, arguments[0]))
            module.bias.copy_(torch.linspace(0.5, -0.5, arguments[0]))
    pair[1].__class__ = FusedBatchNorm2d if kind is nn.BatchNorm2d else FusedLayerNorm
    pair[1].consumers, pair[1].context = Rounding(), StepContext()
    return pair


@pytest.mark.parametrize("fmt", ["e5m2", "bf16", "fp32"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_modules_by_kernels_equal_torchs(fmt, relu, with_residual):
    plain, fused = modules(nn.BatchNorm2d, 6)
    fused.input_format = get_format(fmt)
    x, residual, error = (
        draw(4, 6, 5, 3).to(fused.input_format.dtype).float(),
        draw(4, 6, 5, 3, seed=1),
        draw(4, 6, 5, 3),
    )
    results = []
    for module in (plain, fused):
        inputs = [t.clone().requires_grad_() for t in (x, residual)]
        if module is fused:
            y = module(inputs[0], inputs[1] if with_residual else None, relu)
        else:
            y = plain(inputs[0]) + inputs[1] if with_residual else plain(inputs[0])
            y = torch.relu(y) if relu else y
        wanted = [*(inputs if with_residual else inputs[:1]), module.weight, module.bias]
        gradients = torch.autograd.grad(y, wanted, error)
        results.append([y, *gradients, module.running_mean, module.running_var, module.num_batches_tracked])
    for expected, given in zip(*results, strict=True):
        assert given.shape == expected.shape
        close(given, expected)
    # The next layer's bytes, unless a sum comes between.
    offer = fused.context.offers.find(y, Rounding())
    assert (offer is not None) == relu
    if relu:
        assert_close(offer.codes.view(torch.uint8), quantize(y.detach(), "e5m2").view(torch.uint8))


def test_layer_normalization_by_kernels_equals_torchs():
    plain, fused = modules(nn.LayerNorm, 24)
    results = []
    for module in (plain, fused):
        x = draw(3, 5, 24).requires_grad_()
        y = module(x)
        results.append([y, *torch.autograd.grad(y, [x, module.weight, module.bias], draw(3, 5, 24, seed=1))])
    for expected, given in zip(*results, strict=True):
        close(given, expected)
    offer = fused.context.offers.find(y, Rounding())
    assert_close(offer.codes.float(), quantize(y.detach(), "e5m2").float())
    with torch.inference_mode():
        close(fused(x), plain(x))


def test_only_bytes_are_kept_for_backward():
    _, fused = modules(nn.BatchNorm2d, 64)
    fused.input_format = E5M2
    x, sizes = draw(2, 64, 8, 8).to(E5M2.dtype).float().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel() * t.element_size()), t)[1], id):
        fused(x, draw(2, 64, 8, 8), relu=True)
    # The byte and the bit of each element, and the channels' scale, mean and rstd.
    assert sum(sizes) == x.numel() + x.numel() // 8 + 3 * 64 * 4


@pytest.mark.parametrize(
    "op", ["batch_statistics", "batch_norm", "batch_norm_backward", "layer_norm", "layer_norm_backward"]
)
def test_operators_hold_what_torch_asks_of_them(op):
    # In 16 bit: the checker itself cannot compute with FP8 tensors.
    x, weight, bias, residual = draw(2, 3, 4, 5), draw(3), draw(3, seed=1), draw(2, 3, 4, 5, seed=1)
    rows, scale = draw(4, 6), draw(6)
    for tensor in (x, weight, bias, residual, rows, scale):
        tensor.requires_grad_(op in ("batch_norm", "layer_norm"))
    flags = torch.full((40, 1), 0xA5, dtype=torch.uint8, device=DEVICE)
    arguments = {
        "batch_statistics": (x, *new_running(3), 0.1, 1e-5),
        "batch_norm": (x, weight, bias, residual, draw(3), draw(3), True, "bf16", spell(Rounding(FP16))),
        "batch_norm_backward": (residual, x, weight, flags, draw(3), draw(3), True),
        "layer_norm": (rows, scale, draw(6, seed=1), 1e-5, spell(Rounding(FP16))),
        "layer_norm_backward": (draw(4, 6), rows, scale, draw(4), draw(4)),
    }[op]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(getattr(norm_ops, op), arguments, test_utils=utilities)


def test_batch_norm_shows_divergence():
    x = draw(2, 3, 4, 4)
    x[0, 1, 2, 2] = float("nan")
    ones = torch.ones(3, device=DEVICE)
    y = normalized(x, ones, ones, relu=True).y
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 100), (1, 1), (70, 513)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2])
def test_layer_norm_equals_torch(shape, dtype):
    x = (draw(*shape) + 4).to(dtype)
    weight, bias, grad = draw(shape[-1], seed=1), draw(shape[-1], seed=2), draw(*shape, seed=3)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.layer_norm(leaves[0], shape[-1:], leaves[1], leaves[2])
    expected.backward(grad.double())
    y, mean, rstd, _ = layer_norm(x, weight, bias)
    close(y, expected)
    for given, leaf in zip(layer_norm_backward(grad, x, weight, mean, rstd), leaves, strict=True):
        close(given, leaf.grad, 1e-4)


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_layer_norm_gives_codes_of_the_result(rounding):
    x, weight, bias = draw(9, 50), draw(50, seed=1), draw(50, seed=2)
    y, _, _, none = layer_norm(x, weight, bias)
    again, _, _, codes = layer_norm(x, weight, bias, how=Rounding(E4M3, rounding))
    assert none is None
    assert codes.dtype == E4M3.dtype
    assert_close(again, y)
    assert_close(codes, reference.round_to_format(y.cpu(), Rounding(E4M3, rounding)))


def test_random_bits_are_refused():
    x, weight = draw(2, 3, 4, 5), draw(3)
    how = Rounding(E5M2, "stochastic")
    for call in (
        lambda: normalized(x, weight, weight, how=how),
        lambda: layer_norm(draw(4, 3), weight, weight, how=how),
    ):
        with pytest.raises(ValueError, match=r"^how: got e5m2/stochastic, expected a rounding without random bits"):
            call()


@pytest.mark.parametrize(
    ("argument", "x", "weight"),
    [
        ("x", torch.zeros(2, 3), torch.zeros(3)),
        ("x", torch.zeros(1, 3, 1, 1), torch.zeros(3)),
        ("weight", torch.zeros(2, 3, 1, 1), torch.zeros(4)),
        ("weight", torch.zeros(2, 3, 1, 1), torch.zeros(3, dtype=torch.float16)),
    ],
)
def test_bad_argument_is_named(argument, x, weight):
    with pytest.raises(ValueError, match=f"^{argument}: got .*, expected "):
        normalized(x.to(DEVICE), weight.to(DEVICE), torch.zeros(3, device=DEVICE))
