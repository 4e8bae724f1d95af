"""Thinned records: of telemetry some steps, of all else every byte."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from study_records import write_run

from fp8repro.results.cells import read_cells

SCRIPT = Path(__file__).parents[2] / "scripts" / "thin_telemetry.py"
MAIN = runpy.run_path(str(SCRIPT))["main"]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def others(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] != "telemetry"]


@pytest.mark.parametrize(("measured", "steps"), [(1, [10]), (2, [10, 160]), (4, [10, 60, 110, 160]), (99, None)])
def test_measured_steps_are_spread_over_the_run_and_the_rest_is_whole(
    tmp_path: Path, measured: int, steps: list[int] | None
) -> None:
    folder = write_run(tmp_path, "resnet18_fp8")
    before = lines(folder)
    for _ in range(2):
        assert MAIN([str(tmp_path), "--measured", str(measured)]) == 0
        after = lines(folder)
        assert others(after) == others(before)
        kept = [row for row in after if row["kind"] == "telemetry"]
        assert [row["step"] for row in kept] == (steps or list(range(10, 161, 10)))
        assert all(row in before for row in kept)
        assert [row["step"] for row in after] == sorted(row["step"] for row in after)
    share = read_cells([tmp_path])[0]["embedded"]["resnet18_fp8"].runs[0].underflow_share("error")
    assert share is not None
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "environment.json", "metrics.jsonl", "summary.json",
    ]  # fmt: skip


def test_a_run_that_is_not_finished_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path, "resnet18_fp8")
    (folder / "summary.json").unlink()
    before = lines(folder)
    assert MAIN([str(tmp_path)]) == 0
    assert lines(folder) == before
    assert MAIN([str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
