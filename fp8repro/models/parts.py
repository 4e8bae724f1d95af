"""Small modules that the translation models share: attention products, positions, and the interface of decoding.

Products are modules of their own so that they can be swapped; nothing here may know why somebody would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn


class MatMul(nn.Module):
    """Batched matrix product of two tensors, `a @ b`; a module, so that both operands can be reached from outside."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[..., M, K] @ [..., K, N] -> [..., M, N]."""
        return torch.matmul(a, b)

    def keep(self, b: Tensor) -> Tensor:
        """What may stand for `b`, and for rows and pieces of it, in products to come; for caches of decoders."""
        return b


class RepeatedLinear(nn.Linear):
    """`nn.Linear` that a forward pass calls many times, as a recurrent product is once a time step.

    A type of its own, so that what the calls share (the weight, and the sum of its gradients) can be reached.
    """

    def repeated(self) -> Callable[[Tensor], Tensor]:
        """What stands for the layer in all calls of one forward pass over a sequence."""
        return self


class AttentionProduct(nn.Module):
    """Scaled dot-product attention without the scaling: softmax(q k^T) v, softmax in FP32.

    Attributes:
        scores: the product q k^T.
        context: the product of the attention weights and the values.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        """Dropout is applied to the attention weights."""
        super().__init__()
        self.scores = MatMul()
        self.context = MatMul()
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: [B, heads, T, d], already divided by sqrt(d).
            key: [B, heads, S, d], or what `keep` gave for it.
            value: [B, heads, S, d], likewise.
            mask: broadcastable to [B, heads, T, S]; 0, or -inf where attention is forbidden.

        Returns:
            [B, heads, T, d].
        """
        scores = self.scores(query, key.transpose(-1, -2))
        if mask is not None:
            scores = scores + mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).type_as(query)
        return self.context(self.dropout(weights), value)

    def keep(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `MatMul.keep`."""
        return self.scores.keep(key), self.context.keep(value)


class SinusoidalPositions(nn.Module):
    """Fixed position embeddings: sines in the first half, cosines in the second, positions from `pad + 1` on.

    Padding gets zeros, and positions count the tokens that are no padding, so left and right padding are the same.
    """

    frequencies: Tensor

    def __init__(self, width: int, pad: int) -> None:
        """`width` must be even and at least 4."""
        super().__init__()
        self.pad = pad
        half = width // 2
        exponents = torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1))
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> [B, T, width] in FP32."""
        present = tokens.ne(self.pad)
        positions = present.cumsum(1) * present
        table = self.at(torch.arange(self.pad, self.pad + tokens.shape[1] + 1, device=tokens.device))
        table[0] = 0.0
        return table[positions]

    def at(self, positions: Tensor) -> Tensor:
        """Positions of any shape (counted from `pad + 1`) -> [..., width] in FP32."""
        angles = positions.unsqueeze(-1) * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def as_bytes(t: Tensor) -> Tensor:
    """The same memory; 8-bit floats as uint8, because not every device copies and joins those."""
    return t.view(torch.uint8) if t.element_size() == 1 else t


def attention_mask(forbidden: Tensor) -> Tensor:
    """What to add to scores: -inf where `forbidden` (bool) is True, else 0."""
    return torch.zeros(forbidden.shape, device=forbidden.device).masked_fill(forbidden, -math.inf)


class DecoderState(Protocol):
    """What a model keeps of a batch of rows between two decoding steps."""

    def select(self, rows: Tensor) -> None:
        """Keep (repeat, reorder) rows: int64 indices into the present ones."""
        ...


State = TypeVar("State", bound=DecoderState)


class FixedState(Protocol):
    """Rows under decoding in memory that stays where it is, so that a captured step can be repeated.

    The host knows nothing of where it stands. A state of `TranslationModel.begin` that can become one has a method
    `fixed(capacity)`, which takes the state over and gives it room for so many tokens.
    """

    def restart(self, state: Any) -> None:
        """Take the rows of another batch of the same shape, as `begin` and `select` gave them; nothing is fed yet."""
        ...

    def settle(self, rows: Tensor | None) -> None:
        """After a step: reorder what was fed to the rows, in place.

        Args:
            rows: int64 indices of rows of the same source; None: every row goes on by itself.
        """
        ...


class TranslationModel(Protocol[State]):
    """What decoding asks of a model; rows are hypotheses, one token each a step."""

    pad: int
    eos: int

    def begin(self, source: Tensor) -> State:
        """Encode source ids [B, S]; the state has B rows."""
        ...

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, Tensor | None]:
        """Feed the last token of each row [R]; gives next-token logits [R, V], attention [R, S] where there is one."""
        ...
