"""`fp8repro bench kernels`: parity of the Triton kernels on this GPU, then their speed beside ceilings of the same run.

Writes results/gpu/<gpu>.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fp8repro.bench.gpu import Bench, describe_machine, file_of, read, write
from fp8repro.errors import RunFailure, UserError

DEFAULT_OUT = Path("results/gpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; gives the exit code.

    Raises:
        UserError: there is no GPU, or Triton cannot use it.
        RunFailure: a kernel's results are wrong on this GPU.
    """
    parser = argparse.ArgumentParser(prog="fp8repro bench kernels", description=__doc__)
    parser.add_argument("--out", type=Path, help=f"folder of the results; default: {DEFAULT_OUT}, none of a rehearsal")
    parser.add_argument("--seconds", type=float, default=300.0, help="start no new measurement after so many")
    parser.add_argument("--only", help="these measurements, separated by commas, instead of parity and then all")
    parser.add_argument("--append", action="store_true", help="keep the rows of the results that are there already")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in Triton's interpreter")
    options = parser.parse_args(arguments)
    bench = start(options.rehearse, options.seconds)
    from fp8repro.bench.kernel_work import MEASUREMENTS, ON_REQUEST
    from fp8repro.bench.steps import where_fp8_pays

    known = MEASUREMENTS | ON_REQUEST
    names = options.only.split(",") if options.only else ["parity", *MEASUREMENTS]
    for name in names:
        if name not in known:
            raise UserError(f"bench kernels: --only: got {name!r}, expected some of {', '.join(known)}")
    folder = options.out or (None if options.rehearse else DEFAULT_OUT)
    if options.append and folder is not None and file_of(bench, folder).exists():
        bench.rows = read(file_of(bench, folder))
    written = None
    for name in names:
        try:
            bench.run(name, known[name])
        finally:
            # After every group: a machine may be taken away before the last one ends.
            if folder is not None and bench.rows:
                written = write(bench, folder, where_fp8_pays(bench.rows))
    if written is not None:
        reached = [row.reached for row in bench.rows if row.reached is not None]
        print(f"written: {written.name}: {len(bench.rows)} rows, {sum(reached)} of {len(reached)} bars reached")
    return 0


def start(rehearse: bool, seconds: float) -> Bench:
    """A bench on this machine's GPU, or a rehearsal.

    Raises:
        UserError: see `main`.
    """
    if not rehearse and not torch.cuda.is_available():
        raise UserError("bench kernels: got no CUDA device, expected one (or --rehearse with TRITON_INTERPRET=1)")
    try:
        from fp8repro.kernels.backend import available
    except ImportError as error:
        raise UserError(f"bench kernels: {error}, expected Triton to be installed") from None
    device = torch.device("cpu" if rehearse else "cuda")
    reason = available(device)
    if reason is not None:
        raise UserError(f"bench kernels: {reason}")
    return Bench(device, describe_machine(device), scale=256 if rehearse else 1, seconds=seconds)


def run_checked() -> int:
    """`python -m fp8repro.bench.kernels`: errors in one line, exit code 2 (asked wrongly) or 1 (wrong results)."""
    import sys

    try:
        return main()
    except (UserError, RunFailure) as error:
        print(f"fp8repro: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    raise SystemExit(run_checked())
