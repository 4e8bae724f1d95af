"""Errors that a scale loses: against torch's own rounding, layer by layer, from finished and unfinished records."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from study_records import LAYERS, write_run

from fp8repro.numerics.formats import E5M2, FP16, FloatFormat
from fp8repro.precision.telemetry import Telemetry
from fp8repro.results import lost, report
from fp8repro.results.cells import Cells, read_cells
from fp8repro.results.figures import lost_errors
from fp8repro.results.verdicts import verdicts


def read(root: Path) -> Cells:
    cells, _, _ = read_cells([root])
    return cells["midscale"]


def counted(errors: torch.Tensor) -> list[dict[str, object]]:
    """Rows of telemetry of a tensor of errors."""
    telemetry = Telemetry(every=1)
    telemetry.begin(0)
    telemetry.buffer("conv", "error", "output_error", errors.device)[0] += len(errors)  # type: ignore[index]
    telemetry.count_exponents("conv", "error", "output_error", errors)
    return telemetry.rows()


def rounded_to_zero(errors: torch.Tensor, scale: float, format: FloatFormat) -> float:
    dtype = torch.float8_e5m2 if format is E5M2 else torch.float16
    return float(((errors.double() * scale).float().to(dtype).float() == 0).double().mean())


@pytest.mark.parametrize("format", [E5M2, FP16])
@pytest.mark.parametrize("power", [4, 0, -3, -8])
def test_at_a_power_of_two_it_is_what_torch_rounds_to_zero(format: FloatFormat, power: int) -> None:
    generator = torch.Generator().manual_seed(1)
    errors = torch.randn(12_000, generator=generator) * 2.0 ** torch.randint(-34, 0, (12_000,), generator=generator)
    expected = rounded_to_zero(errors, 2.0**power, format)
    assert 0 < expected < 1
    assert lost.lost_share(counted(errors), 2.0**power, format) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("format", [E5M2, FP16])
@pytest.mark.parametrize("scale", lost.SCALES[1:])
def test_in_between_it_is_close_to_it(format: FloatFormat, scale: int) -> None:
    # A normal distribution's quantiles, of which about one in fifty is lost.
    size = 2.0 ** (format.min_exponent - format.mantissa_bits - 1) / scale * 40
    errors = torch.special.ndtri((torch.arange(16_000, dtype=torch.float64) + 0.5) / 16_000).float() * size
    expected = rounded_to_zero(errors, scale, format)
    assert 0.01 < expected < 0.04
    assert lost.lost_share(counted(errors), scale, format) == pytest.approx(expected, rel=0.02)


def test_nothing_counted_is_no_share() -> None:
    assert lost.lost_share([], 1, E5M2) is None
    assert lost.lost_share([{"nonzero": 9}, {"nonzero": 9, "exponents": [0, []]}], 1, E5M2) is None


def test_the_table_has_all_layers_and_each_from_the_input_on(tmp_path: Path) -> None:
    write_run(tmp_path, lost.REFERENCE, profile="midscale")
    cells = read(tmp_path)
    sheet = lost.lost_sheet(cells)
    assert [row["layer"] for row in sheet.rows] == [lost.ALL_LAYERS, *LAYERS]
    # In study_records a layer's errors are an octave smaller than those of the one before, and all as many.
    shares = [row["e5m2_1"] for row in sheet.rows]
    assert shares[1:] == sorted(shares[1:])
    assert shares[0] == pytest.approx(sum(shares[1:]) / len(LAYERS))
    # FP16's range ends eight octaves lower.
    (run,) = cells[lost.REFERENCE].runs.values()
    assert lost.lost_share(lost.errors(run), 256, E5M2) == lost.lost_share(lost.errors(run), 1, FP16)
    assert sheet.notes[0].startswith("Errors that rounding to nearest makes zero, over all layers: at 1, ")
    settings = cells[lost.REFERENCE].runs[0].section("trainer")
    assert (
        f"averaged over {settings['batch_size']} images (normalized in {settings['micro_steps']} parts)"
        in sheet.notes[1]
    )
    assert "224 pixels a side" in sheet.notes[1]
    assert "not finished" not in sheet.notes[1]


def test_the_figure_has_a_curve_a_scale_and_names_its_layers(tmp_path: Path) -> None:
    write_run(tmp_path, lost.REFERENCE, profile="midscale")
    figure = lost_errors(read(tmp_path), "midscale")
    points = list(csv.DictReader(io.StringIO(figure.csv())))
    assert len(points) == len(lost.FORMATS) * len(lost.SCALES) * len(LAYERS)
    assert [p["x"] for p in points if (p["panel"], p["series"]) == ("FP16", "scale 4,000")] == list(LAYERS)
    assert lost_errors(Cells(), "midscale").empty
    assert lost_errors(read(tmp_path), "embedded").empty


def test_a_run_that_is_not_finished_stands_with_the_steps_it_has(tmp_path: Path) -> None:
    folder = write_run(tmp_path, lost.REFERENCE, profile="midscale")
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    upto = [n for n, line in enumerate(lines) if json.loads(line)["kind"] == "telemetry"][2]
    # Killed while it wrote the next line.
    (folder / "metrics.jsonl").write_text("\n".join(lines[: upto + 1]) + "\n" + lines[upto + 1][:9])
    problems = report.write_report([tmp_path], tmp_path / "out")
    assert len(problems) == 1
    note = (tmp_path / "out" / "tables" / "midscale_lost.md").read_text()
    assert "3 measured steps up to step 30; the run is not finished." in note
    assert (tmp_path / "out" / "figures" / "midscale_lost.png").exists()
    (row,) = json.loads((tmp_path / "out" / "tables" / "midscale_runs.json").read_text())["rows"]
    assert row["recipe"].startswith("not finished: fp32 / fp32 / bf16")
    # It has no score, and no other table has it.
    assert read(tmp_path)[lost.REFERENCE].empty
    assert not {verdict.verdict for verdict in verdicts(read(tmp_path), "midscale")} - {"not decided"}
    # Once another has finished, that one stands.
    write_run(tmp_path, lost.REFERENCE, seed=1, profile="midscale")
    assert "seed 1" in lost.lost_sheet(read(tmp_path)).notes[1]


@pytest.mark.parametrize("config", ["", "[]", "model: {name: resnet50}", "profile: 3\nseed: x\nexperiment: []"])
def test_an_unfinished_run_without_its_settings_is_left_out(tmp_path: Path, config: str) -> None:
    folder = write_run(tmp_path, lost.REFERENCE, profile="midscale")
    (folder / "summary.json").unlink()
    (folder / "config.yaml").write_text(config)
    cells, records, problems = read_cells([tmp_path])
    assert not cells
    assert not records
    assert len(problems) == 1


def test_without_a_record_the_table_is_empty(tmp_path: Path) -> None:
    sheet = lost.lost_sheet(Cells())
    assert sheet.notes == [f"{lost.REFERENCE}: not run."]
    assert [row["e5m2_1"] for row in sheet.rows] == [None]
