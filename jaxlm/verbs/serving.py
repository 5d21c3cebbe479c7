"""jaxlm serve."""

import importlib.util
from collections.abc import Sequence

from jaxlm import config as configs
from jaxlm.serve.options import ServeOptions
from jaxlm.verbs.words import split_words


def serve(words: Sequence[str]) -> int:
    """jaxlm serve MODEL [--host ADDRESS] [--port N] [--slots N] [--context N]: OpenAI's routes and a page to write with."""
    (argument,), flags = split_words(words, "MODEL")
    options = configs.load(ServeOptions, None, flags).value
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install 'jaxlm[serve]'")
    from jaxlm.serve.server import serve as run

    run(argument, options)
    return 0
