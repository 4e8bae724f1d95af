"""fairseq's own TransformerModel, so that it trains and translates like ours; needs the extra `fp8repro[fairseq]`.

Its weights, arithmetic and initialization are fairseq's. Nothing here may know of precision.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fp8repro.errors import UserError
from fp8repro.fields import build_dataclass
from fp8repro.models.transformer import TransformerConfig


@dataclass
class FairseqState:
    """Rows under decoding: fairseq's encoder output and incremental state, and the tokens fed [R, t]."""

    model: nn.Module
    encoder_out: dict[str, list[Tensor]]
    incremental: dict[str, dict[str, Tensor | None]]
    tokens: Tensor

    def select(self, rows: Tensor) -> None:
        """Keep (repeat, reorder) rows."""
        self.encoder_out = self.model.encoder.reorder_encoder_out(self.encoder_out, rows)  # type: ignore[union-attr,operator]
        # Not by fairseq's own method, which leaves the attention to the source alone where the number of rows stays.
        for cache in self.incremental.values():
            cache.update({name: v.index_select(0, rows) for name, v in cache.items() if v is not None})
        self.tokens = self.tokens.index_select(0, rows)


class FairseqTransformer(nn.Module):
    """fairseq's `TransformerModel` (transformer_wmt_en_de) behind the interface of our models.

    Its projections are nn.Linear modules. Its attention products are calls of functions inside fairseq's code.
    """

    def __init__(self, config: TransformerConfig) -> None:
        """Build fairseq's model of the same dimensions as ours.

        Raises:
            UserError: fairseq is missing, or it has no such model.
        """
        super().__init__()
        if (config.pad, config.eos) != (1, 2):
            raise UserError(f"model.size: got pad={config.pad} and eos={config.eos}, expected fairseq's 1 and 2")
        if not config.tie_output:
            raise UserError("model.size.tie_output: got False, expected True (fairseq shares all embeddings or none)")
        self.config = config
        self.pad, self.eos = config.pad, config.eos
        self.model = _build(config)
        for module in self.model.modules():
            # Otherwise fairseq hands the projections' weights to torch's fused attention and never calls the layers.
            if hasattr(module, "_set_skip_embed_dim_check"):
                module._set_skip_embed_dim_check()  # type: ignore[operator]

    def forward(self, source: Tensor, decoder_input: Tensor) -> Tensor:
        """Source ids [B, S] and decoder input ids [B, T] (EOS first, padded on the right) -> logits [B, T, V]."""
        logits: Tensor = self.model(source, source.ne(self.pad).sum(1), decoder_input, return_all_hiddens=False)[0]
        return logits

    def begin(self, source: Tensor) -> FairseqState:
        """Encode source ids [B, S]."""
        encoder_out = self.model.encoder(source, src_lengths=source.ne(self.pad).sum(1))  # type: ignore[operator]
        return FairseqState(self.model, encoder_out, {}, source.new_empty(len(source), 0))

    def step(self, tokens: Tensor, state: FairseqState) -> tuple[Tensor, None]:
        """Feed one token per row [R]; gives next-token logits [R, V] and no attention."""
        state.tokens = torch.cat([state.tokens, tokens.unsqueeze(1)], dim=1)
        logits = self.model.decoder(  # type: ignore[operator]
            state.tokens, encoder_out=state.encoder_out, incremental_state=state.incremental
        )[0]
        return logits[:, -1], None


def fairseq_transformer(vocab_size: int, pad: int = 1, eos: int = 2, **size: Any) -> FairseqTransformer:
    """fairseq's model of the base size, or another size by the fields of `TransformerConfig`.

    Raises:
        UserError: fairseq is missing, or a dimension is unknown, of a wrong type, or makes no model.
    """
    config: TransformerConfig = build_dataclass(
        TransformerConfig, size, "model.size", vocab_size=vocab_size, pad=pad, eos=eos
    )
    return FairseqTransformer(config)


def _build(config: TransformerConfig) -> nn.Module:
    transformer = _import_fairseq("fairseq.models.transformer")
    dictionary = _import_fairseq("fairseq.data").Dictionary()
    # Only the size and the special ids of the dictionary matter to the model.
    for index in range(config.vocab_size - len(dictionary)):
        dictionary.add_symbol(str(index))
    if len(dictionary) != config.vocab_size:
        raise UserError(f"model: got a vocabulary of {config.vocab_size}, expected fairseq's special tokens in it")
    cfg = transformer.TransformerConfig()
    for side, layers in ((cfg.encoder, config.encoder_layers), (cfg.decoder, config.decoder_layers)):
        side.embed_dim, side.ffn_embed_dim = config.width, config.ffn_width
        side.layers, side.attention_heads = layers, config.heads
    cfg.decoder.input_dim = cfg.decoder.output_dim = config.width
    cfg.dropout, cfg.attention_dropout = config.dropout, config.attention_dropout
    cfg.activation_dropout = config.activation_dropout
    cfg.share_all_embeddings = True
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = transformer.TransformerModelBase.build_model(cfg, task)
    return model


def _import_fairseq(name: str) -> Any:
    """A module of fairseq, without what its import prints."""
    from importlib import import_module

    handlers, threshold = list(logging.root.handlers), logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    except ImportError as error:
        raise UserError(
            f"model: fairseq cannot be imported ({error}), expected it for model=fairseq_transformer: "
            "pip install 'fp8repro[fairseq]'"
        ) from None
    finally:
        logging.disable(threshold)
        # One of fairseq's modules configures the root logger when it is imported.
        for handler in set(logging.root.handlers) - set(handlers):
            logging.root.removeHandler(handler)
