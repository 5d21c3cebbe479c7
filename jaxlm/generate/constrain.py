"""Texts that match a regular expression, a JSON schema, a grammar or a list of choices: which tokens may come next.

The matching is llguidance's (the `constrain` extra). It runs on the host, between two tokens: a constrained token costs a
look at the device and a mask sent there.

Letters: V the tokenizer's tokens.
"""

import dataclasses
import functools
import json
from collections.abc import Collection
from typing import Any

import numpy as np

from jaxlm.data.tokenizer import Characters, Tokenizer
from jaxlm.generate.deep_stack import on_deep_stack

LIMITS = {
    "max_items_in_row": 2000, "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000,
    "max_lexer_states": 100_000, "max_grammar_size": 500_000, "verbose_errors": False,
}  # fmt: skip
"""Limits for llguidance, in its own units: about 1 s to compile a grammar and 20 ms per token."""
LENGTH = {"regex": 1 << 16, "grammar": 1 << 15, "json_schema": 1 << 18, "choices": 1 << 18, "whitespace": 1 << 10}
"""Maximum length of a constraint's source, in characters. The time to compile a regular expression grows with the square of its
length: about 15 s at this one. The `pattern`s of a JSON schema may together be as long as one."""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a text must match from its first to its last character: one of regex, json_schema, grammar and choices."""

    regex: str | None = None
    """In the syntax of Rust's `regex`, without look-around and back references."""
    json_schema: str | None = None
    """The text of a JSON schema. What matches is written compactly, so that no model loses itself in blanks."""
    choices: tuple[str, ...] | None = None
    grammar: str | None = None
    """A context-free grammar: in the Lark syntax of llguidance, or in GBNF as llama.cpp reads it."""
    whitespace: str | None = None
    """Of json_schema: a regular expression for the white space between JSON's tokens; None: none."""

    def __post_init__(self) -> None:
        kinds = ("regex", "json_schema", "choices", "grammar")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a constraint is a grammar or one of regex, json_schema and choices, not {' and '.join(given) or 'none'}"
            )
        for name in (*kinds, "whitespace"):
            size = len((self.choices and "".join(self.choices)) or "") if name == "choices" else len(getattr(self, name) or "")
            if size > LENGTH[name]:
                raise ValueError(f"{name} has {size:,} characters: at most {LENGTH[name]:,} may be")
        if self.whitespace is not None and self.json_schema is None:
            raise ValueError("whitespace is for a json_schema alone")
        if self.choices is not None and not (self.choices and all(self.choices)):
            raise ValueError(f"choices are {list(self.choices)}: there must be at least one, and none may be empty")
        if self.json_schema is not None:
            try:
                size = _pattern_size(json.loads(self.json_schema))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"json_schema is no JSON: {error}") from None
            if size > LENGTH["regex"]:
                raise ValueError(f"the patterns of json_schema have {size:,} characters: at most {LENGTH['regex']:,} may be")


def _pattern_size(schema: Any) -> int:
    """Characters of all regular expressions in a JSON schema."""
    if isinstance(schema, list):
        return sum(map(_pattern_size, schema))
    if not isinstance(schema, dict):
        return 0
    size = sum(map(_pattern_size, schema.values()))
    size += len(pattern) if isinstance(pattern := schema.get("pattern"), str) else 0
    return size + (sum(map(len, patterns)) if isinstance(patterns := schema.get("patternProperties"), dict) else 0)


class Grammar:
    """The state of one text: `mask`, draw a token among those, `take` it, until `ended`.

    Of a Hugging Face tokenizer it needs the bytes of each token, so byte-level ones and those with byte tokens. The end of
    text, and every other token of `stop`, may come where the text matches, one that stands for text also where the constraint
    has it. Raises ValueError where the constraint or the
    tokenizer is none that llguidance can use.
    """

    def __init__(self, tokenizer: Tokenizer, constraint: Constraint, stop: Collection[int] = ()):
        library = _llguidance()
        self._tokenizer, self._stop = tokenizer, np.array(sorted({tokenizer.eos_id, *stop}))
        known = _known(tokenizer)

        def compile_() -> tuple[str, Any]:
            name, grammar = _source(library, constraint)
            return name, library.LLMatcher(known, grammar, log_level=0, limits=library.LLParserLimits(**LIMITS))

        try:
            name, self._matcher = on_deep_stack(compile_)
        except Exception as error:  # of Python's part of the library, for a source that it cannot read
            raise ValueError(f"the constraint cannot be used: {_line(error)}") from None
        if self._matcher.is_error():
            raise ValueError(f"{name} cannot be used: {_line(self._matcher.get_error())}")

    def copy(self) -> "Grammar":
        """The state of another text, as far as this one is: cheaper than compiling the constraint again."""
        made: Grammar = object.__new__(Grammar)
        made._tokenizer, made._stop, made._matcher = self._tokenizer, self._stop, self._matcher.deep_copy()
        return made

    @property
    def ended(self) -> bool:
        """Whether the text matches and nothing may follow."""
        return self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """(V,) True for each token that may come next, of which there is at least one. Raises ValueError where the tokenizer
        has none: it lacks a character that must follow."""
        assert not self.ended, "nothing may follow"
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed_V = np.unpackbits(bits, count=self._tokenizer.vocab_size, bitorder="little").astype(bool)
        if isinstance(self._tokenizer, Characters):
            allowed_V[self._tokenizer.unknown_id] = False  # where a character has no token, this is how it is encoded
        allowed_V[self._stop] |= allowed_V[self._tokenizer.eos_id]
        if not allowed_V.any():
            raise ValueError("the constraint cannot be followed: the tokenizer has no token for what must come next")
        return allowed_V

    def take(self, token: int) -> None:
        """The next token of the text."""
        ends = token in self._stop and self._matcher.is_accepting()
        self._matcher.consume_token(self._tokenizer.eos_id if ends else int(token))
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the constraint cannot be followed: {_line(self._matcher.get_error())}")


def _source(library: Any, constraint: Constraint) -> tuple[str, str]:
    """What a constraint is called in an error, and its grammar in llguidance's form."""
    matcher = library.LLMatcher
    if constraint.regex is not None:
        return f"regex {constraint.regex!r:.60}", matcher.grammar_from_regex(constraint.regex)
    if constraint.json_schema is not None:
        options = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
        if constraint.whitespace is not None:
            options = {"whitespace_pattern": constraint.whitespace}
        return "json_schema", matcher.grammar_from_json_schema(constraint.json_schema, defaults=options)
    if constraint.grammar is not None:
        return "grammar", library.grammar_from("grammar", constraint.grammar)
    assert constraint.choices is not None, "Constraint holds one of the four"
    return "choices", matcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in constraint.choices))


def prepare(tokenizer: Tokenizer) -> None:
    """Build what every constraint over a tokenizer needs, seconds of work for a large one. ValueError as of `Grammar`."""
    _known(tokenizer)


@functools.lru_cache(maxsize=8)
def _known(tokenizer: Tokenizer) -> Any:
    """The tokenizer as llguidance knows it: a tree of its tokens' bytes, which takes a moment to build."""
    library = _llguidance()
    if isinstance(tokenizer, Characters):
        source = library.TokenizerWrapper(_Spelt(tokenizer))
    else:
        source = tokenizer.definition()
    try:
        return library.LLTokenizer(source, n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eos_id)
    except ValueError as error:
        raise ValueError(f"texts of a tokenizer of kind {tokenizer.kind!r} cannot be constrained: {_line(error)}") from None


class _Spelt:
    """Single characters in the words of llguidance, which knows tokens that are bytes."""

    def __init__(self, tokenizer: Characters):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        rest = tokenizer.vocab_size - len(tokenizer.characters)
        self.tokens = [text.encode() for text in tokenizer.characters] + [b"\xff<special>"] * rest
        self.special_token_ids = list(range(len(tokenizer.characters), tokenizer.vocab_size))

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).tolist()


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError("constrained texts need llguidance: pip install 'jaxlm[constrain]'") from None
    return llguidance


def _line(error: object) -> str:
    """What llguidance says is wrong: a line that says `error:` where there is one, else the first."""
    lines = str(error).strip().splitlines()
    return next((line for line in lines if line.startswith("error:")), lines[0]).removeprefix("error:").strip()[:200]
