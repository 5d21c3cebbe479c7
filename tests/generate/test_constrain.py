"""Constrained texts: whatever the model and the seed, what comes out matches."""

import contextlib
import json
import re

import jax
import numpy as np
import pytest

from jaxlm.data.tokenizer import Bytes, Characters, Rust, TokenizerConfig, load_tokenizer, train_tokenizer
from jaxlm.generate import Constraint, Generator, Grammar, SampleConfig, constrain
from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-f é]{1,6}$"},
        "age": {"type": "integer", "minimum": -5, "maximum": 120},
        "kind": {"enum": ["x", "yz", None]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
REGEX, CHOICES = r"[a-c]{2,5}-[0-9]{1,4}(é|, and so)?", ("yes", "yes, but", 'no "é"\n', "perhaps")
WORDS = ['{"name": "fed é", "age": 12, "kind": null, "flags": [true, false]} abc-123, and so on; yes, but no. '] * 40


def gpt2_like(tmp_path):
    """A byte-level Hugging Face tokenizer, through its folder."""
    train_tokenizer(TokenizerConfig("bpe", 300), WORDS).save(tmp_path)
    (tmp_path / "jaxlm_tokenizer.json").unlink()
    return load_tokenizer(tmp_path)


TOKENIZERS = {
    "bytes": lambda _: Bytes(special=("pad", "mask")),
    "characters": lambda _: Characters("".join(WORDS) + json.dumps(SCHEMA) + REGEX + "".join(CHOICES) + "0123456789", ("pad",)),
    "bpe": lambda _: train_tokenizer(TokenizerConfig("bpe", 300, special=("pad",)), WORDS),
    "huggingface": gpt2_like,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory):
    return TOKENIZERS[request.param](tmp_path_factory.mktemp("tokenizer"))


def matches(constraint: Constraint, text: str) -> bool:
    if constraint.regex is not None:
        return re.fullmatch(constraint.regex, text) is not None
    if constraint.choices is not None:
        return text in constraint.choices
    found = json.loads(text)
    assert list(found) == [name for name in SCHEMA["properties"] if name in found] and {"name", "kind"} <= set(found)
    assert re.fullmatch("[a-f é]{1,6}", found["name"]) and found["kind"] in ("x", "yz", None)
    assert found.get("age", 0) in range(-5, 121) and all(flag in (True, False) for flag in found.get("flags", []))
    with contextlib.suppress(ImportError):  # not in the `test` extra
        import jsonschema

        jsonschema.validate(found, SCHEMA)
    return True


CONSTRAINTS = [Constraint(regex=REGEX), Constraint(json_schema=json.dumps(SCHEMA)), Constraint(choices=CHOICES)]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=["regex", "json_schema", "choices"])
def test_every_walk_along_the_mask_matches(tokenizer, constraint):
    """30 random walks over all tokens that are allowed; where the end of text is, the text so far matches, and elsewhere it
    must not yet have matched."""
    texts, stop = set(), {tokenizer.eos_id, tokenizer.special.get("pad", tokenizer.eos_id)}
    for seed in range(30):
        rng, grammar, ids = np.random.default_rng(seed), Grammar(tokenizer, constraint, stop), []
        while not grammar.ended:
            allowed = grammar.mask()
            if constraint.json_schema is None:
                assert allowed[tokenizer.eos_id] == matches(constraint, tokenizer.decode(ids))
            token = int(rng.choice(np.flatnonzero(allowed)))
            grammar.take(token)
            ids += [token] * (token not in stop)
            assert len(ids) < 200
        assert matches(constraint, tokenizer.decode(ids))
        texts.add(tokenizer.decode(ids))
    assert len(texts) > 2


def test_what_a_random_model_writes_matches(tokenizer):
    """At any temperature, with filters and penalties beside; one program for all constraints."""
    config = TransformerConfig(vocab_size=384, positions=256, layers=1, width=16, heads=2, position="rotary", init_std=1.0)
    model = Model(config)
    params = model.init(jax.random.key(0))
    generator = Generator(model, make_mesh(ParallelConfig(), jax.devices()[:1]), tokenizer.vocab_size)
    texts = set()
    for seed, constraint in enumerate(CONSTRAINTS * 2):
        sampling = SampleConfig(1.5 * (seed % 3), top_p=0.9, presence_penalty=0.5)
        grammar = Grammar(tokenizer, constraint)
        ids = list(generator.stream(params, [5, 7], 200, sampling, seed=seed, stop={tokenizer.eos_id}, grammar=grammar))
        assert len(ids) < 200 and matches(constraint, tokenizer.decode(ids))
        texts.add(tokenizer.decode(ids))
    assert len(texts) > 3 and generator.decode._cache_size() == 1


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({}, "one of regex, json_schema and choices, not none"),
        ({"regex": "a", "choices": ("b",)}, "not regex and choices"),
        ({"choices": ()}, "there must be at least one"),
        ({"choices": ("a", "")}, "none may be empty"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"regex": "a?" * 40_000}, "regex has 80,000 characters: at most 65,536"),
        ({"json_schema": json.dumps({"items": [{"pattern": "a?" * 40_000}]})}, "patterns of json_schema have 80,000 characters"),
        ({"grammar": "?"}, "cannot be used"),
        ({"regex": "a", "whitespace": " "}, "for a json_schema alone"),
        ({"regex": "(a"}, r"regex '\(a' cannot be used: unclosed group"),
        ({"regex": r"(a)\1"}, "cannot be used: backreferences are not supported"),
        ({"json_schema": '{"type": "objec"}'}, "json_schema cannot be used: .*objec"),
        ({"json_schema": '{"type": "string", "minLength": 3, "maxLength": 2}'}, "json_schema cannot be used: .*Unsatisfiable"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_a_line(wrong, says):
    with pytest.raises(ValueError, match=says) as told:
        Grammar(Bytes(), Constraint(**wrong))
    assert "\n" not in str(told.value)


def test_a_grammar_has_limits(monkeypatch):
    """Compiling stops at the limit, and so does following: what is left is an error, not a thread that is busy for long."""
    words = Constraint(regex="|".join(f"word{i}" for i in range(5000)))
    Grammar(Bytes(), words)
    with monkeypatch.context() as patch:
        patch.setitem(constrain.LIMITS, "initial_lexer_fuel", 1000)
        with pytest.raises(ValueError, match=r"cannot be used: .*too big"):
            Grammar(Bytes(), words)
    ambiguous = Constraint(grammar='start: ( "a" start | start "b" | "c" start start | /[a-z]+[0-9]{3,9}[xyz]*/ )*')
    for limit in ("step_lexer_fuel", "step_max_items", "max_lexer_states", "max_items_in_row"):
        with monkeypatch.context() as patch:
            patch.setitem(constrain.LIMITS, limit, 1)
            with pytest.raises(ValueError, match="cannot be followed"):
                follow(Grammar(Bytes(), ambiguous), b"abcde")
    follow(Grammar(Bytes(), ambiguous), b"abcde")


def follow(grammar, text):
    for character in text:
        assert grammar.mask()[character]
        grammar.take(character)


@pytest.mark.parametrize("grammar", ['root ::= "a" [bc]+ "d"', 'start: "a" /[bc]+/ "d"'], ids=["gbnf", "lark"])
def test_grammars(grammar):
    """In both syntaxes; a copy goes its own way from where it was taken."""
    texts = set()
    first = Grammar(Bytes(), Constraint(grammar=grammar))
    first.take(ord("a"))
    for seed in range(5):
        rng, one, text = np.random.default_rng(seed), first.copy(), "a"
        while not one.ended:
            token = int(rng.choice(np.flatnonzero(one.mask())))
            one.take(token)
            text += chr(token) if token < 256 else ""
        texts.add(text)
    assert len(texts) > 1 and all(re.fullmatch("a[bc]+d", text) for text in texts)


def test_white_space_between_json_tokens():
    grammar = Grammar(Bytes(), Constraint(json_schema='{"type": "array", "items": {"type": "integer"}}', whitespace=" ?"))
    for character in b"[ 1 , 2 ]":
        assert grammar.mask()[character]
        grammar.take(character)
    assert grammar.ended


def test_a_character_that_the_tokenizer_lacks_is_told():
    grammar = Grammar(Characters("ab"), Constraint(regex="ac"))
    grammar.take(0)
    with pytest.raises(ValueError, match="no token for what must come next"):
        grammar.mask()


def test_a_constraint_may_be_nested_deeply():
    """A chain of references and one of rules; on a stack of the usual size they end the process."""
    chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)}
    schema = {"$defs": {**chain, "a5000": {"const": "x"}}, "$ref": "#/$defs/a0"}
    rules = "start: r0\n" + "\n".join(f'r{i}: r{i + 1} "b"' for i in range(1800)) + '\nr1800: "a"'
    for constraint, first in ((Constraint(json_schema=json.dumps(schema)), '"'), (Constraint(grammar=rules), "a")):
        grammar = Grammar(Bytes(), constraint).copy()
        assert np.flatnonzero(grammar.mask()).tolist() == [ord(first)]


def test_a_stop_token_may_also_be_part_of_the_text():
    """Where the constraint has it; one that stands for no text, where the text matches alone."""
    tokenizer = Bytes(special=("pad",))
    (a, b), pad = tokenizer.encode("ab").tolist(), tokenizer.special["pad"]
    grammar = Grammar(tokenizer, Constraint(regex="ab"), stop=(a, pad))
    assert np.flatnonzero(grammar.mask()).tolist() == [a]
    grammar.take(a)
    assert np.flatnonzero(grammar.mask()).tolist() == [b]
    grammar.take(b)
    assert grammar.ended or grammar.mask()[pad]


def test_tokens_out_of_place_are_refused():
    grammar = Grammar(Bytes(), Constraint(choices=("ab",)))
    with pytest.raises(ValueError, match="cannot be followed"):
        grammar.take(ord("b"))


def test_a_tokenizer_without_bytes_is_refused():
    import tokenizers

    rust = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "[SEP]": 3}, unk_token="[UNK]"))
    rust.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match="cannot be constrained"):
        Grammar(Rust(rust, "huggingface", 3, 3), Constraint(regex="a"))
