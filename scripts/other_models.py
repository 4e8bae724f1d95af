"""The table of other people's models: what of each follows the recipe, whether one batch is learned, what it saves.

Needs the extra `models` (timm, transformers). Weights are random, sizes small, nothing is downloaded:

    python scripts/other_models.py results/cpu/models.md [NAME ...]
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro import MasterWeights, StepContext, inject, load_recipe, sensitivity
from fp8repro.tabular import markdown
from fp8repro.training.memory import counting_saved_bytes

RECIPE = load_recipe("fp8")
SCALE = 1024.0
LEAST_STEPS, MOST_STEPS, RATE = 4, 250, 1e-3
# A drop under this is looked into.
ENOUGH = 0.9
CLASSES, VOCABULARY = 10, 64
Loss = Callable[[nn.Module, Any], Tensor]


def classified(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of an image's, a sequence's or each token's class."""
    out = model(batch[0])
    out = out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out["out"]
    return F.cross_entropy(out, batch[1])


def returned(model: nn.Module, batch: Any) -> Tensor:
    """What a model of transformers returns as its loss."""
    loss: Tensor = model(**batch).loss
    return loss


def images(size: int, channels: int = 3, *frames: int) -> Any:
    """Images (or four videos) and their classes."""
    count = 4 if frames else 8
    return torch.randn(count, channels, *frames, size, size), torch.arange(count) % CLASSES


def tokens(length: int = 12) -> dict[str, Tensor]:
    """Sequences that are to be repeated."""
    ids = torch.randint(4, VOCABULARY, (4, length))
    return {"input_ids": ids, "labels": ids}


class Tagger(nn.Module):
    """Packed sequences through torch's recurrent layers; a class for each sequence."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        """Two layers, both directions."""
        super().__init__()
        self.layer = kind(24, 32, num_layers=2, bidirectional=True, batch_first=True, **options)
        self.head = nn.Linear(2 * options.get("proj_size", 32), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences [B, T, 24], of which the later ones are shorter."""
        lengths = torch.arange(len(x), 0, -1) + x.shape[1] - len(x)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        result: Tensor = self.head(out.mean(1))
        return result


class Translator(nn.Module):
    """torch's own Transformer between an embedding and a projection."""

    def __init__(self) -> None:
        """Two layers each."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.model = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, T] -> logits [B, V, T]."""
        x = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        result: Tensor = self.head(self.model(x, x, tgt_mask=mask)).transpose(1, 2)
        return result


class UNet(nn.Sequential):
    """Down by convolutions, up by transposed ones; a class for each pixel."""

    def __init__(self) -> None:
        """Two levels."""
        down = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 2, stride=2), nn.ReLU())
        up = (nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ReLU(), nn.Conv2d(16, CLASSES, 1))
        super().__init__(*down, *up)


def torchvision_models() -> Iterator[tuple[str, Callable[[], nn.Module], Any, Loss]]:
    """Of torchvision: convolutions, attention, shifted windows, video."""
    from torchvision import models as tv
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from torchvision.models.swin_transformer import SwinTransformer

    yield "torchvision ResNet-18", lambda: tv.resnet18(num_classes=CLASSES), images(32), classified
    yield "torchvision MobileNetV3", lambda: tv.mobilenet_v3_small(num_classes=CLASSES), images(64), classified
    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)]
    yield "torchvision ConvNeXt", lambda: ConvNeXt(blocks, num_classes=CLASSES), images(32), classified
    yield "torchvision DenseNet", lambda: tv.DenseNet(8, (2, 2), 16, num_classes=CLASSES), images(32), classified
    yield (
        "torchvision ViT",
        lambda: tv.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=CLASSES),
        images(32),
        classified,
    )
    swin = ([4, 4], 16, [2, 2], [2, 2], [4, 4])
    yield "torchvision Swin", lambda: SwinTransformer(*swin, num_classes=CLASSES), images(32), classified
    yield "torchvision R3D-18", lambda: tv.video.r3d_18(num_classes=CLASSES), images(16, 3, 4), classified


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module], Any, Loss]]:
    """Of timm: standardized weights, mixers, attention in its own words."""
    import timm

    def make(name: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: timm.create_model(name, num_classes=CLASSES, **options)

    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
    yield "timm ViT", make("vit_tiny_patch16_224", **small, num_heads=4), images(32), classified
    mixer = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2, "num_classes": CLASSES}
    yield "timm MLP-Mixer", lambda: timm.models.mlp_mixer.MlpMixer(**mixer), images(32), classified
    yield "timm NF-ResNet-26", make("nf_resnet26"), images(32), classified
    yield "timm PVTv2-B0", make("pvt_v2_b0", depths=(1, 1, 1, 1)), images(64), classified


def transformers_models() -> Iterator[tuple[str, Callable[[], nn.Module], Any, Loss]]:
    """Of transformers: its Conv1D, rotary and relative positions, experts, speech."""
    import transformers as hf

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    words = {"vocab_size": VOCABULARY, **size}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    gpt2 = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **ends)
    yield "transformers GPT-2", lambda: hf.GPT2LMHeadModel(gpt2), tokens(), returned
    bert = hf.BertConfig(**words)
    yield "transformers BERT", lambda: hf.BertForMaskedLM(bert), tokens(), returned
    llama = hf.LlamaConfig(**words, num_key_value_heads=2)
    yield "transformers Llama", lambda: hf.LlamaForCausalLM(llama), tokens(), returned
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5 = hf.T5Config(vocab_size=VOCABULARY, **shape, decoder_start_token_id=0)
    yield "transformers T5", lambda: hf.T5ForConditionalGeneration(t5), tokens(), returned
    wav = hf.Wav2Vec2Config(
        **size, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, num_labels=CLASSES, classifier_proj_size=32,
        layerdrop=0, apply_spec_augment=False,
    )  # fmt: skip
    sound = (torch.randn(4, 400), torch.tensor([1, 3, 5, 7]))
    yield "transformers Wav2Vec2", lambda: hf.Wav2Vec2ForSequenceClassification(wav), sound, classified


def torch_models() -> Iterator[tuple[str, Callable[[], nn.Module], Any, Loss]]:
    """Of torch itself."""
    sequences = (torch.randn(4, 10, 24), torch.tensor([1, 3, 5, 7]))
    yield "torch LSTM, projections", lambda: Tagger(nn.LSTM, proj_size=16), sequences, classified
    yield "torch GRU", lambda: Tagger(nn.GRU), sequences, classified
    ids = torch.randint(4, VOCABULARY, (4, 12))
    yield "torch Transformer", Translator, (ids, ids), classified
    pixels = torch.randn(2, 3, 16, 16)
    yield "torch U-Net", UNet, (pixels, pixels.argmax(1)), classified


@dataclass
class Result:
    """One row.

    Attributes:
        converted, exempt, left: shares of the first pass' multiply-adds.
        exempt_layers, left_products: their names.
        drop: what the loss fell by in FP8, of what it fell by in FP32, in the steps in which FP32's halved.
        steps: how many these are.
        steps_in_fp8: how many FP8 takes; 0 where twice as many and ten are not enough.
        other_drops: the same drop of two more seeds, where it is under `ENOUGH`.
        torch_drop: the same in FP32 but for activations, which `torch.Tensor.to` rounds to E5M2 in hooks; likewise.
        gradient_snr: least signal to noise, in dB, that rounding left in a layer's gradient at step 0.
        median_snr: the layers' median.
        saved: bytes kept for backward, of FP32's.
    """

    name: str
    parameters: int
    converted: float
    exempt: float
    left: float
    exempt_layers: list[str]
    left_products: list[str]
    drop: float
    steps: int
    steps_in_fp8: int
    other_drops: list[float]
    torch_drop: float | None
    gradient_snr: float
    median_snr: float
    saved: float


def prepared(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model without noise of another kind, so that one batch is learned."""
    torch.manual_seed(seed)
    model = make().float()
    for p in model.parameters():
        if p.dim() > 1 and not p.any():
            # A head that starts at zero passes no gradient on.
            nn.init.normal_(p, std=0.02)
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@dataclass
class Exact:
    """FP32's training: losses until they have halved, the rate that takes `LEAST_STEPS` at least, bytes saved."""

    losses: list[float]
    rate: float
    saved: int

    def drop(self, others: list[float]) -> float:
        """What others' loss fell by in as many steps, of what this one did."""
        steps = len(self.losses) - 1
        return (others[0] - others[min(steps, len(others) - 1)]) / (self.losses[0] - self.losses[steps])


def exactly(model: nn.Module, batch: Any, loss: Loss) -> Exact:
    """Train a copy in FP32."""
    rate = RATE
    while True:
        losses, saved = learn(copy.deepcopy(model), batch, loss, None, rate, MOST_STEPS)
        if len(losses) > LEAST_STEPS:
            return Exact(losses, rate, saved)
        rate /= 4


def rounded(x: Tensor) -> Tensor:
    """E5M2 values by torch's own cast; the gradient passes."""
    return x + (x.detach().to(torch.float8_e5m2).float() - x.detach())


def with_rounded_activations(model: nn.Module, leave: list[str]) -> nn.Module:
    """A copy whose layers round what goes in and comes out, by nothing of ours."""
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) and name not in leave:
            layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
            layer.register_forward_hook(lambda _, inputs, output: rounded(output))
    return model


def measured(title: str, make: Callable[[], nn.Module], batch: Any, loss: Loss) -> Result:
    """Both trainings of a model, and what its first step shows."""
    model = prepared(make, 0)
    found = sensitivity(model, batch, RECIPE, loss=loss, scale=SCALE)
    exact = exactly(model, batch, loss)
    converted = copy.deepcopy(model)
    report = inject(converted, RECIPE, StepContext(0))
    most = 2 * len(exact.losses) + 8
    in_fp8, saved = learn(converted, batch, loss, RECIPE, exact.rate, most)
    drop, other_drops, torch_drop = exact.drop(in_fp8), [], None
    if drop < ENOUGH:
        for seed in (1, 2):
            other = prepared(make, seed)
            right = exactly(other, batch, loss)
            inject(other, RECIPE, StepContext(seed))
            other_drops.append(right.drop(learn(other, batch, loss, RECIPE, right.rate, most)[0]))
        by_torch = with_rounded_activations(model, report.names("exempt"))
        torch_drop = exact.drop(learn(by_torch, batch, loss, None, exact.rate, most)[0])
    gradients = [row.snr for row in found.rows if row.role == "gradient" and not math.isnan(row.snr)]
    return Result(
        title,
        sum(p.numel() for p in model.parameters()),
        *(report.share(status) for status in ("converted", "exempt", "left")),
        report.names("exempt"),
        report.without_owner(),
        drop,
        len(exact.losses) - 1,
        len(in_fp8) - 1 if in_fp8[-1] < in_fp8[0] / 2 else 0,
        other_drops,
        torch_drop,
        min(gradients),
        statistics.median(gradients),
        saved / exact.saved,
    )


def learn(model: nn.Module, batch: Any, loss: Loss, recipe: Any, rate: float, steps: int) -> tuple[list[float], int]:
    """Losses of one batch, before the first step and after each, until they have halved; bytes saved."""
    model.train()
    # As such networks are trained. Adam's first steps take every gradient for as sure as the others.
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=20 * rate, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    masters = None if recipe is None else MasterWeights(model, optimizer, recipe)
    losses: list[float] = []
    total, step, scale = 0, 0, SCALE
    while step <= steps:
        torch.manual_seed(step)
        if masters is not None:
            masters.context.begin(step)
        optimizer.zero_grad()
        with counting_saved_bytes(model, active=not losses) as saved:
            value = loss(model, batch)
        total = total or saved.total()
        losses[step:] = [float(value)]
        if losses[-1] < losses[0] / 2:
            break
        (value * scale).backward()
        if masters is None:
            for p in model.parameters():
                p.grad = None if p.grad is None else p.grad / scale
            optimizer.step()
        elif not masters.step(scale):
            # As a dynamic loss scale does; the step is made again.
            scale /= 2
            continue
        step += 1
    return losses, total


def cells(r: Result) -> list[str]:
    """A row of the Markdown table."""
    names = [*(f"{name} (FP16)" for name in r.exempt_layers), *(f"{what} (FP32)" for what in r.left_products)]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    shares = [f"{100 * share:.1f}" for share in (r.converted, r.exempt, r.left)]
    halved = f"{r.steps}, {r.steps_in_fp8 or f'over {2 * r.steps + 10}'}"
    others = ", ".join(f"{drop:.2f}" for drop in r.other_drops)
    by_torch = "" if r.torch_drop is None else f"{r.torch_drop:.2f}"
    snr = f"{r.gradient_snr:.1f}, {r.median_snr:.1f}"
    figures = [f"{r.drop:.2f}", others, by_torch, halved, snr, f"{r.saved:.2f}"]
    return [r.name, f"{r.parameters:,}", *shares, *figures, shown]


HEADER = (
    *("model", "parameters", "in FP8, %", "exempt, %", "left, %", "loss' drop, of FP32's", "of two more seeds"),
    *("of activations rounded by torch", "steps to half, FP32, FP8", "gradient SNR, dB: least, median"),
    *("kept for backward, of FP32's", "not in FP8"),
)


def main(arguments: list[str]) -> None:
    """Measure all models, or those whose names contain one of the words, and write the table and its numbers."""
    path, words = Path(arguments[0]), arguments[1:]
    results = []
    for family in (torchvision_models, timm_models, transformers_models, torch_models):
        torch.manual_seed(0)
        # All batches are drawn before a training sets the seed.
        for name, make, batch, loss in list(family()):
            if words and not any(word in name for word in words):
                continue
            start = time.monotonic()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(measured(name, make, batch, loss))
            print(" | ".join(cells(results[-1])), f"| {time.monotonic() - start:.0f} s", flush=True)
    path.with_suffix(".json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")
    path.write_text(markdown(HEADER, [cells(r) for r in results]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
