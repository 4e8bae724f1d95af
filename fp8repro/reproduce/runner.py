"""Runs jobs in processes of their own and goes on when one fails. Computes no result."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8repro.errors import UserError
from fp8repro.paper.plan import DONE, FAILED, Job, state
from fp8repro.paper.run_folder import LOCK, METRICS, SUMMARY, read_or_empty
from fp8repro.reproduce.board import Board

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_STOP = 60
PR_SET_PDEATHSIG = 1
TAIL_BYTES = 65536
# A small model keeps one core busy and hardly a second; each process holds about 1 GB.
MOST_WORKERS_ON_CPU = 4


@dataclass
class Running:
    """A job under way."""

    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    slot: int

    def progress(self) -> float:
        """Share of the run that is done, from its record."""
        rows = _last_lines(self.job.folder / METRICS)
        epochs = float(self.job.cell.settings["trainer.epochs"])
        limit = self.job.cell.settings["trainer.max_steps"]
        for line in reversed(rows):
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                return min(1.0, row["step"] / limit if limit else row["epoch"] / epochs)
        return 0.0


def run_jobs(jobs: Sequence[Job], workers: int, processes: int, board: Board, retry: bool = False) -> dict[str, str]:
    """Run the jobs that are not done. Returns why jobs failed, by name.

    Args:
        jobs: the plan; those that are done are left as they are.
        workers: jobs at a time.
        processes: of each job, started by torchrun when more than one (GPUs).
        board: shows progress.
        retry: run again what failed before.

    Raises:
        KeyboardInterrupt: asked to stop; every run has saved a checkpoint.
    """
    failures: dict[str, str] = {}
    waiting: list[Job] = []
    for job in jobs:
        now = state(job)
        if now == DONE:
            board.known(job, summary_of(job))
        elif now == FAILED and not retry:
            failures[job.name] = f"{failure_reason(job)} (failed before; --retry runs it again)"
        else:
            waiting.append(job)
    board.begin(waiting)
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                slot = min(set(range(workers)) - {one.slot for one in running})
                running.append(start(waiting.pop(0), slot, workers, processes))
                board.started(running[-1].job)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for one in list(running):
                if one.process.poll() is None:
                    continue
                running.remove(one)
                reason = _reason(one)
                if reason is not None:
                    failures[one.job.name] = reason
                board.ended(one.job, time.monotonic() - one.started, reason, summary_of(one.job))
            board.show({one.job.name: one.progress() for one in running})
    finally:
        _stop(running)
        board.close()
    return failures


def default_workers(processes: int) -> int:
    """Default number of jobs at a time: as the GPUs allow, without GPUs one for each core up to four."""
    gpus = len(_gpus(dict(os.environ)))
    return max(1, gpus // processes) if gpus else max(1, min(_cores(), MOST_WORKERS_ON_CPU) // processes)


def start(job: Job, slot: int, workers: int, processes: int) -> Running:
    """Start a job's process; it dies with this one, after a checkpoint."""
    log = job.folder.parent / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    _wait_until_free(job.folder)
    arguments = job.arguments()
    if state(job) == FAILED:
        arguments = [*arguments[:-1], "overwrite=true"]
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environment = dict(os.environ)
    if workers > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // workers)))
        visible = _gpus(environment)[slot * processes : (slot + 1) * processes]
        if visible:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*launcher, "fp8repro.cli", "train", *arguments],
            stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
    return Running(job, process, log, time.monotonic(), slot)


def summary_of(job: Job) -> dict[str, Any]:
    """A job's summary, empty where there is none."""
    return read_or_empty(job.folder / SUMMARY)


def failure_reason(job: Job) -> str:
    """Why a run says that it failed."""
    return str(summary_of(job).get("reason", "it left no reason"))


def lock_plan(folder: Path) -> Callable[[], None]:
    """Lock a profile's folder for this process; the returned function unlocks it.

    Raises:
        UserError: another `fp8repro reproduce` is running there, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(f"--runs: {str(folder)!r} cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"--runs: another fp8repro reproduce is at work in {str(folder)!r}") from None
    return file.close


def _reason(one: Running) -> str | None:
    code = one.process.returncode
    if code == 0 and state(one.job) == DONE:
        return None
    if code == 0:
        return "it ended without a summary"
    lines = [line for line in _last_lines(one.log) if line.strip()]
    said = lines[-1].removeprefix("fp8repro: ") if lines else "it said nothing"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; last line: {said}"
    return said if state(one.job) == FAILED or code == 2 else f"exit code {code}: {said}"


def _stop(running: Sequence[Running]) -> None:
    """Ask runs to save and end; kill those that do not in time."""
    for one in running:
        with suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGTERM)
    limit = time.monotonic() + SECONDS_TO_STOP
    for one in running:
        try:
            one.process.wait(max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_free(folder: Path) -> None:
    """A run whose plan was killed may still be writing its last checkpoint."""
    limit = time.monotonic() + SECONDS_TO_STOP
    while (folder / LOCK).is_file() and time.monotonic() < limit:
        with (folder / LOCK).open("a") as file, suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus(environment: dict[str, str]) -> list[str]:
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
