"""The kernel benchmark: its records, its refusals, and a rehearsal of its measurements in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8repro.bench import kernel_work
from fp8repro.bench.gpu import Bench, Row, describe_machine, markdown, read, write
from fp8repro.bench.kernels import main, start
from fp8repro.errors import UserError
from fp8repro.kernels.shared.launch import INTERPRETED

MACHINE = {"device": "Some GPU 9", "driver": "1.2", "torch": "2", "triton": "3", "commit": "abc"}
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="rehearses in the interpreter")


def bench():
    made = Bench(torch.device("cpu"), MACHINE)
    made.add("quantize", "64", 1.5, 0.9, "copy bandwidth", 0.85)
    made.add("error", "16", 0.0, 3e-4, "FP64", -2e-4)
    made.add("copy", "64", 1.0, None, None, None)
    return made


def test_written_rows_are_read_again(tmp_path):
    made = bench()
    made.skipped.append("convolutions")
    path = write(made, tmp_path / "gpu")
    assert path.name == "some-gpu-9.json"
    assert read(path) == made.rows
    page = path.with_suffix(".md").read_text()
    assert page == markdown(made)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["quantize", "64", "1.500", "0.9", "copy bandwidth", "at least 0.85", "yes"] in lines
    assert ["error", "16", "0.000", "0.0003", "FP64", "at most 0.0002", "no"] in lines
    assert "Not measured, out of time: convolutions." in page


@pytest.mark.parametrize("missing", ["device", "driver", "torch", "triton", "commit"])
def test_row_without_its_machine_is_refused(missing, tmp_path):
    values = {**MACHINE, missing: ""}
    with pytest.raises(ValueError, match=f"^{missing}: got ''"):
        Row("quantize", "64", 1.0, None, None, None, **values)
    path = write(bench(), tmp_path)
    rows = json.loads(path.read_text())
    rows[1][missing] = ""
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=rf"some-gpu-9.json\[1\].{missing}: got ''"):
        read(path)
    del rows[0][missing]
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"some-gpu-9.json\[0\]: got columns"):
        read(path)


def test_no_measurement_starts_after_the_time_is_up():
    made = Bench(torch.device("cpu"), MACHINE, seconds=-1)
    made.run("matmul", lambda b: pytest.fail("started"))
    assert made.skipped == ["matmul"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu():
    with pytest.raises(UserError, match="got no CUDA device"):
        main([])
    script = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run([script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "gpu_check: got no CUDA device, expected one\n")


@needs_interpreter
def test_rehearsal():
    made = start(rehearse=True, seconds=60)
    assert made.machine == describe_machine(torch.device("cpu"))
    kernel_work.parity(made)
    for name in ("ceilings", "quantize", "matmul", "error"):
        made.run(name, kernel_work.MEASUREMENTS[name])
    assert not made.skipped
    assert len(made.rows) > 15
    # Times of an interpreter mean nothing, so no bar is claimed.
    assert all(row.bar is None for row in made.rows)


@needs_interpreter
@pytest.mark.long
def test_rehearsal_of_everything():
    assert main(["--rehearse"]) == 0


def test_convolutions_of_the_benchmark_are_resnet_50s():
    layers = kernel_work.resnet50_convolutions(2, 64)
    assert len(layers) == 52
    assert sum(m.weight.numel() for _, m in layers) == 23_445_504
