"""Progress of a plan: a bar with the time that is left, or plain lines without a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fp8repro.paper.plan import Job, plan_file

SECONDS_BETWEEN_LINES = 30.0


class Board:
    """Progress over the whole plan."""

    def __init__(self, total: int) -> None:
        """`total`: jobs of the plan, the ones that are done among them."""
        self.total, self.finished = total, 0
        self._left: dict[str, Job] = {}
        self._done_cost = 0.0
        # Seconds that whole runs took, by cell, each beside the cost that the plan expects.
        self._took: dict[str, list[tuple[float, float]]] = {}
        self._abreast = 1
        self._last_line = time.monotonic()
        self._bar: Any = None

    def known(self, job: Job, summary: Mapping[str, Any]) -> None:
        """A job that was done before, with what it recorded."""
        self.finished += 1
        self._note(job, 0.0, summary)

    def begin(self, waiting: Sequence[Job]) -> None:
        """The jobs that will run."""
        self._left = {job.name: job for job in waiting}
        if self.finished:
            print(f"{self.finished} of {self.total} runs are done already", flush=True)
        if waiting and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                BarColumn(24), TextColumn("{task.percentage:3.0f} %"), TextColumn("{task.description}"),
                TimeElapsedColumn(),
            )  # fmt: skip
            self._task = self._bar.add_task("", total=sum(map(_cost, waiting)))
            self._bar.start()

    def started(self, job: Job) -> None:
        """A job's process began."""
        self._say(f"[{self.finished + 1}/{self.total}] {job.name}")

    def ended(self, job: Job, seconds: float, failure: str | None, summary: Mapping[str, Any]) -> None:
        """A job's process ended, with the reason where it failed."""
        self.finished += 1
        del self._left[job.name]
        if failure is not None:
            # A run that broke off says nothing about how long the others take.
            self._say(f"        failed after {_duration(seconds)}: {failure}")
            return
        self._done_cost += _cost(job)
        self._note(job, seconds, summary)
        score = f"BLEU {summary['bleu']:.1f}" if "bleu" in summary else f"top-1 {summary['top1']:.2f} %"
        self._say(f"        {score} in {_duration(seconds)}")

    def show(self, progress: Mapping[str, float]) -> None:
        """The state of the running jobs, as shares."""
        done = self._done_cost + sum(_cost(self._left[name]) * share for name, share in progress.items())
        eta = self.time_left(progress)
        names = ", ".join(f"{name} {share:.0%}" for name, share in progress.items())
        text = f"{self.finished}/{self.total}  {names}  {eta}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif progress and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._say(f"        {text}")

    def time_left(self, progress: Mapping[str, float]) -> str:
        """Time left for the plan, in words; unknown before the first run has ended.

        How far a run has come says little in its first minutes, which go into starting and compiling.
        """
        self._abreast = max(self._abreast, len(progress))
        took = [pair for pairs in self._took.values() for pair in pairs]
        if not took:
            return "time left: known after the first run"
        rate = sum(seconds for _, seconds in took) / sum(cost for cost, _ in took)
        left = []
        for job in self._left.values():
            same = [seconds for _, seconds in self._took.get(job.cell.name, [])]
            whole = sum(same) / len(same) if same else rate * _cost(job)
            left.append(whole * (1 - progress.get(job.name, 0.0)))
        # However many run at a time, the longest one has to end.
        return f"about {_duration(max(sum(left) / self._abreast, max(left, default=0.0)))} left"

    def _note(self, job: Job, seconds: float, summary: Mapping[str, Any]) -> None:
        """Note how long a run took, earlier processes of a resumed one included."""
        recorded = summary.get("train_seconds")
        if isinstance(recorded, int | float) and math.isfinite(recorded):
            seconds = max(seconds, float(recorded))
        if seconds > 0:
            self._took.setdefault(job.cell.name, []).append((_cost(job), seconds))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _say(self, text: str) -> None:
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)


def _cost(job: Job) -> float:
    return float(plan_file()["cost"][job.cell.model])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
