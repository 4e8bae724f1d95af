"""A run that is killed and resumed ends with the weights of one that was not, to the bit."""

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resume_worker import resumable_config
from training_tools import resuming, rows, tiny_config, use_tiny_network, write_images

import fp8repro.training.loop as loop
from fp8repro.errors import UserError
from fp8repro.numerics.reference import BITS_VERSION
from fp8repro.paper.run_folder import CORRECT
from fp8repro.settings.recipes import load_recipe
from fp8repro.training import train
from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint, read_tensors, write_tensors
from fp8repro.training.tasks.classification import ImageTask

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def same_threads():
    """As many threads as the killed processes have: sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_network(patch)
        train(resumable_config(run_dir, images))
    return run_dir


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_network(monkeypatch)


def signalled(run_dir, images, name, at, place="step"):
    """The exit code of a process that sends itself a signal before a step, or amid the evaluation after it."""
    command = [sys.executable, str(HERE / "resume_worker.py"), str(run_dir), str(images), name, str(at), place]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, start_new_session=True
    ).returncode


def last_state(run_dir):
    return read_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])


def assert_same_bits(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_same_bits(a[name], b[name], f"{where}.{name}")
    else:
        assert a == b, where


def assert_same_run(expected, found):
    a, b = last_state(expected), last_state(found)
    for part in ("step", "model", "optimizer", "scaler", "data"):
        assert_same_bits(a[part], b[part], part)
    # What was measured is the same too, each step once.
    timeless = [
        [{k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in rows(folder)
         if row["kind"] != "event"]
        for folder in (expected, found)
    ]  # fmt: skip
    assert timeless[0] == timeless[1]
    assert (expected / CORRECT).read_bytes() == (found / CORRECT).read_bytes()


def test_the_run_has_what_is_hard_to_resume(whole):
    measured = rows(whole, "train")
    assert len(measured) == 20
    assert measured[2]["skipped_steps"] > 0
    assert measured[-1]["skipped_steps"] < 20
    assert len({row["loss_scale"] for row in measured}) > 2
    assert last_state(whole)["model"]["3.weight"].dtype == torch.float16


# Five steps an epoch, a checkpoint after 4, 8, ...: all in the middle of an epoch.
def test_killed_and_resumed_is_the_same_to_the_bit(whole, images, tmp_path):
    assert signalled(tmp_path / "run", images, "SIGKILL", 11) == -signal.SIGKILL
    assert last_state(tmp_path / "run")["step"] == 8
    train(resumable_config(tmp_path / "run", images))
    assert_same_run(whole, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run", "event") if row["what"] == "resume"] == [8]


@pytest.mark.parametrize(("name", "at", "code"), [("SIGTERM", 6, 143), ("SIGUSR1", 12, 138), ("SIGINT", 2, 130)])
def test_asked_to_stop_it_writes_a_checkpoint_first(whole, images, tmp_path, name, at, code):
    assert signalled(tmp_path / "run", images, name, at) == code
    # The step that the signal met is finished, and the one that then saw the request.
    assert last_state(tmp_path / "run")["step"] in (at + 1, at + 2)
    train(resumable_config(tmp_path / "run", images))
    assert_same_run(whole, tmp_path / "run")


# After 10 and after 20 steps there is an epoch's end; the second is the run's, and a checkpoint's too.
@pytest.mark.parametrize(("name", "at", "code"), [("SIGTERM", 10, 143), ("SIGUSR1", 20, 138)])
def test_asked_to_stop_in_an_evaluation_it_is_left_and_made_as_a_whole_later(whole, images, tmp_path, name, at, code):
    assert signalled(tmp_path / "run", images, name, at, "evaluation") == code
    assert last_state(tmp_path / "run")["step"] == at
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == list(range(1, at + 1))
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == list(range(5, at, 5))
    train(resumable_config(tmp_path / "run", images))
    assert_same_run(whole, tmp_path / "run")


def test_of_an_evaluation_that_is_left_in_its_second_split_nothing_stays(tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", eval_train=True, batch_size=512)
    own = loop.measure

    def measure(task, model, recipe, world, split, poll):
        if split == "train":
            os.kill(os.getpid(), signal.SIGTERM)
        return own(task, model, recipe, world, split, poll)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "measure", measure)
        with pytest.raises(SystemExit) as stopped:
            train(config)
    assert stopped.value.code == 143
    assert (last_state(tmp_path / "run")["step"], rows(tmp_path / "run", "eval")) == (3, [])
    train(resuming(config))
    measured = [(row["step"], row["split"]) for row in rows(tmp_path / "run", "eval")]
    assert measured == [(3, "val"), (3, "train"), (6, "val"), (6, "train")]


def test_killed_after_an_evaluation_that_no_checkpoint_knows_of_it_is_on_record_once(
    whole, images, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    config = resumable_config(tmp_path / "run", images)
    with monkeypatch.context() as patch:
        patch.setattr(ImageTask, "finish", killed)
        with pytest.raises(Killed):
            train(config)
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [5, 10, 15, 20]
    train(config)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(whole, images, tmp_path, capsys, damage):
    config = resumable_config(tmp_path / "run", images)
    train(replace(config, trainer=replace(config.trainer, max_steps=12)))
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": content[:-1000], "flipped": content, "empty": b""}[damage])
    train(config)
    assert f"{newest.name} is damaged (its checksum differs); the one before is used" in capsys.readouterr().out
    assert_same_run(whole, tmp_path / "run")


def test_checkpoint_without_its_checksum_is_still_checked(whole, tmp_path):
    original = list_checkpoints(whole / "checkpoints")[-1].read_bytes()
    path = tmp_path / "copy.pt"
    path.write_bytes(original)
    assert read_checkpoint(path)["step"] == 20
    for content in (original[: len(original) // 2], b"", b"PK\x03\x04 nonsense"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint: copy\.pt "):
            read_checkpoint(path)


def test_no_damage_gets_past_the_reader(tmp_path):
    """Cut, changed and inserted bytes, without a checksum: one line, or a file that can be read."""
    path, chance = tmp_path / "x.pt", random.Random(0)
    torch.save({"format": 1, "model": {"w": torch.randn(40, 7).half()}, "config": {"a": [1, 2.5, "x", None]}}, path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(300):
        content, at = bytearray(whole), chance.randrange(len(whole))
        kind = chance.choice(["cut", "change", "insert", "noise"])
        if kind == "cut":
            content = content[:at]
        elif kind == "change":
            content[at : at + 4] = chance.randbytes(4)
        elif kind == "insert":
            content[at:at] = chance.randbytes(9)
        else:
            content = bytearray(chance.randbytes(at))
        path.write_bytes(content)
        try:
            read_tensors(path)
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1  # noqa: PT017
        with pytest.raises(UserError):
            read_checkpoint(path)
    assert refused > 250


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = tmp_path / "evil.pt"
    torch.save({"format": 1, "model": Evil()}, path)
    with pytest.raises(UserError, match=r"evil\.pt cannot be read"):
        read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_finished_run_is_not_run_again(whole, images):
    before = (whole / "metrics.jsonl").read_bytes()
    summary = train(resumable_config(whole, images))
    assert summary["steps"] == 20
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_another_runs_checkpoint_is_refused_and_the_difference_named(whole, images, tmp_path):
    config = resumable_config(whole, images)
    other_images = write_images(tmp_path / "other", count=62)
    for changed, difference in [
        (replace(config, precision=load_recipe("fp8")), r"precision\.activation\.rounding is 'stochastic' in the "),
        (replace(config, seed=1), "seed is 0 in the checkpoint and 1 in this run"),
        (replace(config, trainer=replace(config.trainer, clip_norm=1.0)), r"trainer\.clip_norm is None in the check"),
        (replace(config, model=replace(config.model, name="resnet34")), "model.name is 'resnet18' in the checkpoint"),
        (replace(config, data=replace(config.data, root=str(other_images))), r"task\.data is '.*' in the checkpoint"),
    ]:
        with pytest.raises(UserError, match=f"^resume: {difference}"):
            train(changed)
    with pytest.raises(UserError, match=r"^checkpoint: '.*' is a folder, expected a file \(resume=auto goes on"):
        train(replace(config, run_dir=str(tmp_path / "new"), resume=str(whole)))
    # Where the images lie, and how many workers read them, is free.
    moved = replace(config, data=replace(config.data, root=str(write_images(tmp_path / "moved")), workers=0))
    assert train(moved)["steps"] == 20


def test_resume_from_a_path_writes_a_run_of_its_own(whole, images, tmp_path):
    first = list_checkpoints(whole / "checkpoints")[0]
    config = resumable_config(tmp_path / "run", images)
    train(replace(config, resume=str(first)))
    a, b = last_state(whole), last_state(tmp_path / "run")
    assert_same_bits(a["model"], b["model"])
    assert {row["step"] for row in rows(tmp_path / "run", "train")} == set(
        range(read_checkpoint(first)["step"] + 1, 21)
    )
    with pytest.raises(UserError, match=r"checkpoint: '.*nowhere\.pt' is missing"):
        train(replace(config, resume=str(tmp_path / "nowhere.pt"), overwrite=True))


def test_a_checkpoint_of_an_earlier_version_of_the_bits_loads_and_says_so(whole, images, tmp_path, capsys):
    content = read_checkpoint(list_checkpoints(whole / "checkpoints")[0])
    assert content.pop("bits") == content["results"].pop("bits") == BITS_VERSION
    older = tmp_path / "older.pt"
    write_tensors(older, content)
    config = resumable_config(tmp_path / "run", images)
    summary = train(replace(config, resume=str(older)))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume: ")]
    assert said == [
        f"resume: the checkpoint has random bits of version 1, this code has those of version {BITS_VERSION}: "
        "the run goes on, but to other bits than it would have come to"
    ]
    # What began with other bits keeps saying so, and so do the checkpoints that it writes.
    assert (summary["bits"], summary["bits_at_first"]) == (BITS_VERSION, 1)
    assert last_state(tmp_path / "run")["results"]["bits"] == 1
    assert train(replace(config, resume="auto"))["bits_at_first"] == 1
    assert not any(line.startswith("resume: ") for line in capsys.readouterr().out.splitlines())
    write_tensors(older, content | {"bits": "two"})
    with pytest.raises(UserError, match=r"checkpoint: older\.pt is not a checkpoint of this version \(bits is missing"):
        train(replace(config, resume=str(older), overwrite=True))
