"""Kernels between a Transformer's products: against torch in FP64, and their roundings against the reference."""

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close

from fp8repro import quantize
from fp8repro.kernels.attention.launch import (
    Dropout,
    Rerounded,
    empty_operand,
    reround,
    residual_norm,
    residual_norm_backward,
    softmax,
    softmax_backward,
)
from fp8repro.kernels.attention.launch_sums import finish_gradients, sum_rounded
from fp8repro.numerics.formats import E4M3, E5M2, FP16
from fp8repro.numerics.rounding import IDENTITY, RandomBits, Rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAREST, STOCHASTIC = Rounding(E5M2), Rounding(E5M2, "stochastic")
BITS = [RandomBits(3, stream) for stream in (2**63 + 17, 5, 6, 7, 8, 9)]


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def rounded(x, how, bits):
    if how.is_identity:
        return x
    return quantize(x.contiguous(), how.format, how.rounding, how.overflow, bits.seed, bits.stream, out="float32")


def same_bytes(a, b):
    bits = torch.uint8 if a.element_size() == 1 else torch.int16
    return torch.equal(a.view(bits), b.view(bits))


def operands(*shape, like, fmt=E5M2):
    """Codes and transposed codes to be written."""
    codes = empty_operand(*shape, like=like, dtype=fmt.dtype)
    return codes, empty_operand(*shape[:-2], shape[-1], shape[-2], like=like, dtype=fmt.dtype)


@pytest.mark.parametrize("depth", [8, 5])
@pytest.mark.parametrize("how", [NEAREST, STOCHASTIC, Rounding(E4M3)], ids=str)
def test_heads_are_split_scaled_and_rounded_in_both_layouts(depth, how):
    heads, batch, lengths = 2, 2, (2, 3, 3)
    tensors, given = [], [draw(t, batch, heads * depth, seed=i) for i, t in enumerate(lengths)]
    for i, x in enumerate(given):
        codes = x.new_empty(batch, heads, lengths[i], depth, dtype=how.format.dtype)
        turned = empty_operand(batch, heads, depth, lengths[i], like=x, dtype=how.format.dtype)
        view = x.view(-1, batch, heads, depth).permute(1, 2, 0, 3)
        tensors.append(Rerounded(view, codes, turned, bits=BITS[i]))
    reround(tensors, how, scale=0.3)
    for i, (x, tensor) in enumerate(zip(given, tensors, strict=True)):
        split = x.view(-1, batch, heads, depth).permute(1, 2, 0, 3) * (0.3 if i == 0 else 1.0)
        assert torch.equal(tensor.codes.float(), rounded(split, how, BITS[i]))
        assert same_bytes(tensor.turned, tensor.codes.transpose(-1, -2))


@pytest.mark.parametrize("depth", [8, 3])
@pytest.mark.parametrize("before", [IDENTITY, STOCHASTIC], ids=str)
def test_heads_are_joined_and_rounded_twice(depth, before):
    heads, batch, lengths = 2, 2, (2, 3, 3)
    # The second one is the product of a transposed operand.
    shapes = [(batch, heads, 2, depth), (batch, heads, depth, 3), (batch, heads, 3, depth)]
    given = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    views = [given[0].permute(2, 1, 0, 3), given[1].permute(3, 1, 0, 2), given[2].permute(2, 1, 0, 3)]
    tensors = []
    for i, view in enumerate(views):
        codes = view.new_empty(lengths[i], batch, heads * depth, dtype=E5M2.dtype)
        turned = empty_operand(heads * depth, lengths[i] * batch, like=view, dtype=E5M2.dtype)
        split = turned.unflatten(1, (-1, batch)).unflatten(0, (heads, -1)).permute(2, 0, 1, 3)
        tensors.append(
            Rerounded(view, codes.view(-1, batch, heads, depth).transpose(1, 2), split, BITS[i], BITS[3 + i])
        )
    reround(tensors, STOCHASTIC, before, scale=0.3)
    for i, (x, tensor) in enumerate(zip(given, tensors, strict=True)):
        once = rounded(x, before, BITS[i])
        once = once.transpose(-1, -2) if i == 1 else once
        joined = (once * (0.3 if i == 0 else 1.0)).permute(2, 0, 1, 3).flatten(2)
        expected = rounded(joined, STOCHASTIC, BITS[3 + i])
        assert torch.equal(tensor.codes.transpose(1, 2).flatten(2).float(), expected)
        assert same_bytes(tensor.turned, tensor.codes.transpose(-1, -2))


def test_parts_are_added_and_masked():
    x = draw(3, 1, 1, 6, 24)
    hidden = torch.relu(draw(1, 1, 6, 24, seed=1)).to(E5M2.dtype)
    codes, turned = operands(1, 1, 6, 24, like=x)
    codes = codes.contiguous()
    reround([Rerounded(x, codes, turned, BITS[0], BITS[1])], STOCHASTIC, STOCHASTIC, mask=hidden)
    total = (x[0] + x[1]) + x[2]
    once = torch.where(hidden.float() > 0, rounded(total, STOCHASTIC, BITS[0]), 0.0)
    assert torch.equal(codes.float(), rounded(once, STOCHASTIC, BITS[1]))
    assert same_bytes(turned, codes.transpose(-1, -2))


def test_rectified_values_are_rounded_and_nan_stays():
    x = draw(1, 1, 4, 16)
    x[0, 0, 0, 0] = torch.nan
    codes = torch.empty_like(x, dtype=E5M2.dtype)
    reround([Rerounded(x, codes)], NEAREST, relu=True)
    torch.testing.assert_close(codes.float(), torch.relu(x).to(E5M2.dtype).float(), rtol=0, atol=0, equal_nan=True)


def mask_of(shape, causal):
    batch, _, rows, columns = shape
    if causal:
        return torch.full((rows, columns), -torch.inf, device=DEVICE).triu(1)
    lengths = torch.arange(1, batch + 1, device=DEVICE).clamp(max=columns)
    forbidden = torch.arange(columns, device=DEVICE) >= lengths[:, None]
    return torch.zeros(batch, 1, 1, columns, device=DEVICE).masked_fill(forbidden[:, None, None], -torch.inf)


@pytest.mark.parametrize("shape", [(2, 2, 5, 7), (2, 1, 8, 16), (1, 2, 1, 1)])
@pytest.mark.parametrize("masked", ["no", "padding", "causal"])
@pytest.mark.parametrize("before", [IDENTITY, STOCHASTIC], ids=str)
def test_softmax_and_its_gradient(shape, masked, before):
    scores = quantize(4 * draw(*shape), "e5m2", out="float32")
    mask = None if masked == "no" else mask_of(shape, masked == "causal")
    (codes, turned), kept = operands(*shape, like=scores), torch.empty_like(scores, dtype=E5M2.dtype)
    softmax(scores, mask, NEAREST, codes, turned, kept)
    exact = scores.double().requires_grad_()
    weights = torch.softmax(exact if mask is None else exact + mask, -1)
    # One rounding of what is FP32 within a few units of its last place.
    low, high = ((weights * (1 + sign * 1e-6)).float().to(E5M2.dtype).float() for sign in (-1, 1))
    assert ((codes.float() == low) | (codes.float() == high)).all()
    assert same_bytes(turned, codes.transpose(-1, -2))
    assert torch.equal(kept.float(), scores)
    grad = draw(*shape, seed=1)
    (expected,) = torch.autograd.grad(weights, exact, rounded(grad, before, BITS[0]).double())
    for how, bound in ((Rounding(FP16), 1e-3), (STOCHASTIC, 0.25)):
        codes, turned = operands(*shape, like=scores, fmt=how.format)
        softmax_backward(grad, kept, mask, how, BITS[1], codes, turned, before, BITS[0])
        assert_close(codes.double(), expected, bound, scale=expected.abs().max() + 1e-3)
        assert same_bytes(turned, codes.transpose(-1, -2))
    # Its draws are those of the elements' places: values that are right but for their last bits round alike.
    assert (codes.float() == rounded(expected.float(), STOCHASTIC, BITS[1])).float().mean() > 0.95


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("how", [STOCHASTIC, IDENTITY], ids=str)
@pytest.mark.parametrize("columns", [24, 7])
def test_gradients_of_several_weights_are_added_and_rounded_each(count, how, columns):
    parts, turned = draw(2, count * 20, columns), draw(count * 20, 300, seed=1).to(E5M2.dtype)
    weights, biases = finish_gradients(parts, turned, how, BITS[:count])
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        rows = slice(20 * i, 20 * (i + 1))
        assert torch.equal(weight, rounded((parts[0] + parts[1])[rows], how, BITS[i]))
        assert_close(bias, turned[rows].double().sum(1), 1e-6, scale=turned[rows].double().abs().sum(1))
    assert finish_gradients(parts, None, how, BITS[:count])[1] is None


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("columns", [24, 7])
def test_terms_are_rounded_each_and_added_in_their_order(count, added, columns):
    terms = [draw(2, 6, columns, seed=i) for i in range(count)]
    residual = draw(6, columns, seed=9) if added else None
    expected = residual
    for term, bits in zip(terms, BITS, strict=False):
        value = rounded(term[0] + term[1], STOCHASTIC, bits)
        expected = value if expected is None else expected + value
    assert torch.equal(sum_rounded(residual, terms, STOCHASTIC, BITS[:count]), expected)


@pytest.mark.parametrize(("rows", "width"), [(6, 16), (13, 20), (1, 7)])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_residual_norm_and_its_gradients_in_fp64(rows, width, p):
    x, branch, grad = draw(rows, width), draw(rows, width, seed=1), draw(rows, width, seed=2)
    weight, bias = draw(width, seed=3), draw(width, seed=4)
    dropout = Dropout.of(p, BITS[2])
    codes, turned = torch.empty_like(x, dtype=E5M2.dtype), empty_operand(width, rows, like=x, dtype=E5M2.dtype)
    y, kept = residual_norm(x, branch, weight, bias, 1e-5, dropout, NEAREST, codes, turned)
    passed = (kept[0] - x) / branch
    if p:
        # What is dropped is what the sum lacks.
        assert ((passed.abs() < 1e-3) | ((passed - 1 / (1 - p)).abs() < 1e-3)).all()
        factor = torch.where(passed < 0.5, 0.0, 1 / (1 - p)).double()
    else:
        factor = torch.ones_like(x).double()
    leaves = [t.double().requires_grad_() for t in (x, branch, weight, bias)]
    expected = F.layer_norm(leaves[0] + factor * leaves[1], (width,), leaves[2], leaves[3], 1e-5)
    assert_close(y, expected, 1e-5, scale=1 + expected.abs())
    assert torch.equal(codes.float(), rounded(y, NEAREST, BITS[0]))
    assert same_bytes(turned, codes.t())
    expected.backward(grad.double())
    codes, turned = torch.empty_like(x, dtype=FP16.dtype), empty_operand(width, rows, like=x, dtype=FP16.dtype)
    arguments = (grad, kept, weight, dropout)
    grad_sum, grads = residual_norm_backward(*arguments, Rounding(FP16), BITS[1], codes, turned)
    assert_close(grad_sum, leaves[0].grad, 1e-5, scale=1 + leaves[0].grad.abs())
    assert_close(codes.double(), leaves[1].grad, 1e-3, scale=1 + leaves[1].grad.abs())
    assert same_bytes(turned, codes.t())
    assert_close(grads[0], leaves[2].grad, 1e-5, scale=10)
    assert_close(grads[1], leaves[3].grad, 1e-5, scale=10)
    codes, turned = torch.empty_like(x, dtype=E5M2.dtype), empty_operand(width, rows, like=x, dtype=E5M2.dtype)
    grad_sum, _ = residual_norm_backward(*arguments, STOCHASTIC, BITS[1], codes, turned)
    dropped = grad_sum * factor.float()
    assert torch.equal(codes.float(), rounded(dropped, STOCHASTIC, BITS[1]))


def test_dropout_drops_its_share():
    x, branch = torch.zeros(64, 256, device=DEVICE), torch.ones(64, 256, device=DEVICE)
    codes = torch.empty_like(x, dtype=E5M2.dtype)
    weight = torch.ones(256, device=DEVICE)
    sums = []
    for stream in (1, 2):
        dropout = Dropout.of(0.1, RandomBits(0, stream))
        _, (total, *_) = residual_norm(x, branch, weight, weight, 1e-5, dropout, NEAREST, codes, None)
        sums.append(total)
    for total in sums:
        # Five standard deviations.
        assert abs(float((total == 0).float().mean()) - 0.1) < 5 * (0.09 / total.numel()) ** 0.5
    assert not torch.equal(*sums)


def test_arguments_that_do_not_fit_are_refused():
    x = draw(1, 1, 4, 16)
    codes = torch.empty_like(x, dtype=E5M2.dtype)
    with pytest.raises(ValueError, match=r"codes: got torch.float8_e5m2.*expected torch.float16"):
        reround([Rerounded(x, codes)], Rounding(FP16))
    with pytest.raises(ValueError, match=r"x: got torch.float32 of shape \(1, 1, 16, 4\)"):
        reround([Rerounded(x.transpose(2, 3), codes)], NEAREST)
    with pytest.raises(ValueError, match="mask: got shape"):
        reround([Rerounded(x, codes)], NEAREST, mask=codes[..., :8])
    with pytest.raises(ValueError, match=r"scores: got torch\.float16"):
        softmax(x.half(), None, NEAREST, codes)
    with pytest.raises(ValueError, match=r"parts: got shape \(2, 20, 4\) for 3 weights"):
        finish_gradients(draw(2, 20, 4), None, NEAREST, BITS[:3])
    with pytest.raises(ValueError, match="terms: got"):
        sum_rounded(None, [draw(1, 2, 8), draw(1, 2, 9)], NEAREST, BITS[:2])
    rest = (draw(16), draw(16), 1e-5, Dropout.of(0.0, BITS[0]), NEAREST, codes[0, 0], None)
    with pytest.raises(ValueError, match="branch: got shape"):
        residual_norm(x[0, 0], x[0, 0, :2], *rest)
