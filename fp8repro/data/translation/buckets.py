"""Which sentences share a batch, and how wide it is: few shapes, a token budget, little padding. Knows lengths alone.

Lengths are padded to multiples of 8, on every backend alike: a replayed step has one shape, and padding decides which
element has which random bits. No sentence may be lost or met twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fp8repro.errors import UserError

MULTIPLE = 8
# Shapes of a run's training batches; each may become a CUDA graph.
MOST_SHAPES = 24
# Each bucket may leave a batch incomplete, which counts in an evaluation, because it has few.
EVALUATION_BUCKETS = 6


def padded_lengths(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths, rounded up to multiples of 8; over 128 to the larger multiples that are at most an eighth more.

    Powers of two stay, so that a model's largest position is not passed.
    """
    units = -(-lengths // MULTIPLE)
    _, exponent = np.frexp(units - 1)
    step = 2 ** np.maximum(exponent.astype(np.int64) - 4, 0)
    return -(-units // step) * step * MULTIPLE


class Rows(NamedTuple):
    """A batch before collation: indices of its sentences, and the width of each side."""

    indices: NDArray[np.int64]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class BatchPlan:
    """How many sentences the batches of an epoch take from which buckets; does not depend on the sentences' order.

    Attributes:
        lengths: [N, sides] in tokens.
        widths: [K, sides] of the buckets, wider ones first.
        bucket_of: [N], the bucket of each sentence.
        parts: of each batch, (bucket, sentences); the first bucket gives the batch its widths.
    """

    lengths: NDArray[np.int64]
    widths: NDArray[np.int64]
    bucket_of: NDArray[np.int64]
    parts: tuple[tuple[tuple[int, int], ...], ...]

    def batches(self, order: NDArray[np.int64] | None = None) -> list[Rows]:
        """The batches, widest first; `order`, a permutation of N, decides between sentences of a bucket."""
        order = np.arange(len(self.bucket_of)) if order is None else order
        order = order[np.argsort(self.bucket_of[order], kind="stable")]
        members = np.split(order, np.bincount(self.bucket_of, minlength=len(self.widths)).cumsum()[:-1])
        used = [0] * len(members)
        batches = []
        for parts in self.parts:
            taken = []
            for bucket, count in parts:
                taken.append(members[bucket][used[bucket] : used[bucket] + count])
                used[bucket] += count
            batches.append(Rows(np.concatenate(taken), tuple(self.widths[parts[0][0]].tolist())))
        return batches

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Rows and widths of each batch."""
        return [(sum(n for _, n in parts), *self.widths[parts[0][0]].tolist()) for parts in self.parts]

    @property
    def padded(self) -> NDArray[np.int64]:
        """Tokens of each side in all batches, padding counted."""
        return np.array([[rows * width for width in widths] for rows, *widths in self.shapes], dtype=np.int64).sum(0)

    @property
    def padding_share(self) -> list[float]:
        """Padding of each side, as a share of all its tokens."""
        return [float(share) for share in 1 - self.lengths.sum(0) / self.padded]


def training_plan(lengths: NDArray[np.int64], max_tokens: int) -> BatchPlan:
    """Full batches of at most `MOST_SHAPES` shapes with little padding.

    A batch has as many rows as the budget allows for its widths. What a bucket has too few of is filled up from
    narrower ones, so that next to no batch is smaller than the others.

    Args:
        lengths: of each sentence [N, sides], N > 0.
        max_tokens: budget of each side, padding counted.

    Raises:
        UserError: a sentence is longer than the budget.
    """
    buckets = _Buckets.of(lengths, max_tokens, MOST_SHAPES)
    plans = [buckets.plan(count, fill=True) for count in range(1, len(buckets.chosen) + 1)]
    # One bucket has two shapes at most.
    return min((p for p in plans if len(set(p.shapes)) <= MOST_SHAPES), key=lambda plan: int(plan.padded.sum()))


def evaluation_batches(lengths: NDArray[np.int64], max_tokens: int) -> list[Rows]:
    """Batches of few widths and any number of rows that the budget allows; arguments as for `training_plan`."""
    if not len(lengths):
        return []
    buckets = _Buckets.of(lengths, max_tokens, EVALUATION_BUCKETS)
    return buckets.plan(len(buckets.chosen), fill=False).batches()


@dataclass(frozen=True)
class _Buckets:
    """Widths that a bucket may have, and those chosen, in the order in which each saves most padding.

    Attributes:
        lengths: [N, sides].
        max_tokens: budget of each side.
        grid: [C, sides], every combination of the padded lengths that occur; the last is the widest.
        cell: [N], the place of each sentence in `grid`.
        chosen: places in `grid`.
    """

    lengths: NDArray[np.int64]
    max_tokens: int
    grid: NDArray[np.int64]
    cell: NDArray[np.int64]
    chosen: list[int]

    @classmethod
    def of(cls, lengths: NDArray[np.int64], max_tokens: int, most: int) -> _Buckets:
        """At most `most` buckets, chosen greedily for the least sum of widths over all sentences."""
        sides = [np.unique(side, return_inverse=True) for side in padded_lengths(lengths).T]
        grid = np.stack(np.meshgrid(*(values for values, _ in sides), indexing="ij"), axis=-1).reshape(-1, len(sides))
        if grid[-1].max() > max_tokens:
            raise UserError(
                f"trainer.batch_size: got {max_tokens} tokens, expected at least {grid[-1].max()} "
                f"(the longest sentence, padded to a multiple of {MULTIPLE})"
            )
        cell = np.ravel_multi_index([place for _, place in sides], [len(values) for values, _ in sides])
        count, cost = np.bincount(cell, minlength=len(grid)), grid.sum(1)
        covers = _covers(grid, grid)
        chosen, best = [len(grid) - 1], np.full(len(grid), cost[-1])
        while len(chosen) < most:
            saved = (np.maximum(best - cost[:, None], 0) * covers) @ count
            place = int(saved.argmax())
            if saved[place] == 0:
                break
            chosen.append(place)
            best = np.where(covers[place], np.minimum(best, cost[place]), best)
        return cls(lengths, max_tokens, grid, cell, chosen)

    def plan(self, count: int, fill: bool) -> BatchPlan:
        """The batches of the first `count` buckets; with `fill`, an incomplete one takes sentences of narrower ones."""
        widths = self.grid[self.chosen[:count]]
        widths = widths[np.argsort(-widths.sum(1), kind="stable")]
        cost = widths.sum(1)
        own = np.where(_covers(widths, self.grid), cost[:, None], cost[0] + 1).argmin(0)[self.cell]
        left = np.bincount(own, minlength=count).tolist()
        narrower = _covers(widths, widths)
        parts: list[tuple[tuple[int, int], ...]] = []
        for bucket in range(count):
            rows = self.max_tokens // int(widths[bucket].max())
            full, rest = divmod(left[bucket], rows)
            parts += [((bucket, rows),)] * full
            if not rest:
                continue
            taken, room = [(bucket, rest)], rows - rest
            for other in range(bucket + 1, count if fill else 0):
                number = min(room, left[other]) if narrower[bucket, other] else 0
                if number:
                    taken.append((other, number))
                    left[other] -= number
                    room -= number
            parts.append(tuple(taken))
        return BatchPlan(self.lengths, widths, own, tuple(parts))


def _covers(wide: NDArray[np.int64], narrow: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[W, N]: every side of `narrow` [N, sides] fits into `wide` [W, sides]."""
    return np.all(narrow[None] <= wide[:, None], axis=-1)
