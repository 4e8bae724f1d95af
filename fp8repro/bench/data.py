"""`fp8repro bench data`: images a second from files and from their decoded copy, through the loader that trains.

Writes results/cpu/data.json and .md. Ends where a batch can go to its device. Times are those of cores, in this
process and in the workers, so a rate is that of one core; starting the workers counts.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fp8repro.bench.cpu import DEFAULT_OUT, ForeignLoad, Row, interleaved_medians, report, rows
from fp8repro.data.image_batches import Sample, load_batches
from fp8repro.data.images import ImageData, load_images
from fp8repro.engines.cpu.malloc import keep_freed_memory

# Width and height of the files, side of the crops, images, and of how many is a batch.
PHOTOS, SMALL = (500, 375, 224, 128, 64), (32, 32, 32, 2048, 128)
SHORTER_SIDE = 256
BEFORE = "files, normalized one by one"
# Starting and ending workers must be a small part of what they do.
PASSES_OF_WORKERS = 8


class _OneByOne(Dataset[Sample]):
    """A dataset that makes no batches, so that the loader stacks its samples in FP32."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Sample:
        return self.dataset[key]


def write_photos(root: Path, width: int, height: int, count: int) -> None:
    """JPEGs with the spectrum and the bytes a pixel of photographs, more or less: smooth shapes and grain."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 1)):
        (root / split / "a").mkdir(parents=True)
        for index in range(number):
            shapes = Image.fromarray(generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
            smooth = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), np.int64)
            grain = smooth + generator.integers(-12, 13, smooth.shape)
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(root / split / "a" / f"{index}.jpg", quality=90)


def core_seconds() -> float:
    """Time that cores spent on this process and on its workers that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measured_rows(root: Path, photos: tuple[int, int, int, int, int], workers: int, repeats: int) -> list[Row]:
    """One group: files of a size, loaded by workers; 0: in this process."""
    width, height, side, count, batch = photos
    folder = root / f"{width}x{height}"
    if not folder.is_dir():
        write_photos(folder, width, height, count)
    passes = PASSES_OF_WORKERS if workers else 1
    keys = [[(0, index) for index in range(start, start + batch)] for start in range(0, count, batch)] * passes

    def data(cache: bool, shorter_side: int | None = None) -> ImageData:
        return load_images("image_folder", str(folder), side, {"shorter_side": shorter_side}, seed=0, cache=cache)

    def loading(dataset: Dataset[Sample]) -> Callable[[], object]:
        return lambda: [None for _ in load_batches(dataset, keys, workers)]

    files, copied = data(False), data(True)
    work = {BEFORE: loading(_OneByOne(files.train)), "files": loading(files.train), "copy": loading(copied.train)}
    if min(width, height) > SHORTER_SIDE:
        work[f"copy, shorter_side={SHORTER_SIDE}"] = loading(data(True, SHORTER_SIDE).train)
    if not workers:
        batches = list(load_batches(files.train, keys))
        work["normalizing such batches on a CPU"] = lambda: [files.normalized(batch.images) for batch in batches]
    medians = interleaved_medians(work, repeats, core_seconds)
    by = f"{workers} workers" if workers else "no workers"
    return rows(f"{width} x {height} JPEG to {side} x {side}, {by}", medians, BEFORE, items=passes * count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; gives the exit code."""
    parser = argparse.ArgumentParser(prog="fp8repro bench data", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="measured calls of each")
    parser.add_argument("--workers", type=int, default=2, help="processes of the second measurement")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    measured: list[Row] = []
    few = max(1, options.repeats // 3)
    with tempfile.TemporaryDirectory() as root, ForeignLoad() as foreign:
        os.environ["FP8REPRO_CACHE"] = str(Path(root) / "cache")
        for photos in (PHOTOS, SMALL):
            for workers in (0, options.workers):
                measured += measured_rows(Path(root), photos, workers, few if workers else options.repeats)
    title = f"Images a second of a core ({options.repeats} calls of each, {few} with workers)"
    report(title, measured, foreign.cores, "data", options.out, unit="images", pinned=False)
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
