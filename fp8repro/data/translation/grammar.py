"""The one grammar of the synthetic corpus: the rules of a fragment of English and German, over one lexicon.

It gives one English sentence and its German translation per call of `Grammar.sentence`; it must draw randomness
only from the generator it is given, and never map one English sentence to two German ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fp8repro.data.translation.lexicon import (
    ADJECTIVE,
    ADJECTIVES,
    CASES,
    CLASSES,
    COMPANY,
    DEFINITE,
    DETERMINERS,
    FINITE,
    FREQUENCIES,
    LINKS,
    NAMES,
    NOUNS,
    PLACES,
    PRONOUNS,
    QUESTIONS,
    REPORTS,
    TENSES,
    TIMES,
    VERBS,
    Noun,
    contract,
    determiner,
    rows,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Phrase:
    """A noun phrase in both languages.

    Attributes:
        english: as subject and as object.
        german: by case.
        person: 1 or 3. plural: number. gender: of the noun, for relative pronouns.
        noun: English lemma, empty for names and pronouns. pairs: word combinations used inside.
    """

    english: tuple[str, str]
    german: dict[str, str]
    person: int = 3
    plural: bool = False
    gender: str = "m"
    noun: str = ""
    pronoun: bool = False
    pairs: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class Verb:
    """A verb with its English and German principal parts."""

    english: tuple[str, str, str, str]
    prefix: str
    infinitive: str
    third: str
    past: str
    participle: str
    auxiliary: str
    dative: tuple[str, ...] = ()
    accusative: tuple[str, ...] = ()
    motion: bool = False

    def finite(self, tense: str, subject: Phrase) -> str:
        """The German finite form, without a separable prefix."""
        if tense == "past":
            return self.past + ("n" if self.past.endswith("e") else "en") if subject.plural else self.past
        if subject.plural:
            return self.infinitive
        return self.third if subject.person == 3 else self.infinitive[:-1]


@dataclass
class Clause:
    """A clause before word order: German parts in field order, English in surface order."""

    subject: Phrase
    finite: str
    middle: list[str]
    final: list[str]
    english_subject: str
    english_auxiliary: str
    english_rest: str
    separable: str = ""
    pairs: set[tuple[str, str]] = field(default_factory=set)

    def german(self, front: str = "", order: str = "main") -> str:
        """Verb second (`front` or the subject first), verb first ("question") or verb last ("sub")."""
        subject = self.subject.german["nom"]
        final = list(self.final)
        if order == "sub":
            # A separable prefix joins its verb where the verb stands last.
            return _join(front, subject, *self.middle, *final, self.separable + self.finite)
        if self.separable:
            final.append(self.separable)
        if order == "question" or front:
            return _join(front, self.finite, subject, *self.middle, *final)
        return _join(subject, self.finite, *self.middle, *final)

    def english(self) -> str:
        """Declarative order."""
        return _join(self.english_subject, self.english_auxiliary, self.english_rest)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part and part != "-")


class Grammar:
    """Draws sentence pairs."""

    def __init__(self) -> None:
        """Parse the lexicon."""
        self.nouns: dict[str, list[Noun]] = {}
        for kind, table in NOUNS.items():
            self.nouns[kind] = [Noun((r[0], r[1]), (r[2], r[4]), r[3], "w" in r[5:], kind) for r in rows(table)]
        everything = [noun for nouns in self.nouns.values() for noun in nouns]
        for name, members in CLASSES.items():
            self.nouns[name] = [noun for noun in everything if noun.english[0] in members]
        self.adjectives = {kind: [(r[0], r[1], r[-1]) for r in rows(table)] for kind, table in ADJECTIVES.items()}
        self.verbs = [self._verb(row) for row in rows(VERBS)]
        self.pronouns = [
            Phrase((r[0], r[1]), {"nom": r[2], "acc": r[3], "dat": r[4]}, int(r[5]), r[6] == "p", pronoun=True)
            for r in rows(PRONOUNS)
        ]
        self.names = [Phrase((n, n), dict.fromkeys(CASES, n)) for n in NAMES]
        self.determiners = [r if len(r) == 4 else ["", *r] for r in rows(DETERMINERS)]

    @staticmethod
    def _verb(row: list[str]) -> Verb:
        english = tuple(word.replace("_", " ") for word in row[:4])
        frames = dict(frame.split(":") for frame in row[10].split(";") if ":" in frame) if len(row) > 10 else {}
        classes = {case: tuple(frames[case].split(",")) if case in frames else () for case in "ad"}
        prefix = "" if row[4] == "-" else row[4]
        return Verb(
            (english[0], english[1], english[2], english[3]),
            prefix,
            infinitive=row[5],
            third=row[6],
            past=row[7],
            participle=prefix + row[8],
            auxiliary=row[9],
            dative=classes["d"],
            accusative=classes["a"],
            motion=row[10:] == ["into"],
        )

    def sentence(self, rng: random.Random) -> tuple[str, str, frozenset[tuple[str, str]]]:
        """One English sentence, its German translation, and the word combinations in it.

        Combinations are (adjective, noun) and (verb, object noun), in English base forms.
        """
        draw = rng.random()
        if draw < 0.45:
            english, german, pairs = self._statement(rng)
        elif draw < 0.70:
            english, german, pairs = self._linked(rng)
        elif draw < 0.80:
            english, german, pairs = self._report(rng)
        elif draw < 0.88:
            english, german, pairs = self._predicate(rng)
        else:
            english, german, pairs = self._question(rng)
        mark = "" if english.endswith("?") else "."
        # The full stop closes a relative clause at the end, where the comma would have stood.
        german = german.removesuffix(",")
        return english[0].upper() + english[1:] + mark, german[0].upper() + german[1:] + mark, frozenset(pairs)

    def _statement(self, rng: random.Random) -> tuple[str, str, set[tuple[str, str]]]:
        clause, time = self._clause(rng, relative=True)
        english, german = clause.english(), clause.german()
        if time:
            english, german = _join(time[0], clause.english()), clause.german(front=time[1])
        return english, german, clause.pairs

    def _linked(self, rng: random.Random) -> tuple[str, str, set[tuple[str, str]]]:
        link_en, link_de, order = _pick(rng, rows(LINKS))
        (first, time), (second, _) = self._clause(rng), self._clause(rng)
        pairs = first.pairs | second.pairs
        if order == "sub" and rng.random() < 0.4:
            english = f"{link_en} {second.english()}, {first.english()}"
            # The subordinate clause fills the front field, so the verb follows it.
            return english, first.german(front=second.german(link_de, "sub") + ","), pairs
        english, german = first.english(), first.german()
        if time:
            english, german = _join(time[0], english), first.german(front=time[1])
        if order == "sub":
            return f"{english} {link_en} {second.english()}", f"{german}, {second.german(link_de, 'sub')}", pairs
        comma = "," if link_de == "aber" else ""
        return f"{english}{comma} {link_en} {second.english()}", f"{german}{comma} {link_de} {second.german()}", pairs

    def _report(self, rng: random.Random) -> tuple[str, str, set[tuple[str, str]]]:
        verb_en, verb_de = _pick(rng, rows(REPORTS))
        speaker = self._animate(rng, plural=False, pronouns=False)
        clause, _ = self._clause(rng)
        english = f"{speaker.english[0]} {verb_en} that {clause.english()}"
        german = f"{speaker.german['nom']} {verb_de}, {clause.german('dass', 'sub')}"
        return english, german, clause.pairs | speaker.pairs

    def _predicate(self, rng: random.Random) -> tuple[str, str, set[tuple[str, str]]]:
        kind = _pick(rng, ("person", "animal", "thing", "food", "place"))
        subject = self._phrase(rng, (kind,), adjective=0.2)
        adjective_en, adjective_de, _ = _pick(rng, self.adjectives[kind])
        plural, past = subject.plural, rng.random() < 0.4
        be = ("were" if plural else "was") if past else ("are" if plural else "is")
        sein = ("waren" if plural else "war") if past else ("sind" if plural else "ist")
        not_en, not_de = ("not", "nicht") if rng.random() < 0.2 else ("", "")
        english = _join(subject.english[0], be, not_en, adjective_en)
        return english, _join(subject.german["nom"], sein, not_de, adjective_de), set(subject.pairs)

    def _question(self, rng: random.Random) -> tuple[str, str, set[tuple[str, str]]]:
        clause, _ = self._clause(rng, question=True)
        word_en, word_de = _pick(rng, rows(QUESTIONS)) if rng.random() < 0.5 else ("", "")
        english = _join(word_en, clause.english_auxiliary, clause.english_subject, clause.english_rest)
        return f"{english}?", f"{clause.german(word_de, 'question')}?", clause.pairs

    def _clause(
        self, rng: random.Random, relative: bool = False, question: bool = False
    ) -> tuple[Clause, tuple[str, str] | None]:
        """A clause, and a time adverbial for its front field, or None."""
        verb, tense = _pick(rng, self.verbs), _pick(rng, TENSES)
        subject = self._animate(rng, relative=0.25 if relative else 0.0)
        pairs = set(subject.pairs)
        objects, dative_en, accusative_en = [], "", ""
        for case, classes in (("dat", verb.dative), ("acc", verb.accusative)):
            if not classes:
                continue
            alone = not (verb.dative and verb.accusative)
            person = "person" in classes and (alone or case == "dat")
            if person and rng.random() < 0.25:
                other = self._animate(rng, avoid=subject)
            else:
                other = self._phrase(rng, classes, genitive=0.08 if alone else 0.0)
            pairs |= other.pairs | ({(verb.english[0], other.noun)} if other.noun else set())
            objects.append((other.pronoun, other.german[case]))
            if case == "dat":
                dative_en = other.english[1]
            else:
                accusative_en = other.english[1]
        frequency = _pick(rng, rows(FREQUENCIES)) if rng.random() < 0.2 else ("", "")
        negated = rng.random() < 0.12 and not frequency[0] and not question
        place_en, place_de, place_pairs = self._adverbial(rng, verb)
        pairs |= place_pairs
        time = self._time(rng, tense) if rng.random() < 0.35 and not question else None
        auxiliary, rest = _english_verb(verb, tense, subject, frequency[0], negated, question)
        finite, final, separable = _german_verb(verb, tense, subject)
        middle = [text for pronoun, text in objects if pronoun]
        middle += [frequency[1]]
        middle += [text for pronoun, text in objects if not pronoun]
        middle += ["nicht" if negated else "", place_de]
        english_rest = _join(rest, dative_en, accusative_en, place_en)
        clause = Clause(subject, finite, middle, final, subject.english[0], auxiliary, english_rest, separable, pairs)
        return clause, time

    def _adverbial(self, rng: random.Random, verb: Verb) -> tuple[str, str, frozenset[tuple[str, str]]]:
        """Direction (accusative) after a verb of motion, else a place (dative), company, or nothing."""
        draw = rng.random()
        if verb.motion:
            place = self._phrase(rng, ("place",), adjective=0.2)
            return f"into {place.english[1]}", contract(f"in {place.german['acc']}"), place.pairs
        if draw < 0.22:
            word_en, word_de = _pick(rng, rows(PLACES))
            place = self._phrase(rng, ("place",), adjective=0.2)
            return (
                f"{word_en.replace('_', ' ')} {place.english[1]}",
                contract(f"{word_de} {place.german['dat']}"),
                place.pairs,
            )
        if draw < 0.34:
            word_en, word_de, case = _pick(rng, rows(COMPANY))
            other = self._animate(rng)
            return f"{word_en} {other.english[1]}", f"{word_de} {other.german[case]}", other.pairs
        return "", "", frozenset()

    def _time(self, rng: random.Random, tense: str) -> tuple[str, str]:
        group = tense if tense in TIMES and rng.random() < 0.7 else "any"
        english, german = _pick(rng, rows(TIMES[group]))
        return english.replace("_", " "), german.replace("_", " ")

    def _animate(
        self,
        rng: random.Random,
        *,
        plural: bool | None = None,
        pronouns: bool = True,
        relative: float = 0.0,
        avoid: Phrase | None = None,
    ) -> Phrase:
        """A pronoun, a name, or a phrase of a person or an animal."""
        draw = rng.random()
        if draw < 0.25 and pronouns:
            accepted = [p for p in self.pronouns if avoid is None or p.person == 3 or p.person != avoid.person]
            return _pick(rng, accepted)
        if draw < 0.35:
            return _pick(rng, self.names)
        return self._phrase(rng, ("person", "person", "animal"), plural=plural, relative=relative)

    def _phrase(
        self,
        rng: random.Random,
        classes: Sequence[str],
        *,
        plural: bool | None = None,
        adjective: float = 0.35,
        genitive: float = 0.0,
        relative: float = 0.0,
    ) -> Phrase:
        """Determiner, adjectives that agree with it in gender, case and number, noun, and what may follow."""
        noun = _pick(rng, self.nouns[_pick(rng, classes)])
        plural = rng.random() < 0.3 if plural is None else plural
        number = "p" if plural else "s"
        word_en, stem, kind, _ = _pick(rng, [d for d in self.determiners if number in d[3]])
        described = _pick(rng, self.adjectives[noun.kind]) if rng.random() < adjective else None
        column = "mfnp".index("p" if plural else noun.gender)
        lemma, pairs = noun.english[0], set()
        german = {}
        for case in CASES:
            parts = [determiner(stem, kind, case, column)]
            if described:
                parts.append(described[2] + ADJECTIVE[kind][case].split()[column].replace("-", ""))
            german[case] = _join(*parts, noun.form(case, plural))
        following = _join(described[0] if described else "", noun.english[plural])
        if word_en == "a" and following[0] in "aeiou":
            word_en = "an"
        if described:
            pairs.add((described[0], lemma))
        english = _join(word_en, following)
        phrase = Phrase((english, english), german, 3, plural, noun.gender, lemma, pairs=frozenset(pairs))
        draw = rng.random()
        if draw < genitive and stem in ("d", "ein"):
            return self._with_owner(rng, phrase)
        return self._with_relative(rng, phrase) if draw < relative else phrase

    def _with_owner(self, rng: random.Random, phrase: Phrase) -> Phrase:
        owner = self._phrase(rng, ("person",), plural=False, adjective=0.2)
        english = f"{phrase.english[1]} of {owner.english[1]}"
        german = {case: f"{text} {owner.german['gen']}" for case, text in phrase.german.items()}
        return replace(phrase, english=(english, english), german=german, pairs=phrase.pairs | owner.pairs)

    def _with_relative(self, rng: random.Random, phrase: Phrase) -> Phrase:
        """A relative clause whose pronoun is the subject; in German verb-final between commas."""
        verb = _pick(rng, [v for v in self.verbs if v.accusative and not v.dative])
        other = self._phrase(rng, verb.accusative, adjective=0.2)
        tense = _pick(rng, ("present", "past"))
        _, verb_en = _english_verb(verb, tense, phrase, "", False, False)
        column = "mfnp".index("p" if phrase.plural else phrase.gender)
        english = f"{phrase.english[0]} who {verb_en} {other.english[1]}"
        # The nominative relative pronoun looks like the definite article.
        pronoun = DEFINITE["nom"].split()[column]
        clause = f"{pronoun} {other.german['acc']} {verb.prefix}{verb.finite(tense, phrase)}"
        german = {case: f"{text}, {clause}," for case, text in phrase.german.items()}
        pairs = phrase.pairs | other.pairs | {(verb.english[0], other.noun)}
        return replace(phrase, english=(english, english), german=german, pairs=pairs)


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    # Not rng.choice: only random() is documented to give the same sequence in every Python version.
    return choices[int(rng.random() * len(choices))]


def _english_verb(
    verb: Verb, tense: str, subject: Phrase, frequency: str, negated: bool, question: bool
) -> tuple[str, str]:
    """Auxiliary (empty where English uses none) and the rest of the verb, adverb and negation in place."""
    base, third, past, participle = verb.english
    third_person = subject.person == 3 and not subject.plural
    particle = "not" if negated else frequency
    if tense == "perfect":
        return "has" if third_person else "have", _join(particle, participle)
    if tense in ("will", "can", "must", "should"):
        if tense == "can" and negated:
            return "cannot", base
        return tense, _join(particle, base)
    if negated or question:
        auxiliary = "did" if tense == "past" else "does" if third_person else "do"
        return auxiliary, _join(particle, base)
    return "", _join(particle, past if tense == "past" else third if third_person else base)


def _german_verb(verb: Verb, tense: str, subject: Phrase) -> tuple[str, list[str], str]:
    """Finite verb, the clause's final verbs, and the separable prefix of the finite verb."""
    if tense in ("present", "past"):
        return verb.finite(tense, subject), [], verb.prefix
    form = 2 if subject.plural else 0 if subject.person == 3 else 1
    if tense == "perfect":
        participle = verb.participle
        return FINITE[verb.auxiliary][form], [participle], ""
    return FINITE[tense][form], [verb.prefix + verb.infinitive], ""
