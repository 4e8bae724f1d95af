"""Languages by the codes in file names: their names in Moses, and how sacreBLEU splits them into words.

Nothing here may change a line of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

# ISO 639-2 and 639-3 codes (NLLB's and mBART's are these with a script or a region behind), and two frequent mistakes.
ALIAS_CODES = """
asm:as ben:bn cat:ca ces:cs cze:cs cz:cs deu:de ger:de ell:el gre:el eng:en spa:es est:et fin:fi fra:fr fre:fr
gle:ga guj:gu hin:hi hun:hu isl:is ice:is ita:it jpn:ja jp:ja kan:kn kor:ko lit:lt lav:lv lvs:lv mal:ml mar:mr
nld:nl dut:nl ory:or ori:or pan:pa pol:pl por:pt ron:ro rum:ro rus:ru slk:sk slo:sk slv:sl swe:sv tam:ta tel:te
zho:zh chi:zh cmn:zh
"""
ALIASES = dict(pair.split(":") for pair in ALIAS_CODES.split())
CUT_BY_SCRIPT = ("zh", "ja", "ko")
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
KANA = re.compile("[\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9d]")
HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff]")


@cache
def moses_language(code: str) -> str:
    """The two-letter code of a language: "zh_CN", "zh-cn" and "zho_Hans" are "zh"; an unknown code is left as it is."""
    primary = re.split(r"[-_]", code.lower(), maxsplit=1)[0]
    language = ALIASES.get(primary, primary)
    return language if is_known(language) else code


@cache
def is_known(language: str) -> bool:
    """Whether Moses has rules of its own for a two-letter code; it treats any other as English without them."""
    from sacremoses.corpus import NonbreakingPrefixes

    return language in {*NonbreakingPrefixes().available_langs.values(), *CUT_BY_SCRIPT}


def scoring_language(code: str, lines: Iterable[str]) -> str:
    """The language by which sacreBLEU chooses its tokenization: "zh", "ja", "ko", or another, which is cut by 13a.

    The code decides; where it says none of the three (a file is called .tgt, or its language yue), but half of the
    letters are Chinese, Japanese or Korean, their script decides.
    """
    language = moses_language(code)
    if language in CUT_BY_SCRIPT:
        return language
    letters = han = kana = hangul = 0
    for line in lines:
        letters += sum(map(str.isalpha, line))
        han, kana, hangul = (
            n + len(script.findall(line)) for n, script in ((han, HAN), (kana, KANA), (hangul, HANGUL))
        )
    if not letters or 2 * (han + kana + hangul) < letters:
        return language
    if hangul > han + kana:
        return "ko"
    return "ja" if 20 * kana > han + kana else "zh"
