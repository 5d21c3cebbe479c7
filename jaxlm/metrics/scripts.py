"""Words of any script, and what a text's script means for cutting it into words."""

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

# Scripts that are written without spaces between words, by the names of their characters in Unicode.
_SPACELESS = frozenset({"CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER", "MYANMAR", "TAI"})
Kind = Literal["letter", "single", "mark", "other"]


@functools.lru_cache(maxsize=65536)
def kind_of(char: str) -> Kind:
    """A letter or digit, one of a script without spaces, a mark on the letter before, or anything else."""
    category = unicodedata.category(char)[0]
    if category == "M":
        return "mark"
    if category not in "LN":
        return "other"
    return "letter" if _SPACELESS.isdisjoint(_name(char)[:2]) else "single"


def _name(char: str) -> list[str]:
    return re.split(r"[ -]", unicodedata.name(char, ""))


def words_of(text: str) -> list[str]:
    """Runs of letters, marks and digits, lower case; single characters of scripts without spaces."""
    tokens: list[str] = []
    before: Kind = "other"
    for char in unicodedata.normalize("NFC", text.lower()):
        kind = kind_of(char)
        if kind == "mark" and before != "other":
            tokens[-1] += char  # belongs to the letter before it
            continue
        if kind == "letter" and before == "letter":
            tokens[-1] += char
        elif kind in ("letter", "single"):
            tokens.append(char)
        before = "other" if kind == "mark" else kind
    return tokens


def spaceless(texts: Iterable[str]) -> bool:
    """Whether at least half of the texts' words are characters of scripts without spaces."""
    single = total = 0
    for text in texts:
        words = words_of(text)
        single += sum(kind_of(word[0]) == "single" for word in words)
        total += len(words)
    return 0 < total <= 2 * single


def script_of(texts: Iterable[str]) -> str:
    """The script of most words: "Chinese", "Japanese", "Korean", "spaceless" (Thai, Lao, Khmer, Burmese), or "spaced".

    Text is Japanese if more than a twentieth of its Chinese characters and kana are kana.
    """
    counts = dict.fromkeys(("han", "kana", "hangul", "spaceless", "spaced"), 0)
    for text in texts:
        for word in words_of(text):
            name = _name(word[0])[:2]
            group = (
                "hangul" if "HANGUL" in name
                else "spaced" if kind_of(word[0]) != "single"
                else "han" if {"CJK", "IDEOGRAPHIC", "BOPOMOFO"} & set(name)
                else "kana" if {"HIRAGANA", "KATAKANA"} & set(name)
                else "spaceless"
            )  # fmt: skip
            counts[group] += 1
    han, kana = counts.pop("han"), counts.pop("kana")
    counts["Japanese" if 20 * kana > han + kana else "Chinese"] = han + kana
    best = max(counts, key=lambda name: (counts[name], name == "spaced"))
    return "Korean" if best == "hangul" else best
