"""Two runs side by side: where their configurations differ, their curves, and a paired verdict over seeds."""

from __future__ import annotations

from pathlib import Path

from fp8repro.errors import UserError
from fp8repro.paper.run_folder import CONFIG, METRICS
from fp8repro.results.cells import Run
from fp8repro.results.paired import Difference, difference
from fp8repro.results.records import RunRecord, read_records, require_same_bits

POINTS = 6
CURVES = (
    ("eval", "top1", "val"),
    ("eval", "top1", "train"),
    ("eval", "perplexity", "val"),
    ("train", "loss", None),
    ("train", "l2", None),
    ("train", "loss_scale", None),
)


def is_run(folder: str | Path) -> bool:
    """True when a folder is a run's own."""
    return (Path(folder) / CONFIG).is_file() and (Path(folder) / METRICS).is_file()


def compare_two(a: str | Path, b: str | Path) -> str:
    """The comparison as text.

    Raises:
        UserError: one of them is not finished, or they have different scores or versions of the random bits.
    """
    first, second = _read(a), _read(b)
    require_same_bits([first.record, second.record])
    if first.record.metric != second.record.metric:
        raise UserError(f"compare: got a run scored in {first.record.metric} and one in {second.record.metric}")
    parts = [
        f"A  {first.record.folder}\nB  {second.record.folder}",
        "settings that differ\n" + _settings(first.record, second.record),
        "curves\n" + _curves(first, second),
        _verdict(first.record, second.record),
    ]
    return "\n\n".join(parts) + "\n"


def paired_seeds(a: RunRecord, b: RunRecord) -> Difference | None:
    """B minus A over the seeds that both have, runs beside them with the same settings counted too."""
    return difference(_siblings(b), _siblings(a))


def _read(folder: str | Path) -> Run:
    records, problems = read_records([folder])
    if not records:
        raise UserError(f"compare: {problems[0] if problems else f'{folder}: no run'}")
    return Run(records[0])


def _settings(a: RunRecord, b: RunRecord) -> str:
    lines = [f"seed: {a.seed} | {b.seed}"] if a.seed != b.seed else []
    keys = sorted({*a.settings, *b.settings})
    lines += [
        f"{key}: {a.settings.get(key)} | {b.settings.get(key)}"
        for key in keys
        if a.settings.get(key) != b.settings.get(key)
    ]
    return "\n".join(f"  {line}" for line in lines) or "  none: they differ by chance only"


def _curves(a: Run, b: Run) -> str:
    lines = []
    for kind, name, split in CURVES:
        first, second = dict(a.series(kind, name, split)), dict(b.series(kind, name, split))
        common = sorted(set(first) & set(second))
        if not common:
            continue
        chosen = common[:: -(-len(common) // POINTS)]
        chosen += [common[-1]] if chosen[-1] != common[-1] else []
        title = f"{split} {name}" if split else f"{kind} {name}"
        table = [["epoch", *(f"{epoch:.4g}" for epoch in chosen)]]
        table += [
            [label, *(f"{values[epoch]:.5g}" for epoch in chosen)] for label, values in (("A", first), ("B", second))
        ]
        lines += [f"  {title}", *("    " + "".join(cell.rjust(10) for cell in row) for row in table)]
    return "\n".join(lines) or "  none in common"


def _verdict(a: RunRecord, b: RunRecord) -> str:
    scores = f"{a.metric}: A {a.score:.2f}, B {b.score:.2f}"
    if a.data != b.data:
        return f"{scores}\nnot decided: A was scored on {a.data}, B on {b.data}"
    gap = paired_seeds(a, b)
    if gap is None:
        return f"{scores}\nnot decided: no seed that both have"
    said = f"B - A over seeds, in pairs: {gap.text()}"
    if gap.half_width is None:
        return f"{scores}\n{said}\nnot decided: one pair of seeds has no standard error"
    if abs(gap.mean) > gap.half_width:
        order = "better" if gap.mean > 0 else "worse"
        return f"{scores}\n{said}\nB is {order}: the difference is outside the 95 % bound of {gap.half_width:.2f}"
    return f"{scores}\n{said}\nnot told apart: the difference is within the 95 % bound of {gap.half_width:.2f}"


def _siblings(record: RunRecord) -> dict[int, float]:
    """Scores by seed of the runs beside one that differ from it by their seed only."""
    beside, _ = read_records([record.folder.parent])
    same = {
        other.seed: other.score for other in beside if (other.settings, other.bits) == (record.settings, record.bits)
    }
    return {**same, record.seed: record.score}
