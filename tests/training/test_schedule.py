"""Learning rates against torch's own schedulers and closed forms written out."""

import math

import pytest
import torch
import yaml

from fp8repro.errors import UserError
from fp8repro.settings.lengths import in_steps, read_length, with_units
from fp8repro.settings.schema import ScheduleConfig
from fp8repro.training.schedule import learning_rate

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


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        (0.5, 25), (0, 0), (0.0, 0), ("1e-1", 5), (1, 1), (1.0, 1), (30, 30), (30.0, 30), (80, 80),
        ({"fraction": 0.5}, 25), ({"fraction": 1}, 50), ({"fraction": 1.0}, 50), ({"fraction": 0}, 0),
        ({"steps": 1}, 1), ({"steps": 30.0}, 30), ({"epochs": 1}, 10), ({"epochs": 2.5}, 25), ({"epochs": 1.0}, 10),
    ],
)  # fmt: skip
def test_a_length_means_the_same_however_its_number_is_written(written, steps):
    length = read_length(written, "schedule.warmup")
    assert in_steps(length, 50, epochs=5) == steps
    # As a run's config.yaml keeps it, which does not depend on how it was written.
    assert length in (steps, steps / 50, {"epochs": steps / 10}, {"fraction": 1.0}, {"steps": 0})
    assert read_length(yaml.safe_load(yaml.safe_dump(length)), "schedule.warmup") == length


@pytest.mark.parametrize(
    "written",
    [1.5, -1, -0.1, math.nan, math.inf, True, None, [], "x", "nan", {}, {"steps": 1.5}, {"steps": -1},
     {"fraction": 1.1}, {"fraction": math.nan}, {"epochs": math.inf}, {"epochs": "1"}, {"days": 1},
     {"steps": 1, "epochs": 1}],
)  # fmt: skip
def test_what_is_no_length_is_refused_in_one_line(written):
    with pytest.raises(UserError, match=r"^schedule\.warmup[^\n]*: got [^\n]*, expected [^\n]*$"):
        read_length(written, "schedule.warmup")


def test_milestones_in_epochs_are_those_of_torchvisions_reference():
    steps, epochs = 5005, 90
    inner = ScheduleConfig(name="step", milestones=({"epochs": 30}, {"epochs": 60}))
    for epoch, rate in ((29, 1.0), (30, 0.1), (59, 0.1), (60, 0.01), (89, 0.01)):
        for step in (epoch * steps, epoch * steps + steps - 1):
            assert learning_rate(inner, 1.0, step, epochs * steps, epochs) == pytest.approx(rate)
    with pytest.raises(UserError, match="no epochs are counted"):
        learning_rate(inner, 1.0, 0, epochs * steps)


def test_an_earlier_runs_numbers_keep_the_units_that_they_had():
    schedule = {"warmup": 1.0, "milestones": [0.5, 1.0, 30, 40.0], "decay_start": 1, "gamma": 0.1}
    scaling = {"window": 1.7, "floors": [[0.5, 2.0], [10.4, 4.0]], "scale": 1.0}
    found = with_units({"schedule": schedule, "loss_scaling": scaling, "seed": 0})
    assert found["schedule"] == {
        "warmup": {"fraction": 1.0},
        "milestones": [0.5, {"fraction": 1.0}, {"steps": 30}, {"steps": 40.0}],
        "decay_start": {"steps": 1},
        "gamma": 0.1,
    }
    assert found["loss_scaling"] == {"window": 2, "floors": [[0.5, 2.0], [10, 4.0]], "scale": 1.0}
    assert with_units(found) == found
    # Before records had the shortest form.
    earlier = {"schedule": {"warmup": {"steps": 5}}, "loss_scaling": {"window": {"fraction": 0.5}}}
    assert with_units(earlier) == {"schedule": {"warmup": 5}, "loss_scaling": {"window": 0.5}}
    assert with_units({"schedule": 3, "loss_scaling": {"floors": [4, []]}}) == {
        "schedule": 3, "loss_scaling": {"floors": [4, []]},
    }  # fmt: skip
