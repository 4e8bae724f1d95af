"""Shapes of batches of sentences: few, multiples of 8, the same in every epoch; no sentence lost; little padding."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray

from fp8repro.data.translation import buckets
from fp8repro.data.translation.batching import Batch, TranslationBatches, make_batch
from fp8repro.data.translation.buckets import (
    MOST_SHAPES,
    Rows,
    evaluation_batches,
    padded_lengths,
    training_plan,
)
from fp8repro.data.translation.datasets import TranslationData, load_translation
from fp8repro.errors import UserError

BUDGET = 300


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TranslationData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FP8REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_translation(
            "synthetic_translation", None, {"train": 900, "valid": 20, "test": 20, "bpe_merges": 200}
        )


def drawn_lengths(seed: int, count: int, spread: float, longest: int) -> NDArray[np.int64]:
    """Lengths like those of a corpus: source log-normal, target close to it."""
    generator = np.random.RandomState(seed)
    source = np.exp(generator.normal(3.0, spread, count))
    lengths = np.stack([source, source * np.exp(generator.normal(0.05, 0.2, count))], axis=1)
    return lengths.astype(np.int64).clip(1, longest)


def shape(rows: Rows) -> tuple[int, ...]:
    return len(rows.indices), *rows.widths


def padding(batches: list[Rows], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of padding of each side, counted in the batches."""
    tokens = np.sum([len(rows.indices) * np.array(rows.widths) for rows in batches], axis=0)
    share: NDArray[np.float64] = 1 - lengths.sum(0) / tokens
    return share


def test_lengths_become_multiples_of_8_and_grow_by_an_eighth_at_most() -> None:
    lengths = np.arange(1, 5000)
    padded = padded_lengths(lengths)
    assert not (padded % 8).any()
    assert (padded >= lengths).all()
    assert (padded - lengths < np.maximum(8, lengths / 8)).all()
    assert (np.diff(padded) >= 0).all()
    assert padded_lengths(padded).tolist() == padded.tolist()
    # The positions that models are limited to.
    assert padded_lengths(np.array([127, 512, 1000, 1024])).tolist() == [128, 512, 1024, 1024]
    assert padded_lengths(np.array([1, 8, 9, 104, 105, 120])).tolist() == [8, 8, 16, 104, 112, 120]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 1500),
    spread=st.floats(0.0, 1.5),
    budget=st.integers(128, 5000),
    sides=st.integers(1, 2),
)
def test_every_sentence_is_in_one_batch_that_fits_it_and_the_budget(
    seed: int, count: int, spread: float, budget: int, sides: int
) -> None:
    lengths = drawn_lengths(seed, count, spread, longest=128)[:, :sides]
    plan = training_plan(lengths, budget)
    order = np.random.RandomState(seed).permutation(count)
    for batches in (plan.batches(), plan.batches(order), evaluation_batches(lengths, budget)):
        assert sorted(chain(*(rows.indices.tolist() for rows in batches))) == list(range(count))
        for rows in batches:
            assert (lengths[rows.indices] <= rows.widths).all()
            assert len(rows.indices) * max(rows.widths) <= budget
            assert not any(width % 8 for width in rows.widths)
    assert [shape(rows) for rows in plan.batches(order)] == plan.shapes
    assert len(set(plan.shapes)) <= MOST_SHAPES
    assert np.array(plan.padding_share) == pytest.approx(padding(plan.batches(order), lengths))


@pytest.mark.parametrize(("count", "spread", "longest"), [(30_000, 0.35, 64), (30_000, 0.55, 100), (60_000, 0.6, 250)])
def test_few_shapes_cost_little_padding_beyond_that_of_multiples_of_8(count: int, spread: float, longest: int) -> None:
    lengths = drawn_lengths(1, count, spread, longest)
    plan = training_plan(lengths, 2048)
    # With a bucket for each pair of lengths there were hundreds of shapes, and this padding.
    least = 1 - lengths.sum(0) / (-(-lengths // 8) * 8).sum(0)
    allowed = 0.03 if longest <= 100 else 0.06
    assert (np.array(plan.padding_share) < least + allowed).all()
    assert len(set(plan.shapes)) <= MOST_SHAPES
    full = [rows == 2048 // max(widths) for rows, *widths in plan.shapes]
    assert len(full) - sum(full) <= 4
    # Exact lengths would make a shape of nearly every batch.
    assert len(full) > 4 * MOST_SHAPES


def test_the_plan_with_least_padding_is_taken_of_those_with_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = drawn_lengths(2, 3000, 0.5, longest=80)
    tokens = {}
    for most in (2, 3, 4, 6, 12, 24):
        monkeypatch.setattr(buckets, "MOST_SHAPES", most)
        plan = training_plan(lengths, 2048)
        assert len(set(plan.shapes)) <= most
        tokens[most] = int(plan.padded.sum())
    assert list(tokens.values()) == sorted(tokens.values(), reverse=True)
    assert tokens[24] < 0.7 * tokens[2]


def test_two_buckets_are_chosen_as_by_hand() -> None:
    # Filled up: two of the long ones' batches have room for one short sentence each.
    lengths = np.array([[30, 20]] * 5 + [[3, 10]] * 9)
    plan = training_plan(lengths, 96)
    assert plan.widths.tolist() == [[32, 24], [8, 16]]
    assert plan.shapes == [(3, 32, 24), (3, 32, 24), (6, 8, 16), (2, 8, 16)]
    assert plan.padding_share == pytest.approx([1 - 177 / (6 * 32 + 8 * 8), 1 - 190 / (6 * 24 + 8 * 16)])
    apart = evaluation_batches(lengths, 96)
    assert [shape(rows) for rows in apart] == [(3, 32, 24), (2, 32, 24), (6, 8, 16), (3, 8, 16)]


def test_a_sentence_longer_than_the_budget_is_refused() -> None:
    for plan in (training_plan, evaluation_batches):
        with pytest.raises(UserError, match=r"trainer\.batch_size: got 15 tokens, expected at least 16 \(the longest"):
            plan(np.array([[3, 4], [5, 9]]), 15)
    assert training_plan(np.array([[3, 4], [5, 9]]), 16).shapes == [(1, 8, 16), (1, 8, 8)]
    assert evaluation_batches(np.zeros((0, 2), np.int64), 5) == []


def tensor_shape(batch: Batch) -> tuple[int, ...]:
    assert batch.decoder_input.shape == batch.target.shape
    return len(batch.source), batch.source.shape[1], batch.target.shape[1]


def test_every_epoch_has_the_same_shapes_and_the_padding_that_is_reported(small: TranslationData) -> None:
    batches = TranslationBatches(small.train, BUDGET, seed=1)
    report = batches.report()
    epochs = [list(batches) for _ in range(3)]
    shapes = [Counter(map(tensor_shape, epoch)) for epoch in epochs]
    assert shapes[0] == shapes[1] == shapes[2] == Counter(batches.plan.shapes)
    assert len(shapes[0]) == report["batch_shapes"] <= MOST_SHAPES
    assert len(batches) == len(epochs[0]) == report["batches_per_epoch"]
    assert [tensor_shape(batch) for batch in epochs[0]] != [tensor_shape(batch) for batch in epochs[1]]
    for epoch in epochs:
        assert sorted(chain(*(batch.indices for batch in epoch))) == list(range(900))
        assert sum(batch.target_tokens for batch in epoch) == small.train.target.sizes.sum()
        for side in ("source", "target"):
            tensors = [getattr(batch, side) for batch in epoch]
            padding_tokens = sum(int(tensor.eq(1).sum()) for tensor in tensors)
            tokens = sum(tensor.numel() for tensor in tensors)
            assert report["padding_share"][side] == pytest.approx(padding_tokens / tokens)


def test_a_batch_is_as_wide_as_its_bucket_even_where_its_sentences_are_shorter(small: TranslationData) -> None:
    batches = TranslationBatches(small.train, BUDGET, seed=1)
    for batch, rows in zip(list(batches), batches.epoch_batches(0), strict=True):
        assert tensor_shape(batch)[1:] == rows.widths
    narrow, wide = make_batch(small.train, [0, 1]), make_batch(small.train, [0, 1], (64, 72))
    assert (wide.source.shape, wide.target.shape) == ((2, 64), (2, 72))
    assert wide.target_tokens == narrow.target_tokens
    for side in ("source", "decoder_input", "target"):
        short, long = getattr(narrow, side), getattr(wide, side)
        assert torch.equal(long[:, : short.shape[1]], short)
        assert long[:, short.shape[1] :].eq(1).all()
