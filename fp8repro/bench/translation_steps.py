"""Training steps of the Transformer (base and big) and of GNMT in FP8 beside BF16, eager and compiled.

GNMT in BF16 has torch's LSTM, by cuDNN, which is what people train.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro.bench.gpu import Bench
from fp8repro.bench.steps import BF16, COMPILED, FP8, GRAPHED, Workload, measure
from fp8repro.models.gnmt import LSTMLayer, gnmt
from fp8repro.models.transformer import transformer

# WMT16's with joint subwords, as NVIDIA's GNMT has it.
VOCABULARY, PAD, EOS = 32320, 1, 2
# Maker, dimensions, and tokens of a sentence; 128 sentences a batch.
MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], int]] = {
    "Transformer base (512)": (transformer, {}, 32),
    "Transformer big (1,024)": (transformer, {"width": 1024, "ffn_width": 4096, "heads": 16}, 32),
    "GNMT (1,024)": (gnmt, {}, 48),
}
SENTENCES = 128
SMALL: dict[Callable[..., nn.Module], dict[str, Any]] = {
    transformer: {"width": 16, "ffn_width": 16, "heads": 1, "encoder_layers": 1, "decoder_layers": 1},
    gnmt: {"width": 16, "layers": 2},
}


class TranslationWorkload(Workload):
    """A translation model and a batch without padding."""

    def __init__(self, title: str, bench: Bench) -> None:
        """`title` is a key of `MODELS`."""
        super().__init__(bench)
        # An eager step compiles nothing, FP8 its kernels, the compiler a graph; a CPU interprets kernels.
        self.seconds = {BF16: 20.0, COMPILED: 75.0, GRAPHED: 55.0}
        self.title = title
        self.make, size, tokens = MODELS[title]
        self.size = SMALL[self.make] if self.small else size
        rows, tokens, self.words = (2, 2, 32) if self.small else (SENTENCES, tokens, VOCABULARY)
        self.shape, self.tokens = f"{rows} x {tokens} tokens", rows * tokens
        generator = torch.Generator().manual_seed(0)
        given = torch.randint(3, self.words, (3, rows, tokens), generator=generator).to(self.device)
        self.batch = tuple(given)

    def model(self) -> nn.Module:
        """See `Workload`."""
        return self.make(self.words, PAD, EOS, **self.size).to(self.device)

    def rival(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """With torch's LSTM and, on a GPU, Adam in one launch."""
        model, cuda = with_torchs_lstm(self.model()).to(self.device), self.device.type == "cuda"
        return model, torch.optim.Adam(model.parameters(), 1e-4, fused=cuda or None, capturable=cuda)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """See `Workload`."""
        source, decoder_input, target = batch
        logits = model(source, decoder_input)
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(model.parameters(), 1e-4)


class TorchsLayer(nn.Module):
    """`LSTMLayer` by torch's LSTM, which is cuDNN's on a GPU, with the same weights."""

    def __init__(self, layer: LSTMLayer) -> None:
        """Copies the weights."""
        super().__init__()
        inner, hidden = layer.input_gates, layer.hidden_gates
        self.lstm = nn.LSTM(inner.in_features, layer.width)
        with torch.no_grad():
            for own, given in zip(
                self.lstm.parameters(), (inner.weight, hidden.weight, inner.bias, hidden.bias), strict=True
            ):
                own.copy_(given)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `LSTMLayer`."""
        outputs, (hidden, cell) = self.lstm(x, state and (state[0].unsqueeze(0), state[1].unsqueeze(0)))
        return outputs, (hidden.squeeze(0), cell.squeeze(0))


def with_torchs_lstm(model: nn.Module) -> nn.Module:
    """A model with torch's LSTM in place of ours, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LSTMLayer):
                setattr(module, name, TorchsLayer(child))
    return model


def measure_translation_step(title: str, bench: Bench) -> None:
    """FP8 beside BF16 autocast, eager and compiled, all in turns.

    Raises:
        RunFailure: see `steps.measure`.
    """
    # A CPU has no graph.
    fp8 = GRAPHED if bench.device.type == "cuda" else FP8
    measure(bench, TranslationWorkload(title, bench), [BF16, COMPILED, fp8], [BF16, COMPILED])


STEPS: dict[str, Callable[[Bench], None]] = {
    name: partial(measure_translation_step, title)
    for name, title in zip(("base step", "big step", "gnmt step"), MODELS, strict=True)
}
