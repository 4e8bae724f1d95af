"""Fused normalizations against torch's in FP64, and their roundings against the reference."""

import pytest
import torch
import torch.nn.functional as F

from fp8repro import reference
from fp8repro.formats import E5M2
from fp8repro.kernels.matmul import Epilogue
from fp8repro.kernels.norm import batch_norm, batch_norm_backward, layer_norm, layer_norm_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 3, 5, 7), (4, 64, 4, 4), (1, 1, 1, 2), (3, 130, 1, 3)]


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def close(given, expected, tolerance=1e-5):
    torch.testing.assert_close(given.double(), expected.detach().double(), rtol=tolerance, atol=tolerance)


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

    result = batch_norm(x, weight, bias, residual=residual, relu=relu)
    close(result.y, expected)
    close(result.mean, x.double().mean((0, 2, 3)))
    close(result.variance, x.double().var((0, 2, 3), correction=0))
    assert result.y.is_contiguous(memory_format=torch.channels_last)
    gradients = batch_norm_backward(grad, x, weight, result, needs_residual=with_residual)
    for given, leaf in zip(gradients, leaves, strict=False):
        close(given, leaf.grad, 1e-4)


def test_flags_are_a_bit_an_element():
    x = draw(2, 3, 5, 7)
    result = batch_norm(x, torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE), relu=True)
    assert result.flags.numel() == (x.numel() + 7) // 8
    bits = (result.flags[:, None] >> torch.arange(8, device=DEVICE)) & 1
    in_memory_order = result.y.permute(0, 2, 3, 1).reshape(-1) > 0
    assert torch.equal(bits.flatten()[: x.numel()].bool(), in_memory_order)
    assert not bits.flatten()[x.numel() :].any()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_batch_norm_rounds_like_the_reference(rounding):
    x, weight, bias = draw(2, 6, 5, 3), draw(6, seed=1), draw(6, seed=2)
    plain, grad = batch_norm(x, weight, bias, relu=True), draw(2, 6, 5, 3, seed=3)
    epilogue = Epilogue(E5M2, rounding, seed=5, stream=2**50)
    rounded = batch_norm(x, weight, bias, relu=True, epilogue=epilogue)
    backward = batch_norm_backward(grad, x, weight, plain)[0]
    backward_rounded = batch_norm_backward(grad, x, weight, plain, epilogue=epilogue)[0]
    for given, exact in ((rounded.y, plain.y), (backward_rounded, backward)):
        expected = reference.round_to_format(exact.cpu(), E5M2, rounding, "inf", 5, 2**50)
        assert given.dtype == torch.float8_e5m2
        assert torch.equal(given.float().cpu(), expected)


def test_batch_norm_shows_divergence():
    x = draw(2, 3, 4, 4)
    x[0, 1, 2, 2] = float("nan")
    ones = torch.ones(3, device=DEVICE)
    y = batch_norm(x, ones, ones, relu=True).y
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
    y, mean, inverse = layer_norm(x, weight, bias)
    close(y, expected)
    for given, leaf in zip(layer_norm_backward(grad, x, weight, mean, inverse), leaves, strict=True):
        close(given, leaf.grad, 1e-4)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_layer_norm_rounds_like_the_reference(rounding):
    x, weight, bias, grad = draw(9, 50), draw(50, seed=1), draw(50, seed=2), draw(9, 50, seed=3)
    epilogue = Epilogue(E5M2, rounding, seed=5, stream=2**50)
    y, mean, inverse = layer_norm(x, weight, bias)
    rounded = layer_norm(x, weight, bias, epilogue=epilogue)[0]
    backward = layer_norm_backward(grad, x, weight, mean, inverse)[0]
    backward_rounded = layer_norm_backward(grad, x, weight, mean, inverse, epilogue=epilogue)[0]
    for given, exact in ((rounded, y), (backward_rounded, backward)):
        expected = reference.round_to_format(exact.cpu(), E5M2, rounding, "inf", 5, 2**50)
        assert torch.equal(given.float().cpu(), expected)


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
        batch_norm(x.to(DEVICE), weight.to(DEVICE), torch.zeros(3, device=DEVICE))
