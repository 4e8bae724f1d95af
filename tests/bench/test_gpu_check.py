"""The GPU check: what its manifest says of stages that end well, badly, late or never; and a rehearsal of all parts."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fp8repro.settings.overrides import jobs
from fp8repro.settings.schema import run_config

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS / "gpu"))
import check  # noqa: E402
from stages import PARTS, Choices, Stage, stages  # noqa: E402


def python(code):
    return (sys.executable, "-c", code)


def statuses(out, part="some"):
    return {entry["name"]: entry["status"] for entry in json.loads((out / "manifest.json").read_text())[part]["stages"]}


def test_no_stage_stops_the_next_and_the_manifest_says_what_became_of_each(tmp_path):
    planned = [
        Stage("good", python("print('all well'); print()")),
        Stage("bad", python(f"raise SystemExit('lost in {tmp_path}')")),
        Stage("hanging", python("import time; print('begun', flush=True); time.sleep(60)"), limit=1),
        Stage("like bad", python("print(1)"), like="bad"),
        Stage("absent", why="there is no data"),
        Stage("long", python("print(1)"), least=1000),
        Stage("last", python("print('still run')")),
    ]
    part = check.Check("some", planned, tmp_path, budget=100, rehearsal=True)
    assert part.run() == 1
    manifest = json.loads((tmp_path / "manifest.json").read_text())["some"]
    assert manifest["rehearsal"] is True
    assert statuses(tmp_path) == {
        **{"good": "done", "bad": "failed", "hanging": "timed out", "like bad": "skipped"},
        **{"absent": "skipped", "long": "skipped", "last": "done"},
    }
    lines = {entry["name"]: entry["last_line"] for entry in manifest["stages"]}
    assert lines["good"] == "all well"
    # No path of the machine.
    assert lines["bad"] == "lost in OUT"
    assert lines["hanging"] == "begun"
    assert lines["like bad"] == "bad failed"
    assert lines["absent"] == "there is no data"
    assert "of 100 are left, expected 1000" in lines["long"]
    assert 1 <= manifest["stages"][2]["seconds"] < 10
    assert (tmp_path / "logs" / "bad.log").read_text() == "lost in OUT\n"
    assert not (tmp_path / "work").exists()


def test_the_budget_shortens_a_limit_and_skips_the_rest(tmp_path):
    hang = python("import time; time.sleep(60)")
    part = check.Check("some", [Stage("one", hang, least=1), Stage("two", hang, least=1)], tmp_path, budget=1.5)
    assert part.run() == 1
    assert statuses(tmp_path) == {"one": "timed out", "two": "skipped"}


def test_a_stage_is_skipped_where_less_time_is_left_than_its_like_took(tmp_path):
    part = check.Check("some", [], tmp_path, budget=100)
    part.entries = [{"name": "first", "status": "done", "seconds": 120.4}]
    stage = Stage("second", python(""), like="first", least=1)
    assert part.why_not(stage).endswith("expected 120")
    part.entries[0]["seconds"] = 50
    assert part.why_not(stage) is None


def test_parts_in_one_folder_share_a_manifest(tmp_path):
    for name in ("one", "two"):
        check.Check(name, [Stage("only", python(""))], tmp_path, budget=100).run()
    assert statuses(tmp_path, "one") == statuses(tmp_path, "two") == {"only": "done"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_check_ends_its_stage_and_says_so(tmp_path, number):
    code = f"""
import signal, sys
sys.path.insert(0, {str(SCRIPTS / "gpu")!r})
from pathlib import Path
import check
from stages import Stage
signal.signal(signal.SIGTERM, check._interrupt)
wait = "import time; print('begun', flush=True); time.sleep(60)"
planned = [Stage("one", (sys.executable, "-c", wait)), Stage("two", (sys.executable, "-c", wait))]
sys.exit(check.Check("some", planned, Path({str(tmp_path)!r}), budget=100).run())
"""
    process = subprocess.Popen(python(code), stdout=subprocess.DEVNULL)
    log = tmp_path / "logs" / "one.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    # As it would stay if the machine went away.
    assert statuses(tmp_path) == {"one": "running", "two": "not reached"}
    process.send_signal(number)
    assert process.wait(30) == 130
    assert statuses(tmp_path) == {"one": "interrupted", "two": "skipped"}


def test_records_of_a_run_are_kept_without_checkpoints(tmp_path):
    write = "from pathlib import Path; run = Path('runs/model'); (run / 'checkpoints').mkdir(parents=True); "
    write += "[(run / name).write_text('{}') for name in ('config.yaml', 'metrics.jsonl', 'checkpoints/1')]; 1 / 0"
    check.Check("some", [Stage("model", python(write), in_work=True)], tmp_path, budget=100).run()
    assert statuses(tmp_path) == {"model": "failed"}
    kept = sorted(path.name for path in (tmp_path / "runs" / "model").rglob("*"))
    assert kept == ["config.yaml", "metrics.jsonl"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rehearse", [True, False])
def test_parts(part, rehearse, tmp_path):
    planned = stages(part, Choices(tmp_path / "out", tmp_path, 4, rehearse))
    names = [stage.name for stage in planned]
    assert len(set(names)) == len(names)
    for number, stage in enumerate(planned):
        assert stage.command
        assert stage.least <= stage.limit <= 450
        assert stage.like is None or stage.like in names[:number]
    if part == "train":
        first = ["environment", "conversions", "product", "warm", "resnet18-fp32-seed0", "resnet18-fp8-seed0"]
        assert names[:6] == first
        watched = [stage.name for stage in planned if "--replays-within" in stage.command]
        assert watched == ([] if rehearse else [f"resnet18-fp8-seed{seed}" for seed in range(3)])
    if part == "transformer":
        assert names == ["warm", "transformer-fp32", "transformer-fp8"]
    if part == "translation":
        assert names == ["base", "big", "gnmt"]
        # All of them fit into the default budget.
        assert sum(stage.limit for stage in planned) <= 450
    # Kernels of all runs are compiled before the first one.
    assert all("warm=off" in stage.command for stage in planned if "watched_run.py" in str(stage.command))
    # Relative: what a run records of them names no machine.
    runs = [stage for stage in planned if stage.in_work]
    assert all(f"data.root={check.DATA}" in stage.command for stage in runs)


def test_a_run_that_does_not_replay_is_asked_to_stop_and_says_why(monkeypatch):
    import watched_run

    monkeypatch.setattr(watched_run, "GRACE", 0.0)
    watch = watched_run.Watch(within=0.1)
    for _ in range(3):
        watch.count(False, None)
    gave_up, asked = [], []
    monkeypatch.setattr(watched_run.os, "kill", lambda process, number: asked.append(number))
    thread = threading.Thread(target=watch.wait, args=(lambda: gave_up.append(watch.stopped),))
    thread.start()
    thread.join(10)
    assert asked == [signal.SIGINT]
    assert gave_up == [watch.stopped]
    assert watch.stopped.startswith("stopped after 0.1 s: 3 passes, 0 of them replayed (expected 50); in ")
    assert "join" in watch.stopped


def test_enough_replays_end_the_watch():
    import watched_run

    watch = watched_run.Watch(within=30)
    for _ in range(watched_run.ENOUGH):
        watch.count(True, None)
    watch.wait(lambda: pytest.fail("gave up"))
    assert watch.stopped is None
    assert watch.seconds is not None


def start(*arguments, **environment):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, **environment}
    return subprocess.run([SCRIPTS / "gpu_check.sh", *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu(tmp_path):
    done = start("train", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (2, "gpu_check: got no CUDA device, expected one (or --rehearse)\n")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line(tmp_path):
    done = start("train", str(tmp_path / "out"), "--rehearse", "--data", "nowhere")
    assert (done.returncode, done.stderr) == (2, "gpu_check: --data: got 'nowhere', expected a folder\n")
    assert start("trian", str(tmp_path)).returncode == 2


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders of JPEG images, as CIFAR-10's are."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for label in "ab":
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Aligned text, named as Multi30k is."""
    root = tmp_path_factory.mktemp("text")
    for split, count in (("train", 40), ("val", 4), ("test", 4)):
        for language, words in (
            ("en", ("a", "cat", "sees", "two", "dogs")),
            ("de", ("die", "Katze", "sieht", "Hunde")),
        ):
            lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 6)) for i in range(1, count + 1)]
            (root / f"{split}.{language}").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rehearse", [True, False])
def test_settings_of_all_stages_are_accepted(part, rehearse, images, sentences, tmp_path):
    for data in (sentences if part == "transformer" else images, None):
        for stage in stages(part, Choices(tmp_path, data, 4, rehearse)):
            settings = [word for word in stage.command if re.match(r"(?!capability)[a-z_.]+=", word)]
            if stage.in_work:
                (job,) = jobs(settings, sweep=False)
                run_config(job.values)


@pytest.mark.long
@pytest.mark.parametrize("part", PARTS)
def test_rehearsal(part, images, sentences, tmp_path):
    images = sentences if part == "transformer" else images
    done = start(part, str(tmp_path / "out"), "--rehearse", "--data", str(images), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = statuses(tmp_path / "out", part)
    assert set(found.values()) == {"done"}
    assert len(found) == len(stages(part, Choices(tmp_path, images, 4, True)))
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in written if str(tmp_path) in path.read_text() or str(images) in path.read_text()]
    # What the kernels' benchmark finds is read again, and runs are records.
    expected = {"manifest.json"} | ({"triton-s-interpreter.json"} if part != "transformer" else set())
    assert {path.name for path in written} >= expected
    for name in found:
        if name.startswith(("resnet", "transformer")):
            assert (tmp_path / "out" / "runs" / name / "summary.json").exists()
