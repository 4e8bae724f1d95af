"""The CPU benchmarks' records: ratios, bars, the meter of foreign load, and work that does what it says."""

import json
import os
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import fp8repro
from fp8repro.bench import data, quantize, step
from fp8repro.bench.cpu import PINNING, ForeignLoad, interleaved_medians, relaunch_pinned, report, rows
from fp8repro.engines.cpu import native
from fp8repro.numerics.reference import round_to_format
from fp8repro.numerics.rounding import Rounding


def test_work_is_done_in_turns_and_two_rounds_are_not_measured():
    calls = []
    medians = interleaved_medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 5
    assert set(medians) == {"a", "b"}


def test_records_say_ratio_bar_machine_and_foreign_load(tmp_path, capsys):
    measured = rows("work", {"base": 2.0, "fast": 1.0, "slow": 5.0}, "base", {"fast": 0.8, "slow": 1.0}, 10)
    assert [(row.ratio, row.reached) for row in measured] == [(1.0, None), (0.5, True), (2.5, False)]
    report("Some work", measured, 0.25, "work", tmp_path)
    record = json.loads((tmp_path / "work.json").read_text())
    assert record["foreign_load_cores"] == 0.25
    assert record["environment"]["cpu"]
    assert record["rows"][1]["reached"] is True
    assert record["rows"][1]["tokens_per_second"] == 10_000
    page = (tmp_path / "work.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["work", "slow", "5.000", "2,000", "2.500 x base", "at most 1", "no"] in lines
    assert page in capsys.readouterr().out


def test_own_work_is_no_foreign_load():
    with ForeignLoad() as meter:
        start = time.process_time()
        while time.process_time() - start < 0.3:
            pass
    assert 0 <= meter.cores <= (os.cpu_count() or 1)


def test_a_pinned_process_is_not_started_again(monkeypatch):
    for key, value in PINNING.items():
        monkeypatch.setenv(key, value)
    assert relaunch_pinned("no.such.module", []) is None


def test_the_measured_quantizer_calls_give_the_reference_values():
    x = torch.randn(1000)
    work = quantize.work(x)
    assert {"copy_", "nearest", "stochastic"} <= set(work)
    for call in work.values():
        call()
    assert torch.equal(work["x.to(float8_e5m2).float()"](), round_to_format(x, Rounding(quantize.E5M2)))


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_decoding_writes_the_tokens_that_are_counted(monkeypatch, precision):
    searched = []
    search = step.beam_search

    def watched(model, source, config):
        searched.append(search(model, source, config))
        return searched[-1]

    monkeypatch.setattr(step, "beam_search", watched)
    monkeypatch.setitem(step.SIZES, "transformer", {**step.SIZES["transformer"], "width": 16, "ffn_width": 16})
    step.decoding("transformer", precision)()
    (found,) = searched
    assert len(found) == step.BATCHES["transformer"][0]
    # The last token of each is the end of sentence.
    assert sum(len(hypotheses[0].tokens) + 1 for hypotheses in found) == step.target_tokens("transformer")


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_a_profile_counts_the_roundings_and_products_of_a_step():
    spec = spec_from_file_location("step_profile", Path(__file__).parents[2] / "scripts" / "step_profile.py")
    profile = module_from_spec(spec)
    spec.loader.exec_module(profile)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    injected = fp8repro.inject(model, fp8repro.Recipe(exempt=()), fp8repro.StepContext(seed=1), "auto")
    x = torch.randn(50, 64, requires_grad=True)
    kinds = profile.roundings(lambda: model(x).sum().backward())
    values = {(rounding, outputs): round(count) for (_, rounding, outputs), (_, count, _) in kinds.items()}
    operands = 50 * 64 + 32 * 64
    emulated = injected.backend == "emulate"
    # Products of FP8 bytes round their results themselves.
    assert sum(values[kind] for kind in values if kind[0] == "nearest") == operands + 50 * 32 * emulated
    assert values.get(("stochastic", "in place"), 0) == (50 * 64 + 32 * 64) * emulated
    found = profile.products(lambda: model(x).sum().backward())
    assert {name: calls for name, (calls, _) in found.items()} == ({} if injected.backend == "emulate" else {"gemm": 3})


@pytest.mark.long
@pytest.mark.parametrize("model", step.BARS)
def test_a_measured_step_trains(model):
    run = step.training_step(model, "fp8")
    for _ in range(2):
        run()


def test_images_are_counted_however_they_are_loaded(tmp_path, monkeypatch, capsys):
    # The benchmark has a cache of its own.
    monkeypatch.setenv("FP8REPRO_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(data, "PHOTOS", (48, 40, 16, 6, 3))
    monkeypatch.setattr(data, "SMALL", (16, 16, 16, 6, 3))
    monkeypatch.setattr(data, "SHORTER_SIDE", 32)
    once = {}

    def call_once(work, repeats, clock):
        once.update({call: len(list(call())) for call in work.values()})
        return dict.fromkeys(work, 2.0)

    monkeypatch.setattr(data, "interleaved_medians", call_once)
    assert data.main(["--repeats", "1", "--workers", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "data.json").read_text())
    assert record["pinned"] is None
    groups = {row["group"]: row["images"] for row in record["rows"]}
    assert list(groups.values()) == [6, 48, 6, 48]
    for row in record["rows"]:
        assert row["images_per_second"] == row["images"] * 500
    # Batches of 3.
    assert set(once.values()) == {2, 16}
    assert "images/s" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
