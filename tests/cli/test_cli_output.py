"""Output that has nowhere to go: a run goes on, an answer that cannot be given fails, and nothing is a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8repro.cli import main as cli

TRAIN = "train model=resnet18 logger=none device=cpu trainer.max_steps=1 trainer.batch_size=16"
# The redirection, and what a shell says that the command ended with.
LOST = {
    "closed": "{} >&-",
    "full": "{} >/dev/full",
    "both closed": "{} >&- 2>&-",
    "both full": "{} >/dev/full 2>/dev/full",
    "all closed": "{} <&- >&- 2>&-",
}
GONE = "( trap '' PIPE; {}; echo $? > code ) | true; exit $(cat code)"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = ["bash", "-c", line]
    return subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def command(arguments: str) -> str:
    return f"{Path(sys.executable).parent / 'fp8repro'} {arguments}"


@pytest.mark.parametrize(
    ("verb", "how"), [("--help", "closed"), ("--help", "full"), ("--help", "both full"), ("compare .", "full")]
)
def test_an_answer_that_cannot_be_given_is_a_failure(verb: str, how: str, tmp_path: Path) -> None:
    done = shell(LOST[how].format(command(verb)), tmp_path)
    assert done.returncode == 1
    said = {"closed": "it is closed", "full": "No space left on device"}
    expected = f"fp8repro: standard output cannot be written ({said[how]})\n" if how in said else ""
    assert done.stderr == expected


def test_a_reader_who_had_enough_is_no_failure(tmp_path: Path) -> None:
    done = shell(GONE.format(command("train --help")), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("how", [LOST["all closed"], GONE], ids=["all closed", "reader gone"])
def test_a_run_outlives_its_output(how: str, tmp_path: Path) -> None:
    done = shell(how.format(command(f"{TRAIN} run_dir=run")), tmp_path)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    if "&-" not in how:
        assert "fp8repro: standard output cannot be written" in done.stderr
        assert done.stderr.rstrip().endswith("; it goes on without")
    # Nothing that a library prints may reach a file that got the number of a closed stream.
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith('{"kind"')


def test_a_mistake_keeps_its_exit_code_without_an_output(tmp_path: Path) -> None:
    for how in (LOST["both closed"], LOST["both full"]):
        assert shell(how.format(command("trian")), tmp_path).returncode == 2


def test_a_sign_that_the_encoding_lacks_is_shown_otherwise(tmp_path: Path) -> None:
    run = shell(f"PYTHONIOENCODING=ascii {command('compare')} B\u00fccher", tmp_path)
    assert run.returncode == 2
    assert "B\\xfccher" in run.stderr


def test_the_streams_are_the_callers_again_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    assert cli.main(["--version"]) == 0
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out.startswith("fp8repro ")
