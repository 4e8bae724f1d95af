"""`fp8repro reproduce`: makes the plan from the options, and lists or runs it."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp8repro.errors import RunFailure, UserError
from fp8repro.paper.plan import DONE, Cell, Job, make_jobs, make_plan, plan_file, state
from fp8repro.reproduce import needs
from fp8repro.reproduce.board import Board
from fp8repro.reproduce.runner import default_workers, lock_plan, run_jobs
from fp8repro.results.cells import Cells, read_cells
from fp8repro.results.verdicts import open_cells, verdicts
from fp8repro.tabular import aligned

AUTO = "auto"
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Options:
    """The options of the command line.

    Attributes:
        settings: `profile=...` and settings for every cell.
        only: studies, cells, models, separated by commas.
        seeds: how many, a list of them, or AUTO: until the statements of the cells are decided.
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
    given = None if options.seeds == AUTO else parse_seeds(options.seeds)
    roots = {"image": options.images, "translation": options.text}
    only = [part for part in options.only.split(",") if part]
    profile, cells = make_plan(options.settings, only, roots)
    looks = plan_file()["profiles"][profile]["looks"]
    if profile == "paper":
        keep = int(next(s for s in plan_file()["profiles"]["paper"]["settings"] if "keep" in s).partition("=")[2])
        print(needs.cost(cells, len(given) if given else looks[0], keep))
    if options.dry_run:
        _list(_stages(cells, given, options.runs, profile), needs.missing(profile, cells, roots))
        return
    needs.check(profile, cells, roots)
    for name, value in (("--jobs", options.workers), ("--processes", options.processes)):
        if value is not None and value < 1:
            raise UserError(f"{name}: got {value}, expected a number from 1 on")
    unlock = lock_plan(options.runs / profile)
    # A polite kill is an interruption too: the runs write their checkpoints.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failures: dict[str, str] = {}
    planned: dict[str, Job] = {}
    try:
        workers = options.workers or default_workers(options.processes)
        for jobs in _stages(cells, given, options.runs, profile):
            planned |= {job.name: job for job in jobs}
            failures |= run_jobs(jobs, workers, options.processes, Board(len(jobs)), options.retry)
    finally:
        unlock()
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}")
    print(f"{len(planned) - len(failures)} of {len(planned)} runs are done, in {options.runs / profile}")
    if failures:
        raise RunFailure(f"{len(failures)} of {len(planned)} runs failed")


def _stages(cells: Sequence[Cell], given: Sequence[int] | None, runs: Path, profile: str) -> Iterator[list[Job]]:
    """Jobs to run, one stage after the other; without given seeds, the next stage goes by the records of the last."""
    if given is not None:
        yield make_jobs(cells, given, runs, profile)
        return
    looks = plan_file()["profiles"][profile]["looks"]
    for number, seeds in enumerate(looks):
        yield make_jobs(cells, range(seeds), runs, profile)
        if number + 1 == len(looks):
            return
        wanted = _undecided(runs / profile, profile, [cell.name for cell in cells])
        cells = [cell for cell in cells if cell.name in wanted]
        if not cells:
            return
        names = ", ".join(cell.name for cell in cells)
        print(f"look {number + 1} of {len(looks)}, at {seeds} seeds: {names} go on to {looks[number + 1]}", flush=True)


def _undecided(folder: Path, profile: str, names: Sequence[str]) -> set[str]:
    """Those of some cells whose further seeds may decide a statement."""
    by_profile, _, _ = read_cells([folder]) if folder.is_dir() else ({}, [], [])
    return open_cells(verdicts(by_profile.get(profile, Cells()), profile), names)


def _list(stages: Iterator[list[Job]], missing: Sequence[str]) -> None:
    """Print the first stage that is not done, else the last one."""
    jobs: list[Job] = []
    for jobs in stages:
        if any(state(job) != DONE for job in jobs):
            break
    print(listing(jobs))
    for line in missing:
        print(f"missing: {line}")


def listing(jobs: Sequence[Job]) -> str:
    """One line for each run: state, name, the tables it serves, its command."""
    lines = [
        (state(job), job.name, " ".join(job.cell.studies), shlex.join(["fp8repro", "train", *job.arguments()]))
        for job in jobs
    ]
    return f"{aligned(('state', 'run', 'for', 'command'), lines, 'plain')}\n{len(jobs)} runs"


def parse_seeds(text: str) -> list[int]:
    """`3` is 0, 1 and 2; `0,5` is 0 and 5; `5,` is 5 alone.

    Raises:
        UserError: something else.
    """
    parts = text.removesuffix(",").split(",")
    # Longer ones are no seeds of a run.
    numbers = [int(part) for part in parts if part.isdecimal() and len(part) < 19]
    is_list = "," in text
    if len(numbers) != len(parts) or not (is_list or 1 <= numbers[0] <= MOST_SEEDS):
        raise UserError(
            f"--seeds: got {text!r}, expected how many from 1 to {MOST_SEEDS} (3 is 0,1,2), a list of them (0,1,2; "
            f"5, is 5 alone) or {AUTO}"
        )
    return list(dict.fromkeys(numbers)) if is_list else list(range(numbers[0]))
