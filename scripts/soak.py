"""Does it keep working: kills, damaged checkpoints, foreign bytes, a full disk, a dead rank. Writes a report.

    python scripts/soak.py --out results/reliability.md

Every run is `fp8repro train` on handwritten digits in processes of their own, killed at moments that a seed decides.
A property that does not hold ends the script with exit code 1 and is named in the report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fp8repro.errors import UserError
from fp8repro.tabular import markdown
from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint
from fp8repro.training.environment import describe_environment

SEED = 0
STEPS, EVERY = 36, 3
# Dynamic scaling from a scale that overflows, stochastic rounding everywhere: all state that a run has is in use.
SETTINGS = (
    "model=resnet18", "precision=fp8_stochastic", "loss_scaling=dynamic", "loss_scaling.scale=4194304",
    "loss_scaling.max_scale=4194304", "loss_scaling.window=4", "trainer.batch_size=32", f"trainer.max_steps={STEPS}",
    f"trainer.checkpoint_every_steps={EVERY}", "trainer.log_every=1", "logger=none", "device=cpu", "resume=auto",
)  # fmt: skip
TIMEOUT = 300
RANK_LIMIT = 60
FUZZER = Path(__file__).parent.parent / "tests" / "fuzzing.py"


@dataclass
class Report:
    """Rows of the table, and whether all that was claimed held."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    sound: bool = True

    def add(self, what: str, expected: str, found: str, holds: bool) -> None:
        """One claim."""
        self.rows.append((what, expected, found if holds else f"**{found}**"))
        self.sound = self.sound and holds
        print(f"{'ok    ' if holds else 'FAILED'} {what}: {found}", flush=True)


def command(run_dir: Path, processes: int, restarts: int = 0) -> list[str]:
    """The command of a run."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start += [f"--max-restarts={restarts}", "-m"]
    return [*start, "fp8repro.cli", "train", *SETTINGS, f"run_dir={run_dir}"]


def start(run_dir: Path, processes: int, restarts: int = 0) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(run_dir, processes, restarts),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(run: subprocess.Popen[str], timeout: float = TIMEOUT) -> str:
    """Everything that a run printed, once it has ended."""
    try:
        return run.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        for pid in family(run.pid):
            kill(pid)
        return run.communicate()[0] + f"\nno end within {timeout} s"


def family(pid: int) -> list[int]:
    """A process and all that it started, whatever their sessions."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [pid, *(grandchild for child in children.read_text().split() for grandchild in family(int(child)))]
    except OSError:
        return []


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def ranks(pid: int) -> list[int]:
    """The training processes under torchrun."""
    return [p for p in family(pid)[1:] if b"fp8repro.cli" in Path(f"/proc/{p}/cmdline").read_bytes()]


def steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    return [int(path.stem.removeprefix("step-")) for path in list_checkpoints(run_dir / "checkpoints")]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"waited {TIMEOUT} s in vain")
        time.sleep(0.01)


def wait_until_begun(run: subprocess.Popen[str], run_dir: Path) -> None:
    """Until a run trains (loading torch comes before) or has ended."""
    wait_until(lambda: (run_dir / "metrics.jsonl").exists() or run.poll() is not None)


def wait_until_saved(run_dir: Path, count: int) -> None:
    """Until so many checkpoints are there."""
    wait_until(lambda: len(steps(run_dir)) >= count)


def whole_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    found = []
    for path in list_checkpoints(run_dir / "checkpoints"):
        try:
            found.append(read_checkpoint(path)["step"])
        except UserError as error:
            print(f"       {run_dir.name}: {error}")
    return found


def final_state(run_dir: Path) -> dict[str, Any]:
    """What the last checkpoint of a finished run says, without times."""
    state = read_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])
    return {part: state[part] for part in ("step", "model", "optimizer", "scaler", "data")}


def same_bits(a: Any, b: Any) -> bool:
    """Equality to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)


@dataclass
class Killed:
    """What came of one run that was killed and started again."""

    moment: float
    at_step: int
    lost: bool
    same: bool
    output: str


def kill_and_resume(run_dir: Path, processes: int, moment: float, whole: dict[str, Any]) -> Killed:
    """Start a run, kill all its processes `moment` seconds into its training, start it again, compare with `whole`."""
    run = start(run_dir, processes)
    wait_until_begun(run, run_dir)
    seen: list[int] = []
    end = time.monotonic() + moment
    while time.monotonic() < end and run.poll() is None:
        seen = steps(run_dir) or seen
        time.sleep(0.01)
    for pid in family(run.pid):
        kill(pid)
    run.communicate()
    # What was there before is there still, or a newer one is; and what is there is whole.
    after = whole_steps(run_dir)
    lost = sorted(after) != sorted(steps(run_dir)) or max(after, default=0) < max(seen, default=0)
    output = finish(start(run_dir, processes))
    finished = (run_dir / "summary.json").is_file() and steps(run_dir)[-1:] == [STEPS]
    result = Killed(moment, max(after, default=0), lost, finished and same_bits(final_state(run_dir), whole), output)
    for path in list_checkpoints(run_dir / "checkpoints"):
        path.unlink()
    return result


def kills(report: Report, root: Path, count: int) -> None:
    """SIGKILLs at random moments, two thirds of them over single processes."""
    draw = random.Random(SEED)
    for processes, number, workers in ((1, count - count // 3, 2), (2, count // 3, 1)):
        run = start(root / f"whole{processes}", processes)
        wait_until_begun(run, root / f"whole{processes}")
        begin = time.monotonic()
        output = finish(run)
        seconds = time.monotonic() - begin
        if run.returncode:
            raise SystemExit(f"the run that was left alone did not finish: {output[-2000:]}")
        whole = final_state(root / f"whole{processes}")
        moments = [draw.uniform(0, seconds) for _ in range(number)]
        with ThreadPoolExecutor(workers) as pool:
            jobs = [
                pool.submit(kill_and_resume, root / f"killed{processes}-{i}", processes, moment, whole)
                for i, moment in enumerate(moments)
            ]
            results = [job.result() for job in jobs]
        same, lost = sum(r.same for r in results), sum(r.lost for r in results)
        for result in results:
            if not result.same:
                print(f"       killed after {result.moment:.1f} s: {result.output[-1500:]}")
        resumed = sorted({r.at_step for r in results})
        name = "1 process" if processes == 1 else f"{processes} processes (gloo)"
        report.add(
            f"SIGKILL of all of a run, {name}, {number} times within its {seconds:.0f} s of training",
            "final weights, optimizer, scaler and data position equal to the bit; no checkpoint lost",
            f"{same} of {number} equal, {lost} lost; went on from steps {', '.join(map(str, resumed))}",
            same == number and not lost,
        )


def damage(report: Report, root: Path, count: int) -> None:
    """Truncated, flipped and empty checkpoints."""
    draw = random.Random(SEED)
    path = list_checkpoints(root / "whole1" / "checkpoints")[-1]
    content = path.read_bytes()
    detected = 0
    for number in range(count):
        at = draw.randrange(len(content))
        changed = bytearray(content)
        changed[at] ^= 1 << draw.randrange(8)
        path.write_bytes((content[:at], changed, b"")[number % 3])
        try:
            read_checkpoint(path)
        except UserError:
            detected += 1
    path.write_bytes(content)
    intact = same_bits(final_state(root / "whole1"), final_state(root / "whole1"))
    found = f"{detected} of {count} detected"
    report.add(
        f"{count} damaged checkpoints: cut, one bit flipped, empty", "all detected", found, detected == count and intact
    )


def fuzz(report: Report, count: int) -> None:
    """Foreign bytes before every reader."""
    sys.path.insert(0, str(FUZZER.parent))
    from fuzzing import READERS

    def one(reader: str) -> tuple[str, subprocess.CompletedProcess[str]]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, str(FUZZER), str(count), reader]
        return reader, subprocess.run(arguments, capture_output=True, text=True, env=environment)

    with ThreadPoolExecutor(2) as pool:
        for reader, done in pool.map(one, READERS):
            expected = "an answer or one line, under 200 MB, no file elsewhere, no program started"
            if done.returncode:
                print(done.stderr[-2000:])
                report.add(f"{count} inputs: {reader}", expected, done.stderr.strip().splitlines()[-1][:200], False)
                continue
            row = json.loads(done.stdout)
            found = f"{row['accepted']} answered, {row['refused']} refused, {row['largest_growth_mb']:.0f} MB at most"
            report.add(f"{row['inputs']} inputs: {reader}", expected, found, row["inputs"] >= count)


def full_disk(report: Report, root: Path) -> None:
    """A file system in memory that takes two of a run's checkpoints."""
    folder = root / "small"
    folder.mkdir()
    name, expected = (
        "the disk has no room for another checkpoint",
        "exit code 1 with one line; the others are whole; it goes on",
    )
    size = list_checkpoints(root / "whole1" / "checkpoints")[-1].stat().st_size
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 2}", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        report.add(name, expected, "not tried: mounting needs root", True)
        return
    try:
        run = start(folder / "run", 1)
        output = finish(run)
        line = output.strip().splitlines()[-1]
        there, whole = steps(folder / "run"), whole_steps(folder / "run")
        subprocess.run(["mount", "-o", f"remount,size={size * 5}", str(folder)], check=True)
        finish(start(folder / "run", 1))
        same = same_bits(final_state(folder / "run"), final_state(root / "whole1"))
        holds = run.returncode == 1 and "cannot be written" in line and there == whole and bool(whole) and same
        text = line.replace(str(folder), "...")
        found = f"exit code {run.returncode}, `{text}`; steps {', '.join(map(str, whole))} whole"
        found += "; with room again the same weights" if same else "; with room again other weights"
        report.add(name, expected, found, holds)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def dead_rank(report: Report, root: Path) -> None:
    """One of two ranks dies: without restarts the job ends soon, with one it finishes."""
    whole = final_state(root / "whole2")
    for restarts in (0, 1):
        run_dir = root / f"rank{restarts}"
        run = start(run_dir, 2, restarts)
        wait_until_saved(run_dir, 2)
        begin = time.monotonic()
        kill(ranks(run.pid)[-1])
        output = finish(run)
        seconds = time.monotonic() - begin
        if restarts == 0:
            named = "exitcode  : -9" in output or "Signal 9" in output
            holds = run.returncode != 0 and seconds < RANK_LIMIT and named
            found = f"ended after {seconds:.1f} s, exit code {run.returncode}" + (", signal 9 named" if named else "")
            report.add("a rank of two is killed", f"the job ends in under {RANK_LIMIT} s and says why", found, holds)
        else:
            same = run.returncode == 0 and same_bits(final_state(run_dir), whole)
            found = f"finished after {seconds:.1f} s" + (
                ", the same weights" if same else f", exit code {run.returncode}"
            )
            expected = (
                "the job starts again from the last checkpoint, finishes, and the weights are the same to the bit"
            )
            report.add("a rank of two is killed, torchrun --max-restarts=1", expected, found, same)


def written(report: Report, arguments: Sequence[str], seconds: float) -> str:
    """The report as Markdown."""
    environment = describe_environment()
    packages = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "numpy"))
    machine = f"{environment['cpu']}, {environment['cpu_cores']} cores; Python {environment['python']}, {packages}"
    lines = [
        "# Reliability",
        "",
        "What happens to runs when processes die, files are damaged and disks fill. Made by",
        "",
        f"    {' '.join(['python scripts/soak.py', *arguments])}",
        "",
        f"on {machine}; commit {environment['commit']}; {seconds / 60:.0f} minutes. Every run is"
        f" `fp8repro train {' '.join(SETTINGS)}`: ResNet-18 on scikit-learn's digits, {STEPS} steps, a checkpoint every"
        f" {EVERY}. Seed {SEED} draws the moments and places of damage; fuzzed inputs are hypothesis's, derandomized.",
        "",
        markdown(("what", "expected", "found"), report.rows),
        "",
        "All of it held." if report.sound else "What is in bold did not hold.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run everything; the exit code says whether all of it held."""
    parser = argparse.ArgumentParser(description="kills, damage, foreign bytes, a full disk, a dead rank")
    parser.add_argument("--out", type=Path, help="file of the report; default: print it")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--damaged", type=int, default=20)
    parser.add_argument("--inputs", type=int, default=1000, help="fuzzed inputs for each reader")
    options = parser.parse_args()
    begin, report = time.monotonic(), Report()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kills(report, root, options.kills)
        damage(report, root, options.damaged)
        full_disk(report, root)
        dead_rank(report, root)
        fuzz(report, options.inputs)
    text = written(report, sys.argv[1:], time.monotonic() - begin)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0 if report.sound else 1


if __name__ == "__main__":
    sys.exit(main())
