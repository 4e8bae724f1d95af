"""Translation as a task of the training loop: batches by tokens, smoothed loss, perplexity, BLEU at the end."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fp8repro.data.translation import text
from fp8repro.data.translation.batching import Batch, TranslationBatches, make_batch, pad_sequences, pair_lengths
from fp8repro.data.translation.buckets import Rows, evaluation_batches, padded_lengths
from fp8repro.data.translation.datasets import CODES_FILE, Split, load_translation
from fp8repro.data.translation.languages import CUT_BY_SCRIPT, scoring_language
from fp8repro.data.translation.vocabulary import EOS, PAD
from fp8repro.errors import UserError
from fp8repro.models.fairseq_model import fairseq_transformer
from fp8repro.models.gnmt import gnmt
from fp8repro.models.transformer import transformer
from fp8repro.paper.run_folder import HYPOTHESES, REFERENCES
from fp8repro.settings.schema import DataConfig, ModelConfig, TrainerConfig
from fp8repro.training.distributed import World
from fp8repro.training.tasks.bleu import Score, chrf_score, sacrebleu_score, tokenized_bleu
from fp8repro.training.tasks.decode import best_tokens
from fp8repro.training.tasks.decode_graphs import Searches
from fp8repro.training.tasks.task import Examples, Poll, no_poll, polled

SAMPLES = "samples.txt"
SAMPLE_COUNT = 20
MODELS: dict[str, Callable[..., nn.Module]] = {
    "transformer": transformer,
    "gnmt": gnmt,
    "fairseq_transformer": fairseq_transformer,
}


class TranslationTask:
    """A `Task`: a translation model on parallel text; loss per target token, perplexity, BLEU of beam search."""

    unit = "tokens"

    def __init__(
        self,
        model: ModelConfig,
        data: DataConfig,
        trainer: TrainerConfig,
        searches: Searches,
        seed: int,
        world: World,
    ) -> None:
        """Load the data, preparing it at first use.

        Raises:
            UserError: data that is missing or malformed, or a batch too small for its longest sentence.
        """
        self.network, self.trainer, self.searches, self.world = model, trainer, searches, world
        self.data = load_translation(data.name, data.root, data.options, data.workers)
        self.scored_as = scoring_language(self.data.languages[1], self.data.test.references)
        budget = trainer.batch_size // (trainer.micro_steps * world.size)
        self.batches = TranslationBatches(self.data.train, budget, seed, world.rank, world.size)

    def model(self) -> nn.Module:
        """See `Task`.

        Raises:
            UserError: an unknown model or dimension.
        """
        name = self.network.name
        if name not in MODELS:
            raise UserError(f"model.name: got {name!r}, expected one of {', '.join(MODELS)}")
        return MODELS[name](len(self.data.vocabulary), PAD, EOS, **self.network.size)

    def examples(self) -> Examples:
        """See `Task`."""
        lengths = pair_lengths(self.data.valid)
        longest = int(padded_lengths(lengths).max(initial=0))
        evaluation = evaluation_batches(lengths, max(self.trainer.eval_batch_size, longest))
        shapes = {(len(rows.indices), *rows.widths) for rows in evaluation}
        return Examples(
            *([_example(*shape) for shape in sorted(found)] for found in (set(self.batches.plan.shapes), shapes))
        )

    def identity(self) -> dict[str, Any]:
        """See `Task`: a checkpoint fits a vocabulary, the subword codes that fill it, and the training pairs."""
        words = "\n".join(self.data.vocabulary.tokens)
        codes = self.data.folder / CODES_FILE
        return {
            "vocabulary_size": len(self.data.vocabulary),
            "vocabulary": _digest(words.encode()),
            "bpe_codes": _digest(codes.read_bytes()) if codes.is_file() else None,
            "train_pairs": len(self.data.train.source),
            "train_tokens": int(self.data.train.target.sizes.sum()),
            # With other batches, a position in the data is another one.
            "batches": len(self.batches),
        }

    def batch_report(self) -> dict[str, Any]:
        """See `Task`."""
        return self.batches.report()

    def count(self, batch: Batch) -> int:
        """See `Task`."""
        return batch.target_tokens

    @property
    def why_not_replayed(self) -> str | None:
        """See `Task`."""
        if self.network.name == "fairseq_transformer":
            return "fairseq's model asks the device whether a batch is padded"
        return None

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """See `Task`."""
        return batch.source, batch.decoder_input, batch.target

    def largest_batch(self) -> Batch:
        """See `Task`."""

        def elements(rows: Rows) -> int:
            # The decoder's tensors, above all the logits, are the larger ones.
            return len(rows.indices) * (rows.widths[0] + 2 * rows.widths[1])

        rows = max(self.batches.plan.batches(), key=elements)
        return make_batch(self.data.train, rows.indices.tolist(), rows.widths)

    def loss(self, model: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task`; the figure is the loss without smoothing."""
        source, decoder_input, target = (t.to(self.world.device) for t in inputs)
        logits = model(source, decoder_input)
        loss, nll = smoothed_loss(logits, target, self.trainer.label_smoothing, self.trainer.smoothing_form)
        return loss, {"nll": nll.detach()}

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """See `Task`."""
        return {"perplexity": perplexity(means["nll"])}

    def evaluate(self, model: nn.Module, split: str, poll: Poll = no_poll) -> dict[str, float]:
        """See `Task`: loss without smoothing and perplexity; of the split "test" BLEU and chrF too."""
        pairs: Split = {"val": self.data.valid, "train": self.data.train, "test": self.data.test}[split]
        total, count = 0.0, 0
        for rows in self._eval_batches(pair_lengths(pairs), 1, poll):
            batch = make_batch(pairs, rows.indices.tolist(), rows.widths).to(self.world.device)
            _, nll = smoothed_loss(model(batch.source, batch.decoder_input), batch.target)
            total, count = total + nll.item(), count + batch.target_tokens
        loss_sum, tokens = self.world.sum([total, count])
        loss = loss_sum / tokens
        metrics = {"loss": loss, "perplexity": perplexity(loss)}
        if split == "test":
            hypotheses = [self.data.detokenize(ids) for ids in self.translate(model, pairs, poll)]
            metrics["bleu"] = sacrebleu_score(hypotheses, pairs.references, self.scored_as).value
            metrics["chrf"] = chrf_score(hypotheses, pairs.references).value
        return metrics

    def chance(self) -> dict[str, float]:
        """See `Task`."""
        return {"loss": math.log(len(self.data.vocabulary))}

    def score(self, metrics: dict[str, float]) -> float:
        """See `Task`."""
        return -metrics["loss"]

    def finish(self, model: nn.Module, metrics: dict[str, float], folder: Path, poll: Poll = no_poll) -> dict[str, Any]:
        """See `Task`: translates the test split; writes translations, references and samples."""
        test = self.data.test
        started = time.monotonic()
        found = self.translate(model, test, poll)
        seconds = time.monotonic() - started
        hypotheses, references = [self.data.detokenize(ids) for ids in found], test.references
        bleu = sacrebleu_score(hypotheses, references, self.scored_as)
        chrf = chrf_score(hypotheses, references)
        on_words = bleu if self.scored_as in CUT_BY_SCRIPT else self._score_on_words(found)
        # Without their unknown words, references give scores that are not comparable.
        suffix = "|refs:ids" if self.data.references_from == "ids" else ""
        if self.world.is_main:
            _write_lines(folder / HYPOTHESES, hypotheses)
            _write_lines(folder / REFERENCES, references)
            _write_lines(folder / SAMPLES, self._samples(hypotheses))
        return {
            "bleu": bleu.value,
            "bleu_signature": bleu.signature + suffix,
            "chrf": chrf.value,
            "chrf_signature": chrf.signature + suffix,
            "bleu_tokenized": on_words.value,
            "bleu_tokenized_signature": on_words.signature + suffix,
            "references_from": self.data.references_from,
            "subwords": self.data.scheme.name,
            "brevity_penalty": bleu.brevity_penalty,
            "perplexity": metrics["perplexity"],
            "decode_graphs": self.searches.summary(),
            "decode_seconds": seconds,
            "decode_tokens_per_second": sum(len(ids) + 1 for ids in found) / seconds,
            "skipped_pairs": dict(self.data.skipped),
        }

    def translate(self, model: nn.Module, split: Split, poll: Poll = no_poll) -> list[list[int]]:
        """Best translation (ids without EOS) of each sentence of a split, in its order; the same on every rank.

        That of an empty line is empty.
        """
        found: dict[int, list[int]] = {}
        filled = np.flatnonzero(split.source.sizes > 1)
        # A sentence takes `beam` rows.
        with self.searches.of(model) as search:  # type: ignore[arg-type]
            for rows in self._eval_batches(split.source.sizes[filled, None], self.searches.config.beam, poll):
                indices = filled[rows.indices].tolist()
                source = pad_sequences(split.source, indices, *rows.widths).to(self.world.device)
                found |= dict(zip(indices, map(best_tokens, search(source)), strict=True))
        if self.world.size > 1:
            shares: list[Any] = [None] * self.world.size
            dist.all_gather_object(shares, found)
            found = {index: ids for share in shares for index, ids in share.items()}
        return [found.get(index, []) for index in range(len(split.source))]

    def _score_on_words(self, found: list[list[int]]) -> Score:
        """BLEU on Moses tokens."""
        words = [" ".join(self.data.tokens(ids)) for ids in found]
        language = self.data.languages[1]
        return tokenized_bleu(words, [text.tokenize(line, language) for line in self.data.test.references])

    def _eval_batches(self, lengths: NDArray[np.int64], rows: int, poll: Poll) -> Iterator[Rows]:
        """This rank's batches of `trainer.eval_batch_size` tokens with `rows` rows a sentence; the longest first."""
        longest = int(padded_lengths(lengths).max(initial=0))
        batches = evaluation_batches(lengths, max(self.trainer.eval_batch_size // rows, longest))
        return polled(batches[self.world.rank :: self.world.size], -(-len(batches) // self.world.size), poll)

    def _samples(self, hypotheses: list[str]) -> list[str]:
        test, lines = self.data.test, []
        for index in range(0, len(hypotheses), -(-len(hypotheses) // SAMPLE_COUNT)):
            lines += [
                f"source      {self.data.detokenize(test.source[index].tolist(), side=0)}",
                f"reference   {test.references[index]}",
                f"translation {hypotheses[index]}",
                "",
            ]
        return lines


def smoothed_loss(logits: Tensor, target: Tensor, smoothing: float = 0.0, form: str = "all") -> tuple[Tensor, Tensor]:
    """Label-smoothed cross-entropy, summed over the target's tokens.

    Args:
        logits: [B, T, V].
        target: ids [B, T]; padding counts nothing.
        smoothing: share e of the probability that is spread.
        form: "all": e / V on each class (NVIDIA's GNMT); "others": e / (V - 1) on each class but the target (fairseq).

    Returns:
        The loss and the same without smoothing, both FP32.
    """
    log_probs = torch.log_softmax(logits.flatten(0, 1), dim=-1, dtype=torch.float32)
    target = target.flatten()
    nll = F.nll_loss(log_probs, target, ignore_index=PAD, reduction="sum")
    if not smoothing:
        return nll, nll
    classes = logits.shape[-1]
    # Smoothing over the other classes equals a slightly larger smoothing over all.
    share = smoothing if form == "all" else smoothing * classes / (classes - 1)
    spread = -log_probs.sum(-1).masked_fill(target.eq(PAD), 0.0).sum() / classes
    return (1 - share) * nll + share * spread, nll


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _example(rows: int, *widths: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty(rows, width, dtype=torch.long, device="meta") for width in widths)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))
