"""The plan of the whole paper: its cells say what they change, and its runner survives what runs do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from study_records import planned, write_run

from fp8repro.cli import main as cli
from fp8repro.errors import UserError
from fp8repro.paper.plan import Job, cell_name, experiment_of, make_jobs, make_plan, plan_file, state, study_cells
from fp8repro.precision.telemetry import Telemetry
from fp8repro.reproduce import needs, runner
from fp8repro.reproduce.board import Board
from fp8repro.reproduce.command import parse_seeds
from fp8repro.settings.choices import groups

CONF = Path(__file__).parents[2] / "conf"
PROFILES = tuple(plan_file()["profiles"])


def changed(name: str, other: str) -> dict[str, Any]:
    """Settings of a cell that another one has otherwise."""
    a, b = planned()[name][0].settings, planned()[other][0].settings
    return {key: a.get(key) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_plan_and_the_experiment_files_are_the_same(profile: str) -> None:
    cells = {experiment_of(name) for study in plan_file()["studies"] for name in study_cells(study, profile)}
    # The dose-response study is a hundred runs: on small data alone. Errors are counted on photos.
    studies = plan_file()["studies"]
    doses = set() if profile == "embedded" else set(studies["doses"]["cells"])
    lost = set() if profile == "midscale" else set(studies["lost"]["cells"])
    assert cells == set(groups()["experiment"]) - doses - lost


def test_errors_are_counted_as_in_the_dose_study_at_the_papers_batch() -> None:
    expected = planned("midscale")["resnet50_reference"][1]
    assert {**expected["precision"], "name": ""} == {**planned()["dose_reference"][1]["precision"], "name": ""}
    assert expected["loss_scaling"] == planned()["dose_reference"][1]["loss_scaling"]
    trainer = expected["trainer"]
    assert (trainer["batch_size"], trainer["micro_steps"], trainer["telemetry_every"]) == (256, 8, 1)
    # Whatever the size of the other cells' images.
    assert (expected["data"]["image_size"], expected["model"]["stem"]) in ((224, "auto"), (224, "imagenet"))


@pytest.mark.parametrize("name", groups()["experiment"])
def test_every_experiment_says_its_command_expected_figure_and_cost(name: str) -> None:
    head = (CONF / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert f"fp8repro train experiment={name}" in head
    assert re.search(r"Expected:|the paper: [\d.]+", head)
    assert "Cost:" in head


def test_one_run_serves_several_tables() -> None:
    cells = {name: cell.studies for name, (cell, _) in planned().items()}
    assert cells["resnet18_fp8"] == ("C1", "C4", "C6", "C7", "recipes")
    assert cells["gnmt_fp8"] == ("C2", "C5")


SCALE = "loss_scaling.scale"
MASTER, NAME = "precision.master", "precision.name"
ACTIVATION = "precision.activation.rounding"
NEAREST = {"precision.error.rounding": "nearest", "precision.gradient.rounding": "nearest"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp8_scale_1", {SCALE: 1}),
        ("fp8_scale_1000", {SCALE: 1000}),
        ("fp8_scale_4000", {SCALE: 4000}),
        ("fp8_nearest", {**NEAREST, f"{MASTER}.rounding": "nearest", NAME: "fp8_nearest"}),
        (
            "fp8_nearest_fp32_master",
            {**NEAREST, f"{MASTER}.rounding": "nearest", f"{MASTER}.format": "fp32", NAME: "fp8_nearest_fp32_master"},
        ),
        ("fp8_stochastic", {ACTIVATION: "stochastic", NAME: "fp8_stochastic"}),
        (
            "fp8_toolkit",
            {f"precision.{role}.subnormal_rounding": "nearest" for role in ("error", "gradient", "master")}
            | {NAME: "fp8_toolkit"},
        ),
        ("fp8_nearest_master", {f"{MASTER}.rounding": "nearest", NAME: "fp8_nearest_master"}),
        ("fp8_wang", {f"{MASTER}.format": "fp16_1_6_9", NAME: "fp8_wang"}),
        ("fp8_fp32_master", {f"{MASTER}.rounding": "nearest", f"{MASTER}.format": "fp32", NAME: "fp8_fp32_master"}),
    ],
)
def test_a_study_changes_what_it_says_and_nothing_else(name: str, expected: dict[str, Any]) -> None:
    assert changed(name, "resnet18_fp8") == expected


ERROR, GRADIENT = "precision.error", "precision.gradient"
AS_FP16 = {f"{ERROR}.format": "fp16", f"{GRADIENT}.format": "fp16", **NEAREST}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dose_nearest", NEAREST),
        ("dose_subnormal", {f"{role}.subnormal_rounding": "nearest" for role in (ERROR, GRADIENT)}),
        ("dose_fp16", AS_FP16),
    ],
)
def test_doses_differ_in_the_rounding_of_errors_and_gradients_and_in_scale(name: str, expected: dict[str, Any]) -> None:
    scales = plan_file()["studies"]["doses"]["scales"]
    for power in scales[name]:
        found = changed(f"{name}@2^{power}", "dose_stochastic@2^10")
        scale = {} if power == 10 else {SCALE: 2.0**power}
        assert found == {**expected, **scale, NAME: name}
        settings = planned()[f"{name}@2^{power}"][0].settings
        assert cell_name(name, settings) == f"{name}@2^{power}"
    # FP16's range ends eight octaves lower: at these scales it loses what E5M2 loses.
    assert [power + 8 for power in scales["dose_fp16"]] == scales["dose_nearest"] == scales["dose_subnormal"]


def test_models_of_the_main_tables_differ_in_precision_and_loss_scaling_only() -> None:
    for model in ("resnet18", "resnet34", "resnet50", "gnmt", "transformer"):
        keys = changed(f"{model}_fp32", f"{model}_fp8")
        assert keys
        assert all(key.startswith(("precision.", "loss_scaling.")) for key in keys)
        assert planned()[f"{model}_fp8"][1]["model"]["name"] == model


def test_policies_of_the_recurrent_study() -> None:
    policies = [planned()[name][1]["loss_scaling"] for name in study_cells("C5", "embedded")]
    assert [policy["policy"] for policy in policies] == ["constant", "dynamic", "enhanced"]
    assert (policies[1]["min_scale"], policies[1]["floors"]) == (1.0, [])
    # They differ in nothing but the floor.
    assert policies[1]["window"] == policies[2]["window"]
    assert policies[2]["floors"] == [[0.12, 64 * 8192], [0.44, 32 * 32768]]


def test_a_study_of_one_run_has_one_seed() -> None:
    cells = [planned("midscale")[name][0] for name in ("resnet18_fp32", "resnet50_reference")]
    jobs = make_jobs(cells, [4, 5, 6], Path("runs"), "midscale")
    assert [job.name for job in jobs] == [
        "resnet18_fp32-seed4", "resnet50_reference-seed4", "resnet18_fp32-seed5", "resnet18_fp32-seed6",
    ]  # fmt: skip


def test_only_takes_studies_models_and_cells() -> None:
    assert [cell.name for cell in make_plan(only=["C5"])[1]] == ["gnmt_fp8", "gnmt_fp8_constant", "gnmt_fp8_dynamic"]
    assert [cell.name for cell in make_plan(only=["transformer", "fp16"])[1]] == [
        "transformer_fp32",
        "transformer_fp8",
        "fp16",
    ]
    with pytest.raises(UserError, match=r"--only: got 'resnet81_fp8', expected one of .*resnet18_fp8"):
        make_plan(only=["resnet81_fp8"])
    with pytest.raises(UserError, match="profile: got 'big'"):
        make_plan(["profile=big"])


def test_the_papers_studies_run_on_the_papers_model_and_data() -> None:
    _, (cell,) = make_plan(["profile=paper"], ["fp8_scale_1000"], {"image": "/data/image net"})
    assert (cell.config["model"]["name"], cell.config["data"]["name"]) == ("resnet50", "imagenet")
    assert (cell.config["data"]["root"], cell.config["trainer"]["epochs"]) == ("/data/image net", 90)


@pytest.mark.parametrize(
    ("text", "seeds"), [("1", [0]), ("3", [0, 1, 2]), ("0,5", [0, 5]), ("7,", [7]), ("0,", [0]), ("2,1,2", [2, 1])]
)
def test_seeds_are_a_count_or_a_list(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


# The last would fill the memory.
@pytest.mark.parametrize("text", ["0", "", ",", "1,,2", "-1", "1,-2", "1.5", "1_0", "x", "auto,1", "99999999999"])
def test_what_is_no_seeds_is_said_in_one_line(text: str) -> None:
    expected = r"expected how many from 1 to 1000 \(3 is 0,1,2\), a list of them \(0,1,2; 5, is 5 alone\) or auto"
    with pytest.raises(UserError, match=rf"^--seeds: got {re.escape(repr(text))}, {expected}$"):
        parse_seeds(text)


@pytest.mark.parametrize("setting", ["seed=3", "run_dir=x", "resume=never", "overwrite=true"])
def test_settings_that_the_plan_gives_each_run_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=rf"^{setting.partition('=')[0]}: got .*: reproduce sets it"):
        make_plan([setting])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_its_number(
    stand_in: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "start", lambda *_: signal.raise_signal(number))
    assert reproduce(stand_in) == (128 + number, [])
    assert "fp8repro: interrupted; the same command continues: fp8repro reproduce" in capsys.readouterr().err


def test_a_paper_plan_names_everything_that_is_missing_and_its_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    arguments = ["reproduce", "profile=paper", "--only", "resnet18_fp8,gnmt_fp8", "--seeds", "1"]
    arguments += ["--images", str(tmp_path), "--runs", str(tmp_path / "runs")]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert "it has no val/ folder" in err
    assert "--text FOLDER: WMT16" in err
    assert err.count("\n") == 1
    hours = 90 * 1281167 / 3200 / 3600 + 6 * 134e6 / 60000 / 3600
    assert f"about {hours:,.0f} GPU-hours" in out
    assert "162 GB of data" in out
    assert not (tmp_path / "runs").exists()


def test_midscale_asks_for_the_users_data() -> None:
    _, cells = make_plan(["profile=midscale"], ["resnet18_fp8"])
    assert needs.missing("midscale", cells, {"image": None, "translation": None}) == [
        "--images FOLDER: a folder of images, train/ and val/ or the class folders themselves"
    ]


C4_CELLS = study_cells("C4", "embedded")
# A stand-in for a training process: it does to its run folder what its name asks for.
STAND_IN = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
settings = dict(part.split("=", 1) for part in sys.argv if "=" in part)
folder, name = Path(settings["run_dir"]), settings["experiment"]
with open(os.environ["STARTED"], "a") as log:
    log.write(folder.name + (" again" if "overwrite" in settings else "") + "\\n")
folder.mkdir(parents=True, exist_ok=True)
if name in os.environ.get("CRASH", "").split():
    print("a last word", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
if name in os.environ.get("REFUSE", "").split():
    sys.exit("fp8repro: no such thing")
configs = json.loads(Path(os.environ["CONFIGS"]).read_text())
(folder / "config.yaml").write_text(configs[name])
(folder / "metrics.jsonl").write_text(json.dumps(dict(kind="train", step=1, epoch=1.0)) + "\\n")
failed = name in os.environ.get("DIVERGE", "").split()
scores = json.loads(os.environ.get("SCORES", "{{}}")).get(name, [98.0])
seed = int(settings["seed"])
summary = dict(status="finished", experiment=name, model="resnet18", data="digits", precision="fp8", profile="embedded",
               loss_scaling="constant", seed=seed, top1=scores[seed % len(scores)])
if failed:
    summary = dict(status="failed", reason="every step was skipped")
(folder / "summary.json").write_text(json.dumps(summary))
if failed:
    print("fp8repro: every step was skipped")
    sys.exit(1)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "python"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o755)
    (tmp_path / "configs.json").write_text(
        json.dumps(
            {name: yaml.safe_dump(planned()[name][1]) for name in (*study_cells("C4", "embedded"), "resnet18_fp32")}
        )
    )
    monkeypatch.setenv("CONFIGS", str(tmp_path / "configs.json"))
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    monkeypatch.setattr(runner.sys, "executable", str(script))
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_LOOKS", 0.02)
    return tmp_path


def reproduce(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    """Exit code, and the runs that were started."""
    (folder / "started").write_text("")
    before = signal.getsignal(signal.SIGTERM)
    code = cli.main(["reproduce", "--only", "C4", "--seeds", "1", "--runs", str(folder / "runs"), *arguments])
    signal.signal(signal.SIGTERM, before)
    return code, (folder / "started").read_text().splitlines()


C4 = ["resnet18_fp8-seed0", "fp8_scale_1-seed0", "fp8_scale_1000-seed0", "fp8_scale_4000-seed0"]


def test_what_is_done_is_left_alone(stand_in: Path) -> None:
    assert reproduce(stand_in) == (0, C4)
    assert reproduce(stand_in) == (0, [])
    (stand_in / "runs/embedded/fp8_scale_1-seed0/summary.json").unlink()
    assert reproduce(stand_in, "--jobs", "2") == (0, ["fp8_scale_1-seed0"])


AUTO = ("--seeds", "auto", "--only", "C4,resnet18_fp32")


@pytest.mark.parametrize(
    ("scores", "seeds"),
    [
        # Decided at the first look, at the second, and at none.
        ([98.1, 98.0, 97.9], 3),
        ([97.2, 98.0, 98.8, 98.05, 97.95, 98.0], 6),
        ([96.0, 98.0, 100.0], 12),
    ],
)
def test_seeds_are_added_until_the_statements_are_decided(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], seeds: int
) -> None:
    monkeypatch.setenv("SCORES", json.dumps({"resnet18_fp8": scores}))
    code, started = reproduce(stand_in, *AUTO, "--jobs", "4")
    assert code == 0
    compared = ("resnet18_fp8", "resnet18_fp32")
    wanted = {f"{name}-seed{seed}" for name in {*C4_CELLS, "resnet18_fp32"}
              for seed in range(seeds if name in compared else 3)}  # fmt: skip
    assert sorted(started) == sorted(wanted)
    # What is there is looked at again, and nothing more runs.
    assert reproduce(stand_in, *AUTO) == (0, [])


def test_a_dry_run_lists_the_seeds_of_the_next_look(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCORES", json.dumps({"resnet18_fp8": [96.0, 98.0, 100.0]}))
    assert reproduce(stand_in, *AUTO, "--dry-run") == (0, [])
    assert "15 runs" in capsys.readouterr().out
    assert len(reproduce(stand_in, *AUTO, "--seeds", "3")[1]) == 15
    capsys.readouterr()
    assert reproduce(stand_in, *AUTO, "--dry-run") == (0, [])
    out = capsys.readouterr().out
    assert "look 1 of 3, at 3 seeds: resnet18_fp32, resnet18_fp8 go on to 6" in out
    states = Counter(line.split("  ")[0] for line in out.splitlines() if "-seed" in line)
    assert states == {"done": 6, "to run": 6}


def test_seeds_are_not_added_for_what_others_would_have_to_decide(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORES", json.dumps({"resnet18_fp8": [96.0, 98.0, 100.0]}))
    assert len(reproduce(stand_in, *AUTO, "--seeds", "3")[1]) == 15
    assert reproduce(stand_in, "--seeds", "auto", "--only", "resnet18_fp8") == (0, [])


def test_the_plan_keeps_going_past_a_crash_and_a_refusal(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRASH", "resnet18_fp8")
    monkeypatch.setenv("REFUSE", "fp8_scale_1")
    assert reproduce(stand_in) == (1, C4)
    out, err = capsys.readouterr()
    assert "failed: resnet18_fp8-seed0: killed by SIGSEGV; last line: a last word" in out
    assert "failed: fp8_scale_1-seed0: exit code 1: no such thing" in out
    assert "2 of 4 runs are done" in out
    assert "2 of 4 runs failed" in err
    # What crashed left no verdict of its own, so the next call goes on with it.
    monkeypatch.setenv("CRASH", "")
    monkeypatch.setenv("REFUSE", "")
    assert reproduce(stand_in) == (0, C4[:2])


def test_a_run_that_failed_is_not_tried_again_silently(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIVERGE", "fp8_scale_1")
    assert reproduce(stand_in) == (1, C4)
    monkeypatch.setenv("DIVERGE", "")
    capsys.readouterr()
    assert reproduce(stand_in) == (1, [])
    assert "every step was skipped (failed before; --retry runs it again)" in capsys.readouterr().out
    assert reproduce(stand_in, "--retry") == (0, ["fp8_scale_1-seed0 again"])


def test_a_run_from_before_a_setting_was_recorded_counts_as_one_of_its_default(stand_in: Path) -> None:
    folder = write_run(stand_in / "runs", "fp8_scale_1")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["precision"].pop("recurrent_gradients", None)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert reproduce(stand_in) == (0, [name for name in C4 if name != "fp8_scale_1-seed0"])
    config["precision"]["recurrent_gradients"] = "sequence"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert reproduce(stand_in) == (2, [])


def test_a_folder_with_another_run_is_refused_before_anything_runs(
    stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(stand_in / "runs", "fp8_scale_1")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"]["epochs"] = 99
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert reproduce(stand_in) == (2, [])
    assert "holds a run with trainer.epochs=99" in capsys.readouterr().err


def test_a_dry_run_says_the_state_of_every_run_and_starts_none(
    stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(stand_in / "runs", "fp8_scale_1")
    (write_run(stand_in / "runs", "fp8_scale_1000") / "summary.json").unlink()
    write_run(stand_in / "runs", "fp8_scale_4000", status="failed")
    assert reproduce(stand_in, "--dry-run") == (0, [])
    lines = [re.split(r"\s{2,}", line)[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["to run", "resnet18_fp8-seed0"] in lines
    assert ["done", "fp8_scale_1-seed0"] in lines
    assert ["begun", "fp8_scale_1000-seed0"] in lines
    assert ["failed", "fp8_scale_4000-seed0"] in lines


def test_two_plans_never_share_a_folder(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unlock = runner.lock_plan(stand_in / "runs" / "embedded")
    assert reproduce(stand_in) == (2, [])
    assert "another fp8repro reproduce is at work" in capsys.readouterr().err
    unlock()
    assert reproduce(stand_in)[0] == 0


def test_paths_with_spaces_and_quotes_reach_the_run(tmp_path: Path) -> None:
    _, cells = make_plan(only=["fp8_scale_1"])
    (job,) = make_jobs(cells, [0], tmp_path / "it's a folder", "embedded")
    from fp8repro.settings.overrides import jobs

    (composed,) = jobs(job.arguments(), sweep=False)
    assert composed.values["run_dir"] == str(job.folder)


def command(folder: Path, *settings: str) -> list[str]:
    arguments = ["reproduce", "--only", "fp8_scale_1,resnet18_fp8", "--seeds", "1", "--runs", str(folder), *settings]
    return [sys.executable, "-m", "fp8repro.cli", *arguments]


@pytest.mark.long
def test_killed_at_three_moments_it_finishes_with_the_same_records(tmp_path: Path) -> None:
    settings = ("trainer.epochs=2", "trainer.checkpoint_every_steps=3", "device=cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole", *settings), check=True, env=environment, timeout=500)
    for seconds in (9, 14, 20):
        process = subprocess.Popen(command(tmp_path / "killed", *settings), env=environment)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "killed", *settings), check=True, env=environment, timeout=500)
    for name in ("fp8_scale_1-seed0", "resnet18_fp8-seed0"):
        whole, killed = (
            json.loads((tmp_path / kind / "embedded" / name / "summary.json").read_text())
            for kind in ("whole", "killed")
        )
        for summary in (whole, killed):
            del summary["train_seconds"]
        assert whole == killed


def test_a_cell_trains_through_the_command_line(tmp_path: Path) -> None:
    arguments = ["--only", "fp8_scale_1", "--seeds", "1", "--runs", str(tmp_path), "trainer.max_steps=1", "device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "fp8repro.cli", "reproduce", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 runs are done" in done.stdout
    _, cells = make_plan(["trainer.max_steps=1", "device=cpu"], ["fp8_scale_1"])
    (job,) = make_jobs(cells, [0], tmp_path, "embedded")
    assert state(job) == "done"
    summary = json.loads((job.folder / "summary.json").read_text())
    assert (summary["experiment"], summary["model"], summary["steps"]) == ("fp8_scale_1", "resnet18", 1)
    lines = map(json.loads, (job.folder / "metrics.jsonl").read_text().splitlines())
    counted = [row for line in lines if line["kind"] == "telemetry" for row in line["rows"] if "exponents" in row]
    for row in counted:
        assert 0 < sum(row["exponents"][1]) <= row["nonzero"] or row["nonzero"] == 0
    assert counted


def test_exponents_are_those_of_frexp_whatever_the_layout() -> None:
    telemetry = Telemetry(every=1)
    telemetry.begin(0)
    x = torch.randn(3, 5, 7, 11, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-30, -19)
    x[0, 0, 0, :4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    for tensor in (x, x.to(memory_format=torch.channels_last)):
        telemetry.buffer("layer", "error", "output_error", x.device)
        telemetry.count_exponents("layer", "error", "output_error", tensor)
    (row,) = telemetry.rows()
    values = x[x.isfinite() & (x != 0)].double().numpy()
    expected = Counter((np.frexp(values)[1] - 1).tolist())
    lowest, counts = row["exponents"]
    assert {e: count for e, count in enumerate(counts, lowest) if count} == {e: 2 * n for e, n in expected.items()}
    telemetry.begin(1)
    big = torch.full((1_000_000,), 2.0**-20)
    telemetry.buffer("layer", "error", "input_error", x.device)
    telemetry.count_exponents("layer", "error", "input_error", big)
    lowest, (count,) = telemetry.rows()[0]["exponents"]
    assert lowest == -20
    assert 16_384 <= count < 20_000


def test_the_time_left_is_known_once_a_run_has_been_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, cells = make_plan([], ["resnet18_fp32", "resnet50_fp32"])
    small, large = (next(c for c in cells if c.model == model) for model in ("resnet18", "resnet50"))
    jobs = [Job(cell, seed, tmp_path / f"{cell.name}-seed{seed}") for seed in (0, 1) for cell in (small, large)]
    board = Board(4)
    board.begin(jobs)
    # A minute of starting and compiling, and a few steps of many.
    assert board.time_left({jobs[0].name: 0.0004}) == "time left: known after the first run"
    board.ended(jobs[0], 600.0, None, {"top1": 90.0, "train_seconds": 590.0})
    # 600 s a unit of cost: 2.8 + 1 + 2.8 of them.
    assert board.time_left({}) == "about 66 min left"
    assert board.time_left({jobs[1].name: 0.5}) == "about 52 min left"
    # Two at a time; the longest that is left ends last.
    assert board.time_left({jobs[1].name: 0.0, jobs[2].name: 0.0}) == "about 33 min left"
    # What failed says nothing; what a cell itself took, more than the plan.
    board.ended(jobs[2], 1.0, "it broke off", {})
    assert board.time_left({}) == "about 28 min left"
    board.ended(jobs[1], 60.0, None, {"top1": 90.0, "train_seconds": 1200.0})
    assert board.time_left({jobs[3].name: 0.25}) == "about 15 min left"
    capsys.readouterr()


def test_runs_of_an_earlier_day_say_how_long_the_others_take(tmp_path: Path) -> None:
    _, cells = make_plan([], ["resnet18_fp32"])
    jobs = [Job(cells[0], seed, tmp_path / f"seed{seed}") for seed in (0, 1)]
    board = Board(2)
    board.known(jobs[0], {"train_seconds": 180.0})
    board.begin(jobs[1:])
    assert board.time_left({jobs[1].name: 0.0}) == "about 3 min left"
    board.known(jobs[0], {"train_seconds": float("nan")})
    assert board.time_left({jobs[1].name: 0.0}) == "about 3 min left"
