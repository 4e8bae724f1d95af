"""Finds weights that functions use behind their layers' backs: such a product is not rounded, whatever a report says.

A model's first forward pass is watched, and only that one. Nothing here may change what a pass computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fp8repro.errors import UserError
from fp8repro.precision.layers import MasterEmbedding
from fp8repro.precision.site import Site

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    (
        *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d),
        *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.multi_head_attention_forward),
        *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.einsum, torch.tensordot),
        *(torch.addmm, torch.addbmm, torch.baddbmm, torch.addmv, torch.inner, torch.chain_matmul),
        *(torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot),
        *(Tensor.addmm, Tensor.addbmm, Tensor.baddbmm, Tensor.addmv, Tensor.inner),
    )
)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(global_hooks, f"_global{name}") for name in _HOOKS]


def has_hooks(parts: Sequence[nn.Module]) -> bool:
    """True where somebody may look at the tensors in or between parts; who watches a first pass sees functions only."""
    if any(_GLOBAL_HOOKS):
        return True
    modules = (module for part in parts for module in part.modules())
    hooks = (hook for module in modules for name in _HOOKS for hook in getattr(module, name).values())
    return not all(isinstance(getattr(hook, "__self__", None), FirstPass) for hook in hooks)


def watch_first_pass(model: nn.Module) -> None:
    """Watch the first forward pass of a converted model, and of its parts where they are called by themselves.

    The pass ends in a UserError where a function multiplied by the weight of a converted layer, or by one that is
    stored in 16 bit, or where `DistributedDataParallel` holds parameters in 16 bit.
    """
    hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    if not any(isinstance(owner, FirstPass) and owner.model is model for owner in hooks):
        FirstPass(model).start()


class FirstPass:
    """Hooks around the forward passes of all modules that hold converted layers; each goes after its first pass."""

    def __init__(self, model: nn.Module) -> None:
        """Nothing is hooked yet."""
        self.model: nn.Module | None = model
        self.depth = 0
        self.mode: _Watch | None = None
        self.handles: dict[nn.Module, tuple[RemovableHandle, RemovableHandle]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a part must not bring the whole along: theirs watch nothing."""
        return {"model": None, "depth": 0, "mode": None, "handles": {}}

    def start(self) -> None:
        """Put the hooks."""
        assert self.model is not None
        for module in self.model.modules():
            if any(_watched(part) for part in module.modules() if part is not module):
                before = module.register_forward_pre_hook(self.enter)
                # Called after an error, too, so that the mode is left.
                self.handles[module] = (before, module.register_forward_hook(self.leave, always_call=True))

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Before a module's forward pass."""
        if module not in self.handles or torch.compiler.is_compiling():
            return
        assert self.model is not None
        if self.depth == 0:
            _check_replicas(self.model)
            self.mode = _Watch(_storages(self.model))
            self.mode.__enter__()
        self.depth += 1

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """After it; raises UserError for what was found."""
        if module not in self.handles or torch.compiler.is_compiling() or self.depth == 0:
            return
        self.depth -= 1
        for handle in self.handles.pop(module):
            handle.remove()
        if self.depth or self.mode is None:
            return
        mode, self.mode = self.mode, None
        mode.__exit__(None, None, None)
        if mode.found:
            names = sorted(mode.found)
            some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise UserError(
                f"model: functions multiply by the weights of {some} without calling these layers, which rounds "
                f"nothing; expected inject(..., leave={names[:4]!r}) or calls of the layers"
            )


class _Watch(TorchFunctionMode):
    def __init__(self, storages: Mapping[int, str]) -> None:
        super().__init__()
        self.storages = storages
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args = tuple(self._seen(arg) for arg in args)
            kwargs = {key: self._seen(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _seen(self, arg: Any) -> Any:
        """The argument; a weight that is found is noted, and FP32, so that the pass goes on and finds all."""
        if isinstance(arg, (list, tuple)):
            return type(arg)(self._seen(part) for part in arg) if type(arg) in (list, tuple) else arg
        name = self.storages.get(_address(arg)) if isinstance(arg, Tensor) else None
        if name is None:
            return arg
        self.found.add(name)
        return arg.float()


def _check_replicas(model: nn.Module) -> None:
    # Its reducer takes gradients in a parameter's own dtype only.
    inside = nn.parallel.DistributedDataParallel._active_ddp_module is not None  # type: ignore[attr-defined]
    if inside and any(p.dtype == torch.float16 and p.requires_grad for p in model.parameters()):
        raise UserError(
            "DistributedDataParallel: got master weights in 16 bit, whose gradients are FP32, expected "
            "MasterWeights(..., narrow=False)"
        )


def _watched(module: nn.Module) -> bool:
    return isinstance(getattr(module, "site", None), Site) or isinstance(module, MasterEmbedding)


def _storages(model: nn.Module) -> dict[int, str]:
    """Where the weights lie whose layers alone may multiply by them, and the names of those."""
    found = {_address(weight): name for name, weight in _weights(model)}
    return {address: name for address, name in found.items() if address}


def _address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 where it has none of its own (meta, fake and wrapped tensors)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _weights(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        site = getattr(module, "site", None)
        # A weight that no recipe rounds reaches products as it is, its own layer's too.
        rounds = isinstance(site, Site) and not site.roles["weight"].is_identity
        if rounds or (isinstance(module, MasterEmbedding) and weight.dtype != torch.float32):
            yield name, weight
