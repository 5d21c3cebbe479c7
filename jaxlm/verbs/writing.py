"""jaxlm generate."""

import dataclasses
import sys
from collections.abc import Sequence

from jaxlm import config as configs
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
    seed: int = 0
    """The same seed gives the same text."""
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


def generate(words: Sequence[str]) -> int:
    """jaxlm generate MODEL [--prompt TEXT] [--max-tokens N] [--temperature T] [--top-k K] [--top-p P] [--seed S] …: write text;
    with --file FILE --out FILE for many prompts."""
    (argument,), flags = split_words(words, "MODEL")
    options = configs.load(GenerateOptions, None, flags).value
    from jaxlm.data import StreamDecoder
    from jaxlm.generate import Generator, SampleConfig
    from jaxlm.models import load_model

    sampling = SampleConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(SampleConfig)})
    if options.file is not None and options.out is not None:
        return generate_file(argument, options.file, options.out, sampling, options.max_tokens, options.seed)
    trained = load_model(argument)
    tokenizer = trained.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
    generator = Generator(trained.model, trained.mesh, tokenizer.vocab_size)
    decoder = StreamDecoder(tokenizer)
    write = sys.stdout.write
    write(options.prompt)
    stop = {tokenizer.eos_id, *trained.stop_ids()}
    for token in generator.stream(trained.params, prompt, options.max_tokens, sampling, seed=options.seed, stop=stop):
        write(decoder.push(token))
        sys.stdout.flush()
    write(decoder.flush() + "\n")
    return 0
