"""The one writer of tables: aligned text for a terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

Rows = Iterable[Sequence[str]]


def aligned(header: Sequence[str], rows: Rows, form: str = "simple") -> str:
    """Columns for a terminal, two spaces apart; with form="plain" without the rule under the header."""
    text = tabulate([*rows], header, form, disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def markdown(header: Sequence[str], rows: Rows) -> str:
    """A Markdown table."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return tabulate(body, head, "github", disable_numparse=True)


def comma_separated(keys: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV with a header; what a row lacks is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
