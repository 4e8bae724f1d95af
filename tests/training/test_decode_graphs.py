"""Beam search by replayed steps finds what the eager one finds, to the score's last bit. What replays is a stand-in."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replaying import Small, capture, stand_in_for_a_gpu
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fp8repro.errors import UserError
from fp8repro.kernels.shared.launch import INTERPRETED
from fp8repro.models.gnmt import gnmt
from fp8repro.models.transformer import transformer
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject
from fp8repro.settings.recipes import load_recipe
from fp8repro.settings.schema import DecodeConfig
from fp8repro.training.tasks import decode_graphs
from fp8repro.training.tasks.decode import Hypothesis, beam_search
from fp8repro.training.tasks.decode_graphs import LOOK_EVERY, GraphedSearch, Searches

WORDS, PAD, EOS = 20, 1, 2
MODELS: dict[str, Callable[..., Any]] = {
    "transformer": partial(transformer, WORDS, heads=2, width=8, ffn_width=8, encoder_layers=1, decoder_layers=2),
    "gnmt": partial(gnmt, WORDS, layers=3, width=8),
}


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches are captured, whatever the device and the backend."""
    monkeypatch.setattr(decode_graphs, "capture", capture)
    monkeypatch.setattr(decode_graphs, "why_not_captured", lambda model: None)


def tiny(name: str, seed: int, precision: str = "fp32", backend: str = "emulate", **size: Any) -> Any:
    """Weights that make some translations end early."""
    torch.manual_seed(seed)
    model = MODELS[name](**size)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    if precision != "fp32":
        inject(model, load_recipe(precision), StepContext(seed=3), backend)
    return model.eval()


def batch(rows: int, width: int, seed: int) -> Tensor:
    """Sentences of many lengths, one of them as long as the batch is wide."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.full((rows, width), PAD)
    for row in range(rows):
        length = width - 1 if row == 0 else int(torch.randint(1, width - 1, (), generator=generator))
        source[row, :length] = torch.randint(4, WORDS, (length,), generator=generator)
        source[row, length] = EOS
    return source


def both(model: Any, batches: list[Tensor], config: DecodeConfig) -> tuple[list[list[list[Hypothesis]]], ...]:
    """What is found by replays, and by the eager search."""
    searches = Searches("auto", config)
    with torch.no_grad(), searches.of(model) as search:
        found = [search(source) for source in batches]
    widths = {source.shape[1] for source in batches}
    assert searches.summary() == f"replayed for {len(widths)} shapes of batches"
    return found, [beam_search(model, source, config) for source in batches]


class InDouble(TorchFunctionMode):
    """Products and softmax in FP64, rounded to FP32: their bits do not depend on rows that are gone, nor on zeros."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in (F.linear, torch.matmul, torch.softmax):
            return func(*args, **(kwargs or {}))
        dim = (kwargs or {}).get("dim")
        wide = (t.double() if isinstance(t, Tensor) else t for t in args)
        return (func(*wide) if dim is None else func(*wide, dim=dim)).float()


# The second batch is padded to the first one's rows, the third has a graph of its own.
BATCHES = [batch(5, 8, 1), batch(3, 8, 2), batch(2, 16, 3)]


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_replayed_searches_find_what_eager_ones_find(precision: str, name: str, beam: int, replayed: None) -> None:
    config = DecodeConfig(beam, "wu", coverage=0.2 if name == "gnmt" else 0.0, max_length_a=1.0, max_length_b=2)
    lengths = set()
    # Searches that end early, and those that end at their limit.
    for seed in (1, 4, 5) if name == "transformer" else (0, 4):
        with InDouble() if precision == "fp32" else nullcontext():
            found, expected = both(tiny(name, seed, precision), BATCHES, config)
        assert found == expected
        lengths |= {len(h.tokens) for sentences in found for each in sentences for h in each}
    assert min(lengths) < 4
    assert max(lengths) >= 9


@pytest.mark.skipif(not INTERPRETED, reason="stands in for the graph that a GPU has")
@pytest.mark.parametrize(
    ("name", "beam"),
    [
        ("gnmt", 2),
        *(pytest.param(name, beam, marks=pytest.mark.long) for name in MODELS for beam in (1, 4)),
    ],
)
def test_the_kernels_find_it_too(name: str, beam: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_a_gpu(monkeypatch.setattr)
    config = DecodeConfig(beam=beam, max_length_a=0.0, max_length_b=2)
    size = {"layers": 2} if name == "gnmt" else {"decoder_layers": 1}
    found, expected = both(tiny(name, 0, "fp8", "triton", **size), [batch(2, 4, 1)], config)
    assert found == expected


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_of_an_earlier_batch(name: str, replayed: None) -> None:
    model, word = tiny(name, 3, **({} if name == "gnmt" else {"tie_output": False})), 7
    embedding = model.embedding if name == "gnmt" else model.encoder.embed_tokens
    nn.init.constant_(embedding.weight[word], math.inf)
    first, second = batch(2, 8, 1), batch(2, 8, 2)
    first[:, 0] = word
    second[second == word] = word + 1
    config = DecodeConfig(beam=1, max_length_a=0.0, max_length_b=3)
    with InDouble():
        (bad, good), expected = both(model, [first, second], config)
    assert bad == [[], []]
    assert all(good)
    assert [bad, good] == expected


def test_a_search_whose_sentences_are_done_is_left(replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = tiny("gnmt", 0), []
    nn.init.zeros_(model.decoder.classifier.weight)
    with torch.no_grad():
        model.decoder.classifier.bias[EOS] = 50.0
    advance = GraphedSearch._advance
    monkeypatch.setattr(GraphedSearch, "_advance", lambda search: (steps.append(1), advance(search)))
    search = GraphedSearch(model, BATCHES[0], DecodeConfig(beam=1, max_length_b=60))
    steps.clear()
    assert [found[0].tokens for found in search(BATCHES[0])] == [()] * 5
    assert len(steps) == LOOK_EVERY


@pytest.mark.parametrize(
    ("why", "expected"),
    [
        ("off", "graphs=off"),
        ("device", "the model is on cpu, and CUDA graphs need a GPU"),
        ("backend", "products by backend=emulate draw random bits on the host"),
        ("autocast", "autocast"),
        ("model", "a search could not be captured (Small has no decoder of a fixed size)"),
        ("memory", "a search could not be captured (no memory)"),
    ],
)
def test_the_eager_search_serves_and_the_record_says_why(
    why: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gnmt", 0, "fp8" if why == "backend" else "fp32")
    if why in ("model", "memory"):
        monkeypatch.setattr(decode_graphs, "why_not_captured", lambda model: None)
    if why == "model":
        model = Small(WORDS, PAD, EOS).eval()
    if why == "memory":

        def capture(*_: Any) -> None:
            raise torch.OutOfMemoryError("no memory\nat all")

        monkeypatch.setattr(decode_graphs, "capture", capture)
    config = DecodeConfig(beam=2)
    searches = Searches("off" if why == "off" else "auto", config)
    assert searches.summary() == "nothing was translated"
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"), searches.of(model) as search:
        assert [search(source) for source in BATCHES] == [beam_search(model, source, config) for source in BATCHES]
    assert searches.summary() == expected


def test_shapes_that_cannot_be_captured_are_searched_eagerly(replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, captured = tiny("transformer", 4, "fp8"), DecodeConfig(beam=2), []

    def once(*arguments: Any) -> Callable[[], None]:
        captured.append(1)
        if len(captured) > 1:
            raise RuntimeError("no memory")
        return capture(*arguments)

    monkeypatch.setattr(decode_graphs, "capture", once)
    searches = Searches("auto", config)
    with searches.of(model) as search:
        assert [search(source) for source in BATCHES] == [beam_search(model, source, config) for source in BATCHES]
    assert searches.summary() == (
        "replayed for 1 shapes of batches, not for others: a search could not be captured (no memory)"
    )
    assert len(captured) == 2


def test_a_batch_without_memory_beside_the_graphs_is_searched_eagerly(
    replayed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config, batches = tiny("transformer", 4, "fp8"), DecodeConfig(beam=2), []
    call = GraphedSearch.__call__

    def full(search: GraphedSearch, source: Tensor) -> list[list[Hypothesis]]:
        batches.append(source)
        if len(batches) == 2:
            raise torch.OutOfMemoryError("no memory")
        return call(search, source)

    monkeypatch.setattr(GraphedSearch, "__call__", full)
    searches = Searches("auto", config)
    with searches.of(model) as search:
        assert [search(source) for source in BATCHES] == [beam_search(model, source, config) for source in BATCHES]
    assert len(batches) == 2
    assert searches.summary().endswith("batches, not for others: no memory for a batch beside the graphs")


def test_mistakes(replayed: None) -> None:
    with pytest.raises(UserError, match=r"decode\.coverage: got 0\.1"):
        both(tiny("transformer", 0), BATCHES, DecodeConfig(coverage=0.1))
    search = GraphedSearch(tiny("gnmt", 0), BATCHES[1], DecodeConfig(beam=1))
    for source in (BATCHES[0], BATCHES[2]):
        with pytest.raises(ValueError, match=r"^source: got \d x \d+, expected at most 3 rows of 8$"):
            search(source)
