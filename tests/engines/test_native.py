"""How the native engine is built: its cache, its fallbacks, and the code it gives lesser machines."""

import os
import platform
import subprocess
import sys
import zlib

import pytest
import torch

import fp8repro
from fp8repro.engines.cpu import native
from fp8repro.engines.cpu.layout import plan
from fp8repro.numerics import reference
from fp8repro.numerics.formats import BF16, E4M3, E5M2, FP16
from fp8repro.numerics.rounding import CHOICES, RandomBits, Rounding

PROGRAM = """
import zlib, torch, fp8repro
from fp8repro.engines.cpu import native
x = torch.linspace(-3, 3, 1000)
q = fp8repro.quantize(x, rounding="stochastic", seed=3, stream=4).view(torch.uint8)
print(native.available(), zlib.crc32(q.numpy().tobytes()))
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=settings, capture_output=True, text=True, check=True)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_without_a_compiler_one_line_says_so_and_the_bytes_are_the_same(tmp_path):
    fallback = run(FP8REPRO_CACHE=str(tmp_path), CXX="", PATH=str(tmp_path))
    off = run(FP8REPRO_NATIVE="0")
    x = torch.linspace(-3, 3, 1000)
    codes = fp8repro.quantize(x, rounding="stochastic", seed=3, stream=4).view(torch.uint8)
    expected = str(zlib.crc32(codes.numpy().tobytes()))
    assert fallback.stdout.split() == off.stdout.split() == ["False", expected]
    assert len(fallback.stderr.splitlines()) == 1
    assert "no C++ compiler" in fallback.stderr
    assert off.stderr == ""


def test_a_broken_compiler_is_reported_in_one_line(tmp_path):
    broken = run(FP8REPRO_CACHE=str(tmp_path), CXX="false")
    assert broken.stdout.split()[0] == "False"
    assert len(broken.stderr.splitlines()) == 1
    assert "using torch" in broken.stderr


@pytest.mark.long
@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_two_processes_that_build_at_once_leave_one_library(tmp_path):
    settings = {**os.environ, "FP8REPRO_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM]
    both = [subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all(process.communicate()[0].startswith("True") for process in both)
    assert len(list((tmp_path / "native").iterdir())) == 1


@pytest.mark.skipif(platform.machine() != "x86_64" or not native.available(), reason="needs an x86-64 compiler")
@pytest.mark.parametrize("march", ["x86-64", pytest.param("x86-64-v3", marks=pytest.mark.long)])
def test_lesser_machines_get_the_same_bytes(march):
    engine = native.library(march)
    assert engine is not None
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (6000,), generator=generator).to(torch.int32).view(torch.float32)
    x = torch.cat([patterns, torch.randn(6000, generator=generator) * 1e-5])[:11_970].reshape(7, 18, 5, 19)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    in_eights = x[:, :16].contiguous()
    for source in (x, channels_last, channels_last.movedim(1, -1), in_eights.movedim(1, -1), x.half(), x.bfloat16()):
        for format in (E5M2, E4M3, FP16, BF16):
            for rounding in CHOICES["rounding"]:
                got, mine = (torch.empty_like(source, dtype=torch.float32) for _ in range(2))
                codes, my_codes = (torch.empty_like(source, dtype=format.dtype) for _ in range(2))
                native.round_into(source, Rounding(format, rounding), RandomBits(1, 2), got, codes, None, engine)
                native.round_into(source, Rounding(format, rounding), RandomBits(1, 2), mine, my_codes, None)
                assert torch.equal(got.view(torch.int32), mine.view(torch.int32))
                width = torch.uint8 if format.is_fp8 else torch.int16
                assert torch.equal(codes.view(width), my_codes.view(width))


@pytest.mark.parametrize(
    ("make", "ordered", "expected"),
    [
        (lambda: torch.empty(4, 8, 6, 6), True, ("linear", (1152,))),
        (lambda: torch.empty(4, 8, 6, 6).to(memory_format=torch.channels_last), False, ("linear", (1152,))),
        (lambda: torch.empty(4, 16, 6, 4).to(memory_format=torch.channels_last), True, ("transposed", (4, 24, 16))),
        (lambda: torch.empty(4, 16, 6, 6).to(memory_format=torch.channels_last), True, ("copy", ())),
        (lambda: torch.empty(8, 17).t(), True, ("transposed", (1, 8, 17))),
        (lambda: torch.empty(17, 8).t(), True, ("copy", ())),
        (lambda: torch.empty(12, 17).t(), True, ("copy", ())),
        (lambda: torch.empty(4, 8, 6, 6).movedim(1, -1), True, ("transposed", (4, 8, 36))),
        (lambda: torch.empty(6, 1, 7, 1), True, ("linear", (42,))),
        (lambda: torch.empty(40)[::2], True, ("copy", ())),
    ],
)
def test_the_kernel_follows_the_layout(make, ordered, expected):
    x = make()
    assert plan(tuple(x.shape), x.stride(), (x.stride(),), True, ordered) == expected


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("count", [1, 7, 16, 100_003])
def test_relu_keeps_the_bits_of_what_is_over_zero(count):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(count, generator=generator) for _ in range(2))
    x[0] = torch.nan
    for other in (None, residual):
        total = x if other is None else x + other
        result = x.clone()
        bits = native.add_relu(result, other)
        assert torch.equal(result.nan_to_num(7.0), torch.relu(total).nan_to_num(7.0))
        flags = (bits[:, None] >> torch.arange(8) & 1).flatten()[:count].bool()
        assert torch.equal(flags, total > 0)
        assert torch.equal(native.keep_where(residual, bits), torch.where(flags, residual, 0.0))


def test_a_process_that_keeps_freed_memory_stops_faulting_for_it():
    program = """
import resource, torch
from fp8repro.engines.cpu.malloc import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
without = faults()
kept = keep_freed_memory()
# Until the heap has a hole for every block that is in use at once.
for _ in range(30):
    faults()
print(without, sum(faults() for _ in range(5)), kept)
"""
    # Small pages: huge ones make few faults anyway.
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    without, with_it, kept = result.stdout.split()
    if kept == "False":
        pytest.skip("not glibc")
    assert int(with_it) * 10 < int(without)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("format", [E5M2, E4M3, FP16, BF16])
@pytest.mark.parametrize("subnormal_rounding", ["same", "nearest"])
def test_values_that_need_no_random_bits_change_no_others(format, subnormal_rounding):
    """Blocks of values of the format among others, and the other way round: what draws nothing must move nothing."""
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.linspace(-30, 20, 40_000)
    rounded = reference.round_to_format(x, Rounding(format), RandomBits(0, 0))
    rows = torch.arange(x.numel()) // 64
    x = torch.where((rows % 3 == 0) ^ (rows // 64 % 2 == 0), rounded, x)
    got = torch.empty_like(x)
    native.round_into(x, Rounding(format, "stochastic", "inf", subnormal_rounding), RandomBits(1, 2), got, None, None)
    expected = reference.round_to_format(x, Rounding(format, "stochastic", "inf", subnormal_rounding), RandomBits(1, 2))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_runs_that_are_visited_as_they_lie_in_memory_draw_by_their_logical_place():
    heads = torch.randn(7, 3, 5 * 24).unflatten(-1, (5, 24)).permute(1, 2, 0, 3)
    for x in (heads, heads.transpose(0, 1), heads[:, 1:, ::2]):
        got, codes = torch.empty_like(x), torch.empty(x.shape, dtype=E5M2.dtype)
        native.round_into(x, Rounding(E5M2, "stochastic"), RandomBits(1, 2), got, codes, None)
        expected = reference.round_to_format(x, Rounding(E5M2, "stochastic"), RandomBits(1, 2))
        assert torch.equal(got, expected)
        assert torch.equal(codes.float(), expected)
