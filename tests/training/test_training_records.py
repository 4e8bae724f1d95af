"""What a training run leaves behind, and what it refuses to touch: records, folders, checkpoints, curves."""

import json
import os
import resource
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_tools import tiny_config, use_tiny_network

from fp8repro.errors import RunFailure, UserError
from fp8repro.settings.schema import DataConfig, LossScalingConfig
from fp8repro.training import train
from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from fp8repro.training.distributed import World
from fp8repro.training.environment import describe_environment
from fp8repro.training.evaluate import checkpoint_config, evaluate, measure
from fp8repro.training.progress import Display
from fp8repro.training.record import RunFolder, run_folder
from fp8repro.training.run import build
from fp8repro.training.signals import StopRequest, exit_code


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_network(monkeypatch)


def test_evaluate_gives_the_runs_own_figures(tmp_path):
    summary = train(tiny_config(tmp_path / "run", "fp8_stochastic", LossScalingConfig("constant", scale=1000)))
    (path,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    config = checkpoint_config(path)
    for _ in range(2):  # to nearest: no randomness
        metrics = evaluate(path, config)
        assert (metrics["top1"], metrics["top5"]) == (summary["top1"], summary["top5"])
    plain = tmp_path / "weights.pth"
    torch.save({name: value.float() for name, value in read_checkpoint(path)["model"].items()}, plain)
    assert evaluate(plain, config) == metrics
    in_fp32 = evaluate(plain, tiny_config(tmp_path / "other"))
    assert in_fp32["loss"] != metrics["loss"]
    torch.save({"nonsense": torch.zeros(3)}, plain)
    with pytest.raises(UserError, match=r"checkpoint: 0\.weight is missing in the file"):
        evaluate(plain, config)


def test_folders_are_not_overwritten_silently(tmp_path):
    config = tiny_config(tmp_path / "run", max_steps=1)
    train(config)
    with pytest.raises(UserError, match=r"^run_dir: .* holds a run, expected overwrite=true, resume=auto"):
        train(config)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(replace(config, overwrite=True))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    with RunFolder(replace(config, resume="auto")), pytest.raises(UserError, match="is in use by another run"):
        train(replace(config, overwrite=True))
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    config = tiny_config(tmp_path / "run", data=DataConfig("imagenet", str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"data\.root"):
        train(config)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir: .* cannot be written"):
        train(tiny_config(tmp_path / "file" / "run"))


def test_names_say_what_ran_and_lead_nowhere_else(tmp_path):
    config = replace(tiny_config(None, "fp8", LossScalingConfig("constant", scale=1e4)), run_dir=None, seed=3)
    assert run_folder(config).name == "resnet18-digits-fp8-constant10000-seed3"
    evil = replace(config, precision=replace(config.precision, name="../../x y"))
    assert run_folder(evil).parent == Path("runs")
    assert run_folder(replace(tiny_config(None), run_dir=None)).name == "resnet18-digits-fp32-seed0"


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(tmp_path):
    config = tiny_config(tmp_path / "run", max_steps=2)
    train(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    content = read_checkpoint(list_checkpoints(checkpoints)[0])

    # A limit on the size of files fails in the middle of a write, as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(RunFailure, match=r"step-000000003\.pt cannot be written \(.*\); the ones before are whole"):
            save_checkpoint(checkpoints, content | {"step": 3}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000000002.pt", "step-000000002.pt.sha256"]
    assert read_checkpoint(list_checkpoints(checkpoints)[0])["step"] == 2


def test_the_last_checkpoints_are_kept(tmp_path):
    train(tiny_config(tmp_path / "run", max_steps=9, checkpoint_every_steps=2, keep_checkpoints=3))
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-000000006.pt", "step-000000008.pt", "step-000000009.pt"]


def test_averaged_weights_are_the_mean_of_the_last_epochs(tmp_path):
    config = tiny_config(tmp_path / "run", "fp8", epochs=3, average_checkpoints=2, batch_size=512)
    summary = train(config)
    folder = tmp_path / "run" / "checkpoints"
    saved = [torch.load(path)["model"] for path in sorted(folder.glob("epoch-*.pt"))]
    assert len(saved) == 2
    run = build(replace(config, run_dir=str(tmp_path / "other")), World())
    mean = {name: (saved[0][name].double() + saved[1][name].double()) / 2 for name in saved[0]}
    run.model.load_state_dict({name: value.to(saved[0][name].dtype) for name, value in mean.items()})
    assert measure(run.task, run.model, config.precision, World())["top1"] == summary["top1"]


def test_environment_names_no_place():
    text = json.dumps(describe_environment())
    for secret in {os.getcwd(), os.path.expanduser("~") + "/", socket.gethostname()} - {"//", "localhost"}:
        assert secret not in text


def test_training_outside_the_main_thread(tmp_path):
    """Signal handlers cannot be set there; training must do without."""
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tiny_config(tmp_path / "run", max_steps=1))))
    thread.start()
    thread.join()
    assert found[0]["steps"] == 1


def test_tensorboard_has_the_curves_and_wandb_asks_to_be_installed(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(tiny_config(tmp_path / "run", max_steps=2), logger="tensorboard"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/loss_scale", "val/top1"} <= set(events.Tags()["scalars"])
    with pytest.raises(UserError, match="logger: got wandb, which is not installed"):
        train(replace(tiny_config(tmp_path / "other", max_steps=2), logger="wandb"))


def test_a_terminal_gets_a_bar_with_figures_and_a_pipe_gets_lines(capsys, monkeypatch):
    display = Display(steps=10, start=0)
    display.show(1, {"loss": 2.34567, "images/s": 100})
    display.show(2, {"loss": 1.0})  # too soon for another line
    display.say("epoch 1")
    display.close()
    assert capsys.readouterr().out.splitlines() == ["step 1/10  loss 2.346  images/s 100", "epoch 1"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    display = Display(steps=10, start=4)
    display.show(5, {"loss": 2.34567, "scale": 1024.0})
    display.say("epoch 1")
    display.close()
    shown = capsys.readouterr().out
    assert "5/10" in shown
    assert "loss 2.346  scale 1024" in shown
    assert "epoch 1\n" in shown.replace("\r", "")


def test_the_first_signal_is_a_wish_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [exit_code(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == [130, 143, 138]
