"""Draw the README's picture from run records, and print its table: FP32 and FP8 beside the paper, C4 by loss scale.

python scripts/readme_figure.py results/embedded/records docs/doses

Writes docs/doses-light.png and docs/doses-dark.png; what it prints goes into README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp8repro.errors import UserError
from fp8repro.results.cells import Cells, read_cells
from fp8repro.results.figures import dose_response
from fp8repro.results.plots import DARK, LIGHT, png
from fp8repro.results.sheet import Column, Stat, show
from fp8repro.results.studies import accuracy_sheet
from fp8repro.tabular import markdown

PROFILE = "embedded"
NAMES = {"resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50", "gnmt": "GNMT"}
SCORES = {"C1": ("top-1 %", 2), "C2": ("BLEU", 1)}
HEADER = ("", "FP32", "FP8", "gap", "paper: FP32", "FP8", "gap")


def main(arguments: list[str] | None = None) -> int:
    """Read the records, write the pictures and print the text; the exit code is 2 where there is nothing to draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, help="folder of the runs of profile=embedded")
    parser.add_argument("pictures", type=Path, help="their path, without -light.png and -dark.png")
    options = parser.parse_args(arguments)
    try:
        cells = read_cells([options.records])[0].get(PROFILE, Cells())
        figure = dose_response(cells, PROFILE)
        if figure.empty:
            raise UserError(f"records: got {str(options.records)!r}, expected runs of the dose-response study")
    except UserError as error:
        print(f"readme_figure: {error}", file=sys.stderr)
        return 2
    options.pictures.parent.mkdir(parents=True, exist_ok=True)
    for name, palette in (("light", LIGHT), ("dark", DARK)):
        Path(f"{options.pictures}-{name}.png").write_bytes(png(figure, palette))
    print(markdown(HEADER, list(table(cells))))
    print(f"\n{seeds(cells)}, mean ± standard deviation (of gaps: standard error).\n")
    print("<picture>")
    print(f'  <source media="(prefers-color-scheme: dark)" srcset="{options.pictures}-dark.png">')
    print(f'  <img alt="{figure.title}" src="{options.pictures}-light.png">')
    print(f"</picture>\n\n{figure.caption}")
    return 0


def rows(cells: Cells) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Study and row of every model; those of FP32 against FP32 are the report's alone."""
    for study in SCORES:
        yield from ((study, row) for row in accuracy_sheet(study, cells, PROFILE).rows if "paper_fp32" in row)


def table(cells: Cells) -> Iterator[list[str]]:
    """The rows of the README's table; what was not run is a dash."""
    for study, row in rows(cells):
        unit, digits = SCORES[study]
        plain, signed = Column("", digits=digits), Column("", digits=digits, sign=True)
        gap = None if row["gap"] is None else Stat(row["gap"], row["gap_se"], row["seeds"])
        ours = [show(row["fp32"], plain), show(row["fp8"], plain), show(gap, signed)]
        theirs = [show(row["paper_fp32"], plain), show(row["paper_fp8"], plain), show(row["paper_gap"], signed)]
        yield [f"{NAMES.get(row['model'], row['model'].capitalize())}, {unit}", *ours, *theirs]


def seeds(cells: Cells) -> str:
    """How many pairs of seeds the gaps stand on."""
    counts = sorted({row["seeds"] or 0 for _, row in rows(cells)})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"{several} seed{'' if several == '1' else 's'}"


if __name__ == "__main__":
    sys.exit(main())
