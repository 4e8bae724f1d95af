"""Rounds the weights of a model's layers at the beginning of a pass, in a few launches instead of one for each.

Which rounding, and whose stream, is the layers' affair (site.py); what is rounded here are the bytes that they would
round themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp8repro.engines.guards import plain
from fp8repro.engines.products import Operand
from fp8repro.numerics.streams import StreamTable
from fp8repro.precision.injection import context_of
from fp8repro.precision.layers import FP8Conv2d, FP8Linear
from fp8repro.precision.site import Site

if TYPE_CHECKING:
    from fp8repro.kernels.quantize.grouped import Job, Launch


class GroupedWeights:
    """The weights of a model's linear layers and convolutions on a GPU, a launch for each format and kind of layout.

    Codes stay in the same memory from pass to pass, and so do the tables of addresses: a captured graph can repeat it.
    Layers with scales, on CPUs, in evaluation or measured by telemetry round their weights themselves.
    """

    def __init__(self, model: nn.Module, streams: StreamTable | None = None) -> None:
        """Nothing is rounded yet.

        Args:
            model: after `inject`.
            streams: where the caller keeps the streams of a pass; by default they are written before each.
        """
        self._layers = [module for module in model.modules() if isinstance(module, (FP8Linear, FP8Conv2d))]
        self._context = context_of(model)
        self._streams, self._own_streams = streams, streams is None
        self._state: Any = None
        self._launches: list[Launch] = []
        self._rounded: list[tuple[Site, Tensor, Job]] = []

    def round(self) -> None:
        """Round all weights for the `StepContext.fixed_weights` block that is open; once in a block.

        The weights are read now: whatever wrote to them before is seen. Comes right after `StepContext.begin`.
        """
        context = self._context
        if context is None or context.scope is None or context.telemetry.active:
            return
        weights = [(layer, weight) for layer in self._layers if (weight := _weight(layer)) is not None]
        missing = [site for site in (layer.site for layer, _ in weights) if not site.has_weight(context.scope)]
        # A loop that begins no steps counts passes, which name other streams than those of a step.
        if not missing or any(context.weight_call(site.name) for site in missing):
            return
        state = [(layer.site, layer.site.roles["weight"], w.data_ptr(), w.dtype, w.stride()) for layer, w in weights]
        if state != self._state:
            self._prepare(weights)
            self._state = state
        if self._own_streams and self._streams is not None and len(self._streams):
            self._streams.refresh(context.stream_number)
        for launch in self._launches:
            launch.run()
        for site, weight, job in self._rounded:
            # A new one, because a backend keeps with it what it made of the codes.
            site.keep_weight(weight, Operand(job.codes, job.how.format, transposed=job.transposed))

    def _prepare(self, weights: list[tuple[FP8Linear | FP8Conv2d, Tensor]]) -> None:
        from fp8repro.kernels.quantize import grouped

        assert self._context is not None
        self._rounded = []
        for layer, weight in weights:
            if not grouped.takes(weight, layer.site.order):
                continue
            if self._streams is None:
                self._streams = StreamTable(weight.device, capacity=len(self._layers))
            self._rounded.append((layer.site, weight, self._job(layer, weight.detach())))
        self._launches = grouped.prepare([job for *_, job in self._rounded], self._context.seed)

    def _job(self, layer: FP8Linear | FP8Conv2d, weight: Tensor) -> Job:
        """As `Site.operand` lays it out for a layer in training."""
        from fp8repro.kernels.quantize.grouped import Job

        site, how = layer.site, layer.site.roles["weight"]
        assert self._streams is not None
        stream = self._streams.slot((site.name, 0, "weight", "weight")) if how.is_stochastic else None
        codes, transposed = torch.empty_like(weight, dtype=how.format.dtype), None
        if isinstance(layer, FP8Linear) and weight.is_contiguous() and site.backend.wants_transposed(how.format):
            transposed = torch.empty(weight.t().shape, dtype=how.format.dtype, device=weight.device)
        return Job(weight, how, codes, transposed, stream, site.order)


def _weight(layer: FP8Linear | FP8Conv2d) -> Tensor | None:
    """A layer's weight, where the grouped kernels round as the layer would."""
    weight, site = layer._parameters.get("weight"), layer.site
    how = site.roles["weight"]
    if weight is None or not layer.training or not reachable(weight) or not plain(weight):
        return None
    fmt = how.format
    if how.is_identity or how.scaling != "none" or fmt.dtype is None or (fmt.is_fp8 and weight.dtype == fmt.dtype):
        return None
    # Other backends want values beside the codes.
    return weight if site.backend.value_dtype(fmt) is None else None


def reachable(weight: Tensor) -> bool:
    """Whether Triton's kernels round a weight: on a GPU."""
    return weight.is_cuda
