"""FP8 convolution products against torch's convolution in FP64: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from numeric import assert_close
from torch import nn

from fp8repro.engines.products import Conv2dGeometry
from fp8repro.kernels.conv2d.launch import conv2d, conv2d_error, conv2d_gradient
from fp8repro.kernels.matmul.launch import Epilogue
from fp8repro.numerics import reference
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.rounding import RandomBits, Rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 3e-4 if torch.cuda.is_available() else 1e-6


def operand(*shape, dtype=torch.float8_e5m2, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def assert_products_match(x, weight, geometry, bias=None, error_dtype=torch.float8_e5m2):
    g = geometry

    def products(x, weight):
        x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
        y = F.conv2d(x, weight, None, g.stride, g.padding, g.dilation)
        return x, weight, y

    x64, weight64, y64 = products(x, weight)
    error = operand(*y64.shape, dtype=error_dtype)
    y64.backward(error.double())
    y64 = y64.detach()
    # The same sums over magnitudes: what summation errors are relative to.
    x_size, weight_size, y_size = products(x.double().abs(), weight.double().abs())
    y_size.backward(error.double().abs())
    y_size = y_size.detach()

    y = conv2d(x, weight, bias, g)
    expected = y64 if bias is None else y64 + bias[:, None, None]
    results = [
        (y, expected, y_size),
        (conv2d_error(error, weight, tuple(x.shape), g), x64.grad, x_size.grad),
        (conv2d_gradient(error, x, tuple(weight.shape), g), weight64.grad, weight_size.grad),
    ]
    for given, exact, size in results:
        assert given.is_contiguous(memory_format=torch.channels_last)
        assert_close(given, exact, TOLERANCE, scale=size.clamp_min(1e-3))


@pytest.mark.parametrize(
    ("x", "weight", "geometry"),
    [
        ((2, 16, 8, 8), (32, 16, 3, 3), Conv2dGeometry((1, 1), (1, 1))),
        ((2, 16, 9, 7), (32, 16, 3, 3), Conv2dGeometry((2, 2), (1, 1))),
        ((1, 8, 8, 8), (16, 8, 1, 1), Conv2dGeometry((2, 2))),
        ((1, 5, 11, 12), (7, 5, 3, 2), Conv2dGeometry((3, 2), (2, 0), (2, 3))),
        ((1, 4, 9, 9), (6, 4, 3, 3), Conv2dGeometry((2, 2), (2, 2), (2, 2))),
        ((2, 4, 9, 9), (6, 4, 2, 2), Conv2dGeometry((4, 4))),
        ((3, 1, 1, 1), (1, 1, 1, 1), Conv2dGeometry()),
    ],
)
def test_geometries(x, weight, geometry):
    bias = torch.randn(weight[0], device=DEVICE)
    assert_products_match(operand(*x), operand(*weight, seed=1), geometry, bias)


def resnet_convolutions():
    """Every distinct (channels, outputs, kernel, stride, padding) of the three ResNets."""
    found = set()
    for build in (torchvision.models.resnet18, torchvision.models.resnet34, torchvision.models.resnet50):
        with torch.device("meta"):
            model = build()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                key = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
                found.add(key)
    for c, o, kernel, stride, padding in sorted(found):
        yield pytest.param(c, o, kernel, stride, padding, id=f"{c}-{o}-{kernel[0]}-{stride[0]}")


@pytest.mark.parametrize(("channels", "outputs", "kernel", "stride", "padding"), list(resnet_convolutions()))
def test_every_convolution_of_the_resnets(channels, outputs, kernel, stride, padding):
    side = 8 if kernel[0] == 7 else 4
    x = operand(1, channels, side, side).to(memory_format=torch.channels_last)
    assert_products_match(x, operand(outputs, channels, *kernel, seed=1), Conv2dGeometry(stride, padding))


def test_e4m3_forward_and_e5m2_errors():
    x, weight = operand(2, 8, 6, 6, dtype=torch.float8_e4m3fn), operand(4, 8, 3, 3, dtype=torch.float8_e4m3fn)
    assert_products_match(x, weight, Conv2dGeometry((1, 1), (1, 1)))


def test_gradient_in_splits_is_the_same_at_every_run():
    x, error = operand(3, 8, 10, 10), operand(3, 16, 10, 10)
    geometry = Conv2dGeometry((1, 1), (1, 1))
    whole = conv2d_gradient(error, x, (16, 8, 3, 3), geometry, splits=1)
    for splits in (2, 7):
        result = conv2d_gradient(error, x, (16, 8, 3, 3), geometry, splits=splits)
        assert_close(result, whole, 1e-4, scale=1 + whole.abs())
        assert_close(result, conv2d_gradient(error, x, (16, 8, 3, 3), geometry, splits=splits))


def channels_last(x, rounding):
    return reference.round_to_format(x.cpu(), Rounding(E5M2, rounding), RandomBits(3, 2**40, "channels_last"))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("outputs", [6, 16])
@pytest.mark.parametrize("codes", [False, True])
def test_epilogue_rounds_like_the_reference(rounding, outputs, codes):
    # Overflowing results included; random bits count elements channels last.
    x, weight = (operand(2, 8, 7, 5).float() * 256).to(torch.float8_e5m2), operand(outputs, 8, 3, 3)
    geometry = Conv2dGeometry((2, 2), (1, 1))
    exact = conv2d(x, weight, None, geometry)
    assert int((exact.abs() * 64 > E5M2.max).sum()) > 0
    epilogue = Epilogue(Rounding(E5M2, rounding), RandomBits(3, 2**40), codes)
    result = conv2d(x, weight, None, geometry, inverse_scale=64.0, epilogue=epilogue)
    assert result.dtype == (torch.float8_e5m2 if codes else torch.float32)
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = channels_last(exact * 64, rounding)
    assert_close(result.float(), expected)
    error = operand(*exact.shape)
    back = conv2d_error(error, weight, tuple(x.shape), geometry, epilogue=epilogue)
    exact_back = conv2d_error(error, weight, tuple(x.shape), geometry)
    expected = channels_last(exact_back, rounding)
    assert back.dtype == result.dtype
    assert_close(back.float(), expected)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("channels", [7, 8])
def test_weight_gradients_are_rounded_once_their_sums_are_complete(rounding, splits, channels):
    error, x = operand(3, 5, 6, 6), operand(3, channels, 8, 8)
    exact = conv2d_gradient(error, x, (5, channels, 3, 3), splits=splits)
    epilogue = Epilogue(Rounding(E5M2, rounding), RandomBits(3, 2**40))
    result = conv2d_gradient(error, x, (5, channels, 3, 3), splits=splits, epilogue=epilogue)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_close(result, channels_last(exact, rounding))


@pytest.mark.parametrize("outputs", [6, 16])
@pytest.mark.parametrize("codes", [False, True])
def test_pointwise_products_count_channels_last_too(outputs, codes):
    x, weight = operand(2, 8, 7, 5), operand(outputs, 8, 1, 1)
    epilogue = Epilogue(Rounding(E5M2, "stochastic"), RandomBits(3, 2**40), codes)
    expected = channels_last(conv2d(x, weight), "stochastic")
    assert_close(conv2d(x, weight, epilogue=epilogue).float(), expected)


def test_empty_batch():
    x, weight = operand(0, 4, 5, 5), operand(6, 4, 3, 3)
    y = conv2d(x, weight)
    assert y.shape == (0, 6, 3, 3)
    assert conv2d_error(operand(0, 6, 3, 3), weight, (0, 4, 5, 5)).shape == (0, 4, 5, 5)
    assert not conv2d_gradient(operand(0, 6, 3, 3), x, (6, 4, 3, 3)).any()


@pytest.mark.parametrize(
    ("argument", "x", "weight", "geometry"),
    [
        ("x", (4, 5, 5), (6, 4, 3, 3), Conv2dGeometry()),
        ("weight", (1, 4, 5, 5), (6, 3, 3, 3), Conv2dGeometry()),
        ("x", (1, 4, 2, 2), (6, 4, 3, 3), Conv2dGeometry()),
        ("geometry.groups", (1, 4, 5, 5), (6, 2, 3, 3), Conv2dGeometry(groups=2)),
    ],
)
def test_bad_argument_is_named(argument, x, weight, geometry):
    with pytest.raises(ValueError, match=f"^{argument}: got .*, expected "):
        conv2d(operand(*x), operand(*weight), None, geometry)


def test_error_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"^error: got shape .*, expected "):
        conv2d_error(operand(1, 6, 4, 4), operand(6, 4, 3, 3), (1, 4, 5, 5))
