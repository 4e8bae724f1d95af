"""The public quantizer and its CPU engines against ml_dtypes, the FP64 oracle and plain statistics."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fp8repro
from fp8repro.engines import quantizer
from fp8repro.engines.cpu import native
from fp8repro.numerics import reference
from fp8repro.numerics.formats import BF16, E4M3, E5M2, FP16, FP16_169, FP32, FloatFormat
from fp8repro.numerics.rounding import CHOICES, RandomBits, Rounding

FORMATS = (E5M2, E4M3, FP16, BF16, FP16_169)
ORACLES = {"e5m2": ml_dtypes.float8_e5m2, "e4m3": ml_dtypes.float8_e4m3fn}
OPTIONS = list(itertools.product(CHOICES["rounding"], CHOICES["overflow"], CHOICES["subnormal_rounding"]))
SEED, STREAM = 2**63 + 987654321, 0xFEDCBA9876543210

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
ENGINES = [
    pytest.param(quantizer._torch_round_into, id="torch"),
    pytest.param(native.round_into, id="native", marks=needs_native),
]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, zeros' signs included; NaN equals NaN."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    nan = torch.isnan(expected.float())
    different = torch.where(nan, ~torch.isnan(got.float()), bits(got) != bits(expected))
    assert not different.any(), f"{int(different.sum())} differ, the first at {different.nonzero()[0].tolist()}"


def random_patterns(count: int, seed: int = 0) -> torch.Tensor:
    """Uniform 32-bit patterns read as FP32: every magnitude, NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)


def boundaries(format: FloatFormat) -> torch.Tensor:
    """Every value of an 8-bit format, every midpoint, and the FP32 neighbours of each; powers of two beyond."""
    codes = torch.arange(256, dtype=torch.uint8).view(format.dtype)
    values = codes.float()[torch.isfinite(codes.float())].double().sort().values
    beyond = format.max + 2.0 ** (format.max_exponent - format.mantissa_bits)
    points = torch.cat([values, torch.tensor([beyond, -beyond], dtype=torch.float64)]).sort().values
    points = torch.cat([points, (points[1:] + points[:-1]) / 2, 2.0 ** torch.arange(-149, 128, dtype=torch.float64)])
    exact = torch.cat([points, -points]).float()
    inf = torch.full_like(exact, math.inf)
    return torch.cat([exact, torch.nextafter(exact, inf), torch.nextafter(exact, -inf)])


def everything(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of all kinds in shuffled order: random patterns, normal draws at three scales, zeros, specials."""
    generator = torch.Generator().manual_seed(1)
    parts = [random_patterns(count // 4), *(torch.randn(count // 4, generator=generator) * s for s in (1, 1e-5, 300))]
    x = torch.cat([*parts, boundaries(E5M2), boundaries(E4M3), torch.zeros(count // 8), torch.full((8,), math.nan)])
    return x[torch.randperm(len(x), generator=generator)][:count].to(dtype)


def oracle(x: torch.Tensor, format: FloatFormat) -> torch.Tensor:
    array = x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
    with np.errstate(all="ignore"):
        return torch.from_numpy(array.astype(ORACLES[format.name]).view(np.uint8)).view(format.dtype)


# ---- Nearest against ml_dtypes ----


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("format", [E5M2, E4M3], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_pattern_is_rounded_as_ml_dtypes_does(engine, format, dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    codes = torch.empty_like(x, dtype=format.dtype)
    engine(x, Rounding(format), RandomBits(), None, codes, None)
    assert_same(codes, oracle(x, format))
    assert_same(
        reference.encode(reference.round_to_format(x, Rounding(format)), format).view(format.dtype), oracle(x, format)
    )


@pytest.mark.parametrize("format", [E5M2, E4M3], ids=lambda f: f.name)
def test_ten_million_fp32_patterns_and_all_boundaries_are_rounded_as_ml_dtypes_does(format):
    x = torch.cat([random_patterns(10_000_000), boundaries(format)])
    expected = oracle(x, format)
    assert_same(fp8repro.quantize(x, format), expected)
    assert_same(fp8repro.quantize(x, format, out="float32"), expected.float())
    few = torch.cat([x[:200_000], boundaries(format)])
    assert_same(reference.round_to_format(few, Rounding(format)), oracle(few, format).float())


def test_fp16_and_bf16_are_rounded_as_torch_does():
    x = torch.cat([random_patterns(1_000_000), torch.randn(100_000) * 1e-6])
    assert_same(fp8repro.quantize(x, "fp16"), x.to(torch.float16))
    assert_same(fp8repro.quantize(x, "bf16"), x.to(torch.bfloat16))


# ---- One meaning of bits ----


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_engines_give_the_reference_bytes_with_every_option(engine, format, dtype):
    x = everything(6007, dtype)
    for rounding, overflow, subnormal in OPTIONS:
        how, bits = Rounding(format, rounding, overflow, subnormal), RandomBits(SEED, STREAM)
        expected = reference.round_to_format(x, how, bits)
        codes = None if format.dtype is None else torch.empty_like(x, dtype=format.dtype)
        for value_dtype in (torch.float32, torch.bfloat16):
            values = torch.empty_like(x, dtype=value_dtype)
            engine(x, how, bits, values, codes, None)
            assert_same(values, expected.to(value_dtype))
            if codes is not None:
                assert_same(codes, expected.to(format.dtype))


def _layouts() -> dict[str, torch.Tensor]:
    x = everything(40_000)
    wide = x[:32768].reshape(8, 8, 16, 32)
    return {
        "empty": x[:0],
        "scalar": x[3].reshape(()),
        "one dimension": x[:37],
        "channels_last": wide.reshape(4, 32, 16, 16).contiguous(memory_format=torch.channels_last),
        "channels_last, odd area": x[:29400].reshape(3, 40, 5, 49).contiguous(memory_format=torch.channels_last),
        "channels_last, 3 channels": x[:9600].reshape(8, 3, 20, 20).contiguous(memory_format=torch.channels_last),
        "channels_last, one pixel": x[:640].reshape(10, 64, 1, 1).contiguous(memory_format=torch.channels_last),
        "channels_last_3d": x[:9720].reshape(2, 18, 5, 6, 9).contiguous(memory_format=torch.channels_last_3d),
        "transposed": x[:33_000].reshape(330, 100).t(),
        "attention heads": wide.transpose(1, 2),
        "odd heads": x[:10_500].reshape(5, 20, 5, 21).transpose(1, 2),
        "one of three projections": x[:30_000].reshape(50, 600)[:, 200:400],
        "every second": x[::2],
        "every second column": x[:30_000].reshape(100, 300)[:, ::2],
        "expanded": x[:200].expand(50, 200),
        "reversed dimensions": x[:24_000].reshape(20, 30, 40).permute(2, 1, 0),
        "offset": x[1:],
    }


LAYOUTS = _layouts()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_bits_follow_the_logical_order_in_every_layout(engine, layout):
    x = LAYOUTS[layout]
    for rounding in ("nearest", "stochastic"):
        expected = reference.round_to_format(x, Rounding(E5M2, rounding), RandomBits(SEED, STREAM))
        # Outputs laid out like the input, and contiguous whatever the input is.
        for make in (torch.empty_like, lambda t, dtype: torch.empty(t.shape, dtype=dtype)):
            values, codes = make(x, dtype=torch.float32), make(x, dtype=torch.float8_e5m2)
            stats = torch.zeros(4, dtype=torch.float64)
            if x.numel():
                engine(x, Rounding(E5M2, rounding), RandomBits(SEED, STREAM), values, codes, stats)
            assert_same(values, expected)
            assert_same(codes, expected.to(torch.float8_e5m2))
            assert int(stats[0]) == int((torch.isfinite(x) & (x != 0)).sum())


@needs_native
@pytest.mark.parametrize("layout", ["one dimension", "channels_last", "channels_last, odd area", "attention heads"])
def test_threads_and_chunks_do_not_change_bytes(layout):
    x = LAYOUTS[layout].repeat_interleave(4, 0)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            values, stats = torch.empty_like(x), torch.zeros(4, dtype=torch.float64)
            native.round_into(x, Rounding(E5M2, "stochastic"), RandomBits(SEED, STREAM), values, None, stats)
            results.append((values, stats))
    finally:
        torch.set_num_threads(before)
    for values, stats in results[1:]:
        assert_same(values, results[0][0])
        assert torch.equal(stats, results[0][1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rounding", CHOICES["rounding"])
def test_rounding_in_place(engine, rounding):
    x = LAYOUTS["channels_last"].clone()
    expected = reference.round_to_format(x, Rounding(E5M2, rounding), RandomBits(SEED, STREAM))
    engine(x, Rounding(E5M2, rounding), RandomBits(SEED, STREAM), x, None, None)
    assert_same(x, expected)


# ---- Statistics ----


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_statistics_are_a_plain_count_and_add_up(engine, format):
    x = everything(5003)
    for rounding, overflow, subnormal in OPTIONS:
        how, bits = Rounding(format, rounding, overflow, subnormal), RandomBits(SEED, STREAM)
        rounded = reference.round_to_format(x, how, bits)
        finite = x[torch.isfinite(x)].double()
        expected = torch.tensor(
            [
                2 * (finite != 0).sum(),
                2 * ((finite != 0) & (rounded[torch.isfinite(x)] == 0)).sum(),
                2 * (finite.abs() > format.max).sum(),
                finite.abs().max(),
            ],
            dtype=torch.float64,
        )
        stats = torch.zeros(4, dtype=torch.float64)
        for _ in range(2):
            engine(x, how, bits, torch.empty_like(x), None, stats)
        assert torch.equal(stats, expected)


# ---- Stochastic rounding ----

# Normal values, halfway points, subnormals, values that mostly underflow, and the last step before overflow.
PROBES = (1.0, 1.1, -1.125, 3.7e-3, 1.75 * 2**-14, 2**-15.3, 1.5 * 2**-16, -0.3 * 2**-16, 2**-20.0, 50000.0)


@pytest.mark.parametrize("format", [E5M2, E4M3, FP16], ids=lambda f: f.name)
@pytest.mark.parametrize("value", PROBES)
def test_the_mean_of_100_000_draws_is_the_value_within_3_sigma(format, value):
    if abs(value) > format.max:
        value = format.max * 0.95
    draws = 100_000
    x = torch.full((draws,), value)
    exact = float(x[0])
    rounded = fp8repro.quantize(x, format, "stochastic", seed=11, stream=7, out="float32").double()
    low, high = float(rounded.min()), float(rounded.max())
    if low == high:
        assert low == exact or abs(exact - low) * draws < 5 * format.smallest_subnormal
        return
    share = (exact - low) / (high - low)
    sigma = (high - low) * math.sqrt(share * (1 - share) / draws)
    assert abs(float(rounded.mean()) - exact) < 3 * sigma
    assert set(rounded.unique().tolist()) == {low, high}


def test_seeds_and_streams_are_independent():
    x = torch.full((4096,), 1.125)
    first = fp8repro.quantize(x, rounding="stochastic", seed=1, stream=1, out="float32")
    assert torch.equal(first, fp8repro.quantize(x, rounding="stochastic", seed=1, stream=1, out="float32"))
    for seed, stream in ((2, 1), (1, 2), (1 + 2**32, 1), (1, 1 + 2**32)):
        other = fp8repro.quantize(x, rounding="stochastic", seed=seed, stream=stream, out="float32")
        # Two independent fair coins agree half of the time; 5 sigma of 4096 draws is 160.
        assert abs(int((first == other).sum()) - 2048) < 160


# ---- Properties ----

any_fp32 = st.lists(st.floats(width=32), min_size=1, max_size=40)
any_format = st.sampled_from(FORMATS)


@settings(max_examples=150, deadline=None)
@given(any_fp32, any_format, st.sampled_from(OPTIONS), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_any_values_any_option_equal_the_reference_and_are_fixed_points(values, format, options, seed, stream):
    x = torch.tensor(values)
    rounding, overflow, subnormal = options
    got = fp8repro.quantize(x, format, rounding, overflow, seed, stream, out="float32", subnormal_rounding=subnormal)
    assert_same(
        got, reference.round_to_format(x, Rounding(format, rounding, overflow, subnormal), RandomBits(seed, stream))
    )
    # What lies in the format's set stays, however it is rounded.
    assert_same(fp8repro.quantize(got, format, "stochastic", seed=seed + 1 & 0xFFFF, out="float32"), got)


@settings(max_examples=100, deadline=None)
@given(any_fp32, any_format)
def test_nearest_is_monotonic_and_symmetric(values, format):
    x = torch.tensor([v for v in values if not math.isnan(v)] or [0.0]).sort().values
    rounded = fp8repro.quantize(x, format, overflow="saturate", out="float32")
    if format.has_infinity or torch.isfinite(x).all():
        assert (rounded[1:] >= rounded[:-1]).all()
    assert_same(fp8repro.quantize(-x, format, overflow="saturate", out="float32"), -rounded)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.randoms(use_true_random=False), st.integers(0, 2**64 - 1)
)
def test_any_permuted_shape_draws_in_logical_order(shape, random, stream):
    order = list(range(len(shape)))
    random.shuffle(order)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).permute(order)
    got = fp8repro.quantize(x, rounding="stochastic", seed=5, stream=stream, out="float32")
    assert_same(got, reference.round_to_format(x, Rounding(E5M2, "stochastic"), RandomBits(5, stream)))


# ---- The public function ----


@pytest.mark.parametrize("format", [E5M2, E4M3], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_code_decodes_to_its_value(format, dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(3)[:-5].view(format.dtype)
    values = torch.empty(codes.shape, dtype=dtype)
    if native.available():
        native.decode(codes, values)
        expected = torch.from_numpy(codes.view(torch.uint8).numpy().view(ORACLES[format.name]).astype(np.float32))
        assert_same(values, expected.to(dtype))


def test_output_types_and_layout():
    x = LAYOUTS["channels_last"]
    assert fp8repro.quantize(x).dtype == torch.float8_e5m2
    assert fp8repro.quantize(x, "e4m3").dtype == torch.float8_e4m3fn
    assert fp8repro.quantize(x.half(), out="float32").dtype == torch.float32
    assert fp8repro.quantize(x).is_contiguous(memory_format=torch.channels_last)
    assert fp8repro.quantize(torch.empty(0, 3)).shape == (0, 3)
    assert_same(fp8repro.quantize(x, FP32, out="float32"), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "e5m3"}, "expected one of e5m2"),
        ({"rounding": "up"}, "rounding: got 'up'"),
        ({"overflow": "wrap"}, "overflow: got 'wrap'"),
        ({"subnormal_rounding": "flush"}, "subnormal_rounding: got 'flush'"),
        ({"out": "float16"}, "out: got 'float16'"),
        ({"format": "fp16_1_6_9"}, "has no storage dtype"),
    ],
)
def test_a_wrong_option_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fp8repro.quantize(torch.ones(3), **arguments)


@pytest.mark.parametrize("name", ["seed", "stream"])
def test_words_of_over_64_bits_are_refused(name):
    x = torch.full((64,), 1.1)
    for word in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=rf"{name}: got {word}, expected an integer of 64 bits"):
            fp8repro.quantize(x, rounding="stochastic", **{name: word})
    # The two readings of 64 bits are one.
    results = [fp8repro.quantize(x, rounding="stochastic", **{name: word}) for word in (-1, 2**64 - 1)]
    assert_same(*results)


@pytest.mark.parametrize("x", [torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.int32), [1.0]])
def test_a_wrong_input_is_named(x):
    with pytest.raises(TypeError, match=r"expected a torch\.float32"):
        fp8repro.quantize(x)


@pytest.mark.parametrize("shape", [(3, 5), (40, 64), (64, 33)])
@pytest.mark.parametrize("rounding", CHOICES["rounding"])
@pytest.mark.parametrize("strided", [False, True])
def test_rounded_values_are_added_to_a_total(shape, rounding, strided):
    x, total = torch.randn(shape), torch.randn(shape)
    x = x.t().contiguous().t() if strided else x
    expected = total + fp8repro.quantize(x, "e5m2", rounding, seed=1, stream=2, out="float32")
    quantizer.round_into(x, Rounding(E5M2, rounding), RandomBits(1, 2), values=total, add=True)
    assert torch.equal(total, expected)
