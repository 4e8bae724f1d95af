"""The command line: what is asked is what runs, and every mistake is one line with the nearest valid choice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp8repro.cli import main as cli
from fp8repro.errors import RunFailure, UserError
from fp8repro.settings.overrides import changed, jobs
from fp8repro.training import loop

SUMMARY = {
    "status": "finished",
    "model": "resnet18",
    "data": "digits",
    "precision": "fp8",
    "loss_scaling": "constant",
    "profile": "embedded",
    "seed": 0,
    "steps": 10,
    "skipped_steps": 1,
    "top1": 98.25,
    "top5": 100.0,
    "train_seconds": 4.2,
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FP8REPRO_DEBUG", raising=False)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that training was asked for; nothing trains."""
    configs: list[Any] = []

    def train(config: Any) -> dict[str, Any]:
        configs.append(config)
        return {**SUMMARY, "precision": config.precision.name, "seed": config.seed}

    monkeypatch.setattr(loop, "train", train)
    return configs


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["trian"],
            "verb: got 'trian', expected one of train, warm, evaluate, reproduce, report, compare, doctor, bench",
        ),
        (
            ["train", "model=resnt18"],
            "model: got 'resnt18', expected one of resnet18, resnet50, resnet34, fairseq_transformer, gnmt, "
            "gnmt_4layer, transformer, transformer_base",
        ),
        (
            ["train", "precision=fp9"],
            "precision: got 'fp9', expected one of fp8, bf16, fp16, fp32, fp8_hybrid, fp8_nearest, fp8_sequence, "
            "fp8_stochastic, fp8_toolkit",
        ),
        (["train", "loss_scaling=dynamik"], "expected one of dynamic, auto, constant, enhanced, none"),
        (
            ["train", "data=digit"],
            "data: got 'digit', expected one of digits, fairseq_binary, image_folder, imagenet, ",
        ),
        (["train", "data.cache=true"], "data.cache: got true with data 'digits', which is no image files, expected"),
        (["train", "model=gnmt", "data.cache=true"], "data.cache: got true with data 'synthetic_translation'"),
        (["train", "modle=resnet18"], "modle: unknown setting, expected one of model"),
        (["train", "trainer.epoch=3"], "trainer.epoch: unknown setting, expected one of trainer.epochs"),
        (["train", "precision.eror.format=e5m2"], "expected one of precision.error.format"),
        (["train", "precision.error.format=e5m3"], "precision.error.format: got 'e5m3', expected one of e5m2"),
        (["train", "trainer.epochs=many"], "trainer.epochs: got 'many', expected a number"),
        (["train", "trainer.epochs=0"], "trainer.epochs: got 0, expected a number over 0"),
        (["train", "seed=1.5"], "seed: got 1.5, expected a whole number"),
        (["train", "run_dir="], "run_dir: got an empty text, expected a path"),
        (["train", "-m", "seed=0,1", "run_dir="], "run_dir: got an empty text, expected a path"),
        (["train", "device=gpu"], "device: got 'gpu', expected one of auto, cpu, cuda"),
        (["train", "+surprise=1"], "surprise: unknown setting"),
        (["train", "model"], "'model': expected group=choice or setting=value"),
        (["train", "trainer.epochs=["], "'trainer.epochs=['"),
        (["train", "optimizer.lr=${nowhere}"], "nowhere"),
        (["train", "~trainer.nothing"], "trainer.nothing"),
        (["train", "precision=fp32,fp8"], "precision: got fp32,fp8, expected one value (-m"),
        (["train", "-m", "optimizer.lr=interval(0,1)"], "expected a list of values"),
        (["train", "model=gnmt", "data=digits"], "data: got 'digits' with model=gnmt, expected one of fairseq_binary"),
        (["train", "data=digits", "profile=paper"], "data: got 'digits' with profile=paper, expected one of imagenet"),
        (["train", "--config=x"], "unrecognized arguments: --config=x"),
        (["compare", "nowhere"], "runs: got 'nowhere', expected a folder"),
        (["compare", "--format", "html"], "invalid choice: 'html'"),
        (["bench", "kernel"], "bench: got 'kernel', expected one of kernels"),
        (["evaluate"], "the weights are missing"),
        (["evaluate", "precision=fp8"], "the weights are missing"),
        (["evaluate", "nowhere.pt"], "'nowhere.pt' is missing"),
        (["evaluate", "."], "'.' holds no checkpoints"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fp8repro: ")
    assert err.count("\n") == 1
    assert expected in err
    assert "Traceback" not in err
    assert not list(Path().iterdir()), "a mistake leaves nothing behind"


def test_debugging_shows_where_an_error_came_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8REPRO_DEBUG", "1")
    code, _, err = run(capsys, "train", "model=resnt18")
    assert code == 2
    assert "Traceback" in err
    assert "resnt18" in err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_verbs_models_data_precisions_and_policies(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    for name in (*cli.VERBS, "resnet50", "gnmt", "transformer", "digits", "wmt16", "fp8_hybrid", "enhanced"):
        assert f"\n  {name} " in out


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_a_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: fp8repro {verb}")


@pytest.mark.parametrize("name", list(cli.BENCHES))
def test_every_benchmark_has_a_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fp8repro bench {name}")


def test_the_console_script_answers_without_torch_and_without_a_traceback() -> None:
    script = Path(sys.executable).parent / "fp8repro"
    done = subprocess.run([script, "train", "precision=fp88"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("fp8repro: precision: got 'fp88', expected one of fp8, bf16, ")
    assert done.stderr.count("\n") == 1
    program = "import sys; from fp8repro.cli.main import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_package_prints_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", "import fp8repro"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "fp8repro.cli"], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert done.stderr == b""


def test_train_runs_what_was_asked_and_prints_the_result(
    capsys: pytest.CaptureFixture[str], trained: list[Any]
) -> None:
    code, out, err = run(capsys, "train", "model=resnet34", "precision=fp8", "trainer.epochs=2", "seed=3")
    assert (code, err) == (0, "")
    (config,) = trained
    assert (config.model.name, config.precision.name, config.trainer.epochs, config.seed) == ("resnet34", "fp8", 2, 3)
    assert config.run_dir == "runs/resnet34-digits-fp8-trainer.epochs_2-seed3"
    assert "top-1 98.25 %" in out
    assert config.run_dir in out


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(
    capsys: pytest.CaptureFixture[str], trained: list[Any]
) -> None:
    code, _, _ = run(capsys, "train", "-m", "precision=fp32,fp8", "seed=range(0,3)", "optimizer.lr=0.1,0.2")
    assert code == 0
    assert [(c.precision.name, c.seed, c.optimizer.lr) for c in trained[:3]] == [
        ("fp32", 0, 0.1),
        ("fp32", 0, 0.2),
        ("fp32", 1, 0.1),
    ]
    assert len({config.run_dir for config in trained}) == len(trained) == 12


@pytest.mark.parametrize(
    "sweep",
    [
        ["experiment=resnet18_fp32,resnet18_fp8"],
        ["experiment=fp8_scale_1,fp8_scale_1000", "model=resnet18,resnet34"],
        ["experiment=resnet18_fp8", "precision=fp8,fp8_nearest"],
        ["loss_scaling=constant", "loss_scaling.scale=1,1000"],
        ["backend=auto,emulate"],
        ["data=image_folder", "data.root=/a/c,/b/c"],
    ],
)
def test_no_two_runs_of_a_sweep_share_a_folder(sweep: list[str]) -> None:
    planned = jobs(sweep, sweep=True)
    assert len(planned) > 1
    assert len({job.name for job in planned}) == len(planned)


def test_a_sweep_is_checked_before_it_starts(capsys: pytest.CaptureFixture[str], trained: list[Any]) -> None:
    code, _, err = run(capsys, "train", "-m", "precision=fp32,fp9")
    assert code == 2
    assert "fp9" in err
    assert not trained


def test_a_sweep_goes_on_past_a_failed_run_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Any) -> dict[str, Any]:
        if config.seed == 0:
            raise RunFailure("loss_scaling: collapsed")
        return SUMMARY

    monkeypatch.setattr(loop, "train", train)
    code, out, err = run(capsys, "train", "-m", "seed=0,1")
    assert code == 1
    assert "98.25" in out
    assert err.splitlines() == ["fp8repro: loss_scaling: collapsed", "fp8repro: 1 of 2 runs failed"]


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(130), 130), (SystemExit(143), 143)])
def test_an_interrupted_run_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stop: BaseException, code: int
) -> None:
    def train(config: Any) -> dict[str, Any]:
        raise stop

    monkeypatch.setattr(loop, "train", train)
    assert run(capsys, "train", "data.root=a folder") == (
        code,
        "",
        "fp8repro: interrupted; to go on: fp8repro train 'data.root=a folder' resume=auto\n",
    )


def test_cfg_job_prints_settings_that_make_the_same_run(capsys: pytest.CaptureFixture[str], trained: list[Any]) -> None:
    code, out, _ = run(capsys, "train", "--cfg", "job", "model=resnet50", "precision=fp8_hybrid")
    assert code == 0
    assert not trained
    assert "training=digits_resnet" in out.splitlines()[0]
    printed = yaml.safe_load(out)
    assert (printed["model"]["name"], printed["precision"]["weight"]["format"]) == ("resnet50", "e4m3")
    assert printed["loss_scaling"] == {**printed["loss_scaling"], "policy": "constant", "scale": 10000}


@pytest.mark.parametrize(
    "path", ["a=b", "a folder (1)", "Bücher/日本", "it's", "back\\slash", "a/b-c_d.e", "../x", "1e3x"]
)
@pytest.mark.parametrize("setting", ["data.root", "run_dir"])
def test_folders_need_no_quotes(setting: str, path: str) -> None:
    (job,) = jobs([f"{setting}={path}"], sweep=False)
    section, _, name = setting.rpartition(".")
    assert (job.values[section] if section else job.values)[name] == path


def test_run_names_stay_short_and_inside_their_folder() -> None:
    (job,) = jobs(["data=image_folder", "data.options.note=../../etc", "trainer.epochs=3"], sweep=False)
    assert "/" not in job.name
    assert job.name.startswith("resnet18-image_folder-fp8-")
    many = [f"data.options.setting{i}={'x' * 30}" for i in range(20)]
    (one,), (other,) = jobs(many, sweep=False), jobs([*many[:-1], "data.options.setting19=y"], sweep=False)
    assert len(one.name) < 150
    # A run's name can be given back as run_dir= without quotes.
    assert not set(one.name) & set("=,' ()[]{}")
    assert one.name != other.name


def test_a_runs_settings_can_be_changed_for_evaluation() -> None:
    (job,) = jobs(["precision=fp32"], sweep=False)
    result = changed(job.values, ["precision=fp8", "data.root=/data", "trainer.eval_batch_size=8"])
    assert result["precision"]["weight"]["format"] == "e5m2"
    assert (result["data"]["root"], result["trainer"]["eval_batch_size"]) == ("/data", 8)
    assert job.values["trainer"]["eval_batch_size"] != 8
    for wrong in ("precison=fp8", "precision=fp9", "trainer.epoch=1", "seed=1,2"):
        with pytest.raises(UserError, match="expected"):
            changed(job.values, [wrong])


def test_train_evaluate_compare_from_an_empty_folder(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["trainer.max_steps=3", "trainer.batch_size=16", "logger=none", "device=cpu", "run_dir=here"]
    code, _, err = run(capsys, "train", "precision=fp8", *settings)
    assert (code, err) == (0, "")
    summary = json.loads(Path("here/summary.json").read_text())
    assert (summary["steps"], summary["precision"]) == (3, "fp8")
    assert [path.name for path in Path().iterdir()] == ["here"]

    code, out, _ = run(capsys, "evaluate", "here", "device=cpu")
    assert code == 0
    assert f"top1 {summary['top1']:.4f}" in out
    code, out, _ = run(capsys, "evaluate", "here", "precision=fp32")
    assert code == 0
    assert "resnet18 on digits (val), fp32" in out
    code, _, err = run(capsys, "evaluate", "here", "--split", "test")
    assert code == 2
    assert "--split: got 'test', expected one of val, train" in err

    code, out, _ = run(capsys, "compare", ".", "--format", "json")
    (row,) = json.loads(out)
    assert (code, row["mean"], row["settings"]) == (0, summary["top1"], "trainer.max_steps=3")

    code, _, err = run(capsys, "train", "precision=fp8", *settings)
    assert code == 2
    assert "overwrite=true" in err


@pytest.mark.parametrize("model", ["resnet34", "resnet50"])
def test_deep_networks_train_at_the_papers_loss_scale_from_the_first_step(model, tmp_path):
    settings = [f"model={model}", "precision=fp8", f"run_dir={tmp_path / 'run'}", "logger=none"]
    assert cli.main(["train", *settings, "trainer.max_steps=3", "trainer.eval_every_epochs=0"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["loss_scaling"], summary["steps"], summary["skipped_steps"]) == ("constant", 3, 0)
