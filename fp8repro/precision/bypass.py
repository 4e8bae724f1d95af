"""Watches a model's first forward pass: counts its products, and finds those that functions compute.

Products by functions in other people's modules are handed to the recipe (functions.py), there and from then on. A
weight that is used behind its layer's back in any other way is an error: it is not rounded, whatever a report says.
Only the first pass is watched. Nothing here may change what a pass computes in any other way.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules import module as global_hooks

from fp8repro.engines.products import Operand
from fp8repro.errors import UserError
from fp8repro.precision.context import StepContext
from fp8repro.precision.convolutions import FP8Convolution
from fp8repro.precision.functions import PRODUCTS, FunctionProducts, multiply_adds
from fp8repro.precision.injection_report import InjectionReport, InjectionRow
from fp8repro.precision.layers import MasterEmbedding
from fp8repro.precision.module_modes import ModuleMode, leave_interrupted
from fp8repro.precision.places import FUNCTION_PRODUCTS, Places
from fp8repro.precision.reruns import callers
from fp8repro.precision.site import Site

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(global_hooks, f"_global{name}") for name in _HOOKS]


def has_hooks(parts: Sequence[nn.Module]) -> bool:
    """True where somebody may look at the tensors in or between parts; who watches a first pass sees functions only."""
    if any(_GLOBAL_HOOKS):
        return True
    modules = (module for part in parts for module in part.modules())
    hooks = (hook for module in modules for name in _HOOKS for hook in getattr(module, name).values())
    return not all(isinstance(getattr(hook, "__self__", None), FirstPass) for hook in hooks)


def is_observed(context: StepContext) -> bool:
    """True where somebody asked to see every product; who watches a first pass is told of them by fused nodes too."""
    return any(not isinstance(getattr(observer, "__self__", None), _Watch) for observer in context.observers)


def watch_first_pass(model: nn.Module, places: Places | None = None, report: InjectionReport | None = None) -> None:
    """Watch the first forward pass of a converted model, and of its parts where they are called by themselves.

    The pass ends in a UserError where a function multiplied by the weight of a converted layer, or by one that is
    stored in 16 bit, and could not be given to the recipe, or where `DistributedDataParallel` holds parameters in 16
    bit.

    Args:
        model: the model.
        places: gives products by functions their places; by default those of the `inject` before.
        report: is told what was counted.
    """
    hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    if not any(isinstance(owner, FirstPass) for owner in hooks):
        FirstPass(model, places or getattr(model, "fp8_places", None), report).start()


class FirstPass:
    """Hooks around the forward passes of all modules; each goes after the first pass in which it was called.

    A pass that ended in an error or an interrupt may have missed products, and does not count.
    """

    def __init__(self, model: nn.Module, places: Places | None, report: InjectionReport | None) -> None:
        """Nothing is hooked yet."""
        self.model: nn.Module | None = model
        self.places, self.report = places, report
        self.mode: _Watch | None = None
        # Modules that may multiply by functions, which torch's own and ours do not.
        kinds = {type(module).__module__ for module in model.modules()}
        self.foreign = places is not None and any(not kind.startswith(("torch.nn.", "fp8repro.")) for kind in kinds)

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a part must not bring the whole along: theirs watch what is called."""
        return {"model": None, "places": self.places, "report": None, "mode": None, "foreign": self.foreign}

    def start(self) -> None:
        """Put the hooks."""
        assert self.model is not None
        for module in self.model.modules():
            # Lists and dictionaries of modules are never called, and would keep the hooks.
            if type(module).forward is nn.Module.forward:
                continue
            module.register_forward_pre_hook(self.enter)
            # Called after an error, too, so that the mode is left.
            module.register_forward_hook(self.leave, always_call=True, with_kwargs=True)

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Before a module's forward pass."""
        if torch.compiler.is_compiling():
            if self.foreign:
                self.compiled()
            return
        if self.mode is not None and self.mode.interrupted():
            leave_interrupted()
            self.stop(self.mode)
        if self.mode is None:
            self.model = self.model or module
            _check_replicas(self.model)
            self.mode = _Watch(self.model, self.places)
            self.mode.begin()
            if self.places is not None:
                self.places.context.observers.append(self.mode.note)
        self.mode.enter(module)

    # A compiler takes the pass as it is: it cannot be watched.
    @_disable_dynamo
    def compiled(self) -> None:
        """Say once that products by functions stay unseen in a compiled first pass."""
        if self.foreign:
            self.foreign = False
            warnings.warn(
                "inject: the first forward pass is compiled, products by functions are neither seen nor rounded in it; "
                "make one without torch.compile before",
                stacklevel=2,
            )

    def stop(self, mode: _Watch) -> None:
        """A pass has ended, one way or another."""
        self.mode = None
        if self.places is not None:
            self.places.context.observers.remove(mode.note)

    def leave(self, module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        """After it; raises UserError for what was found."""
        mode = self.mode
        if torch.compiler.is_compiling() or mode is None or not mode.running:
            return
        mode.leave(inputs or tuple(kwargs.values()), output)
        if mode.running:
            return
        mode.end()
        self.stop(mode)
        if sys.exception() is not mode.handled:
            return
        for seen in mode.seen:
            _unhook(seen, self)
        for products in mode.owners.values():
            products.install()
        if mode.found:
            names = sorted(mode.found)
            some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise UserError(
                f"model: functions multiply by the weights of {some} without calling these layers, which rounds "
                f"nothing; expected inject(..., leave={names[:4]!r}) or calls of the layers"
            )
        if self.report is not None:
            self.report.measured(mode.counted, list(mode.rows()))


def _unhook(module: nn.Module, owner: FirstPass) -> None:
    tables = (
        *(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        *(module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
    )
    gone = [
        key
        for hooks in (tables[0], tables[2])
        for key, hook in hooks.items()
        if getattr(hook, "__self__", None) is owner
    ]
    for table in tables:
        for key in gone:
            table.pop(key, None)


class _Watch(ModuleMode):
    """The running modules, and what they multiply.

    Attributes:
        running: the innermost last; frames: which called them.
        seen: all modules that ran.
        owners: those that multiply by functions.
        found: weights that were multiplied by behind their layers' backs.
        counted: multiply-adds by (layer or module, what multiplied, whether under the recipe).
        handled: the exception in whose handler the pass began, if any; another one at its end has ended it.
        weights: by their ids, the product that first took each weight of another module, and its number of elements.
    """

    def __init__(self, model: nn.Module, places: Places | None) -> None:
        super().__init__()
        self.places, self.model = places, model
        self.names = {module: name for name, module in model.named_modules()}
        self.storages: Mapping[int, str] = _storages(model)
        self.handled = sys.exception()
        self.running: list[nn.Module] = []
        self.frames: list[FrameType] = []
        self.seen: set[nn.Module] = set()
        self.owners: dict[nn.Module, FunctionProducts] = {}
        self.found: set[str] = set()
        self.counted: Counter[tuple[str, str, bool]] = Counter()
        self.weights: dict[int, tuple[str, int]] = {}
        sites = {module: getattr(module, "site", None) for module in self.names}
        self.layers = {site.name: module for module, site in sites.items() if isinstance(site, Site)}

    def enter(self, module: nn.Module) -> None:
        """A module begins."""
        self.running.append(module)
        # That of the one who calls the hooks.
        self.frames.append(sys._getframe(2))
        self.seen.add(module)
        if module in self.owners:
            self.owners[module].counts.append(Counter())

    def leave(self, inputs: Any, output: Any) -> None:
        """The innermost module ends."""
        module = self.running.pop()
        self.frames.pop()
        if module in self.owners:
            self.owners[module].counts.pop()
        count = getattr(module, "multiply_adds", None)
        if isinstance(getattr(module, "site", None), Site) and count is not None and isinstance(output, Tensor):
            self.count(self._name(module), "layer", True, count(inputs, output))

    def count(self, name: str, what: str, converted: bool, number: int) -> None:
        """Add to the multiply-adds of a module."""
        self.counted[name, what, converted] += number

    def note(self, layer: str, product: str, operands: tuple[Operand, ...]) -> None:
        """Count a layer whose product a fused node computed, without calling the layer."""
        module = self.layers.get(layer)
        # Modules that multiply by functions tell of these themselves.
        if product != "forward" or module is None or module in self.running or not _is_ours(self.running[-1]):
            return
        x, weight = (operand.codes.shape for operand in operands)
        if not isinstance(module, FP8Convolution):
            # Rows of a linear layer's weight, columns of a second activation.
            width = weight[0] if isinstance(module, nn.Linear) else weight[-1]
            self.count(self._name(module), "layer", True, math.prod(x) * width)
            return
        padding: Any = module.padding
        options = zip(x[2:], weight[2:], module.stride, padding, module.dilation, strict=True)
        sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in options]
        self.count(self._name(module), "layer", True, x[0] * math.prod(sizes) * math.prod(weight))

    def rows(self) -> Iterable[InjectionRow]:
        """A row of a report for each product by a function that follows the recipe."""
        parameters: Counter[str] = Counter()
        for name, size in self.weights.values():
            parameters[name] += size
        for owner in self.owners.values():
            products = owner.module._modules.get(FUNCTION_PRODUCTS)
            for part, module in () if products is None else products.named_modules():
                site = getattr(module, "site", None)
                if isinstance(site, Site):
                    name = ".".join(filter(None, (owner.name, FUNCTION_PRODUCTS, part)))
                    status = "exempt" if owner.places.is_exempt(site) else "converted"
                    yield InjectionRow(name, type(module).__name__, status, site.formats, parameters[name])

    def _name(self, module: nn.Module) -> str:
        return self.names.get(module) or next((n for n, m in self.model.named_modules() if m is module), "")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or self.interrupted():
            return func(*args, **kwargs)
        innermost = self.running[-1]
        ours = _is_ours(innermost)
        if not ours and self.places is not None:
            result = self._owner(innermost).take(func, args, kwargs, callers(self.frames[-1]) or [])
            if result is not NotImplemented:
                return result
        args = tuple(self._checked(arg) for arg in args)
        kwargs = {key: self._checked(value) for key, value in kwargs.items()}
        with torch._C.DisableTorchFunction():
            result = func(*args, **kwargs)
        if not ours or not isinstance(getattr(innermost, "site", None), Site):
            self.count(self._name(innermost), func.__name__, False, multiply_adds(func, args, kwargs, result))
        return result

    def _owner(self, module: nn.Module) -> FunctionProducts:
        if module not in self.owners:
            assert self.places is not None
            owner = FunctionProducts(module, self._name(module), self.places, self.model)
            owner.counts += [Counter() for running in self.running if running is module]
            owner.tell = self._told
            self.owners[module] = owner
        return self.owners[module]

    def _told(self, name: str, number: int, weight: Tensor | None) -> None:
        self.count(name, "layer", True, number)
        whole = None if weight is None else weight if isinstance(weight, nn.Parameter) else weight._base
        if isinstance(whole, nn.Parameter):
            self.weights.setdefault(id(whole), (name, whole.numel()))

    def _checked(self, arg: Any) -> Any:
        """The argument; a weight that is found is noted, and FP32, so that the pass goes on and finds all."""
        if isinstance(arg, (list, tuple)):
            return type(arg)(self._checked(part) for part in arg) if type(arg) in (list, tuple) else arg
        name = self.storages.get(_address(arg)) if isinstance(arg, Tensor) else None
        if name is None:
            return arg
        self.found.add(name)
        return arg.float() if arg.dtype.itemsize < 4 else arg


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fp8repro.")


def _check_replicas(model: nn.Module) -> None:
    # Its reducer takes gradients in a parameter's own dtype only.
    inside = nn.parallel.DistributedDataParallel._active_ddp_module is not None  # type: ignore[attr-defined]
    if inside and any(p.dtype == torch.float16 and p.requires_grad for p in model.parameters()):
        raise UserError(
            "DistributedDataParallel: got master weights in 16 bit, whose gradients are FP32, expected "
            "MasterWeights(..., narrow=False)"
        )


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
