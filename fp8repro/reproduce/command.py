"""`fp8repro reproduce`: makes the plan from the options, and lists or runs it."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fp8repro.errors import RunFailure, UserError
from fp8repro.paper.plan import Job, make_jobs, make_plan, plan_file, state
from fp8repro.reproduce import needs
from fp8repro.reproduce.board import Board
from fp8repro.reproduce.runner import default_workers, lock_plan, run_jobs
from fp8repro.tabular import aligned

DEFAULT_SEEDS = "3"


@dataclass(frozen=True)
class Options:
    """The options of the command line.

    Attributes:
        settings: `profile=...` and settings for every cell.
        only: studies, cells, models, separated by commas. seeds: how many, or a list of them.
        images, text: data folders.
        runs: where records go. workers: jobs at a time; None: as many as the machine takes. processes: of each job.
        dry_run: list and run nothing. retry: run failed jobs again.
    """

    settings: Sequence[str]
    only: str
    seeds: str
    images: str | None
    text: str | None
    runs: Path
    workers: int | None
    processes: int
    dry_run: bool
    retry: bool


def reproduce(options: Options) -> None:
    """Run a plan, or list it.

    Raises:
        UserError: an option or data that cannot be used.
        RunFailure: runs failed; all others are done.
    """
    seeds = parse_seeds(options.seeds)
    roots = {"image": options.images, "translation": options.text}
    only = [part for part in options.only.split(",") if part]
    profile, cells = make_plan(options.settings, only, roots)
    jobs = make_jobs(cells, seeds, options.runs, profile)
    if profile == "paper":
        keep = int(next(s for s in plan_file()["profiles"]["paper"]["settings"] if "keep" in s).partition("=")[2])
        print(needs.cost(cells, len(seeds), keep))
    if options.dry_run:
        print(listing(jobs))
        for line in needs.missing(profile, cells, roots):
            print(f"missing: {line}")
        return
    needs.check(profile, cells, roots)
    for name, value in (("--jobs", options.workers), ("--processes", options.processes)):
        if value is not None and value < 1:
            raise UserError(f"{name}: got {value}, expected a number from 1 on")
    unlock = lock_plan(options.runs / profile)
    # A polite kill is an interruption too: the runs write their checkpoints.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        workers = options.workers or default_workers(options.processes)
        failures = run_jobs(jobs, workers, options.processes, Board(len(jobs)), options.retry)
    finally:
        unlock()
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}")
    print(f"{len(jobs) - len(failures)} of {len(jobs)} runs are done, in {options.runs / profile}")
    if failures:
        raise RunFailure(f"{len(failures)} of {len(jobs)} runs failed")


def listing(jobs: Sequence[Job]) -> str:
    """One line for each run: state, name, the tables it serves, its command."""
    lines = [
        (state(job), job.name, " ".join(job.cell.studies), shlex.join(["fp8repro", "train", *job.arguments()]))
        for job in jobs
    ]
    return f"{aligned(('state', 'run', 'for', 'command'), lines, 'plain')}\n{len(jobs)} runs"


def parse_seeds(text: str) -> list[int]:
    """`3` is 0, 1 and 2; `0,5` is 0 and 5.

    Raises:
        UserError: something else.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    # Without a comma there is one number at most.
    seeds = numbers if "," in text else list(range(sum(numbers)))
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds: got {text!r}, expected how many (3) or a list of them (0,1,2)")
    return list(dict.fromkeys(seeds))
