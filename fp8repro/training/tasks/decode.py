"""Batched beam search over any `TranslationModel`; greedy search is a beam of one. Never changes the model's mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

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
    lengths = source.ne(model.pad).sum(1).tolist()
    limits = [int(config.max_length_a * length) + config.max_length_b for length in lengths]
    sentences = [_Sentence(index, limit) for index, limit in enumerate(limits)]
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
        beam, eos = self.config.beam, self.model.eos
        logits, attention = self.model.step(self.history[:, -1], self.state)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        log_probs[:, self.model.pad] = -math.inf
        if self.config.coverage:
            if attention is None:
                raise UserError(f"decode.coverage: got {self.config.coverage}, expected 0 (the model has no attention)")
            self.coverage += attention.float()
        length = self.history.shape[1]
        ending = torch.tensor([length >= s.limit for s in self.sentences], device=logits.device)
        vocabulary = log_probs.shape[1]
        not_eos = torch.arange(vocabulary, device=logits.device) != eos
        log_probs = log_probs.view(len(self.sentences), beam, vocabulary)
        log_probs = log_probs.masked_fill(ending[:, None, None] & not_eos, -math.inf)
        candidates = (self.scores.unsqueeze(-1) + log_probs).flatten(1)
        # Each row has one EOS candidate, so of 2 * beam candidates at least `beam` continue.
        scores, flat = candidates.nan_to_num(nan=-math.inf, neginf=-math.inf).topk(min(2 * beam, candidates.shape[1]))
        origin = flat // vocabulary + torch.arange(len(self.sentences), device=flat.device).unsqueeze(1) * beam
        tokens = flat % vocabulary
        is_eos = tokens.eq(eos)
        self._finish(scores[:, :beam], origin[:, :beam], is_eos[:, :beam])
        # Candidates that continue come first; both groups stay ordered by score.
        going = is_eos.to(torch.int8).argsort(dim=1, stable=True)[:, :beam]
        scores = scores.masked_fill(is_eos, -math.inf).gather(1, going)
        possible = scores.isfinite().any(1).tolist()
        staying = [
            index
            for index, sentence in enumerate(self.sentences)
            if possible[index] and length < sentence.limit and len(sentence.finished) < beam
        ]
        leaving = [sentence for index, sentence in enumerate(self.sentences) if index not in set(staying)]
        keep = torch.tensor(staying, device=flat.device, dtype=torch.int64)
        rows = origin.gather(1, going)[keep].flatten()
        self.scores = scores[keep]
        self.history = torch.cat([self.history[rows], tokens.gather(1, going)[keep].view(-1, 1)], dim=1)
        self.coverage, self.source_present = self.coverage[rows], self.source_present[rows]
        self.state.select(rows)
        self.sentences = [self.sentences[index] for index in staying]
        return leaving

    def _finish(self, scores: Tensor, rows: Tensor, is_eos: Tensor) -> None:
        """Record the candidates that end."""
        length = self.history.shape[1]
        penalty = LENGTH_PENALTIES[self.config.length_penalty](length, self.config.alpha)
        ends = is_eos & scores.isfinite()
        chosen = rows[ends]
        values = scores[ends].tolist()
        tokens = self.history[chosen, 1:].tolist()
        missing = self._coverage_penalty(chosen)
        for sentence, value, ids, uncovered in zip(ends.nonzero()[:, 0].tolist(), values, tokens, missing, strict=True):
            score = value / penalty + uncovered
            self.sentences[sentence].finished.append(Hypothesis(score, value, tuple(ids)))

    def _coverage_penalty(self, rows: Tensor) -> list[float]:
        """GNMT's penalty for source tokens that got less than one unit of attention; EOS's own step counts."""
        if not self.config.coverage:
            return [0.0] * len(rows)
        logs = self.coverage[rows].clamp(1e-9, 1.0).log() * self.source_present[rows]
        return (self.config.coverage * logs.sum(1)).tolist()


def translate(model: TranslationModel[Any], batches: Iterable[Tensor], config: DecodeConfig) -> list[list[int]]:
    """Best translation (ids without EOS) of each sentence of each source batch, in order."""
    best = []
    for source in batches:
        best += [list(found[0].tokens) if found else [] for found in beam_search(model, source, config)]
    return best
