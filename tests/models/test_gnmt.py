"""GNMT's layers against torch.nn.LSTM and the attention's formula, the model against its definition layer by layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fp8repro.errors import UserError
from fp8repro.models.gnmt import GNMT, BahdanauAttention, BidirectionalLSTM, LSTMCell, LSTMLayer, gnmt

SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 1, 1], [2, 1, 1, 1, 1]])
LENGTHS = torch.tensor([5, 3, 1])
DECODER_INPUT = torch.tensor([[2, 6, 5, 4], [2, 9, 7, 7], [2, 10, 11, 4]])


def torch_lstm(*layers: LSTMLayer) -> nn.LSTM:
    """torch's LSTM (bidirectional for two layers) with the same weights."""
    first = layers[0]
    lstm = nn.LSTM(first.input_gates.in_features, first.width, bidirectional=len(layers) == 2)
    with torch.no_grad():
        for layer, suffix in zip(layers, ("", "_reverse"), strict=False):
            for ours, theirs in ((layer.input_gates, "ih"), (layer.hidden_gates, "hh")):
                getattr(lstm, f"weight_{theirs}_l0{suffix}").copy_(ours.weight)
                getattr(lstm, f"bias_{theirs}_l0{suffix}").copy_(ours.bias)
    return lstm


def randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)


def test_lstm_layer_equals_torchs_in_values_states_and_gradients() -> None:
    torch.manual_seed(0)
    layer = LSTMLayer(5, 7)
    randomize(layer)
    lstm = torch_lstm(layer)
    x = torch.randn(6, 4, 5, requires_grad=True)
    start = (torch.randn(4, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True))
    ours, (hidden, cell) = layer(x, start)
    theirs, (h, c) = lstm(x, (start[0].unsqueeze(0), start[1].unsqueeze(0)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((hidden, cell), (h[0], c[0]), rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(ours)
    ours_inputs = [x, *start, layer.input_gates.weight, layer.hidden_gates.weight, layer.hidden_gates.bias]
    theirs_inputs = [x, *start, lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_hh_l0]
    ours_grads = torch.autograd.grad((ours * weights).sum() + cell.square().sum(), ours_inputs)
    theirs_grads = torch.autograd.grad((theirs * weights).sum() + c.square().sum(), theirs_inputs)
    for ours_grad, theirs_grad in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-5)


def test_lstm_cells_backward_pass_by_finite_differences() -> None:
    torch.manual_seed(1)
    gates = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    cell = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LSTMCell.apply, (gates, cell))


def test_bidirectional_layer_equals_torchs_on_packed_sequences() -> None:
    torch.manual_seed(2)
    layer = BidirectionalLSTM(5, 3)
    randomize(layer)
    lstm = torch_lstm(layer.forward_layer, layer.backward_layer)
    x = torch.randn(5, 3, 5)
    x[:, 1:][2:] = 7.0  # padding must not matter
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    theirs, _ = pad_packed_sequence(lstm(packed)[0])
    ours = layer(x, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(ours[:length, row], theirs[:length, row], rtol=1e-5, atol=1e-6)


def test_attention_is_normalized_bahdanau() -> None:
    torch.manual_seed(3)
    attention = BahdanauAttention(4)
    randomize(attention)
    query, values = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    masked = torch.tensor([[False] * 5, [False, False, True, True, True]])
    context, weights = attention(query, attention.key(values), values, masked.unsqueeze(1))
    w_q, w_k, v = attention.query.weight, attention.key.weight, attention.vector
    direction = attention.gain * v / math.sqrt(sum(e**2 for e in v.tolist()))
    for b in range(2):
        present = [s for s in range(5) if not masked[b, s]]
        for t in range(3):
            scores = [torch.tanh(w_q @ query[b, t] + w_k @ values[b, s] + attention.bias) @ direction for s in present]
            expected = torch.softmax(torch.stack(scores), 0)
            torch.testing.assert_close(weights[b, t, present], expected, rtol=1e-4, atol=1e-5)
            mean = sum(p * values[b, s] for p, s in zip(expected, present, strict=True))
            torch.testing.assert_close(context[b, t], mean, rtol=1e-4, atol=1e-5)
    assert not weights[1, :, 2:].any()


def definition(model: GNMT, source: Tensor, length: int, target: Tensor) -> Tensor:
    """Logits [T, V] of one sentence, layer by layer with torch's LSTM, in the order of NVIDIA's GNMT v2."""
    x = model.embedding.weight[source[:length]].unsqueeze(1)
    first = model.encoder.bidirectional
    x, _ = torch_lstm(first.forward_layer, first.backward_layer)(x)
    x, _ = torch_lstm(model.encoder.layers[0])(x)
    for layer in model.encoder.layers[1:]:
        x = x + torch_lstm(layer)(x)[0]
    values = x.transpose(0, 1)
    decoder = model.decoder
    y, _ = torch_lstm(decoder.layers[0])(model.embedding.weight[target].unsqueeze(1))
    nothing = torch.zeros(1, 1, length, dtype=torch.bool)
    context, _ = decoder.attention(y.transpose(0, 1), decoder.attention.key(values), values, nothing)
    context = context.transpose(0, 1)
    y, _ = torch_lstm(decoder.layers[1])(torch.cat([y, context], 2))
    for layer in decoder.layers[2:]:
        y = y + torch_lstm(layer)(torch.cat([y, context], 2))[0]
    return decoder.classifier(y[:, 0])


@pytest.mark.parametrize("layers", [2, 4])
def test_the_model_is_what_its_definition_says(layers: int) -> None:
    torch.manual_seed(4)
    model = gnmt(12, layers=layers, width=6, dropout=0.0)
    randomize(model)
    logits = model(SOURCE, DECODER_INPUT)
    for row, length in enumerate(LENGTHS.tolist()):
        expected = definition(model, SOURCE[row], length, DECODER_INPUT[row])
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


def test_step_by_step_decoding_gives_the_logits_of_the_whole_sequence() -> None:
    torch.manual_seed(5)
    model = gnmt(12, layers=4, width=6).eval()
    randomize(model)
    whole = model(SOURCE, DECODER_INPUT)
    state = model.begin(SOURCE)
    for step in range(2):
        logits, attention = model.step(DECODER_INPUT[:, step], state)
        torch.testing.assert_close(logits, whole[:, step], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(attention.sum(1), torch.ones(3))
    rows = torch.tensor([2, 0, 0])
    state.select(rows)
    for step in range(2, 4):
        logits, _ = model.step(DECODER_INPUT[rows, step], state)
        torch.testing.assert_close(logits, whole[rows, step], rtol=1e-4, atol=1e-5)


def test_initialization_is_nvidias() -> None:
    torch.manual_seed(6)
    model = gnmt(500, layers=3, width=32)
    for name, parameter in model.named_parameters():
        if "hidden_gates.bias" in name or name.endswith("attention.bias"):
            assert not parameter.any(), name
        elif name.endswith("gain"):
            assert parameter.item() == pytest.approx(32**-0.5)
        else:
            assert 0.08 < parameter.abs().max() <= 0.1, name
    assert not model.embedding.weight[1].any()


def test_the_paper_sized_models_have_the_parameters_of_their_layers() -> None:
    def lstm(inputs: int) -> int:
        return 4 * 1024 * (inputs + 1024 + 2)

    for layers in (4, 8):
        with torch.device("meta"):
            model = gnmt(32320, layers=layers)
        encoder = 2 * lstm(1024) + lstm(2048) + (layers - 2) * lstm(1024)
        decoder = lstm(1024) + (layers - 1) * lstm(2048)
        attention = 2 * 1024 * 1024 + 2 * 1024 + 1
        vocabulary = 32320 * 1024 + 32320 * 1025
        assert sum(p.numel() for p in model.parameters()) == encoder + decoder + attention + vocabulary


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"hidden": 3}, "model.size.hidden: unknown setting"),
        ({"layers": 1}, "model.size.layers: got 1, expected at least 2"),
    ],
)
def test_wrong_dimensions_are_refused(size: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gnmt(12, **size)


def test_autocast_keeps_the_state_in_fp32_and_stays_near() -> None:
    torch.manual_seed(7)
    model = gnmt(12, layers=3, width=16, dropout=0.0)
    exact = model(SOURCE, DECODER_INPUT)
    with torch.autocast("cpu", torch.bfloat16):
        state = model.begin(SOURCE)
        logits, _ = model.step(DECODER_INPUT[:, 0], state)
    assert {part.dtype for layer in state.layers if layer for part in layer} == {torch.float32}
    difference = (logits.float() - exact[:, 0]).abs().max()
    assert 0 < difference < 0.02
