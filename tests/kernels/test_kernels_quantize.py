"""The Triton quantizer against the FP64 oracle, to the bit: interpreted on a CPU, compiled on a GPU."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from numeric import assert_close

from fp8repro.kernels.quantize.launch import round_into, round_transpose
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import counted_launches
from fp8repro.numerics import reference
from fp8repro.numerics.formats import BF16, E4M3, E5M2, FP16, FP16_169, FP32
from fp8repro.numerics.rounding import CHOICES, RandomBits, Rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED, STREAM = 2**63 + 12345, 0xFEDCBA9876543210
OPTIONS = list(itertools.product(CHOICES["rounding"], CHOICES["overflow"], CHOICES["subnormal_rounding"]))


def all_patterns(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def boundaries(format):
    """FP32 values at, beside and halfway between the format's values, each with both signs; overflow included."""
    steps = torch.arange(2**format.mantissa_bits, 2 ** (format.mantissa_bits + 1), dtype=torch.float64)
    exponents = torch.arange(format.min_exponent, format.max_exponent + 2, dtype=torch.float64)
    normal = (steps[:, None] * 2.0 ** (exponents - format.mantissa_bits)[None, :]).flatten()
    small = torch.arange(2**format.mantissa_bits, dtype=torch.float64) * format.smallest_subnormal
    grid = torch.cat([small, normal]).unique()
    grid = grid[grid < 3e38]
    if len(grid) > 4000:
        grid = grid[torch.linspace(0, len(grid) - 1, 4000).long()]
    halfway = (grid[1:] + grid[:-1]) / 2
    points = torch.cat([grid, halfway, torch.tensor([format.smallest_subnormal * 2.0**-40, 1e-45, 3e38])]).float()
    away = torch.tensor(float("inf"))
    points = torch.cat([points, torch.nextafter(points, away), torch.nextafter(points, -away)])
    special = torch.tensor([0.0, float("inf"), float("nan")])
    points = torch.cat([points, special])
    return torch.cat([points, -points])


def random_fp32(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)


def run(x, format, rounding, overflow, subnormal="same", values_dtype=torch.float32):
    x = x.to(DEVICE)
    values = torch.empty_like(x, dtype=values_dtype)
    codes = None if format.dtype is None else torch.empty_like(x, dtype=format.dtype)
    stats = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    round_into(x, Rounding(format, rounding, overflow, subnormal), RandomBits(SEED, STREAM), values, codes, stats)
    return values.cpu(), None if codes is None else codes.cpu(), stats.cpu()


def assert_like_reference(x, format, rounding, overflow, subnormal="same"):
    expected = reference.round_to_format(x, Rounding(format, rounding, overflow, subnormal), RandomBits(SEED, STREAM))
    values, codes, stats = run(x, format, rounding, overflow, subnormal)
    assert_close(values, expected)
    if format.is_fp8:
        assert_close(codes.view(torch.uint8), reference.encode(expected, format))
    elif codes is not None:
        assert_close(codes.float(), expected)
    finite = x.isfinite()
    nonzero = finite & (x != 0)
    magnitude = torch.where(finite, x, 0).double().abs()
    counts = [nonzero.sum(), (nonzero & (expected == 0)).sum(), (magnitude > format.max).sum(), magnitude.max()]
    assert stats.tolist() == [float(c) for c in counts]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", [E5M2, E4M3], ids=lambda f: f.name)
def test_all_16_bit_patterns(format, dtype):
    for rounding, overflow, subnormal in OPTIONS:
        assert_like_reference(all_patterns(dtype), format, rounding, overflow, subnormal)


@pytest.mark.parametrize("format", [E5M2, E4M3, FP16, BF16, FP16_169], ids=lambda f: f.name)
def test_fp32_boundaries_and_random_patterns(format):
    x = torch.cat([boundaries(format), random_fp32(20_000)])
    for rounding, overflow, subnormal in OPTIONS:
        assert_like_reference(x, format, rounding, overflow, subnormal)


@pytest.mark.parametrize(("format", "oracle"), [(E5M2, ml_dtypes.float8_e5m2), (E4M3, ml_dtypes.float8_e4m3fn)])
def test_nearest_equals_ml_dtypes(format, oracle):
    x = random_fp32(1_000_000)
    _, codes, _ = run(x, format, "nearest", "inf")
    with np.errstate(invalid="ignore"):
        encoded = x.numpy().astype(oracle)
    expected = torch.from_numpy(encoded.view(np.uint8).copy())
    numbers = ~x.isnan()
    assert_close(codes.view(torch.uint8)[numbers], expected[numbers])


@pytest.mark.parametrize(
    ("format", "quanta", "exponent"),
    [(E5M2, 3, 0), (E5M2, 2, -15), (E4M3, 7, -7), (FP16, 5, -14), (FP16, 63, -15), (FP16, 900, -15), (BF16, 9, 3)],
    ids=lambda v: getattr(v, "name", v),
)
def test_a_value_rounds_up_from_its_draws_threshold_on(format, quanta, exponent):
    """`quanta` over a binade's start, or over zero among the subnormals: at half a step over the draw, and below."""
    draw = reference.random_draws(2000, SEED, STREAM).double()
    quantum = 2.0 ** (max(exponent, format.min_exponent) - format.mantissa_bits)
    lower = quanta * quantum + (2.0**exponent if exponent >= format.min_exponent else 0.0)
    exact = (draw + 0.5) * 2.0**-16 * quantum + lower
    least = exact.float()
    least = torch.where(least.double() < exact, least.nextafter(least + 1), least)
    for x, up in ((least, True), (least.nextafter(torch.zeros(())), False)):
        values, _, _ = run(x, format, "stochastic", "inf")
        assert bool(((values > lower) == up).all())


@pytest.mark.long
@pytest.mark.parametrize("format", [E5M2, E4M3], ids=lambda f: f.name)
def test_ten_million_fp32_patterns(format):
    x = random_fp32(10_000_000)
    for rounding in CHOICES["rounding"]:
        assert_like_reference(x, format, rounding, "inf")


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.get_device_capability() < (8, 9), reason="no such conversion")
@pytest.mark.parametrize("overflow", CHOICES["overflow"])
@pytest.mark.parametrize("format", [E5M2, E4M3], ids=lambda f: f.name)
def test_the_hardwares_conversion_of_all_patterns_is_the_one_on_bits(format, overflow, monkeypatch):
    """A NaN may have lost its sign."""
    found = [torch.empty(2**24, dtype=format.dtype, device=DEVICE) for _ in range(2)]
    in_hardware = codec.rounding_code
    assert in_hardware(format, "nearest", torch.cuda.get_device_capability()) == codec.NEAREST_IN_HARDWARE.value
    for start in range(-(2**31), 2**31, 2**24):
        x = torch.arange(start, start + 2**24, device=DEVICE).to(torch.int32).view(torch.float32)
        for code, choice in zip(found, (in_hardware, lambda *_: codec.NEAREST.value), strict=True):
            monkeypatch.setattr(codec, "rounding_code", choice)
            round_into(x, Rounding(format, "nearest", overflow), RandomBits(0, 0), None, code, None)
        hardware, bits = (code.view(torch.uint8) for code in found)
        different = (hardware != bits) & ~(x.isnan() & (hardware & 0x7F == 0x7F))
        assert not bool(different.any()), x[different][:3].tolist()


def strided_tensors():
    base = random_fp32(4096)
    yield "scalar", base[0]
    yield "one element", base[:1]
    yield "odd length", base[:129]
    yield "every third", base[:999][::3]
    yield "transposed, whole groups", base[: 24 * 40].view(24, 40).t()
    yield "transposed, odd", base[: 7 * 129].view(7, 129).t()
    yield "channels_last, whole groups", base[: 2 * 5 * 4 * 6].view(2, 5, 4, 6).to(memory_format=torch.channels_last)
    yield "channels_last, odd", base[: 2 * 5 * 7 * 7].view(2, 5, 7, 7).to(memory_format=torch.channels_last)
    yield "contiguous images that count channels last", base[: 2 * 8 * 5 * 7].view(2, 8, 5, 7).movedim(1, -1)
    yield "the same, three channels", base[: 4 * 3 * 5 * 7].view(4, 3, 5, 7).movedim(1, -1)
    yield "slice of a matrix", base[: 24 * 40].view(24, 40)[3:19, 5:17]
    yield "expanded", base[:12].view(12, 1).expand(12, 5)
    yield "five dimensions", base[: 2 * 3 * 4 * 5 * 6].view(2, 3, 4, 5, 6).permute(4, 2, 0, 3, 1)[::2, :, :, 1:, :2]


@pytest.mark.parametrize(("name", "x"), list(strided_tensors()), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_strides_count_elements_in_logical_order(name, x, rounding):
    assert_like_reference(x, E5M2, rounding, "inf")
    # Outputs laid out in another way than the input.
    values = torch.empty(x.shape[::-1], device=DEVICE).permute(tuple(reversed(range(x.dim()))))
    codes = torch.empty(x.shape, dtype=torch.float8_e5m2, device=DEVICE)
    round_into(x.to(DEVICE), Rounding(E5M2, rounding), RandomBits(SEED, STREAM), values, codes, None)
    expected = reference.round_to_format(x, Rounding(E5M2, rounding), RandomBits(SEED, STREAM))
    assert_close(values.cpu(), expected)
    assert_close(codes.cpu().view(torch.uint8), reference.encode(expected, E5M2))


def test_each_layout_takes_its_kernel():
    shapes = torch.zeros(2, 8, 4, 4, device=DEVICE)
    channels_last = shapes.to(memory_format=torch.channels_last)
    for x, rounding, kernel in (
        (shapes, "stochastic", "round_flat"),
        (channels_last, "nearest", "round_flat"),
        (channels_last, "stochastic", "round_columns"),
        (channels_last[..., :3], "stochastic", "round_strided"),
    ):
        with counted_launches() as launches:
            round_into(x, Rounding(E5M2, rounding), RandomBits(0, 0), None, torch.empty_like(x, dtype=E5M2.dtype), None)
        assert launches == {kernel: 1}


def test_in_place_and_bf16_values():
    x = random_fp32(5000)
    expected = reference.round_to_format(x, Rounding(E5M2, "stochastic"), RandomBits(SEED, STREAM))
    values, _, _ = run(x, E5M2, "stochastic", "inf", values_dtype=torch.bfloat16)
    assert_close(values.float(), expected)
    x = x.to(DEVICE)
    round_into(x, Rounding(E5M2, "stochastic"), RandomBits(SEED, STREAM), x, None, None)
    assert_close(x.cpu(), expected)


def test_statistics_accumulate_over_calls():
    stats = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    for value in (1e-6, 60000.0):
        x = torch.full((3,), value, device=DEVICE)
        round_into(x, Rounding(E5M2), RandomBits(0, 0), None, torch.empty_like(x, dtype=E5M2.dtype), stats)
    assert stats.tolist() == [6.0, 3.0, 3.0, 60000.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 129), (300, 64), (3, 5, 12), (3, 8, 10)])
def test_transposed_codes_are_the_same_bytes(shape, dtype):
    x = random_fp32(int(np.prod(shape))).view(shape).to(dtype)
    for format, rounding in itertools.product([E5M2, E4M3, FP16], ["nearest", "stochastic"]):
        stats = torch.zeros(4, dtype=torch.float64, device=DEVICE)
        codes, transposed = round_transpose(
            x.to(DEVICE), Rounding(format, rounding), RandomBits(SEED, STREAM), stats=stats
        )
        _, expected, counts = run(x, format, rounding, "inf")
        raw = torch.uint8 if format.is_fp8 else torch.int16
        assert_close(codes.cpu().view(raw), expected.view(raw))
        assert_close(transposed.cpu().view(raw), expected.view(raw).transpose(-1, -2).contiguous())
        assert_close(stats.cpu(), counts)


@pytest.mark.parametrize("x", [torch.zeros(2**16, 1, 1), torch.zeros(8, 24)], ids=["batch", "place"])
def test_transposed_codes_of_more_matrices_than_a_grid_holds_and_at_any_place(x):
    x = x.uniform_(generator=torch.Generator().manual_seed(2))
    shape = (*x.shape[:-2], x.shape[-1], x.shape[-2])
    codes = torch.empty(x.shape, dtype=E5M2.dtype, device=DEVICE)
    # One byte past where integers of four begin, and nothing beside it may change.
    memory = torch.zeros(x.numel() + 4, dtype=torch.uint8, device=DEVICE)
    transposed = memory[1 : x.numel() + 1].view(E5M2.dtype).view(shape)
    stats = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    round_transpose(
        x.to(DEVICE), Rounding(E5M2, "stochastic"), RandomBits(SEED, STREAM), stats=stats, out=(codes, transposed)
    )
    _, expected, counts = run(x, E5M2, "stochastic", "inf")
    expected = expected.view(torch.uint8)
    assert_close(codes.cpu().view(torch.uint8), expected)
    assert_close(transposed.cpu().view(torch.uint8), expected.transpose(-1, -2).contiguous())
    assert (memory[0].item(), memory[x.numel() + 1 :].any().item()) == (0, False)
    assert_close(stats.cpu(), counts)


def test_empty_and_identity():
    assert run(torch.empty(0, 3), E5M2, "nearest", "inf")[0].shape == (0, 3)
    x = torch.tensor([1.0, -0.0, 3e-39])
    values, codes, stats = run(x, FP32, "stochastic", "inf")
    assert_close(values, x)
    assert_close(codes, x)
    assert stats.tolist() == [2.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": torch.zeros(4, dtype=torch.float64)}),
        ("values", {"values": torch.zeros(5)}),
        ("values", {"values": torch.zeros(4, dtype=torch.bfloat16), "format": FP16}),
        ("codes", {"codes": torch.zeros(4, dtype=torch.float16)}),
        ("stats", {"stats": torch.zeros(4)}),
    ],
)
def test_bad_argument_is_named(argument, change):
    given = {"x": torch.zeros(4), "format": E5M2, "values": None, "codes": None, "stats": None, **change}
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: got .*, expected "):
        round_into(given["x"], Rounding(given["format"]), RandomBits(), *list(given.values())[2:])
