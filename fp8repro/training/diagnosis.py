"""Where a run went wrong: repeats a step that was skipped and names the first tensor in it that is not finite.

It must leave weights, normalization statistics and random numbers as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from fp8repro.precision.injection import sites
from fp8repro.precision.telemetry import Telemetry


class FirstNonfinite:
    """Watches a model; `found` is the first tensor that was not finite: layer and role, in the recipe's words."""

    def __init__(self) -> None:
        """Nothing is found yet."""
        self.found: dict[str, str] | None = None

    def look(self, layer: str, role: str, value: Any) -> None:
        """Note a tensor if it is the first that is not finite."""
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        for tensor in tensors:
            if self.found is None and isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
                self.found = {"layer": layer, "role": role}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Check weights now; inside, outputs of layers in the forward pass and their errors in the backward pass."""
        for name, parameter in model.named_parameters():
            self.look(name.rpartition(".")[0] or name, "weight", parameter)
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if not any(module.children()):
                    before, after = self._hooks(name)
                    hooks.callback(module.register_forward_pre_hook(before).remove)
                    hooks.callback(module.register_forward_hook(after).remove)
            yield
        for name, parameter in model.named_parameters():
            self.look(name.rpartition(".")[0] or name, "gradient", parameter.grad)

    def _hooks(self, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Hooks before and after a layer's forward pass; both check the errors of the backward pass there."""

        def watch(tensor: Any) -> Any:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                # A view: the tensor may be the input of other layers too, with their own errors.
                tensor = tensor.view_as(tensor)
                tensor.register_hook(lambda grad: self.look(name, "error", grad))
            return tensor

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(watch(x) for x in inputs)

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            self.look(name, "activation", output)
            return watch(output)

        return before, after


def diagnose(model: nn.Module, telemetry: Telemetry, repeat: Callable[[], object]) -> dict[str, Any]:
    """Repeat a step, and say where it was not finite first.

    Args:
        model: the run's.
        telemetry: of the run; counts the repeated step alone, and forgets what was measured before.
        repeat: forward and backward of the step, without an update.

    Returns:
        `first` (layer and role, or None) and the telemetry `rows`.
    """
    watcher = FirstNonfinite()
    model.zero_grad(set_to_none=True)
    telemetry.measure()
    for site in sites(model).values():
        # So that weights are rounded again, and counted.
        site.forget_weight()
    with watcher.watching(model):
        repeat()
    telemetry.active = False
    model.zero_grad(set_to_none=True)
    return {"first": watcher.found, "rows": telemetry.rows()}
