"""Every kernel compiles ahead of time for GPUs that need not be present, into the instructions that it promises."""

import json
import os
import subprocess
import sys

import pytest


def compiled(capability, only="", expect=0):
    """Rows of the compiler's table; in a process of its own, because this one may interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fp8repro.kernels.aot", str(capability), "--json", "--only", only]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows():
    return {row["name"]: row for row in compiled(90)}


def test_sm_90_quantizers_never_saturate_in_hardware(rows):
    quantizers = [row for row in rows.values() if row["group"] == "quantize"]
    assert len(quantizers) >= 8
    assert all(row["satfinite"] == 0 for row in quantizers)


def test_sm_90_kernels_do_not_spill(rows):
    assert {name: row["spilled"] for name, row in rows.items() if row["spilled"]} == {}


@pytest.mark.parametrize("capability", [80, 89, 100])
def test_quantizer_compiles(capability):
    (row,) = compiled(capability, "quantize e5m2 stochastic")
    assert (row["capability"], row["satfinite"], row["spilled"]) == (capability, 0, 0)


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 89, 100])
def test_every_kernel_compiles(capability):
    rows = compiled(capability)
    assert len(rows) > 10
    assert all(row["satfinite"] == 0 for row in rows)


def test_interpreter_and_compiler_do_not_mix():
    command = [sys.executable, "-m", "fp8repro.kernels.aot", "90"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "TRITON_INTERPRET: is set, expected unset to compile\n")
