"""The verbs. Each is a function of its words; a mistake is one clear line and exit code 1.

Exit codes: 0 done · 1 user error · 2 internal error · 42 interrupted and resumable.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

from jaxlm import config as configs
from jaxlm import host
from jaxlm.report.console import say

INTERRUPTED = 42

DEFAULT_CONFIG = "configs/tiny.yaml"


def split_words(words: Sequence[str], what: str, default: str | None = None) -> tuple[str, dict[str, configs.Text]]:
    """The one positional word, if it comes first, and the flags behind it."""
    if words and not words[0].startswith("--"):
        return words[0], configs.parse_flags(words[1:])
    if default is None:
        raise ValueError(f"{what} is missing: give it first")
    return default, configs.parse_flags(words)


def train(words: Sequence[str]) -> int:
    """jaxlm train [FILE] [--section.option VALUE …] [--name NAME]: train what FILE describes, or resume it."""
    file, flags = split_words(words, "the config file", DEFAULT_CONFIG)
    from jaxlm.experiment import Run, load_config, next_commands

    run = Run(load_config(file, flags).value)
    if run.finished:
        say(f"{run.folder} is finished: {run.start:,} of {run.config.train.steps:,} steps. To go on or use it:")
        for command in next_commands(run.config, run.start):
            say(f"  {command}")
        return 0
    return INTERRUPTED if run.train() == "interrupted" else 0


def config(words: Sequence[str]) -> int:
    """jaxlm config [FILE] [--section.option VALUE …]: print the resolved config and where each value came from."""
    file, flags = split_words(words, "the config file", DEFAULT_CONFIG)
    from jaxlm.experiment import load_config

    value, origins = load_config(file, flags)
    leaves = configs.flatten(configs.to_dict(value))
    wide = max(len(f"{name}: {leaf}") for name, leaf in leaves.items() if len(str(leaf)) < 60)
    for name, leaf in leaves.items():
        shown = "null" if leaf is None else leaf
        say(f"{f'{name}: {shown}':<{min(wide, 80)}}  # {origins.get(name, 'default')}")
    return 0


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
    seed: int = 0
    """The same seed gives the same text."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: it must be at least 1")


def generate(words: Sequence[str]) -> int:
    """jaxlm generate MODEL [--prompt TEXT] [--max-tokens N] [--temperature T] [--top-k K] [--top-p P] [--seed S]: write text."""
    argument, flags = split_words(words, "MODEL (the folder of a run)")
    options = configs.load(GenerateOptions, None, flags).value
    from jaxlm.data import StreamDecoder
    from jaxlm.experiment import load_model
    from jaxlm.generate import Generator, SampleConfig

    sampling = SampleConfig(options.temperature, options.top_k, options.top_p)
    trained = load_model(argument)
    tokenizer = trained.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
    generator = Generator(trained.model, trained.mesh, tokenizer.vocab_size)
    decoder = StreamDecoder(tokenizer)
    write = sys.stdout.write
    write(options.prompt)
    for token in generator.stream(trained.params, prompt, options.max_tokens, sampling, seed=options.seed, stop=tokenizer.eos_id):
        write(decoder.push(token))
        sys.stdout.flush()
    write(decoder.flush() + "\n")
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {"train": train, "config": config, "generate": generate}


def help_text() -> str:
    lines = ["jaxlm: pretrain, fine-tune, apply and study Transformer language models in JAX.", ""]
    lines += [f"  {verb.__doc__}" for verb in VERBS.values()]
    lines += ["", "jaxlm VERB --help lists the options of a verb. --debug shows the traceback of an error."]
    return "\n".join(lines)


def help_for(name: str) -> str:
    """The usage of a verb and its options, read from the config dataclasses."""
    from jaxlm.experiment import ExperimentConfig

    described = GenerateOptions if name == "generate" else ExperimentConfig
    lines = [str(VERBS[name].__doc__), ""]
    for option, kind, default, text in configs.describe(described):
        lines.append(f"  --{option.replace('_', '-')} {kind}" + (f" (default {default})" if default else ""))
        if text:
            lines.append(f"      {text}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        if not words or words[0] in ("--help", "-h", "help"):
            say(help_text())
            return 0
        name, *rest = words
        if name == "--version":
            from jaxlm import __version__

            say(__version__)
            return 0
        if name not in VERBS:
            raise configs.unknown("verb", name, VERBS)
        host.prepare()
        if "--help" in rest or "-h" in rest:
            say(help_for(name))
            return 0
        return VERBS[name](rest)
    except ValueError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception:
        import traceback

        traceback.print_exc()
        print("error: this is a fault of jaxlm, not of yours; please report it with the lines above", file=sys.stderr)
        return 2
