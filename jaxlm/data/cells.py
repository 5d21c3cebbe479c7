"""Lists and objects that are written as text in the cell of a table."""

import ast
import io
import re
import tokenize
from typing import Any

from jaxlm.text_files import parse_json

_BRACKETS = ("[]", "{}", "()")
_ARRAY = re.compile(r"\barray\((\[[^\[\]]*\])(?:,\s*dtype=[^()]*)?\)")
_SCALAR = re.compile(r"\bnp\.\w+\(([^()]*)\)")


def bracketed(text: str) -> bool:
    """Whether a text begins and ends like a list or an object."""
    text = text.strip()
    return len(text) > 1 and text[0] + text[-1] in _BRACKETS


def decoded(value: Any) -> Any:
    """The list or object that a cell spells in JSON, Python or NumPy (pandas writes the latter two); any other value as it is."""
    if not isinstance(value, str) or not bracketed(value):
        return value
    try:
        found = parse_json(value)
    except (ValueError, RecursionError):
        found = python_value(value)
    return found if isinstance(found, list | dict) else value


def python_value(text: str) -> Any:
    """The value of a Python literal, tuples and sets as lists; NumPy's arrays, with spaces between items, too. None where it is no
    such literal."""
    text = _SCALAR.sub(r"\1", _ARRAY.sub(r"\1", text))
    try:
        return _plain(ast.literal_eval(_with_commas(text)))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return None


def _with_commas(text: str) -> str:
    """The text with a comma between neighbouring items: NumPy prints arrays without, and Python would join `'x' 'y'` to `'xy'`."""
    kept: list[str] = []
    ended = False
    for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
        if token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT):
            continue
        item = token.type in (tokenize.STRING, tokenize.NUMBER) or token.string in ("True", "False", "None")
        if ended and (item or token.string in ("[", "{")):
            kept.append(",")
        kept.append(token.string)
        ended = item or token.string in ("]", "}")
    return " ".join(kept)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(map(_plain, value), key=str)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
