"""What conf/ offers, read from its files: groups, choices and the one line that each says of itself.

It must stay quick to import: help and misspelt verbs wait for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

# From data that comes along to the paper's own.
PROFILES = ("embedded", "midscale", "paper")


@cache
def groups() -> dict[str, dict[str, str]]:
    """Every configuration group: its choices, each with the one line that its file says about it."""
    found = {}
    for folder in files("fp8repro.conf").iterdir():
        if folder.is_dir():
            choices = {entry.name[:-5]: _headline(entry) for entry in folder.iterdir() if entry.name.endswith(".yaml")}
            if choices:
                found[folder.name] = dict(sorted(choices.items()))
    return found


def nearest(given: str, valid: Iterable[str], otherwise: Iterable[str] | None = None) -> str:
    """The valid names that the given one may stand for; where none looks like it, `otherwise` (default: all)."""
    valid = list(valid)
    # `epochs` stands for `trainer.epochs`.
    same_end = [name for name in valid if name.endswith(f".{given}")]
    return ", ".join(same_end or difflib.get_close_matches(given, valid, n=3, cutoff=0.6) or otherwise or valid)


def _headline(file: Traversable) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ")
    return ""
