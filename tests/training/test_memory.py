"""What a step keeps for backward: of several micro-steps one, and no longer than the backward pass does."""

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fp8repro.training.memory import counting_saved_bytes


def test_micro_steps_are_counted_once_and_freed_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Tanh())
    kept: list[StorageWeakRef] = []
    model[1].register_forward_hook(lambda *parts: kept.append(StorageWeakRef(parts[2].untyped_storage())))
    totals = []
    for micro_steps in (1, 3):
        del kept[:]
        with counting_saved_bytes(model) as saved:
            for step in range(micro_steps):
                assert all(ref.expired() for ref in kept)
                model(torch.randn(32, 8)).sum().backward()
                assert len(kept) == step + 1
        totals.append(saved.total())
    # The input and the two outputs of tanh, in FP32; weights are no part.
    assert totals == [32 * 4 * (8 + 16 + 4)] * 2


def test_nothing_is_counted_when_off() -> None:
    model = nn.Linear(8, 4)
    with counting_saved_bytes(model, active=False) as saved:
        model(torch.randn(2, 8)).sum().backward()
    assert saved.total() == 0
