"""fp8repro doctor: what is missing is named with what to do about it, and a run is explained from its records."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_tools import tiny_config, use_tiny_network, write_images

from fp8repro.cli import doctor
from fp8repro.cli import main as cli
from fp8repro.data.translation.fairseq_binary import write_binary
from fp8repro.errors import RunFailure
from fp8repro.settings.schema import LossScalingConfig
from fp8repro.training import train
from fp8repro.training.checkpoint import list_checkpoints
from fp8repro.training.record import RunFolder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    use_tiny_network(monkeypatch)


def run(capsys: pytest.CaptureFixture[str], *settings: str) -> tuple[int, str]:
    code = cli.main(["doctor", *settings])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def findings(look: Any) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in look()}


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys; import fp8repro, fp8repro.cli.doctor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_machine_that_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys)
    assert code == 0
    assert text.endswith("training can run\n")
    for name in (
        "Python",
        "torch",
        "torchvision",
        "triton",
        "torch match",
        "CPU engine",
        "runs folder",
        "cache folder",
    ):
        assert f" {name} " in text
    assert not list(Path().iterdir()), "it leaves nothing behind"


def test_a_wrong_version_is_missing_and_an_extra_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["torch>=2.11", "numpy", "nothing-like-this>=3", 'wandb; extra == "wandb"', 'ruff; extra == "dev"']
    monkeypatch.setattr(
        doctor, "requires", lambda package: own if package == "fp8repro" else metadata.requires(package)
    )
    monkeypatch.setattr(
        doctor, "_version", {"torch": "2.10.0+cpu", "numpy": "2.4.6", "torchvision": "0.1", "triton": "3.8"}.get
    )
    found = findings(doctor._packages)
    assert found["torch"] == doctor.Finding("torch", "missing", "2.10.0+cpu", "pip install 'torch>=2.11'")
    assert found["nothing-like-this"].advice == "pip install 'nothing-like-this>=3'"
    assert found["wandb"] == doctor.Finding(
        "wandb", "note", "not installed", "only for wandb: pip install 'fp8repro[wandb]'"
    )
    assert "ruff" not in found
    assert found["other packages"].found == "numpy 2.4.6"
    # What torchvision's own metadata asks for.
    match = findings(doctor._matching)["torch match"]
    assert match.state == "missing"
    assert re.search(r"torchvision wants torch[=>]=[\d.]+, found 2\.10\.0\+cpu", match.found)


def test_a_broken_package_does_not_end_the_doctor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, text = run(capsys)
    assert code == 1
    assert "missing  devices" in text
    assert "import of torch halted" in text
    assert text.splitlines()[-1].startswith("training cannot run: ")


@pytest.mark.parametrize(
    ("driver", "state", "text"),
    [
        ([], "note", "none: training runs on the CPU"),
        (["550.54.15"], "missing", "driver 550.54.15, but torch is built"),
    ],
)
def test_no_gpu_is_a_note_and_an_unusable_one_is_not(
    monkeypatch: pytest.MonkeyPatch, driver: list[str], state: str, text: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_output", lambda *_: driver)
    found = findings(doctor._devices)["GPU"]
    assert found.state == state
    assert found.found.startswith(text)


def test_a_full_disk_and_a_small_shared_memory_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 50_000_000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    found = findings(doctor._places)
    assert found["runs folder"].state == "note"
    assert "0.1 GB free, little" in found["runs folder"].found
    assert "--shm-size" in found["shared memory"].advice


def test_a_folder_that_cannot_be_written_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8REPRO_CACHE", "/proc/nowhere")
    found = findings(doctor._places)["cache folder"]
    assert (found.state, found.advice) == ("missing", "set FP8REPRO_CACHE to a folder with room")


def test_data_roots_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", count=20)
    one = tmp_path / "one folder"
    one.mkdir()
    for name in ("left", "right"):
        (one / name).symlink_to(images / "train" / name)
    binary = tmp_path / "binary"
    binary.mkdir()
    for language in ("en", "fr"):
        (binary / f"dict.{language}.txt").write_text("a 3\nb 2\nc 1\nd 1\n")
        for split in ("train", "valid", "test"):
            write_binary(binary / f"{split}.fr-en.{language}", [np.array([4, 2]), np.array([5, 2])], 8)
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "valid", "test"):
        for language in ("en", "de"):
            (text / f"{split}.{language}").write_text("a\nb\n")
    assert doctor._data(images) == "images, 2 classes, 20 to train and 6 to validate"
    assert (
        doctor._data(one) == "images, 2 classes, 18 to train and 2 to validate, split by data.options.val_fraction=0.1"
    )
    assert doctor._data(binary) == "fairseq_binary fr-en, 2 pairs, 8 ids"
    assert doctor._data(text) == "parallel text, pairs: train 2, valid 2, test 2"
    (text / "test.en").write_bytes(b"a\n\xff\n")
    (images / "train" / "left" / "000.png").write_bytes(b"no image")
    for root, message in (
        (text, "line 2 holds byte 0xff"),
        (images, "cannot be read (cannot identify image file"),
        (tmp_path / "nowhere", "is no folder"),
    ):
        code, output = run(capsys, f"data.root={root}")
        assert code == 1
        assert f"missing  data.root        data.root: {str(root)!r}" in output or message in output
        assert message in output
        assert output.splitlines()[-1] == "training cannot run: data.root"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["root=x"], "doctor: got 'root=x', expected data.root=FOLDER, run=FOLDER or figure=FILE"),
        (["run="], "doctor: got 'run='"),
        (["run=x", "data.root=y"], "got run= beside other settings"),
        (["run=nowhere"], "run: 'nowhere' holds no run"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], settings: list[str], message: str) -> None:
    code, text = run(capsys, *settings)
    assert code == 2
    assert message in text
    assert text.count("\n") == 1


def test_a_run_that_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(tiny_config(tmp_path / "run", epochs=1))
    code, text = run(capsys, f"run={tmp_path / 'run'}")
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert code == 0
    assert lines["state"] == f"finished top1 {summary['top1']:.5g}"
    assert lines["steps"] == "12, 0 skipped (0.0%)"
    assert lines["checkpoints"] == "whole: step 12"
    assert "advice" not in lines


def test_a_run_that_diverged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(
        tmp_path / "run", "fp8", LossScalingConfig("constant", scale=2.0**100), max_skipped_in_a_row=4, epochs=1
    )
    with pytest.raises(RunFailure):
        train(config)
    code, text = run(capsys, f"run={tmp_path / 'run'}")
    assert code == 1
    state, first = (
        next(line for line in text.splitlines() if line.startswith(name)) for name in ("state", "non-finite")
    )
    assert "failed: 4 steps in a row were skipped up to step 4" in state
    (diagnosis,) = (
        row
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if row["kind"] == "diagnosis"
    )
    assert f"layer {diagnosis['first']['layer']}, role {diagnosis['first']['role']}" in first
    assert "event        skipped, 4 times, first at step 1: a gradient was not finite" in text
    assert "overflow" in text
    assert "advice       lower loss_scaling.scale" in text
    assert "advice       resume=auto trainer.on_divergence=rollback goes back" in text


def test_a_run_that_was_killed_and_its_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path / "run", epochs=1, checkpoint_every_steps=4)
    train(config)
    (tmp_path / "run" / "summary.json").unlink()
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    code, text = run(capsys, f"run={tmp_path / 'run'}")
    assert code == 1
    assert "stopped or killed; the last that was recorded is step 12" in text
    assert f"checkpoints  whole: step 8; damaged: {newest.name} is damaged (its checksum differs)" in text
    assert "advice       the same command with resume=auto" in text
    assert newest.exists(), "it only looks"


def test_a_run_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path / "run", epochs=1)
    train(config)
    with RunFolder(replace(config, resume="auto")):
        assert "state        running now" in run(capsys, f"run={tmp_path / 'run'}")[1]


def test_a_foreign_record_leaves_the_terminal_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"status": "failed", "reason": "\x1b[2Jred\n" + "x" * 10_000}))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "event", "what": ["\\u001b"], "step": "many"}\n{"rows": 3}\n[]\n')
    code, text = run(capsys, f"run={tmp_path}")
    assert code == 1
    assert "\x1b" not in text
    assert len(text) < 2000


def test_what_roundings_cost_each_layer_is_told_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"run={tmp_path / 'run'}"
    train(tiny_config(tmp_path / "run", "fp8", epochs=1, telemetry_every=5))
    code, text = run(capsys, folder, f"figure={tmp_path / 'noise.png'}")
    assert code == 0
    noise = next(line for line in text.splitlines() if line.startswith("noise "))
    layer, role, decibels = noise.split("least signal: ")[1].split(", ")[0].split()[:3]
    assert role in ("weight", "activation", "error", "gradient")
    assert 0 < float(decibels) < 30
    first = next(line for line in text.splitlines() if line.startswith("exempt first")).split()
    assert first[2].rstrip(",") == layer
    header, _, row = text.splitlines()[text.splitlines().index("") + 1 :][:3]
    assert header.split()[:3] == ["layer", "role", "operand"]
    assert row.split()[:2] == [layer, role]
    assert (tmp_path / "noise.png").stat().st_size > 1000
    code, text = run(capsys, folder, f"figure={tmp_path / 'nowhere' / 'noise.png'}")
    assert (code, text.count("\n")) == (2, 1)
    assert "figure: cannot write" in text


def test_figures_need_a_run_with_telemetry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "telemetry", "rows": [{"format": "e5m2", "exponents": [1]}, 3]}\n'
    )
    for settings, message in (
        ([f"run={tmp_path}", "figure=x.png"], "figure: got a run without telemetry"),
        (["figure=x.png"], "doctor: got figure= without run="),
    ):
        code, text = run(capsys, *settings)
        assert (code, text.count("\n")) == (2, 1)
        assert message in text
