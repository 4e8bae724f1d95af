"""Keep some of the measured steps in the records of finished runs, so that a repository can hold them.

python scripts/thin_telemetry.py results/embedded/records

All else in a record stays as it is; the page is written from what is kept. A run that is not finished is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from fp8repro.paper.run_folder import METRICS, SUMMARY, read_or_empty

MEASURED = 12


def main(arguments: list[str] | None = None) -> int:
    """Thin every run under some folders and say what was left out; the exit code is 2 where a folder is none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+", help="folders of runs")
    parser.add_argument(
        "--measured", type=int, default=MEASURED, help=f"steps that each run keeps, {MEASURED} if not given"
    )
    options = parser.parse_args(arguments)
    for root in options.records:
        if not root.is_dir() or options.measured < 1:
            print(f"thin_telemetry: got {root} and {options.measured} steps, expected a folder and one or more",
                  file=sys.stderr)  # fmt: skip
            return 2
        for path in sorted(root.rglob(METRICS)):
            if read_or_empty(path.parent / SUMMARY).get("status") == "finished":
                before = path.stat().st_size
                thin(path, options.measured)
                print(f"{path.parent.name}: {before:,} to {path.stat().st_size:,} bytes")
    return 0


def thin(path: Path, measured: int) -> None:
    """Leave out lines of telemetry until so many are there, evenly spaced from the first to the last."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if json.loads(line)["kind"] == "telemetry"]
    last = max(len(places) - 1, 0)
    kept = {places[round(n * last / max(measured - 1, 1))] for n in range(measured)} if places else set()
    dropped = set(places) - kept
    part = path.with_suffix(".part")
    part.write_text("".join(line for n, line in enumerate(lines) if n not in dropped), encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
