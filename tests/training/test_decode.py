"""Beam search against exhaustive search, greedy search against a plain loop; scores against hand-made BLEU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from fp8repro.errors import UserError
from fp8repro.models.gnmt import GNMT, gnmt
from fp8repro.models.transformer import Transformer, transformer
from fp8repro.settings.schema import DecodeConfig
from fp8repro.training.tasks.bleu import chrf_score, sacrebleu_score, tokenized_bleu
from fp8repro.training.tasks.decode import beam_search, best_tokens

SOURCE = torch.tensor([[4, 5, 4, 2], [5, 2, 1, 1]])
LIMIT = 4
WORDS = (0, 3, 4, 5)  # everything but padding and EOS


def tiny(kind: str, seed: int = 0, vocab: int = 6) -> Transformer | GNMT:
    torch.manual_seed(seed)
    model: Transformer | GNMT
    if kind == "gnmt":
        model = gnmt(vocab, layers=2, width=8)
    else:
        model = transformer(vocab, width=8, ffn_width=8, heads=2, encoder_layers=1, decoder_layers=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model.eval()


@torch.no_grad()
def every_translation(
    model: Transformer | GNMT, source: Tensor, config: DecodeConfig
) -> list[tuple[float, tuple[int, ...]]]:
    """Score of each possible translation of one unpadded sentence, by the whole-sequence forward pass; best first."""
    scored = []
    for length in range(LIMIT):
        for words in itertools.product(WORDS, repeat=length):
            target = torch.tensor([[*words, 2]])
            decoder_input = torch.tensor([[2, *words]])
            log_probs = torch.log_softmax(model(source, decoder_input), -1)
            total = log_probs[0].gather(1, target.t()).sum().item()
            tokens = length + 1
            norm = tokens**config.alpha if config.length_penalty == "fairseq" else ((5 + tokens) / 6) ** config.alpha
            score = total / norm
            if config.coverage:
                assert isinstance(model, GNMT)
                state = model.begin(source)
                attention = torch.zeros(source.shape[1])
                for token in decoder_input[0]:
                    attention += model.step(token.view(1), state)[1][0]
                score += config.coverage * sum(math.log(min(a, 1.0)) for a in attention.tolist())
            scored.append((score, words))
    return sorted(scored, reverse=True)


@pytest.mark.parametrize(
    ("kind", "penalty", "alpha", "coverage"),
    [
        ("transformer", "fairseq", 0.6, 0.0),
        ("transformer", "wu", 1.0, 0.0),
        ("gnmt", "wu", 0.6, 0.1),
        ("gnmt", "fairseq", 0.0, 0.5),
    ],
)
def test_a_wide_beam_is_exhaustive_search(kind: str, penalty: str, alpha: float, coverage: float) -> None:
    model = tiny(kind)
    # Padding has probability, but is never a translation: take it out of the exhaustive scores' sums too.
    config = DecodeConfig(
        beam=100, length_penalty=penalty, alpha=alpha, coverage=coverage, max_length_a=0, max_length_b=LIMIT
    )
    found = beam_search(model, SOURCE, config)
    for row, length in enumerate((4, 2)):
        expected = every_translation(model, SOURCE[row : row + 1, :length], config)
        assert len(found[row]) == len(expected) == 85
        assert {h.tokens: h.score for h in found[row]} == pytest.approx({w: s for s, w in expected}, abs=2e-4)
        assert found[row] == sorted(found[row], reverse=True)
        assert found[row][0].tokens == expected[0][1]


@pytest.mark.parametrize("kind", ["transformer", "gnmt"])
def test_a_beam_of_one_is_greedy_search(kind: str) -> None:
    config = DecodeConfig(beam=1, max_length_a=2.0, max_length_b=3)
    endings = set()
    for seed in range(6):
        model = tiny(kind, seed)
        for row, length in enumerate((4, 2)):
            source = SOURCE[row : row + 1, :length]
            words: list[int] = []
            with torch.no_grad():
                while len(words) < 2 * length + 2:
                    logits = model(source, torch.tensor([[2, *words]]))[0, -1]
                    logits[1] = -math.inf
                    best = int(logits.argmax())
                    if best == 2:
                        break
                    words.append(best)
            endings.add(len(words) < 2 * length + 2)
            assert best_tokens(beam_search(model, SOURCE, config)[row]) == words
    assert endings == {True, False}, "both ways to end must be seen"


@pytest.mark.parametrize("kind", ["transformer", "gnmt"])
def test_neighbours_and_padding_in_the_batch_change_nothing(kind: str) -> None:
    model = tiny(kind, seed=3, vocab=20)
    torch.manual_seed(1)
    sources = [torch.cat([torch.randint(4, 20, (n,)), torch.tensor([2])]) for n in (7, 1, 4, 3)]
    config = DecodeConfig(beam=3)
    padded = nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=1)
    together = beam_search(model, padded, config)
    for source, found in zip(sources, together, strict=True):
        (alone,) = beam_search(model, source.unsqueeze(0), config)
        assert [h.tokens for h in alone] == [h.tokens for h in found]
        torch.testing.assert_close([h.score for h in alone], [h.score for h in found], rtol=1e-4, atol=1e-5)
        assert found == sorted(found, reverse=True)
        assert len(found) <= 3


def test_a_wider_beam_finds_no_worse_model_score_here() -> None:
    model = tiny("transformer", seed=2)
    config = {"alpha": 0.0, "max_length_a": 0.0, "max_length_b": LIMIT}
    best = every_translation(model, SOURCE[:1], DecodeConfig(**config))[0][0]
    narrow = beam_search(model, SOURCE[:1], DecodeConfig(beam=1, **config))[0][0].score
    wide = beam_search(model, SOURCE[:1], DecodeConfig(beam=16, **config))[0][0].score
    assert narrow <= wide + 1e-5
    assert wide <= best + 1e-5


def test_a_model_without_finite_scores_translates_to_nothing() -> None:
    model = tiny("transformer")
    nn.init.constant_(model.decoder.output_projection.weight, math.nan)
    assert [best_tokens(found) for found in beam_search(model, SOURCE, DecodeConfig(beam=2))] == [[], []]


def test_a_coverage_penalty_needs_attention() -> None:
    with pytest.raises(UserError, match=r"decode\.coverage: got 0\.1"):
        beam_search(tiny("transformer"), SOURCE, DecodeConfig(coverage=0.1))


def test_bleu_of_a_case_worked_by_hand() -> None:
    # Precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty: (1/5) ** (1/4).
    score = tokenized_bleu(["a b c d e"], ["a b c d f"])
    assert score.value == pytest.approx(100 * 0.2**0.25)
    assert score.precisions == pytest.approx((80, 75, 200 / 3, 50))
    # The same, one token short of the reference: brevity penalty exp(1 - 6/5).
    short = tokenized_bleu(["a b c d e"], ["a b c d f g"])
    assert short.brevity_penalty == pytest.approx(math.exp(-0.2))
    assert short.value == pytest.approx(100 * 0.2**0.25 * math.exp(-0.2))


def test_sacrebleu_tokenizes_and_says_how() -> None:
    # 13a splits the full stop off, so the two lines share the 5-gram "a b c d ." but for one word.
    score = sacrebleu_score(["a b c d."], ["a b c d."])
    assert score.value == pytest.approx(100)
    assert len(score.precisions) == 4
    assert "tok:13a" in score.signature
    assert "version:" in score.signature
    assert chrf_score(["abc"], ["abc"]).value == pytest.approx(100)
    assert chrf_score(["xyz"], ["abc"]).value == pytest.approx(0)


def test_scores_need_one_reference_per_translation() -> None:
    for measure in (sacrebleu_score, tokenized_bleu, chrf_score):
        with pytest.raises(UserError, match="got 1 for 2 translations"):
            measure(["a", "b"], ["a"])
