"""jaxlm generate."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from jaxlm import config as configs
from jaxlm.text_files import read_text
from jaxlm.verbs.batches import MAX_TOKENS, Batched, generate_file
from jaxlm.verbs.decoding import SamplingOptions, check_flags, decoding_of
from jaxlm.verbs.words import split_words

CONTRASTIVE = ("max_new_tokens", "max_length", "stop_strings")
"""Settings of a model that contrastive search has too."""


@dataclasses.dataclass(frozen=True)
class GenerateOptions(SamplingOptions):
    """The flags of `jaxlm generate`."""

    prompt: str = ""
    """What the text begins with; empty: a new text. An encoder-decoder reads it."""
    beams: int | None = None
    """Beam search with this many beams; 1: off. Empty: the model's own setting, else 1."""
    length_penalty: float | None = None
    """Beams are compared by log-probability / tokens^length_penalty: larger values prefer longer texts."""
    early_stopping: Literal["false", "true", "never"] | None = None
    """When beam search ends, as Hugging Face's option of this name."""
    no_repeat_ngram_size: int | None = None
    """No n-gram of this many tokens occurs twice; 0: off."""
    min_tokens: int | None = None
    """Minimum number of new tokens."""
    penalty_alpha: float | None = None
    """Contrastive search: of the `top_k` likeliest tokens that with the largest (1 − penalty_alpha) · its probability −
    penalty_alpha · its likeness to the text so far. Nothing is drawn, and the text comes at once."""
    draft: str | None = None
    """A smaller MODEL of the same tokenizer that guesses tokens, which the model checks all at once: sooner the same."""
    draft_tokens: int | None = None
    """Number of tokens that `draft` guesses each time; empty: 4."""
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
        super().__post_init__()
        if (self.file is None) != (self.out is None):
            raise ValueError("--file and --out belong together: prompts are read from one, answers written to the other")
        if self.file is not None and self.prompt:
            raise ValueError("give a prompt or a file of them, not both")
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
            own = {
                "prompt",
                "split_special_tokens",
                "max_tokens",
                "top_k",
                "penalty_alpha",
                "dtype",
                "parallel",
                "generation_config",
            }
            others = [f.name for f in dataclasses.fields(self) if f.name not in own and getattr(self, f.name) != f.default]
            if others:
                raise ValueError(
                    f"penalty_alpha draws nothing and goes with top_k and max_tokens alone: leave off {', '.join(others)}"
                )
        if self.draft_tokens is not None and self.draft is None:
            raise ValueError(f"draft_tokens {self.draft_tokens} would do nothing here: it is read with draft only; leave it out")
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
    check_flags(options)
    if options.file is not None and options.out is not None:
        return generate_file(argument, options.file, options.out, options)
    from jaxlm.generate import ContrastiveConfig, Stats
    from jaxlm.models import load_model

    constraint = _constraint(options)
    if options.penalty_alpha is not None and options.top_k is not None:  # mistakes are told before a model is read
        ContrastiveConfig(options.top_k, options.penalty_alpha, options.max_tokens or MAX_TOKENS)
    trained = load_model(argument, options=options).for_writing(free=True)
    stats, write = Stats(), sys.stdout.write
    pieces = _read_and_written(trained, options) if trained.reads else _continued(trained, options, constraint, stats)
    for piece in pieces:
        write(piece)
        sys.stdout.flush()
    write("\n")
    if options.guesses:
        print(f"{stats.accepted} of {stats.drafted} guessed tokens were taken, in {stats.rounds} rounds", file=sys.stderr)
    return 0


def _constraint(options: GenerateOptions) -> Any:
    from jaxlm.generate import Constraint

    if options.regex is not None:
        return Constraint(regex=options.regex)
    return None if options.json_schema is None else Constraint(json_schema=_read(options.json_schema))


def _read_and_written(trained: Any, options: GenerateOptions) -> Iterator[str]:
    """The text of an encoder-decoder that reads the prompt."""
    if options.guesses or options.regex or options.json_schema or options.penalty_alpha is not None:
        raise ValueError(
            f"{trained.name} is an encoder-decoder: draft, lookup, regex, json_schema and penalty_alpha are for decoders"
        )
    decoding = decoding_of(trained, options, MAX_TOKENS)
    tell(decoding.told())
    texts = Batched(trained, decoding, [{"prompt": options.prompt}], options.seed, split=options.split_special_tokens)
    yield next(iter(texts.write([0])))[1].text


def _continued(trained: Any, options: GenerateOptions, constraint: Any, stats: Any) -> Iterator[str]:
    """The prompt and what a decoder writes behind it, as it comes."""
    from jaxlm.data import TextEncoder
    from jaxlm.generate import BatchGenerator, ContrastiveConfig, ContrastiveGenerator, Generator, Grammar, Speculator
    from jaxlm.generate.settings import BEAMS
    from jaxlm.generate.text import TextStream
    from jaxlm.models import load_model

    tokenizer, model, mesh = trained.tokenizer, trained.model, trained.mesh
    prompt = TextEncoder(tokenizer, split_special_tokens=options.split_special_tokens).ids(options.prompt)
    stop = {tokenizer.eos_id, *trained.stop_ids()}
    decoding = decoding_of(trained, options, MAX_TOKENS)
    room, rules = decoding.room(len(prompt)), decoding.rules
    tokens: Iterable[int]
    asked = (trained.params, prompt, room, decoding.sampling)
    if options.penalty_alpha is not None and options.top_k is not None:
        tell(decoding.told([name for name in decoding.settings.values if name not in CONTRASTIVE]))
        contrast = ContrastiveConfig(options.top_k, options.penalty_alpha, room)
        (tokens,) = ContrastiveGenerator(model, mesh, tokenizer.vocab_size)(trained.params, [prompt], contrast, stop)
    elif options.guesses:
        if rules or decoding.beams:
            names = ", ".join([*rules.named(), *(["beams"] if decoding.beams else [])])
            raise ValueError(f"draft and lookup do not have {names}: leave them off, or take these away (--generation-config none)")
        tell(decoding.told())
        if options.draft is not None:
            small = load_model(options.draft, mesh, options).for_writing(free=True)
            if small.tokenizer.fingerprint != tokenizer.fingerprint:
                raise ValueError(f"draft {options.draft!r} has another tokenizer than {trained.name!r}: it cannot guess its tokens")
            speculator = Speculator(model, mesh, tokenizer.vocab_size, options.draft_tokens or 4, small.model)
            tokens = speculator.stream(*asked, draft_params=small.params, seed=options.seed, stop=stop, stats=stats)
        else:
            assert options.lookup is not None, "there are two ways to guess"
            speculator = Speculator(model, mesh, tokenizer.vocab_size, options.lookup)
            tokens = speculator.stream(*asked, seed=options.seed, stop=stop, stats=stats)
    elif constraint is not None:  # what must match allows no other constraint beside it
        tell(decoding.told((*rules.named(), *BEAMS, "min_new_tokens")))
        grammar = Grammar(tokenizer, constraint, stop)
        tokens = Generator(model, mesh, tokenizer.vocab_size).stream(*asked, seed=options.seed, stop=stop, grammar=grammar)
    elif decoding.beams:
        tell(decoding.told())
        config = dataclasses.replace(decoding.decode, max_tokens=room)
        searcher = BatchGenerator(model, mesh, tokenizer.vocab_size, pad_id=tokenizer.eos_id)
        (tokens,) = searcher(
            trained.params, [prompt], config, stop, rules=rules, sampling=decoding.sampling, seeds=[options.seed]
        )  # fmt: skip
    else:
        tell(decoding.told())
        tokens = Generator(model, mesh, tokenizer.vocab_size).stream(*asked, seed=options.seed, stop=stop, rules=rules)
    text = TextStream(tokenizer, decoding.stop_strings, prompt=prompt, keep_stop=True)
    yield options.prompt
    for token in tokens:
        yield text.push(token)
        if text.stopped is not None:
            break
    yield text.flush()


def tell(line: str | None) -> None:
    """A line beside the text, not in it."""
    if line is not None:
        print(line, file=sys.stderr)


def _read(path: str) -> str:
    try:
        return read_text(pathlib.Path(path))
    except OSError as error:
        raise ValueError(f"json_schema {path!r} cannot be read: {error.strerror}") from None
