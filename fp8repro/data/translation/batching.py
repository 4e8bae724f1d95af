"""Batches of sentences of similar length under a token budget; their order is a function of (seed, epoch) alone.

The state of an iteration is (epoch, position), so that a run resumes in the middle of an epoch exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8repro.data.translation.datasets import Split
from fp8repro.data.translation.fairseq_binary import TokenSequences
from fp8repro.data.translation.vocabulary import EOS, PAD
from fp8repro.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Int64 ids, padded on the right.

    Attributes:
        source: [B, S], each with a trailing EOS.
        decoder_input: [B, T], the target with its EOS moved to the front.
        target: [B, T], each with a trailing EOS.
        target_tokens: tokens of `target` that are no padding.
        indices: where the sentences stand in the split.
    """

    source: Tensor
    decoder_input: Tensor
    target: Tensor
    target_tokens: int
    indices: list[int]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        source, decoder_input, target = (t.to(device) for t in (self.source, self.decoder_input, self.target))
        return Batch(source, decoder_input, target, self.target_tokens, self.indices)


def make_batch(split: Split, indices: Sequence[int]) -> Batch:
    """Collate the sentences at `indices`."""
    target = pad_sequences(split.target, indices)
    decoder_input = target.roll(1, dims=1)
    # Rolling moves the longest row's EOS to the front; a shorter row's would stay, before its padding.
    decoder_input[:, 0] = EOS
    decoder_input[target.eq(PAD)] = PAD
    return Batch(
        pad_sequences(split.source, indices), decoder_input, target, int(target.ne(PAD).sum()), list(map(int, indices))
    )


def pad_sequences(sequences: TokenSequences, indices: Sequence[int]) -> Tensor:
    """Ids [B, longest], padded on the right."""
    rows = [torch.from_numpy(sequences[i]) for i in indices]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def bucket_batches(
    lengths: NDArray[np.int64], max_tokens: int, order: NDArray[np.int64] | None = None
) -> list[NDArray[np.int64]]:
    """Group sentences of similar length so that no batch, padded, holds more than `max_tokens`.

    Args:
        lengths: [N], the longer of source and target.
        max_tokens: budget of each side.
        order: permutation of N that decides between sentences of the same length.

    Returns:
        Index arrays, shortest sentences first.

    Raises:
        UserError: a sentence is longer than the budget.
    """
    count = len(lengths)
    if count and int(lengths.max()) > max_tokens:
        raise UserError(f"trainer.batch_size: got {max_tokens} tokens, expected at least {int(lengths.max())}")
    order = np.arange(count) if order is None else order
    order = order[np.argsort(lengths[order], kind="stable")]
    ascending = lengths[order]
    batches, start = [], 0
    while start < count:
        stop = min(count, start + max_tokens // int(ascending[start]))
        while (stop - start) * int(ascending[stop - 1]) > max_tokens:
            stop = max(start + 1, start + max_tokens // int(ascending[stop - 1]))
        batches.append(order[start:stop])
        start = stop
    return batches


def pair_lengths(split: Split) -> NDArray[np.int64]:
    """The longer of source and target of each pair, in tokens."""
    return np.maximum(split.source.sizes, split.target.sizes)


class TranslationBatches:
    """Endless training batches; iterate one epoch at a time.

    Every rank sees its own batches, the same number of them: the last group of an epoch is filled up from its first
    batches. The number of batches is the same in every epoch.
    """

    def __init__(self, split: Split, max_tokens: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """`max_tokens` is the budget of one batch of one rank.

        Raises:
            UserError: there is no sentence, or one is longer than the budget.
        """
        if not len(split.source):
            raise UserError("data: the training split is empty, expected at least one pair")
        self.split, self.max_tokens, self.seed = split, max_tokens, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.position = 0, 0
        self._lengths = pair_lengths(split)
        self._length = -(-len(bucket_batches(self._lengths, max_tokens)) // world_size)

    def __len__(self) -> int:
        """Batches of one rank in an epoch."""
        return self._length

    def epoch_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """This rank's batches of an epoch, as indices."""
        # RandomState: numpy promises its stream for all versions, which it does not for Generator.
        words = [self.seed & 0xFFFFFFFF, (self.seed >> 32) & 0xFFFFFFFF, epoch]
        generator = np.random.RandomState(np.array(words, dtype=np.uint32))
        batches = bucket_batches(self._lengths, self.max_tokens, generator.permutation(len(self._lengths)))
        order = generator.permutation(len(batches))
        wanted = len(self) * self.world_size
        shuffled = [batches[order[i % len(order)]] for i in range(wanted)]
        return shuffled[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch; afterwards the next one is present."""
        for indices in self.epoch_batches(self.epoch)[self.position :]:
            # Counted before it is handed out: a checkpoint made while training on a batch does not repeat it.
            self.position += 1
            yield make_batch(self.split, indices.tolist())
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Epoch, and the number of its batches handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]
