"""GNMT v2 (NVIDIA's form): LSTM encoder and decoder with normalized Bahdanau attention, by layers of own LSTM cells.

The gates' products are nn.Linear modules. Nothing here may know of precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8repro.errors import UserError
from fp8repro.fields import build_dataclass
from fp8repro.models.parts import MatMul, RepeatedLinear, as_bytes


@dataclass(frozen=True)
class GNMTConfig:
    """Dimensions; the defaults are NVIDIA's GNMT v2, `layers=8` is the depth of the paper (section 4).

    `init_range` is r of the weights' U(-r, r). At width 1,024 it is 0.1; a narrow model needs about 3.2 / sqrt(width),
    or its signals fade from layer to layer and the attention does not form.
    """

    vocab_size: int
    pad: int = 1
    eos: int = 2
    layers: int = 4
    width: int = 1024
    dropout: float = 0.2
    init_range: float = 0.1

    def __post_init__(self) -> None:
        """Raise UserError for dimensions that make no model."""
        for name, least in (("vocab_size", 1), ("layers", 2), ("width", 1)):
            if getattr(self, name) < least:
                raise UserError(f"model.size.{name}: got {getattr(self, name)}, expected at least {least}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.size.dropout: got {self.dropout}, expected a number from 0 to under 1")
        if not 0 < self.init_range < math.inf:
            raise UserError(f"model.size.init_range: got {self.init_range}, expected a number over 0")


class LSTMCell(torch.autograd.Function):
    """Element-wise part of an LSTM cell; an own backward pass, because autograd's takes three times the calls."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Gates before activation [B, 4h] in torch.nn.LSTM's order, cell [B, h] -> hidden, cell."""
        width = cell.shape[-1]
        activated = torch.sigmoid(gates)
        i, f, g, o = activated.split(width, dim=-1)
        torch.tanh(gates.narrow(-1, 2 * width, width), out=g)
        new_cell = torch.addcmul(f * cell, i, g)
        squashed = torch.tanh(new_cell)
        ctx.save_for_backward(activated, cell, squashed)
        return o * squashed, new_cell

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gates and cell."""
        grad_hidden, grad_cell = grads
        activated, cell, squashed = ctx.saved_tensors
        width = cell.shape[-1]
        i, f, g, o = activated.split(width, dim=-1)
        grad_cell = torch.addcmul(grad_cell, grad_hidden * o, 1 - squashed * squashed)
        result = torch.empty_like(activated)
        d_i, d_f, d_g, d_o = result.split(width, dim=-1)
        torch.mul(grad_cell, g, out=d_i)
        torch.mul(grad_cell, cell, out=d_f)
        torch.mul(grad_cell, i, out=d_g)
        torch.mul(grad_hidden, squashed, out=d_o)
        slope = activated * (1 - activated)
        torch.addcmul(torch.ones_like(g), g, g, value=-1, out=slope.narrow(-1, 2 * width, width))
        return result.mul_(slope), grad_cell * f


class LSTMLayer(nn.Module):
    """One LSTM layer over a sequence: one product for the inputs of all steps, one recurrent product per step.

    Attributes:
        input_gates: Linear to the four gates (input, forget, cell, output, as torch.nn.LSTM), with bias.
        hidden_gates: Linear from the previous hidden state to the four gates, with a bias that starts at zero.
    """

    def __init__(self, input_width: int, width: int, init_range: float = 0.1) -> None:
        """Weights and input bias U(-init_range, init_range), hidden bias 0."""
        super().__init__()
        self.width = width
        self.input_gates = nn.Linear(input_width, 4 * width)
        self.hidden_gates = RepeatedLinear(width, 4 * width)
        for parameter in (self.input_gates.weight, self.input_gates.bias, self.hidden_gates.weight):
            nn.init.uniform_(parameter, -init_range, init_range)
        nn.init.zeros_(self.hidden_gates.bias)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Inputs [T, B, input_width], state (hidden, cell) [B, width] each, zero by default.

        Returns:
            Hidden states [T, B, width] and the state after the last step.
        """
        if state is None:
            zeros = x.new_zeros(x.shape[1], self.width)
            state = (zeros, zeros)
        hidden, cell = state
        outputs = []
        hidden_gates = self.hidden_gates.repeated()
        for gates in self.input_gates(x).unbind(0):
            # Under autocast the products are narrower than the state, which must not lose precision from step to step.
            total = (gates + hidden_gates(hidden)).to(cell.dtype)
            hidden, cell = self.cell(total, cell)
            outputs.append(hidden)
        return torch.stack(outputs), (hidden, cell)

    def cell(self, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """The element-wise part of a step: gates before activation [B, 4 * width], cell [B, width] -> hidden, cell."""
        hidden, new_cell = LSTMCell.apply(gates, cell)
        return hidden, new_cell


class BidirectionalLSTM(nn.Module):
    """Two LSTM layers, one of them from each sequence's last token to its first."""

    def __init__(self, input_width: int, width: int, init_range: float = 0.1) -> None:
        """`width` is that of one direction."""
        super().__init__()
        self.forward_layer = LSTMLayer(input_width, width, init_range)
        self.backward_layer = LSTMLayer(input_width, width, init_range)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Inputs [T, B, input_width] padded on the right, lengths [B] -> [T, B, 2 * width].

        Outputs at padding are arbitrary; those at tokens do not depend on padding.
        """
        reversed_x = reverse_sequences(x, lengths)
        backward = reverse_sequences(self.backward_layer(reversed_x)[0], lengths)
        return torch.cat([self.forward_layer(x)[0], backward], dim=-1)


def reverse_sequences(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse the first `lengths[b]` steps of each sequence in [T, B, width]; the rest stays where it is."""
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    mirrored = lengths.unsqueeze(0) - 1 - steps
    index = torch.where(mirrored >= 0, mirrored, steps)
    return x.gather(0, index.unsqueeze(-1).expand_as(x))


class BahdanauAttention(nn.Module):
    """Normalized Bahdanau attention: score = tanh(W_q q + W_k k + b) . (g v / |v|)."""

    def __init__(self, width: int, init_range: float = 0.1) -> None:
        """W_q, W_k and v start in U(-init_range, init_range), g at 1/sqrt(width), b at 0."""
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.vector = nn.Parameter(torch.empty(width))
        self.gain = nn.Parameter(torch.tensor(width**-0.5))
        self.bias = nn.Parameter(torch.zeros(width))
        self.score = MatMul()
        self.context = MatMul()
        for parameter in (self.query.weight, self.key.weight, self.vector):
            nn.init.uniform_(parameter, -init_range, init_range)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: [B, T, width].
            keys: projected encoder outputs (`self.key`) [B, S, width].
            values: encoder outputs [B, S, width], or what `context.keep` gave for them.
            masked: bool [B, 1, S], True at padding.

        Returns:
            Contexts [B, T, width] and attention weights [B, T, S].
        """
        combined = self.query(query).unsqueeze(2) + (keys + self.bias).unsqueeze(1)
        direction = self.vector * (self.gain / self.vector.norm())
        scores = self.score(torch.tanh(combined).flatten(0, 2), direction.to(combined.dtype).unsqueeze(1))
        scores = scores.view(combined.shape[:3]).masked_fill(masked, -torch.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).type_as(query)
        return self.context(weights, values), weights


@dataclass
class GNMTState:
    """Rows under decoding: encoder outputs [R, S, width] as the attention keeps them, their projection, their padding,
    and the states of the decoder's layers.
    """

    values: Tensor
    keys: Tensor
    masked: Tensor
    layers: list[tuple[Tensor, Tensor] | None]

    def select(self, rows: Tensor) -> None:
        """Keep (repeat, reorder) rows."""
        self.values = as_bytes(self.values).index_select(0, rows).view(self.values.dtype)
        self.keys = self.keys.index_select(0, rows)
        self.masked = self.masked.index_select(0, rows)
        self.layers = [s and (s[0].index_select(0, rows), s[1].index_select(0, rows)) for s in self.layers]

    def fixed(self, capacity: int) -> FixedGNMTState:
        """The same rows in memory that stays (`parts.FixedState`); any number of tokens has room."""
        rows, _, width = self.keys.shape
        own = [(self.keys.new_zeros(rows, width), self.keys.new_zeros(rows, width)) for _ in self.layers]
        return FixedGNMTState(self.values, self.keys, self.masked, [*own], own)


@dataclass
class FixedGNMTState(GNMTState):
    """As `GNMTState`, in memory that stays: `own` is where the layers' states lie between two steps."""

    own: list[tuple[Tensor, Tensor]]

    def restart(self, state: GNMTState) -> None:
        """See `parts.FixedState`."""
        as_bytes(self.values).copy_(as_bytes(state.values))
        self.keys.copy_(state.keys)
        self.masked.copy_(state.masked)
        for part in (part for layer in self.own for part in layer):
            part.zero_()

    def settle(self, rows: Tensor | None) -> None:
        """See `parts.FixedState`."""
        for own, fed in zip(self.own, self.layers, strict=True):
            assert fed is not None
            for part, new in zip(own, fed, strict=True):
                part.copy_(new if rows is None else new.index_select(0, rows))
        self.layers = [*self.own]


class GNMTEncoder(nn.Module):
    """Bidirectional first layer, then unidirectional ones, residual from the third on."""

    def __init__(self, config: GNMTConfig) -> None:
        """The embedding belongs to the model, for the decoder shares it."""
        super().__init__()
        width, init_range = config.width, config.init_range
        self.bidirectional = BidirectionalLSTM(width, width, init_range)
        widths = [2 * width] + [width] * (config.layers - 2)
        self.layers = nn.ModuleList([LSTMLayer(input_width, width, init_range) for input_width in widths])
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Embedded source [S, B, width], lengths [B] -> [S, B, width]."""
        x = self.bidirectional(self.dropout(x), lengths)
        x = self.layers[0](self.dropout(x))[0]
        for layer in self.layers[1:]:
            x = x + layer(self.dropout(x))[0]
        return x


class GNMTDecoder(nn.Module):
    """LSTM layers of which the first queries the attention; its context enters every later one; residual from third."""

    def __init__(self, config: GNMTConfig) -> None:
        """Layers, attention and classifier; the embedding belongs to the model."""
        super().__init__()
        width, init_range = config.width, config.init_range
        self.attention = BahdanauAttention(width, init_range)
        widths = [width] + [2 * width] * (config.layers - 1)
        self.layers = nn.ModuleList([LSTMLayer(input_width, width, init_range) for input_width in widths])
        self.classifier = nn.Linear(width, config.vocab_size)
        nn.init.uniform_(self.classifier.weight, -init_range, init_range)
        nn.init.uniform_(self.classifier.bias, -init_range, init_range)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: GNMTState) -> tuple[Tensor, Tensor]:
        """Embedded tokens [T, B, width] that follow those fed before -> logits [B, T, V], attention [B, T, S]."""
        x, state.layers[0] = self.layers[0](self.dropout(x), state.layers[0])
        context, weights = self.attention(x.transpose(0, 1), state.keys, state.values, state.masked)
        context = context.transpose(0, 1)
        for index, layer in enumerate(self.layers[1:], start=1):
            inputs = self.dropout(torch.cat([x, context], dim=-1))
            output, state.layers[index] = layer(inputs, state.layers[index])
            x = output if index == 1 else output + x
        return self.classifier(x.transpose(0, 1)), weights


class GNMT(nn.Module):
    """Encoder-decoder with one embedding for source and target, and a classifier of its own."""

    def __init__(self, config: GNMTConfig) -> None:
        """Embeddings are U(-init_range, init_range) with a zero row for padding."""
        super().__init__()
        self.config = config
        self.pad, self.eos = config.pad, config.eos
        self.embedding = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad)
        nn.init.uniform_(self.embedding.weight, -config.init_range, config.init_range)
        nn.init.zeros_(self.embedding.weight[config.pad])
        self.encoder = GNMTEncoder(config)
        self.decoder = GNMTDecoder(config)

    def begin(self, source: Tensor) -> GNMTState:
        """Encode source ids [B, S], padded on the right, and project them for the attention once."""
        padding = source.eq(self.pad)
        lengths = source.shape[1] - padding.sum(1)
        values = self.encoder(self.embedding(source.t()), lengths).transpose(0, 1)
        keys = self.decoder.attention.key(values)
        return GNMTState(
            self.decoder.attention.context.keep(values), keys, padding.unsqueeze(1), [None] * self.config.layers
        )

    def forward(self, source: Tensor, decoder_input: Tensor) -> Tensor:
        """Source ids [B, S] and decoder input ids [B, T] (EOS first), padded on the right -> logits [B, T, V]."""
        return self.decoder(self.embedding(decoder_input.t()), self.begin(source))[0]

    def step(self, tokens: Tensor, state: GNMTState) -> tuple[Tensor, Tensor]:
        """Feed one token per row [R]; gives next-token logits [R, V] and attention [R, S]."""
        logits, weights = self.decoder(self.embedding(tokens.unsqueeze(0)), state)
        return logits.squeeze(1), weights.squeeze(1)


def gnmt(vocab_size: int, pad: int = 1, eos: int = 2, **size: Any) -> GNMT:
    """NVIDIA's GNMT v2 with 4 layers, or another size by the fields of `GNMTConfig`.

    Raises:
        UserError: a dimension that is unknown, of a wrong type, or makes no model.
    """
    config: GNMTConfig = build_dataclass(GNMTConfig, size, "model.size", vocab_size=vocab_size, pad=pad, eos=eos)
    return GNMT(config)
