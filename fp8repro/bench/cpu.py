"""What the CPU benchmarks share: pinned threads, interleaved medians, a meter of foreign load, and their records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fp8repro.bench import REACHED
from fp8repro.tabular import markdown
from fp8repro.training.environment import describe_environment

DEFAULT_OUT = Path("results/cpu")
# Unpinned OpenMP threads sometimes lose milliseconds to the scheduler; the runtime reads these when it is loaded.
PINNING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        group: what is done, with its size; ratios compare within it.
        name: by what.
        median_ms: median wall time of one call.
        ratio: that time relative to `against`, another name of the group.
        bar: the largest ratio that is good enough; None: no bar.
        items: target tokens or images of one call, or None where they are not counted.
    """

    group: str
    name: str
    median_ms: float
    ratio: float
    against: str
    bar: float | None = None
    items: int | None = None

    @property
    def items_per_second(self) -> float | None:
        """Rate of the median call."""
        return None if self.items is None else self.items / self.median_ms * 1e3

    @property
    def reached(self) -> bool | None:
        """Whether the bar is reached; None without one."""
        return None if self.bar is None else self.ratio <= self.bar


def relaunch_pinned(module: str, arguments: Sequence[str]) -> int | None:
    """Run a module's `main` in a process with pinned threads; None if this process is one already."""
    if all(os.environ.get(key) == value for key, value in PINNING.items()):
        return None
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env={**os.environ, **PINNING}).returncode


def interleaved_medians(
    work: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median milliseconds of each piece of work, all of them in turns, after two unmeasured rounds."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 2):
        for name, call in work.items():
            start = clock()
            call()
            if turn >= 2:
                times[name].append((clock() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def rows(
    group: str,
    medians: Mapping[str, float],
    against: str,
    bars: Mapping[str, float] | None = None,
    items: int | None = None,
) -> list[Row]:
    """Rows of one group, relative to one of its members."""
    base = medians[against]
    return [Row(group, name, ms, ms / base, against, (bars or {}).get(name), items) for name, ms in medians.items()]


class ForeignLoad:
    """Meters how many cores other processes kept busy between entering and leaving."""

    def __enter__(self) -> ForeignLoad:
        """Start."""
        self._start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        wall, busy, own = (b - a for a, b in zip(self._start, self._read(), strict=True))
        self.cores = max(0.0, busy - own) / wall if wall and busy else float("nan")

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = os.times()
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        except (OSError, ValueError):
            return times.elapsed, 0.0, 0.0
        # user, nice, system, idle, iowait, irq, softirq, steal: a neighbour on the same host is foreign load too.
        busy = sum(fields[:3]) + sum(fields[5:8])
        return times.elapsed, busy / os.sysconf("SC_CLK_TCK"), times.user + times.system


def report(
    title: str,
    measured: Sequence[Row],
    foreign: float,
    slug: str,
    folder: Path,
    unit: str = "tokens",
    pinned: bool = True,
) -> None:
    """Print the table and write it as Markdown and JSON; `unit` is what the rows' items are."""
    machine = describe_environment()
    record = {
        "benchmark": title,
        "environment": machine,
        "pinned": PINNING if pinned else None,
        "foreign_load_cores": round(foreign, 3),
        "rows": [_plain(row, unit) for row in measured],
    }
    page = _page(title, measured, foreign, machine, unit, pinned)
    print(page)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{slug}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{slug}.md").write_text(page)
    print(f"written: {folder / slug}.json, .md")


def _plain(row: Row, unit: str) -> dict[str, Any]:
    values = asdict(row)
    items = values.pop("items")
    return {**values, unit: items, "reached": row.reached, f"{unit}_per_second": row.items_per_second}


def _page(
    title: str, measured: Sequence[Row], foreign: float, machine: Mapping[str, Any], unit: str, pinned: bool
) -> str:
    threads = torch.get_num_threads()
    head = (
        f"# {title}\n\n{machine['cpu']}, {threads} thread{'s' * (threads > 1)}, torch {machine['packages']['torch']}, "
        f"code {machine['commit']}. Medians, interleaved in one process{', pinned threads' * pinned}; "
        f"other processes kept {foreign:.2f} cores busy meanwhile.\n\n"
    )
    cells = [
        (
            *(row.group, row.name, f"{row.median_ms:.3f}"),
            "" if row.items_per_second is None else f"{row.items_per_second:,.0f}",
            f"{row.ratio:.3f} x {row.against}",
            "" if row.bar is None else f"at most {row.bar:g}",
            REACHED[row.reached],
        )
        for row in measured
    ]
    return head + markdown(("work", "by", "median ms", f"{unit}/s", "ratio", "bar", "reached"), cells) + "\n"
