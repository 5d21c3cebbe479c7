"""What a text must match, as OpenAI's `response_format` and vLLM's `guided_…` fields say it."""

import json
from typing import Any

from jaxlm.config import unknown
from jaxlm.data import Tokenizer
from jaxlm.generate import Constraint, Grammar
from jaxlm.serve.fields import Fields, bad

CHOICES = 256
_FIELDS = ("response_format", "guided_json", "guided_regex", "guided_choice")


class Guided:
    """The constraint of a request, of which each of its texts has a state of its own. ApiError for what cannot be followed."""

    def __init__(self, fields: Fields, tokenizer: Tokenizer, stop: frozenset[int]):
        self._tokenizer, self._stop = tokenizer, stop
        given = {name: found for name in _FIELDS if (found := _read(fields, name)) is not None}
        if len(given) > 1:
            raise bad(f"{' and '.join(given)} are given: a text follows one of them", list(given)[1])
        self._name = next(iter(given), "")
        self._constraint = given.get(self._name)

    def text(self) -> Grammar | None:
        """Of one more text; None where it is free."""
        if self._constraint is None:
            return None
        try:
            return Grammar(self._tokenizer, self._constraint, self._stop)
        except ValueError as error:
            raise bad(str(error), self._name) from None


def _read(fields: Fields, name: str) -> Constraint | None:
    value = fields.get(name)
    if value is None:
        return None
    try:
        if name == "guided_regex":
            return Constraint(regex=fields.text(name))
        if name == "guided_choice":
            return Constraint(choices=_choices(value))
        if name == "guided_json":
            return Constraint(json_schema=_schema(value, name))
        return _format(value)
    except ValueError as error:
        raise bad(str(error), name) from None


def _format(value: Any) -> Constraint | None:
    kinds = ["text", "json_object", "json_schema"]
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in kinds:
        raise unknown("response_format type", str(kind)[:60], kinds)
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint(json_schema='{"type": "object"}')
    described = value.get("json_schema")
    return Constraint(json_schema=_schema(described.get("schema") if isinstance(described, dict) else None, "json_schema.schema"))


def _schema(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict | bool):
        raise ValueError(f"{name} must be a JSON schema, an object")
    return json.dumps(value)


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > CHOICES or not all(isinstance(choice, str) for choice in value):
        raise ValueError(f"guided_choice must be a list of up to {CHOICES} texts")
    return tuple(value)
