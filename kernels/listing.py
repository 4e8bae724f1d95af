"""Lists the kernels that Triton would compile for a GPU, from work on the meta device; compiles them without a GPU.

Triton's just-in-time compiler finds each kernel itself, up to the compilation: what is compiled here is what a run
finds in Triton's cache. Must never compute: nothing is launched, and what the host reads are zeros.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import get_cache_invalidating_env_vars, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager


@dataclass(frozen=True)
class Gpu:
    """What kernels depend on: compute capability and number of multiprocessors, by which tiles are chosen."""

    capability: tuple[int, int]
    processors: int

    @property
    def number(self) -> int:
        """The capability as one number, 90 for sm_90."""
        return 10 * self.capability[0] + self.capability[1]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel to be: what Triton's compiler takes, in a form that another process can read.

    Attributes:
        module, name: of the function.
        signature, constants, attributes: see `ASTSource`.
        options: of the backend.
        number: compute capability, 90 for sm_90.
    """

    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    number: int

    def _source(self) -> ASTSource:
        function = getattr(import_module(self.module), self.name)
        return ASTSource(function, self.signature, self.constants, self.attributes)

    def cache_key(self) -> str:
        """What Triton's cache knows it by, before hashing."""
        backend = make_backend(GPUTarget("cuda", self.number, 32))
        options = backend.parse_options(dict(self.options))
        return str(get_cache_key(self._source(), backend, options, get_cache_invalidating_env_vars()))

    def is_compiled(self) -> bool:
        """Whether Triton's cache has it, whole."""
        manager = get_cache_manager(hashlib.sha256(self.cache_key().encode()).hexdigest())
        return bool(manager.get_group(f"{self.name[:150]}.json"))

    def compile(self) -> None:
        """Put it into Triton's cache, which holds it whole or not at all."""
        triton.compile(self._source(), target=GPUTarget("cuda", self.number, 32), options=dict(self.options))


class _Driver:
    """Stands for the GPU's driver where the compiler asks for the device."""

    def __init__(self, number: int) -> None:
        self._target = GPUTarget("cuda", number, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(gpu: Gpu, found: Callable[[Kernel], None]) -> None:
    """Send meta tensors to the kernels as if they lay on the GPU, and give each kernel once, when it is first launched.

    Holds until the process ends, and for all modules that are imported: call it in a process that does nothing else.
    """
    from fp8repro.engines import guards, quantizer
    from fp8repro.kernels import backend, ops
    from fp8repro.kernels.norm import operators  # noqa: F401 (its names are replaced below)
    from fp8repro.kernels.optimizer import launch as updates  # noqa: F401
    from fp8repro.kernels.quantize.launch import round_into
    from fp8repro.kernels.shared import launch as launches

    def record(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> object:
        function = source.fn
        given = (source.signature, source.constants, source.attrs, options)
        found(Kernel(function.__module__, function.__name__, *given, target.arch))
        return object()

    def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
        if 0 not in grid:
            kernel.run(*arguments, grid=grid, warmup=True, **options)

    triton.runtime.driver.set_active(_Driver(gpu.number))
    triton.compiler.compile = record
    torch.cuda.get_device_capability = lambda device=None: gpu.capability  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(  # type: ignore[assignment,return-value]
        major=gpu.capability[0], minor=gpu.capability[1], multi_processor_count=gpu.processors
    )
    _replace(
        {
            guards.plain: lambda *_: True,
            guards.untraced: lambda *_: True,
            guards.address: lambda _: 0,
            launches.check_device: lambda *_: None,
            launches.launch: launch,
            backend.available: lambda _: None,
            quantizer._torch_round_into: round_into,
            quantizer._round_both_layouts: ops.transpose_engine,
        }
    )


def _replace(functions: dict[Callable[..., Any], Callable[..., Any]]) -> None:
    """Put other functions in the place of some, and of operators the functions that they are made of, in all modules.

    Operators would give meta tensors without a launch.
    """
    for name, module in list(sys.modules.items()):
        if not name.startswith("fp8repro."):
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, torch.library.CustomOpDef):
                setattr(module, attribute, value._init_fn)
            elif callable(value) and getattr(value, "__hash__", None) and value in functions:
                setattr(module, attribute, functions[value])


class HostReadsZeros(TorchDispatchMode):
    """Inside, what the host reads of the device is zero, and so is new memory: no update is held for not finite."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if function is aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        if function is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function is aten.bincount.default and args[0].is_meta:
            # Of telemetry, which counts exponents: as many counts as it asks for.
            return torch.empty((args[1:] or [kwargs["minlength"]])[-1], dtype=torch.int64, device="meta")
        result = function(*args, **kwargs)
        if function is aten.empty.memory_format and not result.is_meta:
            return result.zero_()
        return result
