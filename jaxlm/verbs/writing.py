"""jaxlm generate."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Sequence

from jaxlm import config as configs
from jaxlm.text_files import read_text
from jaxlm.verbs.batches import generate_file
from jaxlm.verbs.words import split_words


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """The flags of `jaxlm generate`."""

    prompt: str = ""
    """What the text begins with; empty: a new text."""
    max_tokens: int = 200
    """Most tokens to write."""
    temperature: float = 0.8
    """Divides the logits; 0: always the most likely token."""
    top_k: int | None = None
    """Draw among this many most likely tokens."""
    top_p: float | None = None
    """Draw among the fewest tokens that hold this probability."""
    min_p: float | None = None
    """Draw among tokens at least this share as likely as the likeliest."""
    typical_p: float | None = None
    """Draw among the tokens whose surprise is nearest to the expected one, until they hold this probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that were seen, and multiplies negative ones; 1: none."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that were written."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit each time that it was written."""
    penalty_alpha: float | None = None
    """Contrastive search: of the `top_k` likeliest tokens that with the largest (1 − penalty_alpha) · its probability −
    penalty_alpha · its likeness to the text so far. Nothing is drawn, and the text comes at once."""
    seed: int = 0
    """The same seed gives the same text."""
    draft: str | None = None
    """A smaller MODEL of the same tokenizer that guesses tokens, which the model checks all at once: sooner the same."""
    draft_tokens: int = 4
    """Tokens that `draft` guesses each time."""
    lookup: int | None = None
    """Tokens to guess each time by looking up what came after the same words before; for texts that repeat their prompt."""
    regex: str | None = None
    """The text must match this regular expression. Each token then waits for the one before it."""
    json_schema: str | None = None
    """File with a JSON schema that the text must match. Each token then waits for the one before it."""
    file: str | None = None
    """Many prompts instead: JSON lines with "prompt" or "messages", or a text a line (.txt)."""
    out: str | None = None
    """File of JSON lines to write their answers to; those that it holds are kept, so the same command goes on with it."""

    def __post_init__(self) -> None:
        if (self.file is None) != (self.out is None):
            raise ValueError("--file and --out belong together: prompts are read from one, answers written to the other")
        if self.file is not None and self.prompt:
            raise ValueError("give a prompt or a file of them, not both")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: it must be at least 1")
        for first, second in (("draft", "lookup"), ("regex", "json_schema")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise ValueError(f"{first} and {second} are both given: one of them is enough")
        if self.guesses and (self.regex or self.json_schema):
            raise ValueError("draft and lookup guess several tokens at once, which regex and json_schema do not allow")
        if self.file is not None and (self.guesses or self.regex or self.json_schema):
            raise ValueError("many prompts of a file are answered together, without draft, lookup, regex and json_schema")
        if self.penalty_alpha is not None:
            if self.top_k is None:
                raise ValueError("penalty_alpha needs top_k: the number of likeliest tokens to choose among, say --top-k 4")
            own = {"prompt", "max_tokens", "top_k", "penalty_alpha"}
            others = [f.name for f in dataclasses.fields(self) if f.name not in own and getattr(self, f.name) != f.default]
            if others:
                raise ValueError(
                    f"penalty_alpha draws nothing and goes with top_k and max_tokens alone: leave off {', '.join(others)}"
                )
        for name in ("draft_tokens", "lookup"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")

    @property
    def guesses(self) -> bool:
        return self.draft is not None or self.lookup is not None


def generate(words: Sequence[str]) -> int:
    """jaxlm generate MODEL [--prompt TEXT] [--max-tokens N] [--temperature T] [--top-k K] [--top-p P] [--seed S] …: write text;
    with --file FILE --out FILE for many prompts."""
    (argument,), flags = split_words(words, "MODEL")
    options = configs.load(GenerateOptions, None, flags).value
    from jaxlm.data import StreamDecoder
    from jaxlm.generate import (
        Constraint,
        ContrastiveConfig,
        ContrastiveGenerator,
        Generator,
        Grammar,
        SampleConfig,
        Speculator,
        Stats,
    )
    from jaxlm.models import load_model

    sampling = SampleConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(SampleConfig)})
    contrast = None
    if options.penalty_alpha is not None and options.top_k is not None:
        contrast = ContrastiveConfig(options.top_k, options.penalty_alpha, options.max_tokens)
    constraint = None
    if options.regex is not None:
        constraint = Constraint(regex=options.regex)
    elif options.json_schema is not None:
        constraint = Constraint(json_schema=_read(options.json_schema))
    if options.file is not None and options.out is not None:
        return generate_file(argument, options.file, options.out, sampling, options.max_tokens, options.seed)
    trained = load_model(argument).for_writing()
    tokenizer, model, mesh = trained.tokenizer, trained.model, trained.mesh
    prompt = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
    stop, stats = {tokenizer.eos_id, *trained.stop_ids()}, Stats()
    tokens: Iterable[int]
    asked = (trained.params, prompt, options.max_tokens, sampling)
    if options.draft is not None:
        small = load_model(options.draft, mesh).for_writing()
        if small.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(f"draft {options.draft!r} has another tokenizer than {argument!r}: it cannot guess its tokens")
        speculator = Speculator(model, mesh, tokenizer.vocab_size, options.draft_tokens, small.model)
        tokens = speculator.stream(*asked, draft_params=small.params, seed=options.seed, stop=stop, stats=stats)
    elif options.lookup is not None:
        speculator = Speculator(model, mesh, tokenizer.vocab_size, options.lookup)
        tokens = speculator.stream(*asked, seed=options.seed, stop=stop, stats=stats)
    elif contrast is not None:
        (tokens,) = ContrastiveGenerator(model, mesh, tokenizer.vocab_size)(trained.params, [prompt], contrast, stop)
    else:
        grammar = None if constraint is None else Grammar(tokenizer, constraint, stop)
        generator = Generator(model, mesh, tokenizer.vocab_size)
        tokens = generator.stream(*asked, seed=options.seed, stop=stop, grammar=grammar)
    decoder, write = StreamDecoder(tokenizer, prompt), sys.stdout.write
    write(options.prompt)
    for token in tokens:
        write(decoder.push(token))
        sys.stdout.flush()
    write(decoder.flush() + "\n")
    if options.guesses:
        print(f"{stats.accepted} of {stats.drafted} guessed tokens were taken, in {stats.rounds} rounds", file=sys.stderr)
    return 0


def _read(path: str) -> str:
    try:
        return read_text(pathlib.Path(path))
    except OSError as error:
        raise ValueError(f"json_schema {path!r} cannot be read: {error.strerror}") from None
