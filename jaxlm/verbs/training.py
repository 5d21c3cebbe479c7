"""jaxlm train and jaxlm config."""

from collections.abc import Sequence
from typing import Any

from jaxlm import config as configs
from jaxlm.host import EXIT_RESUMABLE
from jaxlm.report.console import console, say
from jaxlm.verbs.words import split_words, with_row_flags

DEFAULT_CONFIG = "configs/tiny.yaml"


def train(words: Sequence[str]) -> int:
    """jaxlm train [FILE] [--section.option VALUE …] [--name NAME]: train what FILE describes, or resume it."""
    (file,), flags = split_words(words, "the config file", default=DEFAULT_CONFIG)
    from jaxlm.experiment import load_config
    from jaxlm.parallel import join, leave, speaks

    config = load_config(file, with_row_flags(flags)).value
    join(config.hosts)
    console().quiet = not speaks()
    ended = _train(config)
    leave()
    return EXIT_RESUMABLE if ended == "interrupted" else 0


def _train(config: Any) -> str:
    """How it ended (see `jaxlm.train.Outcome`)."""
    from jaxlm.experiment import Run, train_seeds

    if config.seeds > 1:
        return train_seeds(config)
    run = Run(config)
    if run.finished:
        say(f"{run.folder} is finished, at step {run.start:,}. To go on or use it:")
        for command in run.next_commands(run.start):
            say(f"  {command}")
        return "finished"
    return run.train()


def config(words: Sequence[str]) -> int:
    """jaxlm config [FILE] [--section.option VALUE …]: print the resolved config and where each value came from."""
    (file,), flags = split_words(words, "the config file", default=DEFAULT_CONFIG)
    from jaxlm.experiment import Unresolved, known_leaves, load_config

    missing = None
    try:
        value, origins = load_config(file, with_row_flags(flags))
        leaves = configs.flatten(configs.to_dict(value))
    except Unresolved as error:
        leaves, origins = known_leaves(file, with_row_flags(flags))
        missing = str(error)
    wide = max(len(f"{name}: {leaf}") for name, leaf in leaves.items() if len(str(leaf)) < 60)
    for name, leaf in leaves.items():
        shown = "null" if leaf is None else leaf
        say(f"{f'{name}: {shown}':<{min(wide, 80)}}  # {origins.get(name, 'default')}")
    if missing is not None:
        say("# not resolved: model's other options, and data.tokenizer where it is not given, follow from the model to start from")
        say(f"# {missing}")
    return 0
