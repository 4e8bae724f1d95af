import math

import pytest
import torch
from numeric import assert_close

ONES = torch.ones(2, 3)


def changed(value):
    x = ONES.clone()
    x[1, 2] = value
    return x


@pytest.mark.parametrize("value", [1.0, math.inf, math.nan, -0.0])
@pytest.mark.parametrize("norm", [False, True])
def test_equal_values_pass(value, norm):
    assert_close(changed(value), changed(value), norm=norm)
    assert_close(changed(value).to(torch.float8_e5m2), changed(value).double(), 1e-9)


@pytest.mark.parametrize("bound", [0.0, 0.2])
@pytest.mark.parametrize("value", [1.5, math.inf, math.nan])
def test_the_first_wrong_value_is_named(bound, value):
    for found, expected in ((changed(value), ONES), (ONES, changed(value))):
        with pytest.raises(AssertionError, match=r"1 of 6 values are wrong, the first at \[1, 2\]: found .*, expected"):
            assert_close(found, expected, bound)
        with pytest.raises(AssertionError, match=r"relative error .* of the whole, the largest at \[1, 2\]"):
            assert_close(found, expected, bound / 2, norm=True)


def test_bounds_are_relative_to_a_scale():
    assert_close(changed(1.5), ONES, 0.5)
    assert_close(changed(1.5), ONES, 0.1, scale=changed(5.0))
    with pytest.raises(AssertionError, match=r"error 0\.5, bound 0\.1"):
        assert_close(changed(1.5), ONES, 0.1, scale=changed(4.9))
    assert_close(changed(1.5), ONES, 0.25, norm=True)


def test_zeros_have_a_sign_and_shapes_count():
    assert_close(changed(-0.0), changed(0.0), 1e-30)
    with pytest.raises(AssertionError, match=r"found -0.0, expected 0.0"):
        assert_close(changed(-0.0), changed(0.0))
    with pytest.raises(AssertionError, match=r"found shape \(2, 3\), expected \(3,\)"):
        assert_close(ONES, ONES[0])


def test_integers_of_64_bits_are_compared_exactly():
    x = torch.tensor([2**60])
    assert_close(x, x.clone())
    with pytest.raises(AssertionError, match="found 1152921504606846977"):
        assert_close(x + 1, x)
