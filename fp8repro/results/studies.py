"""The tables of the claims, from run records alone: a cell that was not run is empty."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from fp8repro.paper.plan import plan_file, study_cells, study_models
from fp8repro.paper.reported import paper_figures
from fp8repro.results import doses, lost
from fp8repro.results.cells import CellRuns, Cells, Run, comparable
from fp8repro.results.paired import difference
from fp8repro.results.sheet import Column, Sheet, Stat, noise, stat
from fp8repro.results.weights import weights_sheet
from fp8repro.settings.choices import groups

PERCENT, MEBI = 100.0, 1 / 2**20
# How much over FP32's final perplexity counts as reached.
LEEWAY = 1.05
NOISE = "FP32 against FP32"
NOISE_NOTE = "FP32 against FP32: mean size of the difference of two FP32 runs that differ in their seed alone."
ROLES = ("weight", "activation", "error", "gradient")
# Figure, title, decimals, factor.
STUDY_COLUMNS: dict[str, list[tuple[str, str, int, float]]] = {
    "C4": [
        ("score", "top-1, %", 2, 1),
        ("underflow_error", "errors that underflow, %", 3, PERCENT),
        ("underflow_gradient", "weight gradients that underflow, %", 3, PERCENT),
        ("skipped_steps", "skipped steps", 0, 1),
    ],
    "C5": [
        ("score", "BLEU", 1, 1),
        ("underflow_error", "errors that underflow, %", 3, PERCENT),
        ("skipped_steps", "skipped steps", 0, 1),
    ],
    "C6": [
        ("train_error", "training error, %", 2, 1),
        ("val_error", "validation error, %", 2, 1),
        ("l2", "L2 loss at the end", 1, 1),
    ],
    "C7": [
        ("score", "top-1, %", 2, 1),
        ("master_bytes", "master weights, MiB", 2, MEBI),
        ("weight_bytes", "working weights, MiB", 2, MEBI),
        ("saved_for_backward_bytes", "saved for backward, MiB", 2, MEBI),
    ],
    "recipes": [
        ("score", "top-1, %", 2, 1),
        ("underflow_error", "errors that underflow, %", 3, PERCENT),
        ("saved_for_backward_bytes", "saved for backward, MiB", 2, MEBI),
    ],
}


def sheets(cells: Cells, profile: str) -> list[Sheet]:
    """All tables of a profile, in the order of the claims."""
    return [
        accuracy_sheet("C1", cells, profile),
        accuracy_sheet("C2", cells, profile),
        weights_sheet(cells, profile),
        conversion_sheet(cells, profile),
        *(sheet for study in STUDY_COLUMNS for sheet in _of_study(study, cells, profile)),
    ]


def _of_study(study: str, cells: Cells, profile: str) -> list[Sheet]:
    found = [study_sheet(study, cells, profile)]
    if study == "C4":
        parts = ((doses.STUDY, doses.dose_sheet), (lost.STUDY, lost.lost_sheet))
        found += [sheet(cells) for part, sheet in parts if study_cells(part, profile)]
    return found


def accuracy_sheet(study: str, cells: Cells, profile: str) -> Sheet:
    """FP32 and FP8 of each model, the gap and its standard error, beside the paper's (C1, C2)."""
    names, models = study_cells(study, profile), study_models(study, profile)
    digits = 2 if study == "C1" else 1
    unit = "top-1, %" if study == "C1" else "BLEU"
    paper = paper_figures()
    rows = []
    for model in models:
        fp32, fp8 = (cells[f"{model}_{precision}"].figures("score") for precision in ("fp32", "fp8"))
        gap = difference(fp8, fp32) if comparable(cells[f"{model}_fp8"], cells[f"{model}_fp32"]) else None
        theirs = paper["figures"][model]
        rows.append(
            {
                "model": model,
                "fp32": stat(fp32),
                "fp8": stat(fp8),
                "gap": gap and gap.mean,
                "gap_se": gap and gap.se,
                "seeds": gap.seeds if gap else None,
                "paper_fp32": theirs["fp32"],
                "paper_fp8": theirs["fp8"],
                "paper_gap": round(theirs["fp8"] - theirs["fp32"], 2),
                "failed": _failed(cells, [f"{model}_fp32", f"{model}_fp8"]),
                **_seconds(cells[f"{model}_fp32"], cells[f"{model}_fp8"], profile),
            }
        )
        floor = noise(fp32)
        rows.append(
            {"model": f"{model}, {NOISE}", "gap": floor and floor.mean, "seeds": floor.seeds if floor else None}
        )
    columns = [
        Column("model"),
        Column("fp32", f"FP32 {unit}", digits),
        Column("fp8", f"FP8 {unit}", digits),
        Column("gap", digits=digits, sign=True),
        Column("gap_se", "its standard error", digits),
        Column("seeds", "pairs of seeds", 0),
        Column("paper_fp32", "paper FP32", digits),
        Column("paper_fp8", "paper FP8", digits),
        Column("paper_gap", "paper gap", digits, sign=True),
        Column("target", "stated top-1, %" if study == "C1" else "stated perplexity", 2),
        Column("fp32_seconds", "FP32 seconds to it", 0),
        Column("fp8_seconds", "FP8 seconds to it", 0),
        Column("failed", "failed runs"),
    ]
    margin = plan_file()["profiles"][profile]["margin"]
    reached = f"mean final top-1 less {margin:g} points" if study == "C1" else f"mean final perplexity times {LEEWAY:g}"
    marks = sorted({paper["figures"][model]["mark"] for model in models})
    known = ", ".join(f"{mark}: {paper['marks'][mark]}" for mark in marks)
    notes = [
        f"Paper: {paper['data'][paper['figures'][models[0]]['data']]} ({known}).",
        *signatures(cells, names),
        NOISE_NOTE,
        f"Seconds of training until validation first reaches FP32's {reached}; a run that never does has none. Where "
        "FP8 is emulated (see Runs: products), they are the emulation's.",
    ]
    if profile != "paper":
        notes.insert(0, f"Ran on {_data(cells, names)}, not on the paper's data: compare the gaps, not the levels.")
    return Sheet(
        study, f"{study}: {plan_file()['studies'][study]['title']}", columns, rows, notes + _left_out(cells, names)
    )


def _seconds(fp32: CellRuns, fp8: CellRuns, profile: str) -> dict[str, Any]:
    """Seconds that both took to what FP32 ends with, nearly."""
    name = "top1" if fp32.first is None or fp32.first.record.metric == "top1" else "perplexity"
    ends = [end for run in fp32.in_order if (end := run.last("eval", name, "val")) is not None]
    if not ends:
        return {}
    final = statistics.fmean(ends)
    target = final - plan_file()["profiles"][profile]["margin"] if name == "top1" else final * LEEWAY

    def taken(cell: CellRuns) -> Stat | None:
        found = {seed: run.seconds_to(name, target) for seed, run in cell.runs.items()}
        return stat({seed: seconds for seed, seconds in found.items() if seconds is not None})

    return {"target": target, "fp32_seconds": taken(fp32), "fp8_seconds": taken(fp8)}


def conversion_sheet(cells: Cells, profile: str) -> Sheet:
    """What each FP8 model converted, what it left, and which roles telemetry counted (C3)."""
    rows = []
    for study in ("C1", "C2"):
        for name in study_cells(study, profile):
            run = cells[name].first
            if name.endswith("_fp8") and run is not None:
                rows.append(conversion(run))
    columns = [
        Column("model"),
        Column("converted", "layers in E5M2", 0),
        Column("exempt", "layers in 16 bit"),
        Column("left", "layers left", 0),
        Column("roles", "roles counted by telemetry"),
        Column("backend", "products"),
    ]
    notes = ["Left: layers without a product of their own, or with one that the recipe leaves (see the run's record)."]
    return Sheet("C3", "C3: what is in FP8", columns, rows, notes)


def conversion(run: Run) -> dict[str, Any]:
    """A row of `conversion_sheet`."""
    by_status: dict[str, list[str]] = {}
    for row in run.converted:
        by_status.setdefault(str(row.get("status")), []).append(str(row.get("name")))
    counted = [role for role in ROLES if any(row["nonzero"] for _, rows in run.telemetry(role) for row in rows)]
    return {
        "model": run.record.model,
        "converted": len(by_status.get("converted", [])),
        "exempt": ", ".join(by_status.get("exempt", [])) or "none",
        "left": len(by_status.get("left", [])),
        "roles": ", ".join(counted) or "none",
        "backend": str(run.record.summary.get("backend")),
    }


def study_sheet(study: str, cells: Cells, profile: str) -> Sheet:
    """The cells of a study with the figures that it compares."""
    headlines = groups()["experiment"]
    names = study_cells(study, profile)
    rows = []
    for name in names:
        cell = cells[name]
        row: dict[str, Any] = {"cell": name, "what": headlines[name], "seeds": len(cell.runs)}
        for figure, _, _, factor in STUDY_COLUMNS[study]:
            row[figure] = stat(cell.figures(figure), factor)
        if study == "C5":
            row |= _scale_figures(cell)
        row["failed"] = _failed(cells, [name])
        rows.append(row)
    reference = f"{'gnmt' if study == 'C5' else plan_file()['profiles'][profile]['convnet']}_fp32"
    floors = {figure: noise(cells[reference].figures(figure), factor) for figure, _, _, factor in STUDY_COLUMNS[study]}
    floors = {figure: floor for figure, floor in floors.items() if not figure.endswith("_bytes")}
    rows.append({"cell": NOISE, "what": f"noise of {reference}", "seeds": len(cells[reference].runs), **floors})
    columns = [Column("cell"), Column("what", "what it is")]
    columns += [Column(figure, title, digits) for figure, title, digits, _ in STUDY_COLUMNS[study]]
    if study == "C5":
        columns += [
            *map(Column, ("lowest_scale", "last_scale")),
            Column("met_floor", "back-offs that met the floor"),
        ]
    columns += [Column("seeds", digits=0), Column("failed", "failed runs")]
    notes = ["mean ± standard deviation over seeds."] if any(row["seeds"] > 1 for row in rows) else []
    notes.append(NOISE_NOTE)
    title = plan_file()["studies"][study]["title"]
    return Sheet(
        study, title if study == "recipes" else f"{study}: {title}", columns, rows, notes + _left_out(cells, names)
    )


def _scale_figures(cell: CellRuns) -> dict[str, Any]:
    replays = [run.loss_scale for run in cell.runs.values() if run.loss_scale is not None]
    if not replays:
        return {}
    return {
        "lowest_scale": _each(min(replay.scale) for replay in replays),
        "last_scale": _each(replay.scale[-1] for replay in replays),
        "met_floor": _each(len(replay.met_floor) for replay in replays),
    }


def _each(values: Iterable[float]) -> str:
    """One figure a seed, or a single one where they are the same."""
    texts = [f"{value:,.10g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _failed(cells: Cells, names: list[str]) -> str | None:
    said = [f"seed {seed}: {text}" for n in names for seed, text in sorted(cells[n].failures.items())]
    return "; ".join(said) or None


def _left_out(cells: Cells, names: list[str]) -> list[str]:
    there = [cells[name] for name in names]
    left_out = [f"Left out: {text}." for cell in there for text in cell.left_out]
    return left_out + [f"{text}." for cell in there for text in cell.notes]


def _data(cells: Cells, names: list[str]) -> str:
    found = sorted({run.record.data for name in names for run in cells[name].runs.values()})
    return ", ".join(found) or "nothing yet"


def signatures(cells: Cells, names: list[str]) -> list[str]:
    """How BLEU was computed."""
    found = {str(run.record.summary["bleu_signature"]) for name in names
             for run in cells[name].runs.values() if run.record.summary.get("bleu_signature")}  # fmt: skip
    return [f"BLEU signature: {signature}" for signature in sorted(found)]
