"""What a replayed training step takes on an H100, counted on the meta device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def counted(name, recipe):
    # In a process of its own, because this one may interpret kernels.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("step_counts.py"), name, recipe]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def resnet50():
    return counted("resnet50", "fp8")


def test_weights_and_update_of_resnet50_take_few_launches(resnet50):
    parts = resnet50["parts"]
    # E5M2, and FP16 in the first and the last layer; the layers round none themselves.
    weights = {k: v for k, v in parts["forward and backward"]["triton"].items() if "group" in k}
    assert weights == {"round_group": 2}
    # FP16 masters and FP32 ones. The copies are the optimizer's numbers and the streams.
    update = parts["update"]
    assert update["triton"] == {"gradient_norms": 1, "gradient_control": 1, "update": 2}
    assert update["torch"]["copy_"] == 2


def test_a_step_of_resnet50_takes_few_launches(resnet50):
    launches = [sum(part[kind].values()) for part in resnet50["parts"].values() for kind in ("triton", "torch")]
    assert 300 < sum(launches) <= 650


def test_a_step_of_resnet50_moves_few_bytes(resnet50):
    # 150 GB with FP32 tensors between the layers. Products count apart: FP8 halves their operands anyway.
    assert 30e9 < sum(resnet50["moved"].values()) <= 64e9
    assert 0.3 < resnet50["saved"] / resnet50["saved in BF16"] <= 0.53


# A run waits once for each kernel that it compiles, for forward and backward pass and for the update.
@pytest.mark.parametrize(("name", "recipe", "most"), [("resnet18", "fp8", 60), ("resnet50", "fp8", 75)])
def test_a_step_needs_few_compiled_kernels(resnet50, name, recipe, most):
    step = resnet50 if name == "resnet50" else counted(name, recipe)
    update = step["parts"]["update"]["triton"]
    assert 30 < sum(count for kernel, count in step["variants"].items() if kernel not in update) <= most
    assert sum(step["variants"][kernel] for kernel in update) == 4


# Small launches are bound by the host: with a module and an operator each, 2,047 and 29,289.
@pytest.mark.parametrize(("name", "most"), [("transformer", 800), ("gnmt", 3_950)])
def test_a_step_of_the_translation_models_takes_few_launches(name, most):
    parts = counted(name, "fp8")["parts"]
    launches = [sum(part[kind].values()) for part in parts.values() for kind in ("triton", "torch")]
    assert 300 < sum(launches) <= most
    kernels = parts["forward and backward"]["triton"]
    if name == "gnmt":
        # One launch a layer and time step, each way, beside its product.
        steps = (2 * 8 + 1) * 50
        assert kernels["cell_forward"] == kernels["cell_backward"] == steps
        assert kernels["multiply"] < 2 * steps + 100
    else:
        # Six attentions of the encoder and twelve of the decoder; nothing in them is turned.
        assert kernels["softmax_forward"] == kernels["softmax_backward"] == 18
        assert "transpose" not in kernels
