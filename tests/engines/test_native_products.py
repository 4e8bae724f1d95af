"""Products through BF16 instructions against FP64, in every shape and layout that a layer can bring."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fp8repro
from fp8repro.engines.cpu import bf16_products as products
from fp8repro.engines.products import Conv2dGeometry, EmulateBackend, Operand
from fp8repro.engines.quantizer import round_into
from fp8repro.engines.select import select_backend
from fp8repro.numerics import reference
from fp8repro.numerics.formats import E4M3, E5M2, FP16, FloatFormat
from fp8repro.numerics.rounding import RandomBits, Rounding

if products.library() is None:
    pytest.skip("no BF16 instructions or no compiler", allow_module_level=True)

BF16, FP32 = products.Bf16Backend(), EmulateBackend()
LAYOUTS = (torch.channels_last, torch.contiguous_format)
# Images, channels, size, outputs, kernel, geometry: the kinds of ResNets, and what they do not have.
CONVOLUTIONS = {
    "3x3": (2, 64, (8, 8), 64, (3, 3), Conv2dGeometry((1, 1), (1, 1))),
    "3x3, stride 2, odd sizes and batch": (5, 64, (9, 7), 32, (3, 3), Conv2dGeometry((2, 2), (1, 1))),
    "7x7, stride 2, 3 channels": (2, 3, (12, 12), 8, (7, 7), Conv2dGeometry((2, 2), (3, 3))),
    "1x1": (4, 32, (8, 8), 70, (1, 1), Conv2dGeometry()),
    "1x1, stride 2": (3, 16, (8, 8), 32, (1, 1), Conv2dGeometry((2, 2))),
    "groups, dilation, unequal": (3, 32, (13, 11), 64, (5, 3), Conv2dGeometry((2, 3), (2, 1), (1, 2), 2)),
    "depthwise": (2, 16, (6, 6), 16, (3, 3), Conv2dGeometry((1, 1), (1, 1), (1, 1), 16)),
    "no whole vectors": (2, 130, (6, 6), 202, (3, 3), Conv2dGeometry((1, 1), (1, 1))),
    "wide image": (1, 32, (70, 200), 16, (3, 3), Conv2dGeometry((1, 1), (1, 1))),
    "kernel larger than image": (2, 8, (2, 2), 8, (5, 5), Conv2dGeometry((1, 1), (2, 2))),
}


@pytest.fixture(params=["dot products", "tiles"], autouse=True)
def kernel(request):
    """Both kernels where this CPU has both; no operand outlives a test."""
    default = products.library().tiles
    if request.param == "tiles" and not default:
        pytest.skip("no AMX")
    products.use_tiles(request.param == "tiles")
    yield request.param
    products.use_tiles(default)


def operand(*shape: int, format: FloatFormat = E5M2, scale: float | None = None, seed: int = 0) -> Operand:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return Operand(fp8repro.quantize(x if scale is None else x * scale, format), format, scale)


def exact(x: Operand) -> Tensor:
    return x.codes.float().double() / (x.scale or 1.0)


def assert_accurate(result: Tensor, expected: Tensor, terms: int) -> None:
    """The bar on products: a relative error of 2e-7 * sqrt(K)."""
    assert result.dtype == torch.float32
    assert result.shape == expected.shape
    error = float((result.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= 2e-7 * math.sqrt(terms)


@pytest.mark.parametrize("size", [(7, 5, 3), (64, 64, 64), (100, 513, 130), (33, 1024, 1000), (300, 64, 1), (1, 1, 1)])
@pytest.mark.parametrize("scale", [None, 4.0])
def test_linear(size, scale):
    rows, inputs, outputs = size
    x = operand(rows, inputs, scale=scale)
    w = operand(outputs, inputs, format=E4M3, scale=scale, seed=1)
    e = operand(rows, outputs, seed=2)
    bias = torch.randn(outputs)
    for _ in range(2):  # the second time with the packed weight
        assert_accurate(BF16.linear(x, w, bias), exact(x) @ exact(w).t() + bias.double(), inputs)
        assert_accurate(BF16.linear_error(e, w), exact(e) @ exact(w), outputs)
    assert_accurate(BF16.linear_gradient(e, x), exact(e).t() @ exact(x), rows)


def test_linear_with_leading_dimensions_and_strides():
    x = operand(3, 5, 40)
    x.codes = x.codes.transpose(0, 1)
    w, e = operand(24, 40), operand(5, 3, 24)
    assert_accurate(BF16.linear(x, w, None), exact(x) @ exact(w).t(), 40)
    assert_accurate(BF16.linear_error(e, w), exact(e) @ exact(w), 24)
    assert_accurate(BF16.linear_gradient(e, x), exact(e).flatten(0, 1).t() @ exact(x).flatten(0, 1), 15)


@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (2, 3, 2)])
def test_matmul(lead):
    a, b, e = operand(*lead, 17, 33), operand(*lead, 33, 70, seed=1), operand(*lead, 17, 70, seed=2)
    assert_accurate(BF16.matmul(a, b), exact(a) @ exact(b), 33)
    assert_accurate(BF16.matmul_error_a(e, b), exact(e) @ exact(b).transpose(-1, -2), 70)
    assert_accurate(BF16.matmul_error_b(e, a), exact(a).transpose(-1, -2) @ exact(e), 17)


def test_matmul_of_attention_heads_that_are_views():
    q, k = operand(4, 20, 8, 32), operand(4, 24, 8, 32, seed=1)
    q.codes, k.codes = q.codes.transpose(1, 2), k.codes.permute(0, 2, 3, 1)
    assert_accurate(BF16.matmul(q, k), exact(q) @ exact(k), 32)
    e = operand(4, 8, 20, 24, seed=2)
    assert_accurate(BF16.matmul_error_a(e, k), exact(e) @ exact(k).transpose(-1, -2), 24)
    assert_accurate(BF16.matmul_error_b(e, q), exact(q).transpose(-1, -2) @ exact(e), 20)


def convolution_operands(case: str, layout: torch.memory_format) -> tuple[Operand, Operand, Operand, Conv2dGeometry]:
    images, channels, size, outputs, kernel, g = CONVOLUTIONS[case]
    x, w = operand(images, channels, *size), operand(outputs, channels // g.groups, *kernel, format=E4M3, seed=1)
    e = operand(*F.conv2d(exact(x), exact(w), None, g.stride, g.padding, g.dilation, g.groups).shape, seed=2)
    for o in (x, w, e):
        o.codes = o.codes.contiguous(memory_format=layout)
    return x, w, e, g


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case, layout):
    x, w, e, g = convolution_operands(case, layout)
    bias = torch.randn(w.codes.shape[0])
    options = (g.stride, g.padding, g.dilation)
    expected = F.conv2d(exact(x), exact(w), bias.double(), *options, g.groups)
    grads = torch.ops.aten.convolution_backward(
        exact(e), exact(x), exact(w), None, *options, False, (0, 0), g.groups, (True, True, False)
    )
    taps = w.codes.shape[2] * w.codes.shape[3]
    error, gradient = BF16.conv2d_error(e, w, g, x.codes), BF16.conv2d_gradient(e, x, g, w.codes)
    assert_accurate(BF16.conv2d(x, w, bias, g), expected, w.codes[0].numel())
    assert_accurate(error, grads[0], taps * w.codes.shape[0] // g.groups)
    assert_accurate(gradient, grads[1], e.codes.shape[0] * e.codes.shape[2] * e.codes.shape[3])
    assert error.is_contiguous(memory_format=layout)
    assert gradient.is_contiguous(memory_format=layout)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.tuples(*[st.integers(1, 4)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2), st.tuples(*[st.integers(0, 2)] * 2), st.tuples(*[st.integers(1, 2)] * 2),
    st.tuples(*[st.integers(4, 12)] * 2),
)  # fmt: skip
def test_any_convolution(images, groups, ins, outs, kernel, stride, padding, dilation, size):
    g = Conv2dGeometry(stride, padding, dilation, groups)
    if any(size[k] + 2 * padding[k] < dilation[k] * (kernel[k] - 1) + 1 for k in range(2)):
        return
    x, w = operand(images, 2 * ins * groups, *size), operand(2 * outs * groups, 2 * ins, *kernel, seed=1)
    options = (stride, padding, dilation)
    expected = F.conv2d(exact(x), exact(w), None, *options, groups)
    e = operand(*expected.shape, seed=2)
    grads = torch.ops.aten.convolution_backward(
        exact(e), exact(x), exact(w), None, *options, False, (0, 0), groups, (True, True, False)
    )
    assert_accurate(BF16.conv2d(x, w, None, g), expected, w.codes[0].numel())
    assert_accurate(BF16.conv2d_error(e, w, g, x.codes), grads[0], 2 * outs * kernel[0] * kernel[1])
    assert_accurate(BF16.conv2d_gradient(e, x, g, w.codes), grads[1], e.codes.numel())


def test_integers_are_multiplied_exactly():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([-4.0, -3, -2, -1, 0, 1, 2, 3, 4])
    a, b = (values[torch.randint(9, shape, generator=generator)] for shape in ((50, 300), (70, 300)))
    qa, qb = (Operand(fp8repro.quantize(t), E5M2) for t in (a, b))
    assert torch.equal(BF16.linear(qa, qb, None), a @ b.t())


@pytest.mark.parametrize("kernel", ["tiles"], indirect=True)
def test_both_kernels_agree_to_fp32_error_and_say_which_they_are(kernel):
    results = []
    for tiles in (False, True):
        products.use_tiles(tiles)
        x, w = operand(70, 256), operand(100, 256, seed=1)
        results.append(BF16.linear(x, w, None))
        assert products.Bf16Backend().name == ("emulate-amx" if tiles else "emulate-bf16")
    assert_accurate(results[0], results[1].double(), 256)


def test_every_pair_of_finite_codes_is_multiplied_exactly_and_the_others_give_no_number():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)
    a, b = Operand(codes.view(256, 1), E5M2), Operand(codes.view(1, 256), E5M2)
    expected = codes.float().view(256, 1) * codes.float().view(1, 256)
    result = BF16.matmul(a, b)
    finite = torch.isfinite(expected)
    assert torch.equal(result[finite], expected[finite])
    assert not torch.isfinite(result[~finite]).any()


@pytest.mark.parametrize("case", ["3x3", "3x3, stride 2, odd sizes and batch", "groups, dilation, unequal"])
def test_threads_do_not_change_bytes(case):
    x, w, e, g = convolution_operands(case, torch.channels_last)
    lx, lw, le = operand(300, 700), operand(500, 700, seed=1), operand(300, 500, seed=2)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            w.packed.clear()
            lw.packed.clear()
            results.append(
                [
                    BF16.conv2d(x, w, None, g),
                    BF16.conv2d_error(e, w, g, x.codes),
                    BF16.conv2d_gradient(e, x, g, w.codes),
                    BF16.linear(lx, lw, None),
                    BF16.linear_error(le, lw),
                    BF16.linear_gradient(le, lx),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_operands_take_the_fp32_products():
    x, w, e = (operand(*shape, format=FP16) for shape in ((9, 32), (16, 32), (9, 16)))
    assert torch.equal(BF16.linear(x, w, None), FP32.linear(x, w, None))
    assert torch.equal(BF16.linear_error(e, w), FP32.linear_error(e, w))
    assert torch.equal(BF16.linear_gradient(e, x), FP32.linear_gradient(e, x))
    identity = Operand(torch.randn(3, 4), values=torch.randn(3, 4))
    assert torch.equal(BF16.matmul(identity, operand(4, 5)), FP32.matmul(identity, operand(4, 5)))
    assert BF16.value_dtype(FP16) == torch.float32
    assert BF16.value_dtype(E5M2) is None


def test_an_empty_batch():
    x, w = operand(0, 8), operand(4, 8)
    assert BF16.linear(x, w, None).shape == (0, 4)


def test_auto_takes_them_and_a_layer_gives_what_fp32_products_give(kernel, monkeypatch):
    monkeypatch.setattr(products, "_cpu", lambda: {"vendor_id": ["AuthenticAMD"], "flags": []})
    backend, why = select_backend("auto", torch.device("cpu"), "promoted")
    assert (backend.name, why) == ("emulate-amx" if kernel == "tiles" else "emulate-bf16", "")
    results = []
    for choice in ("auto", "emulate"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        recipe = fp8repro.Recipe(exempt=())
        assert fp8repro.inject(model, recipe, fp8repro.StepContext(seed=1), choice).backend == (
            backend.name if choice == "auto" else "emulate"
        )
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
        y = model(x)
        (y.square().sum() * 8).backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        # Sums in another order flip a rounding here and there, each by one E5M2 step of at most a quarter.
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_auto_takes_fp32_products_where_the_cpu_multiplies_bf16_no_faster(kernel, monkeypatch):
    monkeypatch.setattr(products, "_cpu", lambda: {"vendor_id": ["GenuineIntel"], "flags": []})
    expected = "emulate-amx" if kernel == "tiles" else "emulate"
    assert select_backend("auto", torch.device("cpu"), "promoted")[0].name == expected


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
@pytest.mark.parametrize("scale", [None, 4.0])
def test_results_rounded_on_the_way_are_those_of_a_pass_of_its_own(rounding, scale):
    fmt = E4M3 if scale else E5M2
    how, bits = Rounding(fmt, rounding, "saturate"), RandomBits(5, 6)
    bias = torch.randn(70)
    pairs = {
        # Many panels and blocks of rows, a width that is no multiple of 4, and few rows, whose columns are shared out.
        "linear": (operand(3, 67, 100, scale=scale), operand(70, 100)),
        "linear_error": (operand(300, 64), operand(64, 203)),
        "linear_gradient": (operand(32, 200, scale=scale), operand(32, 515)),
        "matmul": (operand(2, 3, 65, 40), operand(2, 3, 40, 130)),
        "matmul_error_a": (operand(2, 3, 65, 40), operand(2, 3, 130, 40)),
        "matmul_error_b": (operand(2, 3, 40, 65), operand(2, 3, 40, 130)),
        "other operands": (operand(5, 8, format=FP16), operand(9, 8, format=FP16)),
    }
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for name, (a, b) in pairs.items():
                method = "linear" if name == "other operands" else name
                extra = {"linear": (bias if name == "linear" else None,)}.get(method, ())
                expected = getattr(products.Bf16Backend(), method)(a, b, *extra)
                round_into(expected, Rounding(fmt, rounding, "saturate"), RandomBits(5, 6), values=expected)
                assert torch.equal(
                    getattr(products.Bf16Backend().rounding(how, bits), method)(a, b, *extra), expected
                ), name
                if method == "linear_gradient":
                    total = torch.randn(expected.shape)
                    summed = total + expected
                    backend = products.Bf16Backend().rounding(how, bits).adding(total)
                    assert backend.linear_gradient(a, b) is total
                    assert torch.equal(total, summed)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("shape", "weight", "geometry"),
    [
        ((2, 16, 9, 9), (8, 16, 3, 3), Conv2dGeometry((2, 2), (1, 1))),
        ((3, 16, 10, 7), (24, 16, 3, 3), Conv2dGeometry((1, 1), (1, 1))),
        # Rows of one image alone fit the cache; the stride leaves pixels of the error without a tap.
        ((2, 64, 130, 130), (68, 64, 1, 1), Conv2dGeometry((2, 3))),
        ((2, 8, 9, 9), (12, 4, 3, 2), Conv2dGeometry((1, 2), (0, 1), (2, 1), groups=2)),
    ],
)
def test_convolutions_rounded_on_the_way_count_channels_last(shape, weight, geometry, rounding, scale, layout):
    fmt = E4M3 if scale else E5M2
    how, bits = Rounding(fmt, rounding, "saturate"), RandomBits(5, 6, "channels_last")
    x, w = operand(*shape, scale=scale), operand(*weight)
    bias, like = torch.randn(weight[0]), torch.empty(shape).contiguous(memory_format=layout)
    plain, rounded = products.Bf16Backend(), products.Bf16Backend().rounding(how, bits)
    y = plain.conv2d(x, w, bias, geometry)
    error = operand(*y.shape)
    for multiply in (
        lambda backend: backend.conv2d(x, w, bias, geometry),
        lambda backend: backend.conv2d_error(error, w, geometry, like),
        lambda backend: backend.conv2d_gradient(error, x, geometry, w.codes),
    ):
        exact = multiply(plain)
        expected = reference.round_to_format(
            exact, Rounding(fmt, rounding, "saturate"), RandomBits(5, 6, "channels_last")
        )
        given = multiply(rounded)
        assert torch.equal(given, expected)
        assert given.stride() == exact.stride()
