"""Where runs and data lie: odd names, links, read-only and full file systems, two runs in one place."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_tools import tiny_config, use_tiny_network, write_images

from fp8repro.cli import main as cli
from fp8repro.errors import RunFailure, UserError
from fp8repro.results.records import read_records
from fp8repro.settings.overrides import jobs
from fp8repro.settings.schema import DataConfig
from fp8repro.training import train
from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint
from fp8repro.training.record import RunFolder, run_folder

IS_ROOT = os.geteuid() == 0
NAMES = [
    "with space",
    "\u00fcber-\u4e2d\u6587-\U0001f600",
    "a'b\"c",
    "x=1,2",
    "-m",
    "%s{}$HOME*",
    "..hidden",
    "a" * 200,
    "tab\tbed",
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_network(monkeypatch)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Any]:
    """Mounts a small file system in memory at a new folder."""
    if not IS_ROOT:
        pytest.skip("only root may mount a small file system")
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"this machine does not mount: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_folder_may_be_called_anything(tmp_path: Path, name: str) -> None:
    before = files(tmp_path)
    train(tiny_config(tmp_path / name, max_steps=1, epochs=1))
    (record,), problems = read_records([tmp_path])
    assert (record.folder, problems) == (tmp_path / name, [])
    assert {path.split("/")[0] for path in files(tmp_path) - before} == {name}
    # Its config.yaml brings the name back.
    assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["run_dir"] == str(tmp_path / name)


def test_a_name_that_the_file_system_refuses_is_one_line(tmp_path: Path) -> None:
    for name in ("a" * 300, "nul\0byte"):
        with pytest.raises(UserError, match="run_dir: "):
            train(tiny_config(tmp_path / name, max_steps=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir: .* cannot be written"):
        train(tiny_config(tmp_path / "file" / "run", max_steps=1))


def test_dots_in_a_run_dir_mean_what_they_say_and_names_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    train(tiny_config("../b/run", max_steps=1, epochs=1))
    assert (tmp_path / "b" / "run" / "summary.json").is_file()
    assert not list(Path().iterdir())
    config = tiny_config("x")
    for name in ("../../escaped", "/etc/passwd", "..", ".", "a/b"):
        inside = run_folder(
            replace(config, run_dir=None, data=DataConfig(name), precision=replace(config.precision, name=name))
        )
        assert inside.parent == Path("runs")
        assert ".." not in inside.parts
    for override in ("+data.options.x=../../../escaped", "optimizer.lr=../..", "loss_scaling.x=/etc/passwd"):
        (job,) = jobs([override], sweep=False)
        assert "/" not in job.name


def test_links_are_followed_to_a_run_folder_and_never_out_of_it(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real").mkdir()
    config = tiny_config(tmp_path / "link", max_steps=1, epochs=1)
    train(config)
    assert (tmp_path / "real" / "summary.json").is_file()
    # Overwriting removes a link, not what it leads to.
    for name in ("checkpoints", "tensorboard"):
        path = tmp_path / "real" / name
        if path.exists():
            subprocess.run(["rm", "-r", str(path)], check=True)
        path.symlink_to(elsewhere, target_is_directory=True)
    train(replace(config, overwrite=True))
    assert files(elsewhere) == {"kept"}


def test_data_roots_may_be_called_anything(tmp_path: Path) -> None:
    for name in NAMES[:6]:
        images = write_images(tmp_path / name / "images", count=8)
        (tmp_path / f"link to {name}").symlink_to(images)
        for root in (images, tmp_path / f"link to {name}", images / ".." / "images"):
            data = DataConfig("image_folder", str(root), 16)
            config = tiny_config(tmp_path / "run", data=data, max_steps=1, epochs=1, batch_size=4)
            assert train(replace(config, overwrite=True))["steps"] == 1


def test_a_link_to_its_own_parent_ends(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", count=8)
    (images / "train" / "left" / "again").symlink_to(images, target_is_directory=True)
    (images / "train" / "left" / "dangling.png").symlink_to(tmp_path / "nowhere")
    config = tiny_config(tmp_path / "run", data=DataConfig("image_folder", str(images), 16), batch_size=4, epochs=1)
    with pytest.raises(UserError, match=r"image '.*dangling\.png' cannot be read"):
        train(config)


def test_a_read_only_folder_is_one_line(mounted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = mounted("ro,size=1m")
    assert cli.main(["train", f"run_dir={folder}/run", "trainer.max_steps=1"]) == 2
    assert capsys.readouterr().err == f"fp8repro: run_dir: '{folder}/run' cannot be written (Read-only file system)\n"


@pytest.mark.skipif(IS_ROOT, reason="permissions do not bind root")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        train(tiny_config(tmp_path / "closed" / "run", max_steps=1))


@pytest.mark.parametrize("kilobytes", [8, 24, 40, 64, 100, 140])
def test_a_full_disk_ends_the_run_with_a_line_and_whole_files(mounted: Any, kilobytes: int) -> None:
    # The tiny network's checkpoint takes some 30 kilobytes: the disk fills at its config, its metrics, its second one.
    folder = mounted(f"size={kilobytes}k")
    config = tiny_config(folder / "run", epochs=30, checkpoint_every_steps=2, keep_checkpoints=3)
    with pytest.raises((RunFailure, UserError), match=r"No space left|cannot be written"):
        train(config)
    for path in list_checkpoints(folder / "run" / "checkpoints"):
        read_checkpoint(path)
    assert not list((folder / "run").rglob("*.tmp"))
    # With room again, the same command goes on.
    subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
    assert (
        train(replace(config, resume="auto", trainer=replace(config.trainer, epochs=30, max_steps=20)))["steps"] == 20
    )


def test_two_runs_in_one_folder_at_once(tmp_path: Path) -> None:
    first = tiny_config(tmp_path / "run", max_steps=1, epochs=1)
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from training_tools import tiny_config\n"
        "from fp8repro.training.record import RunFolder\n"
        "with RunFolder(tiny_config(sys.argv[1])) as record:\n"
        "    record.begin(0); print('in', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run"), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        content = files(tmp_path)
        for changed in ({}, {"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(UserError, match="is in use by another run"):
                train(replace(first, **changed))
        assert files(tmp_path) == content
        other.kill()
    # A killed process holds nothing.
    assert train(replace(first, resume="auto"))["steps"] == 1


def test_many_that_want_one_folder_get_it_one_at_a_time(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    held = [RunFolder(config)]
    held[0].begin(0)
    for _ in range(5):
        with pytest.raises(UserError, match="in use"):
            RunFolder(replace(config, overwrite=True))
    held[0].close()
    with RunFolder(replace(config, overwrite=True)) as record:
        record.begin(0)
