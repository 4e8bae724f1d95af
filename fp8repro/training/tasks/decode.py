"""Batched beam search over any `TranslationModel`; greedy search is a beam of one. Never changes the model's mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8repro.errors import UserError
from fp8repro.models.parts import DecoderState, TranslationModel
from fp8repro.precision.injection import fixed_weights
from fp8repro.settings.schema import DecodeConfig

# Normalization of a hypothesis' log probability by its length in tokens, EOS counted.
LENGTH_PENALTIES: dict[str, Callable[[int, float], float]] = {
    "fairseq": lambda length, alpha: length**alpha,
    "wu": lambda length, alpha: ((5 + length) / 6) ** alpha,
}


@dataclass(frozen=True, order=True)
class Hypothesis:
    """A finished translation: normalized score, summed log probability, and ids without EOS."""

    score: float
    log_probability: float
    tokens: tuple[int, ...] = field(compare=False)


@dataclass
class _Sentence:
    """A source sentence: its index in the batch, length limit of its translation, finished hypotheses."""

    index: int
    limit: int
    finished: list[Hypothesis] = field(default_factory=list)


class Candidates(NamedTuple):
    """Ways to go on, the best of each sentence first: [sentences, ways] each.

    Attributes:
        scores: summed log probability; -inf of one that is impossible.
        rows: which row goes on.
        tokens: by which token.
        ends: the token is EOS.
    """

    scores: Tensor
    rows: Tensor
    tokens: Tensor
    ends: Tensor


def propose(logits: Tensor, scores: Tensor, ending: Tensor, model: TranslationModel[Any]) -> Candidates:
    """The best ways to extend every sentence by a token.

    Args:
        logits: of the rows' next tokens [sentences * beam, V].
        scores: of the rows so far [sentences, beam].
        ending: bool [sentences], True where every row has to end.
        model: whose padding is no token, and whose EOS ends.
    """
    count, beam = scores.shape
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    log_probs[:, model.pad] = -math.inf
    vocabulary = log_probs.shape[1]
    not_eos = torch.arange(vocabulary, device=logits.device) != model.eos
    log_probs = log_probs.view(count, beam, vocabulary)
    log_probs = log_probs.masked_fill(ending[:, None, None] & not_eos, -math.inf)
    candidates = (scores.unsqueeze(-1) + log_probs).flatten(1)
    # Each row has one EOS candidate, so of 2 * beam candidates at least `beam` continue.
    best, flat = candidates.nan_to_num(nan=-math.inf, neginf=-math.inf).topk(min(2 * beam, candidates.shape[1]))
    rows = flat // vocabulary + torch.arange(count, device=flat.device).unsqueeze(1) * beam
    tokens = flat % vocabulary
    return Candidates(best, rows, tokens, tokens.eq(model.eos))


def continuing(found: Candidates, beam: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, rows and tokens [sentences, beam] of the candidates that go on, best first; -inf where there are none."""
    # Candidates that continue come first; both groups stay ordered by score.
    going = found.ends.to(torch.int8).argsort(dim=1, stable=True)[:, :beam]
    scores = found.scores.masked_fill(found.ends, -math.inf)
    return scores.gather(1, going), found.rows.gather(1, going), found.tokens.gather(1, going)


def coverage_penalty(coverage: Tensor, present: Tensor, weight: float) -> Tensor:
    """GNMT's penalty for source tokens that got less than one unit of attention; EOS's own step counts.

    Args:
        coverage: summed attention [rows, S].
        present: bool [rows, S], False at padding.
        weight: of the penalty.
    """
    return weight * (coverage.clamp(1e-9, 1.0).log() * present).sum(1)


@torch.no_grad()
def beam_search(model: TranslationModel[Any], source: Tensor, config: DecodeConfig) -> list[list[Hypothesis]]:
    """Translate a batch.

    A sentence is done when `beam` hypotheses are finished. At its longest length every hypothesis must end.

    Args:
        model: in evaluation mode.
        source: ids [B, S], padded on the right.
        config: beam and penalties.

    Returns:
        For each sentence its finished hypotheses, best first; empty where the model's scores are not finite.

    Raises:
        UserError: a coverage penalty for a model that gives no attention.
    """
    state = model.begin(source)
    sentences = [_Sentence(index, limit) for index, limit in enumerate(length_limits(source, model.pad, config))]
    results: list[list[Hypothesis]] = [[] for _ in sentences]
    search = _Search(model, state, source, config, sentences)
    with fixed_weights(model):
        while search.sentences:
            for sentence in search.advance():
                results[sentence.index] = sorted(sentence.finished, reverse=True)[: config.beam]
    return results


class _Search:
    """The rows under search: `beam` of each sentence that is not done, in the order of `sentences`."""

    def __init__(
        self,
        model: TranslationModel[Any],
        state: DecoderState,
        source: Tensor,
        config: DecodeConfig,
        sentences: list[_Sentence],
    ) -> None:
        self.model, self.state, self.config, self.sentences = model, state, config, sentences
        count, beam = len(sentences), config.beam
        rows = torch.arange(count, device=source.device).repeat_interleave(beam)
        state.select(rows)
        self.source_present = source.ne(model.pad)[rows]
        self.history = torch.full((count * beam, 1), model.eos, dtype=torch.int64, device=source.device)
        # All rows of a sentence begin alike, so only the first may propose candidates.
        self.scores = torch.full((count, beam), -math.inf, device=source.device)
        self.scores[:, 0] = 0.0
        self.coverage = torch.zeros(source.shape, device=source.device)[rows]

    def advance(self) -> list[_Sentence]:
        """Extend every row by a token; gives the sentences that are done with it, which are then dropped."""
        beam = self.config.beam
        logits, attention = self.model.step(self.history[:, -1], self.state)
        if self.config.coverage:
            self.coverage += require_attention(attention, self.config)
        length = self.history.shape[1]
        ending = torch.tensor([length >= s.limit for s in self.sentences], device=logits.device)
        found = propose(logits, self.scores, ending, self.model)
        self._finish(found)
        scores, rows, tokens = continuing(found, beam)
        possible = scores.isfinite().any(1).tolist()
        staying = [
            index
            for index, sentence in enumerate(self.sentences)
            if possible[index] and length < sentence.limit and len(sentence.finished) < beam
        ]
        leaving = [sentence for index, sentence in enumerate(self.sentences) if index not in set(staying)]
        keep = torch.tensor(staying, device=logits.device, dtype=torch.int64)
        rows = rows[keep].flatten()
        self.scores = scores[keep]
        self.history = torch.cat([self.history[rows], tokens[keep].view(-1, 1)], dim=1)
        self.coverage, self.source_present = self.coverage[rows], self.source_present[rows]
        self.state.select(rows)
        self.sentences = [self.sentences[index] for index in staying]
        return leaving

    def _finish(self, found: Candidates) -> None:
        """Record the candidates that end, of the best `beam`."""
        scores, rows, _, is_eos = (t[:, : self.config.beam] for t in found)
        ends = is_eos & scores.isfinite()
        chosen = rows[ends]
        values = scores[ends].tolist()
        tokens = self.history[chosen, 1:].tolist()
        missing = [0.0] * len(chosen)
        if self.config.coverage:
            penalties = coverage_penalty(self.coverage[chosen], self.source_present[chosen], self.config.coverage)
            missing = penalties.tolist()
        for sentence, value, ids, uncovered in zip(ends.nonzero()[:, 0].tolist(), values, tokens, missing, strict=True):
            self.sentences[sentence].finished.append(hypothesis(value, ids, uncovered, self.config))


def hypothesis(log_probability: float, tokens: Sequence[int], uncovered: float, config: DecodeConfig) -> Hypothesis:
    """A hypothesis by its summed log probability, its ids without EOS, and its coverage penalty."""
    penalty = LENGTH_PENALTIES[config.length_penalty](len(tokens) + 1, config.alpha)
    return Hypothesis(log_probability / penalty + uncovered, log_probability, tuple(tokens))


def require_attention(attention: Tensor | None, config: DecodeConfig) -> Tensor:
    """Attention in FP32, for the coverage penalty.

    Raises:
        UserError: the model gives none.
    """
    if attention is None:
        raise UserError(f"decode.coverage: got {config.coverage}, expected 0 (the model has no attention)")
    return attention.float()


def length_limits(source: Tensor, pad: int, config: DecodeConfig) -> list[int]:
    """The most tokens, EOS counted, of the translation of each row of source ids [B, S]."""
    lengths = source.ne(pad).sum(1).tolist()
    return [int(config.max_length_a * length) + config.max_length_b for length in lengths]


def best_tokens(found: Sequence[Hypothesis]) -> list[int]:
    """Ids of the best hypothesis; none where there is none."""
    return list(found[0].tokens) if found else []
