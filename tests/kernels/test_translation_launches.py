"""How much a step of the translation models launches: small launches are bound by the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

# With weights rounded one by one; an update is a few launches more.
BOUNDS = {"transformer": 890, "gnmt": 3990}


def test_a_step_of_the_translation_models_issues_few_launches():
    # In a process of its own, because this one may interpret kernels.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("translation_launches.py"), *BOUNDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == BOUNDS.keys()
    for name, counts in found.items():
        total = sum(counts["kernels"].values()) + sum(counts["operators"].values())
        assert 300 < total <= BOUNDS[name], counts
    # One launch a layer and time step, each way, beside its product.
    steps = (2 * 8 + 1) * 50
    gnmt = found["gnmt"]["kernels"]
    assert gnmt["cell_forward"] == gnmt["cell_backward"] == steps
    assert gnmt["multiply"] < 2 * steps + 100
    # Six attentions of the encoder and twelve of the decoder; nothing in them is turned.
    transformer = found["transformer"]["kernels"]
    assert transformer["softmax_forward"] == transformer["softmax_backward"] == 18
    assert "transpose" not in transformer
