"""The benchmark of translation's training steps: what it compares, what it records, and what the page says of it."""

import time

import pytest
import torch

from fp8repro.bench import steps
from fp8repro.bench.gpu import Bench, markdown, read
from fp8repro.bench.kernels import main
from fp8repro.bench.steps import BF16, COMPILED, FP8, GRAPHED, measure, where_fp8_pays
from fp8repro.bench.translation_steps import MODELS, STEPS, TranslationWorkload, with_torchs_lstm
from fp8repro.errors import RunFailure
from fp8repro.kernels.shared.launch import INTERPRETED
from fp8repro.models.gnmt import LSTMLayer, gnmt

MACHINE = {"device": "Some GPU 9", "driver": "1.2", "torch": "2", "triton": "3", "commit": "abc"}


def bench():
    return Bench(torch.device("cpu"), MACHINE, scale=256)


def test_gnmt_with_torchs_lstm_is_the_same_model():
    torch.manual_seed(0)
    model = gnmt(40, layers=4, width=16, init_range=0.4)
    source, target = torch.randint(3, 40, (2, 3, 6))
    source[1, 4:] = 1
    with torch.no_grad():
        ours = model.eval()(source, target)
        theirs = with_torchs_lstm(model)(source, target)
    assert not any(isinstance(module, LSTMLayer) for module in model.modules())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("title", MODELS)
def test_a_bf16_step_trains(title):
    work = TranslationWorkload(title, bench())
    torch.manual_seed(0)
    model, optimizer = work.rival()
    work.rival = lambda: (model, optimizer)
    before = [p.clone() for p in model.parameters()]
    work.bf16()()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_models_have_the_sizes_that_their_names_promise():
    wide, found = Bench(torch.device("cpu"), MACHINE), []
    for title in MODELS:
        work = TranslationWorkload(title, wide)
        with torch.device("meta"):
            found.append(sum(p.numel() for p in work.make(work.words, 1, 2, **work.size).parameters()))
        assert [tuple(t.shape) for t in work.batch] == [(128, work.tokens // 128)] * 3
    # Matrices of six encoder and six decoder layers, and one embedding.
    for count, width in zip(found, (512, 1024), strict=False):
        assert count == pytest.approx(6 * (4 + 8) * width**2 + 12 * 2 * 4 * width**2 + 32320 * width, rel=0.01)
    # Gates of encoder and decoder, attention, embedding and classifier.
    encoder, decoder = 4 * (2 * 2 + 3 + 2 + 2), 4 * (2 + 3 + 3 + 3)
    assert found[2] == pytest.approx((encoder + decoder + 2) * 1024**2 + 2 * 32320 * 1024, rel=0.01)


class Fake(TranslationWorkload):
    """Steps that take some time, and one that is never ready."""

    def steps(self):
        self.seconds = {COMPILED: 0.2}

        def never():
            time.sleep(30)

        return {BF16: lambda: lambda: time.sleep(0.02), COMPILED: lambda: never, GRAPHED: lambda: lambda: None}


def test_a_step_that_is_not_ready_in_time_leaves_the_others():
    made, title = bench(), next(iter(MODELS))
    start = time.monotonic()
    with pytest.raises(RunFailure, match=r"not measured: BF16 compiled, CUDA graph \(TimeoutError: not ready after 0"):
        measure(made, Fake(title, made), [BF16, COMPILED, GRAPHED], [BF16, COMPILED])
    assert time.monotonic() - start < 15
    rows = [(row.name.removeprefix(f"{title} "), row.against) for row in made.rows]
    assert rows == [
        ("training step BF16 autocast", "tokens a second"),
        ("training step BF16 autocast", None),
        ("peak memory BF16 autocast, 0.00 GiB", None),
        ("training step FP8, CUDA graph", "tokens a second"),
        ("training step FP8, CUDA graph", BF16),
        ("peak memory FP8, CUDA graph, 0.00 GiB", BF16),
    ]
    rate, ratio = made.rows[0], made.rows[4]
    assert rate.ratio == pytest.approx(4 / rate.median_ms * 1e3, rel=1e-2)
    assert ratio.ratio > 1


def test_the_page_says_from_its_rows_where_fp8_pays():
    made = Bench(torch.device("cpu"), MACHINE)
    for title, speeds in (("Narrow", (1.5, 0.8)), ("Wide", (2.5, 1.25))):
        made.add(f"{title} training step {BF16}", "128 x 32", 10.0, None, None, None)
        for against, speed, memory in zip((BF16, COMPILED), speeds, (0.5, 0.625), strict=True):
            made.add(f"{title} training step {GRAPHED}", "128 x 32", 4.0, speed, against, None)
            made.add(f"{title} peak memory {GRAPHED}, 1.00 GiB", "128 x 32", 0.0, memory, against, None)
        made.add(f"{title} training step {GRAPHED}", "128 x 32", 4.0, 123456.0, "tokens a second", None)
    said = where_fp8_pays(made.rows)
    assert said == [
        f"Narrow, 128 x 32, beside {BF16}: FP8 pays (1.50 times as fast, in 0.50 of the memory).",
        f"Narrow, 128 x 32, beside {COMPILED}: FP8 does not pay (0.80 times as fast, in 0.62 of the memory).",
        f"Wide, 128 x 32, beside {BF16}: FP8 pays (2.50 times as fast, in 0.50 of the memory).",
        f"Wide, 128 x 32, beside {COMPILED}: FP8 pays (1.25 times as fast, in 0.62 of the memory).",
    ]
    page = markdown(made, said)
    assert all(f"* {sentence}\n" in page for sentence in said)
    assert "123,456" in page
    assert where_fp8_pays([row for row in made.rows if row.ratio is None]) == []


@pytest.mark.skipif(not INTERPRETED, reason="rehearses in the interpreter")
@pytest.mark.long
def test_rehearsal(tmp_path):
    assert main(["--rehearse", "--only", ",".join(STEPS), "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    names = {row.name for row in read(path)}
    assert {f"{title} {steps.STEP} {kind}" for title in MODELS for kind in (BF16, COMPILED, FP8)} <= names
