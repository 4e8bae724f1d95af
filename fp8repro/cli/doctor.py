"""Checks what training needs (packages, devices, compiler, disk, data) and says how to get what is missing.

It must work when anything else is broken: only the standard library is imported before it has been checked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from itertools import islice
from pathlib import Path
from typing import Any

from fp8repro.cache import cache_root
from fp8repro.errors import UserError

USAGE = """\
usage: fp8repro doctor [data.root=FOLDER ...]
       fp8repro doctor run=FOLDER [figure=FILE]

  fp8repro doctor data.root=/data/imagenet data.root=/data/wmt16
  fp8repro doctor run=runs/resnet18-digits-fp8-seed0

Checks whether this machine can train, and says how to get what is missing; exit code 0 if it can, else 1.
With run=, explains a run: how it ended, skipped steps, where it first went wrong, what its roundings cost each layer
(with trainer.telemetry_every=), whether its checkpoints are whole; exit code 1 if it failed or a checkpoint is damaged.
With figure=FILE, also draws what the roundings cost."""

OK, NOTE, MISSING = "ok", "note", "missing"
SHOWN = ("torch", "torchvision", "triton")
# A checkpoint of ResNet-50 takes 0.2 GB, of Transformer-base 0.7 GB; two are kept while a third is written.
DISK_BYTES = 4 * 10**9
SHARED_BYTES = 10**9
SAMPLED_CLASSES = 10


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        state: "ok", "note" (training runs, but slower or without something) or "missing" (it cannot run).
        found: what there is.
        advice: what to do.
    """

    name: str
    state: str
    found: str
    advice: str = ""


def doctor(settings: Iterable[str]) -> int:
    """Print what the settings ask for.

    Args:
        settings: `data.root=FOLDER` (any number), or one `run=FOLDER`, which may have a `figure=FILE`.

    Returns:
        The exit code.

    Raises:
        UserError: another setting, or a folder that holds no run.
    """
    roots: list[Path] = []
    runs: list[Path] = []
    figures: list[Path] = []
    for setting in settings:
        name, _, value = setting.partition("=")
        places = {"data.root": roots, "run": runs, "figure": figures}
        if name not in places or not value:
            raise UserError(f"doctor: got {setting!r}, expected data.root=FOLDER, run=FOLDER or figure=FILE")
        places[name].append(Path(value))
    if figures and not runs:
        raise UserError("doctor: got figure= without run=, expected run=FOLDER figure=FILE")
    if runs:
        if roots or len(runs) > 1:
            raise UserError("doctor: got run= beside other settings, expected it alone")
        from fp8repro.cli.explain import explain

        lines, sound = explain(runs[0], *figures[-1:])
        print("\n".join(lines))
        return 0 if sound else 1
    findings = list(examine(roots))
    for finding in findings:
        print(f"{finding.state:<8} {finding.name:<16} {finding.found}")
        if finding.advice:
            print(f"{'':<25} -> {finding.advice}")
    missing = [finding.name for finding in findings if finding.state == MISSING]
    print(f"training cannot run: {', '.join(missing)}" if missing else "training can run")
    return 1 if missing else 0


def examine(roots: Iterable[Path] = ()) -> Iterator[Finding]:
    """All checks, one after the other.

    Args:
        roots: folders of data to look into.
    """
    looks: list[Callable[[], Iterable[Finding]]] = [_python, _packages, _matching, _devices, _engine, _places]
    for look in looks:
        try:
            yield from look()
        # A broken package may raise anything; the other checks still run.
        except Exception as error:
            yield Finding(look.__name__.strip("_"), MISSING, _one_line(error), "install the packages again")
    for root in roots:
        yield data_root(root)


def _python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    found = ".".join(map(str, sys.version_info[:3]))
    wanted = metadata("fp8repro")["Requires-Python"]
    fits = SpecifierSet(wanted or "").contains(found)
    yield Finding("Python", OK if fits else MISSING, found, "" if fits else f"use a Python {wanted}")


def _packages() -> Iterator[Finding]:
    """Requirements of this package; those of its extras may be missing."""
    from packaging.requirements import Requirement

    others = []
    for text in requires("fp8repro") or []:
        wanted = Requirement(text)
        extra = next(
            (e for e in ("", "fairseq", "wandb") if not wanted.marker or wanted.marker.evaluate({"extra": e})), None
        )
        if extra is None:
            continue
        found = _version(wanted.name)
        fits = found is not None and wanted.specifier.contains(found, prereleases=True)
        if extra:
            advice = "" if fits else f"only for {extra}: pip install 'fp8repro[{extra}]'"
            yield Finding(wanted.name, OK if fits else NOTE, found or "not installed", advice)
        elif not fits:
            needed = f"{wanted.name}{wanted.specifier}"
            yield Finding(wanted.name, MISSING, found or "not installed", f"pip install '{needed}'")
        elif wanted.name in SHOWN:
            yield Finding(wanted.name, OK, found or "")
        else:
            others.append(f"{wanted.name} {found}")
    yield Finding("other packages", OK, ", ".join(others))


def _matching() -> Iterator[Finding]:
    """Whether the versions of torch, torchvision and Triton fit together, and whether each can be imported."""
    from packaging.requirements import Requirement

    together = "install torch, torchvision and triton together, from one index"
    differing = []
    for package in SHOWN:
        for text in (requires(package) or []) if _version(package) else []:
            wanted = Requirement(text)
            found = _version(wanted.name)
            applies = not wanted.marker or wanted.marker.evaluate({"extra": ""})
            if wanted.name in SHOWN and found and applies and not wanted.specifier.contains(found, prereleases=True):
                differing.append(f"{package} wants {wanted.name}{wanted.specifier}, found {found}")
    try:
        import torchvision.ops  # noqa: F401
    except Exception as error:
        differing.append(f"torchvision does not load ({_one_line(error)})")
    if differing:
        yield Finding("torch match", MISSING, "; ".join(differing), together)
    else:
        yield Finding("torch match", OK, "torch, torchvision and triton belong together")


def _devices() -> Iterator[Finding]:
    import torch

    from fp8repro.engines.select import select_backend

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        if not driver:
            yield Finding("GPU", NOTE, "none: training runs on the CPU, FP8 products are emulated")
        else:
            built = (
                f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
            )
            advice = "install a torch for this driver's CUDA version, or a newer driver"
            yield Finding("GPU", MISSING, f"driver {driver[0]}, but {built} and cannot use it", advice)
        return
    yield Finding("driver", OK, f"{driver[0] if driver else 'unknown'}, CUDA {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        _, reason = select_backend("auto", torch.device("cuda", index), "promoted")
        gigabytes = torch.cuda.get_device_properties(index).total_memory / 1e9
        name = f"{torch.cuda.get_device_name(index)}, {gigabytes:.0f} GB"
        fp8 = f"FP8 products are emulated: {reason}" if reason else "FP8 tensor cores"
        yield Finding(f"GPU {index}", NOTE if reason else OK, f"{name}, {fp8}")


def _engine() -> Iterator[Finding]:
    import torch

    from fp8repro.engines.cpu import native
    from fp8repro.engines.select import select_backend

    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if os.environ.get("FP8REPRO_NATIVE") == "0":
        yield Finding("CPU engine", NOTE, "switched off by FP8REPRO_NATIVE=0: same results, slower")
    elif native.available():
        products = {"emulate-amx": "BF16 matrix tiles", "emulate-bf16": "BF16 dot products", "emulate": "FP32"}
        chosen = select_backend("auto", torch.device("cpu"), "promoted")[0].name
        yield Finding("CPU engine", OK, f"compiled by {compiler}; FP8 products through {products[chosen]} ({chosen})")
    elif compiler:
        yield Finding(
            "CPU engine", NOTE, f"{compiler} did not compile it: same results, slower", "see the line on stderr"
        )
    else:
        yield Finding("CPU engine", NOTE, "no C++ compiler: same results, slower", "install g++ (apt install g++)")


def _places() -> Iterator[Finding]:
    """Whether the folders that training writes to are writable and have room."""
    places: tuple[tuple[str, Callable[[], Path], str], ...] = (
        ("runs", lambda: Path("runs"), "start where you may write, or give run_dir="),
        ("cache", cache_root, "set FP8REPRO_CACHE to a folder with room"),
    )
    for name, find, advice in places:
        try:
            folder = find()
        except UserError as error:
            yield Finding(f"{name} folder", MISSING, str(error), advice)
            continue
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(bytes(4096))
        except OSError as error:
            yield Finding(f"{name} folder", MISSING, f"{folder} cannot be written ({error.strerror})", advice)
            continue
        free = shutil.disk_usage(existing).free
        room = f"{folder}, {free / 1e9:.1f} GB free"
        yield Finding(f"{name} folder", *((OK, room) if free >= DISK_BYTES else (NOTE, f"{room}, little", advice)))
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < SHARED_BYTES:
        found = f"{free / 1e6:.0f} MB in {shared}: workers that load images need more"
        yield Finding(
            "shared memory", NOTE, found, "start the container with --shm-size=8g, or train with data.workers=0"
        )


def data_root(root: Path) -> Finding:
    """What a folder of data holds, and whether it can be trained on."""
    try:
        return Finding("data.root", OK, f"{root}: {_data(root)}")
    except UserError as error:
        return Finding("data.root", MISSING, str(error), "see the data sets in README.md")
    except OSError as error:
        return Finding("data.root", MISSING, f"{root} cannot be read ({error.strerror})", "check its permissions")


def _data(root: Path) -> str:
    if not root.is_dir():
        raise UserError(f"{str(root)!r} is no folder")
    names = sorted(entry.name for entry in root.iterdir())
    if any(name.startswith("dict.") for name in names):
        return _binary(root, names)
    texts = [name for name in names if name.startswith("train.") and (root / name).is_file()]
    if texts:
        return _text(root, texts)
    return _images(root, None if "train" in names else 0.1)


def _binary(root: Path, names: list[str]) -> str:
    from fp8repro.data.translation.datasets import load_translation

    pairs = [name.split(".")[1].partition("-") for name in names if name.startswith("train.") and name.endswith(".idx")]
    if not pairs:
        raise UserError(f"{str(root)!r} has dictionaries but no train.*.idx, expected a folder of fairseq-preprocess")
    source, _, target = pairs[0]
    data = load_translation("fairseq_binary", str(root), {"source": source, "target": target})
    return f"fairseq_binary {source}-{target}, {len(data.train.source)} pairs, {len(data.vocabulary)} ids"


def _text(root: Path, texts: list[str]) -> str:
    from fp8repro.data.translation.corpus import corpus_files, read_pairs

    endings = [name.removeprefix("train.") for name in texts]
    if "tsv" not in endings and len(endings) != 2:
        raise UserError(f"{str(root)!r} has {', '.join(texts)}, expected train.tsv or one file a language")
    counts = {}
    for split in ("train", "valid", "test"):
        name = f"{split}.tsv" if "tsv" in endings else split
        counts[split] = sum(1 for _ in read_pairs(corpus_files(root, name, (endings[0], endings[-1]))))
    return "parallel text, pairs: " + ", ".join(f"{split} {count}" for split, count in counts.items())


def _images(root: Path, val_fraction: float | None) -> str:
    from fp8repro.data.folders import train_and_val_files
    from fp8repro.data.pixels import read_image

    train, val = train_and_val_files(root, val_fraction)
    first_of_class = dict(zip(reversed(train.labels), reversed(train.paths), strict=True))
    for label in islice(sorted(first_of_class), SAMPLED_CLASSES):
        read_image(first_of_class[label])
    split = "" if val_fraction is None else ", split by data.options.val_fraction=0.1"
    return f"images, {len(train.classes)} classes, {len(train.paths)} to train and {len(val.paths)} to validate{split}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> list[str]:
    """Lines that a program prints; none if it is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split("\n")[:-1]


def _one_line(error: Any) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
