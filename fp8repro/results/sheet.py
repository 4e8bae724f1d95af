"""A table that is written as Markdown, CSV and JSON and shown on the page, from the same values."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from fp8repro.tabular import aligned, comma_separated, markdown

FORMATS = ("md", "csv", "json")


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation (None for one seed) over seeds."""

    mean: float
    sd: float | None
    seeds: int


def stat(by_seed: Mapping[int, float], factor: float = 1.0) -> Stat | None:
    """The statistic of a figure by seed, None where there is none."""
    values = [value * factor for value in by_seed.values()]
    if not values:
        return None
    return Stat(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def noise(by_seed: Mapping[int, float], factor: float = 1.0) -> Stat | None:
    """Mean size of the difference of two seeds, over all pairs of them; None for a single seed."""
    sizes = [abs(a - b) * factor for a, b in combinations(by_seed.values(), 2)]
    return Stat(statistics.mean(sizes), None, len(sizes)) if sizes else None


@dataclass(frozen=True)
class Column:
    """A column: key in CSV and JSON, title (else the key), decimals (None: text or a count); `sign`: show a plus."""

    key: str
    title: str = ""
    digits: int | None = None
    sign: bool = False

    def __post_init__(self) -> None:
        """Take the key for a title."""
        if not self.title:
            object.__setattr__(self, "title", self.key.replace("_", " "))


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        name: of its files. title, notes: above and below it.
        columns: in order. rows: value by column key: a text, a number, a `Stat` or None.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=tuple)

    def texts(self) -> list[list[str]]:
        """The rows as people read them."""
        return [[show(row.get(column.key), column) for column in self.columns] for row in self.rows]

    def render(self, format: str) -> str:
        """The table as "text", "md", "csv" or "json"; it ends with a newline."""
        if format == "json":
            return json.dumps({"title": self.title, "rows": self._plain(), "notes": list(self.notes)}, indent=2) + "\n"
        if format == "csv":
            plain = self._plain()
            keys = list(dict.fromkeys(key for row in plain for key in row)) or [column.key for column in self.columns]
            return comma_separated(keys, plain)
        header = [column.title for column in self.columns]
        if format == "text":
            return "\n".join([self.title, "", aligned(header, self.texts()), "", *self.notes]) + "\n"
        body = markdown(header, self.texts())
        return "\n\n".join([f"### {self.title}", body, *self.notes]) + "\n"

    def _plain(self) -> list[dict[str, Any]]:
        rows = []
        for row in self.rows:
            plain: dict[str, Any] = {}
            for column in self.columns:
                value = row.get(column.key)
                if isinstance(value, Stat):
                    plain |= {column.key: value.mean, f"{column.key}_sd": value.sd, f"{column.key}_seeds": value.seeds}
                else:
                    plain[column.key] = value
            rows.append(plain)
        return rows


def show(value: Any, column: Column) -> str:
    """A value as people read it; an empty cell is a dash."""
    if value is None:
        return "-"
    if isinstance(value, Stat):
        spread = "" if value.sd is None else f" ± {_number(value.sd, column.digits or 0)}"
        return _number(value.mean, column.digits or 0, column.sign) + spread
    if isinstance(value, (int, float)) and column.digits is not None:
        return _number(value, column.digits, column.sign)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float, digits: int, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''},.{digits}f}"
