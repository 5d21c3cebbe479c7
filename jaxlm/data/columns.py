"""Column names: which could play a role, whether a first line is a header, what to say where a column is missing."""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence

_WORDS = {
    "text": """text sentence sentence1 text1 text_a premise question1 review content tweet utterance query comment comment_text body
        document message post input title headline description abstract phrase passage article reviewtext review_body question
        prompt anchor selftext sms news""",
    "pair": "pair sentence2 text2 text_b hypothesis question2 positive paraphrase",
    "label": """label labels class category intent sentiment topic target polarity gold gold_label score rating stars emotion
        is_duplicate coarse_label fine_label quality tag type y annotation similarity toxic""",
    "labels": "labels label classes categories tags topics genres emotions",
    "tokens": "tokens words sentence text",
    "tags": "tags ner_tags pos_tags labels chunk_tags upos",
    "question": "question query title prompt stem sentence",
    "context": "context passage paragraph document article text story",
    "answers": "answers answer answer_text target short_answers",
    "choices": "choices options endings candidates",
    "source": "source text document article input dialogue instruction question prompt src",
    "target": "target summary highlights output response answer completion translation abstract headline tgt",
    "messages": "messages conversations conversation dialogue dialog turns dialogs utterances history",
    "prompt": "prompt question instruction input query",
    "chosen": "chosen preferred response_chosen better winner accepted",
    "rejected": "rejected dispreferred response_rejected worse loser negative",
}
SYNONYMS = {role: tuple(names.split()) for role, names in _WORDS.items()}
"""Role → column names that data sets use for it, the likeliest first."""

_KNOWN = {name for role, names in SYNONYMS.items() for name in (role, *names)} | {
    "id", "idx", "index", "guid", "uid", "split", "lang", "language", "source", "author", "date", "user", "name", "url", "count",
}  # fmt: skip
_WORD = re.compile(r"(?:[^\W\d]|#)[\w .:/#-]{0,39}")


def same_name(column: str, names: Sequence[str]) -> str | None:
    """The name that is `column`, or else the only one that differs from it in case and outer white space alone."""
    if column in names:
        return column
    alike = [name for name in names if name.strip().casefold() == column.strip().casefold()]
    return alike[0] if len(alike) == 1 else None


def suggestion(role: str, column: str, names: Sequence[str], taken: Sequence[str] = ()) -> str | None:
    """The name that is probably meant by `column` in the part of `role`: a misspelling of it, or one that has its sense."""
    free = [name for name in names if name not in taken]
    spelt = [name.casefold() for name in free if role == "id" or not re.search(r"(?i)(_|\b)id$", name)]  # numbers of rows
    close = difflib.get_close_matches(column.casefold(), spelt, n=1, cutoff=0.75)
    if close:
        return next(name for name in free if name.casefold() == close[0])
    plain = {name.strip().casefold().replace(" ", "_"): name for name in reversed(free)}
    return next((plain[name] for name in (role, *SYNONYMS.get(role, ())) if name in plain), None)


def missing_columns(missing: Mapping[str, str], names: Sequence[str], where: str, options: Mapping[str, str]) -> ValueError:
    """The one-line error for roles whose columns (`missing`: role → column) are not among `names`.

    `options` maps each role to the flag that names its column, without dashes.
    """
    shown = [name if len(name) <= 40 else f"{name[:40]}…" for name in names]
    absent, flags, taken = [], [], list[str]()
    for role, column in missing.items():
        guess = suggestion(role, column, [name for name in shown if name.strip()], taken)
        taken += [guess] if guess else []
        absent.append(f"no column {column!r} for the {role}" + (f" (did you mean {guess!r}?)" if guess else ""))
        flags.append(f"--{options[role]} {shlex.quote(guess) if guess else 'NAME'}")
    return ValueError(f"{where} has {' and '.join(absent)}; its columns: {', '.join(shown) or 'none'}; give {' '.join(flags)}")


def is_header(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first line of a table names its columns rather than being a row.

    It does not where a cell of it is blank, a number, a long text, or occurs again in its column. Otherwise it does where a
    cell is a usual name of a column, where a column holds only numbers below it, or where one holds few distinct values, none
    of them its first cell, and another far longer texts than its first cell.
    """
    names = [cell.strip() for cell in first]
    if len(set(names)) < len(names) or not all(_WORD.fullmatch(name) or (i == 0 and not name) for i, name in enumerate(names)):
        return False  # the first name may be blank: pandas writes the numbers of rows below it
    columns = [[row[i].strip() for row in rows if len(row) == len(names)] for i in range(len(names))]
    if any(name in column for name, column in zip(names, columns, strict=True)):
        return False
    if any(name.casefold().replace(" ", "_") in _KNOWN for name in names):
        return True
    if not columns or len(columns[0]) < 4:
        return False
    if any(all(map(_is_number, column)) for column in columns):
        return True
    longer = [sum(map(len, column)) / len(column) > 2 * len(name) for name, column in zip(names, columns, strict=True)]
    few = [len(set(column)) <= len(column) / 2 for column in columns]
    return any(few[i] and any(longer[j] for j in range(len(names)) if j != i) for i in range(len(names)))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
