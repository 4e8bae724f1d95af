"""Loss-scaling policies against torch's GradScaler and against the paper's schedule, step by step."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8repro.errors import UserError
from fp8repro.precision.loss_scaling import make_scaler
from fp8repro.settings.schema import LossScalingConfig

DYNAMIC = LossScalingConfig(policy="dynamic", scale=2.0**10, window=5, min_scale=2.0**-20, max_scale=2.0**40)


def gradscaler_trajectory(overflows: list[bool], scale: float, window: int) -> list[float]:
    scales = []
    current, growth = torch.tensor([scale]), torch.zeros(1, dtype=torch.int32)
    for overflow in overflows:
        torch._amp_update_scale_(current, growth, torch.tensor([float(overflow)]), 2.0, 0.5, window)
        scales.append(float(current))
    return scales


def test_dynamic_scaling_is_that_of_torchs_gradscaler() -> None:
    generator = random.Random(0)
    overflows = [generator.random() < 0.15 for _ in range(300)]
    scaler = make_scaler(DYNAMIC, 300)
    ours = []
    for overflow in overflows:
        assert scaler.update(overflow) is not overflow
        ours.append(scaler.scale)
    assert ours == gradscaler_trajectory(overflows, DYNAMIC.scale, 5)
    assert scaler.skipped == sum(overflows)


def test_constant_scale_skips_but_never_changes() -> None:
    scaler = make_scaler(LossScalingConfig(policy="constant", scale=10_000), 10)
    assert [scaler.update(o) for o in (False, True, True, False)] == [True, False, False, True]
    assert (scaler.scale, scaler.skipped, scaler.skipped_in_a_row) == (10_000, 2, 0)
    assert scaler.at_floor


def test_no_scaling_still_skips_nonfinite_steps() -> None:
    scaler = make_scaler(LossScalingConfig(), 10)
    assert scaler.scale == 1.0
    assert not scaler.update(True)


def test_enhanced_floor_rises_on_schedule_and_holds_the_scale() -> None:
    # The paper's GNMT: 8K after 12 % of the run, 32K after 44 % (40K and 150K of 340K iterations).
    config = LossScalingConfig(
        policy="enhanced", scale=65536, window=1000, floors=((0.44, 32768.0), (0.12, 8192.0)), min_scale=1
    )
    scaler = make_scaler(config, 100)
    floors, scales = [], []
    for _ in range(100):
        floors.append(scaler.floor)
        scales.append(scaler.scale)
        scaler.update(True)  # an overflow in every step
    assert [floors[i] for i in (0, 11, 12, 43, 44, 99)] == [1, 1, 8192, 8192, 32768, 32768]
    assert scales[11] == 65536 / 2**11
    assert all(scale == 8192 for scale in scales[12:44])
    assert all(scale == 32768 for scale in scales[44:])
    assert scaler.at_floor
    assert scaler.skipped_in_a_row == 100


def test_floors_given_in_iterations_do_not_depend_on_the_runs_length() -> None:
    config = LossScalingConfig(policy="enhanced", scale=1024, window=10, floors=((40, 512.0),))
    for total in (50, 5000):
        scaler = make_scaler(config, total)
        steps = [scaler.floor for _ in range(45) if scaler.update(True) is False]
        assert steps.index(512.0) == 39


def test_windows_may_be_fractions_of_the_run() -> None:
    scaler = make_scaler(replace(DYNAMIC, window=0.01), 700)
    for _ in range(7):
        scaler.update(False)
    assert scaler.scale == 2 * DYNAMIC.scale


@pytest.mark.parametrize(
    ("window", "least", "steps", "expected"),
    [(0.01, 128, 840, 128), (0.01, 128, 28_000, 280), (0.05, 1, 840, 42), (7, 128, 840, 7), (0.0001, 1, 840, 1)],
)
def test_a_window_that_is_a_fraction_has_a_least_length(window, least, steps, expected) -> None:
    scaler = make_scaler(replace(DYNAMIC, window=window, min_window=least), steps)
    found = next(step for step in range(1, 500) if scaler.update(False) and scaler.scale > DYNAMIC.scale)
    assert found == expected


def test_at_the_edge_of_overflow_a_scale_loses_one_step_in_a_window() -> None:
    for least, share in ((1, 1 / 9), (128, 1 / 129)):
        config = replace(DYNAMIC, window=0.01, min_window=least, scale=2.0**16)
        scaler = make_scaler(config, 840)
        for _ in range(8400):
            scaler.update(scaler.scale > 2.0**13)
        assert scaler.skipped / 8400 == pytest.approx(share, rel=0.05)


def test_growth_stops_at_the_maximum() -> None:
    scaler = make_scaler(replace(DYNAMIC, window=1, max_scale=2.0**12), 10)
    for _ in range(5):
        scaler.update(False)
    assert scaler.scale == 2.0**12


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 60))
@settings(deadline=None, max_examples=60)
def test_a_restored_scaler_goes_on_as_if_nothing_had_happened(overflows: list[bool], cut: int) -> None:
    config = replace(DYNAMIC, policy="enhanced", floors=((10, 64.0), (30, 4096.0)))
    whole, first = make_scaler(config, 100), make_scaler(config, 100)
    trajectory = [(whole.update(o), whole.scale, whole.floor, whole.skipped) for o in overflows]
    resumed = []
    for index, overflow in enumerate(overflows):
        if index == cut:
            state = first.state_dict()
            first = make_scaler(config, 100)
            first.load_state_dict(state)
        resumed.append((first.update(overflow), first.scale, first.floor, first.skipped))
    assert resumed == trajectory


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (replace(DYNAMIC, factor=1.0), "loss_scaling.factor"),
        (replace(DYNAMIC, scale=2.0**41), "loss_scaling.scale"),
        (replace(DYNAMIC, floors=((1, 2.0),)), "loss_scaling.floors"),
        (replace(DYNAMIC, policy="enhanced"), "loss_scaling.floors"),
        (replace(DYNAMIC, policy="enhanced", floors=((0.5, 2.0**41),)), "loss_scaling.floors"),
    ],
)
def test_contradictory_settings_are_named(config: LossScalingConfig, setting: str) -> None:
    with pytest.raises(UserError, match=setting):
        make_scaler(config, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "dynamik"}, "loss_scaling.policy: got 'dynamik', expected one of none, constant, dynamic"),
        ({"policy": "constant", "scale": 0.0}, "loss_scaling.scale: got 0.0, expected a number from 2"),
        ({"policy": "constant", "scale": math.nan}, "loss_scaling.scale: got nan"),
        ({"policy": "dynamic", "factor": math.nan}, "loss_scaling.factor: got nan"),
        ({"policy": "dynamic", "window": -3}, "loss_scaling.window: got -3"),
        ({"policy": "dynamic", "window": 1.5}, "loss_scaling.window: got 1.5"),
        ({"policy": "enhanced", "floors": ((0.5, -1.0),)}, r"loss_scaling.floors\[0\]\[1\]: got -1.0"),
    ],
)
def test_settings_of_a_loop_of_ones_own_are_checked_too(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scaler(LossScalingConfig(**settings), 10)


def test_a_state_before_the_first_step_is_refused():
    scaler = make_scaler(LossScalingConfig("dynamic", scale=8.0), total_steps=10)
    with pytest.raises(UserError, match=r"scaler\.step: got -1, expected a number of steps"):
        scaler.load_state_dict(scaler.state_dict() | {"step": -1})
