"""Lexicon of the synthetic corpus: words of English and German with their principal parts, and inflectional endings.

Tables, and how nouns and determiners decline. Sentences are made in grammar.py; nothing here is drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass

# english singular, plural, German nominative singular, gender, nominative plural; "w": weak masculine noun.
NOUNS = {
    "person": """man men Mann m Männer|woman women Frau f Frauen|child children Kind n Kinder
        girl girls Mädchen n Mädchen|boy boys Junge m Jungen w
        teacher teachers Lehrer m Lehrer|doctor doctors Arzt m Ärzte|guest guests Gast m Gäste
        neighbor neighbors Nachbar m Nachbarn w|student students Student m Studenten w|friend friends Freund m Freunde
        mother mothers Mutter f Mütter|father fathers Vater m Väter|brother brothers Bruder m Brüder
        sister sisters Schwester f Schwestern|uncle uncles Onkel m Onkel|aunt aunts Tante f Tanten
        baker bakers Bäcker m Bäcker|farmer farmers Bauer m Bauern w|queen queens Königin f Königinnen
        judge judges Richter m Richter|nurse nurses Krankenschwester f Krankenschwestern""",
    "animal": """dog dogs Hund m Hunde|cat cats Katze f Katzen|horse horses Pferd n Pferde|bird birds Vogel m Vögel
        cow cows Kuh f Kühe|mouse mice Maus f Mäuse|rabbit rabbits Kaninchen n Kaninchen|bear bears Bär m Bären w""",
    "thing": """book books Buch n Bücher|newspaper newspapers Zeitung f Zeitungen|letter letters Brief m Briefe
        car cars Auto n Autos|bicycle bicycles Fahrrad n Fahrräder|picture pictures Bild n Bilder
        key keys Schlüssel m Schlüssel|cup cups Tasse f Tassen|table tables Tisch m Tische|chair chairs Stuhl m Stühle
        lamp lamps Lampe f Lampen|coat coats Mantel m Mäntel|hat hats Hut m Hüte|knife knives Messer n Messer
        clock clocks Uhr f Uhren|ring rings Ring m Ringe|shirt shirts Hemd n Hemden
        suitcase suitcases Koffer m Koffer""",
    "food": """apple apples Apfel m Äpfel|cake cakes Kuchen m Kuchen|egg eggs Ei n Eier|soup soups Suppe f Suppen
        pear pears Birne f Birnen|potato potatoes Kartoffel f Kartoffeln|sausage sausages Wurst f Würste
        cookie cookies Keks m Kekse""",
    "place": """house houses Haus n Häuser|garden gardens Garten m Gärten|school schools Schule f Schulen
        city cities Stadt f Städte|kitchen kitchens Küche f Küchen|church churches Kirche f Kirchen
        park parks Park m Parks|forest forests Wald m Wälder|hotel hotels Hotel n Hotels|village villages Dorf n Dörfer
        office offices Büro n Büros|museum museums Museum n Museen|castle castles Schloss n Schlösser
        shop shops Laden m Läden|cellar cellars Keller m Keller|theater theaters Theater n Theater""",
}

# english, German predicative form, German stem before an ending (where it differs), by the nouns it goes with.
ADJECTIVES = {
    "person": """young jung|clever klug|friendly freundlich|famous berühmt|happy glücklich|sad traurig|poor arm
        rich reich|tired müde müd|old alt|strong stark|hungry hungrig""",
    "animal": """small klein|big groß|black schwarz|white weiß|hungry hungrig|old alt|young jung|tired müde müd
        strong stark|quiet ruhig""",
    "thing": """new neu|expensive teuer teur|cheap billig|heavy schwer|red rot|blue blau|green grün|clean sauber sauber
        dirty schmutzig|beautiful schön|old alt|black schwarz|big groß|small klein""",
    "food": """warm warm|cold kalt|sweet süß|fresh frisch|small klein|big groß|cheap billig""",
    "place": """dark dunkel dunkl|modern modern|empty leer|quiet ruhig|beautiful schön|big groß|small klein|old alt
        famous berühmt|dirty schmutzig""",
}

# english base, 3rd singular, past, participle; German prefix (separable, or -), infinitive, 3rd singular, past,
# participle, auxiliary; classes of the objects that it takes: accusative a:..., dative d:..., both, or none.
VERBS = """see sees saw seen - sehen sieht sah gesehen haben a:person,animal,thing,place
    find finds found found - finden findet fand gefunden haben a:person,animal,thing,food
    look_for looks_for looked_for looked_for - suchen sucht suchte gesucht haben a:person,animal,thing
    love loves loved loved - lieben liebt liebte geliebt haben a:person,animal
    buy buys bought bought - kaufen kauft kaufte gekauft haben a:thing,food,animal
    sell sells sold sold - verkaufen verkauft verkaufte verkauft haben a:thing,food
    carry carries carried carried - tragen trägt trug getragen haben a:thing,animal
    write writes wrote written - schreiben schreibt schrieb geschrieben haben a:WRITE
    eat eats ate eaten - essen isst aß gegessen haben a:food
    visit visits visited visited - besuchen besucht besuchte besucht haben a:person,place
    know knows knew known - kennen kennt kannte gekannt haben a:person
    paint paints painted painted - malen malt malte gemalt haben a:animal,place,person
    repair repairs repaired repaired - reparieren repariert reparierte repariert haben a:REPAIR
    forget forgets forgot forgotten - vergessen vergisst vergaß vergessen haben a:thing
    ask asks asked asked - fragen fragt fragte gefragt haben a:person
    wash washes washed washed - waschen wäscht wusch gewaschen haben a:thing,animal
    call calls called called an rufen ruft rief gerufen haben a:person
    invite invites invited invited ein laden lädt lud geladen haben a:person
    look_at looks_at looked_at looked_at an sehen sieht sah gesehen haben a:thing,place,animal
    pick_up picks_up picked_up picked_up ab holen holt holte geholt haben a:person,thing
    bring_along brings_along brought_along brought_along mit bringen bringt brachte gebracht haben a:thing,food,animal
    throw_away throws_away threw_away thrown_away weg werfen wirft warf geworfen haben a:thing,food
    lock_up locks_up locked_up locked_up ein schließen schließt schloss geschlossen haben a:thing,animal
    help helps helped helped - helfen hilft half geholfen haben d:person,animal
    thank thanks thanked thanked - danken dankt dankte gedankt haben d:person
    follow follows followed followed - folgen folgt folgte gefolgt sein d:person,animal
    trust trusts trusted trusted - vertrauen vertraut vertraute vertraut haben d:person
    answer answers answered answered - antworten antwortet antwortete geantwortet haben d:person
    listen_to listens_to listened_to listened_to zu hören hört hörte gehört haben d:person
    give gives gave given - geben gibt gab gegeben haben d:person;a:thing,food
    show shows showed shown - zeigen zeigt zeigte gezeigt haben d:person;a:thing,animal,place
    send sends sent sent - schicken schickt schickte geschickt haben d:person;a:thing
    lend lends lent lent - leihen leiht lieh geliehen haben d:person;a:thing
    offer offers offered offered an bieten bietet bot geboten haben d:person;a:food,thing
    sleep sleeps slept slept - schlafen schläft schlief geschlafen haben
    work works worked worked - arbeiten arbeitet arbeitete gearbeitet haben
    laugh laughs laughed laughed - lachen lacht lachte gelacht haben
    wait waits waited waited - warten wartet wartete gewartet haben
    dance dances danced danced - tanzen tanzt tanzte getanzt haben
    sing sings sang sung - singen singt sang gesungen haben
    arrive arrives arrived arrived an kommen kommt kam gekommen sein
    get_up gets_up got_up got_up auf stehen steht stand gestanden sein
    fall_asleep falls_asleep fell_asleep fallen_asleep ein schlafen schläft schlief geschlafen sein
    stop stops stopped stopped auf hören hört hörte gehört haben
    go goes went gone - gehen geht ging gegangen sein into
    run runs ran run - laufen läuft lief gelaufen sein into
    drive drives drove driven - fahren fährt fuhr gefahren sein into"""

# Object classes that are narrower than a class of nouns.
CLASSES = {"WRITE": ("book", "newspaper", "letter"), "REPAIR": ("car", "bicycle", "chair", "table", "lamp", "clock")}

NAMES = ("Anna", "Peter", "Maria", "Paul", "Clara", "Thomas", "Julia", "Martin")

# english nominative, English object form, German nominative, accusative, dative, person, number.
PRONOUNS = """I me ich mich mir 1 s|he him er ihn ihm 3 s|she her sie sie ihr 3 s|we us wir uns uns 1 p
    they them sie sie ihnen 3 p"""

# english, German stem, kind ("der": strong endings, "ein": mixed), numbers it goes with.
DETERMINERS = """the d der sp|the d der sp|the d der sp|the d der sp|a ein ein s|a ein ein s|a ein ein s|this dies der s
    these dies der p|every jed der s|no kein ein sp|my mein ein sp|his sein ein sp|her ihr ein sp|our unser ein sp
    two zwei num p|three drei num p|many viele num p| - num p"""

CASES = ("nom", "acc", "dat", "gen")
# Endings by case (rows of CASES) and gender or plural (m f n p).
DEFINITE = {"nom": "der die das die", "acc": "den die das die", "dat": "dem der dem den", "gen": "des der des der"}
STRONG = {"nom": "er e es e", "acc": "en e es e", "dat": "em er em en", "gen": "es er es er"}
MIXED = {"nom": "- e - e", "acc": "en e - e", "dat": "em er em en", "gen": "es er es er"}
ADJECTIVE = {
    "der": {"nom": "e e e en", "acc": "en e e en", "dat": "en en en en", "gen": "en en en en"},
    "ein": {"nom": "er e es en", "acc": "en e es en", "dat": "en en en en", "gen": "en en en en"},
    # Only in the plural.
    "num": {"nom": "- - - e", "acc": "- - - e", "dat": "- - - en", "gen": "- - - er"},
}

# german third person singular, other persons singular, plural.
FINITE = {
    "will": ("wird", "werde", "werden"),
    "can": ("kann", "kann", "können"),
    "must": ("muss", "muss", "müssen"),
    "should": ("soll", "soll", "sollen"),
    "haben": ("hat", "habe", "haben"),
    "sein": ("ist", "bin", "sind"),
}
TENSES = ("present", "present", "past", "past", "perfect", "will", "can", "must", "should")

# english, German; those of the first group stand before the English verb, the others begin or end the clause.
FREQUENCIES = "often oft|always immer|sometimes manchmal|never nie|usually meistens"
TIMES = {
    "any": "today heute|in_the_morning am_Morgen|in_the_evening am_Abend|on_Monday am_Montag|on_Sunday am_Sonntag",
    "past": "yesterday gestern|last_week letzte_Woche|a_year_ago vor_einem_Jahr",
    "will": "tomorrow morgen|next_week nächste_Woche|next_year nächstes_Jahr",
}
PLACES = "in in|behind hinter|near bei|in_front_of vor"
COMPANY = "with mit dat|without ohne acc|for für acc|after nach dat"
# english, German, kind: "sub" verb-final, "main" verb-second.
LINKS = "because weil sub|although obwohl sub|when wenn sub|before bevor sub|and und main|but aber main"
REPORTS = "says sagt|believes glaubt|hopes hofft|thinks denkt"
QUESTIONS = "where wo|when wann|why warum"


def rows(table: str) -> list[list[str]]:
    """Words of each entry of a table; entries end at "|" or a line's end."""
    return [line.split() for part in table.split("\n") for line in part.split("|") if line.strip()]


@dataclass(frozen=True)
class Noun:
    """A noun: English singular and plural, German forms, gender, and the adjectives that go with it."""

    english: tuple[str, str]
    german: tuple[str, str]
    gender: str
    weak: bool
    kind: str

    def form(self, case: str, plural: bool) -> str:
        """The German noun in a case and number."""
        singular, several = self.german
        if plural:
            return several + "n" if case == "dat" and several[-1] not in "ns" else several
        if self.weak and case != "nom":
            return several
        if case == "gen" and self.gender != "f":
            return singular + ("es" if is_monosyllabic(singular) else "s")
        return singular


def is_monosyllabic(word: str) -> bool:
    """True for a word with one group of vowels."""
    vowel = [letter in "aeiouäöü" for letter in word.lower()]
    return sum(now and not before for now, before in zip(vowel, [False, *vowel], strict=False)) == 1


def determiner(stem: str, kind: str, case: str, column: int) -> str:
    """A German determiner in a case; column: masculine, feminine, neuter, plural."""
    if stem == "d":
        return DEFINITE[case].split()[column]
    if kind == "num":
        return "vielen" if stem == "viele" and case == "dat" else stem
    endings = STRONG if kind == "der" else MIXED
    return stem + endings[case].split()[column].replace("-", "")


def contract(phrase: str) -> str:
    """Preposition and article as German contracts them."""
    for full, short in (("in dem ", "im "), ("in das ", "ins "), ("bei dem ", "beim ")):
        if phrase.startswith(full):
            return short + phrase.removeprefix(full)
    return phrase
