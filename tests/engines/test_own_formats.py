"""Formats of one's own in every engine: to nearest and toward zero against gfloat, all else against the reference."""

from __future__ import annotations

import itertools
import math

import gfloat
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fp8repro.engines import quantizer
from fp8repro.engines.cpu import native
from fp8repro.engines.guards import check_format, read_format, spell_format
from fp8repro.kernels.quantize.launch import round_into as triton_round_into
from fp8repro.numerics import reference
from fp8repro.numerics.formats import E4M3, E5M2, FP32, FloatFormat
from fp8repro.numerics.recipe import Recipe
from fp8repro.numerics.rounding import CHOICES, IDENTITY, RandomBits, Rounding
from fp8repro.precision.injection import inject

OWN = [
    FloatFormat("e3m4", 3, 4),
    FloatFormat("e3m4_finite", 3, 4, has_infinity=False),
    FloatFormat("e2m1", 2, 1, has_infinity=False),
    FloatFormat("e5m2_low", 5, 2, exponent_bias=40),
    FloatFormat("e5m2_high", 5, 2, exponent_bias=-60),
    FloatFormat("e4m3_shifted", 4, 3, has_infinity=False, exponent_bias=11),
    FloatFormat("e5m3", 5, 3),
    FloatFormat("e4m11", 4, 11, exponent_bias=20),
    FloatFormat("e7m13", 7, 13),
    FloatFormat("e6m13", 6, 13, exponent_bias=30),
    # The same name and bits as a known one, another range.
    FloatFormat("e5m2", 5, 2, exponent_bias=16),
]
OPTIONS = list(itertools.product(CHOICES["rounding"], CHOICES["overflow"], CHOICES["subnormal_rounding"]))
needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
ENGINES = [
    pytest.param(quantizer._torch_round_into, id="torch"),
    pytest.param(native.round_into, id="native", marks=needs_native),
    pytest.param(triton_round_into, id="triton"),
]


def points(format: FloatFormat) -> Tensor:
    """Random patterns; values at, beside and between the format's around both ends of its range and of its normals."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).to(torch.int32).view(torch.float32)
    quanta = torch.cat([torch.arange(66, dtype=torch.float64) / 4, torch.randint(1, 2**12, (200,)).double() / 4])
    ends = [format.smallest_subnormal, format.smallest_normal, format.max, 2.0**format.max_exponent]
    near = [e * (1 + k * 2.0**-format.mantissa_bits / 4) for e in ends for k in range(-9, 10)]
    exact = torch.cat([quanta * format.smallest_subnormal, torch.tensor(near, dtype=torch.float64)]).float()
    exact = torch.cat([exact, *(torch.nextafter(exact, torch.tensor(s * math.inf)) for s in (1, -1))])
    special = torch.tensor([0.0, math.inf, math.nan, 1e-45, 3e38])
    found = torch.cat([patterns, exact, special])
    return torch.cat([found, -found])


def rounded(engine, x: Tensor, how: Rounding, bits: RandomBits = RandomBits()) -> tuple[Tensor, Tensor]:
    values, stats = torch.empty_like(x), torch.zeros(4, dtype=torch.float64)
    engine(x, how, bits, values, None, stats)
    return values, stats


def assert_same(found: Tensor, right: Tensor) -> None:
    nan = right.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int32), right[~nan].view(torch.int32))


def theirs(format: FloatFormat) -> gfloat.FormatInfo:
    return gfloat.FormatInfo(
        format.name,
        format.bits,
        format.mantissa_bits + 1,
        bias=format.bias,
        is_signed=True,
        domain=gfloat.Domain.Extended if format.has_infinity else gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=2**format.mantissa_bits - 1 if format.has_infinity else 1,
        has_subnormals=True,
        is_twos_complement=False,
    )


@pytest.mark.parametrize("format", OWN, ids=lambda f: f.name)
def test_ranges_are_those_of_gfloat(format: FloatFormat) -> None:
    info = theirs(format)
    found = (format.max, format.smallest_normal, format.smallest_subnormal, format.bits)
    assert found == (info.max, info.smallest_normal, info.smallest_subnormal, info.bits)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("format", OWN, ids=lambda f: f.name)
@pytest.mark.parametrize("overflow", ["inf", "saturate"])
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_every_engine_rounds_as_gfloat_does(engine, format: FloatFormat, rounding: str, overflow: str) -> None:
    x = points(format)
    # In our words an infinite input stays infinite, and toward zero a finite one never overflows.
    x = x[x.isfinite()]
    mode = {"nearest": gfloat.RoundMode.TiesToEven, "toward_zero": gfloat.RoundMode.TowardZero}[rounding]
    saturates = overflow == "saturate" or rounding == "toward_zero"
    exact = gfloat.round_ndarray(theirs(format), x.double().numpy(), mode, saturates)
    values, _ = rounded(engine, x, Rounding(format, rounding, overflow))
    assert_same(values, torch.from_numpy(np.asarray(exact)).float())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("format", OWN, ids=lambda f: f.name)
def test_every_engine_draws_and_counts_as_the_reference_does(engine, format: FloatFormat) -> None:
    x, bits = points(format), RandomBits(2**63 + 5, 0xFEDCBA9876543210)
    for rounding, overflow, subnormal in OPTIONS:
        how = Rounding(format, rounding, overflow, subnormal)
        right = reference.round_to_format(x, how, bits)
        values, stats = rounded(engine, x, how, bits)
        assert_same(values, right)
        finite = x.isfinite()
        nonzero = finite & (x != 0)
        magnitude = torch.where(finite, x, 0).double().abs()
        counts = [nonzero.sum(), (nonzero & (right == 0)).sum(), (magnitude > format.max).sum(), magnitude.max()]
        assert stats.tolist() == [float(count) for count in counts]


@pytest.mark.parametrize("format", OWN, ids=lambda f: f.name)
def test_a_format_is_what_it_was_after_it_was_an_operators_argument(format: FloatFormat) -> None:
    assert read_format(spell_format(format)) == format
    assert not Rounding(format).is_identity


@pytest.mark.parametrize(
    "format",
    [
        FloatFormat("one", 1, 3),
        FloatFormat("wide", 8, 5),
        FloatFormat("fine", 6, 14),
        FloatFormat("deep", 5, 2, exponent_bias=100),
        FloatFormat("far", 5, 2, exponent_bias=-80),
    ],
    ids=lambda f: f.name,
)
def test_what_no_engine_rounds_is_refused(format: FloatFormat) -> None:
    with pytest.raises(ValueError, match=rf"format: got {format.name} with .*, expected 2 to 7, 1 to 13, and values"):
        check_format(format)
    with pytest.raises(ValueError, match=r"stored in torch.float8_e5m2"):
        check_format(FloatFormat("shifted", 5, 2, dtype=torch.float8_e5m2, exponent_bias=16))
    assert IDENTITY.is_identity
    check_format(FP32)


def test_a_recipe_of_ones_own_formats_trains_a_layer() -> None:
    e3m4, e4m3 = Rounding(OWN[0]), Rounding(FloatFormat("e4m3_ieee", 4, 3))
    recipe = Recipe("mine", weight=e3m4, activation=e4m3, error=Rounding(OWN[6], "stochastic"), exempt=())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv1d(1, 4, 3))
    inject(model, recipe, backend="emulate")
    seen: dict[tuple[str, str], list[Tensor]] = {}

    def note(layer: str, product: str, operands: tuple) -> None:
        seen[layer, product] = [o.decoded() for o in operands]

    with model.fp8_context.observe(note):  # type: ignore[union-attr, operator]
        result = model(torch.randn(4, 1, 16))
        result.sum().backward()
    for layer in ("0", "1"):
        x, weight = seen[layer, "forward"]
        for tensor, how in ((x, e4m3), (weight, e3m4), (seen[layer, "gradient"][0], recipe.error.to_nearest)):
            assert torch.equal(reference.round_to_format(tensor, how), tensor)
    assert torch.equal(reference.round_to_format(result.detach(), e4m3), result.detach())
    assert OWN[-1] != E5M2
    assert E4M3.exponent_bias is None
