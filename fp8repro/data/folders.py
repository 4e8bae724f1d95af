"""Folders of images, one subfolder a class: what lies in them, checked before training. Never decodes an image."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fp8repro.data.keys import permutation
from fp8repro.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# The split belongs to the data set, not to a run.
SPLIT_KEY = 0


@dataclass(frozen=True)
class ImageFiles:
    """Paths of images, the class index of each, and the names of the classes, sorted."""

    paths: list[str]
    labels: list[int]
    classes: list[str]


def train_and_val_files(root: Path, val_fraction: float | None) -> tuple[ImageFiles, ImageFiles]:
    """The two splits of a data set.

    Args:
        root: holds `train/` and `val/` with the same class folders, or the class folders themselves.
        val_fraction: share of each class that becomes the validation split, for a single folder; None where there
            are two.

    Raises:
        UserError: a missing folder, an empty class, or class folders that differ between the splits.
    """
    if not root.is_dir():
        raise UserError(f"data.root: {str(root)!r} is no folder, expected one with train/ and val/ class folders")
    if val_fraction is not None:
        if not 0 < val_fraction < 1:
            raise UserError(f"data.options.val_fraction: got {val_fraction}, expected a number between 0 and 1")
        return split_files(scan_classes(root), val_fraction, str(root))
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise UserError(
                f"data.root: {str(root)!r} has no {split}/ folder, expected train/ and val/, or data.options."
                "val_fraction=0.1 to split one folder"
            )
    train, val = scan_classes(root / "train"), scan_classes(root / "val")
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(
            f"data.root: train/ has {len(train.classes)} classes and val/ {len(val.classes)}, expected the same "
            f"(first difference: {differing[0]!r})"
        )
    return train, val


def scan_classes(folder: Path) -> ImageFiles:
    """All images under the class folders of `folder`, in sorted order.

    Raises:
        UserError: no class folder, or one without images.
    """
    try:
        entries = os.listdir(folder)
    except OSError as error:
        _refuse(error)
    classes = sorted(name for name in entries if (folder / name).is_dir() and not name.startswith("."))
    if not classes:
        raise UserError(f"data.root: {str(folder)!r} holds no class folders, expected one folder of images a class")
    paths: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        files = sorted(_files(folder / name))
        found = [path for path in files if path.lower().endswith(EXTENSIONS)]
        others += [path for path in files if not path.lower().endswith(EXTENSIONS)]
        if not found:
            raise UserError(f"data.root: class folder {str(folder / name)!r} holds no images")
        paths += found
        labels += [label] * len(found)
    # Of several processes one tells.
    if others and os.environ.get("RANK", "0") == "0":
        print(
            f"data.root: left out {len(others)} files of other names than {', '.join(EXTENSIONS)} ({others[0]!r})",
            file=sys.stderr,
        )
    return ImageFiles(paths, labels, classes)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"data.root: folder {error.filename!r} cannot be read ({error.strerror})") from None


def _files(folder: Path) -> list[str]:
    """Files under a class folder, but for hidden ones that are no images.

    Links to folders are followed, as torchvision does. A folder that is reached twice, by a link to a parent or by two
    links, counts once: its images would be there without end, or on both sides of a split.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Sorted: which of two links to a folder counts must not depend on the file system.
        folders.sort()
        found += [
            os.path.join(parent, name)
            for name in names
            if not name.startswith(".") or name.lower().endswith(EXTENSIONS)
        ]
    return found


def split_files(files: ImageFiles, val_fraction: float, where: str) -> tuple[ImageFiles, ImageFiles]:
    """Both splits of one folder, the same share of every class."""
    train, val = stratified_split(files.labels, val_fraction, where)
    return _subset(files, train), _subset(files, val)


def _subset(files: ImageFiles, chosen: Sequence[int]) -> ImageFiles:
    return ImageFiles([files.paths[i] for i in chosen], [files.labels[i] for i in chosen], files.classes)


def stratified_split(labels: Sequence[int], val_fraction: float, where: str) -> tuple[list[int], list[int]]:
    """Indices of the training and the validation split, each ascending; every class has the same share in both.

    Raises:
        UserError: a class too small to be in both.
    """
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    chosen: set[int] = set()
    for label, members in by_class.items():
        wanted = round(len(members) * val_fraction)
        if not 0 < wanted < len(members):
            raise UserError(
                f"data.options.val_fraction: got {val_fraction} with {len(members)} images in a class of {where!r}, "
                "expected at least one on either side"
            )
        order = permutation(len(members), "split", SPLIT_KEY, label)
        chosen.update(members[i] for i in order[:wanted])
    return [i for i in range(len(labels)) if i not in chosen], sorted(chosen)
