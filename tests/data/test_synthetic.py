"""The synthetic corpus: its splits, its German, and that a dictionary alone cannot translate it."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from fp8repro.data.translation.grammar import Grammar
from fp8repro.data.translation.lexicon import ADJECTIVES, NOUNS, rows
from fp8repro.data.translation.synthetic import Pairs, is_held_out, synthetic_corpus
from fp8repro.errors import UserError
from fp8repro.training.tasks.bleu import sacrebleu_score

Corpus = dict[str, Pairs]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return synthetic_corpus()


def test_sizes_and_distinct_sentences(corpus: Corpus) -> None:
    assert {split: len(pairs) for split, pairs in corpus.items()} == {"train": 20_000, "valid": 500, "test": 500}
    english = [pair[0] for pairs in corpus.values() for pair in pairs]
    assert len(set(english)) == 21_000
    assert max(len(sentence.split()) for sentence in english) <= 18


def test_the_corpus_is_a_function_of_the_seed(corpus: Corpus) -> None:
    assert synthetic_corpus() == corpus
    other = synthetic_corpus(seed=2, train=500, valid=10, test=10)
    assert len(set(other["train"]) & set(corpus["train"])) < 50


def test_held_out_combinations_are_in_the_test_and_never_in_training(corpus: Corpus) -> None:
    phrases = []
    for kind, table in ADJECTIVES.items():
        for adjective in rows(table):
            for noun in rows(NOUNS[kind]):
                if is_held_out((adjective[0], noun[0]), seed=1):
                    phrases += [f"{adjective[0]} {noun[0]}", f"{adjective[0]} {noun[1]}"]
    assert len(phrases) > 30
    pattern = re.compile(rf"\b({'|'.join(phrases)})\b", re.IGNORECASE)
    counts = {split: sum(bool(pattern.search(pair[0])) for pair in pairs) for split, pairs in corpus.items()}
    assert counts["train"] == 0
    assert counts["test"] > 80
    assert counts["valid"] > 80


def test_one_english_sentence_has_one_translation() -> None:
    grammar, rng = Grammar(), random.Random(7)
    known: dict[str, str] = {}
    for _ in range(30_000):
        english, german, _ = grammar.sentence(rng)
        assert known.setdefault(english, german) == german


# Read and judged by hand: agreement, verb-second and verb-final order, separable verbs, case of objects and places.
TRANSLATIONS = {
    "Although the uncles have gone into her forest, no mice see the strong mouse.": (
        "Obwohl die Onkel in ihren Wald gegangen sind, sehen keine Mäuse die starke Maus."
    ),
    "The doctor who repaired his table offers my men a small clock.": (
        "Der Arzt, der seinen Tisch reparierte, bietet meinen Männern eine kleine Uhr an."
    ),
    "We did not offer a hungry farmer a key when I thanked him.": (
        "Wir boten einem hungrigen Bauern einen Schlüssel nicht an, wenn ich ihm dankte."
    ),
    "When does this friendly sister fall asleep with his clever man?": (
        "Wann schläft diese freundliche Schwester mit seinem klugen Mann ein?"
    ),
    "The rabbits must answer the judge in the shop because every friend can go into the quiet church.": (
        "Die Kaninchen müssen dem Richter im Laden antworten, weil jeder Freund in die ruhige Kirche gehen kann."
    ),
    "She must show every tired guest her chairs although Maria will lend the teachers her black cup.": (
        "Sie muss jedem müden Gast ihre Stühle zeigen, obwohl Maria den Lehrern ihre schwarze Tasse leihen wird."
    ),
    "Our uncle believes that we throw away a cup.": "Unser Onkel glaubt, dass wir eine Tasse wegwerfen.",
    "The old brothers sent my poor teacher the new clock.": (
        "Die alten Brüder schickten meinem armen Lehrer die neue Uhr."
    ),
    "Because I repair two expensive lamps in front of the museum, our young mouse trusted this old brother.": (
        "Weil ich zwei teure Lampen vor dem Museum repariere, vertraute unsere junge Maus diesem alten Bruder."
    ),
    "Yesterday the woman got up.": "Gestern stand die Frau auf.",
    "I often listened to my old friend.": "Ich hörte oft meinem alten Freund zu.",
    "My cow is not white.": "Meine Kuh ist nicht weiß.",
}


def test_translations_are_german(corpus: Corpus) -> None:
    known = dict(corpus["test"])
    found = {english: known.get(english) for english in TRANSLATIONS}
    assert found == TRANSLATIONS


# Forms of determiners; a bare "ihr" is left out, for it is a pronoun too.
EIN = "(ein|kein|mein|sein|unser)"
DER = "(dies|jed)"
DATIVE = re.compile(rf"(de[mrn]|({EIN}|{DER}|ihr)(em|er|en)|zwei|drei|vielen)$")
ACCUSATIVE = re.compile(rf"(den|die|das|{EIN}(en|e)?|ihre|ihren|{DER}(en|e|es)|zwei|drei|viele)$")
DETERMINERS = re.compile(rf"(d(er|ie|as|en|em|es)|{EIN}(e[mnrs]?)?|ihre[mnrs]?|{DER}(e[mnrs]?)|zwei|drei|vielen?)$")


@pytest.mark.parametrize(
    ("prepositions", "case"), [(("mit", "nach", "bei", "hinter"), DATIVE), (("für", "ohne"), ACCUSATIVE)]
)
def test_prepositions_govern_their_case(corpus: Corpus, prepositions: tuple[str, ...], case: re.Pattern[str]) -> None:
    seen = 0
    for _, german in corpus["train"]:
        words = german.rstrip(".?").replace(",", "").split()
        for word, following in pairwise(words):
            if word in prepositions and DETERMINERS.match(following):
                seen += 1
                assert case.match(following), german
    assert seen > 500


def test_the_verb_stands_second_and_in_subordinate_clauses_last(corpus: Corpus) -> None:
    modals = ["kann", "können", "muss", "müssen", "soll", "sollen"]
    finite = {"hat", "habe", "haben", "ist", "bin", "sind", "wird", "werde", "werden", *modals}
    second = last = 0
    for english, german in corpus["train"]:
        if re.match(r"(Today|Yesterday|Tomorrow) \w+ (has|have|will|can|must|should) ", english):
            second += 1
            assert german.split()[1] in finite, german
        match = re.search(r"(that|because|although) [^,]*\b(will|must|should) [^,]*\.$", english)
        if match and german.count(",") == 1 and not re.search(r"(will|must|should).*(will|must|should)", match.group()):
            last += 1
            assert german.rstrip(".").split()[-1] in finite, german
    assert second > 50
    assert last > 50


def word_by_word(train: Pairs, sources: list[str]) -> list[str]:
    """Each word's most probable translation by IBM model 1, in English order."""
    pairs = [(re.findall(r"\w+|[.,?]", e), re.findall(r"\w+|[.,?]", g)) for e, g in train]
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(lambda: 1.0))
    for _ in range(4):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for english, german in pairs:
            for target in german:
                total = sum(table[source][target] for source in english)
                for source in english:
                    counts[source][target] += table[source][target] / total
        table = defaultdict(dict)  # type: ignore[arg-type]
        for source, row in counts.items():
            total = sum(row.values())
            table[source] = {target: count / total for target, count in row.items()}  # type: ignore[assignment]
    best = {source: max(row, key=lambda target: row[target]) for source, row in table.items()}
    return [" ".join(best.get(word, word) for word in re.findall(r"\w+|[.,?]", source)) for source in sources]


def test_a_dictionary_alone_does_not_translate_it(corpus: Corpus) -> None:
    sources, references = [pair[0] for pair in corpus["test"]], [pair[1] for pair in corpus["test"]]
    translations = word_by_word(corpus["train"][:4000], sources)
    bleu = sacrebleu_score(
        [t.replace(" .", ".").replace(" ?", "?").replace(" ,", ",") for t in translations], references
    )
    # Most single words are right, their forms and their order are not.
    assert bleu.precisions[0] > 35
    assert bleu.value < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [({"train": 0}, r"data\.options\.train: got 0"), ({"max_words": 3}, r"data\.options\.max_words: got 3")],
)
def test_settings_that_are_not_accepted(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthetic_corpus(**options)
