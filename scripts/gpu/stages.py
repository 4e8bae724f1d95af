"""The parts of the GPU check, each a list of stages: what runs, for how long at most."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PARTS = ("train", "resnet50", "kernels")
HERE = Path(__file__).parent
# Names in the work folder, so that no record holds a path of this machine.
DATA, RUNS = "data", "runs"
RANDOM_SEEDS = 3


@dataclass(frozen=True)
class Stage:
    """A process of the check.

    Attributes:
        name: of its log and its results.
        command: what it runs; empty: it is skipped, and `why` says why.
        limit: seconds after which it is stopped.
        least: seconds without which it is not started.
        like: an earlier stage of the same work: without it done nothing is started, nor with less time than it took.
        in_work: runs in the work folder, where its run folder is, instead of the repository.
    """

    name: str
    command: tuple[str, ...] = ()
    limit: float = 60
    least: float = 15
    like: str | None = None
    why: str = ""
    in_work: bool = False


@dataclass(frozen=True)
class Choices:
    """What the caller chose: folder of the results, class folders of images or None, tiny sizes on a CPU or not."""

    out: Path
    data: Path | None
    epochs: float
    rehearse: bool


def stages(part: str, choices: Choices) -> list[Stage]:
    """The stages of a part, the most important one first."""
    makers = {"train": _train, "resnet50": _resnet50, "kernels": _kernels}
    return list(makers[part](choices))


def _train(choices: Choices) -> Iterator[Stage]:
    command = (sys.executable, str(HERE / "machine.py"), str(choices.out / "environment.json"))
    yield Stage("environment", command, limit=40, least=5)
    yield _bench("conversions", "conversions", choices, limit=40, seconds=20)
    yield _bench("product", "parity", choices, limit=40)
    if choices.data is None:
        yield Stage("image folder", why="no --data FOLDER was given: the handwritten digits take its place")
    settings = [f"trainer.epochs={choices.epochs:g}"]
    for seed in range(RANDOM_SEEDS):
        for precision in ("fp32", "fp8"):
            name = f"resnet18-{precision}-seed{seed}"
            like = f"resnet18-{precision}-seed0" if seed else None
            chosen = ["model=resnet18", f"precision={precision}", f"seed={seed}", *settings]
            yield _run(name, chosen, choices, side=32, limit=200, like=like, watched=precision == "fp8")


def _resnet50(choices: Choices) -> Iterator[Stage]:
    # The first one compiles the kernels of all.
    yield _bench("step", "training step", choices, limit=240)
    yield _bench("profile", "profile", choices, limit=90)
    yield _bench("compiled", "compiled training step", choices, limit=200)
    if choices.data is None:
        yield Stage("images a second", why="no --data FOLDER was given")
        return
    for precision in ("fp8", "bf16"):
        settings = ["model=resnet50", f"precision={precision}", "trainer.batch_size=256", "trainer.max_steps=80"]
        settings += ["trainer.eval_every_epochs=0", "trainer.epochs=1"]
        yield _run(f"resnet50-{precision}-train", settings, choices, side=224, limit=90)


def _kernels(choices: Choices) -> Iterator[Stage]:
    tests = ("tests/kernels", "tests/precision/test_graphs.py")
    if choices.rehearse:
        tests = ("tests/kernels/test_kernels_plans.py",)
    # Compilation takes most of the time, so the tests share the cores.
    workers = ("-n", str(_cores())) if find_spec("xdist") and not choices.rehearse else ()
    command = (sys.executable, "-m", "pytest", *tests, "-m", "not long", *workers, "-p", "no:cacheprovider")
    yield Stage("parity", command, limit=330, least=60)
    yield _bench("speed", None, choices, limit=200, seconds=100)


def _bench(name: str, only: str | None, choices: Choices, limit: float, seconds: float | None = None) -> Stage:
    """Measurements of `fp8repro bench kernels`, all of them on one page; a profile is a page of its own."""
    folder = choices.out / ("profile" if name == "profile" else "page")
    command = [sys.executable, "-m", "fp8repro.bench.kernels", "--out", str(folder), "--append"]
    command += ["--only", only] if only else []
    command += ["--seconds", str(seconds)] if seconds else []
    return Stage(name, (*command, *(["--rehearse"] if choices.rehearse else [])), limit=limit)


def _run(
    name: str,
    settings: list[str],
    choices: Choices,
    side: int,
    limit: float,
    like: str | None = None,
    watched: bool = False,
) -> Stage:
    """A run of `fp8repro train`."""
    command = [sys.executable, str(HERE / "watched_run.py"), str(choices.out / f"{name}.json"), f"{RUNS}/{name}"]
    if choices.data is None:
        settings = [*settings, "data=digits"]
    else:
        workers = 0 if choices.rehearse else min(12, _cores())
        side = min(side, 32) if choices.rehearse else side
        settings = [*settings, "data=image_folder", f"data.root={DATA}", f"data.image_size={side}"]
        settings += [f"data.workers={workers}"]
    settings += ["logger=none", "overwrite=true", "trainer.keep_checkpoints=1", "trainer.checkpoint_every_minutes=null"]
    if choices.rehearse:
        settings += ["device=cpu", "backend=emulate", "trainer.batch_size=4", "trainer.max_steps=2"]
        settings += ["trainer.log_every=1", "trainer.eval_every_epochs=0", "loss_scaling=none"]
    elif watched:
        command += ["--replays-within", "90"]
    return Stage(name, (*command, *settings), limit=limit, least=30, like=like, in_work=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
