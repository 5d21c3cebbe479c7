"""The verbs. Each is a function of its words; a mistake is one clear line and exit code 1.

Exit codes: 0 done · 1 user error · 2 internal error · 42 interrupted and resumable.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from jaxlm import config as configs
from jaxlm import host
from jaxlm.report.console import say

INTERRUPTED = 42

DEFAULT_CONFIG = "configs/tiny.yaml"


def split_words(words: Sequence[str], *whats: str, default: str | None = None) -> tuple[list[str], dict[str, configs.Text]]:
    """The positional words, one for each of `whats`, and the flags behind them; the only one may have a default."""
    given = list(itertools.takewhile(lambda word: not word.startswith("--"), words))[: len(whats)]
    if not given and default is not None:
        given = [default]
        return given, configs.parse_flags(words)
    if len(given) < len(whats):
        raise ValueError(f"{whats[len(given)]} is missing: give {' and '.join(whats)} first")
    return given, configs.parse_flags(words[len(given) :])


def train(words: Sequence[str]) -> int:
    """jaxlm train [FILE] [--section.option VALUE …] [--name NAME]: train what FILE describes, or resume it."""
    (file,), flags = split_words(words, "the config file", default=DEFAULT_CONFIG)
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
    (file,), flags = split_words(words, "the config file", default=DEFAULT_CONFIG)
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
    (argument,), flags = split_words(words, "MODEL")
    options = configs.load(GenerateOptions, None, flags).value
    from jaxlm.data import StreamDecoder
    from jaxlm.generate import Generator, SampleConfig
    from jaxlm.models import load_model

    sampling = SampleConfig(options.temperature, options.top_k, options.top_p)
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


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The flags of `jaxlm export`."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the written tensors."""
    family: str | None = None
    """The model_type to write; empty: the first that can describe the model."""
    max_shard_gb: float = 5.0
    """Largest file of tensors, in 10⁹ bytes."""

    def __post_init__(self) -> None:
        if self.max_shard_gb <= 0:
            raise ValueError(f"max_shard_gb is {self.max_shard_gb}: it must be positive")


def export(words: Sequence[str]) -> int:
    """jaxlm export MODEL DIR [--dtype TYPE] [--family NAME] [--max-shard-gb N]: write a Hugging Face folder."""
    (argument, target), flags = split_words(words, "MODEL", "DIR")
    options = configs.load(ExportOptions, None, flags).value
    from jaxlm.hub import save_folder
    from jaxlm.models import load_model

    trained = load_model(argument)
    folder = save_folder(
        pathlib.Path(target), trained.model, trained.params, tokenizer=trained.tokenizer_folder, like=trained.json(),
        family=options.family, dtype=options.dtype, title=trained.name, max_shard_bytes=int(options.max_shard_gb * 1e9),
        source=trained.source,
    )  # fmt: skip
    say(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    return 0


@dataclasses.dataclass(frozen=True)
class ShowOptions:
    """The flags of `jaxlm show`."""

    length: int | None = None
    """Tokens of a text, for FLOPs and cache; empty: the model's positions."""
    vocab_size: int | None = None
    """Entries of the vocabulary, where a preset or a config file leaves it to the tokenizer."""

    def __post_init__(self) -> None:
        for name in ("length", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")


def show(words: Sequence[str]) -> int:
    """jaxlm show MODEL [--length N] [--vocab-size N]: modules, parameters, FLOPs, memory; of a preset or config file too."""
    (argument,), flags = split_words(words, "MODEL")
    options = configs.load(ShowOptions, None, flags).value
    from jaxlm.models import model_config
    from jaxlm.overview import describe_model

    config = model_config(argument)
    if options.vocab_size is not None:
        config = dataclasses.replace(config, vocab_size=options.vocab_size)
    for line in describe_model(config, options.length or config.positions):
        say(line)
    return 0


@dataclasses.dataclass(frozen=True)
class DiffOptions:
    """The flags of `jaxlm diff`."""

    text: str | None = None
    """What both models read; empty: English that Python carries."""
    file: str | None = None
    """A text file to read instead."""
    tokens: int = 2048
    """Most tokens to compare."""
    tolerance: float | None = None
    """Fail (exit code 1) where a logit differs by more."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}: it must be at least 1")
        if self.file is not None and self.text is not None:
            raise ValueError("give a text or a file, not both")
        if self.file and not pathlib.Path(self.file).is_file():
            raise ValueError(f"no file {self.file!r}")


def diff(words: Sequence[str]) -> int:
    """jaxlm diff A B [--text TEXT] [--file FILE] [--tokens N] [--tolerance X]: how far the outputs of two models differ."""
    (one, two), flags = split_words(words, "MODEL A", "MODEL B")
    options = configs.load(DiffOptions, None, flags).value
    from jaxlm.models import load_model
    from jaxlm.overview import compare

    text = pathlib.Path(options.file).read_text(encoding="utf8", errors="replace") if options.file else options.text
    found = compare(load_model(one), load_model(two), text, options.tokens)
    for line in found.lines():
        say(line)
    if options.tolerance is not None and not found.largest <= options.tolerance:
        raise ValueError(f"{one} and {two} differ by up to {found.largest:.3g}: more than the tolerance {options.tolerance:g}")
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train, "config": config, "generate": generate, "export": export, "show": show, "diff": diff,
}  # fmt: skip
OPTIONS = {"generate": GenerateOptions, "export": ExportOptions, "show": ShowOptions, "diff": DiffOptions}


def help_text() -> str:
    lines = ["jaxlm: pretrain, fine-tune, apply and study Transformer language models in JAX.", ""]
    lines += [f"  {verb.__doc__}" for verb in VERBS.values()]
    lines += ["", "jaxlm VERB --help lists the options of a verb. --debug shows the traceback of an error."]
    return "\n".join(lines)


def help_for(name: str) -> str:
    """The usage of a verb and its options, read from the config dataclasses."""
    from jaxlm.experiment import ExperimentConfig

    described = OPTIONS.get(name, ExperimentConfig)
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
    except OSError as error:  # a path that cannot be read or written
        if debug or error.filename is None:
            return _fault()
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except Exception:
        return _fault()


def _fault() -> int:
    import traceback

    traceback.print_exc()
    print("error: this is a fault of jaxlm, not of yours; please report it with the lines above", file=sys.stderr)
    return 2
