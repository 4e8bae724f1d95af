"""Figures that cannot be trusted: outputs that are not finite, training that is no better than guessing, short runs."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import yaml
from torch import nn
from training_tools import resuming, rows, tiny_config, tiny_network, use_tiny_network, write_images

from fp8repro.errors import RunFailure, UserError
from fp8repro.results.records import read_records
from fp8repro.settings.schema import DataConfig, LossScalingConfig, OptimizerConfig, run_config
from fp8repro.training import loop as loop_module
from fp8repro.training import train
from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint
from fp8repro.training.distributed import World
from fp8repro.training.evaluate import checkpoint_config, evaluate
from fp8repro.training.optimizer import settle_rate
from fp8repro.training.run import make_task
from fp8repro.training.soundness import all_finite
from fp8repro.training.tasks import classification


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_network(monkeypatch)


class Outputs(nn.Module):
    """Gives the right class of every validation image, some rows replaced."""

    def __init__(self, labels, replaced):
        super().__init__()
        self.logits = 9 * nn.functional.one_hot(torch.tensor(labels), 10).float()
        for row, values in replaced.items():
            self.logits[row] = torch.tensor(values)
        self.given = 0

    def forward(self, images):
        self.given += len(images)
        return self.logits[self.given - len(images) : self.given]


@pytest.mark.parametrize("bad", [[math.nan] * 10, [math.inf] * 10, [-math.inf] * 10, [math.inf] + [0.0] * 9])
def test_rows_that_are_not_finite_are_no_hits_and_are_counted(tmp_path, bad):
    task = make_task(tiny_config(tmp_path), World())
    labels = task.data.val_labels
    zeros = [index for index, label in enumerate(labels) if label == 0][:7]
    metrics = task.evaluate(Outputs(labels, dict.fromkeys(zeros, bad)), "val")
    count = len(labels)
    assert metrics["top1"] == metrics["top5"] == pytest.approx(100 * (count - 7) / count)
    assert metrics["nonfinite"] == 7
    assert not math.isfinite(metrics["loss"])
    assert not all_finite(metrics)
    sound = task.evaluate(Outputs(labels, {}), "val")
    assert sound.keys() == {"loss", "top1", "top5"}
    assert sound["top1"] == 100
    assert all_finite(sound)
    assert not all_finite({"loss": 0.1, "nonfinite": 1.0})
    # Training counts its hits alike.
    batch = next(iter(task.batches))
    _, figures = task.loss(lambda images: torch.full((len(images), 10), math.nan), *task.inputs(batch))
    assert figures["top1"] == 0


class Overflowing(nn.Module):
    """A network whose outputs in evaluation are infinite for some passes over the validation images."""

    def __init__(self, inner, passes):
        super().__init__()
        self.inner, self.passes, self.done = inner, passes, 0

    def forward(self, x):
        if self.training:
            return self.inner(x)
        self.done += 1
        return self.inner(x) + (math.inf if self.done - 1 in self.passes else 0.0)


def overflow(monkeypatch, passes):
    monkeypatch.setattr(
        classification,
        "make_resnet",
        lambda *arguments: Overflowing(tiny_network(*arguments), passes),
    )


def test_a_run_whose_last_evaluation_is_not_finite_failed_and_enters_no_table(tmp_path, monkeypatch, capsys):
    overflow(monkeypatch, {1})
    config = tiny_config(tmp_path / "run", eval_batch_size=512)
    with pytest.raises(RunFailure, match=r"^the evaluation after step 24 met outputs for 359 images were not finite"):
        train(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["reason"].endswith("which count as misses (loss nan)")
    assert summary["warnings"][0] == "evaluations that met numbers that are not finite: 1"
    assert summary["best"]["step"] == 12
    records, problems = read_records([tmp_path])
    assert not records
    assert "its status is 'failed'" in problems[0]
    assert [row.get("nonfinite") for row in rows(tmp_path / "run", "eval")] == [None, 359]
    assert rows(tmp_path / "run", "eval")[1]["top1"] == 0
    assert next(row["what"] for row in rows(tmp_path / "run", "event")) == "nonfinite_evaluation"
    assert "warning: the evaluation after step 24 met" in capsys.readouterr().out
    # Its weights are there, and going on changes nothing.
    with pytest.raises(RunFailure, match=r"^the evaluation after step 24 met"):
        train(resuming(config))


def test_infinities_on_the_way_are_never_the_best_and_stay_in_the_summary(tmp_path, monkeypatch):
    overflow(monkeypatch, {0})
    summary = train(tiny_config(tmp_path / "run", eval_batch_size=512))
    assert summary["status"] == "finished"
    assert summary["warnings"] == ["evaluations that met numbers that are not finite: 1"]
    assert summary["best"]["step"] == 24
    assert math.isfinite(summary["best"]["metrics"]["loss"])


def test_weights_that_are_not_finite_score_nothing(tmp_path):
    config = tiny_config(tmp_path)
    model = tiny_network("resnet18", 10, 1)
    model[-1].weight.data.fill_(math.nan)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    figures = evaluate(tmp_path / "a.pth", config)
    assert (figures["top1"], figures["top5"], figures["nonfinite"]) == (0, 0, 359)
    assert math.isnan(figures["loss"])


def idle(run_dir, **trainer):
    config = tiny_config(run_dir, epochs=3, eval_batch_size=512, **trainer)
    return replace(config, optimizer=OptimizerConfig(lr=1e-12))


def guesses(run_dir):
    return [row for row in rows(run_dir, "event") if row["what"] == "guessing"]


def test_a_run_that_learns_nothing_says_so_once_also_when_it_is_killed(tmp_path, monkeypatch, capsys):
    summary = train(idle(tmp_path / "whole"))
    (line,) = summary["warnings"]
    # 359 images, at most 37 of a class: 10.3 %, and two standard deviations of 1.6 %.
    assert re.fullmatch(
        r"no better than guessing after step 36 of 36: .*validation top1 \S+ \(guessing up to 13\.52\); .*", line
    )
    (event,) = guesses(tmp_path / "whole")
    assert event["step"] == 24
    assert capsys.readouterr().out.count("warning: no better than guessing after step 24 of 36") == 1
    assert json.loads((tmp_path / "whole" / "summary.json").read_text()) == summary

    own = loop_module._evaluate

    def die(run, *arguments):
        own(run, *arguments)
        if run.step == 24:
            raise KeyboardInterrupt

    # The checkpoint after step 24 is written before the evaluation that warns.
    config = idle(tmp_path / "parts", checkpoint_every_steps=12)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "_evaluate", die)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert train(resuming(config))["warnings"] == summary["warnings"]
    assert guesses(tmp_path / "parts") == [event]


def test_a_run_that_learns_warns_of_nothing(tmp_path):
    assert train(tiny_config(tmp_path / "run", epochs=4))["warnings"] == []
    assert not rows(tmp_path / "run", "event")


def test_chance_is_that_of_the_largest_class(tmp_path):
    write_images(tmp_path / "images", count=60)
    for number in range(5):
        (tmp_path / "images" / "val" / "left" / f"{number:03d}.png").unlink()
    data = DataConfig("image_folder", str(tmp_path / "images"), 16)
    chance = make_task(tiny_config(tmp_path / "run", data=data, batch_size=16), World()).chance()
    assert chance["loss"] == math.log(2)
    assert chance["top1"] == pytest.approx(100 * (2 / 3 + 2 * math.sqrt(2 / 9 / 15)))


def test_the_share_of_skipped_steps_is_in_the_summary(tmp_path):
    scaling = LossScalingConfig("dynamic", scale=2.0**24, max_scale=2.0**24)
    summary = train(tiny_config(tmp_path / "run", "fp8", scaling, max_steps=20))
    assert summary["skipped_steps"] > 0
    assert summary["skipped_share"] == summary["skipped_steps"] / 20


@pytest.mark.parametrize(
    ("batch_size", "steps", "rate"),
    [(128, 8, 0.01), (128, 200, 0.05), (128, 800, 0.1), (128, 945, 0.1), (32, 945, 0.025), (32, 200, 0.0125)],
)
def test_sgds_rate_follows_batch_size_and_length_of_run(batch_size, steps, rate):
    config = OptimizerConfig(lr=None, momentum=0.8)
    assert settle_rate(config, batch_size, steps) == replace(config, lr=pytest.approx(rate))
    given = OptimizerConfig(lr=0.3)
    assert settle_rate(given, batch_size, steps) is given
    with pytest.raises(UserError, match=r"^optimizer\.lr: got null with optimizer\.name=adam, expected a number"):
        settle_rate(replace(config, name="adam"), batch_size, steps)


def test_a_settled_rate_is_on_record_and_resumes(tmp_path, capsys):
    config = replace(tiny_config(tmp_path / "run", max_steps=8), optimizer=OptimizerConfig(lr=None))
    train(config)
    assert "optimizer.lr: 0.0173, for 24 steps of batch 128\n" in capsys.readouterr().out
    assert rows(tmp_path / "run", "train")[0]["lr"] == pytest.approx(0.1 * math.sqrt(24 / 800))
    saved = run_config(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert saved.optimizer.lr == pytest.approx(0.1 * math.sqrt(24 / 800))
    more = replace(config, resume="auto", trainer=replace(config.trainer, max_steps=None))
    assert train(more)["steps"] == 24


def test_a_checkpoint_is_not_scored_on_classes_of_other_names(tmp_path):
    write_images(tmp_path / "images")
    data = DataConfig("image_folder", str(tmp_path / "images"), 16)
    train(tiny_config(tmp_path / "run", data=data, batch_size=16, max_steps=2))
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    config = checkpoint_config(checkpoint)
    figures = evaluate(checkpoint, config)
    for split in ("train", "val"):
        (tmp_path / "images" / split / "left").rename(tmp_path / "images" / split / "up")
    with pytest.raises(UserError, match=r"^data\.root: class 0 is 'right', and 'left' in '.*', expected the same"):
        evaluate(checkpoint, config)
    torch.save(read_checkpoint(checkpoint)["model"], tmp_path / "weights.pth")
    by_order = evaluate(tmp_path / "weights.pth", config)
    assert by_order["top1"] == pytest.approx(100 - figures["top1"])


def test_a_single_class_is_nothing_to_learn(tmp_path):
    # The folder above the class folders is one.
    write_images(tmp_path / "images" / "all")
    data = DataConfig("image_folder", str(tmp_path / "images"), 16, options={"val_fraction": 0.25})
    with pytest.raises(UserError, match=r"^data\.root: '.*images' holds one class folder \('all'\), expected at least"):
        train(tiny_config(tmp_path / "run", data=data))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_of_more_steps_than_can_be_counted_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^trainer\.epochs: got 1e\+308, expected under \d+: fewer than 2\^31 steps"):
        train(tiny_config(tmp_path / "run", epochs=1e308, max_steps=1))
