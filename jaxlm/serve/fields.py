"""The fields of a request's JSON object, each read as what it should be or refused with one line."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.serve.errors import ApiError


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


class Fields:
    """A request's fields; one that is null counts as left out. `protocol.check_fields` says which may be there at all."""

    def __init__(self, body: Mapping[str, Any]):
        self._body = body

    def get(self, name: str) -> Any:
        return self._body.get(name)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise bad(f"{name} is {_shown(value)}: it must be a number from {least:g} to {most:g}", name)
        return float(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        """None where it is left out."""
        value = self.get(name)
        if value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value <= most or value != int(value):
            raise bad(f"{name} is {_shown(value)}: it must be a whole number from {least} to {most}", name)
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise bad(f"{name} is {_shown(value)}: it must be true or false", name)
        return default if value is None else value

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise bad(f"{name} is {_shown(value)}: it must be a text", name)
        return value

    def texts(self, name: str, most: int, longest: int | None = None) -> tuple[str, ...]:
        """A text or a list of up to `most`, each of up to `longest` characters; none may be empty."""
        value = self.get(name)
        value = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(value, list) or len(value) > most or not all(isinstance(text, str) and text for text in value):
            raise bad(f"{name} must be a text or a list of up to {most}, none of them empty", name)
        if longest is not None and any(len(text) > longest for text in value):
            raise bad(f"{name} holds a text of more than {longest:,} characters", name)
        return tuple(value)

    def ids(self, name: str, vocab_size: int, most: int | None = None) -> tuple[int, ...] | None:
        """A list of token ids; None where it is left out."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(map(_is_id, value)):
            raise bad(f"{name} must be a list of token ids", name)
        if most is not None and len(value) > most:
            raise bad(f"{name} holds {len(value)} token ids: at most {most} may be", name)
        check_ids(value, vocab_size, name)
        return tuple(dict.fromkeys(value))


def texts_or_ids(value: Any, name: str, most: int) -> list[str] | list[list[int]]:
    """What OpenAI takes as prompts and inputs: a text, a list of texts, a list of token ids, a list of such lists."""
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and value and all(_is_id(item) for item in items):
        return [items]
    if not items:
        raise bad(f"{name} is an empty list", name)
    if len(items) > most:
        raise bad(f"{name} holds {len(items)} texts: at most {most} in one request", name)
    if all(isinstance(item, str) for item in items):
        return items
    if all(isinstance(item, list) and all(map(_is_id, item)) for item in items):
        return items
    raise bad(f"{name} must be a text, a list of texts, a list of token ids, or a list of such lists", name)


def check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    for i in ids:
        if not 0 <= i < vocab_size:
            raise bad(f"{name} holds token {_shown(i)}: the vocabulary has ids from 0 to {vocab_size - 1}", name)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value as it may be told: short, and without trying to spell a number of a million digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return "a number of more than 64 bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
