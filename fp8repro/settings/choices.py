"""The groups and choices of conf/, each with the first comment of its file.

Must stay quick to import: help and misspelt verbs wait for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fp8repro.errors import UserError

# From data that comes along to the paper's own.
PROFILES = ("embedded", "midscale", "paper")


@cache
def groups() -> dict[str, dict[str, str]]:
    """Every configuration group: its choices, each with the first comment line of its file."""
    found = {}
    for folder in files("fp8repro.conf").iterdir():
        if folder.is_dir():
            choices = {entry.name[:-5]: _headline(entry) for entry in folder.iterdir() if entry.name.endswith(".yaml")}
            if choices:
                found[folder.name] = dict(sorted(choices.items()))
    return found


@contextmanager
def our_configs() -> Iterator[None]:
    """Let Hydra compose from conf/ and the defaults of schema.py alone.

    Its store is the process's: what fairseq keeps there (`config`, `optimizer/adam`, ...) would be taken for schemas of
    our files of these names.
    """
    # Imported here: a training loop of one's own that passes a Recipe needs no Hydra.
    from hydra import initialize_config_module
    from hydra.core.config_store import ConfigStore

    from fp8repro.settings.schema import defaults

    store = ConfigStore.instance()
    everybodys = store.repo
    store.repo = {name: entry for name, entry in everybodys.items() if name in ("hydra", "_dummy_empty_config_.yaml")}
    try:
        # The first entry of conf/config.yaml's defaults.
        store.store(name="settings", node=defaults())
        with initialize_config_module("fp8repro.conf", version_base="1.3"):
            yield
    finally:
        store.repo = everybodys


def compose_group(group: str, name: str) -> dict[str, Any]:
    """The plain values of `conf/<group>/<name>.yaml`, its own defaults list followed.

    Raises:
        UserError: the group has no such file.
    """
    from hydra import compose
    from hydra.errors import MissingConfigException
    from omegaconf import OmegaConf

    try:
        with our_configs():
            config = compose(config_name=f"{group}/{name}")
    except MissingConfigException:
        raise UserError(f"{group}: got {name!r}, expected one of {', '.join(groups()[group])}") from None
    values = OmegaConf.to_container(config[group], resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def nearest(given: str, valid: Iterable[str], otherwise: Iterable[str] | None = None) -> str:
    """The valid names that resemble the given one; if none does, `otherwise` (default: all)."""
    valid = list(dict.fromkeys(valid))
    # `epochs` stands for `trainer.epochs`.
    same_end = [name for name in valid if name.endswith(f".{given}")]
    return ", ".join(same_end or difflib.get_close_matches(given, valid, n=3, cutoff=0.6) or otherwise or valid)


def nearest_first(given: str, valid: Iterable[str]) -> str:
    """All the valid names, those that resemble the given one first."""
    valid = list(valid)
    return ", ".join(dict.fromkeys([*difflib.get_close_matches(given, valid, n=3, cutoff=0.6), *valid]))


def _headline(file: Traversable) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ")
    return ""
