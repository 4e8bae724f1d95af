"""Where a training step stands: seed, step, micro-step, rank; names the random stream of every operand.

It never draws a bit itself: streams are names, and the quantizers turn names into bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fp8repro.streams import Stream, StreamTable
from fp8repro.telemetry import Telemetry

# Every rank holds the same weights, so their rounding must draw the same bits on every rank.
RANK_FREE_ROLES = ("weight", "master")


def stream_id(step: int, micro_step: int, module: str, call: int, operand: str, role: str, rank: int) -> int:
    """The 64-bit stream of one operand (see ARCHITECTURE.md, "One meaning of bits").

    Args:
        step: optimizer step, skipped ones counted.
        micro_step: index of the accumulated batch within the step.
        module: qualified module or parameter name.
        call: how often the module was called before in this micro-step.
        operand: which tensor of the layer ("input", "output", "weight", ...).
        role: the tensor's role in the recipe.
        rank: process rank; ignored for weights and masters.
    """
    rank = 0 if role in RANK_FREE_ROLES else rank
    name = f"{step}/{micro_step}/{module}/{call}/{operand}/{role}/{rank}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass
class StepContext:
    """Shared by all injected layers and the master weights of one model.

    A loop calls `begin(step, micro_step)` before each forward pass. A loop that never does still gets
    fresh bits at every call, because call indices then keep counting.

    Attributes:
        generation: counts calls of `begin`.
        weight_version: counts updates that the tensors' own version counters do not see.
        slots: where streams are handed out as places in device memory (see `streams_in_memory`).
    """

    seed: int = 0
    rank: int = 0
    step: int = 0
    micro_step: int = 0
    telemetry: Telemetry = field(default_factory=Telemetry)
    generation: int = 0
    weight_version: int = 0
    slots: StreamTable | None = None

    def begin(self, step: int, micro_step: int = 0) -> None:
        """Start a forward pass: call indices restart, weights are quantized anew when the step changed."""
        self.step, self.micro_step = step, micro_step
        self.generation += 1

    def stream(self, module: str, call: int, operand: str, role: str) -> Stream:
        """Stream of one operand at this point of the run: its number, or the slot that holds it at each replay."""
        if self.slots is not None:
            return self.slots.slot((module, call, operand, role))
        return self.stream_number(module, call, operand, role)

    def stream_number(self, module: str, call: int, operand: str, role: str) -> int:
        """The 64-bit number of that stream."""
        # Weights are quantized once per step, so every micro-step and call must name the same bits.
        micro_step, call = (0, 0) if role in RANK_FREE_ROLES else (self.micro_step, call)
        return stream_id(self.step, micro_step, module, call, operand, role, self.rank)

    @contextmanager
    def streams_in_memory(self, slots: StreamTable) -> Iterator[None]:
        """Hand out slots of a table inside, for work that a graph will repeat at other steps."""
        self.slots = slots
        try:
            yield
        finally:
            self.slots = None
