"""What the documentation tells a reader to run, runs."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

from fp8repro.cli.help import TRAIN
from fp8repro.cli.main import main
from fp8repro.precision.convolutions import FP8Conv2d
from fp8repro.precision.layers import FP8Linear

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_loop.py"


def test_the_own_loop_trains_in_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLE))
    model, out = names["model"], capsys.readouterr().out
    converted = [module for module in model if isinstance(module, (FP8Conv2d, FP8Linear))]
    assert len(converted) == 5
    assert {module.weight.dtype for module in converted} == {torch.float16}
    match = re.search(r"held-out digits: ([\d.]+) %, (\d+) steps skipped", out)
    assert match
    # Chance is 10 %, FP32 reaches 93 %: other people wrote the digits held out than those trained on.
    assert float(match[1]) > 90
    assert int(match[2]) < 10


def said(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What an example prints, run in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLE.parent / f"{name}.py"))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["accumulation", "averaging"])
def test_habits_train_in_fp8(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(name, monkeypatch, capsys)
    scores = [float(score) for score in re.findall(r"([\d.]+) %", out)]
    assert scores
    assert min(scores) > 85
    assert name != "averaging" or "resumed to the same bits: True" in out


def test_a_compiled_model_trains_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said("compiled", monkeypatch, capsys).endswith(": the same\n")


@pytest.mark.parametrize(("name", "package"), [("lightning_loop", "lightning"), ("accelerate_loop", "accelerate")])
def test_loops_of_other_packages_train_in_fp8(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(package)
    (score,) = re.findall(r"held-out digits: ([\d.]+) %", said(name, monkeypatch, capsys))
    assert float(score) > 85


def test_the_readme_shows_the_example_that_runs() -> None:
    readme = (EXAMPLE.parents[1] / "README.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert shown == EXAMPLE.read_text().split('"""\n\n', 1)[1]


def written_commands() -> list[str]:
    """Every `fp8repro train` that the documentation, the help and the experiments tell a reader to type."""
    root = EXAMPLE.parents[1]
    pages = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").glob("*.md")]
    texts = [TRAIN, *(path.read_text() for path in (*pages, *(root / "conf" / "experiment").glob("*.yaml")))]
    commands = {line for text in texts for line in re.findall(r"fp8repro train ([\w-]+[^`\n#()]*)", text)}
    return sorted(command.strip() for command in commands if "..." not in command)


@pytest.mark.parametrize("command", written_commands())
def test_commands_that_are_written_down_are_accepted(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", *shlex.split(command)]) == 0, capsys.readouterr().err
