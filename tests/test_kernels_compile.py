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


def test_sm_90_quantizers_never_saturate_in_hardware(rows):
    quantizers = [row for row in rows.values() if row["group"] == "quantize"]
    assert len(quantizers) >= 8
    assert all(row["satfinite"] == 0 for row in quantizers)


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
    rows = compiled(capability, "quantize e5m2 stochastic", "NT small", "matmul e4m3 x e4m3")
    names = ["quantize e5m2 stochastic", "matmul e5m2 x e5m2 NT small", "matmul e4m3 x e4m3 NT"]
    assert [row["name"] for row in rows] == names[: 2 if capability == 80 else 3]
    assert {(row["capability"], row["spilled"], row["satfinite"]) for row in rows} == {(capability, 0, 0)}


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 89, 100])
def test_every_kernel_compiles(capability):
    rows = compiled(capability)
    assert len(rows) > 30
    assert all(row["satfinite"] == 0 for row in rows)
    # ptxas keeps 8 bytes of one sm_100 kernel on the stack that uses 64 registers.
    assert sum(row["spilled"] for row in rows) <= (8 if capability == 100 else 0)


def test_interpreter_and_compiler_do_not_mix():
    command = [sys.executable, "-m", "fp8repro.kernels.aot", "90"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "TRITON_INTERPRET: is set, expected unset to compile\n")
