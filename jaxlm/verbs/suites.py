"""jaxlm evaluate MODEL --task SUITE: the suites of lm-evaluation-harness on local files."""

import pathlib

from jaxlm.devices import LoadOptions
from jaxlm.report.console import say


def evaluate_suite(
    argument: str,
    name: str,
    data: str,
    *,
    limit: int | None,
    out: str | None,
    length: int | None,
    bos: bool | None,
    batch_size: int,
    loading: LoadOptions,
) -> int:
    """Scores with intervals, printed and written; see `jaxlm evaluate`."""
    from jaxlm.harness import SUITES, Scorer, answer, read_pages, read_questions, read_through, write
    from jaxlm.models import load_model

    suite = SUITES[name]
    given = read_questions(suite, data, limit) if suite.forms else read_pages(data, limit)
    trained = load_model(argument, options=loading)
    scorer = Scorer(trained, length=length, batch_size=batch_size, bos=bos)
    if isinstance(given, list):
        rows, result = len(given), read_through(suite, given, scorer)
    else:
        rows, result = len(given.questions), answer(suite, given, scorer)
    folder = pathlib.Path(out) if out else (trained.run or pathlib.Path()) / "evaluation" / name
    about = {"task": name, "model": trained.name, "data": pathlib.Path(data).name, "rows": rows, "length": scorer.length,
             "truncated": scorer.truncated}  # fmt: skip
    write(folder, result, about)
    say(f"{name}: {rows:,} {'questions' if suite.forms else 'texts'}, contexts of {scorer.length:,} tokens")
    if scorer.truncated:
        say(f"{scorer.truncated:,} contexts lost their beginnings: with what follows they are longer than the model reads")
    for score, found in result.scores.items():
        beside = "" if result.chance is None else f", chance {result.chance:.4f}"
        say(f"{score + ':':<24}{found.value:.4f} ({found.low:.4f} to {found.high:.4f}{beside})")
    say(f"look at {folder}/samples.jsonl")
    return 0
