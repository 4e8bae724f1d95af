"""Runs torch's SGD, Adam and AdamW over master weights through the fused kernels, on the optimizer's own state.

The optimizer's state dictionary stays what torch writes and reads, so checkpoints do not depend on who did the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fp8repro.context import StepContext
from fp8repro.kernels.update import MASTER_TYPES, Parameter, Rule, gradient_control, update
from fp8repro.recipe import RoleSpec

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
    return None


@torch.no_grad()
def fused_step(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    master: RoleSpec,
    context: StepContext,
    scale: float = 1.0,
    clip_norm: float | None = None,
) -> float | None:
    """Unscale, check, clip, update and round: what `MasterWeights.step` does, in two launches a kind of tensor.

    Args:
        parameters: by name, which names their random streams; FP16 masters or FP32 tensors of their values.
        optimizer: one that `unsupported` has nothing against; its state is updated.
        master: how masters are rounded.
        context: seed and step.
        scale: what the loss was multiplied by.
        clip_norm: largest norm of the unscaled gradient, or None.

    Returns:
        Norm of the unscaled gradient; None when a gradient was not finite, and nothing changed.

    Raises:
        ValueError: a tensor's device, dtype or layout is not what the kernels take.
    """
    names = {id(p): name for name, p in parameters.items()}
    groups: list[tuple[dict[str, Any], list[tuple[nn.Parameter, Parameter]]]] = []
    for group in optimizer.param_groups:
        members = [p for p in group["params"] if id(p) in names and p.grad is not None]
        streams = [context.stream(names[id(p)], 0, "master", "master") for p in members]
        made = [Parameter(p.data, _like_master(p), (), stream) for p, stream in zip(members, streams, strict=True)]
        groups.append((group, list(zip(members, made, strict=True))))
    everything = [parameter for _, pairs in groups for _, parameter in pairs]
    if not everything:
        return 0.0
    control = gradient_control(everything, scale, clip_norm)
    # The one place where the host waits: whether a step is skipped decides what the loss scale does next.
    bad, _, norm = control.tolist()
    if bad:
        return None
    for group, pairs in groups:
        for step, members_of_step in _with_state(optimizer, group, pairs).items():
            update(members_of_step, _rule(optimizer, group), step, master, RoleSpec(), control, scale, context.seed)
    return float(norm)


def _like_master(p: nn.Parameter) -> Tensor:
    """The gradient in the master's memory layout."""
    if p.data.dtype not in MASTER_TYPES or p.grad is None:
        raise ValueError(f"master: got {p.data.dtype}, expected torch.float16 or torch.float32")
    grad = p.grad.detach()
    if grad.stride() == p.data.stride():
        return grad
    return torch.empty_like(p.data, dtype=grad.dtype).copy_(grad)


def _with_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], pairs: list[tuple[nn.Parameter, Parameter]]
) -> dict[int, list[Parameter]]:
    """Parameters with the optimizer's FP32 state, by the number of the update that they are about to get."""
    names = _STATES[type(optimizer)]
    if type(optimizer) is torch.optim.SGD and not group["momentum"]:
        names = ()
    by_step: dict[int, list[Parameter]] = {}
    for p, parameter in pairs:
        state = optimizer.state[p] if names else {}
        fresh = any(state.get(name) is None for name in names)
        for name in names if fresh else ():
            # Made where torch would make it, at the first step.
            state[name] = torch.zeros_like(p.data, dtype=torch.float32)
        if type(optimizer) is torch.optim.SGD:
            # SGD keeps no count; all that matters is whether the momentum starts here.
            step = 1 if fresh else 2
        else:
            state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
            step = int(state["step"])
        by_step.setdefault(step, []).append(replace(parameter, state=tuple(state[name] for name in names)))
    return by_step


def _rule(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Rule:
    if type(optimizer) is torch.optim.SGD:
        return Rule(
            "sgd", group["lr"], group["momentum"], weight_decay=group["weight_decay"], nesterov=group["nesterov"]
        )
    name = "adam" if type(optimizer) is torch.optim.Adam else "adamw"
    beta1, beta2 = group["betas"]
    return Rule(name, group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
