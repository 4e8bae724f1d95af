"""Batches of padded sentences, of the shapes that `buckets` plans; their order is a function of (seed, epoch) alone.

The state of an iteration is (epoch, position), so that a run resumes in the middle of an epoch exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fp8repro.data.translation.buckets import Rows, padded_lengths, training_plan
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


def make_batch(split: Split, indices: Sequence[int], widths: Sequence[int] | None = None) -> Batch:
    """Collate the sentences at `indices`; `widths` are S and T, by default the least that `padded_lengths` allows."""
    if widths is None:
        chosen = np.asarray(indices)
        widths = padded_lengths(pair_lengths(split)[chosen]).max(0).tolist()
    target = pad_sequences(split.target, indices, widths[1])
    decoder_input = target.roll(1, dims=1)
    # Rolling moves the EOS of a row without padding to the front; that of another would stay, before its padding.
    decoder_input[:, 0] = EOS
    decoder_input[target.eq(PAD)] = PAD
    return Batch(
        pad_sequences(split.source, indices, widths[0]),
        decoder_input,
        target,
        int(target.ne(PAD).sum()),
        list(map(int, indices)),
    )


def pad_sequences(sequences: TokenSequences, indices: Sequence[int], width: int) -> Tensor:
    """Ids [B, width], padded on the right; no sequence may be longer."""
    rows = [torch.from_numpy(sequences[i]) for i in indices]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return F.pad(padded, (0, width - padded.shape[1]), value=PAD)


def pair_lengths(split: Split) -> NDArray[np.int64]:
    """Tokens of source and target of each pair, [N, 2]."""
    return np.stack([split.source.sizes, split.target.sizes], axis=1).astype(np.int64)


class TranslationBatches:
    """Endless training batches; iterate one epoch at a time.

    Every rank sees its own batches, the same number of them: the last group of an epoch is filled up from its first
    batches. Number and shapes of all ranks' batches are the same in every epoch.

    Attributes:
        plan: what the batches of every epoch are made of.
    """

    def __init__(self, split: Split, max_tokens: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """`max_tokens` is the budget of one batch of one rank, padding counted.

        Raises:
            UserError: there is no sentence, or one is longer than the budget.
        """
        if not len(split.source):
            raise UserError("data: the training split is empty, expected at least one pair")
        self.split, self.max_tokens, self.seed = split, max_tokens, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.position = 0, 0
        self.plan = training_plan(pair_lengths(split), max_tokens)

    def __len__(self) -> int:
        """Batches of one rank in an epoch."""
        return -(-len(self.plan.parts) // self.world_size)

    def report(self) -> dict[str, Any]:
        """For the record: number of an epoch's batches over all ranks, their shapes, and their share of padding."""
        return {
            "batches_per_epoch": len(self.plan.parts),
            "batch_shapes": len(set(self.plan.shapes)),
            "padding_share": dict(zip(("source", "target"), self.plan.padding_share, strict=True)),
        }

    def epoch_batches(self, epoch: int) -> list[Rows]:
        """This rank's batches of an epoch."""
        # Numpy promises the same stream in all versions for RandomState, but not for Generator.
        words = [self.seed & 0xFFFFFFFF, (self.seed >> 32) & 0xFFFFFFFF, epoch]
        generator = np.random.RandomState(np.array(words, dtype=np.uint32))
        batches = self.plan.batches(generator.permutation(len(self.split.source)))
        order = generator.permutation(len(batches))
        wanted = len(self) * self.world_size
        shuffled = [batches[order[i % len(order)]] for i in range(wanted)]
        return shuffled[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; then the next epoch is current."""
        for indices, widths in self.epoch_batches(self.epoch)[self.position :]:
            # Counted before it is yielded: a checkpoint after this batch must not repeat it.
            self.position += 1
            yield make_batch(self.split, indices.tolist(), widths)
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Epoch, and the number of its batches yielded so far."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]
