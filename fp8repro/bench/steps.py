"""Training steps in FP8 beside BF16 autocast, eager and compiled: time, peak memory, and what a page says of both.

Knows models by their `Workload` alone.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from fp8repro.bench.gpu import Bench, Row
from fp8repro.errors import RunFailure
from fp8repro.precision.context import StepContext
from fp8repro.precision.graphs import GraphedStep, capture
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights

LOSS_SCALE = 10_000.0
BF16, COMPILED, FP8, GRAPHED = "BF16 autocast", "BF16 compiled, CUDA graph", "FP8", "FP8, CUDA graph"
STEP = "training step"
Step = Callable[[], object]


class Workload(ABC):
    """A model and a batch of the measured size, or of a tiny one in a rehearsal, and what a step of them is.

    Attributes:
        title: the model's name.
        batch: inputs and targets, on the device.
        shape: what a batch is, for people.
        tokens: target tokens of a batch; None for images.
        seconds: what each kind of step may take until it has run, by name; without limit where there is none.
        speed_bars, memory_bars: by two kinds, at least so many times as fast as the other, and at most so much of its
            peak memory.
    """

    title: str
    batch: tuple[Tensor, ...]
    shape: str
    tokens: int | None = None

    def __init__(self, bench: Bench) -> None:
        """Where the batch is to be."""
        self.device, self.small = bench.device, bench.scale != 1
        self.seconds: Mapping[str, float] = {}
        self.speed_bars: Mapping[tuple[str, str], float] = {}
        self.memory_bars: Mapping[tuple[str, str], float] = {}

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh model on the device."""

    @abstractmethod
    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Mean loss of a batch."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimizer."""

    def rival(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model as BF16 trains it, and an optimizer whose step can be captured; by default the same ones."""
        model = self.model()
        return model, self.optimizer(model)

    def steps(self) -> dict[str, Callable[[], Step]]:
        """What prepares each kind of step. A CPU has no CUDA graphs."""
        made: dict[str, Callable[[], Step]] = {BF16: self.bf16, COMPILED: self.bf16_compiled, FP8: self.fp8}
        return made | ({GRAPHED: partial(self.fp8, graphed=True)} if self.device.type == "cuda" else {})

    def fp8(self, graphed: bool = False) -> Step:
        """A step of the recipe `fp8`."""
        from fp8repro.settings.recipes import load_recipe

        model, recipe, context, number = self.model(), load_recipe("fp8"), StepContext(seed=1), count()
        inject(model, recipe, context, "triton")
        optimizer = self.optimizer(model)
        masters = MasterWeights(model, optimizer, recipe)

        def loss_of(*batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.loss(model, *batch), {}

        graph = GraphedStep(model, loss_of, self.batch) if graphed else None

        def step() -> None:
            context.begin(next(number))
            optimizer.zero_grad()
            if graph is None:
                (loss_of(*self.batch)[0] * LOSS_SCALE).backward()
                masters.step(LOSS_SCALE)
            else:
                graph(self.batch, LOSS_SCALE)
                graph.step(masters, LOSS_SCALE)

        return step

    def bf16(self, compiler: str | None = None) -> Step:
        """A step of BF16 autocast; `compiler`: the backend of `torch.compile`, None for an eager step."""
        model, optimizer = self.rival()

        def loss_of(*batch: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                return self.loss(model, *batch)

        loss = loss_of if compiler is None else torch.compile(loss_of, backend=compiler, dynamic=False)

        def step() -> None:
            optimizer.zero_grad()
            loss(*self.batch).backward()
            optimizer.step()

        return step

    def bf16_compiled(self) -> Step:
        """The compiled step, its update included, as one CUDA graph; on a CPU without compiler and graph."""
        if self.device.type != "cuda":
            return self.bf16("eager")
        return capture(self.bf16("inductor"), self.device)  # type: ignore[arg-type]


def measure(bench: Bench, work: Workload, names: Sequence[str], bases: Sequence[str]) -> None:
    """Prepare steps and time them in turns.

    Args:
        bench: where the rows go.
        work: the model and its batch.
        names: of the steps, those that this device cannot make left out.
        bases: which of them those behind in `names` are beside.

    Raises:
        RunFailure: a step cannot be made on this device, or not in its time; the others are measured.
    """
    available = work.steps()
    prepared: dict[str, Step] = {}
    memory: dict[str, float] = {}
    failed: list[str] = []
    for name in [name for name in names if name in available]:
        try:
            with _at_most(work.seconds.get(name)):
                prepared[name], memory[name] = _prepared(work, available[name])
        # Out of memory, or what a compiler cannot do: the others are still worth measuring.
        except Exception as error:
            failed.append(f"{name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
            print(f"not measured: {failed[-1]}", flush=True)
    _add_rows(bench, work, bases, bench.in_turns(prepared), memory)
    if failed:
        raise RunFailure(f"{STEP}: not measured: {'; '.join(failed)}")


@contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError inside once so many seconds have passed; in the main thread only."""
    if seconds is None:
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"not ready after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _prepared(work: Workload, prepare: Callable[[], Step]) -> tuple[Step, float]:
    """A step that has run twice, and the peak of the memory that it took, in bytes (1 on a CPU)."""
    cuda = work.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # What earlier steps keep is theirs; the batch is everybody's.
    before = torch.cuda.memory_allocated() - sum(t.nbytes for t in work.batch) if cuda else 0
    step = prepare()
    for _ in range(2 if cuda else 1):
        step()
    # The capture counts: a graph's memory is its own from then on, and no longer part of later peaks.
    return step, float(torch.cuda.max_memory_allocated() - before) if cuda else 1.0


def _add_rows(
    bench: Bench, work: Workload, bases: Sequence[str], times: Mapping[str, float], memory: Mapping[str, float]
) -> None:
    """Time, tokens a second and peak memory of each; relative to the bases before it."""
    for place, (name, ms) in enumerate(times.items()):
        if work.tokens is not None:
            bench.add(f"{work.title} {STEP} {name}", work.shape, ms, work.tokens / ms * 1e3, "tokens a second", None)
        size = f"{memory[name] / 2**30:.2f} GiB"
        others: list[str | None] = [base for base in bases if base in list(times)[:place]]
        for other in others or [None]:
            speed, share = (times[other] / ms, memory[name] / memory[other]) if other else (None, None)
            bar = None if other is None else work.memory_bars.get((name, other))
            fast = None if other is None else work.speed_bars.get((name, other))
            bench.add(f"{work.title} {STEP} {name}", work.shape, ms, speed, other, fast)
            title = f"{work.title} peak memory {name}, {size}"
            bench.add(title, work.shape, 0.0, share, other, None if bar is None else -bar)


def where_fp8_pays(rows: Sequence[Row]) -> list[str]:
    """What measured rows say of graphed FP8 steps beside BF16, a sentence each, for the page."""
    said = []
    for row in rows:
        title, found, name = row.name.partition(f" {STEP} ")
        if not found or name != GRAPHED or row.against not in (BF16, COMPILED) or row.ratio is None:
            continue
        prefix = f"{title} peak memory {GRAPHED}, "
        memory = [
            m.ratio for m in rows if m.name.startswith(prefix) and (m.shape, m.against) == (row.shape, row.against)
        ]
        share = f", in {memory[-1]:.2f} of the memory" if memory and memory[-1] is not None else ""
        verdict = "FP8 pays" if row.ratio > 1 else "FP8 does not pay"
        speed = f"{row.ratio:.2f} times as fast{share}"
        said.append(f"{title}, {row.shape}, beside {row.against}: {verdict} ({speed}).")
    return said
