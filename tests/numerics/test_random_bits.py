"""Sixteen random bits a value: thresholds, bias, independence and the order in which elements draw them."""

import itertools
import zlib
from fractions import Fraction

import pytest
import torch

import fp8repro
from fp8repro.engines import quantizer
from fp8repro.engines.cpu import native
from fp8repro.numerics import reference
from fp8repro.numerics.formats import BF16, E4M3, E5M2, FP16, FP16_169, FloatFormat
from fp8repro.numerics.rounding import CHOICES, ORDERS, RandomBits, Rounding
from fp8repro.precision.context import StepContext

SEED, STREAM = 2**63 + 987654321, 0xFEDCBA9876543210
COUNT = 4096

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
ENGINES = [
    pytest.param(quantizer._torch_round_into, id="torch"),
    pytest.param(native.round_into, id="native", marks=needs_native),
]


def rounded(engine, x: torch.Tensor, format: FloatFormat, stream: int = STREAM) -> torch.Tensor:
    values = torch.empty_like(x, dtype=torch.float32)
    engine(x, Rounding(format, "stochastic"), RandomBits(SEED, stream), values, None, None)
    return values


# ---- Thresholds ----


def at_the_threshold(format: FloatFormat, quanta: int, exponent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP32 values, one for each of the first draws, that are the least to round up with it; and the value under them.

    In the binade from 2^exponent on, or among the subnormals, `quanta` quanta above its start.
    """
    draw = reference.random_draws(COUNT, SEED, STREAM).double()
    subnormal = exponent < format.min_exponent
    quantum = 2.0 ** (max(exponent, format.min_exponent) - format.mantissa_bits)
    lower = quanta * quantum + (0.0 if subnormal else 2.0**exponent)
    # A draw d is under floor(f * 2^16 + 1/2) from f = (d + 1/2) / 2^16 on.
    least = ((draw + 0.5) * 2.0**-16 * quantum + lower).float()
    # Where FP32 has no such value, the next one.
    least = torch.where(least.double() < (draw + 0.5) * 2.0**-16 * quantum + lower, least.nextafter(least + 1), least)
    return least, torch.full_like(least, lower)


CASES = [
    *((E5M2, quanta, exponent) for quanta, exponent in itertools.product((0, 3), (-14, 0, 15))),
    *((E5M2, quanta, -15) for quanta in range(4)),
    *((E4M3, quanta, exponent) for quanta, exponent in itertools.product((0, 5), (-6, 8))),
    *((E4M3, quanta, -7) for quanta in (0, 6, 7)),
    *((FP16, quanta, exponent) for quanta, exponent in itertools.product((0, 1022), (-14, 0))),
    *((FP16, quanta, -15) for quanta in (0, 1, 63, 64, 127, 128, 511, 1022)),
    *((FP16_169, quanta, exponent) for quanta, exponent in ((0, -31), (300, -31), (5, 3))),
    *((BF16, quanta, exponent) for quanta, exponent in ((0, 0), (100, -100))),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("format", "quanta", "exponent"), CASES, ids=lambda v: getattr(v, "name", v))
def test_a_value_rounds_up_from_its_draws_threshold_on(engine, format, quanta, exponent):
    least, lower = at_the_threshold(format, quanta, exponent)
    assert bool((rounded(engine, least, format) > lower).all())
    assert bool((rounded(engine, -least, format) < -lower).all())
    below = least.nextafter(torch.zeros(()))
    # FP16's fractions have steps of 2^-13, so the value under may be the lower neighbour itself.
    assert torch.equal(rounded(engine, below, format), lower)
    assert torch.equal(rounded(engine, lower, format), lower)


@pytest.mark.parametrize("format", [E5M2, E4M3], ids=lambda f: f.name)
def test_every_fp16_value_has_the_threshold_of_exact_fractions(format):
    x = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[torch.isfinite(x) & (x.double() <= format.max)]
    values = torch.arange(128, dtype=torch.uint8).view(format.dtype).double()
    values = values[torch.isfinite(values)]
    place = torch.searchsorted(values, x.double(), right=True) - 1
    upper = torch.cat([values[1:], values[-1:] * 2])  # the largest value is reached, not exceeded
    expected = []
    for value, i in zip(x.tolist(), place.tolist(), strict=True):
        low, high = Fraction(float(values[i])), Fraction(float(upper[i]))
        expected.append((Fraction(value) - low) / (high - low) * 2**16 + Fraction(1, 2))
    expected = torch.tensor([fraction.numerator // fraction.denominator for fraction in expected])
    draw = reference.random_draws(len(x), SEED, STREAM)
    result = torch.where(draw < expected, upper[place], values[place])
    assert torch.equal(
        reference.round_to_format(x, Rounding(format, "stochastic"), RandomBits(SEED, STREAM)).double(), result
    )
    assert torch.equal(reference.threshold((x.double() - values[place]) / (upper - values)[place]).long(), expected)
    given = fp8repro.quantize(x, format, "stochastic", seed=SEED, stream=STREAM, out="float32")
    assert torch.equal(given.double(), result)


# ---- Bias, without sampling ----


@pytest.mark.parametrize(
    ("exponent", "bound"), [(-14, 1e-6), (-16, 1e-6), (-18, 1e-6), (-20, 1e-6), (-22, 1e-6), (-24, 1e-6), (-28, 2e-4)]
)
def test_sums_of_magnitudes_are_hardly_biased(exponent, bound):
    """Normal values of that root mean square to E5M2: E[rounded] from the thresholds, at equally likely quantiles."""
    count = 2**21
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / (2 * count) + 0.5
    x = torch.special.ndtri(quantiles) * 2.0**exponent
    quantum = 2.0 ** (torch.floor(torch.log2(x)).clamp(min=E5M2.min_exponent) - E5M2.mantissa_bits)
    lower = torch.floor(x / quantum)
    expectation = (lower + reference.threshold(x / quantum - lower) * 2.0**-16) * quantum
    assert abs(float((expectation - x).sum() / x.sum())) <= bound


def test_values_far_under_the_least_one_are_lost_as_the_draws_say():
    # Under half a step of 2^-16 quanta nothing rounds up; eight bits a draw would lose 2^-25 already.
    x = torch.tensor([2.0**-33, 2.0**-33 * (1 - 2.0**-24), 2.0**-25], dtype=torch.float64)
    assert reference.threshold(x / E5M2.smallest_subnormal).tolist() == [1, 0, 128]


# ---- Independence ----


def chi_square(a: torch.Tensor, b: torch.Tensor, bits: int) -> float:
    """Of the joint distribution of the top bits of two series of draws, against independent uniform ones."""
    cells = 2 ** (2 * bits)
    counts = torch.bincount((a >> (16 - bits)) * 2**bits + (b >> (16 - bits)), minlength=cells).double()
    expected = len(a) / cells
    return float(((counts - expected) ** 2).sum() / expected)


def draws(count: int, seed: int = 5, stream: int = 9) -> torch.Tensor:
    return reference.random_draws(count, seed, stream)


CHANNELS = 64
PAIRS = {
    "neighbours": lambda n: (draws(n)[:-1], draws(n)[1:]),
    "halves of a word": lambda n: (draws(2 * n)[::2], draws(2 * n)[1::2]),
    "words of a block": lambda n: (draws(4 * n)[::8], draws(4 * n)[2::8]),
    "blocks": lambda n: (draws(n)[:-8], draws(n)[8:]),
    "pixels": lambda n: (draws(n)[:-CHANNELS], draws(n)[CHANNELS:]),
    "streams": lambda n: (draws(n, stream=9), draws(n, stream=10)),
    "seeds": lambda n: (draws(n, seed=5), draws(n, seed=6)),
    "steps": lambda n: tuple(draws(n, stream=stream_of(step)) for step in (3, 4)),
    "time steps": lambda n: tuple(draws(n, stream=stream_of(3, call)) for call in (0, 1)),
}


def stream_of(step: int, call: int = 0) -> int:
    context = StepContext(seed=5)
    context.begin(step)
    return context.stream_number("layer", call, "output_error", "error")


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("bits", [1, 4])
def test_draws_do_not_depend_on_each_other(pair, bits):
    # A chi-square of as many degrees of freedom is under its mean and five of its deviations but once in a million.
    a, b = PAIRS[pair](2**19)
    free = 2 ** (2 * bits) - 1
    assert chi_square(a, b, bits) <= free + 5 * (2 * free) ** 0.5


def test_draws_are_uniform():
    counts = torch.bincount(draws(2**22), minlength=2**16).double()
    free = 2**16 - 1
    assert abs(float(((counts - 64) ** 2).sum() / 64) - free) <= 5 * (2 * free) ** 0.5


# ---- The order in which elements count ----


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    image, volume = make(3, 16, 5, 8), make(2, 24, 3, 4, 5)
    return {
        "image": image,
        "image, channels_last": image.contiguous(memory_format=torch.channels_last),
        "image, strided": make(3, 16, 5, 20)[..., ::3],
        "image, some channels": make(3, 40, 5, 8)[:, 8:24],
        "image, some channels of channels_last": make(3, 5, 8, 40).movedim(-1, 1)[:, 8:24],
        "image, 3 channels": make(4, 3, 9, 9),
        "image, 1 channel": make(4, 1, 9, 9),
        "image, 12 channels": make(2, 12, 9, 9),
        "image, wide": make(2, 64, 8, 8),
        "one pixel": make(9, 32, 1, 1),
        "without batch": make(16, 6, 7).unsqueeze(0),
        "sequence": make(3, 16, 37),
        "sequence, channels_last": make(3, 37, 16).movedim(-1, 1),
        "volume": volume,
        "volume, channels_last": volume.contiguous(memory_format=torch.channels_last_3d),
        "kernel": make(8, 16, 3, 3),
        "empty": make(0, 16, 5, 8),
        "no channels": make(3, 0, 5, 8),
        "matrix": make(5, 9),
        "transposed matrix": make(40, 24).t(),
        "vector": make(11),
        "scalar": make(),
    }


TENSORS = tensors()


def counted_by_hand(x: torch.Tensor, order: str) -> torch.Tensor:
    """The index of every element: what stands in the contract, coordinate by coordinate."""
    dimensions = list(range(x.dim()))
    if order == "channels_last" and x.dim() >= 3:
        dimensions = [0, *range(2, x.dim()), 1]
    index = torch.zeros(x.shape, dtype=torch.int64)
    for d in dimensions:
        place = torch.arange(x.shape[d]).view([-1 if k == d else 1 for k in range(x.dim())])
        index = index * x.shape[d] + place
    return index


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", TENSORS)
def test_every_layout_draws_by_the_order_of_its_elements(name, order):
    x = TENSORS[name]
    draw = reference.random_draws(x.numel(), SEED, STREAM)[counted_by_hand(x, order)] if x.numel() else x
    steps = x.double().abs() / 2.0 ** (torch.floor(torch.log2(x.double().abs())).clamp(min=-14) - 2)
    up = draw < torch.floor((steps - steps.floor()) * 65536 + 0.5)
    expected = torch.copysign(torch.where(up, steps.floor() + 1, steps.floor()) * (x.double().abs() / steps), x)
    given = reference.round_to_format(x, Rounding(E5M2, "stochastic"), RandomBits(SEED, STREAM, order))
    assert torch.equal(given.double(), expected)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rounding in CHOICES["rounding"]:
            options = (rounding, "inf", SEED, STREAM)
            wanted = reference.round_to_format(x.to(dtype), Rounding(E5M2, rounding), RandomBits(SEED, STREAM, order))
            assert torch.equal(fp8repro.quantize(x.to(dtype), "e5m2", *options, out="float32", order=order), wanted)
            assert torch.equal(fp8repro.quantize(x.to(dtype), "e5m2", *options, order=order).float(), wanted)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["image", "image, channels_last", "image, strided", "kernel", "volume"])
def test_outputs_of_another_layout_statistics_and_sums(name, order):
    x = TENSORS[name]
    how, bits = Rounding(E4M3, "stochastic"), RandomBits(SEED, STREAM, order)
    expected = reference.round_to_format(x, how, bits)
    codes, stats = torch.empty(x.shape, dtype=E4M3.dtype), torch.zeros(4, dtype=torch.float64)
    values = torch.empty(x.shape[::-1]).permute(*reversed(range(x.dim())))
    quantizer.round_into(x, how, bits, values=values, codes=codes, stats=stats)
    assert torch.equal(values, expected)
    assert torch.equal(codes.float(), expected)
    assert stats[0] == x.numel()
    total = torch.ones_like(x)
    quantizer.round_into(x, how, bits, values=total, add=True)
    assert torch.equal(total, expected + 1)
    inplace = x.clone()
    quantizer.round_into(inplace, how, bits, values=inplace)
    assert torch.equal(inplace, expected)


def test_the_result_lies_as_the_input_does():
    x = TENSORS["image, channels_last"]
    for order in ORDERS:
        assert fp8repro.quantize(x, rounding="stochastic", order=order).stride() == x.stride()
    with pytest.raises(ValueError, match="order: got 'channels_first', expected one of row_major, channels_last"):
        fp8repro.quantize(x, order="channels_first")


# ---- The bits of this version ----


def test_the_bits_of_version_2():
    """What these were made with must not change without a new version."""
    assert reference.BITS_VERSION == 2
    x = (torch.arange(3 * 8 * 5 * 5, dtype=torch.float32) * 0.37 - 100).reshape(3, 8, 5, 5)
    x = torch.cat([x, x * 2.0**-20])
    found = [
        zlib.crc32(reference.round_to_format(x, Rounding(fmt, "stochastic"), RandomBits(1, 2, order)).numpy().tobytes())
        for fmt in (E5M2, E4M3, FP16, BF16, FP16_169)
        for order in ORDERS
    ]
    assert found == [
        0xE1B3882D,
        0x05B39196,
        0xBD73DFC2,
        0xFB96DFAD,
        0xB46F8B19,
        0xDAB9616F,
        0xDA56B970,
        0x6D224C75,
        0x05B74062,
        0x5B0EDC65,
    ]
