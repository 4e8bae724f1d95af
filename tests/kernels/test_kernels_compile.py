"""Every kernel compiles ahead of time for GPUs that need not be present, into the instructions that it promises."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest


def compiled(capability, *only):
    """Rows of the compiler's table; in a process of its own, because this one may interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fp8repro.kernels.aot", str(capability), "--json", "--only", *(only or [""])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows():
    return {row["name"]: row for row in compiled(90)}


def test_sm_90_quantizers_take_the_hardwares_conversion_to_nearest_alone(rows):
    quantizers = [row for row in rows.values() if row["group"] == "quantize"]
    assert len(quantizers) >= 12
    for row in quantizers:
        # Two values each.
        assert row["satfinite"] == ("nearest" in row["name"]) * row["values_a_thread"] / 2


# Most instructions a value, those included that a thread executes once.
BOUNDS = {
    "quantize e5m2 nearest": 7,
    "quantize e4m3 nearest": 7,
    "quantize + transpose e5m2 nearest": 11,
    "quantize e5m2 stochastic": 25,
    "quantize e4m3 stochastic": 25,
    "quantize e5m2 stochastic, stream in memory": 25,
    "quantize columns e5m2 stochastic": 24,
    # Addresses from a table.
    "quantize grouped e5m2 nearest": 11,
    "quantize grouped + transpose e5m2 nearest": 18,
    "quantize grouped e5m2 stochastic": 29,
    "quantize grouped + transpose e5m2 stochastic": 35,
    # To a format with more quanta than one addition can count.
    "quantize fp16 stochastic": 27,
    # To FP32, whose stores want other values in a thread; in two layouts.
    "quantize e5m2 stochastic, values": 28,
    "quantize + transpose e5m2 stochastic": 28,
    # Between the layers of a block; with its FP32 sum, whose ten bytes a value take longer than these.
    "batch norm apply, codes": 20,
    "batch norm apply, codes, residual": 25,
    "batch norm gradient, codes": 45,
    "batch norm gradient, codes, residual": 45,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_sm_90_elementwise_kernels_take_few_instructions_a_value(rows, name):
    assert rows[name]["instructions"] <= BOUNDS[name] * rows[name]["values_a_thread"]


# A result looks at nine values, and is one of four that a stride of 2 leaves; a gradient asks four windows.
@pytest.mark.parametrize(("name", "most"), [("max pool", 126), ("max pool gradient", 46)])
def test_sm_90_pooling_takes_few_instructions_a_value(rows, name, most):
    assert rows[name]["instructions"] <= most * rows[name]["values_a_thread"]


def test_sm_90_kernels_do_not_spill(rows):
    # Triton 3.6 keeps 8 bytes of one convolution on the stack.
    allowed = 8 if version("triton").startswith("3.6.") else 0
    assert sum(row["spilled"] for row in rows.values()) <= allowed


def test_sm_90_products_use_fp8_tensor_cores_and_promote(rows):
    for name, row in rows.items():
        if row["group"] != "product" or "fp16_mma" in name:
            continue
        formats = "e4m3.e4m3" if "e4m3 x e4m3" in name else "e4m3.e5m2" if "e4m3 x" in name else "e5m2.e5m2"
        (instruction,) = row["products"]
        assert re.fullmatch(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.{formats}", instruction)
        assert (row["fp32_adds"] == 0) == ("unpromoted" in name), name
    assert all("f32.f16.f16" in i for i in rows["matmul e5m2 x e5m2 NT fp16_mma"]["products"])


@pytest.mark.parametrize("capability", [80, 89, 100])
def test_quantizer_and_product_compile(capability):
    # E4M3 products need sm_89; the others, and every quantizer, compile everywhere.
    rows = compiled(capability, "quantize e5m2 nearest", "stochastic, stream", "NT small", "matmul e4m3 x e4m3")
    quantizers = ["quantize e5m2 nearest", "quantize e5m2 stochastic, stream in memory"]
    names = [*quantizers, "matmul e5m2 x e5m2 NT small", "matmul e4m3 x e4m3 NT"]
    assert [row["name"] for row in rows] == names[: 3 if capability == 80 else 4]
    assert {(row["capability"], row["spilled"]) for row in rows} == {(capability, 0)}
    # An older GPU rounds on bits.
    assert [row["satfinite"] for row in rows] == [8 * (capability >= 89), 0, 0, 0][: len(rows)]


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 89, 100])
def test_every_kernel_compiles(capability):
    rows = compiled(capability)
    assert len(rows) > 30
    assert all(row["satfinite"] == 0 for row in rows if "stochastic" in row["name"])
    # ptxas keeps 8 bytes of one sm_100 kernel on the stack that uses 64 registers.
    assert sum(row["spilled"] for row in rows) <= (8 if capability == 100 else 0)


def test_interpreter_and_compiler_do_not_mix():
    command = [sys.executable, "-m", "fp8repro.kernels.aot", "90"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "TRITON_INTERPRET: is set, expected unset to compile\n")
