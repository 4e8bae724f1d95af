"""Finished runs grouped by what ran: mean and spread over seeds, beside the paper's figures.

Every number of ours comes from a run record, every number of the paper's from paper.yaml.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp8repro.errors import UserError
from fp8repro.paper.reported import paper_figures
from fp8repro.results.records import RunRecord, require_same_bits
from fp8repro.results.sheet import Column, Sheet, Stat
from fp8repro.settings.choices import PROFILES
from fp8repro.tabular import comma_separated

METRICS = {"top1": "Top-1 accuracy, %", "bleu": "BLEU (sacreBLEU, detokenized)"}
DECIMALS = {"top1": 2, "bleu": 1}
PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
FORMATS = ("text", "md", "csv", "json")
BASELINE = "fp32"


@dataclass(frozen=True)
class Row:
    """Runs that differ by their seed only.

    Attributes:
        seeds: how many. seed_list: which.
        mean, sd: of the final score; sd is None for a single seed.
        gap: mean minus the FP32 mean of the same model, data, profile and training settings; None without such runs.
        gap_se: standard error of the gap; None unless both sides have at least two seeds.
        paper_fp32, paper_fp8, paper_gap: the paper's, on `paper_data`; paper_mark: how they are known.
        settings: what sets the row apart from others of the same name.
        signature: how BLEU was computed. chrf: mean over seeds.
    """

    model: str
    data: str
    profile: str
    precision: str
    loss_scaling: str
    metric: str
    seeds: int
    seed_list: list[int]
    mean: float
    sd: float | None
    gap: float | None
    gap_se: float | None
    paper_fp32: float | None
    paper_fp8: float | None
    paper_gap: float | None
    paper_data: str | None
    paper_mark: str | None
    settings: str
    signature: str | None
    chrf: float | None


def comparison(records: Iterable[RunRecord]) -> list[Row]:
    """One row for each kind of run, in the paper's order of models, FP32 first.

    Raises:
        UserError: runs with different versions of the random bits.
    """
    records = list(records)
    require_same_bits(records)
    groups: dict[tuple[Any, ...], dict[int, RunRecord]] = {}
    for record in records:
        # The same run done twice is one seed, not two: the first folder's.
        groups.setdefault(_kind(record), {}).setdefault(record.seed, record)
    runs = [list(by_seed.values()) for by_seed in groups.values()]
    baselines = {_pairing(group[0]): group for group in runs if group[0].precision == BASELINE}
    paper = paper_figures()
    notes = _distinctions([group[0] for group in runs])
    rows = [
        _row(
            group,
            baselines.get(_pairing(group[0])),
            paper["figures"].get(group[0].model.removeprefix("fairseq_"), {}),
            paper["data"],
            note,
        )
        for group, note in zip(runs, notes, strict=True)
    ]
    order = list(paper["figures"])
    return sorted(rows, key=lambda row: _order(row, order))


def render(rows: Sequence[Row], format: str) -> str:
    """The comparison as "text", "md", "csv" or "json"; it ends with a newline."""
    if format == "json":
        return json.dumps([asdict(row) for row in rows], indent=2) + "\n"
    if format == "csv":
        plain = [{**asdict(row), "seed_list": " ".join(map(str, row.seed_list))} for row in rows]
        return comma_separated(list(Row.__dataclass_fields__), plain)
    sheets = [_sheet([row for row in rows if row.metric == metric], metric) for metric in METRICS]
    return "\n".join(sheet.render(format) for sheet in sheets if sheet.rows) or "no finished runs\n"


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write comparison.md, comparison.csv and comparison.json into a folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for format in ("md", "csv", "json"):
            (folder / f"comparison.{format}").write_text(render(rows, format), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {str(folder)!r} cannot be written ({error.strerror})") from None


def _kind(record: RunRecord) -> tuple[Any, ...]:
    return (*_name(record), tuple(sorted((key, repr(value)) for key, value in record.settings.items())))


def _name(record: RunRecord) -> tuple[str, ...]:
    return (record.model, record.data, record.profile, record.precision, record.loss_scaling, record.metric)


def _pairing(record: RunRecord) -> tuple[Any, ...]:
    """What an FP32 run and its low-precision counterpart have in common."""
    shared = {k: repr(v) for k, v in record.settings.items() if not k.startswith(("precision.", "loss_scaling."))}
    shared.pop("backend", None)
    return (record.model, record.data, record.profile, record.metric, tuple(sorted(shared.items())))


def _distinctions(records: Sequence[RunRecord]) -> list[str]:
    """For each kind of run, the settings in which it differs from the others that carry the same name."""
    notes = []
    for record in records:
        namesakes = [other for other in records if _name(other) == _name(record)]
        keys = sorted({key for other in namesakes for key in other.settings})
        apart = [key for key in keys if len({repr(other.settings.get(key)) for other in namesakes}) > 1]
        # A shortened run says so even where no other run has its name.
        if record.settings.get("trainer.max_steps") is not None and "trainer.max_steps" not in apart:
            apart.append("trainer.max_steps")
        notes.append(", ".join(f"{key}={_short(record.settings.get(key))}" for key in apart))
    return notes


def _short(value: Any) -> str:
    return "null" if value is None else str(value)


def _row(
    group: Sequence[RunRecord],
    baseline: Sequence[RunRecord] | None,
    paper: dict[str, Any],
    paper_data: dict[str, str],
    note: str,
) -> Row:
    first, scores = group[0], [record.score for record in group]
    if paper.get("metric") != first.metric:
        paper = {}
    gap = gap_se = None
    if baseline is not None and first.precision != BASELINE:
        reference = [record.score for record in baseline]
        gap = statistics.mean(scores) - statistics.mean(reference)
        if min(len(scores), len(reference)) > 1:
            gap_se = math.sqrt(sum(statistics.variance(s) / len(s) for s in (scores, reference)))
    signatures = {str(record.summary.get("bleu_signature")) for record in group}
    chrf = [record.summary.get("chrf") for record in group]
    return Row(
        model=first.model,
        data=first.data,
        profile=first.profile,
        precision=first.precision,
        loss_scaling=first.loss_scaling,
        metric=first.metric,
        seeds=len(group),
        seed_list=sorted(record.seed for record in group),
        mean=statistics.mean(scores),
        sd=statistics.stdev(scores) if len(scores) > 1 else None,
        gap=gap,
        gap_se=gap_se,
        paper_fp32=paper.get("fp32"),
        paper_fp8=paper.get("fp8"),
        paper_gap=round(paper["fp8"] - paper["fp32"], 2) if paper else None,
        paper_data=paper_data[paper["data"]] if paper else None,
        paper_mark=paper.get("mark"),
        settings=note,
        signature="; ".join(sorted(signatures)) if first.metric == "bleu" else None,
        chrf=statistics.mean(chrf) if all(isinstance(value, (int, float)) for value in chrf) else None,  # type: ignore[type-var]
    )


def _order(row: Row, models: list[str]) -> tuple[Any, ...]:
    def place(value: str, known: Sequence[str]) -> tuple[int, str]:
        return (known.index(value) if value in known else len(known), value)

    return (
        place(row.metric, list(METRICS)),
        place(row.profile, PROFILES[::-1]),
        place(row.model, models),
        row.data,
        place(row.precision, PRECISIONS),
        row.loss_scaling,
        row.settings,
    )


def _sheet(rows: Sequence[Row], metric: str) -> Sheet:
    digits = DECIMALS[metric]
    columns = [
        *map(Column, ("model", "data", "profile", "precision", "loss_scaling", "seeds")),
        Column("mean", digits=digits),
        Column("gap", "gap to FP32", digits, sign=True),
        Column("paper_fp32", "paper FP32", digits),
        Column("paper_fp8", "paper FP8", digits),
        Column("paper_gap", "paper gap", digits, sign=True),
    ]
    columns += [Column("chrf", "chrF", 1)] if metric == "bleu" else []
    columns += [Column("settings")] if any(row.settings for row in rows) else []
    values = [
        {
            **asdict(row),
            "mean": Stat(row.mean, row.sd, row.seeds),
            "gap": row.gap if row.gap is None else Stat(row.gap, row.gap_se, row.seeds),
        }
        for row in rows
    ]
    return Sheet("comparison", METRICS[metric], columns, values, _footnotes(rows))


def _footnotes(rows: Sequence[Row]) -> list[str]:
    lines = ["mean ± standard deviation over seeds; gap ± its standard error."]
    for data in dict.fromkeys(row.paper_data for row in rows if row.paper_data):
        marks = sorted({row.paper_mark for row in rows if row.paper_data == data and row.paper_mark})
        lines.append(f"Paper: {data} (known by mark {', '.join(marks)} of fp8repro/paper/paper.yaml).")
    if any(row.profile != "paper" for row in rows):
        lines.append("Profiles other than paper ran on other data than the paper's: compare the gaps, not the levels.")
    lines += [f"BLEU signature: {s}" for s in dict.fromkeys(row.signature for row in rows if row.signature)]
    return lines
