"""What `aot` compiles: a kernel, the types of its arguments and the values of its compile-time ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Case:
    """One kernel with the types of its arguments and the values of its compile-time ones.

    Of an argument that is a tuple the type is a tuple of types. One element has the name "argument.field" (or
    "argument.0"), among constants and among those that are aligned, where "argument" stands for all of them.
    """

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    minimum: int = 80  # least compute capability
    group: str = "quantize"
    aligned: tuple[str, ...] = field(default=())  # integer arguments that are multiples of 16
    values: int = 0  # how many a program of a quantizer rounds
