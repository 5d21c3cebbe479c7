"""The values that roles take (text, label, answers, …), read from whatever a column holds.

Each function returns the value or raises ValueError with why there is none, to be read after the role: "holds 3, not a text".
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.data.cells import bracketed, decoded, python_value
from jaxlm.data.dialogues import messages_of
from jaxlm.text_files import parse_json


def _text(value: Any) -> str:
    """A text; a list of texts, which pandas writes as Python does, joined with spaces."""
    if isinstance(value, str) and bracketed(value):
        value = _python_texts(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if not isinstance(value, str):
        raise ValueError(f"holds {shown(value)}, not a text")
    return value


def _python_texts(value: str) -> Any:
    """The list of texts that a text spells as Python does and JSON does not, or the text itself: JSON may be what is to be read
    or written."""
    try:
        parse_json(value)
    except (ValueError, RecursionError):
        found = python_value(value)
    else:
        return value
    return found if isinstance(found, list) and found and all(isinstance(item, str) for item in found) else value


def _target(value: Any) -> str | list[str]:
    """A text, or a list of several that are all right, of which none is blank."""
    if isinstance(value, str) and bracketed(value):
        value = _python_texts(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        texts = [text for text in value if text.strip()] or [""]
        return texts[0] if len(texts) == 1 else texts
    return _text(value)


def conversation(value: Any, speakers: Mapping[str, str], role: str = "messages") -> str | list[dict[str, Any]]:
    """A text, or messages of role and content from any form that `messages_of` reads; `speakers` maps further names to roles."""
    items = decoded(value)
    if role == "messages" or (isinstance(items, list) and items and all(isinstance(item, Mapping) for item in items)):
        value = items  # an answer may be a text that spells a list
    if isinstance(value, str) and bracketed(value) and value.lstrip()[:2] == "[{":
        raise ValueError(f"holds {shown(value)}, which is neither JSON nor a Python list")
    if isinstance(value, Mapping):
        inner = [value[key] for key in ("messages", "conversations", "turns", "dialogue") if isinstance(value.get(key), list)]
        value = inner[0] if inner else [value]
    return messages_of(value, speakers) if isinstance(value, list) and value else _text(value)


def _label(value: Any) -> str | int | float:
    """A label without outer white space; a whole number is one whether or not it is written as a float."""
    if isinstance(decoded(value), list):
        raise ValueError(f"holds {shown(value)}, not a text or a number: task.kind multilabel reads lists of labels")
    if not isinstance(value, str | int | float):
        raise ValueError(f"holds {shown(value)}, not a text or a number")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().casefold() == "nan":
        raise ValueError(f"holds {value.strip()!r}, which stands for a missing value")
    return value.strip() if isinstance(value, str) else value


def _strings(value: Any) -> list[str]:
    value = decoded(value)
    if not isinstance(value, list) or not all(isinstance(item, str | int | float) for item in value):
        raise ValueError(f"holds {shown(value)}, not a list of texts")
    return [str(item) for item in value]


def _choices(value: Any) -> list[str]:
    """A list of texts, or the `text` of an object of two lists as ARC and CommonsenseQA have it (see `numbered_label`)."""
    value = decoded(value)
    return _strings(value["text"] if isinstance(value, Mapping) and "text" in value else value)


def numbered_label(label: Any, choices: Any) -> Any:
    """The number, from 0, of the choice that a label names by its sign, where choices are {"text": […], "label": ["A", …]}; else
    the label itself."""
    choices = decoded(choices)
    signs = choices.get("label") if isinstance(choices, Mapping) else None
    signs = list(map(str, signs)) if isinstance(signs, list) else []
    return signs.index(str(label)) if str(label) in signs else label


def _tokens(value: Any) -> list[str]:
    tokens = _strings(value)
    if "" in tokens:
        raise ValueError(f"holds an empty one at place {tokens.index('')}")
    return tokens


def _labels(value: Any) -> list[str]:
    """Distinct labels without outer white space, none where the text is empty."""
    if isinstance(value, str) and isinstance(decoded(value), str):
        if bracketed(value) and (value.lstrip()[0] in "[{" or "'" in value or '"' in value):
            raise ValueError(f"holds {shown(value)}, which looks like a list but is none in JSON, Python or NumPy")
        value = value.split("|" if "|" in value else ",")
    names = _strings(value)  # of a list, whose items are to be spelt as single labels are
    items = decoded(value)
    names = [str(_label(item)) for item in items] if isinstance(items, list) else names
    return list(dict.fromkeys(name for item in names if (name := item.strip())))


def _answers(value: Any) -> dict[str, list]:
    """SQuAD's dict of lists, from that, a list of its objects, a list of texts or one text; start -1 where none is given."""
    value = decoded(value)
    if isinstance(value, str) and bracketed(value) and value.lstrip()[0] == "{":
        raise ValueError(f"holds {shown(value)}, which looks like an object but is none in JSON or Python")
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = {key: [item.get(key) for item in value] for key in ("text", "answer_start") if any(key in item for item in value)}
    if not isinstance(value, Mapping):
        value = {"text": value}
    texts = value.get("text")
    texts = [texts] if isinstance(texts, str) else texts
    starts = value.get("answer_start", [-1] * len(texts) if isinstance(texts, list) else None)
    starts = [starts] if isinstance(starts, int) else starts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"holds {shown(texts)}, not texts")
    if not isinstance(starts, list) or len(starts) != len(texts) or not all(isinstance(start, int) for start in starts):
        raise ValueError(f"has the starts {shown(starts)}, not {counted(len(texts), 'whole number')}")
    if not all(text.strip() for text in texts):
        raise ValueError("has an empty text")
    return {"text": list(texts), "answer_start": list(starts)}


def located(answers: dict[str, list], context: str) -> dict[str, list]:
    """The answers with starts that point at them: the given start, else that of the nearest occurrence in the context.

    An answer that came without a start and does not occur keeps -1; one that came with a start must occur.
    """
    starts = []
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if start < 0:
            places = [context.find(text)]
        elif context.startswith(text, start):
            places = [start]
        else:
            around = (context.rfind(text, 0, start + len(text)), context.find(text, start))
            places = [place for place in around if place >= 0]
        if not places:
            raise ValueError("do not all occur in the context")
        starts.append(min((abs(place - start), place) for place in places)[1])
    return {**answers, "answer_start": starts}


def counted(number: int, what: str) -> str:
    """A number and what it counts: 1 row, 1,000 rows."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def shown(value: Any) -> str:
    """The start of a value, for messages."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(["text", "pair", "question", "context", "source"], _text),
    "target": _target,
    "label": _label,
    "labels": _labels,
    "tokens": _tokens,
    "tags": lambda value: [tag.strip() for tag in _strings(value)],
    "choices": _choices,
    "answers": _answers,
    "id": str,
    "group": str,
}
CONVERSATIONS = ("prompt", "chosen", "rejected", "messages")
"""Roles that hold a text or a conversation: see `conversation`."""
MAY_BE_EMPTY = ("labels", "answers")
"""Roles whose emptiness says something: no label holds, no answer exists."""
