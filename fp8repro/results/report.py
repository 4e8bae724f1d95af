"""The page and its files: tables, verdicts, figures, recipes and environments of recorded runs, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fp8repro.errors import UserError
from fp8repro.paper.plan import experiment_of, plan_file
from fp8repro.paper.reported import paper_figures
from fp8repro.paper.run_folder import ENVIRONMENT, read_or_empty
from fp8repro.results.cells import Cells, read_cells
from fp8repro.results.figures import Figure, figures
from fp8repro.results.sheet import FORMATS, Column, Sheet
from fp8repro.results.studies import sheets
from fp8repro.results.verdicts import Verdict, statement_sheet, verdict_sheet, verdicts
from fp8repro.settings.choices import PROFILES

SCALES = {
    "embedded": "digits and generated text, small networks: it shows mechanisms, not the paper's figures",
    "midscale": "real but small data of the user's own",
    "paper": "the paper's data, models and schedules",
}


@dataclass(frozen=True)
class Section:
    """A profile on the page."""

    profile: str
    scale: str
    statements: Sheet
    sheets: Sequence[Sheet]
    figures: Sequence[Figure]
    runs: Sheet


def write_report(roots: Sequence[str | Path], out: Path) -> list[str]:
    """Write report.html, tables/ and figures/ into a folder; a line for each folder without a usable record.

    Raises:
        UserError: there is no finished run of the plan, or the folder cannot be written.
    """
    by_profile, _, problems = read_cells(roots)
    planned = {profile: by_profile[profile] for profile in PROFILES if profile in by_profile}
    if not planned:
        where = ", ".join(str(root) for root in roots)
        raise UserError(f"report: {where} holds no run of an experiment, expected the folder of fp8repro reproduce")
    found = {profile: verdicts(cells, profile) for profile, cells in planned.items()}
    sections = [_section(profile, cells, found[profile]) for profile, cells in planned.items()]
    top = verdict_sheet(found)
    try:
        _write_files(out, top, sections)
        (out / "report.html").write_text(render_page(top, sections), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {str(out)!r} cannot be written ({error.strerror})") from None
    return problems


def render_page(top: Sheet, sections: Sequence[Section]) -> str:
    """The page; everything it shows is inside it."""
    from jinja2 import Environment

    from fp8repro.results.plots import DARK, LIGHT, download, svg

    template = files("fp8repro.results").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(svg=svg, download=download, light=LIGHT.variables(), dark=DARK.variables())
    paper = paper_figures()
    return environment.from_string(template).render(top=top, sections=sections, paper=paper)


def _section(profile: str, cells: Cells, found: Sequence[Verdict]) -> Section:
    return Section(
        profile, SCALES[profile], statement_sheet(found), sheets(cells, profile), figures(cells, profile),
        run_sheet(cells),
    )  # fmt: skip


def run_sheet(cells: Cells) -> Sheet:
    """Every run of the plan: seed, length, recipe, what it ran on, its code's version."""
    order = list(dict.fromkeys(name for study in plan_file()["studies"].values() for name in study["cells"]))
    rows, notes = [], []

    def place(name: str) -> tuple[int, str]:
        experiment = experiment_of(name)
        return (order.index(experiment) if experiment in order else len(order), name)

    for name in sorted(cells, key=place):
        for seed, run in sorted((cells[name].begun | cells[name].runs).items()):
            unfinished = "" if seed in cells[name].runs else "not finished: "
            summary, environment = run.record.summary, read_or_empty(run.record.folder / ENVIRONMENT)
            if run.unusable:
                notes.append(f"Left out: {run.unusable} line(s) of metrics.jsonl of {name}, seed {seed}, unusable.")
            gpus, packages = environment.get("gpus"), environment.get("packages")
            rows.append(
                {
                    "cell": name,
                    "seed": seed,
                    "data": run.record.data,
                    "recipe": unfinished + _recipe(run.section("precision")),
                    "loss_scaling": run.record.loss_scaling,
                    "steps": summary.get("steps"),
                    "epochs": summary.get("epochs"),
                    "seconds": summary.get("train_seconds"),
                    "backend": None if unfinished else f"{summary.get('backend')}, {summary.get('device')}",
                    "hardware": ", ".join(
                        map(str, gpus if isinstance(gpus, list) and gpus else [environment.get("cpu", "-")])
                    ),
                    "torch": packages.get("torch") if isinstance(packages, dict) else None,
                    "code": f"{summary.get('version', '')} {str(environment.get('commit') or '')[:10]}".strip(),
                }
            )
        for seed, reason in sorted(cells[name].failures.items()):
            rows.append({"cell": name, "seed": seed, "recipe": f"failed: {reason}"})
    columns = [
        *map(Column, ("cell", "seed", "data")),
        Column("recipe", "weight / activation / error / gradient / master"),
        *map(Column, ("loss_scaling", "steps")),
        Column("epochs", digits=1),
        Column("seconds", digits=0),
        Column("backend", "products"),
        *map(Column, ("hardware", "torch", "code")),
    ]
    return Sheet("runs", "Runs: recipe and environment", columns, rows, notes)


def _recipe(precision: Mapping[str, Any]) -> str:
    parts = []
    for role in ("weight", "activation", "error", "gradient", "master"):
        spec = precision.get(role)
        spec = spec if isinstance(spec, Mapping) else {}
        rounding = {"stochastic": " sr", "toward_zero": " rz"}.get(str(spec.get("rounding")), "")
        parts.append(f"{spec.get('format', '-')}{rounding}")
    return " / ".join(parts)


def _write_files(out: Path, top: Sheet, sections: Sequence[Section]) -> None:
    from fp8repro.results.plots import png

    tables, pictures = out / "tables", out / "figures"
    for folder in (tables, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    named = [("", top)]
    for section in sections:
        named += [(f"{section.profile}_", sheet) for sheet in (section.statements, *section.sheets, section.runs)]
        for figure in section.figures:
            (pictures / f"{section.profile}_{figure.name}.png").write_bytes(png(figure))
            (pictures / f"{section.profile}_{figure.name}.csv").write_text(figure.csv(), encoding="utf-8")
    for prefix, sheet in named:
        for format in FORMATS:
            (tables / f"{prefix}{sheet.name}.{format}").write_text(sheet.render(format), encoding="utf-8")
