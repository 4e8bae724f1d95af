"""Runs an example of several processes and writes a digest of every operand that each rank multiplied."""

import hashlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import fp8repro
from fp8repro.precision.context import StepContext


def digesting(context: StepContext) -> Any:
    """A digest of the operands' bytes, in order, as long as the context lives."""
    digest = hashlib.sha256()

    def note(layer: str, product: str, operands: Any) -> None:
        digest.update(f"{layer} {product} {context.rank}".encode())
        for operand in operands:
            digest.update(operand.decoded().contiguous().numpy().tobytes())

    context.observers.append(note)
    return digest


def main(example: str, folder: str) -> None:
    """Run it with a context that is watched."""
    digests = []

    def watched(*args: Any, **kwargs: Any) -> StepContext:
        context = StepContext(*args, **kwargs)
        digests.append(digesting(context))
        return context

    fp8repro.StepContext = watched  # type: ignore[misc, assignment]
    runpy.run_path(example, run_name="__main__")
    (Path(folder) / os.environ["RANK"]).write_text(digests[0].hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
