"""Runs torch's SGD, Adam and AdamW over master weights in one pass over memory, on the optimizer's own state.

The optimizer's state dictionary stays what torch writes and reads, so checkpoints do not depend on who did the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def guard_step(optimizer: torch.optim.Optimizer) -> StepGuard:
    """The guard of an optimizer over master weights, which it gets where it has none."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if isinstance(hook, StepGuard):
            return hook
    guard = StepGuard()
    optimizer.register_step_pre_hook(guard)
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
    names = {id(p): name for name, p in parameters.items()}
    orders = orders or {}
    measuring = context.telemetry.active
    groups: list[tuple[dict[str, Any], list[tuple[nn.Parameter, Parameter]]]] = []
    for group in optimizer.param_groups:
        members = [p for p in group["params"] if id(p) in names and p.grad is not None]
        streams = [context.stream_number(names[id(p)], context.updates, "master", "master") for p in members]
        made = [
            Parameter(
                p.data,
                _like_master(p),
                (),
                stream,
                updated=torch.empty_like(p.data).float() if measuring else None,
                order=orders.get(names[id(p)], "row_major"),
            )
            for p, stream in zip(members, streams, strict=True)
        ]
        groups.append((group, list(zip(members, made, strict=True))))
    everything = [parameter for _, pairs in groups for _, parameter in pairs]
    if not everything:
        return 0.0
    control = engine.gradient_control(everything, scale, clip_norm)
    # The one place where the host waits: whether a step is skipped decides what the loss scale does next.
    bad, _, norm = control.tolist()
    if bad:
        return None
    before = [parameter.master.clone() for parameter in everything] if measuring else []
    for group, pairs in groups:
        rule = _rule(optimizer, group)
        for step, members_of_step in _with_state(optimizer, group, pairs).items():
            engine.update(members_of_step, rule, step, master, Rounding(), control, scale, context.seed)
    ordered = [names[id(p)] for _, pairs in groups for p, _ in pairs]
    for name, old, parameter in zip(ordered, before, everything, strict=False):
        assert parameter.updated is not None
        context.telemetry.record_update(name, old, parameter.updated, parameter.master)
    # What torch's schedulers look at, to warn of steps of theirs that come before the optimizer's.
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return float(norm)


def _like_master(p: nn.Parameter) -> Tensor:
    """The gradient in the master's memory layout."""
    assert p.grad is not None
    grad = p.grad.detach().resolve_neg()
    if grad.stride() == p.data.stride():
        return grad
    return torch.empty_like(p.data, dtype=grad.dtype).copy_(grad)


def _with_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], pairs: list[tuple[nn.Parameter, Parameter]]
) -> dict[int, list[Parameter]]:
    """Parameters with the optimizer's FP32 state, by the number of the update that they are about to get."""
    names: tuple[str, ...] = _STATES[type(optimizer)]
    if type(optimizer) is torch.optim.SGD and not group["momentum"]:
        names = ()
    states = [optimizer.state[p] if names else {} for p, _ in pairs]
    fresh = [any(state.get(name) is None for name in names) for state in states]
    for (p, _), state in ((pair, state) for pair, state, new in zip(pairs, states, fresh, strict=True) if new):
        # Made where torch would make it, at the first step.
        state.update({name: torch.zeros_like(p.data, dtype=torch.float32) for name in names})
    if type(optimizer) is torch.optim.SGD:
        # SGD keeps no count; all that matters is whether the momentum starts here.
        steps = [1 if new else 2 for new in fresh]
    else:
        counts = [state.setdefault("step", torch.zeros((), dtype=torch.float32)) for state in states]
        torch._foreach_add_(counts, 1)
        steps = [int(count) for count in torch.stack(counts).tolist()] if counts else []
    by_step: dict[int, list[Parameter]] = {}
    for (_, parameter), state, step in zip(pairs, states, steps, strict=True):
        parameter.state = tuple(state[name] for name in names)
        by_step.setdefault(step, []).append(parameter)
    return by_step


def _rule(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Rule:
    if type(optimizer) is torch.optim.SGD:
        return Rule(
            "sgd", group["lr"], group["momentum"], weight_decay=group["weight_decay"], nesterov=group["nesterov"]
        )
    name = "adam" if type(optimizer) is torch.optim.Adam else "adamw"
    beta1, beta2 = group["betas"]
    return Rule(name, group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
