"""The page and its files: from records alone, in one file, and whole in a real browser."""

import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from study_records import LAYERS, lengthen, write_plan, write_run

from fp8repro.cli import main as cli
from fp8repro.paper.plan import study_cells
from fp8repro.results import report
from fp8repro.results.cells import read_cells
from fp8repro.results.figures import exponent_map, underflow_map
from fp8repro.results.paired import UNDECIDED
from fp8repro.results.records import read_records
from fp8repro.results.sheet import Stat
from fp8repro.results.studies import sheets
from fp8repro.results.two_runs import compare_two
from fp8repro.results.verdicts import verdicts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Runs in the page: what a reader would see of tables and figures.
PROBE = """
<script>
const lines = [];
for (const table of document.querySelectorAll("table"))
  lines.push("table|" + table.caption.textContent + "|" + table.tBodies[0].rows.length);
for (const svg of document.querySelectorAll("figure.plot svg")) {
  const drawn = [...svg.querySelectorAll("path, image, use")].filter(e => {
    const box = e.getBoundingClientRect(); return box.width > 0 || box.height > 0; });
  const box = svg.getBoundingClientRect();
  lines.push("figure|" + svg.getAttribute("aria-label") + "|" + drawn.length + "|" + box.width + "|" + box.height);
}
lines.push("ink|" + getComputedStyle(document.body).color);
const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
lines.push("ids|" + ids.length + "|" + new Set(ids).size);
lines.push("overflow|" + (document.documentElement.scrollWidth - document.documentElement.clientWidth));
document.body.innerHTML = "<pre>" + lines.join("\\n").replaceAll("<", "&lt;") + "</pre>";
</script>
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a plan with two seeds, one of whose cells was deleted and one of whose runs failed."""
    root = write_plan(tmp_path_factory.mktemp("runs"), seeds=2)
    for folder in (root / "embedded").glob("fp16-seed*"):
        shutil.rmtree(folder)
    shutil.rmtree(root / "embedded" / "gnmt_fp8_constant-seed1")
    write_run(root, "gnmt_fp8_constant", 1, status="failed", reason="every step was <skipped>")
    out = tmp_path_factory.mktemp("out")
    report.write_report([root], out)
    return out


def rows(out: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / "tables" / f"embedded_{name}.csv").read_text())))


class Tables(HTMLParser):
    """Texts of the cells of every table, by caption."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self._caption, self._inside = "", ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag if tag in ("caption", "td", "th") else self._inside
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("caption", "td", "th"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "caption":
            self._caption += data
        elif self._inside and self.tables.get(self._caption) and self.tables[self._caption][-1]:
            self.tables[self._caption][-1][-1] += data


def test_figures_of_the_tables_are_those_of_the_records(written: Path) -> None:
    resnet18 = rows(written, "C1")[0]
    # Chosen in study_records: 98.0 and 98.1 for both.
    assert (float(resnet18["fp32"]), float(resnet18["fp8"]), float(resnet18["gap"])) == pytest.approx((98.05, 98.05, 0))
    assert (resnet18["fp32_seeds"], resnet18["seeds"], resnet18["paper_fp8"]) == ("2", "2", "69.71")
    scale = {row["cell"]: row for row in rows(written, "C4")}
    assert float(scale["fp8_scale_1"]["score"]) == pytest.approx(91.05)
    # The layers' factors (1 + depth) / 4 average to 0.625, those of the sampled times to 0.765625.
    assert float(scale["fp8_scale_1"]["underflow_error"]) == pytest.approx(60 * 0.625 * 0.765625, rel=1e-3)
    nearest = {row["cell"]: row for row in rows(written, "C6")}["fp8_nearest"]
    assert (float(nearest["val_error"]), float(nearest["l2"])) == pytest.approx((4.95, 130.0))
    assert float({row["cell"]: row for row in rows(written, "C7")}["resnet18_fp8"]["master_bytes"]) == 8.0


def test_seconds_are_those_of_the_first_evaluation_that_reaches_what_fp32_ends_with(tmp_path: Path) -> None:
    for name in ("resnet18_fp32", "resnet18_fp8", "gnmt_fp32", "gnmt_fp8", "resnet34_fp32"):
        write_run(tmp_path, name)
    # A run that never gets there, and one from before evaluations had their seconds.
    write_run(tmp_path, "resnet34_fp8", score=90.0)
    folder = write_run(tmp_path, "resnet50_fp32")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r', "seconds": [\d.]+', "", text))
    report.write_report([tmp_path], tmp_path / "out")
    found = {row["model"]: row for row in rows(tmp_path / "out", "C1")}
    # 60 exp(-6 t) is under 1 point from t = 0.66 on; epochs end at eighths of the 160 steps.
    resnet18 = found["resnet18"]
    assert float(resnet18["target"]) == pytest.approx(97.0)
    assert (float(resnet18["fp32_seconds"]), float(resnet18["fp8_seconds"])) == (120, 240)
    assert (float(found["resnet34"]["fp32_seconds"]), found["resnet34"]["fp8_seconds"]) == (120, "")
    assert found["resnet50"]["fp32_seconds"] == ""
    (gnmt,) = (row for row in rows(tmp_path / "out", "C2") if row["model"] == "gnmt")
    # 1 + 30 / step is within 5 % of its end, 1.1875, from step 121.4 on: at 140.
    assert (float(gnmt["fp32_seconds"]), float(gnmt["fp8_seconds"])) == (140, 280)


def test_a_deleted_record_empties_its_cell(written: Path) -> None:
    (fp16,) = (row for row in rows(written, "recipes") if row["cell"] == "fp16")
    assert (fp16["score"], fp16["seeds"]) == ("", "0")
    page = Tables()
    page.feed((written / "report.html").read_text())
    (shown,) = (line for line in page.tables["Other recipes"] if line[0] == "fp16")
    assert shown[2:] == ["-", "-", "-", "0", "-"]


@pytest.mark.parametrize(
    "cell", ["resnet18_fp8", "gnmt_fp32", "fp8_stochastic", "fp8_fp32_master", "dose_nearest@2^-6"]
)
def test_statements_on_a_deleted_record_are_undecided_and_the_others_stay(tmp_path: Path, cell: str) -> None:
    write_plan(tmp_path)
    before = {(v.claim, v.statement): v for v in verdicts(read_cells([tmp_path])[0]["embedded"], "embedded")}
    for folder in (tmp_path / "embedded").glob(f"{cell}-seed*"):
        shutil.rmtree(folder)
    cells = read_cells([tmp_path])[0]["embedded"]
    after = {(v.claim, v.statement): v for v in verdicts(cells, "embedded")}
    assert after.keys() == before.keys()
    changed = [key for key in after if after[key] != before[key]]
    assert changed
    for key in changed:
        assert after[key].verdict == UNDECIDED
        assert "not run" in after[key].evidence, key
        assert cell in after[key].evidence, key
    # The tables have its row, without a figure.
    shown = [row for sheet in sheets(cells, "embedded") for row in sheet.rows if row.get("cell") == cell]
    assert all(row["seeds"] == 0 and not any(isinstance(value, Stat) for value in row.values()) for row in shown)
    assert shown or cell not in study_cells("C4", "embedded")


def test_a_failed_run_stands_in_its_row_with_its_reason(written: Path) -> None:
    (constant,) = (row for row in rows(written, "C5") if row["cell"] == "gnmt_fp8_constant")
    assert (constant["seeds"], constant["failed"]) == ("1", "seed 1: every step was <skipped>")
    assert "every step was &lt;skipped&gt;" in (written / "report.html").read_text()


def test_page_csv_json_and_markdown_hold_the_same_rows(written: Path) -> None:
    page = Tables()
    page.feed((written / "report.html").read_text())
    for name in ("C1", "C4", "C6", "recipes", "statements", "runs"):
        from_json = json.loads((written / "tables" / f"embedded_{name}.json").read_text())
        markdown = (written / "tables" / f"embedded_{name}.md").read_text().splitlines()
        lines = [line for line in markdown if line.startswith("|")]
        assert len(from_json["rows"]) == len(rows(written, name)) == len(lines) - 2
        shown = page.tables[from_json["title"]]
        texts = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        del texts[1]
        assert [[cell.replace("\u2011", "-") for cell in line] for line in shown] == texts


def test_every_figure_has_a_picture_and_its_data(written: Path) -> None:
    pictures = {path.stem for path in (written / "figures").glob("*.png")}
    data = {path.stem for path in (written / "figures").glob("*.csv")}
    assert pictures == data
    assert {f"embedded_{name}" for name in ("accuracy", "underflow", "underflow_map", "loss_scale", "rounding")} <= data
    for path in (written / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    points = list(csv.DictReader((written / "figures" / "embedded_underflow.csv").open()))
    (first,) = (point for point in points if point["series"] == "constant 1" and point["x"] == "0.5")
    assert float(first["y"]) == pytest.approx(60 * 0.625 * (0.5 + 0.5 / 16), rel=1e-3)


def test_the_page_needs_no_network_and_no_number_of_ours_is_in_its_template(written: Path) -> None:
    page = (written / "report.html").read_text()
    addresses = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)""", page)
    assert addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"url\((?!#)|@import|<script|<iframe", page)
    template = files("fp8repro.results").joinpath("report.html.j2").read_text()
    body = template[template.index("<body>") :]
    assert not re.search(r"\d+\.\d", re.sub(r"\{[{%].*?[%}]\}", "", body))


def test_runs_with_other_settings_are_left_out_and_named(tmp_path: Path) -> None:
    write_plan(tmp_path, seeds=2, names=("resnet18_fp8",))
    other = write_run(tmp_path / "elsewhere", "resnet18_fp8", 5, score=10.0)
    lengthen(other)
    report.write_report([tmp_path], tmp_path / "out")
    assert rows(tmp_path / "out", "C1")[0]["fp8"] == str((98.0 + 98.1) / 2)
    note = (tmp_path / "out" / "tables" / "embedded_C1.md").read_text()
    epochs = yaml.safe_load((other / "config.yaml").read_text())["trainer"]["epochs"]
    assert f"Left out: resnet18_fp8: 1 run(s) with trainer.epochs={epochs}." in note


def test_nothing_to_report_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no run of an experiment" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_runs_differ_in_what_their_configurations_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, score in enumerate((97.0, 97.4, 97.2)):
        write_run(tmp_path, "fp8_scale_1000", seed, score=score)
        write_run(tmp_path, "resnet18_fp8", seed, score=score + 1 + 0.1 * seed)
    a, b = (str(tmp_path / "embedded" / f"{name}-seed0") for name in ("fp8_scale_1000", "resnet18_fp8"))
    assert cli.main(["compare", a, b]) == 0
    text = capsys.readouterr().out
    assert text == compare_two(a, b)
    settings = text.split("settings that differ\n")[1].split("\n\n")[0]
    assert settings == "  loss_scaling.scale: 1000 | 10000"
    # Differences 1.0, 1.1 and 1.2 over the seeds beside them: 0.1 / sqrt(3).
    assert "B - A over seeds, in pairs: +1.10 ± 0.06 (3 seeds)\nB is better" in text
    assert re.search(r"val top1\n +epoch( +\S+)+ +8\n", text)


def test_one_pair_of_runs_decides_nothing(tmp_path: Path) -> None:
    a, b = write_run(tmp_path, "fp8_scale_1"), write_run(tmp_path, "resnet18_fp8")
    assert "not decided: one pair of seeds has no standard error" in compare_two(a, b)
    records, _ = read_records([tmp_path])
    assert len(records) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser_every_table_has_rows_and_every_figure_draws(written: Path, tmp_path: Path, dark: bool) -> None:
    page = (written / "report.html").read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", PROBE + "</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--window-size=1200,900",
    ]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [str(CHROMIUM), *options, probed.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    lines = [line.split("|") for line in done.stdout.split("<pre>")[1].split("</pre>")[0].splitlines()]
    tables = {line[1]: int(line[2]) for line in lines if line[0] == "table"}
    drawn = [line for line in lines if line[0] == "figure"]
    assert len(tables) == page.count("<table>") > 8
    assert all(tables.values())
    assert len(drawn) == page.count('<figure class="plot">') >= 6
    for _, title, elements, width, height in drawn:
        assert int(elements) > 20, title
        assert float(width) > 300, title
        assert float(height) > 100, title
    (ink,) = (line[1] for line in lines if line[0] == "ink")
    assert ink == ("rgb(230, 237, 243)" if dark else "rgb(31, 35, 40)")
    (ids,) = (line[1:] for line in lines if line[0] == "ids")
    assert ids[0] == ids[1], "two elements share an id"
    assert ["overflow", "0"] in lines


def test_layers_stand_from_input_to_output_whatever_the_order_of_telemetry(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "resnet18_fp8")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "telemetry":
            line["rows"].reverse()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells, _, _ = read_cells([tmp_path])
    for figure in (underflow_map(cells["embedded"], ["resnet18_fp8"]), exponent_map(cells["embedded"], "resnet18_fp8")):
        assert all(tuple(map.rows) == LAYERS for map in figure.maps)
        assert figure.maps
