"""Products whose operands TMA loads, against FP64 and against the kernels that compute addresses.

All run in the interpreter: tests choose the GPU that a launch is planned for, Hopper among them.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close

from fp8repro.engines.products import Conv2dGeometry
from fp8repro.kernels.conv2d.launch import conv2d, conv2d_error, conv2d_gradient
from fp8repro.kernels.matmul.launch import Epilogue, matmul, transposed
from fp8repro.kernels.shared import tma
from fp8repro.kernels.shared.configs import Target, Tile, target_of
from fp8repro.kernels.shared.launch import INTERPRETED, counted_launches
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.rounding import RandomBits, Rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 3e-4 if torch.cuda.is_available() else 1e-6
HERE = target_of(torch.device(DEVICE))
BY_TMA, BY_ADDRESS = replace(HERE, tma=True), replace(HERE, tma=False)
# An H100, and one so small that tiny products fill it and take its large tiles.
HOPPER = Target((9, 0), 132, tma=True)
SMALL_HOPPER = Target((9, 0), 1, tma=True)
HOPPERS = [HOPPER, SMALL_HOPPER] if INTERPRETED else [HERE]
pytestmark = pytest.mark.skipif(
    not INTERPRETED and HERE.capability < (9, 0), reason="TMA starts with sm_90, and the interpreter is off"
)


def operand(*shape, dtype=torch.float8_e5m2, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def laid_out(t, row_major):
    return t if row_major else t.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("shape", [(40, 48, 64), (7, 33, 160), (129, 65, 144)])
def test_matrix_products_in_any_layout(shape, rows, columns):
    m, n, k = shape
    a, b = laid_out(operand(3, m, k), rows), laid_out(operand(3, k, n, seed=1), columns)
    bias = torch.randn(n, device=DEVICE)
    exact, size = a.double() @ b.double() + bias, a.double().abs() @ b.double().abs() + bias.abs()
    for halves in (1, 2):
        tile = Tile(64, 32, 128, 4, 3, halves)
        for splits in (1, 2):
            result = matmul(a, b, bias, target=BY_TMA, tile=tile, splits=splits)
            assert_close(result, exact, TOLERANCE, scale=size.clamp_min(1e-3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_operands(dtype):
    a, b = operand(50, 96, dtype=dtype), operand(40, 96, dtype=dtype, seed=1).t()
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for target in (BY_TMA, *HOPPERS):
        assert_close(matmul(a, b, target=target), exact, TOLERANCE, scale=size)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 70), (3, 130, 65)])
def test_transposed_bytes(shape):
    x = operand(*shape)
    result = transposed(x)
    assert tma.fits(result)
    assert_close(result.view(torch.uint8), x.transpose(1, 2).contiguous().view(torch.uint8))


GEOMETRIES = [
    # batch, channels, outputs, height, width, kernel, stride, padding, dilation; whether TMA can load the input
    ((3, 32, 48, 7, 7, 3, 1, 1, 1), True),
    ((2, 64, 32, 8, 8, 3, 2, 1, 1), True),
    ((2, 64, 32, 8, 8, 1, 2, 0, 1), True),
    ((2, 64, 32, 6, 8, 1, 1, 0, 1), True),
    ((2, 16, 32, 9, 8, 3, 1, 2, 2), True),
    ((5, 32, 16, 10, 14, 3, 2, 0, 1), True),
    ((2, 160, 16, 5, 6, 3, 1, 1, 1), True),
    # Pixels two apart whose channels are no whole blocks, an odd side, channels that are no 16 bytes.
    ((2, 48, 16, 10, 10, 3, 2, 1, 1), False),
    ((2, 32, 16, 9, 10, 3, 2, 1, 1), False),
    ((1, 3, 5, 6, 6, 3, 1, 1, 1), False),
]


def problem(case):
    batch, channels, outputs, height, width, kernel, stride, padding, dilation = case
    geometry = Conv2dGeometry((stride, stride), (padding, padding), (dilation, dilation))
    x = operand(batch, channels, height, width).to(memory_format=torch.channels_last)
    weight = operand(outputs, channels, kernel, kernel, seed=1)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    y64 = F.conv2d(x64, weight64, None, stride, padding, dilation)
    error = operand(*y64.shape, seed=2).to(memory_format=torch.channels_last)
    y64.backward(error.double())
    return x, weight, error, geometry, (y64.detach(), x64.grad, weight64.grad)


def all_products(x, weight, error, geometry, target, epilogue=None):
    return (
        conv2d(x, weight, None, geometry, target=target, epilogue=epilogue),
        conv2d_error(error, weight, tuple(x.shape), geometry, target=target, epilogue=epilogue),
        conv2d_gradient(error, x, tuple(weight.shape), geometry, target=target),
    )


@pytest.mark.parametrize("target", [BY_TMA, *HOPPERS], ids=lambda t: f"{t.capability}-{t.processors}")
@pytest.mark.parametrize(("case", "taken"), GEOMETRIES)
def test_convolutions(case, taken, target):
    x, weight, error, geometry, exact = problem(case)
    with counted_launches() as launches:
        given = all_products(x, weight, error, geometry, target)
    assert ("wgrad" not in launches) == taken
    assert ("implicit_gemm" not in launches) == taken
    sizes = all_products(*(t.float().abs().to(t.dtype) for t in (x, weight, error)), geometry, BY_ADDRESS)
    for result, expected, size in zip(given, exact, sizes, strict=True):
        assert_close(result, expected, TOLERANCE, scale=size.clamp_min(1e-3))
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("target", [BY_TMA, *HOPPERS], ids=lambda t: f"{t.capability}-{t.processors}")
@pytest.mark.parametrize("case", [GEOMETRIES[0][0], GEOMETRIES[1][0], GEOMETRIES[3][0]])
def test_rounded_results(case, rounding, values, target):
    # Small integers: sums are exact in any order, so bytes must be equal.
    x, weight, error, geometry, _ = problem(case)
    x, weight, error = ((t.float() * 2).round().to(t.dtype) for t in (x, weight, error))
    epilogue = Epilogue(Rounding(E5M2, rounding), RandomBits(3, 2**40 + 7), values=values)
    given = all_products(x, weight, error, geometry, target, epilogue)
    expected = all_products(x, weight, error, geometry, BY_ADDRESS, epilogue)
    for result, other in zip(given, expected, strict=True):
        assert_close(result, other)


def test_long_sums_are_promoted():
    # 4,608 products a sum. What is left in a GPU's tensor core has some 14 bits: 2e-3 wrong at 16,384 products.
    x, weight, error, geometry, exact = problem((1, 512, 32, 8, 8, 3, 1, 1, 1))
    for result, expected in zip(all_products(x, weight, error, geometry, BY_TMA), exact, strict=True):
        assert_close(result, expected, 2e-4, norm=True)


def test_gradient_in_splits():
    # 18 boxes of pixels in the interpreter.
    x, weight, error, geometry, exact = problem((3, 32, 16, 8, 12, 3, 1, 1, 1))
    for splits in (1, 2, 5, 1000):
        given, again = (
            conv2d_gradient(error, x, tuple(weight.shape), geometry, target=BY_TMA, splits=splits) for _ in range(2)
        )
        assert_close(given, exact[2], TOLERANCE, scale=exact[2].abs() + 10)
        assert_close(given, again)


@pytest.mark.parametrize("sides", [(256, 56, 56), (256, 28, 28), (32, 14, 14), (256, 7, 7), (1, 1, 802816), (3, 5, 9)])
@pytest.mark.parametrize("pixels", [64, 128])
def test_boxes_cover_an_image_with_little_waste(sides, pixels):
    found = tma.box(*sides, pixels)
    assert math.prod(found) == pixels
    assert all(side <= 256 and side & (side - 1) == 0 for side in found)
    covered = math.prod(math.ceil(size / side) * side for size, side in zip(sides, found, strict=True))
    assert covered <= 1.15 * math.prod(sides) or math.prod(sides) < 1000


def test_what_fits():
    assert tma.fits(operand(2, 3, 32))
    assert not tma.fits(operand(2, 3, 24))
    assert not tma.fits(operand(4, 33)[:, 1:])
    assert not tma.fits(operand(32, 32).t())
    assert not tma.fits(operand(0, 32))
    assert tma.fits(operand(1, 40, dtype=torch.float16))
    expanded = operand(1, 32).expand(4, 32)
    assert not tma.fits(expanded)
