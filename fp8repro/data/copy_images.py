"""Makes the decoded copy of an image folder in the user's cache: shard by shard, in parallel, resumable.

A shard is named by a hash of what it is made from and how. So whatever shard is there and whole is not made again, and
a copy of images that changed since is never used. Nothing here may change a pixel that training would see without it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal
from torch.utils.data import DataLoader, Dataset

from fp8repro.cache import cache_root, writable_cache
from fp8repro.data.image_batches import fetched
from fp8repro.data.image_copy import Damaged, ImageCopy, Shard, write_shard
from fp8repro.data.pixels import pixel_count, read_image, shrunk
from fp8repro.errors import UserError

# Every shard is an open file of each run: few enough for the usual limit of 1,024, small enough to lose one.
MOST_SHARDS, LEAST_IMAGES = 256, 1024
MANIFEST, LOCK, SUFFIX = "manifest.json", "lock", ".pixels"
SAMPLED_IMAGES = 100
SECONDS_BETWEEN_LINES = 10.0

# Name below the root, bytes, time of the last change in nanoseconds.
Source = tuple[str, int, int]


@dataclass(frozen=True)
class Plan:
    """A copy to be made or found.

    Attributes:
        folder: of its shards.
        rule: plain values that say how pixels come out of files; `shorter_side` as in `pixels.shrunk`.
        files: the shards.
        paths, sources: of the shards' images, a list a shard.
    """

    folder: Path
    rule: Mapping[str, Any]
    files: list[Path]
    paths: list[list[str]]
    sources: list[list[Source]]


def copied_images(
    root: Path, splits: Sequence[Sequence[str]], shorter_side: int | None, workers: int
) -> list[ImageCopy]:
    """The copied images of each split of a folder; what is missing of the copy is made, with a progress bar.

    Args:
        root: the data set's folder.
        splits: paths of its images.
        shorter_side: see `pixels.shrunk`.
        workers: processes that make it; 0: this one.

    Raises:
        UserError: an image that cannot be read, or a cache that cannot be written.
    """
    # Another split of the same images is the same copy.
    paths = sorted({path for split in splits for path in split})
    plan = _plan(root, paths, shorter_side)
    shards = _found(plan)
    if None in shards:
        try:
            with _locked(plan.folder):
                # Another process may have made it meanwhile.
                _make(plan, _found(plan, say=True), workers)
        except OSError as error:
            raise _unwritable(plan.folder, error) from None
        shards = _found(plan)
    whole = [shard for shard in shards if shard is not None]
    if len(whole) < len(shards):
        raise UserError(f"FP8REPRO_CACHE: {str(plan.folder)!r} was changed meanwhile, expected to be left alone")
    places = {path: place for place, path in enumerate(paths)}
    return [ImageCopy(whole, np.array([places[path] for path in split], np.int64)) for split in splits]


def _plan(root: Path, paths: list[str], shorter_side: int | None) -> Plan:
    import PIL
    from PIL import features

    # A decoder may give other pixels in another version.
    decoders = {"pillow": PIL.__version__, **{name: features.version(name) for name in ("jpg", "libtiff", "webp")}}
    rule = {"format": 1, "shorter_side": shorter_side, "resize": "bilinear, antialiased (Pillow)", "decoders": decoders}
    real = root.resolve()
    key = hashlib.sha256(os.fsencode(f"{real}\0{shorter_side}")).hexdigest()[:12]
    folder = cache_root() / "images" / f"{real.name or 'root'}-{key}"
    size = max(LEAST_IMAGES, -(-len(paths) // MOST_SHARDS))
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    sources = [[_source(path, os.path.join(root, "")) for path in part] for part in parts]
    digests = (hashlib.sha256(json.dumps([rule, part], sort_keys=True).encode()) for part in sources)
    return Plan(folder, rule, [folder / f"{digest.hexdigest()[:24]}{SUFFIX}" for digest in digests], parts, sources)


def _source(path: str, root: str) -> Source:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"data.root: image {path!r} cannot be read ({error.strerror})") from None
    return path.removeprefix(root), status.st_size, status.st_mtime_ns


def _found(plan: Plan, say: bool = False) -> list[Shard | None]:
    """The shards that are there and whole; `say` why others cannot be used."""
    shards: list[Shard | None] = []
    for path, part in zip(plan.files, plan.paths, strict=True):
        shard = None
        try:
            shard = Shard(path)
            if len(shard) != len(part):
                raise Damaged(f"it holds {len(shard)} images of {len(part)}")
        except FileNotFoundError:
            pass
        except (Damaged, OSError) as error:
            shard = None
            if say:
                reason = getattr(error, "strerror", None) or error
                print(f"data.cache: {str(path)!r} cannot be used ({reason}): it is made again", flush=True)
        shards.append(shard)
    return shards


class _Missing(Dataset[int | UserError]):
    """Item i makes a plan's shard i and gives the number of its images; an error is a value (see `image_batches`)."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getitem__(self, number: int) -> int | UserError:
        paths, side = self.plan.paths[number], self.plan.rule["shorter_side"]
        try:
            write_shard(self.plan.files[number], (np.asarray(shrunk(read_image(path), side)) for path in paths))
        except UserError as error:
            return error
        except OSError as error:
            return _unwritable(self.plan.folder, error)
        return len(paths)


def _make(plan: Plan, shards: list[Shard | None], workers: int) -> None:
    """Remove what the copy no longer needs, make the missing shards, and write down what the copy is of."""
    for path in plan.folder.glob(f"*{SUFFIX}*"):
        if path not in plan.files:
            path.unlink(missing_ok=True)
    missing = [number for number, shard in enumerate(shards) if shard is None]
    if missing:
        total = sum(map(len, plan.paths))
        needed, free = _bytes_of(plan, missing), shutil.disk_usage(plan.folder).free
        if needed > free:
            raise UserError(
                f"FP8REPRO_CACHE: {str(plan.folder)!r} has {decimal(free)} free, expected about {decimal(needed)} for "
                "data.cache=true"
            )
        print(
            f"data.cache: {_reason(plan)} ({total:,} images, {len(missing)} of {len(shards)} shards, about "
            f"{decimal(needed)} in {str(plan.folder)!r})",
            flush=True,
        )
        loader = DataLoader(
            _Missing(plan), batch_size=None, sampler=missing, num_workers=workers, generator=torch.Generator()
        )
        done = total - sum(len(plan.paths[number]) for number in missing)
        with _progress(total, done) as advance, closing(fetched(loader, len(missing))) as counts:
            for count in counts:
                advance(count)
    rows = [{"file": path.name, "images": part} for path, part in zip(plan.files, plan.sources, strict=True)]
    unfinished = plan.folder / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps({"rule": plan.rule, "shards": rows}))
    unfinished.rename(plan.folder / MANIFEST)


def _bytes_of(plan: Plan, missing: Sequence[int]) -> int:
    """About how many bytes the missing shards take, from the sizes of some images."""
    paths = [path for number in missing for path in plan.paths[number]]
    some = paths[:: max(1, len(paths) // SAMPLED_IMAGES)]
    pixels = sum(pixel_count(path, plan.rule["shorter_side"]) for path in some)
    return 3 * len(paths) * pixels // len(some)


def _reason(plan: Plan) -> str:
    """Why shards are made, in a few words: none was there, or what changed since the copy was made."""
    try:
        manifest = json.loads((plan.folder / MANIFEST).read_text())
        rule, rows = manifest["rule"], [tuple(row) for shard in manifest["shards"] for row in shard["images"]]
        before = {name: rest for name, *rest in rows}
    except (OSError, ValueError, LookupError, TypeError):
        return "decoding the images once"
    now = {name: [size, changed] for part in plan.sources for name, size, changed in part}
    groups = {
        "changed": [name for name in now if name in before and now[name] != before[name]],
        "missing": [name for name in before if name not in now],
        "new": [name for name in now if name not in before],
    }
    differing = [f"{len(names)} {kind} ({names[0]!r})" for kind, names in groups.items() if names]
    if rule != plan.rule:
        differing.append("other versions of the decoders")
    return f"since the copy was made, {', '.join(differing) or 'shards were lost'}; making it again"


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"FP8REPRO_CACHE: {str(folder)!r} cannot be written ({error.strerror or error})")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other process makes the same copy; waits for one that does."""
    writable_cache("images")
    folder.mkdir(exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Of the processes of a run, one makes the copy, and one speaks.
            if os.environ.get("RANK", "0") == "0":
                print(f"data.cache: waiting for another process that makes {str(folder)!r}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """Gives a function that takes numbers of further images: a bar on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("images"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
        # Processes are started meanwhile: a thread of the bar's might hold a lock that they inherit.
        with Progress(*columns, auto_refresh=False) as bar:
            task = bar.add_task("images", total=total, completed=done)
            yield lambda count: bar.update(task, advance=count, refresh=True)
        return
    last = time.monotonic()

    def advance(count: int) -> None:
        nonlocal last, done
        done += count
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES or done == total:
            last = time.monotonic()
            print(f"data.cache: {done:,} of {total:,} images", flush=True)

    yield advance
