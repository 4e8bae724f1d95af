"""Two models on the same examples: McNemar's test against scipy, the bootstrap against the sacrebleu command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from scipy import stats
from study_records import write_run

from fp8repro.paper.examples import correct_json, read_correct, read_translations
from fp8repro.paper.run_folder import CORRECT, HYPOTHESES, REFERENCES
from fp8repro.results.cells import read_cells
from fp8repro.results.weights import APART, OTHER_SEED, SAME_SEED, mcnemar, paired_bootstrap, weights_sheet

WORDS = ["the", "small", "old", "clock", "of", "his", "sister", "offers", "my", "friend", "three", "green", "tables"]


def hits(seed: int, count: int = 1797, share: float = 0.95) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < share


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 6), (3, 9), (20, 20), (1, 30), (400, 460)])
def test_mcnemar_is_the_exact_binomial_test_of_what_one_alone_has_right(only_first: int, only_second: int) -> None:
    first = np.array([True] * only_first + [False] * only_second + [True, False] * 40)
    second = np.array([False] * only_first + [True] * only_second + [True, False] * 40)
    n = only_first + only_second
    # Both tails of the binomial distribution, which is symmetric.
    expected = min(1.0, 2 * stats.binom.cdf(min(only_first, only_second), n, 0.5)) if n else 1.0
    assert mcnemar(first, second).p == pytest.approx(expected, rel=1e-9)
    assert mcnemar(first, second).differ == f"{only_first} + {only_second}"
    assert mcnemar(first, second).first == pytest.approx(100 * first.mean())


def lines(seed: int, noise: float) -> list[str]:
    """Sentences that are the same for every seed, but for some words."""
    whole, generator = np.random.default_rng(0), np.random.default_rng(seed)
    found = []
    for _ in range(60):
        words = whole.choice(WORDS, size=whole.integers(5, 14))
        changed = generator.random(len(words)) < noise
        found.append(" ".join(np.where(changed, generator.choice(WORDS, size=len(words)), words)) + ".")
    return found


def test_the_bootstrap_is_the_one_of_the_sacrebleu_command(tmp_path: Path) -> None:
    references, first, second = lines(0, 0.0), lines(1, 0.3), lines(2, 0.34)
    for name, text in (("ref", references), ("first", first), ("second", second)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in text))
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "first", "second", "-m", "bleu", "--paired-bs"]
    done = subprocess.run(
        [*command, "--paired-bs-n", "1000", "-f", "json"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    # One for each system, in the order given.
    baseline, system = json.loads(done.stdout)
    found = paired_bootstrap(first, second, references)
    assert found.first == pytest.approx(baseline["BLEU"]["score"], abs=1e-3)
    assert found.second == pytest.approx(system["BLEU"]["score"], abs=1e-3)
    assert found.p == pytest.approx(system["BLEU"]["p_value"], abs=1e-6)
    assert 0.001 < found.p < 0.999
    assert "bs:1000|seed:12345" in found.signature


def test_a_bit_an_example_comes_back_as_it_was(tmp_path: Path) -> None:
    for count in (1, 7, 8, 359, 10_000):
        (tmp_path / CORRECT).write_text(correct_json(hits(count, count), "abc"))
        found = read_correct(tmp_path)
        assert found is not None
        assert (found[0], found[1].tolist()) == ("abc", hits(count, count).tolist())
    assert (tmp_path / CORRECT).stat().st_size < 1_800


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"examples": 8, "order": 1, "correct": "/w=="}',
        '{"examples": 9, "order": "", "correct": "/w=="}',
        '{"examples": 0, "order": "", "correct": ""}', '{"examples": true, "order": "", "correct": "/w=="}',
        '{"examples": 8, "order": "", "correct": "!!"}', '{"examples": 8, "order": "", "correct": "\u00e9"}',
    ],
)  # fmt: skip
def test_a_damaged_record_of_examples_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / CORRECT).write_text(text)
    assert read_correct(tmp_path) is None
    (tmp_path / HYPOTHESES).write_bytes(b"\xff\n")
    (tmp_path / REFERENCES).write_bytes(b"a\n")
    assert read_translations(tmp_path) is None
    (tmp_path / HYPOTHESES).write_bytes(b"a\nb\n")
    assert read_translations(tmp_path) is None


def test_weights_are_compared_with_those_of_the_same_seed_and_fp32_with_the_next(tmp_path: Path) -> None:
    for name, offset in (("resnet18_fp32", 0), ("resnet18_fp8", 10)):
        for seed in range(3):
            order = "other" if (name, seed) == ("resnet18_fp8", 2) else "same"
            correct = hits(offset + seed)
            folder = write_run(tmp_path, name, seed, score=100 * float(correct.mean()))
            (folder / CORRECT).write_text(correct_json(correct, order))
    for name, noise in (("gnmt_fp32", 0.3), ("gnmt_fp8", 0.6)):
        folder = write_run(tmp_path, name, bleu=BLEU().corpus_score(lines(1, noise), [lines(0, 0.0)]).score)
        (folder / HYPOTHESES).write_text("".join(f"{line}\n" for line in lines(1, noise)))
        (folder / REFERENCES).write_text("".join(f"{line}\n" for line in lines(0, 0.0)))
    cells, _, _ = read_cells([tmp_path])
    sheet = weights_sheet(cells["embedded"], "embedded")
    rows = {(row["model"], row["pair"]): row for row in sheet.rows}
    # The third pair is of other images.
    pairs = [mcnemar(hits(seed), hits(10 + seed)) for seed in range(2)]
    assert rows["resnet18", SAME_SEED]["p"] == " / ".join(f"{pair.p:.2g}" for pair in pairs)
    assert rows["resnet18", OTHER_SEED]["differ"] == " / ".join(
        mcnemar(hits(seed), hits(seed + 1)).differ for seed in range(2)
    )
    assert rows["resnet18", SAME_SEED]["examples"] == 1797
    assert float(rows["gnmt", SAME_SEED]["p"]) < 0.01
    assert "p" not in rows["gnmt", OTHER_SEED]
    assert "p" not in rows["resnet34", SAME_SEED]
    assert "these weights, not this recipe" in sheet.title
    assert any("bs:1000" in note for note in sheet.notes)
    assert [note for note in sheet.notes if "Left out" in note] == [
        f"Left out: resnet18, {SAME_SEED}, seed 2: {APART}."
    ]


@pytest.mark.parametrize("damage", ["another run's", "cut off", "not UTF-8", "huge", "a list"])
def test_a_record_of_examples_that_is_not_the_runs_is_left_out_and_named(tmp_path: Path, damage: str) -> None:
    folders = {}
    for name in ("resnet18_fp32", "resnet18_fp8"):
        folders[name] = write_run(tmp_path, name, score=100 * float(hits(3).mean()))
        (folders[name] / CORRECT).write_text(correct_json(hits(3), "same"))
    path = folders["resnet18_fp8"] / CORRECT
    whole = path.read_bytes()
    changed = {
        "another run's": correct_json(hits(4), "same").encode(),
        "cut off": whole[:-20],
        "not UTF-8": whole.replace(b"same", b"\xff\xfe"),
        "huge": whole + b" " * 10**6,
        "a list": b"[" + whole + b"]",
    }
    path.write_bytes(changed[damage])
    cells, _, _ = read_cells([tmp_path])
    sheet = weights_sheet(cells["embedded"], "embedded")
    assert "p" not in sheet.rows[0]
    assert [note for note in sheet.notes if "Left out" in note] == [
        f"Left out: resnet18, {SAME_SEED}, seed 0: {APART}."
    ]


@pytest.mark.parametrize("damage", ["another run's", "cut off", "a line less", "not UTF-8", "a tokenizer from the net"])
def test_translations_that_are_not_the_runs_are_left_out_and_named(tmp_path: Path, damage: str) -> None:
    score = BLEU().corpus_score(lines(1, 0.3), [lines(0, 0.0)]).score
    for name in ("gnmt_fp32", "gnmt_fp8"):
        folder = write_run(tmp_path, name, bleu=score)
        (folder / HYPOTHESES).write_text("".join(f"{line}\n" for line in lines(1, 0.3)))
        (folder / REFERENCES).write_text("".join(f"{line}\n" for line in lines(0, 0.0)))
    whole = (folder / HYPOTHESES).read_bytes()
    changed = {
        "another run's": whole.replace(b"the", b"a", 1), "cut off": whole[:-9], "not UTF-8": b"\xff" + whole,
        "a line less": whole[: whole[:-1].rindex(b"\n") + 1], "a tokenizer from the net": whole,
    }  # fmt: skip
    (folder / HYPOTHESES).write_bytes(changed[damage])
    if damage == "a tokenizer from the net":
        for folder in (tmp_path / "embedded").iterdir():
            summary = json.loads((folder / "summary.json").read_text())
            summary["bleu_signature"] = summary["bleu_signature"].replace("tok:13a", "tok:flores200")
            (folder / "summary.json").write_text(json.dumps(summary))
    cells, _, _ = read_cells([tmp_path])
    sheet = weights_sheet(cells["embedded"], "embedded")
    rows = {(row["model"], row["pair"]): row for row in sheet.rows}
    assert "p" not in rows["gnmt", SAME_SEED]
    assert [note for note in sheet.notes if "Left out" in note] == [f"Left out: gnmt, {SAME_SEED}, seed 0: {APART}."]
