"""The kernel benchmark: its records, its refusals, and a rehearsal of its measurements in the interpreter."""

import json

import pytest
import torch

from fp8repro.bench import kernel_work, resnet50
from fp8repro.bench.gpu import Bench, Row, describe_machine, markdown, read, write
from fp8repro.bench.kernels import main, start
from fp8repro.errors import RunFailure, UserError
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


def test_an_unknown_measurement_is_refused():
    with pytest.raises(UserError, match=r"^bench kernels: --only: got 'matmull', expected some of ceilings, quantize"):
        main(["--rehearse", "--only", "error,matmull"])


@needs_interpreter
def test_measurements_on_request_are_written(tmp_path):
    # The second one replaces its own row, and keeps the others.
    for only in ("conversions,parity", "parity"):
        assert main(["--rehearse", "--only", only, "--append", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = read(path)
    assert len(rows) == 5
    assert [row.ratio for row in rows[:4]] == [0] * 4
    assert "error of matmul" in rows[4].name


@needs_interpreter
def test_a_wrong_conversion_is_found(monkeypatch):
    made = start(rehearse=True, seconds=60)
    convert = kernel_work.round_into

    def wrong(x, how, bits, out, codes, *rest):
        convert(x, how, bits, out, codes, *rest)
        codes.view(torch.uint8)[7] ^= 1

    monkeypatch.setattr(kernel_work, "round_into", wrong)
    with pytest.raises(RunFailure, match=r"^conversions: \d codes of \d+ patterns are wrong$"):
        kernel_work.check_conversions(made)
    assert [row.ratio for row in made.rows] == [2] * 4


def test_no_wrong_code_reaches_its_bar_and_one_does_not():
    made = Bench(torch.device("cpu"), MACHINE)
    for wrong in (0, 1):
        made.add("wrong codes", f"sample {wrong}", 0.0, wrong, "reference", -0.0)
    assert [row.reached for row in made.rows] == [True, False]


def test_a_step_that_cannot_be_made_leaves_the_others(monkeypatch):
    class Broken(resnet50.Workload):
        def steps(self):
            def broken():
                raise torch.OutOfMemoryError("no memory")

            return {resnet50.BF16: lambda: int, resnet50.FP8: broken}

    monkeypatch.setattr(resnet50, "Workload", Broken)
    made = Bench(torch.device("cpu"), MACHINE, scale=256)
    with pytest.raises(RunFailure, match=r"not measured: FP8 \(OutOfMemoryError: no memory\)$"):
        resnet50.measure_step(made)
    assert [row.name for row in made.rows][:1] == ["ResNet-50 training step BF16 autocast"]


@needs_interpreter
def test_rehearsal():
    made = start(rehearse=True, seconds=60)
    assert made.machine == describe_machine(torch.device("cpu"))
    kernel_work.parity(made)
    for name in ("ceilings", "quantize", "matmul", "error", "weights"):
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
