"""The README's table and picture are made of run records, whatever those hold."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from study_records import planned, write_plan, write_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "readme_figure.py"
MAIN = runpy.run_path(str(SCRIPT))["main"]
DOSES = tuple(name for name in planned() if name.startswith("dose_"))


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    out = capsys.readouterr().out
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]


def test_the_table_is_of_the_records_and_the_pictures_of_both_backgrounds(tmp_path: Path, capsys: Any) -> None:
    write_plan(tmp_path / "runs", 2, DOSES)
    for seed, (fp32, fp8) in enumerate(((96.0, 95.0), (97.0, 97.0))):
        write_run(tmp_path / "runs", "resnet18_fp32", seed, score=fp32)
        write_run(tmp_path / "runs", "resnet18_fp8", seed, score=fp8)
    assert MAIN([str(tmp_path / "runs"), str(tmp_path / "docs" / "doses")]) == 0
    rows = lines(capsys)
    assert rows[1] == ["ResNet-18, top-1 %", "96.50 ± 0.71", "96.00 ± 1.41", "-0.50 ± 0.50", "69.23", "69.71", "+0.48"]
    assert rows[2][:4] == ["ResNet-34, top-1 %", "-", "-", "-"]
    assert [row[0] for row in rows[3:]] == ["ResNet-50, top-1 %", "GNMT, BLEU", "Transformer, BLEU"]
    light, dark = (image.imread(tmp_path / "docs" / f"doses-{name}.png") for name in ("light", "dark"))
    assert light.shape == dark.shape
    assert np.median(light[..., :3]) == 1.0
    assert np.median(dark[..., :3]) < 0.1


def test_without_the_study_there_is_no_picture(tmp_path: Path, capsys: Any) -> None:
    write_run(tmp_path / "runs", "resnet18_fp32")
    assert MAIN([str(tmp_path / "runs"), str(tmp_path / "doses")]) == 2
    assert MAIN([str(tmp_path / "nowhere"), str(tmp_path / "doses")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["readme_figure"] * 2
    assert not list(tmp_path.glob("doses*"))
