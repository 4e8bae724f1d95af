"""Learning rates against torch's own schedulers and closed forms written out."""

import math

import pytest
import torch

from fp8repro.config import ScheduleConfig
from fp8repro.training.schedule import learning_rate, run_steps

LR = 0.4
TOTAL = 120


def rates(total: int = TOTAL, **settings) -> list[float]:
    config = ScheduleConfig(**settings)
    return [learning_rate(config, LR, step, total) for step in range(total)]


def torch_rates(make, total: int = TOTAL) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant():
    assert rates(name="constant") == [LR] * TOTAL


def test_cosine_is_torchs():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, TOTAL))
    assert rates(name="cosine") == pytest.approx(expected, rel=1e-9)


def test_cosine_with_linear_warmup_is_torchs_sequence():
    def make(optimizer):
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=30)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL - 30)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [30])

    expected = torch_rates(make)
    assert rates(name="cosine", warmup=30, warmup_start=0.25) == pytest.approx(expected, rel=1e-6)
    assert rates(name="cosine", warmup=0.25, warmup_start=0.25) == pytest.approx(expected, rel=1e-6)


def test_step_is_torchs():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [40, 80], gamma=0.1))
    assert rates(name="step", milestones=(40, 80)) == pytest.approx(expected, rel=1e-12)
    # Fractions written with seven digits hit the same epochs of an ImageNet run.
    thirds = ScheduleConfig(name="step", milestones=(0.3333333, 0.6666667))
    steps, total = 5005, 90 * 5005
    found = [
        learning_rate(thirds, 1.0, step, total) for step in (30 * steps - 1, 30 * steps, 60 * steps - 1, 60 * steps)
    ]
    assert found == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_inverse_sqrt_is_fairseqs():
    warmup, start = 40, 1e-7
    expected = [start + n * (LR - start) / warmup if n < warmup else LR * warmup**0.5 * n**-0.5 for n in range(TOTAL)]
    assert rates(name="inverse_sqrt", warmup=warmup, warmup_start=start / LR) == pytest.approx(expected, rel=1e-12)


def test_gnmt_is_exponential_warmup_and_halvings():
    total, warmup = 1000, 200
    found = rates(
        total,
        name="gnmt",
        warmup=warmup,
        warmup_start=0.01,
        warmup_form="exponential",
        decay_start=0.666,
        decay_count=4,
    )
    growth = math.exp(math.log(0.01) / warmup)
    assert found[:warmup] == pytest.approx([LR * growth ** (warmup - n) for n in range(warmup)], rel=1e-9)
    interval = (total - 666) // 4
    for n in range(warmup, total):
        halvings = 0 if n < 666 else min((n - 666) // interval + 1, 4)
        assert found[n] == pytest.approx(LR * 0.5**halvings)


@pytest.mark.parametrize(("value", "expected"), [(1, 1), (1.0, 50), (0.5, 25), (30, 30), (30.0, 30), (0.0, 0)])
def test_times_are_steps_or_fractions(value, expected):
    assert run_steps(value, 50) == expected
