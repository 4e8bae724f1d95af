"""Runs torch's SGD, Adam and AdamW over master weights in one pass over memory, on the optimizer's own state.

The optimizer's state dictionary stays what torch writes and reads, so checkpoints do not depend on who did the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as global_hooks

from fp8repro.engines.updates import Engine, Parameter, Rule
from fp8repro.errors import UserError
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.context import StepContext


class StepGuard:
    """A hook of an optimizer over master weights: its own `step` would move them in 16 bit, by the loss scale."""

    def __init__(self) -> None:
        """Closed."""
        self._is_open = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let `step` through inside."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Raise UserError while closed."""
        if not self._is_open:
            raise UserError(
                f"{type(optimizer).__name__}.step: got a call on master weights, expected MasterWeights.step(scale)"
            )


class FullState:
    """Hooks of an optimizer over master weights: torch casts state that it loads to a parameter's dtype, 16 bit."""

    def __init__(self) -> None:
        """Nothing is being loaded."""
        self._loaded: Mapping[str, Any] = {}

    def before(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Note what is loaded."""
        self._loaded = state

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the FP32 numbers themselves."""
        loaded, self._loaded = self._loaded, {}
        keys = [key for group in loaded["param_groups"] for key in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            if parameter.dtype.itemsize == 4:
                continue
            for name, value in loaded["state"].get(key, {}).items():
                own = optimizer.state[parameter].get(name)
                if isinstance(value, Tensor) and isinstance(own, Tensor) and own.dtype == parameter.dtype:
                    optimizer.state[parameter][name] = value.to(own.device, torch.float32, copy=True)


def guard_step(optimizer: torch.optim.Optimizer) -> StepGuard:
    """The guard of an optimizer over master weights, which it gets, with `FullState`, where it has none."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if isinstance(hook, StepGuard):
            return hook
    guard, state = StepGuard(), FullState()
    optimizer.register_step_pre_hook(guard)
    optimizer.register_load_state_dict_pre_hook(state.before)
    optimizer.register_load_state_dict_post_hook(state.after)
    return guard


_STATES = {torch.optim.SGD: ("momentum_buffer",)} | dict.fromkeys(
    (torch.optim.Adam, torch.optim.AdamW), ("exp_avg", "exp_avg_sq")
)


def unsupported(optimizer: torch.optim.Optimizer) -> str | None:
    """Why the kernels cannot do an optimizer's step, in a few words; None when they can."""
    if type(optimizer) not in _STATES:
        return f"{type(optimizer).__name__} has no fused form"
    for group in optimizer.param_groups:
        for option in ("maximize", "amsgrad", "dampening", "differentiable"):
            if group.get(option):
                return f"{option} has no fused form"
        if type(optimizer) is torch.optim.Adam and group.get("decoupled_weight_decay"):
            return "decoupled_weight_decay has no fused form"
        if any(isinstance(group.get(option), Tensor) for option in ("lr", "betas")):
            return "a learning rate in a tensor has no fused form"
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    hooks += [*global_hooks._global_optimizer_pre_hooks.values(), *global_hooks._global_optimizer_post_hooks.values()]
    if not all(isinstance(hook, StepGuard) for hook in hooks):
        return "hooks around step() have no fused form"
    # torch's schedulers wrap it to count calls, which `_opt_called` tells them.
    if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return "a step() that was replaced has no fused form"
    return None


@torch.no_grad()
def fused_step(
    engine: Engine,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    master: Rounding,
    context: StepContext,
    scale: float = 1.0,
    clip_norm: float | None = None,
    orders: Mapping[str, str] | None = None,
) -> float | None:
    """Unscale, check, clip, update and round: what `MasterWeights.step` does, in two passes.

    Args:
        engine: does the work; fills `Parameter.updated` where the context's telemetry is active.
        parameters: by name, which names their random streams; FP16 masters or FP32 tensors of their values.
        optimizer: one that `unsupported` has nothing against; its state is updated.
        master: how masters are rounded.
        context: seed and step.
        scale: what the loss was multiplied by.
        clip_norm: largest norm of the unscaled gradient, or None.
        orders: how the elements of parameters are counted for their random bits, by name; row-major by default.

    Returns:
        Norm of the unscaled gradient; None when a gradient was not finite, and nothing changed.

    Raises:
        ValueError: a tensor's device, dtype or layout is not what the engine takes.
    """
    measuring = context.telemetry.active
    groups = group_members(optimizer, parameters, orders or {})
    everything = [member.made for _, members in groups for member in members]
    if not everything:
        return 0.0
    for member in (member for _, members in groups for member in members):
        if master.is_stochastic:
            member.made.master_stream = context.stream_number(member.name, context.updates, "master", "master")
        if measuring:
            member.made.updated = torch.empty_like(member.parameter.data).float()
    control = engine.gradient_control(everything, scale, clip_norm)
    # The one place where the host waits: whether a step is skipped decides what the loss scale does next.
    bad, _, norm = control.tolist()
    if bad:
        return None
    before = [parameter.master.clone() for parameter in everything] if measuring else []
    for group, members in groups:
        rule = rule_of(optimizer, group)
        for step, members_of_step in with_state(optimizer, group, members).items():
            engine.update(
                [m.made for m in members_of_step], rule, step, master, Rounding(), control, scale, context.seed
            )
            count_step(optimizer, members_of_step)
    for member, old in zip([m for _, members in groups for m in members], before, strict=False):
        assert member.made.updated is not None
        context.telemetry.record_update(member.name, old, member.made.updated, member.made.master)
    tell_schedulers(optimizer)
    return float(norm)


@dataclass
class Member:
    """A parameter of an optimizer's group: its name, and what the engine gets of it."""

    name: str
    parameter: nn.Parameter
    made: Parameter


def group_members(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], orders: Mapping[str, str]
) -> list[tuple[dict[str, Any], list[Member]]]:
    """What of an optimizer's groups moves, without state and streams."""
    names = {id(p): name for name, p in parameters.items()}
    groups = []
    for group in optimizer.param_groups:
        moving = [(names[id(p)], p) for p in group["params"] if id(p) in names and p.grad is not None]
        members = [
            Member(name, p, Parameter(p.data, _like_master(p), order=orders.get(name, "row_major")))
            for name, p in moving
        ]
        groups.append((group, members))
    return groups


def in_place(p: nn.Parameter) -> Tensor | None:
    """The gradient as the engine reads it, in its own memory; None where that is laid out otherwise than the master."""
    assert p.grad is not None
    grad = p.grad.detach()
    sizes_and_steps = zip(grad.shape, grad.stride(), p.data.stride(), strict=True)
    if grad.is_neg() or any(own != other for size, own, other in sizes_and_steps if size > 1):
        return None
    # The steps of dimensions of one element are anybody's.
    return grad if grad.stride() == p.data.stride() else grad.as_strided(p.data.shape, p.data.stride())


def _like_master(p: nn.Parameter) -> Tensor:
    """The gradient in the master's memory layout."""
    grad = in_place(p)
    assert p.grad is not None
    return torch.empty_like(p.data, dtype=p.grad.dtype).copy_(p.grad.detach()) if grad is None else grad


def state_names(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[str, ...]:
    """The tensors of a parameter's shape that an optimizer keeps for those of a group."""
    if type(optimizer) is torch.optim.SGD and not group["momentum"]:
        return ()
    return _STATES[type(optimizer)]


def has_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether parameters have all the state that an update needs: the optimizer has moved each of them."""
    moving = {id(p) for p in parameters.values()}
    counted = () if type(optimizer) is torch.optim.SGD else ("step",)
    return all(
        optimizer.state.get(p, {}).get(name) is not None
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in moving
        for name in (*state_names(optimizer, group), *counted)
    )


def with_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], members: list[Member]
) -> dict[int, list[Member]]:
    """Members with the optimizer's FP32 state, by the number of the update that they are about to get."""
    names = state_names(optimizer, group)
    states = [optimizer.state[member.parameter] if names else {} for member in members]
    fresh = [any(state.get(name) is None for name in names) for state in states]
    for member, state in ((m, state) for m, state, new in zip(members, states, fresh, strict=True) if new):
        # Made where torch would make it, at the first step.
        like = member.parameter.data
        state.update({name: torch.zeros_like(like, dtype=torch.float32) for name in names})
    if type(optimizer) is torch.optim.SGD:
        # All that matters is whether the momentum starts here.
        steps = [1 if new else 2 for new in fresh]
    else:
        for state in states:
            state.setdefault("step", torch.zeros((), dtype=torch.float32))
        steps = next_steps(optimizer, members)
    by_step: dict[int, list[Member]] = {}
    for member, state, step in zip(members, states, steps, strict=True):
        member.made.state = tuple(state[name] for name in names)
        by_step.setdefault(step, []).append(member)
    return by_step


def next_steps(optimizer: torch.optim.Optimizer, members: list[Member]) -> list[int]:
    """The number of the update that each member is about to get; all of them have state. SGD keeps no count: 2."""
    if type(optimizer) is torch.optim.SGD or not members:
        return [2] * len(members)
    counts = [optimizer.state[member.parameter]["step"] for member in members]
    return [int(count) + 1 for count in torch.stack(counts).tolist()]


def count_step(optimizer: torch.optim.Optimizer, members: list[Member]) -> None:
    """Note in the optimizer's state that members got an update."""
    if type(optimizer) is not torch.optim.SGD:
        torch._foreach_add_([optimizer.state[member.parameter]["step"] for member in members], 1)


def tell_schedulers(optimizer: torch.optim.Optimizer) -> None:
    """Note that a step was made: torch's schedulers warn of steps of theirs that come before the optimizer's."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def rule_of(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Rule:
    """An optimizer's arithmetic with a group's numbers as they are now."""
    if type(optimizer) is torch.optim.SGD:
        return Rule(
            "sgd", group["lr"], group["momentum"], weight_decay=group["weight_decay"], nesterov=group["nesterov"]
        )
    name = "adam" if type(optimizer) is torch.optim.Adam else "adamw"
    beta1, beta2 = group["betas"]
    return Rule(name, group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
