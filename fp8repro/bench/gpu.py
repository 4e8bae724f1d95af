"""What the GPU benchmark records: its rows, the machine that gave them, and the files they are written to.

A number without the device that gave it is refused.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from statistics import median

import torch

from fp8repro import tabular
from fp8repro.bench import REACHED
from fp8repro.bench.cpu import interleaved_medians
from fp8repro.errors import UserError


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name, shape: what was measured.
        median_ms: median time; for errors and memory 0.
        ratio: the figure that `bar` is about: speed or bandwidth relative to `against`, or the error itself.
        bar: what `ratio` has to reach: at least a positive number, at most a negative one's magnitude; None: no bar.
    """

    name: str
    shape: str
    median_ms: float
    ratio: float | None
    against: str | None
    bar: float | None
    device: str
    driver: str
    torch: str
    triton: str
    commit: str

    def __post_init__(self) -> None:
        """Refuse a row that does not say where it was measured."""
        for name in ("device", "driver", "torch", "triton", "commit"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected what this was measured on")

    @property
    def reached(self) -> bool | None:
        """Whether the bar was reached; None without one."""
        if self.bar is None or self.ratio is None:
            return None
        return self.ratio >= self.bar if self.bar > 0 else self.ratio <= -self.bar


@dataclass
class Bench:
    """Collects rows of one machine.

    Attributes:
        device: where the kernels run; the CPU when they are interpreted (a rehearsal, whose times mean nothing).
        machine: the columns that say what it was measured on.
        scale: divides all sizes, for rehearsals.
        seconds: no new measurement starts after so many.
    """

    device: torch.device
    machine: dict[str, str]
    scale: int = 1
    seconds: float = 300.0
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)

    def size(self, n: int) -> int:
        """A size of the real measurement, or a small one in a rehearsal."""
        return n if self.scale == 1 else max(16, n // self.scale)

    def milliseconds(self, work: Callable[[], object], *, replayed: bool = False, rep: int = 60) -> float:
        """Median time of `work`, with a cold L2 cache.

        Args:
            work: what to time.
            replayed: time replays of a CUDA graph of calls in a row (the L2 cache is what they leave), where the host
                would take longer to launch a kernel than the GPU to run it.
            rep: milliseconds of repetitions.
        """
        if self.device.type == "cuda":
            from triton.testing import do_bench, do_bench_cudagraph

            if replayed:
                return float(do_bench_cudagraph(work, rep=max(4, rep // 10), return_mode="median"))
            return float(do_bench(work, warmup=10, rep=rep, return_mode="median"))
        times = []
        for _ in range(2):
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e3)
        return median(times)

    def in_turns(self, steps: Mapping[str, Callable[[], object]], turns: int = 10) -> dict[str, float]:
        """Median milliseconds of long work, taken in turns, so that all see the same clock; 3 steps a turn on a GPU."""
        if self.device.type != "cuda":
            return {name: self.milliseconds(step) for name, step in steps.items()}

        def three(step: Callable[[], object]) -> None:
            for _ in range(3):
                step()
            torch.cuda.synchronize()

        medians = interleaved_medians({name: partial(three, step) for name, step in steps.items()}, turns)
        return {name: ms / 3 for name, ms in medians.items()}

    @property
    def time_is_up(self) -> bool:
        """Whether `seconds` have passed."""
        return time.monotonic() - self._start > self.seconds

    def add(
        self, name: str, shape: str, ms: float, ratio: float | None, against: str | None, bar: float | None
    ) -> None:
        """Record and print a row."""
        # A rehearsal has no bars: its sizes and times mean nothing.
        row = Row(name, shape, round(ms, 4), ratio, against, bar if self.scale == 1 else None, **self.machine)
        # What is measured again, under `--append`, takes the place of the earlier row.
        kept = [old for old in self.rows if (old.name, old.shape, old.against) != (name, shape, against)]
        self.rows = [*kept, row]
        print(_line(row), flush=True)

    def run(self, name: str, measure: Callable[[Bench], None]) -> None:
        """Run a group of measurements, unless the time is up."""
        if self.time_is_up:
            self.skipped.append(name)
            print(f"{name}: skipped, {self.seconds:.0f} s are over", flush=True)
            return
        measure(self)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def describe_machine(device: torch.device) -> dict[str, str]:
    """The columns of a row that say where it was measured."""
    import triton

    from fp8repro.training.environment import git_commit

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            driver = f"unknown (CUDA {torch.version.cuda})"
    else:
        name, driver = "Triton's interpreter", "none"
    commit = git_commit() or "not from a checkout"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"device": name, "driver": driver, **versions, "commit": commit}


def file_of(bench: Bench, folder: Path) -> Path:
    """The JSON of the GPU in a folder."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", bench.machine["device"].lower()).strip("-") + ".json")


def write(bench: Bench, folder: Path, said: Sequence[str] = ()) -> Path:
    """Write JSON and Markdown of the GPU; gives the JSON's path. `said`: see `markdown`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(bench, folder)
    path.write_text(json.dumps([asdict(row) for row in bench.rows], indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(bench, said))
    return path


def read(path: Path) -> list[Row]:
    """The rows of a written file.

    Raises:
        UserError: a row lacks a column, or does not say where it was measured.
    """
    known = {f.name for f in fields(Row)}
    rows = []
    for number, values in enumerate(json.loads(path.read_text())):
        if set(values) != known:
            raise UserError(f"{path.name}[{number}]: got columns {sorted(values)}, expected {sorted(known)}")
        try:
            rows.append(Row(**values))
        except ValueError as error:
            raise UserError(f"{path.name}[{number}].{error}") from None
    return rows


def markdown(bench: Bench, said: Sequence[str] = ()) -> str:
    """The rows as a page; `said` is what they say together, a sentence each."""
    m = bench.machine
    cells = [
        (
            *(row.name, row.shape, f"{row.median_ms:.3f}"),
            _figure(row.ratio),
            row.against or "",
            "" if row.bar is None else f"{'at least' if row.bar > 0 else 'at most'} {abs(row.bar):g}",
            REACHED[row.reached],
        )
        for row in bench.rows
    ]
    parts = [
        f"# {m['device']}",
        f"Driver {m['driver']}, torch {m['torch']}, Triton {m['triton']}, {m['commit']}.",
        tabular.markdown(("work", "shape", "median ms", "ratio", "against", "bar", "reached"), cells),
    ]
    parts += ["\n".join(f"* {sentence}" for sentence in said)] if said else []
    parts += [f"Not measured, out of time: {', '.join(bench.skipped)}."] if bench.skipped else []
    return "\n\n".join(parts) + "\n"


def _figure(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:,.0f}" if ratio >= 1000 else f"{ratio:.3g}"


def _line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"  {_figure(row.ratio)} of {row.against}"
    reached = {True: " (reached)", False: " (NOT reached)", None: ""}[row.reached]
    return f"{row.name:<44} {row.shape:<22} {row.median_ms:>10.3f} ms{ratio}{reached}"
