"""Random seeds and orders as pure functions of names, so that a run resumes exactly with any number of workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed: a hash of the names that say what it is for."""
    name = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def permutation(count: int, *parts: int | str) -> NDArray[np.int64]:
    """A permutation of `count` items, int64, keyed by names that say what it is for."""
    seed = derived_seed(*parts)
    # Numpy promises the same stream in all versions for RandomState, but not for Generator.
    generator = np.random.RandomState(np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32))
    return generator.permutation(count).astype(np.int64)


def seed_torch(seed: int, device: torch.device) -> None:
    """Start torch's global generators of the CPU and of one device at `seed`."""
    # torch.manual_seed formats a stack trace at every call before CUDA is initialized.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Inside, torch's global CPU generator starts at `seed`; afterwards it has its former state."""
    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
