"""The synthetic English-German corpus: split into training, validation and test sentences by grammar and seed alone.

Every sentence is distinct, and half of the test sentences hold a combination of words that training never shows.
"""

from __future__ import annotations

import hashlib
import random

from fp8repro.data.translation.grammar import Grammar
from fp8repro.errors import UserError

Pairs = list[tuple[str, str]]

# One combination of adjective and noun, or verb and object, in so many is kept out of training.
HELD_OUT_ONE_IN = 25


def is_held_out(combination: tuple[str, str], seed: int) -> bool:
    """True for the combinations of two words that no training sentence holds."""
    digest = hashlib.blake2b(f"{seed}/{'/'.join(combination)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def synthetic_corpus(
    seed: int = 1, train: int = 20_000, valid: int = 500, test: int = 500, max_words: int = 18
) -> dict[str, Pairs]:
    """Sentence pairs (English, German) of the splits "train", "valid" and "test".

    Args:
        seed: of the drawn sentences and of the held-out combinations.
        train, valid, test: numbers of pairs. Half of valid and test hold a held-out combination.
        max_words: longest English sentence, counted in words.

    Raises:
        UserError: a number that the grammar cannot fill.
    """
    for name, count in (("train", train), ("valid", valid), ("test", test)):
        if not 1 <= count <= 1_000_000:
            raise UserError(f"data.options.{name}: got {count}, expected a number of pairs from 1 to 1000000")
    if max_words < 6:
        raise UserError(f"data.options.max_words: got {max_words}, expected 6 or more")
    grammar, rng = Grammar(), random.Random(seed)
    seen_wanted = train + valid // 2 + test // 2
    unseen_wanted = valid + test - valid // 2 - test // 2
    seen: Pairs = []
    unseen: Pairs = []
    known: set[str] = set()
    while len(seen) < seen_wanted or len(unseen) < unseen_wanted:
        english, german, combinations = grammar.sentence(rng)
        if english in known or len(english.split()) > max_words:
            continue
        known.add(english)
        held_out = any(is_held_out(combination, seed) for combination in combinations)
        pool, wanted = (unseen, unseen_wanted) if held_out else (seen, seen_wanted)
        if len(pool) < wanted:
            pool.append((english, german))
    half_test, half_valid = test - test // 2, valid // 2
    return {
        "test": unseen[:half_test] + seen[: test // 2],
        "valid": unseen[half_test:] + seen[test // 2 : test // 2 + half_valid],
        "train": seen[test // 2 + half_valid :],
    }
