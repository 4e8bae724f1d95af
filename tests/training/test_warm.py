"""Kernels compiled before a run: those that Triton would compile in it, whole, and never at the cost of the run."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fp8repro.cli.main import main
from fp8repro.errors import RunFailure, UserError
from fp8repro.settings.overrides import jobs
from fp8repro.settings.schema import run_config
from fp8repro.training import warm as warming
from fp8repro.training.distributed import World
from fp8repro.training.progress import Display
from fp8repro.training.tasks import make_task
from fp8repro.training.tasks.task import Examples
from fp8repro.training.warm import Work, compile_kernels, warm, work_of

WORKER = Path(__file__).with_name("just_in_time.py")
SETTINGS = ["model=resnet18", "precision=fp8"]


def config_of(*settings):
    (job,) = jobs([*SETTINGS, *settings], sweep=False)
    return run_config(job.values)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Triton's cache in a folder of its own, and no interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small_work(training=True):
    with torch.device("meta"):
        model, rows = nn.Linear(32, 64), torch.empty(16, 32)
    config = config_of("precision=fp8_nearest", "precision.exempt=[]", "precision.round_outputs=false")
    examples = Examples([(rows,)], []) if training else Examples([], [(rows,)])
    return Work(model, config, examples, False, (9, 0), 132)


def just_in_time(work, how, tmp_path):
    (tmp_path / "work").write_bytes(pickle.dumps(work))
    done = subprocess.run([sys.executable, WORKER, tmp_path / "work", how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# TMA descriptors, tuples, alignment, telemetry, captured steps, both optimizers' updates.
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(
            ["model=resnet18", "optimizer=sgd"],
            {"implicit_gemm_tma", "implicit_gemm", "wgrad_tma", "wgrad", "update", "batch_apply"},
            id="resnet18",
        ),
        pytest.param(
            ["model=transformer", "optimizer=adam"],
            {"multiply", "layer_forward", "round_transpose", "update"},
            id="transformer",
            marks=pytest.mark.long,
        ),
    ],
)
def test_keys_are_the_just_in_time_compilers(settings, expected, compiled, tmp_path):
    config = config_of(*settings, "trainer.telemetry_every=1")
    keys = just_in_time(work_of(config, make_task(config, World()), True, 90), "keys", tmp_path)
    assert expected <= {name for name, _, _ in keys}
    assert [name for name, ours, theirs in keys if ours != theirs] == []
    assert len({theirs for _, _, theirs in keys}) == len(keys) > 50


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (False, {"round_flat", "round_transpose", "multiply"}),
        pytest.param(
            True,
            {"round_flat", "round_transpose", "transpose", "multiply", "update", "gradient_norms"},
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_just_in_time_compiler_finds_what_was_compiled(training, expected, compiled, tmp_path):
    work, shown = small_work(training), []
    warmed = warm(work, lambda *counts: shown.append(counts))
    assert warmed.compiled == warmed.kernels
    assert warmed.folder == str(compiled)
    assert shown[-1] == (warmed.kernels, warmed.kernels)
    assert not list(compiled.rglob("tmp.pid*"))
    hits = just_in_time(work, "hits", tmp_path)
    assert {name for name, _ in hits} == expected
    assert len(hits) == warmed.kernels
    assert [name for name, hit in hits if not hit] == []
    # A second time nothing is left to do, and a damaged entry is compiled again.
    assert warm(work, lambda *_: None).compiled == 0
    next(compiled.glob("*/multiply.cubin")).unlink()
    assert warm(work, lambda *_: None).compiled == 1


@pytest.mark.long
def test_a_kernel_that_does_not_compile_is_named(compiled):
    work = small_work()
    # Not a GPU that Triton knows.
    with pytest.raises(RunFailure, match=r"^\d+ kernels failed, the first one \w+: ."):
        warm(replace(work, capability=(9, 9)), lambda *_: None)


@pytest.mark.long
def test_what_lists_may_fail(compiled):
    work = small_work()
    wrong = Examples([(torch.empty(16, 31, device="meta"),)], [])
    with pytest.raises(RunFailure, match="31"):
        warm(replace(work, examples=wrong), lambda *_: None)


@pytest.mark.parametrize("settings", [SETTINGS, ["model=transformer", "precision=fp8"], ["model=gnmt"]], ids=str)
def test_examples_are_the_shapes_of_all_batches(settings):
    (job,) = jobs([*settings, "trainer.micro_steps=2"], sweep=False)
    config = run_config(job.values)
    for rank in range(2):
        task = make_task(config, World(rank=rank, size=2))
        seen = set()
        for batch in task.batches:
            given = (batch.images,) if config.model.task == "image" else (batch.source, batch.decoder_input)
            seen.add(tuple((t.dtype, *t.shape) for t in given))
        listed = [tuple((t.dtype, *t.shape) for t in given) for given in task.examples().training]
        assert len(set(listed)) == len(listed)
        # Another rank may have a shape of translation that this one has not.
        assert seen <= set(listed) if config.model.task == "translation" else seen == set(listed)


def test_evaluated_shapes_are_listed():
    for settings in (SETTINGS, ["model=transformer", "precision=fp8"]):
        (job,) = jobs(settings, sweep=False)
        task, seen = make_task(run_config(job.values), World()), set()
        task.evaluate(recorder(task, seen), "val")
        assert seen == {tuple(t.shape for t in given) for given in task.examples().evaluation}


def recorder(task, seen):
    """A model that notes its arguments' shapes and answers zeros."""
    image = task.unit == "images"

    def answer(*given):
        seen.add(tuple(t.shape for t in given))
        return torch.zeros(len(given[0]), 10) if image else torch.zeros(*given[1].shape, len(task.data.vocabulary))

    return answer


def test_listing_draws_no_random_numbers():
    task = make_task(config_of(), World())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    work = work_of(config_of(), task, True, 90)
    assert torch.equal(torch.get_rng_state(), before)
    assert {t.device.type for t in (*work.model.parameters(), *work.model.buffers())} == {"meta"}
    assert (work.capability, work.processors) == ((9, 0), 132)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "capability: missing where there is no GPU"),
        (["capability=80"], "capability: got 80, expected 89 or later"),
        (["capability=ninety"], "capability: got 'ninety', expected a whole number over 0"),
        (["capability=91"], "processors: missing for capability=91"),
        (["capability=90", "processors=0"], "processors: got '0', expected a whole number over 0"),
        (["capability=90", "backend=emulate"], "backend: got 'emulate', which compiles nothing"),
        (["capability=90", "modle=resnet18"], "modle: unknown"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_mistakes_are_one_line(given, expected, compiled, capsys):
    assert main(["warm", *SETTINGS, *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fp8repro: {expected}")


def test_a_cache_that_cannot_be_written_is_one_line(compiled, monkeypatch, capsys):
    compiled.write_text("a file")
    assert main(["warm", *SETTINGS, "capability=90"]) == 2
    assert capsys.readouterr().err.startswith("fp8repro: TRITON_CACHE_DIR: ")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["warm", *SETTINGS, "capability=90"]) == 2
    assert capsys.readouterr().err.startswith("fp8repro: TRITON_INTERPRET: got 1, ")


def test_progress_is_a_line_now_and_then_or_a_bar(monkeypatch, capsys):
    with Display(0, 0).counting("compiling kernels") as show:
        show(1, 60)
        show(2, 60)
    assert capsys.readouterr().out == "compiling kernels 1/60\n"
    with Display(9, 0, visible=False).counting("compiling kernels") as show:
        show(1, 60)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    display = Display(9, 0)
    with display.counting("compiling kernels") as show:
        show(30, 60)
        training, compiling = display._bar.tasks
        assert (compiling.completed, compiling.total, compiling.fields["figures"]) == (30, 60, "compiling kernels")
    assert display._bar.tasks == [training]
    display.close()


def run_on(device, backend, size=1, **settings):
    config = replace(config_of(), **settings)
    world = SimpleNamespace(device=torch.device(device), wait=lambda: None, size=size)
    replays = SimpleNamespace(why_not=None)
    return SimpleNamespace(world=world, config=config, report=SimpleNamespace(backend=backend), replays=replays, task=0)


def test_a_run_warms_on_a_gpu_only_and_goes_on_without(monkeypatch, capsys):
    asked = []

    def fail(*arguments):
        asked.append(arguments)
        raise UserError("no room\nat all")

    monkeypatch.setattr(warming, "_gpu", lambda device: (90, 132))
    monkeypatch.setattr(warming, "work_of", fail)
    stop = SimpleNamespace(signal=0)
    for run in (run_on("cpu", "triton"), run_on("cuda", "emulate"), run_on("cuda", "triton", warm="off")):
        compile_kernels(run, Display(1, 0), stop)
    # One process of a machine compiles for all; one that is alone, whatever its GPU.
    monkeypatch.setenv("LOCAL_RANK", "1")
    compile_kernels(run_on("cuda", "triton", size=2), Display(1, 0), stop)
    assert asked == []
    compile_kernels(run_on("cuda", "triton"), Display(1, 0), stop)
    assert [arguments[2:] for arguments in asked] == [(True, 90, 132)]
    expected = "warning: kernels are compiled when they are first launched, not before (no room)\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_its_number(number, monkeypatch, capsys):
    def ask_to_stop(work, show, stopped):
        signal.raise_signal(number)
        assert stopped()
        raise RunFailure("interrupted")

    monkeypatch.setattr(warming, "warm", ask_to_stop)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        main(["warm", *SETTINGS, "capability=90"])
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == "fp8repro: interrupted\n"
    assert signal.getsignal(number) is before


@pytest.mark.long
def test_an_interruption_leaves_whole_kernels_only(compiled):
    command = [sys.executable, "-m", "fp8repro.cli", "warm", *SETTINGS, "capability=90"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    threading.Timer(300, process.kill).start()
    while not list(compiled.glob("*/__grp__*")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    whole = list(compiled.glob("*/__grp__*"))
    assert whole
    assert len(list(compiled.glob("*/*.cubin"))) == len(whole)
    assert not list(compiled.rglob("tmp.pid*"))
    # What is there is not compiled again.
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert f" {len(whole)} were there; " in done.stdout
