"""The values that roles take (text, label, answers, …), read from whatever a column holds.

Each function returns the value or raises ValueError with why there is none, to be read after the role: "holds 3, not a text".
"""

import json
from collections.abc import Callable, Mapping
from typing import Any


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if not isinstance(value, str):
        raise ValueError(f"holds {shown(value)}, not a text")
    return value


def _conversation(value: Any) -> str | list[dict[str, Any]]:
    if not isinstance(value, list):
        return _text(value)
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"holds {shown(message)}, not a message: an object with role and content")
    return [dict(message) for message in value]


def _label(value: Any) -> str | int | float:
    if not isinstance(value, str | int | float):
        raise ValueError(f"holds {shown(value)}, not a text or a number")
    return value


def _strings(value: Any) -> list[str]:
    value = _decoded(value)
    if not isinstance(value, list) or not all(isinstance(item, str | int | float) for item in value):
        raise ValueError(f"holds {shown(value)}, not a list of texts")
    return [str(item) for item in value]


def _tokens(value: Any) -> list[str]:
    tokens = _strings(value)
    if "" in tokens:
        raise ValueError(f"holds an empty one at place {tokens.index('')}")
    return tokens


def _labels(value: Any) -> list[str]:
    """Distinct labels, none where the text is empty."""
    if isinstance(value, str) and not isinstance(_decoded(value), list):
        parts = value.split("|" if "|" in value else ",")
        value = [part.strip() for part in parts if part.strip()]
    return list(dict.fromkeys(_strings(value)))


def _answers(value: Any) -> dict[str, list]:
    """SQuAD's dict of lists, from that, a list of its objects, a list of texts or one text; start -1 where none is given."""
    value = _decoded(value)
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


def _decoded(value: Any) -> Any:
    """A list or an object that stands as JSON in the cell of a table."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def counted(number: int, what: str) -> str:
    """A number and what it counts: 1 row, 1,000 rows."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def shown(value: Any) -> str:
    """The start of a value, for messages."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(["text", "pair", "question", "context", "source", "target"], _text),
    **dict.fromkeys(["prompt", "chosen", "rejected"], _conversation),
    "messages": lambda value: _conversation(_decoded(value)),
    "label": _label,
    "labels": _labels,
    "tokens": _tokens,
    "tags": _strings,
    "choices": _strings,
    "answers": _answers,
    "id": str,
    "group": str,
}
MAY_BE_EMPTY = ("labels", "answers")
"""Roles whose emptiness says something: no label holds, no answer exists."""
