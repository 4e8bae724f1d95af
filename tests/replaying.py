"""Steps with and without CUDA graphs, and what stands in for graphs where there is no GPU.

Kernels run in Triton's interpreter, and for a graph the same Python runs again, on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from fp8repro.data.translation.synthetic import synthetic_corpus
from fp8repro.engines import quantizer
from fp8repro.kernels import ops
from fp8repro.kernels.quantize.launch import round_into
from fp8repro.precision import graphs, grouped_weights
from fp8repro.precision.context import StepContext
from fp8repro.precision.graphs import GraphedStep, why_not_captured, why_not_graphed
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.precision.telemetry import Telemetry
from fp8repro.settings.choices import compose_group
from fp8repro.settings.recipes import load_recipe
from fp8repro.settings.schema import LossScalingConfig, run_config
from fp8repro.training import replays
from fp8repro.training.tasks import decode_graphs

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SCALE = 1024.0
SIZES = {
    "transformer": {"width": 8, "ffn_width": 8, "heads": 1, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.1},
    "gnmt": {"width": 8, "layers": 2, "init_range": 0.4, "dropout": 0.1},
}


def stand_in_for_a_gpu(patch: Callable[[Any, str, Any], None]) -> None:
    """Replace, by `patch(object, name, value)`, what a CPU lacks; a replay finds its streams and numbers in memory."""
    patch(quantizer.native, "available", lambda: False)
    patch(quantizer, "_torch_round_into", round_into)
    patch(quantizer, "_round_both_layouts", ops.transpose_engine)
    patch(grouped_weights, "reachable", lambda weight: True)
    patch(graphs, "capture", capture)
    for module in (graphs, replays):
        patch(module, "why_not_graphed", partial(reason_other_than_the_device, why_not_graphed))
    patch(decode_graphs, "capture", capture)
    patch(decode_graphs, "why_not_captured", partial(reason_other_than_the_device, why_not_captured))
    patch(torch.cuda, "mem_get_info", lambda device: (1, 1))


def capture(run: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """What a replay does is what was captured; gradients lie where those of the capture did."""
    run()
    step = run.__self__ if isinstance(run.__self__, GraphedStep) else None
    if step is None:
        return run
    own = step._gradients

    def replay() -> None:
        run()
        for target, gradient in zip(own, step._gradients, strict=True):
            if target is not None:
                target.copy_(gradient)
        step._gradients = own

    return replay


def reason_other_than_the_device(reason_of: Callable[[nn.Module], str | None], model: nn.Module) -> str | None:
    reason = reason_of(model)
    return None if reason is not None and reason.endswith("need a GPU") else reason


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def resnet():
    """Two stages, the second strided; no pooling, whose gradient torch adds by atomics."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 5)
    return model.to(memory_format=torch.channels_last), (2, 3, 12, 12)


def linear():
    layers = nn.Linear(24, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 5)
    return nn.Sequential(*layers), (6, 24)


class Trained:
    """A converted model with masters and an optimizer."""

    def __init__(self, build, recipe="fp8", telemetry=0, optimizer=None):
        torch.manual_seed(0)
        model, self.shape = build()
        self.model = model.to(DEVICE)
        recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
        self.context = StepContext(seed=3, telemetry=Telemetry(telemetry))
        inject(self.model, recipe, self.context, "triton")
        parameters = self.model.parameters()
        self.optimizer = optimizer(parameters) if optimizer else torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        self.masters = MasterWeights(self.model, self.optimizer, recipe)

    def batch(self, step):
        return draw(*self.shape, seed=step), torch.arange(self.shape[0]) % 5

    def loss_of(self, x, labels):
        logits = self.model(x)
        return F.cross_entropy(logits, labels), {"hits": (logits.detach().argmax(1) == labels).sum()}

    def eager(self, batch, scale=SCALE):
        loss, figures = self.loss_of(*(t.to(DEVICE) for t in batch))
        (loss * scale).backward()
        return loss.detach(), figures

    def gradients(self):
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}


class Fed:
    """What `Small` keeps of rows under decoding."""

    def __init__(self, mean):
        self.mean = mean

    def select(self, rows):
        self.mean = self.mean.index_select(0, rows)


class Small(nn.Module):
    """A translation model of two products, whose steps the interpreter makes in parts of a second."""

    def __init__(self, words, pad, eos, **_):
        super().__init__()
        self.pad, self.eos = pad, eos
        self.embedding = nn.Embedding(words, 8, padding_idx=pad)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, words)
        self.norm, self.dropout = nn.LayerNorm(8), nn.Dropout(0.1)

    def begin(self, source):
        present = source.ne(self.pad).unsqueeze(-1)
        return Fed((self.first(self.embedding(source)) * present).sum(1) / present.sum(1))

    def step(self, tokens, state):
        return self(None, tokens.unsqueeze(1), state).squeeze(1), None

    def forward(self, source, decoder_input, state=None):
        state = state or self.begin(source)
        return self.last(self.norm(self.dropout(self.embedding(decoder_input)) + state.mean.unsqueeze(1)))


def translation_config(text, run_dir, model="transformer", **trainer):
    values = {
        "model": {"name": model, "task": "translation", "size": SIZES.get(model, {})},
        "data": {"name": "parallel_text", "root": str(text), "options": {"bpe_merges": 200}},
        "precision": compose_group("precision", "fp8"),
        "optimizer": {"name": "adam", "lr": 1e-2, "weight_decay": 0.0, "betas": [0.9, 0.98]},
        "schedule": {"name": "cosine", "warmup": 0.1},
        "decode": {"max_length_a": 0.0, "max_length_b": 2, "beam": 1},
        "trainer": {"epochs": 2, "batch_size": 32, "label_smoothing": 0.1, "log_every": 1}
        | {"eval_every_epochs": 2, "checkpoint_every_minutes": None}
        | trainer,
        "logger": "none",
        "device": "cpu",
        "run_dir": str(run_dir),
        "backend": "triton",
    }
    # The first steps overflow, and later ones again.
    scaling = LossScalingConfig("dynamic", scale=2.0**22, window=3, factor=2.0**6)
    return replace(run_config(values), loss_scaling=scaling)


def write_text(folder):
    """Parallel text whose training sentences make batches of five shapes."""
    for split, pairs in synthetic_corpus(train=8, valid=1, test=1, max_words=6).items():
        for side, language in enumerate(("en", "de")):
            (folder / f"{split}.{language}").write_text("".join(f"{p[side]}\n" for p in pairs), encoding="utf-8")
    return folder


def assert_same(given, expected):
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name
