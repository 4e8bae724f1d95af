"""Lists the kernels of a run by its steps without data, and has them compiled; `warm` starts it as a process.

It replaces functions in this process for good (`kernels.listing.pretend`), so no other module may import it. Reads a
pickled `Work` from its input, and writes a line of JSON for each change: kernels found, compiled, done.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from typing import IO, Any

import torch
from torch import Tensor, nn

from fp8repro.kernels.listing import Gpu, HostReadsZeros, Kernel, pretend
from fp8repro.precision import graphs, grouped_weights
from fp8repro.precision.context import StepContext
from fp8repro.precision.graphs import GraphedStep
from fp8repro.precision.grouped_weights import GroupedWeights
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.precision.telemetry import Telemetry
from fp8repro.training.optimizer import make_optimizer
from fp8repro.training.replays import MOST_GRAPHS
from fp8repro.training.warm import Work


def take_steps(work: Work) -> None:
    """All kinds of steps that the run will take, once for each shape: eager, captured, measured, evaluated."""
    config, model = work.config, work.model
    context = StepContext(config.seed, telemetry=Telemetry(config.trainer.telemetry_every))
    inject(model, config.precision, context, "triton")
    masters = MasterWeights(model, make_optimizer(model, config.optimizer), config.precision, context, narrow=True)
    model.train()
    with HostReadsZeros():
        weights = GroupedWeights(model)
        for step, arguments in enumerate([*work.examples.training[:1], *work.examples.training]):
            # The first one is measured, where any is, and begins the optimizer's state.
            context.telemetry.active = step == 0 and config.trainer.telemetry_every > 0
            context.begin(step)
            with context.fixed_weights():
                weights.round()
                loss, _ = _loss(model, *arguments)
                loss.backward()
            if step < 2:
                masters.step(1.0, config.trainer.clip_norm)
        if work.replayed:
            graphed = None
            for step, arguments in enumerate(work.examples.training[:MOST_GRAPHS]):
                context.begin(step)
                masters.optimizer.zero_grad()
                graphed = GraphedStep(model, partial(_loss, model), arguments, beside=graphed)
                graphed(arguments)
                if step == 0:
                    graphed.step(masters, 1.0, config.trainer.clip_norm)
        model.eval()
        with torch.no_grad():
            for arguments in work.examples.evaluation:
                model(*arguments)


def _loss(model: nn.Module, *arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss that launches none of our kernels, as the run's own; its gradient is a tensor of its own."""
    return model(*arguments).square().sum(), {}


def pretend_to_capture() -> None:
    """Let steps on the meta device do what they do on a GPU: replay, and round their weights together.

    As lasting as `kernels.listing.pretend`.
    """
    graphs.capture = lambda run, device, pool=None: run
    graphs.why_not_graphed = lambda model: None
    grouped_weights.reachable = lambda weight: True


class _Progress:
    """Counts kernels, and writes the counts."""

    def __init__(self, output: IO[str]) -> None:
        self._output, self._lock = output, threading.Lock()
        self._counts = {"found": 0, "compiled": 0, "done": 0}
        self.failures: list[str] = []

    def add(self, **counts: int) -> None:
        """Count more."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count
            self.write(self._counts)

    def compiled(self, kernel: Kernel, future: Future[None]) -> None:
        """A kernel whose compilation has ended."""
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            self.failures.append(f"{kernel.name}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}")
        self.add(done=1, compiled=error is None)

    def write(self, values: dict[str, Any]) -> None:
        """A line; where nobody reads it, the process ends."""
        try:
            print(json.dumps(values), file=self._output, flush=True)
        except BrokenPipeError:
            os._exit(1)


def _begin_worker() -> None:
    """What is being compiled is finished when somebody interrupts, and nothing more after the process has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def main() -> None:
    """Entry point of the process."""
    # Somebody who was started in the background may have had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Nothing that a library prints may come between.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work, workers = pickle.load(sys.stdin.buffer)
    progress = _Progress(output)
    pool = ProcessPoolExecutor(
        workers or len(os.sched_getaffinity(0)), mp_context=get_context("spawn"), initializer=_begin_worker
    )

    def found(kernel: Kernel) -> None:
        if kernel.is_compiled():
            progress.add(found=1, done=1)
            return
        progress.add(found=1)
        pool.submit(kernel.compile).add_done_callback(lambda future: progress.compiled(kernel, future))

    try:
        pretend(Gpu(work.capability, work.processors), found)
        pretend_to_capture()
        take_steps(work)
        pool.shutdown()
    except BaseException as error:
        pool.shutdown(cancel_futures=True)
        if isinstance(error, KeyboardInterrupt):
            sys.exit(130)
        raise
    if progress.failures:
        progress.write({"failure": f"{len(progress.failures)} kernels failed, the first one {progress.failures[0]}"})
