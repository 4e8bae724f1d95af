"""Compiles the Triton kernels of a run before its first step, in processes of its own; it must change no bit of a run.

What compiles is `warm_steps`, in another process: it lists the kernels by a step without data.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from fp8repro.errors import RunFailure, UserError
from fp8repro.settings.schema import RunConfig
from fp8repro.training.distributed import World
from fp8repro.training.progress import Display
from fp8repro.training.run import Run
from fp8repro.training.signals import StopRequest, exit_code
from fp8repro.training.tasks import make_task
from fp8repro.training.tasks.task import Examples, Task

LEAST_CAPABILITY = 89
# Multiprocessors of GPUs that need not be there; tiles are chosen by them.
PROCESSORS = {89: 142, 90: 132, 100: 148, 120: 170}
# `-c`, so that the processes which compile do not import what lists.
PROGRAM = "from fp8repro.training.warm_steps import main; main()"
POLL_SECONDS = 0.2
# For the kernels that are being compiled when somebody interrupts.
GRACE = 60


@dataclass(frozen=True)
class Work:
    """What a run launches, and on what.

    Attributes:
        model: on the meta device, as the task makes it.
        config: of the run, its learning rate a number.
        examples: what the model is called with.
        replayed: steps are captured as CUDA graphs.
        capability, processors: of the GPU.
    """

    model: nn.Module
    config: RunConfig
    examples: Examples
    replayed: bool
    capability: tuple[int, int]
    processors: int


@dataclass(frozen=True)
class Warmed:
    """What became of it: kernels of the run, how many of them were compiled now, seconds, Triton's cache."""

    kernels: int
    compiled: int
    seconds: float
    folder: str

    def __str__(self) -> str:
        """One line."""
        ready = self.kernels - self.compiled
        return (
            f"{self.kernels} kernels: {self.compiled} compiled, {ready} were there; {self.seconds:.0f} s; {self.folder}"
        )


def work_of(config: RunConfig, task: Task[Any], replayed: bool, capability: int, processors: int | None = None) -> Work:
    """What a run with this task launches on a GPU.

    Args:
        config: of the run.
        task: of the run; its random numbers stay what they are.
        replayed: steps are captured as CUDA graphs.
        capability: 90 for sm_90.
        processors: multiprocessors; by default those of a known GPU.

    Raises:
        UserError: a backend that compiles nothing, or a GPU that the kernels do not run on.
    """
    if config.backend == "emulate":
        raise UserError("backend: got 'emulate', which compiles nothing, expected auto or triton")
    if capability < LEAST_CAPABILITY:
        raise UserError(f"capability: got {capability}, expected {LEAST_CAPABILITY} or later (FP8 tensor cores)")
    processors = processors or PROCESSORS.get(capability)
    if processors is None:
        known = ", ".join(map(str, PROCESSORS))
        raise UserError(f"processors: missing for capability={capability}, expected the GPU's number (known: {known})")
    # Launches do not depend on the rate.
    config = replace(config, optimizer=replace(config.optimizer, lr=config.optimizer.lr or 0.1))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = task.model()
    return Work(model, config, task.examples(), replayed, divmod(capability, 10), processors)


def warm_config(config: RunConfig, capability: int | None, processors: int | None) -> Warmed:
    """Compile the kernels of a run that is not there yet, and show the progress.

    Args:
        config: of the run, on one process.
        capability, processors: see `work_of`; None: those of this machine's GPU.

    Raises:
        UserError: as `warm` and `work_of`; no GPU is here and no capability is given; data that cannot be used.
        RunFailure: a kernel could not be listed or compiled.
        SystemExit: a signal asked to stop; what was being compiled is there, whole.
    """
    if capability is None:
        if not torch.cuda.is_available():
            raise UserError("capability: missing where there is no GPU, expected capability=90 or that of another GPU")
        capability, processors = _gpu(torch.device("cuda"))
    task = make_task(config, World())
    work = work_of(config, task, config.graphs == "auto" and task.why_not_replayed is None, capability, processors)
    display = Display(0, 0)
    stop = StopRequest()
    try:
        with stop, display.counting("compiling kernels") as show:
            return warm(work, show, lambda: bool(stop.signal))
    except RunFailure:
        if stop.signal:
            print("fp8repro: interrupted", file=sys.stderr)
            raise SystemExit(exit_code(stop.signal)) from None
        raise
    finally:
        display.close()


def _gpu(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for sm_90) and multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def compile_kernels(run: Run, display: Display, stop: StopRequest) -> None:
    """Compile a run's kernels, on a GPU; one process of each machine does, the others wait.

    What cannot be compiled now is compiled when it is first launched.
    """
    device = run.world.device
    if device.type != "cuda" or run.report.backend != "triton" or run.config.warm == "off":
        return
    alone = run.world.size == 1
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            work = work_of(run.config, run.task, run.replays.why_not is None, *_gpu(device))
            with display.counting("compiling kernels") as show:
                # Runs beside each other share the cores by OMP_NUM_THREADS, which torchrun sets to 1 for all.
                warmed = warm(work, show, lambda: bool(stop.signal), torch.get_num_threads() if alone else 0)
            display.say(str(warmed))
        # Whatever it was: a run needs no kernel early.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            display.say(f"warning: kernels are compiled when they are first launched, not before ({reason})")
        except KeyboardInterrupt:
            display.close()
            raise
    run.world.wait()


def warm(
    work: Work, show: Callable[[int, int], None], stopped: Callable[[], bool] = lambda: False, workers: int = 0
) -> Warmed:
    """Compile what Triton's cache does not have yet; returns when all is there.

    Args:
        work: see `work_of`.
        show: called with the kernels that are done and found so far.
        stopped: asked now and then; True ends it early. What was compiled stays, whole.
        workers: processes that compile; 0: one for each core.

    Raises:
        UserError: kernels cannot be compiled here, or the cache cannot be written.
        RunFailure: a kernel could not be listed or compiled.
    """
    folder, started = _cache_folder(), time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # Ctrl-C on a terminal reaches it through this process alone.
            start_new_session=True,
        )
        try:
            last = _follow(process, pickle.dumps((work, workers)), show, stopped)
        finally:
            _end(process)
        if stopped():
            raise RunFailure("interrupted")
        if "failure" in last or process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise RunFailure(last.get("failure") or (lines or [f"exit code {process.returncode}"])[-1][:300])
    return Warmed(last["found"], last["compiled"], time.monotonic() - started, folder)


def _follow(
    process: subprocess.Popen[bytes], work: bytes, show: Callable[[int, int], None], stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Hand over the work and show what is reported of it; gives the last report."""
    assert process.stdin is not None
    assert process.stdout is not None
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    try:
        process.stdin.write(work)
        process.stdin.close()
    except BrokenPipeError:
        return {}
    last: dict[str, Any] = {"found": 0, "compiled": 0}
    while not stopped():
        try:
            line = lines.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if line is None:
            process.wait()
            return last
        last |= json.loads(line)
        if "done" in last:
            show(last["done"], last["found"])
    return last


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process, if it has not ended: it lets the kernels that are being compiled come to their end."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _cache_folder() -> str:
    """Triton's cache.

    Raises:
        UserError: nothing can be compiled here, or the cache cannot be written.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET: got 1, expected it unset where kernels are compiled")
    try:
        import triton
    except ImportError:
        raise UserError("backend: got 'triton', but Triton is not installed; expected pip install triton") from None
    folder = str(triton.knobs.cache.dir)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"TRITON_CACHE_DIR: {folder!r} cannot be written ({error.strerror}), expected a folder with room"
        ) from None
    return folder
