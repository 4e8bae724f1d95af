"""What a profile needs before it starts: data that is missing, GPU-hours, disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fp8repro.errors import UserError
from fp8repro.paper.plan import Cell, plan_file

OPTIONS = {"image": "--images", "translation": "--text"}
DATA = {
    ("paper", "image"): "ImageNet-1K, a folder with the class folders train/ and val/",
    ("paper", "translation"): "WMT16 English-German, a folder that scripts/prepare_wmt16.py made",
    ("midscale", "image"): "a folder of images, train/ and val/ or the class folders themselves",
    ("midscale", "translation"): "a folder with train, valid and test of a parallel text",
}
# FP32 weights and two moments of Adam: the most that a checkpoint holds for each parameter.
CHECKPOINT_BYTES = 12


def missing(profile: str, cells: Sequence[Cell], roots: dict[str, str | None]) -> list[str]:
    """A line for each data folder that the cells need and that is not there."""
    lines = []
    for task in dict.fromkeys(cell.task for cell in cells):
        described = DATA.get((profile, task))
        root = roots.get(task)
        if described is None:
            continue
        if root is None:
            lines.append(f"{OPTIONS[task]} FOLDER: {described}")
        elif not Path(root).is_dir():
            lines.append(f"{OPTIONS[task]} {root}: no such folder ({described})")
        elif (profile, task) == ("paper", "image"):
            lines += [f"{OPTIONS[task]} {root}: it has no {split}/ folder" for split in ("train", "val")
                      if not (Path(root) / split).is_dir()]  # fmt: skip
    return lines


def cost(cells: Sequence[Cell], seeds: int, keep: int) -> str:
    """GPU-hours and disk of a paper plan, in words.

    Args:
        cells: of profile=paper.
        seeds: runs of each.
        keep: checkpoints that a run keeps.
    """
    plan = plan_file()["paper"]
    hours, checkpoints = 0.0, 0.0
    for cell in cells:
        samples = plan["samples"][cell.task] * float(cell.settings["trainer.epochs"])
        hours += seeds * samples / plan["rates"][cell.model] / 3600
        checkpoints += seeds * keep * plan["parameters"][cell.model] * CHECKPOINT_BYTES / 1e9
    data = sum(plan["disk_gigabytes"][task] for task in {cell.task for cell in cells})
    return (
        f"{len(cells)} cells with {seeds} seed(s): about {hours:,.0f} GPU-hours on one current data-centre GPU "
        f"(assumed rates, see fp8repro/paper/plan.yaml); disk: {data} GB of data, {checkpoints:.0f} GB of checkpoints"
    )


def check(profile: str, cells: Sequence[Cell], roots: dict[str, str | None]) -> None:
    """Stop where data is missing.

    Raises:
        UserError: with every missing folder in one line.
    """
    lines = missing(profile, cells, roots)
    if lines:
        raise UserError(f"profile={profile}: data is missing: " + "; ".join(lines))
