"""Optimizers by name, with weight decay on all parameters or on products' weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fp8repro.errors import UserError
from fp8repro.settings.schema import OptimizerConfig
from fp8repro.training.untrusted import Harmful, require_like

# What torch keeps for each parameter.
STATE = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
}
# Learning rate of SGD with momentum 0.9 on images of 10 to 1,000 classes, from this batch size and run length on.
FULL_RATE, FULL_RATE_BATCH, FULL_RATE_STEPS = 0.1, 128, 800


def settle_rate(config: OptimizerConfig, batch_size: int, total_steps: int) -> OptimizerConfig:
    """The configuration with a learning rate: its own, or SGD's 0.1 lowered for small batches and short runs.

    Proportional to the batch below 128 (linear scaling, Goyal et al. 2017), and to the square root of the number of
    steps below 800: the warm-up of a shorter run has too few steps to reach 0.1 without divergence.

    Raises:
        UserError: no learning rate, and the optimizer is not SGD.
    """
    if config.lr is not None:
        return config
    if config.name != "sgd":
        raise UserError(
            f"optimizer.lr: got null with optimizer.name={config.name}, expected a number (a rule: sgd only)"
        )
    lr = FULL_RATE * min(1.0, batch_size / FULL_RATE_BATCH) * min(1.0, math.sqrt(total_steps / FULL_RATE_STEPS))
    return replace(config, lr=lr)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a configuration (rate settled) over a model's trainable parameters, in two groups by decay."""
    assert config.lr is not None
    groups = decay_groups(model, config)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return adam(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def decay_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """Parameter groups; one-dimensional parameters (normalization, biases) lose their decay where configured."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    without = [p for p in parameters if p.dim() <= 1 and not config.decay_norm_and_bias]
    ids = {id(p) for p in without}
    decayed = [p for p in parameters if id(p) not in ids]
    groups = [(decayed, config.weight_decay), (without, 0.0)]
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def with_saved_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's own settings with the state of a checkpoint, as its `load_state_dict` takes them.

    Raises:
        Harmful: the state does not fit the optimizer or its parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = saved.get("state")
    if not isinstance(state, Mapping) or not all(type(i) is int and 0 <= i < len(parameters) for i in state):
        raise Harmful("the optimizer's state has not one entry a parameter")
    for index, values in state.items():
        like = {name: _state_like(name, parameters[index]) for name in STATE[type(optimizer)]}
        require_like(values, like, f"optimizer.state.{index}")
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _state_like(name: str, parameter: Tensor) -> Tensor:
    return torch.empty(() if name == "step" else parameter.shape, device="meta", dtype=torch.float32)


@torch.no_grad()
def l2_loss(model: nn.Module) -> float:
    """Half the sum of squares of all trainable parameters (the paper's L2 loss, section 3.2), without the decay."""
    norms = [torch.linalg.vector_norm(p, dtype=torch.float32) for p in model.parameters() if p.requires_grad]
    return float(torch.stack(norms).double().square().sum() / 2)
