"""What the documentation names is there: links, headings, paths; and it stays as short as it promises."""

import json
import re
from pathlib import Path

import pytest

from fp8repro.cli.main import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FOLDERS = "fp8repro|kernels|conf|tests|scripts|docs|examples|results"
# Written by a command that the page tells of.
MADE = {"results/report.html"}


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_are_there(page: Path) -> None:
    for path in re.findall(rf"`(?:\w+/)?((?:{FOLDERS})/[\w./*-]*)", page.read_text(encoding="utf-8")):
        assert path in MADE or list(ROOT.glob(path.rstrip("/") or ".")), path


def test_the_architecture_is_read_at_once() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")) < 10_000


@pytest.mark.parametrize(("study", "digits"), [("C1", 2), ("C2", 1)])
def test_the_readme_shows_recorded_figures(study: str, digits: int) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").lower().replace("-", "")
    tables = ROOT / "results" / "embedded" / "tables"
    for row in json.loads((tables / f"embedded_{study}.json").read_text(encoding="utf-8"))["rows"]:
        # FP32 against FP32 is the report's alone.
        if row["paper_fp32"] is None:
            continue
        (line,) = re.findall(rf"^\| {row['model']}, .*$", readme, re.MULTILINE)
        own = [(row["fp32"], row["fp32_sd"]), (row["fp8"], row["fp8_sd"]), (row["gap"], row["gap_se"])]
        expected = [f"{abs(mean):.{digits}f} ± {spread:.{digits}f}" for mean, spread in own]
        expected += [f"{abs(row[name]):.{digits}f}" for name in ("paper_fp32", "paper_fp8", "paper_gap")]
        assert [cell.strip(" +") for cell in line.split("|")[2:-1]] == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    assert set(re.findall(r"(?:^    |`)fp8repro ([a-z]+)", text, re.MULTILINE)) <= set(VERBS)
