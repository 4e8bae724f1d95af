"""Checks of a file of tensors, before and after torch reads it: only plain containers and dense tensors may be in it.

`weights_only=True` refuses code; these checks refuse files that unpack to many times their size.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

# Names that torch.save writes for tensors in containers; a checkpoint holds nothing else.
GLOBALS = (
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
)
NAMES_AT_RUN_TIME = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
# A checkpoint holds some tens of values for each tensor.
MAX_VALUES = 1_000_000
# A file of torch before 1.6 begins with so many pickles: a magic number, a version, the machine, the contents.
LEGACY_PICKLES = 4


class Harmful(Exception):
    """Why a file is not read."""


def require_harmless_file(path: Path) -> None:
    """Refuse a file that would build anything but tensors and containers, or unpack to more than its own size.

    Raises:
        Harmful: says what it holds.
    """
    with path.open("rb") as file:
        # Torch distinguishes the two kinds in the same way.
        is_archive = file.read(4) == b"PK\x03\x04"
        if not is_archive:
            file.seek(0)
            for _ in range(LEGACY_PICKLES):
                _require_harmless_pickle(file)
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise Harmful("it unpacks to more than its own size")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as file:
                    _require_harmless_pickle(file)


def _require_harmless_pickle(file: IO[bytes]) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in NAMES_AT_RUN_TIME:
            raise Harmful(f"its pickle has {opcode.name}")
        if opcode.name == "GLOBAL" and argument not in GLOBALS and not _names_a_type(str(argument)):
            raise Harmful(f"its pickle names {str(argument).replace(' ', '.')}")


def _names_a_type(name: str) -> bool:
    """True for a tensor's storage class or dtype."""
    module, _, kind = name.partition(" ")
    if kind.endswith("Storage"):
        return module in ("torch", "torch.storage")
    return module == "torch" and isinstance(getattr(torch, kind, None), torch.dtype)


def require_plain(content: Any, tensors: bool = True) -> None:
    """Refuse contents that are no tree of plain values and dense tensors with memory of their own.

    Containers that hold themselves, or each other many times over, make small files unfold without end.

    Args:
        content: anything.
        tensors: False where there must be none.

    Raises:
        Harmful: names the first that is something else.
    """
    pending, count = [content], 0
    while pending:
        value = pending.pop()
        count += 1
        if count + len(pending) > MAX_VALUES:
            raise Harmful(f"it holds over {MAX_VALUES} values")
        if isinstance(value, Mapping):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            pending += value
        elif tensors and isinstance(value, Tensor):
            dense = value.layout is torch.strided and value.device.type == "cpu"
            if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise Harmful("it holds a tensor without memory of its own")
        elif value is not None and not isinstance(value, (bool, int, float, str, torch.Size)):
            raise Harmful(f"it holds a {type(value).__name__}")


def require_like(value: Any, like: Any, name: str) -> None:
    """Refuse plain values and tensors that differ from others in keys, kinds, shapes or dtypes.

    Args:
        value: from a file.
        like: what this process has in its place; an empty mapping stands for any.
        name: of the value, for the message.

    Raises:
        Harmful: names the first difference.
    """
    if isinstance(like, Tensor):
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (like.shape, like.dtype):
            raise Harmful(f"{name} is no {like.dtype} tensor of shape {tuple(like.shape)}")
    elif isinstance(like, Mapping):
        if not isinstance(value, Mapping) or (like and value.keys() != like.keys()):
            raise Harmful(f"{name} has not the entries of this run's")
        for key, item in like.items():
            require_like(value[key], item, f"{name}.{key}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Harmful(f"{name} is no number")
