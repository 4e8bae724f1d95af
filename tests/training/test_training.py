"""The training loop on a small network: what it computes, what it records, how it ends."""

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from torch import nn
from training_tools import rows, tiny_config, use_tiny_network, write_images

from fp8repro.errors import RunFailure, UserError
from fp8repro.numerics.reference import BITS_VERSION
from fp8repro.paper.examples import read_correct
from fp8repro.settings.schema import DataConfig, LossScalingConfig, OptimizerConfig, run_config
from fp8repro.training import loop as loop_module
from fp8repro.training import train
from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint
from fp8repro.training.diagnosis import diagnose
from fp8repro.training.distributed import World
from fp8repro.training.optimizer import decay_groups, l2_loss
from fp8repro.training.run import build
from fp8repro.training.tasks import classification
from fp8repro.training.train_step import accumulate_gradients, train_step


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_network(monkeypatch)


SUMMARY_KEYS = {
    *(
        "model",
        "data",
        "precision",
        "loss_scaling",
        "profile",
        "seed",
        "steps",
        "skipped_steps",
        "skipped_share",
        "rollbacks",
    ),
    "warnings",
    *(
        "top1",
        "top5",
        "train_seconds",
        "status",
        "experiment",
        "epochs",
        "parameters",
        "device",
        "backend",
        "graphs",
        "version",
        "bits",
        "best",
    ),
}


def test_a_run_leaves_its_records(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", "fp8", LossScalingConfig("constant", scale=1000), telemetry_every=8)
    config = replace(config, trainer=replace(config.trainer, eval_train=True))
    summary = train(config)
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary.keys() == SUMMARY_KEYS
    assert (summary["steps"], summary["epochs"], summary["status"]) == (24, 2, "finished")
    assert run_config(yaml.safe_load((folder / "config.yaml").read_text())) == config
    environment = json.loads((folder / "environment.json").read_text())
    assert {"python", "packages", "cpu", "threads", "platform", "commit"} <= environment.keys()
    assert summary["bits"] == environment["bits"] == BITS_VERSION

    train_rows, evals = rows(folder, "train"), rows(folder, "eval", timed=True)
    assert [row["step"] for row in train_rows] == list(range(1, 25))
    assert train_rows[0].keys() == {
        *("kind", "step", "epoch", "loss", "top1", "lr", "loss_scale", "skipped_steps", "grad_norm", "l2"),
        "images_per_second",
    }
    assert [(row["step"], row["split"]) for row in evals] == [(12, "val"), (12, "train"), (24, "val"), (24, "train")]
    assert evals[2]["top1"] == summary["top1"]
    assert evals[3]["loss"] < evals[1]["loss"] < math.log(10)
    assert 0 < evals[0]["seconds"] <= evals[2]["seconds"] <= summary["train_seconds"]
    (convert,) = rows(folder, "convert")
    assert {row["status"] for row in convert["rows"]} == {"converted", "exempt", "left"}
    (memory,) = rows(folder, "memory")
    parameters = summary["parameters"]
    assert 2 * parameters <= memory["master_bytes"] < 2.3 * parameters
    assert parameters <= memory["weight_bytes"] < memory["master_bytes"]
    assert [row["step"] for row in rows(folder, "telemetry")] == [1, 9, 17]
    assert {row["role"] for row in rows(folder, "telemetry")[0]["rows"]} >= {
        "weight",
        "activation",
        "error",
        "gradient",
    }
    assert "top1" in capsys.readouterr().out


def test_a_run_keeps_which_images_its_weights_classify_right(tmp_path):
    config = tiny_config(tmp_path, "fp8", LossScalingConfig("constant", scale=1000))
    summary = train(config)
    run = build(config, World())
    run.load(read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1]))
    images = torch.stack([run.task.data.val[0, index][0] for index in range(359)])
    labels = torch.tensor(run.task.data.val_labels)
    run.model.eval()
    with torch.no_grad():
        expected = run.model(images).argmax(1) == labels
    order, correct = read_correct(tmp_path)
    assert correct.tolist() == expected.tolist()
    assert 100 * correct.mean() == pytest.approx(summary["top1"])
    assert 0 < correct.sum() < 359
    # Other images, or the same in another order, cannot be compared one by one.
    run.task.data.val_labels.reverse()
    run.task.finish(run.model, {"top1": 0.0, "top5": 0.0}, tmp_path)
    assert read_correct(tmp_path)[0] != order


def test_saved_bytes_are_a_quarter_with_fp8_activations(tmp_path, monkeypatch):
    # Convolutions alone: what normalization and ReLU save is theirs in every precision.
    def convolutions(name, classes, channels, image_size, stem):
        layers = [nn.Conv2d(channels, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))

    monkeypatch.setattr(classification, "make_resnet", convolutions)
    saved = {}
    for precision in ("fp32", "fp8"):
        config = tiny_config(tmp_path / precision, precision, max_steps=1)
        train(config)
        (memory,) = rows(tmp_path / precision, "memory")
        saved[precision] = memory["saved_for_backward_bytes"]
    images = 120  # of the first batch: 1,438 in 12 steps
    assert saved["fp32"] >= images * 64 * 4 * (1 + 3 * 16)
    assert saved["fp8"] <= images * 64 * (2 + 3 * 16) + images * 16 * 2 + 4 * 10 * images * 4


def test_reference_loop_in_plain_torch_gives_the_same_weights(tmp_path):
    """FP32 training is what ten lines of torch do."""
    config = tiny_config(tmp_path / "run", max_steps=5, label_smoothing=0.1)
    run = build(config, World())
    torch.manual_seed(config.seed)
    model = classification.make_resnet("resnet18", 10, 1, 8)
    model[6].p = run.model[6].p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    run.model.train()
    batches = list(run.task.batches)[:5]
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / run.total_steps)) / 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1).backward()
        optimizer.step()
        train_step(run, [batch], stop=False)
        run.step += 1
    for name, value in model.state_dict().items():
        assert torch.allclose(value.double(), run.model.state_dict()[name].double(), atol=1e-5), name


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_micro_steps_and_loss_scale_leave_the_update_as_it_is(tmp_path, monkeypatch, scale):
    """The scaled loss is the mean over the global batch, whatever it is cut into."""

    def smooth(name, classes, channels, image_size, stem):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, classes))

    monkeypatch.setattr(classification, "make_resnet", smooth)
    weights = []
    for micro_steps in (1, 3):
        scaling = LossScalingConfig("constant", scale=scale)
        config = tiny_config(tmp_path / f"{micro_steps}", scaling=scaling, micro_steps=micro_steps, max_steps=4)
        train(config)
        weights.append(read_checkpoint(list_checkpoints(tmp_path / f"{micro_steps}" / "checkpoints")[-1])["model"])
    for name in weights[0]:
        assert torch.allclose(*(w[name] for w in weights), atol=1e-6), name


def test_same_seed_same_run_another_seed_another(tmp_path):
    finals = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = replace(tiny_config(tmp_path / name, "fp8_stochastic", epochs=0.5), seed=seed)
        train(config)
        finals.append(read_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1])["model"]["3.weight"])
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])


def test_random_state_of_the_process_does_not_matter(tmp_path):
    finals = []
    for name in ("a", "b"):
        torch.rand(7 if name == "a" else 5)
        train(tiny_config(tmp_path / name, epochs=0.5))
        finals.append(read_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1])["model"]["3.weight"])
    assert torch.equal(*finals)


class Poisoned(nn.Module):
    """Gives infinity in the passes of some steps."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls, self.count = inner, calls, 0

    def forward(self, x):
        if self.training:
            self.count += 1
            if self.count - 1 in self.calls:
                x = x * math.inf
        return self.inner(x)


def poison(monkeypatch, calls):
    inner = classification.make_resnet
    monkeypatch.setattr(classification, "make_resnet", lambda *args: Poisoned(inner(*args), calls))


def test_nonfinite_forward_leaves_normalization_alone_and_is_reported(tmp_path, monkeypatch):
    poison(monkeypatch, calls={3})
    config = tiny_config(tmp_path / "run", micro_steps=2, max_steps=4)
    run = build(config, World())
    run.model.train()
    groups = loop_module._groups(run)
    before = None
    for step in range(3):
        if step == 1:
            before = {name: value.clone() for name, value in run.model.state_dict().items()}
        result = train_step(run, next(groups), stop=False)
        run.step += 1
        if step == 1:
            assert not result.applied
            assert not result.forward_finite
            after = run.model.state_dict()
            assert all(torch.equal(before[name], after[name]) for name in before)
        else:
            assert result.applied
    assert run.scaler.skipped == 1

    poison(monkeypatch, calls={3})
    train(config)
    (event,) = [row for row in rows(tmp_path / "run", "event") if row["what"] == "nonfinite_forward"]
    assert event["step"] == 2
    assert "no loss scale cures it" in event["text"]


def test_backward_overflow_keeps_the_statistics_of_the_pass(tmp_path):
    config = tiny_config(tmp_path / "run", "fp8", LossScalingConfig("dynamic", scale=2.0**24, max_scale=2.0**24))
    run = build(config, World())
    run.model.train()
    before = run.model[1].running_mean.clone()
    result = train_step(run, next(loop_module._groups(run)), stop=False)
    assert (result.applied, result.forward_finite) == (False, True)
    assert not torch.equal(before, run.model[1].running_mean)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (LossScalingConfig("constant", scale=2.0**40), "the loss scale is fixed at 1.09951e+12"),
        (
            LossScalingConfig("enhanced", scale=2.0**40, max_scale=2.0**40, floors=((0.0, 2.0**36),)),
            "the loss scale collapsed to its floor 6.87195e+10",
        ),
    ],
)
def test_run_that_only_skips_ends_with_a_line(tmp_path, scaling, message):
    config = tiny_config(tmp_path / "run", "fp8", scaling, max_skipped_in_a_row=6)
    with pytest.raises(RunFailure, match="6 steps in a row were skipped up to step 6 ") as e:
        train(config)
    assert message in str(e.value)
    # The last layer meets the scaled error first and cannot hold it in FP16.
    assert "(first at 10: error): gradients are not finite, and " in str(e.value)
    (diagnosis,) = rows(tmp_path / "run", "diagnosis")
    assert diagnosis["first"] == {"layer": "10", "role": "error"}
    assert any(row["role"] == "error" and row["overflow"] for row in diagnosis["rows"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["skipped_steps"], summary["reason"]) == ("failed", 6, str(e.value))
    assert rows(tmp_path / "run", "event")[-1]["what"] == "failure"
    with pytest.raises(RunFailure, match="every one of the 3 steps was skipped"):
        train(replace(config, overwrite=True, trainer=replace(config.trainer, max_steps=3)))


def test_diverged_forward_ends_with_a_line(tmp_path, monkeypatch):
    poison(monkeypatch, calls=range(3, 99))
    with pytest.raises(RunFailure, match=r"up to step 8 \(first at inner\.0: activation\): the forward pass is not"):
        train(tiny_config(tmp_path / "run", max_skipped_in_a_row=5))


def test_no_memory_is_one_line(tmp_path, monkeypatch):
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loop_module, "train_step", no_memory)
    with pytest.raises(UserError, match=r"^trainer\.batch_size: got 128, no memory on cpu for it"):
        train(tiny_config(tmp_path / "run"))


def test_a_folder_of_300_images_trains_and_a_truncated_one_is_named(tmp_path):
    write_images(tmp_path / "images", count=226)
    assert len(list((tmp_path / "images").glob("*/*/*.png"))) == 300
    # The two classes are each other's mirror images.
    options = {"flip": False, "augmentation": "none"}
    data = DataConfig("image_folder", str(tmp_path / "images"), 16, workers=1, options=options)
    config = tiny_config(tmp_path / "run", data=data, batch_size=16, epochs=6)
    assert train(config)["top1"] > 90
    bad = tmp_path / "images" / "train" / "left" / "007.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(UserError, match=r"data\.root: image '.*train/left/007\.png' cannot be read"):
        train(replace(config, overwrite=True))


def test_weight_decay_groups(tmp_path):
    model = classification.make_resnet("resnet18", 10, 1, 8)
    everything = decay_groups(model, OptimizerConfig(weight_decay=0.1))
    assert [len(group["params"]) for group in everything] == [len(list(model.parameters()))]
    split = decay_groups(model, OptimizerConfig(weight_decay=0.1, decay_norm_and_bias=False))
    assert [group["weight_decay"] for group in split] == [0.1, 0.0]
    assert all(p.dim() > 1 for p in split[0]["params"])
    assert all(p.dim() <= 1 for p in split[1]["params"])
    expected = sum(float(p.detach().double().square().sum()) for p in model.parameters()) / 2
    assert l2_loss(model) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8_nearest", "fp8_hybrid"])
def test_every_precision_trains(tmp_path, precision):
    config = tiny_config(tmp_path / "run", precision, LossScalingConfig("constant", scale=1000), epochs=1)
    assert train(config)["status"] == "finished"
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert losses[-1] < losses[0]


def test_bf16_products_are_of_bf16_operands(tmp_path):
    run = build(tiny_config(tmp_path / "run", "bf16"), World())
    seen = []
    run.model[3].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run.model.train()
    train_step(run, next(loop_module._groups(run)), stop=False)
    assert seen == [torch.bfloat16]


def test_diagnosis_names_the_layer_and_changes_nothing(tmp_path):
    config = tiny_config(tmp_path / "run", "fp8", LossScalingConfig("constant", scale=1000))
    run = build(config, World())
    run.model.train()
    batches = next(loop_module._groups(run))
    train_step(run, batches, stop=False)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}

    def repeat():
        run.statistics.keep()
        accumulate_gradients(run, 1, batches, 1.0)
        run.statistics.restore()

    found = diagnose(run.model, run.context.telemetry, repeat)
    assert found["first"] is None
    # A step that was measured before it is repeated is counted once.
    run.context.telemetry.every = 1
    run.context.telemetry.begin(1)
    repeat()
    assert run.context.telemetry.rows()
    assert diagnose(run.model, run.context.telemetry, repeat)["rows"] == found["rows"]
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    for name, role in (("3.weight", "weight"), ("4.bias", "weight")):
        parameter = run.model.get_parameter(name)
        kept = parameter.data.clone()
        parameter.data[0] = math.nan
        assert diagnose(run.model, run.context.telemetry, repeat)["first"] == {"layer": name[0], "role": role}
        parameter.data = kept
    run.model[2].register_forward_hook(lambda module, inputs, output: output.clone().fill_(math.inf))
    assert diagnose(run.model, run.context.telemetry, repeat)["first"] == {"layer": "2", "role": "activation"}
    assert not run.context.telemetry.active


def test_sizes_that_a_resnet_does_not_have_are_refused(tmp_path):
    config = tiny_config(tmp_path / "run")
    with pytest.raises(UserError, match=r"model\.size\.width: got 3, expected no sizes for resnet18"):
        train(replace(config, model=replace(config.model, size={"width": 3})))


def test_a_run_that_is_past_its_last_step_already_is_refused_and_stays_as_it_is(tmp_path, monkeypatch):
    use_tiny_network(monkeypatch)
    config = tiny_config(tmp_path / "run", max_steps=3)
    train(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    less = replace(config, resume="auto", trainer=replace(config.trainer, max_steps=2))
    with pytest.raises(UserError, match=r"max_steps: got 2 with a checkpoint after step 3, expected at least 3"):
        train(less)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
