"""Translation through the training loop: loss and perplexity against their definitions, files against sacrebleu."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from training_tools import rows as metrics_of

from fp8repro.data.translation import buckets
from fp8repro.data.translation.batching import make_batch
from fp8repro.data.translation.corpus import read_lines
from fp8repro.data.translation.synthetic import synthetic_corpus
from fp8repro.errors import UserError
from fp8repro.settings.choices import compose_group
from fp8repro.settings.schema import RunConfig, run_config
from fp8repro.training.checkpoint import require_same_run
from fp8repro.training.distributed import World
from fp8repro.training.loop import build, train
from fp8repro.training.run import make_task
from fp8repro.training.tasks import decode_graphs
from fp8repro.training.tasks.decode import Hypothesis, beam_search, best_tokens
from fp8repro.training.tasks.translation import HYPOTHESES, REFERENCES, SAMPLES, smoothed_loss

SIZES: dict[str, dict[str, Any]] = {
    "transformer": {"width": 32, "ffn_width": 64, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.1},
    "gnmt": {"width": 24, "layers": 2, "init_range": 0.4, "dropout": 0.1},
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FP8REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parallel text whose test sentences are training sentences, so that a tiny model can learn them."""
    folder = tmp_path_factory.mktemp("text")
    pairs = synthetic_corpus(train=25, valid=10, test=2, max_words=7)
    for split, part in (("train", pairs["train"]), ("valid", pairs["valid"]), ("test", pairs["train"])):
        for side, language in enumerate(("en", "de")):
            (folder / f"{split}.{language}").write_text("".join(f"{p[side]}\n" for p in part), encoding="utf-8")
    return folder


def config(text: Path, model: str = "transformer", precision: str = "fp32", **changes: Mapping[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"name": model, "task": "translation", "size": SIZES.get(model, {})},
        "data": {"name": "parallel_text", "root": str(text), "options": {"bpe_merges": 300}},
        "precision": compose_group("precision", precision),
        "loss_scaling": {"policy": "auto"},
        "optimizer": {"name": "adam", "lr": 1e-2, "weight_decay": 0.0, "betas": [0.9, 0.98]},
        "schedule": {"name": "cosine", "warmup": 0.1},
        "trainer": {"epochs": 2, "batch_size": 120, "label_smoothing": 0.1, "eval_batch_size": 400},
        "logger": "none",
        "device": "cpu",
    }
    for group, change in changes.items():
        values[group] = {**values.get(group, {}), **change} if isinstance(change, Mapping) else change
    return run_config(values)


def task(settings: RunConfig) -> Any:
    return make_task(settings, World())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_smoothing_follows_its_two_definitions(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 7), torch.tensor([[4, 5, 2], [6, 2, 1]])
    log_probs = torch.log_softmax(logits.double(), -1)
    for form, rest in (("all", 1 / 7), ("others", 1 / 6)):
        expected = 0.0
        for log_prob, word in zip(log_probs.flatten(0, 1), target.flatten(), strict=True):
            if word != 1:
                wanted = torch.full((7,), smoothing * rest, dtype=torch.float64)
                wanted[word] = 1 - smoothing + (smoothing / 7 if form == "all" else 0)
                expected -= float(wanted @ log_prob)
        loss, nll = smoothed_loss(logits, target, smoothing, form)
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        assert float(nll) == pytest.approx(
            -float(log_probs[target.ne(1)].gather(1, target[target.ne(1)][:, None]).sum())
        )
    ours, theirs = (torch.zeros_like(logits, requires_grad=True) for _ in range(2))
    smoothed_loss(logits + ours, target, smoothing)[0].backward()
    flat = (logits + theirs).flatten(0, 1)
    F.cross_entropy(flat, target.flatten(), ignore_index=1, reduction="sum", label_smoothing=smoothing).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("model", list(SIZES))
def test_the_gradient_is_that_of_the_mean_over_all_tokens_whatever_the_batches(text: Path, model: str) -> None:
    work = task(config(text, model))
    torch.manual_seed(0)
    network = work.model().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    rows = list(range(9))

    def gradients(parts: list[list[int]]) -> tuple[float, list[Tensor]]:
        batches = [make_batch(work.data.train, part) for part in parts]
        count = sum(work.count(batch) for batch in batches)
        network.zero_grad()
        total = 0.0
        for batch in batches:
            loss, _ = work.loss(network, *work.inputs(batch))
            (loss / count).backward()
            total += loss.item()
        return total / count, [p.grad.clone() for p in network.parameters() if p.grad is not None]

    whole, parts = gradients([rows]), gradients([rows[:2], rows[2:3], rows[3:]])
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp8_nearest"])
@pytest.mark.parametrize("model", list(SIZES))
def test_more_padding_changes_neither_the_loss_nor_a_gradient(text: Path, model: str, precision: str) -> None:
    run = build(config(text, model, precision), World())
    network = run.model.eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    found = []
    for widths in ((24, 24), (40, 24), (24, 48)):
        network.zero_grad()
        run.context.begin(0)
        batch = make_batch(run.task.data.train, list(range(9)), widths)  # type: ignore[attr-defined]
        loss, _ = run.task.loss(network, *run.task.inputs(batch))
        (loss / 100).backward()
        found.append((loss.item(), [p.grad.clone() for p in network.parameters() if p.grad is not None]))
    # Longer sums run in another order: FP32's tolerance, and in FP8 now and then another rounding behind it.
    rounds = precision != "fp32"
    (loss, gradients), *others = found
    for their_loss, theirs in others:
        assert their_loss == pytest.approx(loss, rel=1e-4 if rounds else 1e-6)
        for mine, their in zip(gradients, theirs, strict=True):
            assert float((mine - their).norm()) <= (5e-3 if rounds else 1e-5) * float(mine.norm()) + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("model", list(SIZES))
def test_perplexity_and_translations_do_not_depend_on_batches(text: Path, model: str) -> None:
    settings = config(text, model)
    work = task(settings)
    torch.manual_seed(1)
    network = work.model().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    total, count = 0.0, 0
    for source, target in ((work.data.valid.source[i], work.data.valid.target[i]) for i in range(10)):
        words = torch.from_numpy(target)
        logits = network(torch.from_numpy(source)[None], torch.cat([words[-1:], words[:-1]])[None])
        total += float(F.cross_entropy(logits[0], words, reduction="sum"))
        count += len(words)
    metrics = work.evaluate(network, "val")
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    small = task(replace(settings, trainer=replace(settings.trainer, eval_batch_size=1)))
    assert small.evaluate(network, "val") == pytest.approx(metrics, rel=1e-4)
    found = work.translate(network, work.data.test)
    assert len(found) == 25
    assert small.translate(network, work.data.test) == found
    sources = [torch.from_numpy(work.data.test.source[i])[None] for i in range(25)]
    assert any(source.shape[1] % 8 for source in sources)
    alone = [beam_search(network, source, settings.decode)[0] for source in sources]  # type: ignore[arg-type]
    assert list(map(best_tokens, alone)) == found


@pytest.mark.parametrize(("model", "precision"), [("transformer", "fp8"), ("gnmt", "fp32")])
def test_a_run_learns_and_sacrebleu_finds_its_scores_in_the_files(
    text: Path, tmp_path: Path, model: str, precision: str
) -> None:
    trainer = {"epochs": 60, "batch_size": 120, "eval_batch_size": 400, "eval_every_epochs": 20, "log_every": 5}
    settings = config(text, model, precision, trainer=trainer, run_dir=str(tmp_path))
    summary = train(settings)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["bleu"] > 8
    references = list(read_lines(tmp_path / REFERENCES))
    assert references == list(read_lines(text / "test.de"))
    assert len(list(read_lines(tmp_path / HYPOTHESES))) == 25
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / REFERENCES), "-i", str(tmp_path / HYPOTHESES)]
    printed = subprocess.run([*command, "-m", "bleu", "chrf", "-w", "6"], check=True, capture_output=True, text=True)
    bleu, chrf = json.loads(printed.stdout)
    assert (bleu["score"], chrf["score"]) == (
        pytest.approx(summary["bleu"], abs=1e-5),
        pytest.approx(summary["chrf"], abs=1e-5),
    )
    assert bleu["signature"] == summary["bleu_signature"]
    assert chrf["signature"] == summary["chrf_signature"]
    assert "tok:none" in summary["bleu_tokenized_signature"]
    sample = (tmp_path / SAMPLES).read_text(encoding="utf-8").splitlines()
    assert sample[0].removeprefix("source").strip() == next(read_lines(text / "test.en"))
    assert sample[1].removeprefix("reference").strip() == references[0]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    perplexities = [row["perplexity"] for row in rows if row["kind"] == "train"]
    assert perplexities[-1] < 0.1 * perplexities[0]
    assert all(row["tokens_per_second"] > 0 for row in rows if row["kind"] == "train")
    assert {row["split"] for row in rows if row["kind"] == "eval"} == {"val"}
    report = make_task(settings, World()).batches.report()
    assert report.items() <= summary.items()
    assert [{key: row[key] for key in report} for row in rows if row["kind"] == "batches"] == [report]


def weights(folder: Path) -> dict[str, Tensor]:
    paths = sorted((folder / "checkpoints").glob("step-*.pt"))
    content: dict[str, Tensor] = torch.load(paths[-1], weights_only=True)["model"]
    return content


@pytest.mark.parametrize("model", list(SIZES))
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(text: Path, tmp_path: Path, model: str) -> None:
    trainer = {"epochs": 2, "batch_size": 120, "micro_steps": 2, "eval_batch_size": 400}
    whole = config(text, model, "fp8", trainer=trainer, run_dir=str(tmp_path / "whole"))
    train(whole)
    parts = replace(whole, run_dir=str(tmp_path / "parts"))
    # Stopped in the middle of the second epoch.
    train(replace(parts, trainer=replace(parts.trainer, max_steps=3)))
    train(replace(parts, resume="auto"))
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(value.dtype == torch.float16 for value in first.values())


def test_asked_to_stop_amid_the_translation_it_is_left_and_made_as_a_whole_later(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"epochs": 2, "batch_size": 120, "eval_batch_size": 100, "average_checkpoints": 2}
    settings = config(text, trainer=trainer, run_dir=str(tmp_path / "run"))
    whole = train(replace(settings, run_dir=str(tmp_path / "whole")))
    batches = 0

    def interrupted(*arguments: Any) -> list[list[Hypothesis]]:
        nonlocal batches
        batches += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return beam_search(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(decode_graphs, "beam_search", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(settings)
    assert (stopped.value.code, batches) == (143, 1)
    assert not (tmp_path / "run" / "summary.json").exists()
    again = train(replace(settings, resume="auto"))
    timed = ("train_seconds", "decode_seconds", "decode_tokens_per_second")
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)
    measured = [metrics_of(folder, "eval") for folder in (tmp_path / "whole", tmp_path / "run")]
    assert measured[0] == measured[1]


def test_a_finished_run_is_translated_again_where_that_is_to_be_done_otherwise(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(text, run_dir=str(tmp_path), trainer={"epochs": 20, "batch_size": 120, "eval_batch_size": 400})
    first, before = train(settings), weights(tmp_path)
    again = replace(settings, resume="auto")
    shorter = replace(again, decode=replace(again.decode, max_length_a=0.0, max_length_b=2))
    second = train(shorter)
    assert second["brevity_penalty"] < 0.5 < first["brevity_penalty"]
    assert second["steps"] == first["steps"]
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path).items())
    # Done once.
    monkeypatch.setattr(decode_graphs, "beam_search", None)
    assert train(shorter) == second


def test_a_checkpoint_of_another_vocabulary_or_other_codes_is_refused(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "text"
    other.mkdir()
    for path in text.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    settings = config(other, run_dir=str(tmp_path / "run"), trainer={"max_steps": 1, "batch_size": 120})
    train(settings)
    again = replace(settings, resume="auto", trainer=replace(settings.trainer, max_steps=2))
    (other / "train.de").write_bytes((text / "train.de").read_bytes().replace(b"e", b"a"))
    with pytest.raises(
        UserError, match=r"resume: task\.bpe_codes is '\w{16}' in the checkpoint and '\w{16}' in this run"
    ):
        train(again)
    (other / "train.de").write_bytes((text / "train.de").read_bytes())
    assert train(again)["steps"] == 2


def test_a_checkpoint_of_other_batches_is_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(text, run_dir=str(tmp_path), trainer={"max_steps": 1, "batch_size": 120})
    train(settings)
    monkeypatch.setattr(buckets, "MOST_SHAPES", 2)
    more = replace(settings, resume="auto", trainer=replace(settings.trainer, max_steps=2))
    with pytest.raises(UserError, match=r"resume: task\.batches is \d in the checkpoint and \d in this run"):
        train(more)
    identity = build(settings, World()).identity()
    earlier = {**identity, "task": {name: value for name, value in identity["task"].items() if name != "batches"}}
    with pytest.raises(UserError, match="resume: the checkpoint is of an earlier version, which made other batches"):
        require_same_run(earlier, identity)


def test_the_final_score_is_that_of_the_averaged_weights(text: Path, tmp_path: Path) -> None:
    trainer = {"epochs": 4, "batch_size": 120, "average_checkpoints": 3, "eval_batch_size": 400}
    settings = config(text, run_dir=str(tmp_path), trainer=trainer)
    summary = train(settings)
    paths = sorted((tmp_path / "checkpoints").glob("epoch-*.pt"))
    assert len(paths) == 3
    states = [torch.load(path, weights_only=True)["model"] for path in paths]
    run = build(settings, World())
    run.model.load_state_dict({name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]})
    metrics = run.task.evaluate(run.model.eval(), "test")
    assert run.task.evaluate(run.model, "val")["perplexity"] == pytest.approx(summary["perplexity"], rel=1e-4)
    assert metrics["bleu"] == pytest.approx(summary["bleu"], abs=1e-6)
    run.model.load_state_dict(states[-1])
    assert run.task.evaluate(run.model, "val")["perplexity"] != pytest.approx(summary["perplexity"], rel=1e-3)


def translate_on_a_rank(rank: int, settings: RunConfig, address: str, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    work = make_task(settings, World(rank, 2))
    torch.manual_seed(1)
    network = work.model().eval()
    with torch.no_grad():
        result = work.evaluate(network, "test"), work.translate(network, work.data.test)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(text: Path, tmp_path: Path) -> None:
    settings = config(text, trainer={"batch_size": 400, "eval_batch_size": 100})
    work = task(settings)
    torch.manual_seed(1)
    network = work.model().eval()
    with torch.no_grad():
        metrics, found = work.evaluate(network, "test"), work.translate(network, work.data.test)
    mp.spawn(translate_on_a_rank, (settings, str(tmp_path / "address"), tmp_path), nprocs=2)
    for rank in range(2):
        their_metrics, their_found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert their_found == found
        assert their_metrics == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode": {"beam": 0}}, r"decode\.beam: got 0, expected a whole number from 1"),
        ({"model": "lstm"}, r"model\.name: got 'lstm', expected one of transformer"),
        ({"trainer": {"batch_size": 4}}, r"trainer\.batch_size: got 4 tokens, expected at least"),
        ({"decode": {"coverage": 0.1}, "trainer": {"batch_size": 120, "max_steps": 1}}, r"decode\.coverage: got 0\.1"),
    ],
)
def test_settings_that_are_not_accepted(text: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(config(text, run_dir=str(tmp_path), **changes))
