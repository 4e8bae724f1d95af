"""The parts of the GPU check, each a list of stages: what runs, for how long at most."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PARTS = ("train", "resnet50", "transformer", "translation", "kernels")
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
    """What the caller chose: folder of the results, the part's data or None, epochs, tiny sizes on a CPU or not."""

    out: Path
    data: Path | None
    epochs: float
    rehearse: bool


def stages(part: str, choices: Choices) -> list[Stage]:
    """The stages of a part, the most important one first."""
    makers = {"train": _train, "resnet50": _resnet50, "transformer": _transformer}
    return list((makers | {"translation": _translation, "kernels": _kernels})[part](choices))


def _train(choices: Choices) -> Iterator[Stage]:
    command = (sys.executable, str(HERE / "machine.py"), str(choices.out / "environment.json"))
    yield Stage("environment", command, limit=40, least=5)
    yield _bench("conversions", "conversions", choices, limit=40, seconds=20)
    yield _bench("product", "parity", choices, limit=40)
    if choices.data is None:
        yield Stage("image folder", why="no --data FOLDER was given: the handwritten digits take its place")
    settings = ["model=resnet18", *_images(choices, side=32), f"trainer.epochs={choices.epochs:g}"]
    yield _warm(settings, choices, limit=100)
    for seed in range(RANDOM_SEEDS):
        for precision in ("fp32", "fp8"):
            name = f"resnet18-{precision}-seed{seed}"
            like = f"resnet18-{precision}-seed0" if seed else None
            chosen = [*settings, f"precision={precision}", f"seed={seed}"]
            yield _run(name, chosen, choices, limit=200, like=like, watched=precision == "fp8")


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
        settings += ["trainer.eval_every_epochs=0", "trainer.epochs=1", *_images(choices, side=224)]
        yield _run(f"resnet50-{precision}-train", settings, choices, limit=90)


def _transformer(choices: Choices) -> Iterator[Stage]:
    settings = ["model=transformer", *_text(choices), f"trainer.epochs={choices.epochs:g}"]
    if choices.data is None:
        yield Stage("text", why="no --data FOLDER was given: generated text takes its place")
    # Prepares the text, too.
    yield _warm(settings, choices, limit=120)
    for precision in ("fp32", "fp8"):
        yield _run(f"transformer-{precision}", [*settings, f"precision={precision}"], choices, limit=200)


def _translation(choices: Choices) -> Iterator[Stage]:
    # The first one compiles most kernels of the others.
    for model, limit in (("base", 165), ("big", 165), ("gnmt", 120)):
        yield _bench(model, f"{model} step", choices, limit=limit)


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


def _images(choices: Choices, side: int) -> list[str]:
    """Settings of the data of a ResNet."""
    if choices.data is None:
        return ["data=digits"]
    workers = 0 if choices.rehearse else min(12, _cores())
    side = min(side, 32) if choices.rehearse else side
    return ["data=image_folder", f"data.root={DATA}", f"data.image_size={side}", f"data.workers={workers}"]


def _text(choices: Choices) -> list[str]:
    """Settings of the data of a Transformer, and in a rehearsal of its size."""
    settings = ["data=synthetic_translation"]
    if choices.data is not None:
        valid = "valid" if any(choices.data.glob("valid.*")) else "val"
        settings = ["data=parallel_text", f"data.root={DATA}", f"data.options.valid={valid}"]
    if choices.rehearse:
        size = "encoder_layers: 1, decoder_layers: 1, width: 16, ffn_width: 16, heads: 2"
        settings += [f"model.size={{{size}}}", "data.options.bpe_merges=50", "decode.beam=1", "data.workers=0"]
    return settings


def _warm(settings: list[str], choices: Choices, limit: float) -> Stage:
    """Compiles the FP8 run's kernels; in a rehearsal there are none, and the data is all that is prepared."""
    command = (sys.executable, "-m", "fp8repro.cli", "warm", *settings)
    if choices.rehearse:
        command = ("env", "-u", "TRITON_INTERPRET", *command, "precision=fp32", "capability=90")
    else:
        command += ("precision=fp8",)
    return Stage("warm", command, limit=limit, in_work=True)


def _run(
    name: str,
    settings: list[str],
    choices: Choices,
    limit: float,
    like: str | None = None,
    watched: bool = False,
) -> Stage:
    """A run of `fp8repro train`."""
    command = [sys.executable, str(HERE / "watched_run.py"), str(choices.out / f"{name}.json"), f"{RUNS}/{name}"]
    settings = [*settings, "logger=none", "overwrite=true", "trainer.keep_checkpoints=1", "warm=off"]
    settings += ["trainer.checkpoint_every_minutes=null"]
    if choices.rehearse:
        batch = 256 if "model=transformer" in settings else 4
        settings += ["device=cpu", "backend=emulate", f"trainer.batch_size={batch}", "trainer.max_steps=2"]
        settings += ["trainer.log_every=1", "trainer.eval_every_epochs=0", "loss_scaling=none"]
    elif watched:
        command += ["--replays-within", "90"]
    return Stage(name, (*command, *settings), limit=limit, least=30, like=like, in_work=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
