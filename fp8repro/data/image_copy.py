"""Decoded pixels of images in memory-mapped files: the format of a shard, and how its images are read.

A shard is the pixels of its images one after the other, an index of them, and a footer with the index's checksum; every
image has a checksum of its own. Nothing here may hand out pixels other than those that were written.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8repro.errors import UserError

Pixels = NDArray[Any]
MAGIC = b"fp8repro pixels1"
FOOTER = struct.Struct(f"<{len(MAGIC)}sII")  # MAGIC, number of images, checksum of the index
INDEX = np.dtype(
    [("offset", "<u8"), ("height", "<u4"), ("width", "<u4"), ("channels", "<u4"), ("checksum", "<u4")], align=False
)
# By channels: RGB of 8 bits, and grey of more, from 0 to 1. Nothing else comes out of `pixels.read_image`.
DTYPES: dict[int, np.dtype[Any]] = {3: np.dtype("u1"), 1: np.dtype("<f4")}


class Damaged(ValueError):
    """A shard that is not as it was written; its text says why."""


def write_shard(path: Path, images: Iterable[Pixels]) -> None:
    """Write images, uint8 [H, W, 3] or FP32 [H, W], to a file that appears whole or not at all.

    Raises:
        OSError: it cannot be written. What was written so far is removed.
    """
    entries, offset = [], 0
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            for image in images:
                channels = 3 if image.ndim == 3 else 1
                data = np.ascontiguousarray(image, DTYPES[channels]).data.cast("B")
                entries.append((offset, *image.shape[:2], channels, zlib.crc32(data)))
                offset += file.write(data)
            index = np.array(entries, INDEX).tobytes()
            file.write(index + FOOTER.pack(MAGIC, len(entries), zlib.crc32(index)))
            file.flush()
            # A rename may reach the disk before the data does.
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


class Shard:
    """The images of one file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Map a file that `write_shard` wrote; its index is checked, its pixels are when they are read.

        Raises:
            Damaged: it was cut off, or its index has another checksum.
            OSError: it cannot be read.
        """
        self.path = path
        size = path.stat().st_size
        if size < FOOTER.size:
            raise Damaged("it is cut off")
        self._bytes = np.memmap(path, np.uint8, "r")
        magic, count, checksum = FOOTER.unpack(self._bytes[-FOOTER.size :].tobytes())
        start = size - FOOTER.size - count * INDEX.itemsize
        if magic != MAGIC or start < 0:
            raise Damaged("it is cut off, or of another version")
        index = self._bytes[start : size - FOOTER.size].tobytes()
        if zlib.crc32(index) != checksum:
            raise Damaged("its index has another checksum than was written")
        self._index = np.frombuffer(index, INDEX)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._index)

    def image(self, position: int) -> Pixels:
        """An image as `write_shard` took it, not writable.

        Raises:
            Damaged: its pixels have another checksum.
        """
        offset, height, width, channels, checksum = self._index[position].item()
        dtype = DTYPES[channels]
        data = self._bytes[offset : offset + height * width * channels * dtype.itemsize]
        if zlib.crc32(data) != checksum:
            raise Damaged("its pixels have another checksum than was written")
        return data.view(np.ndarray).view(dtype).reshape((height, width, 3) if channels == 3 else (height, width))


class ImageCopy:
    """A split's images in a copy; a `PixelSource`."""

    def __init__(self, shards: Sequence[Shard], places: NDArray[np.int64]) -> None:
        """`places` are those of the split's images among all images of the shards."""
        self._shards, self._places = shards, places
        self._starts = np.cumsum([0, *map(len, shards)])

    def image(self, index: int) -> Pixels:
        """See `PixelSource`."""
        place = self._places[index]
        number = int(np.searchsorted(self._starts, place, "right")) - 1
        shard = self._shards[number]
        try:
            return shard.image(int(place - self._starts[number]))
        except Damaged as error:
            raise UserError(
                f"data.cache: {str(shard.path)!r} is damaged ({error}), expected the file that was written; when it is "
                "removed, the next run makes it again"
            ) from None
