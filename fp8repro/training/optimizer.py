"""Optimizers by name, with weight decay on all parameters or on products' weights alone."""

from __future__ import annotations

import torch
from torch import nn

from fp8repro.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a configuration over a model's trainable parameters, in two groups by weight decay."""
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


@torch.no_grad()
def l2_loss(model: nn.Module) -> float:
    """Half the sum of squares of all trainable parameters (the paper's L2 loss, section 3.2), without the decay."""
    norms = [torch.linalg.vector_norm(p, dtype=torch.float32) for p in model.parameters() if p.requires_grad]
    return float(torch.stack(norms).double().square().sum() / 2)
