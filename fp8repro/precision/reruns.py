"""Parts of a module's forward pass that the backward pass runs again, when the module itself no longer runs.

Activation checkpointing of a method does that, and so may an autograd function of somebody else's. Products by
functions in such a part must follow the recipe then, too, at the places that they had. Nothing here computes anything.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import CodeType, FrameType, GeneratorType
from typing import Any, Protocol
from weakref import ref

import torch
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils.checkpoint import _CheckpointFrame

from fp8repro.errors import UserError
from fp8repro.precision.places import FUNCTION_PRODUCTS

_CHECKPOINT = vars(checkpoint)


class Owner(Protocol):
    """The module's products; see `FunctionProducts`."""

    name: str
    counts: list[Counter[str]]
    functions: frozenset[Callable[..., Any]]

    def resume(self, counts: Counter[str], frame: FrameType) -> None:
        """A part of the module's pass runs again, called by `frame`; so many products of each kind came before it."""

    def end_part(self) -> None:
        """It has ended."""

    def hand_over(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute a product, under the recipe or by torch."""


class Part:
    """A part of a forward pass that may run again.

    Attributes:
        owner, counts: whose products it has, and how many of each kind came before it.
        taken: it has some that follow the recipe.
    """

    def __init__(self, owner: Owner) -> None:
        """Begins where the owner stands."""
        self.owner, self.counts = owner, Counter(owner.counts[-1])
        self.taken = False

    def again(self, reruns: bool, run: Callable[..., Any], *args: Any) -> Any:
        """Run it; `reruns`: all of what runs is the part."""
        self.owner.resume(Counter(self.counts), sys._getframe())
        try:
            with _Again(self, reruns):
                return run(*args)
        finally:
            self.owner.end_part()


class _Again(TorchFunctionMode):
    """Gives products of a part to its owner."""

    def __init__(self, part: Part, reruns: bool) -> None:
        super().__init__()
        self.part, self.reruns = part, reruns

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled and args[0]:
            # Autograd runs a backward pass without; what is differentiated again needs it.
            self.reruns = True
        owner = self.part.owner
        if func not in owner.functions:
            return func(*args, **kwargs)
        if self.reruns:
            return owner.hand_over(func, args, kwargs)
        if self.part.taken:
            raise UserError(
                f"model: got an autograd function in {owner.name or 'the model'} that multiplies by {func.__name__} in "
                "its own backward pass, where no recipe is followed, expected inject(..., "
                f"leave=[{'.'.join(filter(None, (owner.name, FUNCTION_PRODUCTS, '*')))!r}])"
            )
        return func(*args, **kwargs)


def callers(last: FrameType | None) -> list[FrameType] | None:
    """The frames from the caller's to `last`, the innermost first, without that; None where `last` does not run."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not last:
        if frame is None:
            return None
        found.append(frame)
        frame = frame.f_back
    return found


def parts(path: Sequence[FrameType], owner: Owner) -> list[Part] | None:
    """The parts that are running for the first time within a module, of its callers; None where one cannot be reached.

    That is an autograd function which separates its forward pass from its context.
    """
    found = []
    # An autograd function runs without gradients of its own.
    inside = not torch.is_grad_enabled()
    for frame in path:
        place = _recomputed(frame) if frame.f_globals is _CHECKPOINT else None
        if place is None and inside:
            place = _node(frame)
            if place is None and _has_no_context(frame.f_code):
                return None
        if place is not None:
            found.append(_part(place, owner))
    return found


def _part(place: Any, owner: Owner) -> Part:
    """What a place runs again, which does so as the part that it is from now on."""
    part: Part | None = place.__dict__.get("fp8_part")
    if part is not None:
        return part
    part = place.fp8_part = Part(owner)
    if isinstance(place, BackwardCFunction):
        # A node that held its own methods would be a circle, and keep its tensors.
        for method in ("apply", "apply_boxed"):
            setattr(place, method, partial(_backward, part, method, ref(place)))
    else:
        place.recompute_fn = partial(part.again, True, place.recompute_fn)
    return part


def _backward(part: Part, method: str, place: Any, *grads: Any) -> Any:
    node = place()
    return part.again(False, getattr(type(node), method), node, *grads)


def _recomputed(frame: FrameType) -> Any:
    """Where `checkpoint` keeps what it will recompute; None where an autograd function does, or nothing will."""
    for local in frame.f_locals.values():
        if isinstance(local, GeneratorType) and local.gi_frame is not None:
            return next((x for x in local.gi_frame.f_locals.values() if isinstance(x, _CheckpointFrame)), None)
    return None


def _node(frame: FrameType) -> BackwardCFunction | None:
    """The autograd node that a call got as its first argument; a decorator may take all arguments as one."""
    names = frame.f_code.co_varnames
    first = frame.f_locals.get(names[0]) if names else None
    first = first[0] if isinstance(first, tuple) and first else first
    return first if isinstance(first, BackwardCFunction) else None


@cache
def _has_no_context(code: CodeType) -> bool:
    """Whether it is the forward pass of an autograd function that has a `setup_context`."""
    kinds = [torch.autograd.Function]
    for kind in kinds:
        kinds += kind.__subclasses__()
    separate = [kind for kind in kinds if kind.setup_context is not torch.autograd.Function.setup_context]
    return any(getattr(inspect.unwrap(kind.forward), "__code__", None) is code for kind in separate)
