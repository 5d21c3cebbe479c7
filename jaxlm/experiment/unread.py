"""Which options a run reads: an option that is given where nothing reads it is refused.

`RULES` holds the options that depend on others. An option without a rule is read by every run. `tests/experiment/test_options.py`
proves both: for every recipe, another value of an option changes the run or is refused.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxlm import config as configs
from jaxlm.data.formats import FORMATS, is_parallel
from jaxlm.data.sources import format_of
from jaxlm.tasks import PRETRAINING, TASKS

Config = Any
"""An `ExperimentConfig`, whose module imports this one."""


class Rule(NamedTuple):
    """When some options are read."""

    options: str
    """Regular expression of their whole dotted names."""
    deciding: str
    """The option that decides."""
    holds: Callable[[Config], bool]
    words: str
    """The condition, to follow "it is read"."""


def value_of(config: Any, option: str) -> Any:
    """The value of a dotted option."""
    return functools.reduce(
        lambda part, name: part[int(name)] if name.isdigit() else getattr(part, name), option.split("."), config
    )


def _with(options: str, deciding: str, *values: Any) -> Rule:
    """The options are read where `deciding` has one of some values."""
    shown = " or ".join(json.dumps(value) if value is None or isinstance(value, bool) else str(value) for value in values)
    return Rule(options, deciding, lambda config: value_of(config, deciding) in values, f"with {deciding} {shown}")


def _not_with(options: str, deciding: str, *values: Any) -> Rule:
    """The options are read where `deciding` has none of some values."""
    shown = " or ".join(map(str, values))
    return Rule(options, deciding, lambda config: value_of(config, deciding) not in values, f"without {deciding} {shown}")


def _above(options: str, deciding: str, bound: float) -> Rule:
    """The options are read where `deciding` is larger than a bound."""
    return Rule(options, deciding, lambda config: value_of(config, deciding) > bound, f"with {deciding} above {bound}")


def _split(options: str, axis: str) -> Rule:
    """The options are read where a mesh axis is, or may become, larger than 1."""
    deciding = f"parallel.{axis}"
    return Rule(options, deciding, lambda config: value_of(config, deciding) != 1, f"with {deciding} above 1")


def _roles(config: Config) -> set[str]:
    if config.task.pretraining:
        return set()
    required, optional = TASKS[config.task.kind].roles(config.task, config.model.architecture)
    return {*required, *optional}


def _named(config: Config, *suffixes: str) -> bool:
    """Rows come from files with one of some suffixes (`{}`: parallel ones), or from some whose path leaves their format open."""

    def named(path: str) -> bool:
        if re.match(r"(hf|tfds|embedded):", path):
            return False
        suffix = "{}" if is_parallel(path) else format_of(pathlib.Path(path))
        return suffix in suffixes or suffix not in ("{}", ".txt", *FORMATS)

    return any(map(named, filter(None, (config.data.train, config.data.validation))))


_ROWS = tuple(TASKS)
_WRITES = ("text_to_text", "chat")
_CORRUPTS = "task.corrupt."
_VOCABULARY = ("language_model", "masked_lm", "detection")  # a detection model has a generator

RULES: tuple[Rule, ...] = (
    # --- task
    _with("task.labels", "task.kind", "classification", "multilabel", "tagging"),
    _with("task.threshold", "task.kind", "multilabel"),
    _with(r"task.(stride|answer_length)", "task.kind", "extractive_qa"),
    _with(r"task.(template|target_length|scores)", "task.kind", "text_to_text"),
    Rule(
        "task.tokenize", "task.scores",
        lambda config: config.task.kind != "text_to_text" or (
            config.task.scores in ("auto", "translation") and "answers" not in _roles(config)
        ),
        "with task.scores translation, or auto where rows have no answers,",
    ),
    _with("task.chat_template", "task.kind", "chat", "preference", "reward"),
    _with("task.packed", "task.kind", "chat"),
    _with("task.append_eos", "task.kind", "text_to_text", "preference"),
    _with("task.split_special_tokens", "task.kind", *_ROWS),
    _with("task.temperature", "task.kind", "embedding"),
    _with(r"task.(preference|beta)", "task.kind", "preference"),
    _with(r"task.(generator|detection)", "task.kind", "replaced"),
    _with(rf"{_CORRUPTS}rate", "task.kind", "masked", "replaced", "span", "denoising"),
    _with(rf"{_CORRUPTS}mean_span", "task.kind", "span", "denoising"),
    _with(rf"{_CORRUPTS}whole_words", "task.kind", "masked", "replaced"),
    _with(rf"{_CORRUPTS}pairs", "task.kind", "masked"),
    _with(rf"{_CORRUPTS}(fim|spm)", "task.kind", "causal"),
    _above(rf"{_CORRUPTS}spm", "task.corrupt.fim", 0),
    _with(rf"{_CORRUPTS}permute_sentences", "task.kind", "denoising"),
    _with(r"task.decode.*", "task.kind", *_WRITES),
    _above(r"task.decode.(length_penalty|early_stopping)", "task.decode.beams", 1),
    Rule(r"task.decode.n_best", "task.kind", lambda config: False, "from Python, by BatchGenerator.ranked,"),
    # --- data
    _with(r"data.(sources.*|layout|holdout.by|cache)", "task.kind", *PRETRAINING),
    _with(r"data.(train|validation|rows.*|grouped)", "task.kind", *_ROWS),
    _with(r"data.(holdout.fraction|rows.group)", "data.validation", None),
    _with(r"data.tokenizer.vocab_size", "data.tokenizer.kind", "bpe"),
    Rule(
        "data.rows.header", "data.train", lambda config: _named(config, ".tsv", ".csv", ".txt", ".json", ".jsonl"),
        "from .tsv, .csv, .txt and JSON files",
    ),
    Rule("data.rows.separator", "data.train", lambda config: _named(config, ".tsv", ".csv", ".txt"), "from .tsv, .csv and .txt"),
    Rule("data.rows.under", "data.train", lambda config: _named(config, ".json"), "from .json files"),
    Rule(
        "data.rows.encoding", "data.train",
        lambda config: _named(config, ".tsv", ".csv", ".txt", ".json", ".jsonl", ".conll", ".conllu", "{}"), "from files of text",
    ),
    _with("data.rows.speakers", "task.kind", "chat", "preference", "reward"),
    Rule(
        r"data.rows.subset", "data.train", lambda config: (config.data.train or "").startswith("hf:"), "with data.train hf:ID"
    ),
    # --- training
    _with("train.z_loss", "task.kind", *PRETRAINING, *_WRITES),
    _with("train.loss_chunk", "task.kind", *PRETRAINING, *_WRITES, "preference"),
    _with("train.sample_prompt", "task.kind", "causal"),
    _above("train.sample_prompt", "train.sample_tokens", 0),
    Rule(
        "train.sample_tokens", "task.kind", lambda config: config.task.kind == "causal" or config.train.sample_tokens == 0,
        "with task.kind causal (0 turns samples of other kinds off)",
    ),
    _not_with(r"optim.(beta1|beta2|eps)", "optim.name", "adafactor"),
    _not_with("optim.eps", "optim.name", "lion"),
    _not_with("optim.final", "optim.schedule", "constant"),
    _with("optim.decay_share", "optim.schedule", "wsd"),
    _above("optim.decay", "optim.weight_decay", 0),
    _above(r"tune.lora.(alpha|targets|dora)", "tune.lora.rank", 0),
    Rule(
        "parallel.across", "parallel.across", lambda config: value_of(config, f"parallel.{config.parallel.across}") != 1,
        "with a size above 1 of the axis that it names",
    ),
    # --- model
    _with("model.vocab_multiple", "model.vocab_size", None),
    _with(r"model.relative_(buckets|distance)", "model.position", "relative"),
    _with("model.position_offset", "model.position", "learned"),
    _with(r"model.rope.*", "model.position", "rotary"),
    _not_with(r"model.rope.factor", "model.rope.scaling", "none"),
    Rule(
        "model.rope.scaling", "model.rope.factor", lambda c: c.model.rope.factor != 1 or c.model.rope.magnitude is not None,
        "with a model.rope.factor other than 1",
    ),
    _with(r"model.rope.original_positions", "model.rope.scaling", "dynamic", "llama3", "yarn"),
    _with(r"model.rope.(low|high)_frequency", "model.rope.scaling", "llama3"),
    _with(r"model.rope.(beta_fast|beta_slow|magnitude)", "model.rope.scaling", "yarn"),
    Rule(
        r"model.(window|rope.local_theta)", "model.layer_pattern", lambda config: "L" in config.model.layer_pattern,
        "with an L in model.layer_pattern",
    ),
    _with("model.first_norm", "model.norm_position", "pre", "both"),
    _split("model.context", "context"),
    _split(r"model.(microbatches|rounds)", "stage"),
    _with("model.cache", "model.head.kind", "language_model"),
    _with(r"model.(tie_embeddings|logit_softcap|logit_scale)", "model.head.kind", *_VOCABULARY),
    _with("model.logit_scale", "model.tie_embeddings", True),
    _with("model.logit_bias", "model.head.kind", "language_model"),
    Rule("model.head.labels", "task.kind", lambda config: False, "from the rows, or from task.labels"),
    _with("model.head.pool", "model.head.kind", "sequence", "choice", "embedding"),
    _not_with(r"model.head.(dense.*|activation|norm|bias)", "model.head.kind", "language_model"),
    _with(r"model.head.(dense_bias|activation|norm)", "model.head.dense", True),
    _not_with("model.head.bias", "model.head.kind", "embedding"),
    _above(r"model.moe.(?!experts).*", "model.moe.experts", 0),
)  # fmt: skip


def check_row_flags(names: Iterable[str], path: str, rows: Any, task: Any, architecture: str) -> None:
    """Refuse those of the flags `data.rows.…` that nothing reads for rows of one path, with a ValueError of one line."""
    space = types.SimpleNamespace
    config = space(
        data=space(train=path, validation=None, rows=rows), task=task, model=space(architecture=architecture),
    )  # fmt: skip
    for name in names:
        for rule in RULES:
            if re.fullmatch(rule.options, name) and not rule.holds(config):
                raise ValueError(f"{name} would do nothing here: it is read {rule.words} only; leave it out")
        role = name.removeprefix("data.rows.columns.")
        if role != name and role not in _roles(config):
            roles = ", ".join(sorted(_roles(config)))
            raise ValueError(f"{name} would do nothing here: the columns of task {task.kind} are {roles}; leave it out")


def check_read(loaded: configs.Loaded) -> tuple[configs.Loaded, list[str]]:
    """Refuse options that nothing reads, with a ValueError of one line.

    A value of the config file that a flag on the command line made idle is set back to its default instead; the lines returned
    tell of it.
    """
    notes: list[str] = []
    while True:
        config, origins = loaded
        idle = next(_idle(config, origins), None)
        if idle is None:
            return loaded, notes
        name, value, default, rule = idle
        origin = _origin(name, origins)
        flagged = origins.get(rule.deciding, "").startswith("--")
        if origin.startswith("--") or not flagged:
            raise _would_do_nothing(name, value, origin, rule)
        by = f"{origins[rule.deciding]} {_shown(value_of(config, rule.deciding))}"
        notes.append(f"{name} {_shown(value)} ({origin}) is left out: it is read {rule.words} only, and the command line says {by}")
        loaded = configs.Loaded(_replaced(config, name.split("."), default), {**origins, name: "default"})


def check_known(parts: Mapping[str, Any], origins: dict[str, str]) -> None:
    """Refuse what `check_read` refuses by these sections of a config alone, before the model that they start from is fetched."""
    config = types.SimpleNamespace(**parts)
    sections = {name: section for name, section in parts.items() if dataclasses.is_dataclass(section)}
    for name, value, _ in itertools.chain.from_iterable(_given(section, name) for name, section in sections.items()):
        for rule in RULES:
            if not re.fullmatch(rule.options, name) or rule.deciding.partition(".")[0] not in parts:
                continue
            try:
                idle = not rule.holds(config)
            except AttributeError:  # it asks about the model
                continue
            if idle and (_origin(name, origins).startswith("--") or not origins.get(rule.deciding, "").startswith("--")):
                raise _would_do_nothing(name, value, _origin(name, origins), rule)


def _would_do_nothing(name: str, value: Any, origin: str, rule: Rule) -> ValueError:
    place = "" if origin.startswith("--") or origin == "default" else f" ({origin})"
    return ValueError(f"{name} {_shown(value)}{place} would do nothing here: it is read {rule.words} only; leave it out")


def _idle(config: Config, origins: dict[str, str]) -> Iterator[tuple[str, Any, Any, Rule]]:
    """(name, value, default, rule) of each option that is given and that nothing reads."""
    model = [origin for name, origin in origins.items() if name.startswith("model.")]
    inherited = re.compile(r"default$|preset |init_from |task ")
    whole = not any(map(inherited.match, model))  # a run's own config.yaml: what it does not read came with the model
    for name, value, default in _given(config):
        origin = _origin(name, origins)
        if name.startswith("model.") and (inherited.match(origin) or (whole and not origin.startswith("--"))):
            continue
        for rule in RULES:
            if re.fullmatch(rule.options, name) and not rule.holds(config):
                yield name, value, default, rule
        role = name.removeprefix("data.rows.columns.")
        if role != name and role not in _roles(config):
            roles = ", ".join(sorted(_roles(config)))
            words = f"as one of the columns of task.kind {config.task.kind} ({roles})"
            yield name, value, default, Rule(re.escape(name), "task.kind", lambda config: False, words)


def _origin(name: str, origins: dict[str, str]) -> str:
    """Where an option's value came from; that of a list is told of its first item."""
    return origins.get(name) or origins.get(f"{name}.0", "default")


def _given(section: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, default) of every option that differs from its default."""
    for field in dataclasses.fields(section):
        name, value = configs.join(path, field.name), getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _given(value, name)
        elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
            for i, item in enumerate(value):
                yield from _given(item, f"{name}.{i}")
        elif value != field.default:
            yield name, value, field.default


def _replaced(section: Any, names: list[str], value: Any) -> Any:
    """A config with another value of one option."""
    if not names:
        return value
    first, *rest = names
    if isinstance(section, tuple):
        return tuple(_replaced(item, rest, value) if i == int(first) else item for i, item in enumerate(section))
    return dataclasses.replace(section, **{first: _replaced(getattr(section, first), rest, value)})


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and "\n" in value else str(value)
