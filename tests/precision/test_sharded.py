"""DDP and FSDP2 on two gloo processes: masters and quantized tensors are, to the bit, those of one process."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_worker import digesting
from torch import nn

from fp8repro import MasterWeights, StepContext, inject, load_recipe
from fp8repro.precision.sharded import is_sharded

ROOT = Path(__file__).parents[2]
STEPS, RANKS = 3, 2


def one_process() -> tuple[str, list[str]]:
    """What the examples train, in one process that plays both ranks in turn: digests of masters and of operands."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(7 * 16, 17), nn.ReLU(), nn.Linear(17, 4)),
    )
    images, labels = torch.randn(STEPS, 8, 1, 8, 8), torch.arange(8) % 4
    recipe = load_recipe("fp8")
    inject(model, recipe, StepContext(seed=1))
    context: Any = model.fp8_context
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), recipe)
    digests = [digesting(context) for _ in range(RANKS)]
    notes, context.observers = context.observers, []
    for step in range(STEPS):
        model.zero_grad()
        for rank in range(RANKS):
            context.observers = [notes[rank]]
            context.rank = rank
            context.begin(step)
            own = slice(4 * rank, 4 * rank + 4)
            (nn.functional.cross_entropy(model(images[step, own]), labels[own]) * 1024).backward()
        # The mean over the ranks.
        assert masters.step(1024.0 * RANKS)
    weights = hashlib.sha256()
    for parameter in model.parameters():
        weights.update(parameter.detach().float().numpy().tobytes())
    return weights.hexdigest(), [digest.hexdigest() for digest in digests]


# Starting two processes takes most of the time; parts of masters are the harder case.
@pytest.mark.parametrize("example", [pytest.param("replicated", marks=pytest.mark.long), "sharded"])
def test_two_processes_have_the_bits_of_one(example: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += [str(ROOT / "tests" / "sharded_worker.py"), str(ROOT / "examples" / f"{example}.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    masters, operands = one_process()
    assert f"masters {masters}" in done.stdout
    assert [(tmp_path / str(rank)).read_text() for rank in range(RANKS)] == operands


def test_plain_tensors_are_no_parts() -> None:
    assert not is_sharded(torch.ones(2))
    assert not is_sharded(copy.deepcopy(nn.Parameter(torch.ones(2))))
