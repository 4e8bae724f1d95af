"""Where a training step stands: seed, step, micro-step, rank; names the random stream of every operand.

It never draws a bit itself: streams are names, and the quantizers turn names into bits.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fp8repro.engines.products import Operand
from fp8repro.errors import UserError
from fp8repro.numerics.streams import Stream, StreamTable
from fp8repro.precision.offers import Offers
from fp8repro.precision.telemetry import Telemetry

Observer = Callable[[str, str, tuple[Operand, ...]], None]
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
class Calls:
    """A layer's calls since the last `begin`.

    Attributes:
        count: how many there were; recomputations are none.
        passes: how many passes (forward, then backward) have ended.
        returned: a backward pass has run since the last call.
        repeated: a call was recomputed since the last call.
    """

    count: int = 0
    passes: int = 0
    returned: bool = False
    repeated: bool = False

    @property
    def waits(self) -> bool:
        """Whether the last call still waits for its backward pass, as far as one will come."""
        return self.count > 0 and not (self.returned or self.repeated)


@dataclass
class StepContext:
    """Shared by all injected layers and the master weights of one model.

    A loop calls `begin(step, micro_step)` before each forward pass. One that never does still gets fresh bits at every
    call and at every update, because these keep counting; a resumed run then does not repeat an uninterrupted one.

    Attributes:
        generation: counts calls of `begin`.
        updates: how many updates of master weights were applied since the last `begin`.
        slots: where streams are handed out as places in device memory (see `streams_in_memory`).
        scope: number of the `fixed_weights` block that is open; None outside.
        offers: codes that travel beside the tensors between the layers.
        observers: see `observe`.

    Raises:
        UserError: a seed that is no whole number from 0 to 2^63 - 1, or a rank that is none.
    """

    seed: int = 0
    rank: int = 0
    step: int = 0
    micro_step: int = 0
    telemetry: Telemetry = field(default_factory=Telemetry)
    generation: int = 0
    updates: int = 0
    slots: StreamTable | None = None
    scope: int | None = None
    offers: Offers = field(default_factory=Offers)
    observers: list[Observer] = field(default_factory=list)
    _scopes: int = 0
    _names: set[str] = field(default_factory=set)
    _calls: dict[str, Calls] = field(default_factory=dict)
    _repeating: bool = False
    # Layers whose backward pass had not come when a later step began.
    _waiting: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Refuse what would not name a stream of its own."""
        self.seed, self.rank = _whole("seed", self.seed), _whole("rank", self.rank)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: got {self.seed}, expected a whole number from 0 to 2^63 - 1")

    def begin(self, step: int, micro_step: int = 0) -> None:
        """Start a forward pass: calls and updates count from zero again.

        Raises:
            UserError: something else than whole numbers.
        """
        self.step, self.micro_step = _whole("step", step), _whole("micro_step", micro_step)
        self.generation += 1
        self.updates = 0
        served = {name for name, calls in self._calls.items() if calls.returned or calls.repeated}
        self._waiting = (self._waiting - served) | {name for name, calls in self._calls.items() if calls.waits}
        self._calls.clear()

    @property
    def place(self) -> tuple[int, int]:
        """Step and micro-step: where a forward pass stands, which its backward pass has to know."""
        return self.step, self.micro_step

    def at(self, place: tuple[int, int]) -> AbstractContextManager[None]:
        """Name the streams of another step and micro-step inside.

        A backward pass draws the bits of its forward pass' place: those of two batches differ, whatever began between.
        """
        return _HERE if place == (self.step, self.micro_step) else self._elsewhere(place)

    @contextmanager
    def _elsewhere(self, place: tuple[int, int]) -> Iterator[None]:
        here = self.place
        self.step, self.micro_step = place
        try:
            yield
        finally:
            self.step, self.micro_step = here

    def claim(self, names: Iterable[str]) -> None:
        """Reserve the names of layers, which name their random streams.

        Raises:
            UserError: a name is taken; two layers of one name would draw the same bits.
        """
        names = set(names)
        taken = sorted(names & self._names)
        if taken:
            raise UserError(
                f"context: got one that has a layer {taken[0]!r} already, expected another prefix= for this model, "
                "or a context of its own"
            )
        self._names |= names

    def next_call(self, name: str, draws: bool = False) -> int:
        """Index of a layer's call since the last `begin`, so that reused layers never share random bits.

        A recomputation (activation checkpointing) gets the index of the call that it repeats.

        Args:
            name: of the layer.
            draws: the call draws random bits in its forward pass.

        Raises:
            UserError: random bits are to be drawn again, and whose cannot be told.
        """
        calls = self._calls.get(name)
        if calls is None:
            calls = self._calls[name] = Calls()
        if not self._repeating and in_backward_pass():
            calls.repeated = True
            if draws and name in self._waiting:
                raise UserError(
                    f"layer {name}: got recomputed (activation checkpointing) after context.begin() came between a "
                    "forward and its backward pass, expected checkpoint(..., context_fn=context.recomputation)"
                )
            if calls.count == 1:
                return 0
            if draws:
                raise UserError(
                    f"layer {name}: got recomputed (activation checkpointing) after {calls.count} calls since "
                    "context.begin(), expected one call, or checkpoint(..., context_fn=context.recomputation)"
                )
        else:
            calls.passes += calls.returned
            calls.returned = calls.repeated = False
        calls.count += 1
        return calls.count - 1

    def weight_call(self, name: str) -> int:
        """The call under which a layer's weight draws random bits.

        All calls of a step share its weights, and 0. In a loop that begins no steps, a forward pass behind a backward
        pass is the next one's.
        """
        calls = self._calls.get(name)
        return 0 if calls is None else calls.passes + (calls.returned and not in_backward_pass())

    def returned(self, name: str) -> None:
        """Note that a layer's backward pass has run."""
        self._calls.setdefault(name, Calls()).returned = True

    def recomputation(self) -> tuple[_Place, _Place]:
        """Let a recomputation draw the bits of its forward pass, whatever lies between.

        `torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, context_fn=context.recomputation)` is needed where
        a layer is called several times between two calls of `begin`.
        """
        forward = _Place(self)
        return forward, _Place(self, forward)

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Promise that no weight changes inside: each is rounded once for all calls and micro-steps.

        Outside, weights are rounded at every call, because not every change of a tensor can be seen: fused optimizers
        and writes through `.data` raise no version.
        """
        outer = self.scope
        if outer is None:
            self._scopes += 1
            self.scope = self._scopes
        try:
            yield
        finally:
            self.scope = outer

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Call `observer(layer, product, operands)` before every product; product is forward, error or gradient."""
        self.observers.append(observer)
        try:
            yield
        finally:
            self.observers.remove(observer)

    def stream(self, module: str, call: int, operand: str, role: str) -> Stream:
        """Stream of one operand at this point of the run: its number, or the slot that holds it at each replay."""
        if self.slots is not None:
            return self.slots.slot((module, call, operand, role))
        return self.stream_number(module, call, operand, role)

    def stream_number(self, module: str, call: int, operand: str, role: str) -> int:
        """The 64-bit number of that stream."""
        # Weights are rounded once per step, so every micro-step must name the same bits.
        micro_step = 0 if role in RANK_FREE_ROLES else self.micro_step
        return stream_id(self.step, micro_step, module, call, operand, role, self.rank)

    @contextmanager
    def streams_in_memory(self, slots: StreamTable) -> Iterator[None]:
        """Hand out slots of a table inside, for work that a graph will repeat at other steps."""
        self.slots = slots
        try:
            yield
        finally:
            self.slots = None


# One object serves every block: it keeps nothing.
_HERE: AbstractContextManager[None] = nullcontext()


def _whole(name: str, given: Any) -> int:
    """Raise UserError for what is no whole number; 3.0 would name other streams than 3."""
    try:
        return operator.index(given)
    except TypeError:
        raise UserError(f"{name}: got {given!r}, expected a whole number") from None


def in_backward_pass() -> bool:
    """True where autograd is running a backward pass: a forward pass inside one is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class _Place:
    """A point of a run: noted when entered, or another's taken while inside."""

    def __init__(self, context: StepContext, noted: _Place | None = None) -> None:
        self._context, self._noted = context, noted
        self._now: tuple[int, int, dict[str, Calls], bool] = (0, 0, {}, False)

    def _take(self, place: tuple[int, int, dict[str, Calls], bool]) -> None:
        c = self._context
        c.step, c.micro_step, calls, c._repeating = place
        c._calls = {name: replace(each) for name, each in calls.items()}

    def __enter__(self) -> None:
        c = self._context
        self._now = (c.step, c.micro_step, {name: replace(each) for name, each in c._calls.items()}, c._repeating)
        if self._noted is not None:
            step, micro_step, calls, _ = self._noted._now
            self._take((step, micro_step, calls, True))

    def __exit__(self, *_: object) -> None:
        if self._noted is not None:
            self._take(self._now)
