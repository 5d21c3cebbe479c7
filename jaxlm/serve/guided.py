"""What a text must match, as OpenAI's `response_format` and vLLM's `guided_…` fields say it."""

import json
from collections.abc import Sequence
from typing import Any

from jaxlm.config import unknown
from jaxlm.data import Tokenizer
from jaxlm.generate import Constraint, Grammar
from jaxlm.serve.fields import Fields, bad

CHOICES = 256
_OLDER = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
"""vLLM's older fields, and their names within `structured_outputs`."""
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_NEUTRAL = {"disable_fallback": (True, False), "disable_any_whitespace": (True, False),
            "disable_additional_properties": (False,)}  # fmt: skip
"""Options of `structured_outputs` that say nothing here: JSON is written without white space, by one library."""


class Guided:
    """The constraint of a request, of which each of its texts has a state of its own. ApiError for what cannot be followed."""

    def __init__(self, fields: Fields, tokenizer: Tokenizer, stop: frozenset[int]):
        given = {name: found for name in (*_OLDER, "response_format", "structured_outputs") if (found := _read(fields, name))}
        if len(given) > 1:
            raise bad(f"{' and '.join(given)} are given: a text follows one of them", list(given)[1])
        if fields.get("guided_whitespace_pattern") and not any(constraint.json_schema for constraint in given.values()):
            raise bad("guided_whitespace_pattern needs a JSON schema that the text follows", "guided_whitespace_pattern")
        self._grammar: Grammar | None = None
        for name, constraint in given.items():
            try:
                self._grammar = Grammar(tokenizer, constraint, stop)
            except ValueError as error:
                raise bad(str(error), name) from None

    def text(self) -> Grammar | None:
        """Of one more text; None where it is free."""
        return None if self._grammar is None else self._grammar.copy()


def _read(fields: Fields, name: str) -> Constraint | None:
    value = fields.get(name)
    if value is None:
        return None
    white_space = fields.text("guided_whitespace_pattern")
    try:
        if name == "response_format":
            return _format(value, white_space)
        if name == "structured_outputs":
            return _structured(value, white_space)
        return _constraint(_OLDER[name], value, name, white_space)
    except ValueError as error:
        raise bad(str(error), name) from None


def _constraint(kind: str, value: Any, name: str, white_space: str | None = None) -> Constraint:
    if kind == "json":
        return Constraint(json_schema=_schema(value, name), whitespace=white_space)
    if kind == "choice":
        return Constraint(choices=_choices(value, name))
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text")
    return Constraint(regex=value) if kind == "regex" else Constraint(grammar=value)


def _structured(value: Any, white_space: str | None) -> Constraint | None:
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar and json_object, with options."""
    if not isinstance(value, dict):
        raise ValueError('structured_outputs must be an object such as {"regex": "[a-z]+"}')
    given = {name: option for name, option in value.items() if option is not None}
    for name, option in given.items():
        if name not in (*_KINDS, "whitespace_pattern", *_NEUTRAL):
            raise unknown("field of structured_outputs", name[:60], [*_KINDS, "whitespace_pattern"])
        if name in _NEUTRAL and option not in _NEUTRAL[name]:
            raise ValueError(f"structured_outputs.{name} is not supported")
    if not isinstance(given.get("json_object", True), bool):
        raise ValueError("structured_outputs.json_object must be true or false")
    kinds = [name for name in _KINDS if name in given and given[name] is not False]
    if len(kinds) != 1:
        raise ValueError(f"structured_outputs must hold one of {', '.join(_KINDS)}, not {' and '.join(kinds) or 'none'}")
    own = given.get("whitespace_pattern", white_space)
    if own is not None and not isinstance(own, str):
        raise ValueError("structured_outputs.whitespace_pattern must be a text")
    if kinds == ["json_object"]:
        return _any_object(own)
    return _constraint(kinds[0], given[kinds[0]], f"structured_outputs.{kinds[0]}", own)


def _any_object(white_space: str | None) -> Constraint:
    return Constraint(json_schema='{"type": "object"}', whitespace=white_space)


def _format(value: Any, white_space: str | None) -> Constraint | None:
    kinds = ["text", "json_object", "json_schema"]
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in kinds:
        raise unknown("response_format type", str(kind)[:60], kinds)
    described = value.get("json_schema")
    _only("response_format", value, ("type", "json_schema"))
    if isinstance(described, dict):
        _only("response_format.json_schema", described, ("name", "description", "schema", "strict"))
    if kind == "text":
        return None
    if kind == "json_object":
        return _any_object(white_space)
    schema = _schema(described.get("schema") if isinstance(described, dict) else None, "json_schema.schema")
    return Constraint(json_schema=schema, whitespace=white_space)


def _only(name: str, value: dict[str, Any], fields: Sequence[str]) -> None:
    """Reject fields of a nested object that are not supported."""
    for field, inner in value.items():
        if field not in fields and inner is not None:
            raise unknown(f"field of {name}", field[:60], fields)


def _schema(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict | bool):
        raise ValueError(f"{name} must be a JSON schema, an object")
    return json.dumps(value)


def _choices(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > CHOICES or not all(isinstance(choice, str) for choice in value):
        raise ValueError(f"{name} must be a list of up to {CHOICES} texts")
    return tuple(value)
