"""jaxlm export, jaxlm show and jaxlm diff."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

from jaxlm import config as configs
from jaxlm.devices import LoadOptions, MeshOptions
from jaxlm.report.console import say
from jaxlm.text_files import read_text
from jaxlm.verbs.card_facts import card_facts
from jaxlm.verbs.words import split_words


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The flags of `jaxlm export`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the written tensors; auto: that of the model's own. It is read in its own in any case."""
    parallel: MeshOptions = MeshOptions()
    family: str | None = None
    """The model_type to write; empty: the first that can describe the model."""
    adapter: bool = False
    """Write the adapters of a run alone, as PEFT's folder: the model that they stand on is named, not written."""
    license: str | None = None
    """The licence that the model card states, by the hub's name for it (mit, apache-2.0); empty: that of the model it was trained
    from."""
    language: tuple[str, ...] = ()
    """ISO codes of the languages that the model card states; empty: those of the model it was trained from."""
    max_shard_gb: float = 5.0
    """Largest file of tensors, in 10⁹ bytes."""

    def __post_init__(self) -> None:
        if self.max_shard_gb <= 0:
            raise ValueError(f"max_shard_gb is {self.max_shard_gb}: it must be positive")
        if self.adapter:
            own = ("adapter", "family")
            idle = [f.name for f in dataclasses.fields(self) if f.name not in own and getattr(self, f.name) != f.default]
            if idle:
                raise ValueError(f"{idle[0]} would do nothing here: it is read without adapter only; leave it out")


def export(words: Sequence[str]) -> int:
    """jaxlm export MODEL DIR [--dtype TYPE] [--family NAME] [--max-shard-gb N] [--adapter]: write a Hugging Face folder."""
    (argument, target), flags = split_words(words, "MODEL", "DIR")
    options = configs.load(ExportOptions, None, flags).value
    from jaxlm.hub import ADAPTER, save_adapter, save_folder
    from jaxlm.models import held_dtype, load_model, load_tuned, locate, one_device

    if options.adapter:
        run = locate(argument)
        if not (run / "config.yaml").is_file():
            raise ValueError(f"{argument} is no run: adapters are exported from the run that trained them")
        tuned = load_tuned(run, one_device())
        folder = save_adapter(
            pathlib.Path(target), tuned.config, tuned.trained, tuned.model, options.family, tuned.base or "", run / "tokenizer"
        )
        say(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
        return 0
    # An adapter is merged in float32: what the written dtype can hold of the sum is kept.
    merged = (locate(argument) / ADAPTER).is_file() and options.dtype != "auto"
    trained = load_model(argument, options=LoadOptions("float32" if merged else "auto", options.parallel))
    dtype = held_dtype(trained.params) if options.dtype == "auto" else options.dtype
    folder = save_folder(
        pathlib.Path(target), trained.model, trained.params, tokenizer=trained.tokenizer_folder, like=trained.json(),
        family=options.family, dtype=dtype, title=trained.name, max_shard_bytes=int(options.max_shard_gb * 1e9),
        source=trained.source, generation=trained.generation_json(),
        facts=card_facts(trained, options.language, options.license or ""),
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
    mesh: str | None = None
    """Sizes of a mesh, such as fsdp=8,tensor=4, to show how the parameters would lie on it; no device is needed."""

    def __post_init__(self) -> None:
        for name in ("length", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")


def show(words: Sequence[str]) -> int:
    """jaxlm show MODEL [--length N] [--vocab-size N] [--mesh fsdp=8,tensor=4]: modules, parameters, FLOPs, memory; of a
    preset or config file too."""
    (argument,), flags = split_words(words, "MODEL")
    options = configs.load(ShowOptions, None, flags).value
    from jaxlm.models import model_config
    from jaxlm.overview import describe_model
    from jaxlm.parallel import ParallelConfig

    config = model_config(argument)
    if options.vocab_size is not None:
        config = dataclasses.replace(config, vocab_size=options.vocab_size)
    parallel = None
    if options.mesh is not None:
        flags = {name: size for name, _, size in (pair.partition("=") for pair in options.mesh.split(","))}
        parallel = configs.load(ParallelConfig, None, flags).value
    for line in describe_model(config, options.length or config.positions, parallel):
        say(line)
    return 0


@dataclasses.dataclass(frozen=True)
class DiffOptions(LoadOptions):
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

    text = read_text(pathlib.Path(options.file)) if options.file else options.text
    found = compare(load_model(one, options=options), load_model(two, options=options), text, options.tokens)
    for line in found.lines():
        say(line)
    if options.tolerance is not None and not found.largest <= options.tolerance:
        raise ValueError(f"{one} and {two} differ by up to {found.largest:.3g}: more than the tolerance {options.tolerance:g}")
    return 0
