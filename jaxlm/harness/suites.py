"""The suites: how a row of a file becomes contexts, continuations and the right one, as lm-evaluation-harness has it.

A suite reads rows in several forms, told apart by their columns: the one that the data set is published in, which the
harness turns into text, and those that hold that text already.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Question:
    """Some continuations of contexts, of which one is right."""

    pairs: tuple[tuple[str, str], ...]
    """(context, continuation) of each choice."""
    choices: tuple[str, ...]
    """The texts whose lengths the normalised accuracies divide by; not always the whole continuation."""
    gold: int


@dataclasses.dataclass(frozen=True)
class Form:
    """Rows with these columns, and what a question is made of them; ValueError says what is wrong with a row."""

    columns: tuple[str, ...]
    question: Callable[[Row], Question]


@dataclasses.dataclass(frozen=True)
class Suite:
    """A data set with its forms; without forms it is whole texts (`page`), whose perplexity is measured."""

    name: str
    forms: tuple[Form, ...] = ()
    scores: tuple[str, ...] = ("acc", "acc_norm", "acc_bytes")


def _question(context: str, choices: list[str], gold: int, delimiter: str = " ") -> Question:
    return Question(tuple((context, delimiter + choice) for choice in choices), tuple(choices), gold)


# --- the values of rows -----------------------------------------------------------------------


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column} is {value!r:.40}: expected a text")
    return value


def _texts(row: Row, column: str) -> list[str]:
    value = row[column]
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) and one.strip() for one in value):
        raise ValueError(f"{column} is {value!r:.40}: expected a list of two or more texts")
    return value


def _number(row: Row, column: str, first: int, count: int) -> int:
    """Which of `count` choices, counted from `first`, as a number from 0."""
    value = row[column]
    if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)) or not first <= int(value) < first + count:
        raise ValueError(f"{column} is {value!r:.40}: expected a whole number from {first} to {first + count - 1}")
    return int(value) - first


# --- hellaswag --------------------------------------------------------------------------------


def _without_marks(text: str) -> str:
    """The part of HellaSwag that comes from WikiHow has marks such as [header] and [title] in its texts."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(row: Row) -> Question:
    second = str(row["ctx_b"] or "")  # empty where the context is whole sentences
    context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {second.capitalize()}"
    endings = [_without_marks(ending) for ending in _texts(row, "endings")]
    return _question(_without_marks(context), endings, _number(row, "label", 0, len(endings)))


# --- openbookqa -------------------------------------------------------------------------------


def _openbookqa(row: Row) -> Question:
    given = row["choices"]
    if not isinstance(given, Mapping) or not {"text", "label"} <= set(given):
        raise ValueError(f"choices is {given!r:.40}: expected an object with text and label")
    texts, answer = _texts(given, "text"), str(row["answerKey"]).lstrip()
    if answer not in given["label"] or len(given["label"]) != len(texts):
        raise ValueError(f"answerKey is {answer!r:.40}: expected one of {', '.join(map(str, given['label']))}")
    return _question(_text(row, "question_stem"), texts, list(given["label"]).index(answer))


# --- copa -------------------------------------------------------------------------------------

_CONNECTORS = {"cause": "because", "effect": "therefore"}


def _copa(row: Row) -> Question:
    if row["question"] not in _CONNECTORS:
        raise ValueError(f"question is {row['question']!r:.40}: expected cause or effect")
    context = f"{_text(row, 'premise').strip()[:-1]} {_CONNECTORS[row['question']]}"  # without its full stop
    choices = [_text(row, column) for column in ("choice1", "choice2")]
    # The harness has a space before each choice and puts another between it and the context: there are two.
    return _question(context, [f" {choice[0].lower()}{choice[1:]}" for choice in choices], _number(row, "label", 0, 2))


# --- winogrande -------------------------------------------------------------------------------


def _winogrande(row: Row) -> Question:
    """Each option fills the gap, and what stands behind it is scored (Trinh & Le 2018, "partial" scoring)."""
    before, gap, after = _text(row, "sentence").partition("_")
    if not gap or not after.strip():
        raise ValueError(f"sentence is {row['sentence']!r:.40}: expected a text with _ for the gap and more behind it")
    return _filled([before + _text(row, column) for column in ("option1", "option2")], after.strip(), _number(row, "answer", 1, 2))


def _filled(contexts: list[str], continuation: str, gold: int) -> Question:
    return Question(tuple((context, f" {continuation}") for context in contexts), tuple(contexts), gold)


def _options(row: Row) -> Question:
    contexts = _texts(row, "context_options")
    return _filled(contexts, _text(row, "continuation").strip(), _number(row, "gold", 0, len(contexts)))


# --- all of them ------------------------------------------------------------------------------


def _ready(row: Row) -> Question:
    choices = _texts(row, "choices")
    return _question(_text(row, "query"), choices, _number(row, "gold", 0, len(choices)))


READY = Form(("query", "choices", "gold"), _ready)
"""The text that a model reads, as it is."""

SUITES = {
    suite.name: suite
    for suite in (
        Suite("hellaswag", (Form(("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag), READY)),
        Suite("openbookqa", (Form(("question_stem", "choices", "answerKey"), _openbookqa), READY)),
        Suite("copa", (Form(("premise", "question", "choice1", "choice2", "label"), _copa), READY)),
        Suite(
            "winogrande",
            (
                Form(("sentence", "option1", "option2", "answer"), _winogrande),
                Form(("context_options", "continuation", "gold"), _options),
            ),
            ("acc",),  # the contexts differ, what is scored does not: there is no length to divide by
        ),
        Suite("wikitext", scores=("word_perplexity", "byte_perplexity", "bits_per_byte")),
    )
}


# --- wikitext ---------------------------------------------------------------------------------

# What WikiText's tokenisation did, undone in this order: (pattern, replacement).
_SPACED = [(re.escape(f" {mark} "), f"{mark} ") for mark in (":", ";", ".", "!", "?", ",")]
_DETOKENISE = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"),
        (r" @-@ ", "-"), (r" @,@ ", ","), (r" @\.@ ", "."),
        *_SPACED,
        (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
        (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="), (r" ° ", "°"),
        (r" \n", "\n"), (r"\n ", "\n"), (r" N ", " 1 "), (r" 's", "'s"),
    )
]  # fmt: skip


def detokenised(page: str) -> str:
    """A page of WikiText as it was written, or nearly so: what the harness has a model read."""
    for pattern, replacement in _DETOKENISE:
        page = pattern.sub(replacement, page)
    return page


def pages(text: str) -> list[str]:
    """The articles of a file of WikiText: each begins with its title, ` = Title = `, a line of one equals sign a side."""
    found, lines = [], list[str]()
    for line in text.split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            found.append("\n".join(lines))
            lines = []
        lines.append(line)
    found.append("\n".join(lines))
    return [page for page in found if page.strip()]
