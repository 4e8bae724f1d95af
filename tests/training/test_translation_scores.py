"""What a text may hold and what it is scored as: references, literal special tokens, subwords, languages, encodings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU

from fp8repro.data.translation.corpus import read_pairs
from fp8repro.data.translation.datasets import TranslationData, load_translation
from fp8repro.data.translation.fairseq_binary import write_binary
from fp8repro.data.translation.languages import moses_language, scoring_language
from fp8repro.data.translation.subwords import find_scheme
from fp8repro.data.translation.text import Subwords, detokenize, learn_bpe, tokenize
from fp8repro.data.translation.vocabulary import Vocabulary
from fp8repro.errors import UserError
from fp8repro.settings.choices import compose_group
from fp8repro.settings.schema import RunConfig, run_config
from fp8repro.training.distributed import World
from fp8repro.training.loop import train
from fp8repro.training.run import make_task
from fp8repro.training.tasks import decode_graphs
from fp8repro.training.tasks.bleu import chrf_score, sacrebleu_score, tokenized_bleu
from fp8repro.training.tasks.decode import Hypothesis
from fp8repro.training.tasks.translation import HYPOTHESES, REFERENCES

SPLITS, MARK = ("train", "valid", "test"), "\u2047"
Lines = Mapping[str, list[str]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_text(folder: Path, line: str = "lus del kis .", target: str = "de", **test: list[str]) -> Path:
    """Eight times a line in every split; `test` replaces the lines of the test split, by language."""
    folder.mkdir(exist_ok=True)
    for split in SPLITS:
        for language in ("en", target):
            lines = test.get(language, [line] * 8) if split == "test" else [line] * 8
            (folder / f"{split}.{language}").write_bytes("".join(f"{each}\n" for each in lines).encode())
    return folder


def write_folder(folder: Path, tokens: list[str], sentences: list[list[int]], **files: str) -> Path:
    """What fairseq-preprocess leaves: a joint dictionary, the same sentences in every split and language."""
    for language in ("en", "de"):
        (folder / f"dict.{language}.txt").write_bytes("".join(f"{token} 9\n" for token in tokens).encode())
        for split in SPLITS:
            encoded = [np.array([*ids, 2]) for ids in sentences]
            write_binary(folder / f"{split}.en-de.{language}", encoded, 4 + len(tokens))
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content.encode())
    return folder


def load(root: Path, **options: Any) -> TranslationData:
    return load_translation("parallel_text", str(root), {"bpe_merges": 30, **options})


def ids(data: TranslationData) -> list[list[int]]:
    return [data.test.target[i].tolist() for i in range(len(data.test.target))]


# References


def test_tokenized_references_are_the_files_lines_with_words_that_training_never_saw(tmp_path: Path) -> None:
    lines = ["lus kowaz del .", "Ab@@ c &amp; d .", "", "kis"]
    data = load(write_text(tmp_path / "text", en=["a"] * 4, de=lines), tokenized=True)
    assert data.test.references == ["lus kowaz del.", "Abc & d.", "", "kis"]
    assert data.references_from == "lines"
    assert data.detokenize(ids(data)[0]) == "lus <unk> del."
    reopened = load_translation("fairseq_binary", str(data.folder))
    assert reopened.test.references == data.test.references


@pytest.mark.parametrize("score", [sacrebleu_score, tokenized_bleu, chrf_score])
def test_an_unknown_word_of_a_reference_equals_none_of_a_translation(tmp_path: Path, score: Callable[..., Any]) -> None:
    words = [f"w{i}" for i in range(8)]
    sentence = [4, 5, 6, 7, 8, 9, 10, 11]
    unknown = [3 if i in (5, 6, 9) else i for i in sentence]
    data = load_translation("fairseq_binary", str(write_folder(tmp_path, words, [unknown])))
    assert data.references_from == "ids"
    assert data.test.references == [f"w0 {MARK} {MARK} w3 w4 {MARK} w6 w7"]
    translation = [data.detokenize(unknown)]
    assert translation == ["w0 <unk> <unk> w3 w4 <unk> w6 w7"]
    lost = score(translation, data.test.references).value
    # No more than against the words that were lost.
    assert lost == pytest.approx(score(translation, ["w0 x1 x2 w3 w4 x5 w6 w7"]).value, abs=8)
    assert lost < 60 < 99.9 < score(translation, translation).value


def test_the_mark_is_none_of_a_vocabularys_characters(tmp_path: Path) -> None:
    data = load_translation("fairseq_binary", str(write_folder(tmp_path, [f"a{MARK}", "b"], [[4, 3, 5]])))
    assert data.test.references == [f"a{MARK} \ufffd b"]


def test_unknown_words_that_a_tokenized_text_marks_itself_count_nothing(tmp_path: Path) -> None:
    data = load(write_text(tmp_path / "t", "lus <unk> kis .", en=["lus"], de=["lus <unk> kis ."]), tokenized=True)
    assert "<unk>" not in data.vocabulary.tokens[4:]
    assert ids(data)[0][1] == 3
    assert data.test.references == [f"lus {MARK} kis."]


def test_lines_beside_ids_are_taken_as_what_they_are(tmp_path: Path) -> None:
    words, sentence = ["Ja@@", "hr", ".", "&amp;"], [[4, 5, 7, 6], [3, 6]]
    for content, expected in (
        ("Ja@@ hr &amp; .\nneu .\n", ["Jahr &.", "neu."]),  # what the ids were made of
        ("Jahr &amp; .\nneu .\n", ["Jahr &.", "neu."]),
        ("Jahr &.\r\nneu .\r\n", ["Jahr &.", "neu ."]),  # the plain text
    ):
        root = write_folder(tmp_path, words, sentence, test_de=content)
        data = load_translation("fairseq_binary", str(root))
        assert (data.test.references, data.references_from) == (expected, "lines")
    write_folder(tmp_path, words, sentence, test_de="Jahr.\n")
    with pytest.raises(UserError, match=r"test\.de' has 1 lines for 2 sentences, expected the same number"):
        load_translation("fairseq_binary", str(tmp_path))


# Literal special tokens


def test_special_tokens_within_a_text_are_words_like_any_other(tmp_path: Path) -> None:
    line = "a </s> b <pad> <s> madeupword0000 c"
    data = load(write_text(tmp_path / "text", line), tokenized=True)
    found = data.train.target[0].tolist()
    assert found[-1] == 2
    assert min(found[:-1]) > 3
    assert len(set(found)) == 8
    assert data.detokenize(found) == line
    assert data.test.references == [line] * 8
    saved = Vocabulary.load(data.folder / "dict.de.txt")
    assert saved.tokens == data.vocabulary.tokens
    assert len(saved) % 8 == 0
    assert "</s> 16 #fairseq:overwrite\n" in (data.folder / "dict.de.txt").read_text()
    plain = load(write_text(tmp_path / "plain", line))
    assert plain.test.references == [line] * 8
    assert min(plain.train.target[0][:-1]) > 3


def test_a_word_that_a_dictionary_lacks_is_unknown_whatever_its_name(tmp_path: Path) -> None:
    words = Vocabulary(["a"], [1])
    assert words.encode(["<s>", "a", "<pad>", "</s>", "<unk>"]).tolist() == [3, 4, 3, 3, 3, 2]
    path = tmp_path / "dict.txt"
    path.write_text("a 5\n</s> 4\n")
    with pytest.raises(UserError, match=r"line 2 repeats '</s>'"):
        Vocabulary.load(path)
    path.write_text("a 5\n</s> 4 #fairseq:overwrite\na 1 #fairseq:overwrite\n")
    words = Vocabulary.load(path)
    assert words.encode(["a", "</s>"]).tolist() == [6, 5, 2]
    assert words.decode([4, 5, 6]) == ["a", "</s>", "a"]
    words.save(path)
    assert Vocabulary.load(path).ids == words.ids


def test_control_ids_within_a_binarized_sentence_are_unknown_words(tmp_path: Path) -> None:
    # fairseq-preprocess writes the ids 2, 1 and 0 for a "</s>", "<pad>" and "<s>" of the text.
    data = load_translation("fairseq_binary", str(write_folder(tmp_path, ["a", "b"], [[4, 2, 1, 5, 0, 4]])))
    assert ids(data) == [[4, 3, 3, 5, 3, 4, 2]]
    assert data.test.references == [f"a {MARK} {MARK} b {MARK} a"]


# Subwords


def test_sentencepiece_folders_are_scored_on_words(tmp_path: Path) -> None:
    pieces = ["\u2581Das", "\u2581ist", "\u2581ein", "\u2581Haus", "t\u00fcr", "."]
    data = load_translation("fairseq_binary", str(write_folder(tmp_path, pieces, [[4, 5, 6, 7, 8, 9], [3, 4, 3]])))
    assert data.scheme.name == "sentencepiece"
    assert data.test.references == ["Das ist ein Haust\u00fcr.", f"{MARK} Das{MARK}"]
    assert data.tokens([4, 7, 8, 9]) == ["Das", "Haust\u00fcr", "."]
    assert data.detokenize([3, 4, 9]) == "<unk> Das."
    pieces[4] = "lein@@"
    write_folder(tmp_path, pieces, [[4]])
    with pytest.raises(UserError, match=r"data\.options\.subwords: got 'auto', but the tokens hold both"):
        load_translation("fairseq_binary", str(tmp_path))
    chosen = load_translation("fairseq_binary", str(tmp_path), {"subwords": "none"})
    assert chosen.test.references == ["\u2581Das"]


def test_sentencepiece_lines_are_tokenized_text_too(tmp_path: Path) -> None:
    root = write_text(
        tmp_path / "text", "\u2581Ein \u2581Haus .", en=["\u2581a"], de=["\u2581Kein \u2581Haus t\u00fcr ."]
    )
    data = load(root, tokenized=True)
    assert data.test.references == ["Kein Haust\u00fcr."]
    assert data.detokenize(data.train.target[0].tolist()) == "Ein Haus."


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["a@@", "b"], "bpe"),
        (["a", "b", "--"], "bpe"),
        (["\u2581a", "b"], "sentencepiece"),
        (["\u0120a", "b"], "byte-level BPE"),
        (["a", "##b"], "WordPiece"),
        (["a</w>", "b"], "BPE with </w>"),
        (["a\uffed", "b"], "OpenNMT"),
        (["a~~", "b"], r"tokens that end with '~~' \(data\.options\.separator='~~'\?\)"),
        (["a__", "b"], "tokens that end with '__'"),
        ([str(i) for i in range(1200)], "numbers instead of words"),
        ([str(i) for i in range(10)], "bpe"),
    ],
)
def test_subwords_are_recognized_or_refused(tokens: list[str], expected: str) -> None:
    counts = dict.fromkeys(tokens, 5)
    if expected in ("bpe", "sentencepiece"):
        assert find_scheme("auto", "@@", counts).name == expected
    else:
        with pytest.raises(UserError, match=rf"subwords: got 'auto', but the tokens hold .*{expected}"):
            find_scheme("auto", "@@", counts)
    # A character of the text is no mark.
    rare = {**dict.fromkeys((f"w{i}" for i in range(3000)), 50), **dict.fromkeys(tokens[:1], 5)}
    assert find_scheme("auto", "@@", rare).name == "bpe"


def test_another_separator_and_none() -> None:
    tokens = ["a~~", "b", "c@@", "d"]
    assert find_scheme("bpe", "~~", {}).join(tokens) == "ab c@@ d"
    assert find_scheme("auto", "~~", dict.fromkeys(tokens, 1)).join(tokens) == "ab c@@ d"
    assert find_scheme("none", "@@", {}).join(tokens) == "a~~ b c@@ d"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"subwords": "spm", "tokenized": True},
            r"subwords: got 'spm', expected one of auto, bpe, sentencepiece, none",
        ),
        ({"subwords": "sentencepiece"}, r"subwords: got 'sentencepiece', expected it with data\.options\.tokenized"),
        ({"separator": "~"}, r"separator: got '~', expected it with data\.options\.tokenized"),
        ({"separator": "", "tokenized": True}, r"separator: got ''"),
        ({"bpe_codes": "text/train.en", "tokenized": True}, r"bpe_codes: got .*, expected none with"),
        ({"target": "en"}, r"target: got 'en', expected another language than the source's"),
        ({"source": "../en"}, r"source: got '\.\./en', expected a language"),
    ],
)
def test_settings_that_are_not_accepted(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"data\.options\.{message}"):
        load(write_text(tmp_path / "text"), **options)


# Languages


CHINESE, JAPANESE, KOREAN = (
    "我喜欢 GPU\uff0c很好。\uff08真的\uff09",
    "私は東京に行きました。「はい」",
    '나는 학교에 갔다. 그는 "좋다" 했다.',
)


@pytest.mark.parametrize(
    ("code", "lines", "expected"),
    [
        ("zh", ["x"], "zh"),
        ("zh_CN", ["x"], "zh"),
        ("zho_Hans", ["x"], "zh"),
        ("ja-JP", ["x"], "ja"),
        ("kor_Hang", ["x"], "ko"),
        ("tgt", [CHINESE], "zh"),
        ("yue", [CHINESE], "zh"),
        ("cn", [CHINESE], "zh"),
        ("tgt", [JAPANESE], "ja"),
        ("kr", [KOREAN], "ko"),
        ("tgt", ["Das 东 ist ein Haus."], "tgt"),
        ("pt-br", ["O gato."], "pt"),
        ("de", [], "de"),
    ],
)
def test_the_language_that_decides_how_a_score_cuts_words(code: str, lines: list[str], expected: str) -> None:
    assert scoring_language(code, lines) == expected


@pytest.mark.parametrize("code", ["zh_CN", "zh-cn", "ZH", "pt-br", "pt_BR", "deu_Latn", "en-GB", "cz", "kor"])
def test_moses_knows_a_language_by_whatever_code(code: str) -> None:
    short = {"deu": "de", "kor": "ko", "cz": "cs"}.get(code.split("_")[0], code[:2].lower())
    assert moses_language(code) == short
    for line in (CHINESE, KOREAN, "Don't say d'accord, o Sr. Silva."):
        assert tokenize(line, code) == tokenize(line, short)
        assert detokenize(tokenize(line, code).split(), code) == detokenize(tokenize(line, short).split(), short)


def test_detokenized_chinese_japanese_and_korean_are_the_plain_lines() -> None:
    for line, code in ((CHINESE, "zh_CN"), (JAPANESE, "ja"), (KOREAN, "ko"), (KOREAN, "tgt")):
        assert detokenize(tokenize(line, code).split(), code) == line, code


def test_a_score_cuts_words_as_sacrebleu_does_by_default() -> None:
    hypotheses, references = ["我很喜欢吃苹果和香蕉。"], ["我喜欢吃苹果和大香蕉。"]
    for language in ("zh", "de", "", "tgt"):
        theirs = BLEU(trg_lang=language, force=True)
        expected = theirs.corpus_score(hypotheses, [references])
        found = sacrebleu_score(hypotheses, references, language)
        assert (found.value, found.signature) == (expected.score, str(theirs.get_signature()))
    assert sacrebleu_score(hypotheses, references, "zh").value > 30
    assert "tok:zh" in sacrebleu_score(hypotheses, references, "zh").signature


@pytest.mark.parametrize(("language", "module"), [("ja", "MeCab"), ("ko", "mecab_ko")])
def test_a_signature_says_that_characters_are_compared_where_mecab_is_missing(
    language: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    monkeypatch.setattr(import_module(f"sacrebleu.tokenizers.tokenizer_{language}_mecab"), "MeCab", None)
    found = sacrebleu_score([JAPANESE[:8]], [JAPANESE], language)
    assert "tok:char" in found.signature
    assert found.value == BLEU(tokenize="char", force=True).corpus_score([JAPANESE[:8]], [[JAPANESE]]).score


# Encodings and lines


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_and_windows_line_ends_are_no_text(tmp_path: Path, mark: str, ending: str) -> None:
    lines = ["lus\u00a0del \u2028kis .", "Neu\x85zeile\x0b .", "", "  ", "e\u0301 .", "last"]
    # The second mark is that of a file that was appended; the last line has no end.
    content = (mark + ending.join(lines[:3]) + ending + mark + ending.join(lines[3:])).encode()
    for split in SPLITS:
        for language in ("en", "de"):
            (tmp_path / f"{split}.{language}").write_bytes(content)
        (tmp_path / f"{split}.tsv").write_bytes(
            "".join(f"{mark}{line}\t{mark}{line}{ending}" for line in lines).encode()
        )
    for names in ({}, {split: f"{split}.tsv" for split in SPLITS}):
        data = load(tmp_path, **names)
        assert data.test.references == lines
        assert data.skipped == {"empty": 2, "too_long": 0}
        assert not any("\ufeff" in token or "\r" in token for token in data.vocabulary.tokens)
        assert len(ids(data)[2]) == len(ids(data)[3]) == 1
    assert load(tmp_path, tokenized=True).test.references[1] == "Neu zeile."


def test_byte_order_marks_in_codes_and_dictionaries(tmp_path: Path) -> None:
    learn_bpe(["lus del kis kislus"] * 9, 8, tmp_path / "codes")
    plain = Subwords(tmp_path / "codes").segment("kislus delkis")
    for ending in (b"\n", b"\r\n"):
        content = (tmp_path / "codes").read_bytes().replace(b"\n", ending)
        (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + content + ending)
        assert Subwords(tmp_path / "marked").segment("kislus delkis") == plain
        (tmp_path / "dict").write_bytes(b"\xef\xbb\xbf" + b"a 3" + ending + b"b 2" + ending)
        assert Vocabulary.load(tmp_path / "dict").tokens[4:] == ["a", "b"]
    text = write_text(tmp_path / "text")
    given = load(text, bpe_codes=str(tmp_path / "marked"))
    assert not (given.folder / "bpe.codes").read_bytes().startswith(b"\xef")


def test_other_codes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("#version: 0.2\n\u0120 t\n\u0120 a\nh e\n", encoding="utf-8")
    with pytest.raises(UserError, match="is byte-level BPE"):
        Subwords(tmp_path / "merges.txt")
    # A letter of Maltese.
    (tmp_path / "codes").write_text("#version: 0.2\n\u0120 u\ne d</w>\n", encoding="utf-8")
    assert Subwords(tmp_path / "codes").segment("\u0120ued") == ["\u0120u@@", "ed"]
    (tmp_path / "codes").write_text("a b 7\n")
    with pytest.raises(UserError, match=rf"bpe_codes: '{tmp_path}/codes' is no codes file of subword-nmt"):
        load(write_text(tmp_path / "text"), bpe_codes=str(tmp_path / "codes"))


def test_text_without_merges_is_characters(tmp_path: Path) -> None:
    data = load(write_text(tmp_path / "text"), bpe_merges=0)
    assert data.vocabulary.decode(ids(data)[0])[:3] == ["l@@", "u@@", "s"]
    assert load(write_text(tmp_path / "text", "x y z"), bpe_merges=9).test.references == ["x y z"] * 8


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_and_carriage_returns_alone_are_refused_in_one_line(tmp_path: Path, encoding: str) -> None:
    for language in ("en", "de"):
        (tmp_path / f"x.{language}").write_bytes("Ja, ein Haus.\nNein.\n".encode(encoding))
    with pytest.raises(UserError, match=r"x\.en' line 1 looks like UTF-16, expected UTF-8"):
        list(read_pairs((tmp_path / "x.en", tmp_path / "x.de")))
    for language in ("en", "de"):
        (tmp_path / f"x.{language}").write_bytes(b"Ja.\rNein.\r")
    with pytest.raises(UserError, match=r"x\.en' ends its lines with carriage returns alone"):
        list(read_pairs((tmp_path / "x.en", tmp_path / "x.de")))
    # A NUL is a character of the text.
    for language in ("en", "de"):
        (tmp_path / f"x.{language}").write_bytes(b"Ja\0, ein Haus.\n")
    assert list(read_pairs((tmp_path / "x.en", tmp_path / "x.de"))) == [("Ja\0, ein Haus.",) * 2]


@pytest.mark.parametrize("split", SPLITS)
def test_an_empty_split_is_refused(tmp_path: Path, split: str) -> None:
    root = write_text(tmp_path / "text")
    for language in ("en", "de"):
        (root / f"{split}.{language}").write_bytes(b"")
    with pytest.raises(UserError, match=rf"{split}\.en' has no line, expected at least one"):
        load(root)
    write_folder(tmp_path, ["a"], [[4]])
    for language in ("en", "de"):
        write_binary(tmp_path / f"{split}.en-de.{language}", [], 5)
    with pytest.raises(UserError, match=rf"{split} in .* is empty, expected at least one pair"):
        load_translation("fairseq_binary", str(tmp_path))


# A run


def config(root: Path, run_dir: Path, data: str, **options: Any) -> RunConfig:
    size = {"width": 16, "ffn_width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    return run_config(
        {
            "model": {"name": "transformer", "task": "translation", "size": size},
            "data": {"name": data, "root": str(root), "options": options},
            "precision": compose_group("precision", "fp32"),
            "loss_scaling": {"policy": "auto"},
            "trainer": {"max_steps": 1, "batch_size": 200, "eval_batch_size": 200},
            "logger": "none",
            "device": "cpu",
            "run_dir": str(run_dir),
        }
    )


def test_a_runs_summary_says_how_it_was_scored(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", CHINESE, "zh_CN", en=["", CHINESE, " "], zh_CN=[CHINESE, CHINESE, ""])
    summary = train(config(text, tmp_path / "zh", "parallel_text", target="zh_CN", bpe_merges=5))
    assert "tok:zh" in summary["bleu_signature"]
    assert summary["bleu_tokenized_signature"] == summary["bleu_signature"]
    assert (summary["references_from"], summary["subwords"]) == ("lines", "bpe")
    assert (tmp_path / "zh" / REFERENCES).read_text(encoding="utf-8") == f"{CHINESE}\n{CHINESE}\n\n"
    translations = (tmp_path / "zh" / HYPOTHESES).read_text(encoding="utf-8").split("\n")
    # An empty line has an empty translation.
    assert (len(translations), translations[0], translations[2]) == (4, "", "")
    folder = tmp_path / "folder"
    folder.mkdir()
    summary = train(config(write_folder(folder, ["\u2581a", "b"], [[4, 3, 5]]), tmp_path / "ids", "fairseq_binary"))
    assert (summary["references_from"], summary["subwords"]) == ("ids", "sentencepiece")
    for name in ("bleu", "bleu_tokenized", "chrf"):
        assert summary[f"{name}_signature"].endswith("|refs:ids")
    assert json.loads((tmp_path / "ids" / "summary.json").read_text()) == summary


@torch.no_grad()
def test_sentences_of_the_test_may_be_empty_or_longer_than_all_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = " ".join(["lus"] * 900)
    text = write_text(tmp_path / "text", en=[long, ""], de=["lus", ""])
    work = make_task(config(text, tmp_path / "run", "parallel_text", bpe_merges=5, max_length=10), World())
    model = work.model().eval()
    found = work.translate(model, work.data.test)
    assert (len(found), found[1]) == (2, [])
    assert work.evaluate(model, "test")["bleu"] >= 0
    # A model that has an answer to everything is not asked for an empty line.
    answer = [Hypothesis(0.0, 0.0, (4,))]
    monkeypatch.setattr(decode_graphs, "beam_search", lambda model, source, config: [answer] * len(source))
    assert work.translate(model, work.data.test) == [[4], []]
