"""Runs one part of the GPU check, stage after stage, and keeps a manifest of what became of each.

Every stage is a process with a time limit; none stops the next one. Nothing is written outside of OUT but caches of
compiled kernels. Exit codes: 0, 1 (a stage failed or took too long), 2 (a mistake, no GPU), 130 (interrupted).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))
from stages import DATA, PARTS, RUNS, Choices, Stage, stages

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ("config.yaml", "environment.json", "metrics.jsonl", "summary.json")
# For a stage to end by itself, once it is asked to.
GRACE = 10
DONE, FAILED, TIMED_OUT, SKIPPED, INTERRUPTED = "done", "failed", "timed out", "skipped", "interrupted"
PROBE = """
import sys
try:
    import torch, triton
    import fp8repro.kernels
except ImportError as error:
    sys.exit(f"gpu_check: {error}; expected an environment made by `make setup`")
if not torch.cuda.is_available():
    sys.exit("gpu_check: got no CUDA device, expected one (or --rehearse)")
"""


class Check:
    """One part: its stages, the time that is left, and the manifest.

    Attributes:
        entries: what became of each stage so far, as the manifest has it.
    """

    def __init__(self, part: str, planned: Sequence[Stage], out: Path, budget: float, **facts: Any) -> None:
        """Nothing runs yet; `facts` are written to the manifest."""
        self.part, self.planned, self.out, self.budget, self.facts = part, planned, out, budget, facts
        self.work = out / "work"
        self.entries: list[dict[str, Any]] = []
        self.start = time.monotonic()
        # Paths that logs must not tell, and what they say instead.
        self.hidden = {str(out.resolve()): "OUT", str(out): "OUT", str(ROOT): ".", sys.prefix: "PREFIX"}
        # Where compiled kernels are kept; of somebody without a home it is the root of all paths.
        if len(home := str(Path.home())) > 1:
            self.hidden[home] = "HOME"

    def run(self) -> int:
        """Run all stages; gives the exit code."""
        for folder in (self.out / "logs", self.work / RUNS):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            for stage in self.planned:
                self._take(stage)
        except KeyboardInterrupt:
            for stage in self.planned[len(self.entries) :]:
                self._note(stage, SKIPPED, 0.0, "interrupted before it")
            return 130
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
        return int(any(entry["status"] in (FAILED, TIMED_OUT) for entry in self.entries))

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.start)

    def why_not(self, stage: Stage) -> str | None:
        """Why a stage is skipped; None where it is run."""
        least = stage.least
        if stage.like is not None:
            (model,) = (entry for entry in self.entries if entry["name"] == stage.like)
            if model["status"] != DONE:
                return f"{stage.like} {model['status']}"
            least = max(least, model["seconds"])
        left = self.left()
        fits = f"{left:.0f} s of {self.budget:.0f} are left, expected {least:.0f}" if left < least else None
        return stage.why if not stage.command else fits

    def _take(self, stage: Stage) -> None:
        """Run a stage, or skip it."""
        reason = self.why_not(stage)
        if reason is not None:
            self._note(stage, SKIPPED, 0.0, reason)
            return
        limit = min(stage.limit, self.left())
        print(f"{stage.name}: running, for {limit:.0f} s at most", flush=True)
        self._write("running")
        start = time.monotonic()
        log = self.out / "logs" / f"{stage.name}.log"
        code: int | None = None
        try:
            code = self._process(stage, limit, log)
        finally:
            seconds = time.monotonic() - start
            # `timeout` gives 124, or 137 where it had to kill.
            late = code in (124, 137, -9) and seconds >= limit - 0.5
            status = INTERRUPTED if code is None else DONE if code == 0 else TIMED_OUT if late else FAILED
            self._keep_records(stage)
            self._note(stage, status, seconds, self._tidy(log), limit_s=round(limit), exit_code=code)

    def _process(self, stage: Stage, limit: float, log: Path) -> int:
        """Run a stage's process to its end; gives the exit code."""
        command = ["timeout", "-k", str(GRACE), f"{limit:.2f}", *stage.command]
        folder = self.work if stage.in_work else ROOT
        with log.open("wb") as output:
            # `timeout` makes a process group of its own: Ctrl-C on the terminal does not reach it.
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(GRACE + 5)
                finally:
                    process.kill()
                raise

    def _keep_records(self, stage: Stage) -> None:
        """Copy what a run recorded, without its checkpoints."""
        run = self.work / RUNS / stage.name
        for file in (run / name for name in RECORDS):
            if file.exists():
                (self.out / RUNS / stage.name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.out / RUNS / stage.name / file.name)
        shutil.rmtree(run, ignore_errors=True)

    def _tidy(self, log: Path) -> str:
        """Take this machine's paths out of a log; gives its last line."""
        text = log.read_text(errors="replace") if log.exists() else ""
        for path, name in self.hidden.items():
            text = text.replace(path, name)
        log.write_text(text)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:500] if lines else ""

    def _note(self, stage: Stage, status: str, seconds: float, last_line: str, **more: Any) -> None:
        """Say what became of a stage."""
        entry = {"name": stage.name, "status": status, "seconds": round(seconds, 1), "last_line": last_line, **more}
        self.entries.append(entry)
        print(f"{stage.name}: {status}, {seconds:.1f} s: {last_line}", flush=True)
        self._write()

    def _write(self, next_one: str = "not reached") -> None:
        """Write the manifest: what became of each stage, and those that are still to come."""
        ahead = [{"name": stage.name, "status": "not reached"} for stage in self.planned[len(self.entries) :]]
        if ahead:
            ahead[0]["status"] = next_one
        path = self.out / "manifest.json"
        # Other parts may have written theirs.
        manifest = json.loads(path.read_text()) if path.exists() else {}
        used = round(time.monotonic() - self.start, 1)
        manifest[self.part] = {
            **self.facts,
            "budget_s": self.budget,
            "seconds": used,
            "stages": [*self.entries, *ahead],
        }
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
        temporary.replace(path)


def main() -> int:
    """Read the command line, run the part."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument(
        "--data",
        type=Path,
        help="class folders of images, in train/ and val/; for transformer, aligned text: train, valid or val, test",
    )
    parser.add_argument("--budget", type=float, default=450, help="seconds of all stages together")
    parser.add_argument("--epochs", type=float, default=4, help="of each training run")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    options = parser.parse_args()
    # The starter has changed the folder.
    origin = Path(os.environ.pop("GPU_CHECK_FROM", "."))
    out = (origin / options.out).absolute()
    data = None if options.data is None else (origin / options.data).absolute()
    if data is not None and not data.is_dir():
        _refuse(f"--data: got {str(options.data)!r}, expected a folder")
    if options.budget <= 0 or options.epochs <= 0:
        _refuse(f"--budget, --epochs: got {options.budget:g} and {options.epochs:g}, expected numbers over 0")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        str((origin / part).absolute()) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part
    )
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(out / "work" / "hypothesis")
    if options.part == "transformer":
        # Where text is prepared.
        os.environ["FP8REPRO_CACHE"] = str(out / "work" / "cache")
    if options.rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        probe = subprocess.run([sys.executable, "-c", PROBE], stderr=subprocess.PIPE, text=True)
        if probe.returncode:
            _refuse((probe.stderr.strip().splitlines() or ["gpu_check: torch cannot be imported"])[-1])
    choices = Choices(out, data, options.epochs, options.rehearse)
    check = Check(options.part, stages(options.part, choices), out, options.budget, rehearsal=options.rehearse)
    if data is not None:
        check.hidden |= {str(data): "DATA", str(data.resolve()): "DATA"}
        check.work.mkdir(parents=True, exist_ok=True)
        link = check.work / DATA
        link.unlink(missing_ok=True)
        link.symlink_to(data.resolve())
    signal.signal(signal.SIGTERM, _interrupt)
    return check.run()


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _refuse(text: str) -> NoReturn:
    print(text if text.startswith("gpu_check: ") else f"gpu_check: {text}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
