"""Several processes under torchrun (gloo on the CPU) against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_worker import fp8_config, synchronized_config, without_dropout
from replaying import write_text
from torch import nn
from training_tools import rows, write_images

import fp8repro.training.tasks.classification
from fp8repro.errors import UserError
from fp8repro.paper.examples import read_correct
from fp8repro.precision.graphs import why_not_graphed
from fp8repro.precision.injection import inject
from fp8repro.training import train
from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint
from fp8repro.training.distributed import World, join_world
from fp8repro.training.running_statistics import SyncBatchNorm2d

HERE = Path(__file__).parents[1]


def torchrun(run_dir, what, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(HERE / "distributed_worker.py"), str(run_dir), what]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr


def ranks(run_dir):
    return [torch.load(run_dir / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def fp8_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("fp8") / "run"
    torchrun(run_dir, "both")
    return run_dir


def test_two_processes_with_synchronized_normalization_equal_one(fp8_run, tmp_path, monkeypatch):
    two = fp8_run.with_name("run-synchronized")
    monkeypatch.setattr(fp8repro.training.tasks.classification, "make_resnet", without_dropout)
    train(synchronized_config(tmp_path / "one"))
    a, b = ranks(two)
    one = read_checkpoint(list_checkpoints(tmp_path / "one" / "checkpoints")[-1])["model"]
    for name, value in one.items():
        assert torch.equal(a["model"][name], b["model"][name]), name
        # Two ranks times two micro-steps against two micro-steps: statistics are of a micro-step.
        assert torch.allclose(a["model"][name].double(), value.double(), atol=2e-4), name
    # Metrics are sums over all examples: 359 validation images do not divide by two ranks or by the batch.
    for kind, figures in (("train", ("loss", "top1", "grad_norm", "l2")), ("eval", ("loss", "top1", "top5"))):
        for mine, theirs in zip(rows(tmp_path / "one", kind), rows(two, kind), strict=True):
            assert mine["step"] == theirs["step"]
            for figure in figures:
                assert theirs[figure] == pytest.approx(mine[figure], rel=2e-3, abs=0.3 if "top" in figure else 1e-6)
    # Each rank saw every other image; the record has them in the data's order.
    (order, alone), (same, together) = (read_correct(folder) for folder in (tmp_path / "one", two))
    assert order == same
    assert 100 * together.mean() == pytest.approx(rows(two, "eval")[-1]["top1"])
    assert (alone != together).sum() <= 1


def test_ranks_agree_on_weights_and_scale_but_not_on_the_bits_of_errors(fp8_run):
    a, b = ranks(fp8_run)
    for name, value in a["model"].items():
        assert value.numpy().tobytes() == b["model"][name].numpy().tobytes(), name
    assert a["scales"] == b["scales"]
    assert {applied for _, applied in a["scales"]} == {True, False}
    assert a["bits"] != b["bits"]
    # One process wrote, once.
    assert [row["step"] for row in rows(fp8_run, "train")] == list(range(1, 13))
    assert len(rows(fp8_run, "convert")) == 1


def test_ranks_roll_back_together(fp8_run):
    rolling = fp8_run.with_name("run-rolling")
    a, b = ranks(rolling)
    for name, value in a["model"].items():
        assert value.numpy().tobytes() == b["model"][name].numpy().tobytes(), name
    (event,) = [row for row in rows(rolling, "event") if row["what"] == "rolled_back"]
    assert event["step"] == 11
    assert "rolled back to the weights after step 8," in event["text"]
    # It names what only the second rank met.
    assert "(first at 10: activation)" in event["text"]
    assert json.loads((rolling / "summary.json").read_text())["rollbacks"] == 1


def test_a_signal_to_one_rank_ends_the_evaluation_of_all(fp8_run):
    stopped = fp8_run.with_name("run-stopped")
    # The other one cannot know which signal it was.
    assert [(stopped / f"codes{rank}").read_text() for rank in range(2)] == ["143 finished", "138 finished"]
    # So short a run is told that it guesses.
    assert [(row["what"], row["step"]) for row in rows(stopped, "event")] == [("resume", 3), ("guessing", 3)]
    assert [row["step"] for row in rows(stopped, "eval")] == [3]


@pytest.fixture(scope="module")
def graphed_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphed")
    write_images(folder / "images", count=14, size=8)
    (folder / "text").mkdir()
    write_text(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FP8REPRO_CACHE", str(folder / "cache"))
        torchrun(folder / "run", "graphed")
    return folder


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="stands in for the graph that a GPU has")
@pytest.mark.parametrize(("name", "what"), [("run", "batches of 2"), ("run-sentences", "")])
def test_processes_that_replay_their_steps_are_those_that_do_not(graphed_runs, name, what):
    replayed, eager = graphed_runs / f"{name}-auto", graphed_runs / f"{name}-off"
    for given, expected in zip(ranks(replayed), ranks(eager), strict=True):
        assert given["scales"] == expected["scales"]
        assert {applied for _, applied in given["scales"]} == {True, False}
        for name, value in expected["model"].items():
            assert given["model"][name].numpy().tobytes() == value.numpy().tobytes(), name
    a, b = ranks(replayed)
    for name, value in a["model"].items():
        assert value.numpy().tobytes() == b["model"][name].numpy().tobytes(), name
    # On either rank, with gradients that were summed in the graphs' memory.
    assert all(given["updates"] and all(given["updates"]) for given in (a, b))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (replayed, eager)]
    assert summaries[0]["graphs"].startswith(f"replayed for {what}")
    assert summaries[1]["graphs"] == "graphs=off"
    assert summaries[0]["best"] == summaries[1]["best"]


def test_another_number_of_processes_is_refused(fp8_run, monkeypatch):
    monkeypatch.setattr(fp8repro.training.tasks.classification, "make_resnet", without_dropout)
    with pytest.raises(UserError, match="resume: processes is 2 in the checkpoint and 1 in this run"):
        train(fp8_config(fp8_run))


@pytest.mark.long
def test_a_process_that_dies_is_restarted_and_the_weights_are_the_same_to_the_bit(fp8_run, tmp_path):
    torchrun(tmp_path / "run", "dying", restarts=1)
    assert [row["step"] for row in rows(tmp_path / "run", "event") if row["what"] == "resume"] == [4]
    for mine, theirs in zip(ranks(fp8_run), ranks(tmp_path / "run"), strict=True):
        for name, value in mine["model"].items():
            assert value.numpy().tobytes() == theirs["model"][name].numpy().tobytes(), name


def test_one_process_is_a_world(monkeypatch):
    world = World()
    tensor = torch.tensor([1.0])
    world.sum_tensors([tensor])
    world.average_tensors([tensor])
    assert (world.sum([1, 2.5]), tensor.item(), world.is_main) == ([1, 2.5], 1.0, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE: got 2 without RANK"):
        join_world("cpu")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE: got 'x', expected a whole number from 1 on"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: got '', expected"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0', expected"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: got '-1', expected"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE: got '1.5', expected"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: got 2 without RANK, expected both"),
        ({"RANK": "1"}, "RANK: got '1' without WORLD_SIZE, expected both"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: got 2 with WORLD_SIZE=2, expected a number from 0 to 1"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK: got 'x', expected a whole number from 0 on"),
        ({"LOCAL_RANK": "y"}, "LOCAL_RANK: got 'y', expected"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK: got 2 with WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: missing, expected"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT: missing, expected"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT: got 70000"),
    ],
)
def test_variables_that_make_no_world_are_one_line(environment, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        join_world("cpu")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environment", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "3"}]
)
def test_one_process_is_a_world_whatever_slurm_says(environment, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert join_world("cpu") == World()


def test_a_model_that_sums_its_own_gradients_is_not_graphed(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        inject(model, "fp8", backend="triton")
        wrapped = nn.parallel.DistributedDataParallel(model)
        expected = "the model: DistributedDataParallel sums gradients inside the backward pass"
        assert why_not_graphed(wrapped) == expected
    finally:
        dist.destroy_process_group()


def test_synchronized_normalization_keeps_no_copy_in_fp64_for_backward(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        plain, synchronized = nn.BatchNorm2d(3), SyncBatchNorm2d(3)
        x = (torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2).requires_grad_()
        kept, results = [], []
        for norm in (plain, synchronized):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
                y = norm(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, *norm.parameters())), *norm.buffers()))
    finally:
        dist.destroy_process_group()
    for given, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    assert kept
    assert not any(t.dtype == torch.float64 for t in kept)
