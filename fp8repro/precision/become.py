"""The one place where a module of somebody else's becomes one of ours."""

from __future__ import annotations

from typing import Any

from torch import nn


def become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Let a module compute as another class does, and give it the attributes that this class declares.

    The object stays: an optimizer's parameters, hooks, weights that modules share, and every name that somebody has for
    the module stay valid, which a new module in its place could not promise.
    """
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)
