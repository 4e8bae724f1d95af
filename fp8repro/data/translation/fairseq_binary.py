"""fairseq's binarized data: reads both index layouts memory-mapped, writes the newer one.

Files are `<prefix>.bin` (tokens back to back) and `<prefix>.idx`. Nothing here may load a whole .bin into memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8repro.data.translation.vocabulary import UNKNOWN
from fp8repro.errors import UserError

MMAP_MAGIC = b"MMIDIDX\0\0"
LEGACY_MAGIC = b"TNTIDX\0\0"
DTYPES: dict[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
CODES = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of token ids, each with its trailing EOS, in one flat (possibly memory-mapped) array.

    Attributes:
        tokens: flat array of any integer dtype.
        starts, sizes: int64 [N], in elements.
        shift: what the file adds to each id (1 in fairseq's legacy layout, a relic of Lua's indices).
    """

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    shift: int = 0

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sizes)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Ids of one sequence, a copy; a `<s>`, `<pad>` or `</s>` before its end (a word of the text) is unknown."""
        start, size = int(self.starts[index]), int(self.sizes[index])
        ids = self.tokens[start : start + size].astype(np.int64) - self.shift
        words = ids[:-1]
        words[words < UNKNOWN] = UNKNOWN
        return ids


def read_binary(prefix: Path) -> TokenSequences:
    """Open `<prefix>.idx` and `<prefix>.bin`; the index tells which of the two layouts it is.

    Raises:
        UserError: a file is missing, truncated, or of another kind.
    """
    index_path, data_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        index = index_path.read_bytes()
        data_bytes = data_path.stat().st_size
    except OSError as error:
        raise UserError(
            f"data.root: cannot read {error.filename!r} ({error.strerror}), expected fairseq data"
        ) from None
    if index.startswith(MMAP_MAGIC):
        dtype, starts, sizes, shift = _read_mmap_index(index, index_path)
    elif index.startswith(LEGACY_MAGIC):
        dtype, starts, sizes, shift = _read_legacy_index(index, index_path)
    else:
        raise UserError(
            f"data.root: {str(index_path)!r} starts with {index[:9]!r}, expected {MMAP_MAGIC!r} or {LEGACY_MAGIC!r}"
        )
    if len(sizes) and (sizes.min() < 0 or starts.min() < 0):
        raise UserError(f"data.root: {str(index_path)!r} holds a negative size or offset, expected fairseq data")
    # Each alone first: their sum could exceed 64 bits.
    needed = int(max(starts.max(), sizes.max())) * dtype.itemsize if len(sizes) else 0
    if needed <= data_bytes and len(sizes):
        needed = int((starts + sizes).max()) * dtype.itemsize
    if data_bytes < needed:
        raise UserError(f"data.root: {str(data_path)!r} is truncated: {data_bytes} bytes, expected {needed}")
    # Sequences lie one after the other; overlapping ones could hold more tokens than the file.
    if int(sizes.sum(dtype=np.float64)) * dtype.itemsize > data_bytes:
        raise UserError(f"data.root: {str(index_path)!r} holds sequences that overlap, expected fairseq data")
    # An empty file cannot be mapped.
    whole = data_bytes // dtype.itemsize
    tokens = np.memmap(data_path, dtype=dtype, mode="r", shape=(whole,)) if needed else np.zeros(0, dtype)
    return TokenSequences(tokens, starts, sizes, shift)


def write_binary(prefix: Path, sequences: Iterable[NDArray[np.int64]], vocab_size: int) -> int:
    """Write `<prefix>.bin` and `<prefix>.idx` in fairseq's mmap layout; the dtype is fairseq's choice.

    Returns:
        The number of sequences.
    """
    # fairseq's rule: 16 bits under 65,500 ids (not 65,536), as its index must be readable by older versions.
    dtype = np.dtype("<u2" if vocab_size < 65500 else "<u4" if vocab_size < 2**32 - 1 else "<i8")
    sizes = []
    with Path(f"{prefix}.bin").open("wb") as file:
        for sequence in sequences:
            file.write(sequence.astype(dtype).tobytes())
            sizes.append(len(sequence))
    counts = np.array(sizes, dtype="<i4")
    ends = np.cumsum(counts, dtype="<i8") * dtype.itemsize
    offsets = ends - counts.astype("<i8") * dtype.itemsize
    header = MMAP_MAGIC + struct.pack("<QBQ", 1, CODES[dtype.str.replace("|", "<")], len(sizes))
    Path(f"{prefix}.idx").write_bytes(header + counts.tobytes() + offsets.tobytes())
    return len(sizes)


Index = tuple[np.dtype[Any], NDArray[np.int64], NDArray[np.int64], int]


def _read_mmap_index(index: bytes, path: Path) -> Index:
    """Magic, u64 version, u8 dtype code, u64 N, N i32 sizes, N i64 byte offsets."""
    (version, code, count), at = _header("<QBQ", index, len(MMAP_MAGIC), path)
    dtype = _dtype(version, code, path)
    _check_length(index, at + count * 12, path)
    sizes = np.frombuffer(index, "<i4", count, at).astype(np.int64)
    offsets = np.frombuffer(index, "<i8", count, at + 4 * count).astype(np.int64)
    if np.any(offsets % dtype.itemsize):
        raise UserError(f"data.root: {str(path)!r} holds an offset that is no multiple of {dtype.itemsize} bytes")
    return dtype, offsets // dtype.itemsize, sizes, 0


def _read_legacy_index(index: bytes, path: Path) -> Index:
    """Magic, u64 version, dtype code, element size, N, S; N+1 i64 dimension offsets, N+1 data offsets, S sizes."""
    (version, code, _, count, dimensions), at = _header("<QQQQQ", index, len(LEGACY_MAGIC), path)
    dtype = _dtype(version, code, path)
    _check_length(index, at + 8 * (2 * (count + 1) + dimensions), path)
    if dimensions != count:
        raise UserError(f"data.root: {str(path)!r} holds {dimensions} sizes for {count} sequences, expected one each")
    offsets = np.frombuffer(index, "<i8", count + 1, at + 8 * (count + 1)).astype(np.int64)
    sizes = np.frombuffer(index, "<i8", dimensions, at + 16 * (count + 1)).astype(np.int64)
    return dtype, offsets[:-1], sizes, 1


def _header(layout: str, index: bytes, at: int, path: Path) -> tuple[tuple[int, ...], int]:
    end = at + struct.calcsize(layout)
    _check_length(index, end, path)
    return struct.unpack_from(layout, index, at), end


def _check_length(index: bytes, expected: int, path: Path) -> None:
    if len(index) < expected:
        raise UserError(f"data.root: {str(path)!r} is truncated: {len(index)} bytes, expected {expected}")


def _dtype(version: int, code: int, path: Path) -> np.dtype[Any]:
    if version != 1:
        raise UserError(f"data.root: {str(path)!r} has version {version}, expected 1")
    if code not in DTYPES:
        accepted = ", ".join(str(c) for c in DTYPES)
        raise UserError(f"data.root: {str(path)!r} has dtype code {code}, expected an integer type ({accepted})")
    return np.dtype(DTYPES[code])
