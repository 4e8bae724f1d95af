"""How many launches a replayed training step takes, counted on the meta device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def parts():
    # In a process of its own, because this one may interpret kernels.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("launches.py"), "resnet50", "fp8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_weights_and_update_of_resnet50_take_few_launches(parts):
    # E5M2, and FP16 in the first and the last layer; the layers round none themselves.
    weights = {k: v for k, v in parts["forward and backward"]["triton"].items() if "group" in k}
    assert weights == {"round_group": 2}
    # FP16 masters and FP32 ones. The copies are the optimizer's numbers and the streams.
    expected = {"gradient_norms": 1, "gradient_control": 1, "update": 2}
    assert parts["update"] == {"triton": expected, "torch": {"copy_": 2}}


def test_launches_of_a_step_of_resnet50(parts):
    launches = sum(sum(kind.values()) for part in parts.values() for kind in part.values())
    assert 300 < launches <= 645
