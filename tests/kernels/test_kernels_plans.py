"""What launches are planned, and which kernels they need, for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8repro.kernels.conv2d.device import Axis, Positions
from fp8repro.kernels.conv2d.launch import plan_phases
from fp8repro.kernels.matmul.launch import plan_product
from fp8repro.kernels.shared.configs import (
    TILES,
    TMA_CONVOLUTION_TILES,
    TMA_TILES,
    Target,
    Tile,
    generation,
    target_of,
)
from fp8repro.kernels.shared.launch import INTERPRETED
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.rounding import IDENTITY, Rounding

HOPPER, AMPERE = Target((9, 0), 132, tma=True), Target((8, 0), 108)
FP32, ROUNDED, STOCHASTIC = IDENTITY, Rounding(E5M2), Rounding(E5M2, "stochastic")


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 6), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((7, 5), "sm_80")],
)
def test_a_gpu_takes_the_newest_table_that_is_not_newer(capability, name):
    assert generation(capability) == name


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_the_interpreter_is_a_target():
    assert target_of(torch.device("cpu")) == Target()
    plan = plan_product(Target(), (1, 700, 5, 300), 1, False, FP32)
    assert (plan.tile, plan.splits, plan.programs) == (Tile(512, 16, 512, 4, 1), 1, 1)


@pytest.mark.parametrize("sizes", [(1, 8192, 8192, 8192), (1, 100, 70, 90)])
def test_codes_are_rounded_where_they_are_computed(sizes):
    plan = plan_product(HOPPER, sizes, 1, True, STOCHASTIC, codes=True)
    assert plan.tile in TMA_CONVOLUTION_TILES["sm_90"]
    assert not plan.rounded_apart
    (phase,), apart = plan_phases(HOPPER, ((AXIS, AXIS),), 32, 64, 64, 1, True, STOCHASTIC, codes=True)
    assert phase.tile in TMA_CONVOLUTION_TILES["sm_90"]
    assert not apart


@pytest.mark.parametrize(
    ("how", "apart"), [(FP32, False), (ROUNDED, False), (STOCHASTIC, True)], ids=["fp32", "nearest", "stochastic"]
)
def test_large_products_on_hopper(how, apart):
    # Random bits take registers that the product needs.
    plan = plan_product(HOPPER, (1, 8192, 8192, 8192), 1, True, how)
    assert (plan.tile, plan.rounded_apart) == (TMA_TILES["sm_90"][0], apart)
    assert (plan.splits, plan.chunk, plan.step, plan.tma) == (1, 8192, 128, True)
    assert plan.programs == 132 * plan.tile.resident
    plan = plan_product(HOPPER, (1, 8192, 8192, 8192), 1, False, FP32)
    assert (plan.tile, plan.tma) == (TILES["sm_90"][0], False)


def test_long_sums_of_small_results_are_split():
    plan = plan_product(HOPPER, (1, 64, 64, 100_000), 1, True, ROUNDED)
    assert plan.splits == 64
    assert plan.chunk % plan.step == 0
    assert plan.splits * plan.chunk >= 100_000
    assert plan.rounded_apart


def test_16_bit_operands_take_half_a_step():
    assert plan_product(AMPERE, (1, 4096, 4096, 4096), 2, False, FP32).step == TILES["sm_80"][0].k // 2


AXIS = Axis(grid=56, size=56, start=0, stride=1, step=1, first=-1, taps=3, apart=1, tap=0, tap_step=1)


def test_convolutions_on_hopper():
    (plan,), apart = plan_phases(HOPPER, ((AXIS, AXIS),), 32, 64, 64, 1, True, FP32)
    assert plan.tile in TMA_CONVOLUTION_TILES["sm_90"]
    assert plan.positions == Positions.of(AXIS, AXIS)
    assert (plan.positions.taps_h, plan.positions.first_w, apart) == (3, -1, False)
    assert plan.box[0] * plan.box[1] * plan.box[2] == plan.tile.m
    assert plan.step == 64
    (plan,), apart = plan_phases(HOPPER, ((AXIS, AXIS),), 32, 64, 64, 1, False, STOCHASTIC)
    assert (plan.box, plan.step) == (None, plan.tile.k)
    assert apart == (plan.tile != TILES["sm_90"][-1])


def test_phases_share_what_happens_to_the_result():
    # A phase of few pixels takes a small tile, which has room to round; the other has not.
    few = AXIS._replace(grid=1)
    plans, apart = plan_phases(HOPPER, ((AXIS, AXIS), (few, few)), 64, 64, 256, 1, False, ROUNDED)
    assert [plan.tile == TILES["sm_90"][-1] for plan in plans] == [False, True]
    assert apart


# How many compiled kernels a step takes: a run waits for each of them once.
VARIANTS = {"resnet18 fp8": 56, "resnet18 fp8_stochastic": 45, "resnet50 fp8": 68, "resnet50 fp8_stochastic": 55}


def test_a_step_needs_few_compiled_kernels():
    # In a process of its own, because this one may interpret kernels.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("variants.py"), *" ".join(VARIANTS).split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {case: sum(kernels.values()) for case, kernels in json.loads(done.stdout).items()}
    assert found.keys() == VARIANTS.keys()
    for case, most in VARIANTS.items():
        assert 0 < found[case] <= most, case
