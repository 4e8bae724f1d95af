"""From text files to batches: errors with their lines, BPE as subword-nmt's, exact resumption, the cache."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fp8repro.cache import cache_root
from fp8repro.data.translation import datasets
from fp8repro.data.translation.batching import Batch, TranslationBatches, make_batch
from fp8repro.data.translation.corpus import read_lines, read_pairs
from fp8repro.data.translation.datasets import Split, TranslationData, load_translation
from fp8repro.data.translation.synthetic import synthetic_corpus
from fp8repro.data.translation.text import Subwords, detokenize, learn_bpe, tokenize
from fp8repro.errors import UserError

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = Path(os.environ.get("FP8REPRO_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
LANGUAGES = ("en", "de")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_text(folder: Path, train: int = 300) -> Path:
    corpus = synthetic_corpus(seed=3, train=train, valid=20, test=20)
    for split, pairs in corpus.items():
        for side, language in enumerate(LANGUAGES):
            lines = "".join(f"{pair[side]}\n" for pair in pairs)
            (folder / f"{split}.{language}").write_bytes(lines.encode("utf-8"))
    return folder


def sentences(data: TranslationData, split: Split) -> list[str]:
    return [data.detokenize(split.target[i].tolist()) for i in range(len(split.target))]


# Cases of Moses' tokenizer.perl and normalize-punctuation.perl.
@pytest.mark.parametrize(
    ("line", "language", "expected"),
    [
        ("Don't stop, he said.", "en", "Don &apos;t stop , he said ."),
        ("It costs 1,000.50 & more…", "en", "It costs 1,000.50 &amp; more ..."),
        ("„Ja“, sagte Dr. Maier.", "de", "&quot; Ja &quot; , sagte Dr. Maier ."),
        ("Das  ist\u2019s!", "de", "Das ist &apos; s !"),
    ],
)
def test_tokenization_is_that_of_moses(line: str, language: str, expected: str) -> None:
    assert tokenize(line, language) == expected


def test_detokenization_gives_the_plain_sentences_back(tmp_path: Path) -> None:
    pairs = synthetic_corpus(train=500, valid=2, test=2)["train"]
    learn_bpe((tokenize(pair[side], LANGUAGES[side]) for pair in pairs for side in (0, 1)), 200, tmp_path / "codes")
    subwords = Subwords(tmp_path / "codes")
    for pair in pairs:
        for side, language in enumerate(LANGUAGES):
            units = subwords.segment(tokenize(pair[side], language))
            assert detokenize(units, language) == pair[side]


def test_bpe_is_interchangeable_with_subword_nmts_commands(tmp_path: Path) -> None:
    pairs = synthetic_corpus(train=300, valid=2, test=2)["train"]
    lines = [tokenize(pair[side], LANGUAGES[side]) for pair in pairs for side in (0, 1)]
    text = tmp_path / "text"
    text.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))
    learn_bpe(lines, 250, tmp_path / "ours")
    command = [sys.executable, "-W", "ignore", "-m"]
    learn = [*command, "subword_nmt.learn_bpe", "-s", "250", "-i", str(text), "-o", str(tmp_path / "theirs")]
    subprocess.run(learn, check=True, capture_output=True)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    unseen = "Der unbekannte Zeppelin schläft &quot; hier &quot; ."
    apply = [*command, "subword_nmt.apply_bpe", "-c", str(tmp_path / "ours")]
    result = subprocess.run(apply, input=f"{unseen}\n".encode(), check=True, capture_output=True)
    assert Subwords(tmp_path / "ours").segment(unseen) == result.stdout.decode().split()


def test_broken_codes_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.options\.bpe_codes: cannot read"):
        Subwords(tmp_path / "missing")
    (tmp_path / "codes").write_bytes(b"#version: 0.2\n\xff\xfe\n")
    with pytest.raises(UserError, match="is no codes file"):
        Subwords(tmp_path / "codes")
    with pytest.raises(UserError, match=r"bpe_merges: got -1"):
        learn_bpe(["a b"], -1, tmp_path / "codes")


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("a\u2028b\nc\x85d\x0be\r\n\nlast".encode())
    assert list(read_lines(path)) == ["a\u2028b", "c\x85d\x0be\r", "", "last"]


def test_malformed_text_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.en").write_bytes(b"one\ntwo\nthr\xffee\n")
    (tmp_path / "x.de").write_bytes(b"eins\nzwei\n")
    files = (tmp_path / "x.en", tmp_path / "x.de")
    with pytest.raises(UserError, match=r"x\.en' line 3 holds byte 0xff \(column 4\), expected UTF-8"):
        list(read_pairs(files))
    (tmp_path / "x.en").write_bytes(b"one\ntwo\nthree\nfour")
    with pytest.raises(UserError, match=r"x\.en' has 4 lines and .*x\.de' has 2, expected the same number"):
        list(read_pairs(files))
    (tmp_path / "x.tsv").write_bytes(b"one\teins\ntwo zwei\n")
    with pytest.raises(UserError, match=r"x\.tsv' line 2 has 1 columns"):
        list(read_pairs((tmp_path / "x.tsv",)))
    with pytest.raises(UserError, match=r"missing\.en"):
        list(read_pairs((tmp_path / "missing.en", tmp_path / "x.de")))


def test_parallel_text_becomes_a_data_set(tmp_path: Path) -> None:
    data = load_translation("parallel_text", str(write_text(tmp_path)), {"bpe_merges": 150})
    assert (len(data.train.source), len(data.valid.source), len(data.test.source)) == (300, 20, 20)
    assert len(data.vocabulary) % 8 == 0
    assert sentences(data, data.test) == data.test.references == list(read_lines(tmp_path / "test.de"))
    assert data.skipped == {"empty": 0, "too_long": 0}
    reopened = load_translation("fairseq_binary", str(data.folder))
    assert sentences(reopened, reopened.train) == sentences(data, data.train)
    assert reopened.vocabulary.tokens == data.vocabulary.tokens


def test_two_files_one_file_and_more_workers_give_the_same(tmp_path: Path) -> None:
    root = write_text(tmp_path)
    for split in ("train", "valid", "test"):
        pairs = read_pairs((root / f"{split}.en", root / f"{split}.de"))
        (root / f"{split}.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in pairs), encoding="utf-8")
    names = {"train": "train.tsv", "valid": "valid.tsv", "test": "test.tsv"}
    ours = load_translation("parallel_text", str(root), {"bpe_merges": 150})
    theirs = load_translation("parallel_text", str(root), {"bpe_merges": 150, **names}, workers=2)
    assert ours.folder != theirs.folder
    for path in sorted(ours.folder.iterdir()):
        assert path.read_bytes() == (theirs.folder / path.name).read_bytes(), path.name


def test_empty_and_too_long_training_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    root = write_text(tmp_path)
    with (root / "train.en").open("a") as english, (root / "train.de").open("a") as german:
        english.write("\nA word.\n" + "word " * 150 + "\n")
        german.write("Ein Wort.\n  \nEin Wort.\n")
    data = load_translation("parallel_text", str(root), {"bpe_merges": 150})
    assert data.skipped == {"empty": 2, "too_long": 1}
    assert len(data.train.source) == 300
    with pytest.raises(UserError, match="all training pairs are empty or over max_length=1"):
        load_translation("parallel_text", str(root), {"max_length": 1})


@pytest.mark.parametrize(
    ("line", "cut"),
    [
        ("wir mo\u0308gen es .", True),
        ("แมวเห็นสุนัข", True),
        ("eine Donau\u00addampffahrt", True),
        ("ein Wort\u200cstamm", True),
        ("wir mögen es .", False),
        # Vowel signs that Moses knows, and an emoji's shape.
        ("क्या हिन्दी में", False),
        ("שָׁלוֹם ❤\ufe0f", False),
    ],
)
def test_words_that_moses_cuts_at_combining_marks_are_told(
    tmp_path: Path, line: str, cut: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_text(tmp_path)
    with (root / "train.en").open("a") as english, (root / "train.de").open("a", encoding="utf-8") as german:
        english.write("A line.\n")
        german.write(f"{line}\n")
    load_translation("parallel_text", str(root), {"bpe_merges": 50})
    said = capsys.readouterr().err
    assert said.count("\n") == int(cut)
    assert ("data.root: Moses cuts words at combining or invisible marks in 1 lines of train.de (" in said) == cut


def test_tokenized_text_and_given_codes_are_taken_as_they_are(tmp_path: Path) -> None:
    root = write_text(tmp_path)
    learned = load_translation("parallel_text", str(root), {"bpe_merges": 90})
    given = load_translation("parallel_text", str(root), {"bpe_codes": str(learned.folder / "bpe.codes")})
    assert given.vocabulary.tokens == learned.vocabulary.tokens
    tokenized = tmp_path / "tokenized"
    tokenized.mkdir()
    for split in ("train", "valid", "test"):
        for language in LANGUAGES:
            (tokenized / f"{split}.{language}").write_text("A@@ b c ,\nd &amp; e\n")
    data = load_translation("parallel_text", str(tokenized), {"tokenized": True})
    assert data.vocabulary.decode(data.train.source[0].tolist()) == ["A@@", "b", "c", ","]
    assert data.test.references == ["Ab c,", "d & e"]
    assert data.tokens(data.train.target[0].tolist()) == ["Ab", "c", ","]


def test_the_cache_is_keyed_by_contents_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_text(tmp_path)
    first = load_translation("parallel_text", str(root), {"bpe_merges": 100}).folder
    assert first.is_relative_to(cache_root())
    prepare = datasets._prepare
    built: list[Path] = []

    def spy(folder: Path, *arguments: Any) -> None:
        built.append(folder)
        prepare(folder, *arguments)

    monkeypatch.setattr(datasets, "_prepare", spy)
    assert load_translation("parallel_text", str(root), {"bpe_merges": 100}).folder == first
    assert not built
    assert load_translation("parallel_text", str(root), {"bpe_merges": 101}).folder != first
    (root / "test.de").write_bytes((root / "test.de").read_bytes().replace(b"e", b"a", 1))
    assert load_translation("parallel_text", str(root), {"bpe_merges": 100}).folder != first
    assert len(built) == 2


def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "write_binary", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_translation("synthetic_translation", None, {"train": 50, "valid": 2, "test": 2})
    assert not list((cache_root() / "synthetic_translation").iterdir())
    assert len(load_translation("synthetic_translation", None, {"train": 50, "valid": 2, "test": 2}).train.source) == 50


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FP8REPRO_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/fp8repro"),
        ({"HOME": "/c"}, "/c/.cache/fp8repro"),
    ],
)
def test_place_of_the_cache(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FP8REPRO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wmt14", None, {}), r"data\.name: got 'wmt14', expected one of synthetic_translation, parallel_text, wmt16"),
        (("synthetic_translation", None, {"size": 3}), r"data\.options\.size: unknown setting, expected one of seed"),
        (
            ("synthetic_translation", None, {"train": "many"}),
            r"data\.options\.train: got 'many', expected a whole number",
        ),
        (("parallel_text", None, {}), r"data\.root: got None"),
        (("wmt16", "/nowhere", {}), r"data\.root: got '/nowhere'"),
        (
            ("parallel_text", "/", {"max_length": -5}),
            r"data\.options\.max_length: got -5, expected a whole number from 1",
        ),
    ],
)
def test_settings_that_are_not_accepted(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_translation(*arguments)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "valid.de").unlink()
    with pytest.raises(UserError, match=r"valid\.de' is missing"):
        load_translation("parallel_text", str(tmp_path))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TranslationData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FP8REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_translation(
            "synthetic_translation", None, {"train": 900, "valid": 20, "test": 20, "bpe_merges": 200}
        )


def test_a_batch_moves_eos_to_the_front(small: TranslationData) -> None:
    lengths = small.train.target.sizes
    batch = make_batch(small.train, [int(lengths.argmin()), int(lengths.argmax())])
    assert batch.target_tokens == int(lengths.min() + lengths.max())
    for row, index in enumerate(batch.indices):
        words = small.train.target[index].tolist()
        padding = [1] * (-(-int(lengths.max()) // 8) * 8 - len(words))
        assert words[-1] == 2
        assert batch.target[row].tolist() == words + padding
        assert batch.decoder_input[row].tolist() == [2, *words[:-1], *padding]
        source = small.train.source[index].tolist()
        assert batch.source[row].tolist()[: len(source)] == source


def epoch(batches: TranslationBatches) -> list[list[int]]:
    return [batch.indices for batch in batches]


def test_the_order_is_a_function_of_seed_and_epoch(small: TranslationData) -> None:
    first, again, other = (TranslationBatches(small.train, 300, seed) for seed in (1, 1, 2))
    one, two = epoch(first), epoch(first)
    assert [epoch(again), epoch(again)] == [one, two]
    assert one != two
    assert epoch(other) != one
    assert sorted(map(len, one)) == sorted(map(len, two))
    assert sorted(chain(*one)) == sorted(chain(*two)) == list(range(900))
    assert {tuple(sorted(batch)) for batch in one} != {tuple(sorted(batch)) for batch in two}


def test_iteration_resumes_in_the_middle_of_an_epoch(small: TranslationData) -> None:
    whole = TranslationBatches(small.train, 300, seed=1)
    expected = [*epoch(whole), *epoch(whole), *epoch(whole)]
    interrupted = TranslationBatches(small.train, 300, seed=1)
    taken: list[list[int]] = []
    stop = len(interrupted) + 3

    def take(batches: TranslationBatches, count: int) -> None:
        while len(taken) < count:
            for batch in batches:
                taken.append(batch.indices)
                if len(taken) == count:
                    break

    take(interrupted, stop)
    state = interrupted.state_dict()
    assert state == {"epoch": 1, "position": 3}
    resumed = TranslationBatches(small.train, 300, seed=1)
    resumed.load_state_dict(state)
    take(resumed, len(expected))
    assert taken == expected


def test_ranks_share_an_epoch_evenly(small: TranslationData) -> None:
    ranks = [TranslationBatches(small.train, 300, 1, rank=rank, world_size=4) for rank in range(4)]
    alone = epoch(TranslationBatches(small.train, 300, 1))
    shares = [epoch(rank) for rank in ranks]
    assert {len(share) for share in shares} == {len(ranks[0])}
    together = [shares[n % 4][n // 4] for n in range(4 * len(ranks[0]))]
    assert together[: len(alone)] == alone
    assert together[len(alone) :] == alone[: len(together) - len(alone)]
    assert len(together) - len(alone) < 4


def test_batches_move_between_devices_whole(small: TranslationData) -> None:
    import torch

    batch = make_batch(small.train, [0, 1])
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch)
    assert {t.device.type for t in (moved.source, moved.decoder_input, moved.target)} == {"meta"}
    assert (moved.target_tokens, moved.indices) == (batch.target_tokens, batch.indices)


def test_real_captions(tmp_path: Path) -> None:
    folder = REAL_DATA / "multi30k"
    if not folder.is_dir():
        pytest.skip(f"needs the Multi30k captions in {folder} (FP8REPRO_REAL_DATA)")
    for split, name, count in (("train", "train", 1500), ("valid", "val", 100), ("test", "test", 200)):
        for language in LANGUAGES:
            lines = (folder / f"{name}.{language}").read_bytes().split(b"\n")[:count]
            (tmp_path / f"{split}.{language}").write_bytes(b"".join(line + b"\n" for line in lines))
    data = load_translation("parallel_text", str(tmp_path), {"bpe_merges": 600})
    assert len(data.train.source) == 1500
    assert data.skipped == {"empty": 0, "too_long": 0}
    # Real text loses odd spaces and quotation marks on the way, and characters that training never saw.
    same = sum(a == b for a, b in zip(sentences(data, data.test), data.test.references, strict=True))
    assert same > 0.9 * 200


@pytest.fixture
def wmt16(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = spec_from_file_location("prepare_wmt16", REPOSITORY / "scripts" / "prepare_wmt16.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.LINES["newstest2014"] == 3003
    # The archives of these tests are small stand-ins.
    monkeypatch.setattr(module, "CHECKSUMS", {})
    monkeypatch.setattr(module, "LINES", {"newstest2014": 2})
    return module


def sgm(*lines: str) -> str:
    return (
        "<srcset>\n<doc>" + "".join(f'<seg id="{i}">{line}</seg>\n' for i, line in enumerate(lines)) + "</doc></srcset>"
    )


def make_archives(folder: Path, change: Callable[[dict[str, dict[str, str]]], None] = lambda _: None) -> None:
    members = {
        "de-en.tgz": {
            "europarl-v7.de-en.en": "One &amp; only.\n\nTwo\u2028lines.\n",
            "europarl-v7.de-en.de": "Eins.\nx\nZwei.\n",
        },
        "training-parallel-commoncrawl.tgz": {
            "commoncrawl.de-en.en": "Caf\u00e9.\n",
            "commoncrawl.de-en.de": "Kaffeehaus.\n",
        },
        "training-parallel-nc-v11.tgz": {
            "training-parallel-nc-v11/news-commentary-v11.de-en.en": "Three.\n",
            "training-parallel-nc-v11/news-commentary-v11.de-en.de": "Drei.\n",
        },
        "dev.tgz": {
            "dev/newstest2013-src.en.sgm": sgm("A 2013"),
            "dev/newstest2013-ref.de.sgm": sgm("B 2013"),
            "dev/newstest2014-deen-src.de.sgm": sgm("Ja &amp; nein", "Zwei"),
            "dev/newstest2014-deen-ref.en.sgm": sgm("Yes &amp; no", "Two"),
            "dev/newstest2015-ende-src.en.sgm": sgm("A 2015"),
            "dev/newstest2015-ende-ref.de.sgm": sgm("B 2015"),
        },
        "test.tgz": {
            "test/newstest2016-ende-src.en.sgm": sgm("A 2016"),
            "test/newstest2016-ende-ref.de.sgm": sgm("B 2016"),
        },
    }
    change(members)
    for archive, files in members.items():
        with tarfile.open(folder / archive, "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content.encode())
                tar.addfile(info, io.BytesIO(content.encode()))


def test_wmt16_is_made_from_its_archives(tmp_path: Path, wmt16: ModuleType) -> None:
    make_archives(tmp_path)
    out = tmp_path / "out"
    assert wmt16.main([str(tmp_path), str(out)]) == 0
    # The second pair has an empty side, the third a character outside Latin-1.
    assert (out / "train.en").read_bytes().decode() == "One &amp; only.\nCaf\u00e9.\nThree.\n"
    assert (out / "train.de").read_bytes().decode() == "Eins.\nKaffeehaus.\nDrei.\n"
    assert (out / "valid.en").read_text() == "A 2015\nA 2016\n"
    assert (out / "test.en").read_text() == "Yes & no\nTwo\n"
    assert (out / "test.de").read_text() == "Ja & nein\nZwei\n"
    data = load_translation("wmt16", str(out))
    assert data.test.references == ["Ja & nein", "Zwei"]
    assert wmt16.main([str(tmp_path), str(out), "--valid", "newstest2013"]) == 0
    assert (out / "valid.de").read_text() == "B 2013\n"


def test_wmt16_names_what_is_missing(tmp_path: Path, wmt16: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def remove(members: dict[str, dict[str, str]]) -> None:
        members["training-parallel-commoncrawl.tgz"]["commoncrawl.de-en.de"] += "Noch eins.\n"
        del members["test.tgz"]["test/newstest2016-ende-ref.de.sgm"]

    make_archives(tmp_path, remove)
    assert wmt16.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "commoncrawl.de-en: 1 English and 2 German lines" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"test\.tgz holds no newstest2016-ende-ref\.de\.sgm"):
        list(wmt16.news_pairs(tmp_path, "newstest2016"))
    with pytest.raises(UserError, match="--valid: got 'newstest1999'"):
        wmt16.prepare(tmp_path, tmp_path / "out", ["newstest1999"])
    (tmp_path / "dev.tgz").unlink()
    with pytest.raises(UserError, match=r"dev\.tgz' is missing, expected the file of http://data\.statmt\.org"):
        wmt16.prepare(tmp_path, tmp_path / "out", ["newstest2016"])


def test_wmt16_refuses_what_is_not_the_official_text(
    tmp_path: Path, wmt16: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(members: dict[str, dict[str, str]]) -> None:
        members["dev.tgz"]["dev/newstest2014-deen-src.de.sgm"] = sgm("Ja", "Zwei", "Drei")
        members["dev.tgz"]["dev/newstest2014-deen-ref.en.sgm"] = sgm("Yes", "Two", "Three")

    out = tmp_path / "out"
    make_archives(tmp_path, spoil)
    with pytest.raises(UserError, match="newstest2014: 3 lines, expected 2"):
        wmt16.prepare(tmp_path, out, ["newstest2016"])
    assert not (out / "test.en").exists(), "a text that was refused is not left behind"
    monkeypatch.setattr(wmt16, "CHECKSUMS", {"test.tgz": ("md5", "3d809cd0c2c86adb2c67034d15c4e446")})
    with pytest.raises(UserError, match=r"test\.tgz' has md5 \w{32}, expected 3d809cd0c2c86adb2c67034d15c4e446"):
        wmt16.prepare(tmp_path, out, ["newstest2016"])
    whole = (tmp_path / "de-en.tgz").read_bytes()
    (tmp_path / "de-en.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*de-en\.tgz'"):
        list(wmt16.training_pairs(tmp_path, "de-en.tgz", "europarl-v7.de-en"))
    with pytest.raises(UserError, match="europarl: line 2 holds byte 0xff"):
        wmt16._decoded(b"a\nb\xff\n", "europarl")
