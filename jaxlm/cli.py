"""The command line: a mistake is one clear line and exit code 1.

Exit codes: 0 done · 1 user error · 2 internal error · 42 interrupted and resumable.
"""

import sys
from collections.abc import Sequence

from jaxlm import config as configs
from jaxlm import host
from jaxlm.report.console import say
from jaxlm.verbs import OPTIONS, VERBS


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
        return host.EXIT_RESUMABLE
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

    if "jaxlm.parallel" in sys.modules:
        sys.modules["jaxlm.parallel"].failed()
    traceback.print_exc()
    print("error: this is a fault of jaxlm, not of yours; please report it with the lines above", file=sys.stderr)
    return 2
