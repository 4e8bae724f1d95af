"""Philox-4x32-10 against the known-answer vectors of Random123 (kat_vectors)."""

import ctypes

import pytest
import torch

from fp8repro.engines.cpu import native
from fp8repro.numerics import reference

# counter (4 words), key (2 words), output (4 words)
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_reference_gives_the_published_words(counter, key, output):
    given = tuple(torch.tensor([word]) for word in words(counter))
    result = reference.philox_4x32_10(given, tuple(words(key)))
    assert [int(word) for word in result] == words(output)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_native_engine_gives_the_published_words(counter, key, output):
    c, k = words(counter), words(key)
    buffer = (ctypes.c_uint32 * 64)()
    native.library().fp8repro_words(c[0] | c[1] << 32, k[0] | k[1] << 32, c[2] | c[3] << 32, buffer)
    assert list(buffer[:4]) == words(output)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_native_engine_carries_into_the_high_word_of_the_block():
    first, seed, stream = 2**32 - 2, 123, 2**40 + 9
    buffer = (ctypes.c_uint32 * 64)()
    native.library().fp8repro_words(first, seed, stream, buffer)
    block = first + torch.arange(4)
    counter = (
        block & 0xFFFFFFFF,
        block >> 32,
        torch.full_like(block, stream & 0xFFFFFFFF),
        torch.full_like(block, 256),
    )
    expected = torch.stack(reference.philox_4x32_10(counter, (seed, 0)), dim=1).flatten()
    assert list(buffer[:16]) == expected.tolist()


def test_element_i_takes_half_a_word_of_block_i_div_8_its_low_half_first():
    count, seed, stream = 21, 2**40 + 5, 2**50 + 3
    block = torch.arange(3)
    counter = (block, torch.zeros(3, dtype=torch.int64), torch.full((3,), 3), torch.full((3,), 2**18))
    found = reference.philox_4x32_10(counter, (5, 2**8))
    expected = [int(found[i % 8 // 2][i // 8]) >> (16 * (i % 2)) & 0xFFFF for i in range(count)]
    assert reference.random_draws(count, seed, stream).tolist() == expected
