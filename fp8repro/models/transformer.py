"""Transformer of `transformer_wmt_en_de` (fairseq's base architecture, post-norm), and fairseq's checkpoints.

Parameter names are fairseq's. Nothing here may know of precision: projections are nn.Linear, products are modules.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8repro.errors import UserError
from fp8repro.fields import build_dataclass
from fp8repro.models.parts import AttentionProduct, SinusoidalPositions, as_bytes, attention_mask


@dataclass(frozen=True)
class TransformerConfig:
    """Dimensions; the defaults are the base model (6+6 layers; paper, section 4)."""

    vocab_size: int
    pad: int = 1
    eos: int = 2
    encoder_layers: int = 6
    decoder_layers: int = 6
    width: int = 512
    ffn_width: int = 2048
    heads: int = 8
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    tie_output: bool = True

    def __post_init__(self) -> None:
        """Raise UserError for dimensions that make no model."""
        for name in ("vocab_size", "encoder_layers", "decoder_layers", "width", "ffn_width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.size.{name}: got {getattr(self, name)}, expected a whole number over 0")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.size.{name}: got {getattr(self, name)}, expected a number from 0 to under 1")
        if self.width % (2 * self.heads) or self.width < 4:
            raise UserError(f"model.size.width: got {self.width}, expected a multiple of 2 * heads = {2 * self.heads}")


@dataclass
class LayerCache:
    """Keys and values [R, heads, length, d] of one decoder layer, as its products keep them."""

    cross_key: Tensor
    cross_value: Tensor
    key: Tensor | None = None
    value: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        """Keep (repeat, reorder) rows."""
        for name, value in vars(self).items():
            if value is not None:
                setattr(self, name, as_bytes(value).index_select(0, rows).view(value.dtype))

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of more tokens [R, heads, T, d] -> all there are [R, heads, length, d]."""
        if self.key is not None and self.value is not None:
            key, value = _joined(self.key, key), _joined(self.value, value)
        self.key, self.value = key, value
        return key, value


def _joined(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([as_bytes(first), as_bytes(second)], dim=2).view(first.dtype)


@dataclass
class FixedCache(LayerCache):
    """A cache with room for `capacity` tokens, the next of which goes to `position`, int64 [1]; one token at a time."""

    position: Tensor = field(kw_only=True)
    capacity: int = field(kw_only=True)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerCache`; gives the whole room, with zeros where nothing was fed yet."""
        if self.key is None or self.value is None:
            self.key, self.value = self._room(key), self._room(value)
        for room, fed in ((self.key, key), (self.value, value)):
            as_bytes(room).index_copy_(2, self.position, as_bytes(fed))
        return self.key, self.value

    def _room(self, fed: Tensor) -> Tensor:
        rows, heads, _, depth = fed.shape
        return as_bytes(fed).new_zeros(rows, heads, self.capacity, depth).view(fed.dtype)

    def restart(self, cache: LayerCache) -> None:
        """Take another batch's attention to the source; nothing was fed."""
        for own, given in ((self.cross_key, cache.cross_key), (self.cross_value, cache.cross_value)):
            as_bytes(own).copy_(as_bytes(given))
        # What is masked is multiplied by zero, which an old infinity would survive.
        for room in (self.key, self.value):
            if room is not None:
                as_bytes(room).zero_()

    def reorder(self, rows: Tensor) -> None:
        """Reorder rows of what was fed, in place."""
        for room in (self.key, self.value):
            if room is not None:
                as_bytes(room).copy_(as_bytes(room).index_select(0, rows))


@dataclass
class TransformerState:
    """Rows under decoding: the caches of each layer, the source's mask [R, 1, 1, S], the number of tokens fed."""

    source_mask: Tensor
    layers: list[LayerCache]
    length: int = field(default=0)

    def select(self, rows: Tensor) -> None:
        """Keep (repeat, reorder) rows of every cache."""
        self.source_mask = self.source_mask.index_select(0, rows)
        for cache in self.layers:
            cache.select(rows)

    def place(self, tokens: Tensor, positions: SinusoidalPositions) -> tuple[Tensor, Tensor | None]:
        """Position embeddings [B, T, width] of tokens to be fed, and what to add to their scores."""
        steps = tokens.shape[1]
        if self.length == 0:
            embedded = positions(tokens)
        else:
            first = positions.pad + 1 + self.length
            embedded = positions.at(torch.arange(first, first + steps, device=tokens.device))
        mask = None
        if steps > 1:
            mask = attention_mask(torch.ones(steps, steps, dtype=torch.bool, device=tokens.device).triu(1))
        return embedded, mask

    def advance(self, steps: int) -> None:
        """Note that so many tokens were fed."""
        self.length += steps

    def fixed(self, capacity: int) -> FixedTransformerState:
        """The same rows in memory that stays (`parts.FixedState`), with room for `capacity` tokens."""
        position = torch.zeros(1, dtype=torch.int64, device=self.source_mask.device)
        caches = [FixedCache(c.cross_key, c.cross_value, position=position, capacity=capacity) for c in self.layers]
        return FixedTransformerState(self.source_mask, caches, position)


@dataclass
class FixedTransformerState:
    """As `TransformerState`, in memory that stays; the number of tokens fed is on the device: `position`, int64 [1]."""

    source_mask: Tensor
    layers: list[FixedCache]
    position: Tensor

    def place(self, tokens: Tensor, positions: SinusoidalPositions) -> tuple[Tensor, Tensor]:
        """See `TransformerState`; what nothing was fed to yet is forbidden."""
        room = torch.arange(self.layers[0].capacity, device=tokens.device)
        return positions.at(positions.pad + 1 + self.position), attention_mask(room > self.position)

    def advance(self, steps: int) -> None:
        """See `TransformerState`."""
        self.position.add_(steps)

    def restart(self, state: TransformerState) -> None:
        """See `parts.FixedState`."""
        self.source_mask.copy_(state.source_mask)
        for own, given in zip(self.layers, state.layers, strict=True):
            own.restart(given)
        self.position.zero_()

    def settle(self, rows: Tensor | None) -> None:
        """See `parts.FixedState`."""
        if rows is not None:
            for cache in self.layers:
                cache.reorder(rows)


class MultiheadAttention(nn.Module):
    """Multi-head attention: four projections around an `AttentionProduct`."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Initialize as fairseq: query, key and value Xavier with gain 1/sqrt(2), output Xavier with zero bias."""
        super().__init__()
        self.heads = heads
        self.scaling = (width // heads) ** -0.5
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.product = AttentionProduct(dropout)
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def split(self, x: Tensor) -> Tensor:
        """[T, B, width] -> [B, heads, T, width / heads], a view that the products take without a copy."""
        return x.unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project [S, B, width] to keys and values, each [B, heads, S, d], as the products keep them."""
        return self.product.keep(self.split(self.k_proj(x)), self.split(self.v_proj(x)))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Queries from x [T, B, width]; keys and values [B, heads, S, d]; result [T, B, width]."""
        query = self.split(self.q_proj(x) * self.scaling)
        context = self.product(query, key, value, mask)
        return self.out_proj(context.permute(2, 0, 1, 3).flatten(2))


class Layer(nn.Module):
    """What encoder and decoder layers share: self-attention's parameters and the feed-forward part; post-norm."""

    def __init__(self, config: TransformerConfig) -> None:
        """The linear layers keep torch's own initialization, as in fairseq."""
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)
        self.self_attn = MultiheadAttention(config.width, config.heads, config.attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def feed_forward(self, x: Tensor) -> Tensor:
        """fc1, ReLU, fc2, residual, normalization: [T, B, width] -> [T, B, width]."""
        hidden = self.activation_dropout(torch.relu(self.fc1(x)))
        return self.final_layer_norm(x + self.dropout(self.fc2(hidden)))


class EncoderLayer(Layer):
    """Self-attention and feed-forward, each with residual, then normalization (post-norm)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[S, B, width] -> [S, B, width]."""
        attended = self.self_attn(x, *self.self_attn.keys_and_values(x), mask)
        return self.feed_forward(self.self_attn_layer_norm(x + self.dropout(attended)))


class DecoderLayer(Layer):
    """Self-attention, attention to the encoder, feed-forward; post-norm."""

    def __init__(self, config: TransformerConfig) -> None:
        """One layer of the given dimensions."""
        super().__init__(config)
        self.encoder_attn = MultiheadAttention(config.width, config.heads, config.attention_dropout)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.width)

    def cache(self, encoded: Tensor) -> LayerCache:
        """What a decoder that feeds this layer keeps, from the encoder's output [S, B, width]."""
        return LayerCache(*self.encoder_attn.keys_and_values(encoded))

    def forward(self, x: Tensor, cache: LayerCache, source_mask: Tensor, mask: Tensor | None) -> Tensor:
        """[T, B, width] -> [T, B, width]; appends x's keys and values to the cache, then attends to all of it."""
        key, value = cache.append(*self.self_attn.keys_and_values(x))
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(x, key, value, mask)))
        attended = self.encoder_attn(x, cache.cross_key, cache.cross_value, source_mask)
        return self.feed_forward(self.encoder_attn_layer_norm(x + self.dropout(attended)))


class Encoder(nn.Module):
    """Embedding, positions and the encoder layers."""

    def __init__(self, config: TransformerConfig, embedding: nn.Embedding, positions: SinusoidalPositions) -> None:
        """`embedding` is shared with the decoder."""
        super().__init__()
        self.embed_tokens = embedding
        self.positions = positions
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.encoder_layers)])

    def forward(self, source: Tensor, source_mask: Tensor) -> Tensor:
        """Ids [B, S], mask [B, 1, 1, S] -> [S, B, width]."""
        embedded = math.sqrt(self.embed_tokens.embedding_dim) * self.embed_tokens(source)
        x = self.dropout(embedded + self.positions(source)).transpose(0, 1).contiguous()
        for layer in self.layers:
            x = layer(x, source_mask)
        return x


class Decoder(nn.Module):
    """Embedding, positions, the decoder layers and the output projection."""

    def __init__(self, config: TransformerConfig, embedding: nn.Embedding, positions: SinusoidalPositions) -> None:
        """`embedding` is shared with the encoder, and with the output projection unless `tie_output` is off."""
        super().__init__()
        self.embed_tokens = embedding
        self.positions = positions
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.decoder_layers)])
        self.output_projection = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_output:
            self.output_projection.weight = embedding.weight
        else:
            nn.init.normal_(self.output_projection.weight, std=config.width**-0.5)

    def forward(self, tokens: Tensor, state: TransformerState | FixedTransformerState) -> Tensor:
        """Ids [B, T] that follow those fed before -> logits [B, T, V]; T > 1 only as the first call on a state."""
        positions, mask = state.place(tokens, self.positions)
        embedded = math.sqrt(self.embed_tokens.embedding_dim) * self.embed_tokens(tokens)
        x = self.dropout(embedded + positions).transpose(0, 1).contiguous()
        for layer, cache in zip(self.layers, state.layers, strict=True):
            x = layer(x, cache, state.source_mask, mask)
        state.advance(tokens.shape[1])
        return self.output_projection(x.transpose(0, 1))


class Transformer(nn.Module):
    """Encoder-decoder with one embedding for source, target and (by default) output."""

    def __init__(self, config: TransformerConfig) -> None:
        """Embeddings are N(0, 1/width) with a zero row for padding."""
        super().__init__()
        self.config = config
        self.pad, self.eos = config.pad, config.eos
        embedding = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad)
        nn.init.normal_(embedding.weight, std=config.width**-0.5)
        nn.init.zeros_(embedding.weight[config.pad])
        positions = SinusoidalPositions(config.width, config.pad)
        self.encoder = Encoder(config, embedding, positions)
        self.decoder = Decoder(config, embedding, positions)

    def begin(self, source: Tensor) -> TransformerState:
        """Encode source ids [B, S], padded on either side, and project them for every decoder layer once."""
        source_mask = attention_mask(source.eq(self.pad)[:, None, None, :])
        encoded = self.encoder(source, source_mask)
        caches = []
        for layer in self.decoder.layers:
            assert isinstance(layer, DecoderLayer)
            caches.append(layer.cache(encoded))
        return TransformerState(source_mask, caches)

    def forward(self, source: Tensor, decoder_input: Tensor) -> Tensor:
        """Source ids [B, S] and decoder input ids [B, T] (EOS first, padded on the right) -> logits [B, T, V]."""
        return self.decoder(decoder_input, self.begin(source))

    def step(self, tokens: Tensor, state: TransformerState | FixedTransformerState) -> tuple[Tensor, None]:
        """Feed one token per row [R]; gives next-token logits [R, V] and no attention."""
        return self.decoder(tokens.unsqueeze(1), state).squeeze(1), None


def transformer(vocab_size: int, pad: int = 1, eos: int = 2, **size: Any) -> Transformer:
    """The base model, or another size by the fields of `TransformerConfig`.

    Raises:
        UserError: a dimension that is unknown, of a wrong type, or makes no model.
    """
    config: TransformerConfig = build_dataclass(
        TransformerConfig, size, "model.size", vocab_size=vocab_size, pad=pad, eos=eos
    )
    return Transformer(config)


def upgrade_fairseq_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the weights of any fairseq version since 2018 to today's names.

    Splits fused input projections (order query, key, value), names `layer_norms.N`, drops `version` and
    `_float_tensor` buffers, and adds a missing output projection from the embedding.
    """
    norms = {
        "encoder": ("self_attn_layer_norm", "final_layer_norm"),
        "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    }
    upgraded: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith((".version", "._float_tensor")):
            continue
        if name.endswith((".in_proj_weight", ".in_proj_bias")):
            stem, _, kind = name.rpartition(".in_proj_")
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                upgraded[f"{stem}.{projection}.{kind}"] = part.clone()
            continue
        old_norm = re.fullmatch(r"((encoder|decoder)\.layers\.\d+)\.layer_norms\.(\d)\.(weight|bias)", name)
        if old_norm:
            layer, stack, index, kind = old_norm.groups()
            name = f"{layer}.{norms[stack][int(index)]}.{kind}"
        upgraded[name] = value
    if "encoder.embed_tokens.weight" in upgraded:
        upgraded.setdefault("decoder.embed_tokens.weight", upgraded["encoder.embed_tokens.weight"])
    if "decoder.embed_out" in upgraded:
        upgraded["decoder.output_projection.weight"] = upgraded.pop("decoder.embed_out")
    elif "decoder.embed_tokens.weight" in upgraded:
        upgraded.setdefault("decoder.output_projection.weight", upgraded["decoder.embed_tokens.weight"])
    return upgraded


def load_fairseq_checkpoint(path: str | Path, model: Transformer) -> None:
    """Load a fairseq checkpoint (2018 layout or later) into a model of the same dimensions.

    Raises:
        UserError: the file cannot be read, holds no fairseq model, or was made with other dimensions.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint: cannot read {str(path)!r} ({reason}), expected a fairseq checkpoint") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise UserError(f"checkpoint: {str(path)!r} has no entry 'model', expected a fairseq checkpoint")
    _check_architecture(checkpoint, model.config)
    given = upgrade_fairseq_state(checkpoint["model"])
    expected = model.state_dict()
    for name in [*expected, *given]:
        if name not in given or name not in expected:
            where = "missing in the checkpoint" if name not in given else "unknown to this model"
            raise UserError(f"checkpoint: {name} is {where}, expected the same architecture")
        if given[name].shape != expected[name].shape:
            raise UserError(
                f"checkpoint: {name} has shape {list(given[name].shape)}, expected {list(expected[name].shape)}"
            )
    model.load_state_dict({name: value.to(torch.float32) for name, value in given.items()})


def _check_architecture(checkpoint: Mapping[str, Any], config: TransformerConfig) -> None:
    """What the weights' shapes do not show: number of heads and place of the normalization."""
    settings: Any = checkpoint.get("args")
    if settings is None:
        cfg = checkpoint.get("cfg")
        settings = cfg.get("model") if isinstance(cfg, Mapping) else None
    values = settings if isinstance(settings, Mapping) else vars(settings) if settings is not None else {}
    for stack in ("encoder", "decoder"):
        heads = values.get(f"{stack}_attention_heads", config.heads)
        if heads != config.heads:
            raise UserError(f"model.size.heads: got {config.heads}, expected {heads} as in the checkpoint")
        if values.get(f"{stack}_normalize_before", False):
            raise UserError("checkpoint: got a pre-norm model, expected a post-norm one (transformer_wmt_en_de)")


def export_fairseq_state(model: Transformer) -> dict[str, Any]:
    """A fairseq checkpoint's content (`torch.save` it): FP32 weights under "model", dimensions under "cfg"."""
    state = {name: value.detach().to("cpu", torch.float32).clone() for name, value in model.state_dict().items()}
    for stack in ("encoder", "decoder"):
        state[f"{stack}.version"] = torch.tensor([3.0])
    config = asdict(model.config)
    settings: dict[str, Any] = {
        "_name": "transformer_wmt_en_de",
        "share_all_embeddings": config["tie_output"],
        "share_decoder_input_output_embed": config["tie_output"],
        "dropout": config["dropout"],
        "attention_dropout": config["attention_dropout"],
        "activation_dropout": config["activation_dropout"],
    }
    for stack in ("encoder", "decoder"):
        settings |= {
            f"{stack}_layers": config[f"{stack}_layers"],
            f"{stack}_embed_dim": config["width"],
            f"{stack}_ffn_embed_dim": config["ffn_width"],
            f"{stack}_attention_heads": config["heads"],
            f"{stack}_normalize_before": False,
        }
    # fairseq looks for the record of an optimizer even where it only reads the weights.
    history = {"optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
    return {
        "args": None,
        "cfg": {"model": settings},
        "model": state,
        "optimizer_history": [history],
        "extra_state": {"train_iterator": None},
    }
