"""Beam search whose step is a CUDA graph: one launch a token instead of hundreds.

A replay computes what `decode.beam_search` computes, on memory of fixed size: rows of sentences that are done go on,
and nobody reads them. What happened is noted on the device and read at the end. Nothing here may decide a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro.errors import UserError
from fp8repro.models.parts import FixedState, TranslationModel
from fp8repro.precision.graphs import capture, why_not_captured
from fp8repro.precision.injection import context_of, fixed_weights
from fp8repro.precision.offers import Offers
from fp8repro.settings.schema import DecodeConfig
from fp8repro.training.tasks.decode import (
    Hypothesis,
    beam_search,
    continuing,
    coverage_penalty,
    hypothesis,
    length_limits,
    propose,
    require_attention,
)

# Tokens that a cache has room for are padded to it: rows of 8-bit codes begin where kernels read whole vectors.
MULTIPLE = 16
# Steps between two looks at whether all sentences are done; each look waits for the device.
LOOK_EVERY = 8


class Searches:
    """Replays searches instead of `beam_search` where that is possible.

    Attributes:
        why_not: why nothing is replayed, in one line; None if something may be.
    """

    def __init__(self, graphs: str, config: DecodeConfig) -> None:
        """Nothing is captured yet; `graphs` is the setting "auto" or "off"."""
        self.config, self._graphs = config, graphs
        self.why_not: str | None = "nothing was translated"
        self._shapes: set[tuple[int, int]] = set()
        self._why_no_more: str | None = None

    @contextmanager
    def of(self, model: TranslationModel[Any]) -> Iterator[Callable[[Tensor], list[list[Hypothesis]]]]:
        """Searches of a model in evaluation mode, none of whose weights changes inside; see `beam_search`."""
        graphs: dict[int, GraphedSearch] = {}
        self.why_not = "graphs=off" if self._graphs == "off" else why_never(model)
        with fixed_weights(model):
            yield lambda source: self._search(model, source, graphs)

    def summary(self) -> str:
        """One line for the run's record."""
        if not self._shapes:
            return self._why_no_more or self.why_not or "nothing was replayed"
        rest = f", not for others: {self._why_no_more}" if self._why_no_more else ""
        return f"replayed for {len(self._shapes)} shapes of batches{rest}"

    def _search(
        self, model: TranslationModel[Any], source: Tensor, graphs: dict[int, GraphedSearch]
    ) -> list[list[Hypothesis]]:
        graph = graphs.get(source.shape[1])
        if graph is None or len(source) > graph.count:
            graph = None if self.why_not or self._why_no_more else self._captured(model, source, graphs)
        if graph is not None:
            try:
                return graph(source)
            except torch.OutOfMemoryError:
                self._why_no_more = "no memory for a batch beside the graphs"
                graphs.clear()
                del graph
        return beam_search(model, source, self.config)

    def _captured(
        self, model: TranslationModel[Any], source: Tensor, graphs: dict[int, GraphedSearch]
    ) -> GraphedSearch | None:
        try:
            graph = GraphedSearch(model, source, self.config, next(iter(graphs.values()), None))
        except UserError:
            raise
        # Out of memory, or an operation that cannot be captured.
        except (RuntimeError, ValueError) as error:
            self._why_no_more = f"a search could not be captured ({str(error).splitlines()[0][:200]})"
            return None
        graphs[source.shape[1]] = graph
        self._shapes.add((graph.count, source.shape[1]))
        return graph


def why_never(model: TranslationModel[Any]) -> str | None:
    """Why no search of a model can be captured, in one line; None where one may be."""
    if not isinstance(model, nn.Module):
        return "the model is no module"
    device = next(p.device for p in model.parameters())
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return "autocast"
    return why_not_captured(model)


class GraphedSearch:
    """Beam search over sources of one shape, a replay for each token.

    The model's weights must not change while it is used, within one block of `fixed_weights`: the graph reads what was
    rounded when it was captured.
    """

    @torch.no_grad()
    def __init__(
        self, model: TranslationModel[Any], source: Tensor, config: DecodeConfig, beside: GraphedSearch | None = None
    ) -> None:
        """Capture a step.

        Args:
            model: in evaluation mode, on a GPU.
            source: ids [B, S]; every batch of as many columns and at most as many rows can be searched.
            config: beam and penalties.
            beside: another search of the model, whose graph's memory this one shares; they take turns.

        Raises:
            ValueError: the state of the model's decoder has no form of fixed size.
            UserError: a coverage penalty for a model that gives no attention.
        """
        self.model, self.config = model, config
        self.count, width = source.shape
        device, beam = source.device, config.beam
        self._capacity = -(-(int(config.max_length_a * width) + config.max_length_b) // MULTIPLE) * MULTIPLE
        self._rows = torch.arange(self.count, device=device).repeat_interleave(beam)
        state = self._begin(source)
        if not hasattr(state, "fixed"):
            raise ValueError(f"{type(model).__name__} has no decoder of a fixed size")
        self._state: FixedState = state.fixed(self._capacity)

        def memory(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        long, sentences, rows = torch.int64, self.count, self.count * beam
        self._limits, self._finished = memory(sentences, dtype=long), memory(sentences, dtype=long)
        self._searching = memory(sentences, dtype=torch.bool)
        self._length, self._tokens = memory(1, dtype=long), memory(rows, dtype=long)
        self._scores = memory(sentences, beam)
        self._coverage, self._present = memory(rows, width), memory(rows, width, dtype=torch.bool)
        # Of each step: what ended there, and where each row comes from, and by which token.
        self._ends = memory(self._capacity, sentences, beam, dtype=torch.bool)
        self._ended_rows = memory(self._capacity, sentences, beam, dtype=long)
        self._ended_scores, self._uncovered = (memory(self._capacity, sentences, beam) for _ in range(2))
        self._origins, self._words = (memory(self._capacity, rows, dtype=long) for _ in range(2))
        self._restart(source, state)
        self._pool: Any = None if beside is None else beside._pool
        if beside is None and device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        try:
            self._replay = capture(self._advance, device, self._pool)
        finally:
            # They lie in the graph's memory.
            self._forget_offers()

    @torch.no_grad()
    def __call__(self, source: Tensor) -> list[list[Hypothesis]]:
        """See `beam_search`.

        Raises:
            ValueError: a batch that does not fit.
        """
        count, width = source.shape
        if count > self.count or width != self._present.shape[1]:
            raise ValueError(
                f"source: got {count} x {width}, expected at most {self.count} rows of {self._present.shape[1]}"
            )
        limits = length_limits(source, self.model.pad, self.config)
        # A row of padding alone has nothing to attend to.
        filler = F.pad(source.new_full((self.count - count, 1), self.model.eos), (0, width - 1), value=self.model.pad)
        whole = torch.cat([source, filler])
        self._restart(whole, self._begin(whole), limits)
        steps = 0
        for steps in range(1, max(limits) + 1):
            self._replay()
            if steps % LOOK_EVERY == 0 and not self._searching.any():
                break
        return self._hypotheses(count, steps)

    def _begin(self, source: Tensor) -> Any:
        state = self.model.begin(source)
        state.select(self._rows)
        return state

    def _restart(self, source: Tensor, state: Any, limits: Sequence[int] = ()) -> None:
        """Write what a search starts from; rows without a limit are done."""
        self._state.restart(state)
        limits = [*limits, *[0] * (self.count - len(limits))]
        self._limits.copy_(torch.tensor(limits))
        self._searching.copy_(self._limits > 0)
        self._finished.zero_()
        self._length.fill_(1)
        self._tokens.fill_(self.model.eos)
        # All rows of a sentence begin alike, so only the first may propose candidates.
        self._scores.fill_(-math.inf)
        self._scores[:, 0] = 0.0
        self._coverage.zero_()
        self._present.copy_(source.ne(self.model.pad)[self._rows])

    def _advance(self) -> None:
        """What a replay repeats on the device alone: extend every row by a token."""
        # Codes that were offered for memory that stays are those of an earlier batch.
        self._forget_offers()
        beam = self.config.beam
        logits, attention = self.model.step(self._tokens, self._state)
        if self.config.coverage:
            self._coverage += require_attention(attention, self.config)
        found = propose(logits, self._scores, self._length >= self._limits, self.model)
        self._note(*(t[:, :beam] for t in (found.scores, found.rows, found.ends)))
        scores, rows, tokens = continuing(found, beam)
        more = scores.isfinite().any(1) & (self._length < self._limits) & (self._finished < beam)
        self._searching &= more
        self._scores.copy_(scores)
        self._tokens.copy_(tokens.flatten())
        rows = rows.flatten()
        self._write(self._origins, rows)
        self._write(self._words, self._tokens)
        self._coverage.copy_(self._coverage[rows])
        # The only row of a sentence follows itself.
        self._state.settle(rows if beam > 1 else None)
        self._length += 1

    def _note(self, scores: Tensor, rows: Tensor, ends: Tensor) -> None:
        """Note the candidates that end [sentences, beam], as `beam_search` records them."""
        ends = ends & scores.isfinite() & self._searching.unsqueeze(1)
        self._finished += ends.sum(1)
        for log, value in ((self._ends, ends), (self._ended_rows, rows), (self._ended_scores, scores)):
            self._write(log, value)
        if self.config.coverage:
            chosen = rows.flatten()
            penalties = coverage_penalty(self._coverage[chosen], self._present[chosen], self.config.coverage)
            self._write(self._uncovered, penalties.view_as(scores))

    def _write(self, log: Tensor, value: Tensor) -> None:
        """Write what a step notes: the place is in device memory, too."""
        log.index_copy_(0, self._length - 1, value.unsqueeze(0))

    def _hypotheses(self, count: int, steps: int) -> list[list[Hypothesis]]:
        """What was noted in so many steps, of the first `count` sentences."""
        logs = (self._ended_rows, self._ended_scores, self._uncovered, self._origins, self._words)
        ends = self._ends[:steps].cpu()
        rows, scores, uncovered, origins, words = (log[:steps].cpu().numpy() for log in logs)
        found: list[list[Hypothesis]] = [[] for _ in range(count)]
        for step, sentence, place in ends.nonzero().tolist():
            tokens, row = [], rows[step, sentence, place]
            for before in reversed(range(step)):
                tokens.append(int(words[before, row]))
                row = origins[before, row]
            at = (step, sentence, place)
            found[sentence].append(hypothesis(float(scores[at]), tokens[::-1], float(uncovered[at]), self.config))
        return [sorted(each, reverse=True)[: self.config.beam] for each in found]

    def _forget_offers(self) -> None:
        context = context_of(self.model) if isinstance(self.model, nn.Module) else None
        if context is not None:
            context.offers = Offers()
