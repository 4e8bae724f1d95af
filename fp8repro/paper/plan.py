"""The plan of runs: cells, seeds, settings, and what each run's folder says of its state. Runs nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from fp8repro.errors import UserError
from fp8repro.paper.run_folder import CONFIG, METRICS, SUMMARY, read_or_empty, saved_settings, settings_of
from fp8repro.settings.choices import PROFILES, nearest
from fp8repro.settings.overrides import jobs
from fp8repro.settings.schema import run_config

# Between an experiment and the power of two that is its loss scale.
AT = "@2^"
TRANSLATION_MODELS = ("gnmt", "transformer")
# What the plan gives each of its runs, and the option that says it.
OWN_SETTINGS = {"seed": "--seeds", "run_dir": "--runs", "resume": "it always resumes", "overwrite": "--retry"}
DONE, FAILED, BEGUN, OPEN = "done", "failed", "begun", "to run"


@dataclass(frozen=True)
class Cell:
    """One experiment of the plan.

    Attributes:
        name: its file in conf/experiment/, and its loss scale where the study has several.
        model: what it trains. task: "image" or "translation".
        studies: the claims whose tables it serves.
        overrides: settings of its runs, all but seed and folder.
        config: what they come to.
        once: it runs with the first seed alone, for no statement is decided by it.
    """

    name: str
    model: str
    task: str
    studies: tuple[str, ...]
    overrides: tuple[str, ...]
    config: dict[str, Any]
    once: bool = False

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that decide a result, flat."""
        return settings_of(self.config)


@dataclass(frozen=True)
class Job:
    """A cell with a seed, and where it is recorded."""

    cell: Cell
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """As its folder is called."""
        return self.folder.name

    def arguments(self) -> list[str]:
        """What follows `fp8repro train`."""
        return [*self.cell.overrides, f"seed={self.seed}", _assignment("run_dir", self.folder), "resume=auto"]


@cache
def plan_file() -> dict[str, Any]:
    """plan.yaml."""
    text = files("fp8repro.paper").joinpath("plan.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def study_cells(study: str, profile: str) -> list[str]:
    """Names of a study's cells in a profile; none where it is no part of that."""
    plan, found = plan_file(), plan_file()["studies"][study]
    convnet = plan["profiles"][profile]["convnet"]
    if profile not in found.get("profiles", plan["profiles"]):
        return []
    names: list[str] = []
    for name in found["cells"]:
        powers = found.get("scales", {}).get(name)
        names += [name.format(convnet=convnet)] if powers is None else [at_scale(name, 2.0**power) for power in powers]
    return names


def at_scale(experiment: str, scale: float) -> str:
    """The cell of an experiment that runs at several loss scales, by one of them."""
    return f"{experiment}{AT}{math.log2(scale):g}"


def cell_name(experiment: str, settings: Mapping[str, Any]) -> str:
    """The cell to which a run of an experiment belongs, by its settings."""
    scale = settings.get("loss_scaling.scale")
    several = any(experiment in study.get("scales", {}) for study in plan_file()["studies"].values())
    if not several or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        return experiment
    return at_scale(experiment, scale)


def experiment_of(cell: str) -> str:
    """The experiment of a cell."""
    return cell.partition(AT)[0]


def study_models(study: str, profile: str) -> list[str]:
    """The models of a study whose cells are `<model>_fp32` and `<model>_fp8`, each once."""
    return list(dict.fromkeys(name.rsplit("_", 1)[0] for name in study_cells(study, profile)))


def make_plan(
    settings: Sequence[str] = (),
    only: Sequence[str] = (),
    roots: dict[str, str | None] | None = None,
) -> tuple[str, list[Cell]]:
    """The profile and its cells, each once, in the plan's order.

    Args:
        settings: `profile=...`, and settings for every cell.
        only: studies, cells or models (patterns); empty for all.
        roots: data folder by task.

    Raises:
        UserError: an unknown profile, study or setting.
    """
    plan = plan_file()
    profile = "embedded"
    further = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in OWN_SETTINGS:
            raise UserError(f"{key}: got {value}, expected none here: reproduce sets it ({OWN_SETTINGS[key]})")
        if key == "profile":
            profile = value
        else:
            further.append(setting)
    if profile not in PROFILES:
        raise UserError(f"profile: got {profile!r}, expected one of {', '.join(PROFILES)}")
    serves: dict[str, list[str]] = {}
    for study in plan["studies"]:
        for name in study_cells(study, profile):
            serves.setdefault(name, []).append(study)
    chosen = [_cell(name, studies, profile, further, roots or {}) for name, studies in serves.items() if _wanted(
        name, studies, profile, only)]  # fmt: skip
    for wanted in only:
        if not any(_wanted(name, studies, profile, [wanted]) for name, studies in serves.items()):
            known = [*plan["studies"], *serves, *plan["cost"]]
            raise UserError(f"--only: got {wanted!r}, expected one of {nearest(wanted, known)}")
    return profile, chosen


def make_jobs(cells: Sequence[Cell], seeds: Sequence[int], runs: Path, profile: str) -> list[Job]:
    """All cells with the first seed, then all with the next, so that an early stop leaves complete tables."""
    return [
        Job(cell, seed, runs / profile / f"{cell.name}-seed{seed}")
        for number, seed in enumerate(seeds)
        for cell in cells
        if number == 0 or not cell.once
    ]


def state(job: Job) -> str:
    """What a job's folder says: done, failed, begun or to run.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    if not (job.folder / CONFIG).is_file():
        return OPEN
    saved = saved_settings(job.folder)
    differing = [key for key in sorted({*saved, *job.cell.settings}) if saved.get(key) != job.cell.settings.get(key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"{str(job.folder)!r} holds a run with {key}={saved.get(key)}, expected {job.cell.settings.get(key)}; "
            "move it away or give another --runs folder"
        )
    summary = read_or_empty(job.folder / SUMMARY)
    if not summary:
        return BEGUN if (job.folder / METRICS).is_file() else OPEN
    return DONE if summary.get("status") == "finished" else FAILED


def _assignment(key: str, path: object) -> str:
    """Hydra reads a path of plain characters as it stands; others need its quotes."""
    text = str(path)
    if not re.fullmatch(r"[\w./-]+", text):
        text = "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{key}={text}"


def _wanted(name: str, studies: Sequence[str], profile: str, only: Sequence[str]) -> bool:
    labels = [name, *studies, _model(name, profile)]
    return not only or any(fnmatchcase(label.lower(), wanted.lower()) for wanted in only for label in labels)


def _model(name: str, profile: str) -> str:
    convnet: str = plan_file()["profiles"][profile]["convnet"]
    return next((model for model in plan_file()["cost"] if name.startswith(f"{model}_")), convnet)


def _cell(name: str, studies: list[str], profile: str, further: list[str], roots: dict[str, str | None]) -> Cell:
    options, model = plan_file()["profiles"][profile], _model(name, profile)
    task = "translation" if model in TRANSLATION_MODELS else "image"
    experiment, _, power = name.partition(AT)
    overrides = [f"experiment={experiment}", f"profile={profile}"]
    if not name.startswith(f"{model}_"):
        overrides.insert(1, f"model={model}")
    overrides += [*options["settings"], *options[task]]
    for study in studies:
        overrides += options.get("studies", {}).get(study, [])
    overrides += options.get("cells", {}).get(name, [])
    overrides += [f"loss_scaling.scale={2.0 ** int(power)!r}"] if power else []
    if roots.get(task):
        overrides.append(_assignment("data.root", roots[task]))
    overrides += further
    (job,) = jobs(overrides, sweep=False)
    once = all(plan_file()["studies"][study].get("once", False) for study in studies)
    return Cell(name, model, task, tuple(studies), tuple(overrides), run_config(job.values).to_dict(), once)
