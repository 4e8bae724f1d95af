"""A run that diverges: what stops it, what a rollback takes back, and that both survive being killed."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_tools import resuming, rows, tiny_config, use_tiny_network

from fp8repro.errors import RunFailure, UserError
from fp8repro.settings.schema import LossScalingConfig, run_config
from fp8repro.training import checkpoint as checkpoints
from fp8repro.training import loop as loop_module
from fp8repro.training import train
from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint
from fp8repro.training.distributed import World
from fp8repro.training.run import build
from fp8repro.training.tasks import classification
from fp8repro.training.train_step import train_step

# Steps 0 to 3, a checkpoint, steps 4 and 5, three that are skipped, and the rest.
POISONED = range(6, 9)


class Killed(BaseException):
    """The process dies here."""


class Poisoned(nn.Module):
    """A network whose forward pass is infinite while it is switched on."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.on = inner, False

    def forward(self, x):
        return self.inner(x * math.inf if self.on and self.training else x)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_network(monkeypatch)
    inner = classification.make_resnet
    monkeypatch.setattr(classification, "make_resnet", lambda *arguments: Poisoned(inner(*arguments)))


def diverge_at(monkeypatch, steps, after=lambda run: None):
    """Make the forward pass of some steps infinite; `after` is called after every step."""

    def step(run, batches, stop):
        run.model.on = run.step in steps
        result = train_step(run, batches, stop)
        after(run)
        return result

    monkeypatch.setattr(loop_module, "train_step", step)


def rolling_config(run_dir, **trainer):
    settings = {"checkpoint_every_steps": 4, "max_skipped_in_a_row": 3, "max_steps": 14, "on_divergence": "rollback"}
    scaling = LossScalingConfig("dynamic", scale=2.0**10, window=4)
    return tiny_config(run_dir, "fp8_stochastic", scaling, **settings | trainer)


def events(run_dir):
    # Runs of 14 steps learn nothing.
    return [(row["step"], row["what"]) for row in rows(run_dir, "event") if row["what"] != "guessing"]


def rollback_text(run_dir):
    (row,) = [row for row in rows(run_dir, "event") if row["what"] == "rolled_back"]
    return row["text"]


def final_state(run_dir):
    return read_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])


def assert_same_state(a, b):
    for part in ("model", "optimizer", "scaler", "data"):
        left, right = a[part], b[part]
        if part == "optimizer":
            left, right = (
                {f"{i}.{name}": value for i, values in state["state"].items() for name, value in values.items()}
                for state in (left, right)
            )
        assert left.keys() == right.keys()
        for name, value in left.items():
            same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
            assert same, f"{part}.{name}"


def test_rollback_is_the_run_whose_weights_were_put_back_by_hand(tmp_path, monkeypatch):
    diverge_at(monkeypatch, POISONED)
    config = rolling_config(tmp_path / "run")
    summary = train(config)
    assert (summary["status"], summary["steps"]) == ("finished", 14)
    assert (summary["rollbacks"], summary["skipped_steps"]) == (1, 3)

    run = build(config, World())
    run.model.train()
    groups = loop_module._groups(run)
    for step in range(14):
        if step == 4:
            kept = deepcopy((run.model.state_dict(), run.masters.state_dict(), run.scaler.scale, run.scaler.good_steps))
        if step == 9:
            run.model.load_state_dict(kept[0])
            run.masters.load_state_dict(kept[1])
            run.scaler.scale, run.scaler.good_steps, run.scaler.skipped_in_a_row = *kept[2:], 0
        run.model.on = step in POISONED
        train_step(run, next(groups), stop=False)
        run.step += 1
    assert run.scaler.step == 14
    assert_same_state(final_state(tmp_path / "run"), run.state())

    # Every step is on record once, what went wrong too.
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == list(range(1, 15))
    assert events(tmp_path / "run") == [*((step, "nonfinite_forward") for step in (7, 8, 9)), (9, "rolled_back")]
    text = rollback_text(tmp_path / "run")
    assert text.startswith("3 steps in a row were skipped up to step 9 (first at inner.0: activation): the forward ")
    assert text.endswith("; rolled back to the weights after step 4, the updates since are lost")
    (diagnosis,) = rows(tmp_path / "run", "diagnosis")
    assert (diagnosis["step"], diagnosis["first"]) == (9, {"layer": "inner.0", "role": "activation"})
    assert diagnosis["rows"]


@pytest.mark.parametrize("moment", ["among the skipped steps", "before its checkpoint is written", "later"])
def test_killed_around_a_rollback_it_resumes_to_the_same_bits(tmp_path, monkeypatch, moment):
    diverge_at(monkeypatch, POISONED)
    train(rolling_config(tmp_path / "whole"))

    def die(run):
        if run.step == {"among the skipped steps": 8, "later": 10}.get(moment):
            raise Killed

    config = rolling_config(tmp_path / "run")
    own = checkpoints.save_checkpoint

    def save(folder, content, keep):
        if moment == "before its checkpoint is written" and content["step"] == 9:
            raise Killed
        own(folder, content, keep)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", save)
        diverge_at(patch, POISONED, die)
        with pytest.raises(Killed):
            train(config)
    summary = train(resuming(config))
    assert summary["rollbacks"] == 1
    assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "run"))
    whole, found = (
        [
            {k: v for k, v in row.items() if k != "images_per_second"}
            for row in rows(folder)
            if row.get("what") != "resume"
        ]
        for folder in (tmp_path / "whole", tmp_path / "run")
    )
    assert whole == found


def test_after_max_rollbacks_it_stops_and_can_be_resumed_with_more(tmp_path, monkeypatch):
    diverge_at(monkeypatch, range(4, 12))
    config = rolling_config(tmp_path / "run", max_rollbacks=1)
    with pytest.raises(RunFailure, match=r"up to step 10 .*; trainer\.max_rollbacks=1 are used up$"):
        train(config)
    assert [event for event in events(tmp_path / "run") if event[1] != "nonfinite_forward"] == [
        (7, "rolled_back"),
        (10, "failure"),
    ]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["rollbacks"]) == ("failed", 1)
    more = replace(config, resume="auto", trainer=replace(config.trainer, max_rollbacks=2))
    assert train(more)["rollbacks"] == 2


def test_without_a_checkpoint_from_before_it_stops(tmp_path, monkeypatch):
    diverge_at(monkeypatch, range(2, 99))
    with pytest.raises(RunFailure, match=r"; there is no checkpoint from before it to roll back to$"):
        train(rolling_config(tmp_path / "run"))


def test_a_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch):
    def damage(run):
        path = checkpoints.checkpoint_path(tmp_path / "run" / "checkpoints", 8)
        if run.step == 11:
            path.write_bytes(path.read_bytes()[:-1])

    diverge_at(monkeypatch, range(9, 12), damage)
    train(rolling_config(tmp_path / "run"))
    assert "rolled back to the weights after step 4," in rollback_text(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-000000008.pt.damaged").exists()


def test_checkpoints_of_skipped_steps_do_not_drive_out_the_one_before_them(tmp_path, monkeypatch):
    diverge_at(monkeypatch, range(5, 9))
    config = rolling_config(tmp_path / "run", checkpoint_every_steps=1, keep_checkpoints=1, max_skipped_in_a_row=4)
    train(config)
    (rolled_back,) = [row for row in rows(tmp_path / "run", "event") if row["what"] == "rolled_back"]
    assert (rolled_back["step"], "weights after step 5," in rolled_back["text"]) == (9, True)
    # The scale is the one from before the skipped steps.
    scales = {row["step"]: row["loss_scale"] for row in rows(tmp_path / "run", "train")}
    assert scales[6] == scales[10] == 2 * scales[7] == 4 * scales[8]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000000014.pt"]


@pytest.mark.parametrize("on_divergence", ["stop", "rollback"])
def test_weights_that_are_not_finite_are_met_at_once_and_never_saved(tmp_path, monkeypatch, on_divergence):
    def spoil(run):
        if run.step == 5:
            run.model.inner[3].weight.data[0, 0, 0, 0] = math.nan

    diverge_at(monkeypatch, (), spoil)
    config = rolling_config(tmp_path / "run", checkpoint_every_steps=1, keep_checkpoints=9, on_divergence=on_divergence)
    if on_divergence == "stop":
        with pytest.raises(RunFailure, match=r"^weights were not finite after step 6 \(first at inner\.3: weight\): "):
            train(config)
        assert final_state(tmp_path / "run")["step"] == 5
    else:
        assert train(config)["rollbacks"] == 1
        assert "rolled back to the weights after step 5," in rollback_text(tmp_path / "run")
        assert 6 not in [read_checkpoint(path)["step"] for path in list_checkpoints(tmp_path / "run" / "checkpoints")]


def test_a_last_step_that_spoils_the_weights_is_no_finished_run(tmp_path, monkeypatch):
    def spoil(run):
        if run.step == 13:
            run.model.inner[3].weight.data.fill_(math.inf)

    diverge_at(monkeypatch, (), spoil)
    with pytest.raises(RunFailure, match=r"^weights were not finite after step 14 "):
        train(rolling_config(tmp_path / "run", on_divergence="stop"))
    assert final_state(tmp_path / "run")["step"] == 12


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("on_divergence", "retry", "got 'retry', expected one of stop, rollback"),
        ("max_rollbacks", 0, r"got 0, expected a whole number from 1 to 2\^31 - 1"),
        ("max_rollbacks", 1.5, r"got 1.5, expected a whole number from 1 to 2\^31 - 1"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, setting, value, expected):
    values = tiny_config(tmp_path).to_dict()
    values["trainer"][setting] = value
    with pytest.raises(UserError, match=rf"^trainer\.{setting}: {expected}$"):
        run_config(values)
