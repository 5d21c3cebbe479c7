"""A finished run for a person: curves.png, samples.md and report.html, drawn from its recorded rows."""

import base64
import dataclasses
import html
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A sentence that compares a model with a baseline, and whether it is better, worse, or cannot be told from it."""

    text: str = ""
    tone: Literal["better", "worse", "unclear"] = "unclear"


@dataclasses.dataclass(frozen=True)
class Page:
    """What a report says besides the curves: summary pairs, comparison, next commands, the config."""

    title: str
    summary: Mapping[str, str]
    verdict: Verdict = Verdict()
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Name → the last score of something to compare with, drawn as a horizontal line."""
    commands: Sequence[str] = ()
    config: str = ""
    scores: Sequence[str] = ("loss", "bits_per_byte")
    """Names of the held-out scores to show; the last one is drawn by itself."""
    unit: str = "tokens"
    """What the loss is a mean over and the speed counts."""
    writes: bool = True
    """The samples are texts that the model writes, not predictions."""


def write_page(folder: pathlib.Path, page: Page, rows: Rows) -> None:
    """Write `curves.png`, `samples.md` and `report.html` (self-contained) into the run's folder."""
    draw_curves(folder / "curves.png", page, rows)
    samples = [row for row in rows if row["kind"] == "sample"]
    (folder / "samples.md").write_text(_samples(page, samples), encoding="utf8", errors="replace")
    body = _body(page, folder / "curves.png", rows, samples)
    (folder / "report.html").write_text(document(page.title, body), encoding="utf8", errors="replace")


def draw_curves(file: pathlib.Path, page: Page, rows: Rows) -> None:
    """Loss, the held-out score against its baselines, learning rate with gradient norm, speed."""
    from matplotlib.figure import Figure

    score = page.scores[-1]
    train = [row for row in rows if row["kind"] == "train"]
    heldout = [row for row in rows if row["kind"] == "eval"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, bits), (rate, speed) = figure.subplots(2, 2)

    def line(axes: Any, rows: Rows, name: str, label: str, **style: Any) -> None:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)

    line(loss, train, "loss", "training", color="tab:blue", linewidth=1)
    line(loss, heldout, "loss", "held out", color="tab:orange", marker="o", markersize=4)
    loss.set(title="loss", ylabel=f"mean over {page.unit}")
    line(bits, heldout, score, "held out", color="tab:orange", marker="o", markersize=4)
    for i, (name, value) in enumerate(page.baselines.items()):
        bits.axhline(value, color="tab:gray", linestyle=("--", ":")[i % 2], label=f"{name}: {value:.2f}")
    bits.set(title="held out", ylabel=score.replace("_", " "))
    line(rate, train, "learning_rate", "learning rate", color="tab:green")
    rate.set(title="learning rate and gradient norm", ylabel="learning rate")
    norm = rate.twinx()
    line(norm, train, "grad_norm", "gradient norm", color="tab:red", linewidth=0.8, alpha=0.6)
    norm.set(ylabel="gradient norm", ylim=(0, None))
    line(speed, train, f"{page.unit}_per_second", f"{page.unit}/s", color="tab:purple", linewidth=1)
    speed.set(title="speed", ylabel=f"{page.unit} per second", ylim=(0, None))
    for axes in (loss, bits, rate, speed):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        lines, labels = axes.get_legend_handles_labels()
        if axes is rate:
            more_lines, more_labels = norm.get_legend_handles_labels()
            lines, labels = lines + more_lines, labels + more_labels
        if lines:
            axes.legend(lines, labels, frameon=False)
    figure.suptitle(page.title)
    figure.savefig(file, dpi=110)


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _samples(page: Page, samples: Rows) -> str:
    parts = [f"# What {page.title} {'writes' if page.writes else 'predicts'} as it learns\n"]
    parts += [f"## Step {row['step']}\n\n{_fenced(row['text'])}\n" for row in samples]
    return "\n".join(parts)


# --- HTML: pieces that every page is made of; what comes from data is escaped here -------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2129 }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem } img { max-width: 100% }
table { border-collapse: collapse } td, th { padding: .2rem 1.2rem .2rem 0; text-align: left; border-bottom: 1px solid #e3e6ea }
td, th { vertical-align: top; max-width: 36rem; overflow-wrap: break-word } th { white-space: nowrap }
.wide { width: min(96vw, 1500px); position: relative; left: 50%; transform: translateX(-50%); text-align: center }
pre { background: #f5f6f8; padding: .7rem; overflow-x: auto; white-space: pre-wrap; font-size: .85rem }
.verdict { background: #f2f3f5; border-left: 4px solid #8a9099; padding: .6rem 1rem }
.verdict.better { background: #eef6ee; border-color: #4a9a4a } .verdict.worse { background: #fbeeee; border-color: #b84a4a }
"""


def document(title: str, body: str) -> str:
    """A whole page that needs nothing beside it."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""


def table_of(rows: Iterable[Sequence[object]], head: Sequence[object] = ()) -> str:
    """Rows of values as a table; nothing for no rows."""

    def cells(tag: str, values: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values) + "</tr>"

    drawn = "".join(cells("td", values) for values in rows)
    return f"<table>{cells('th', head) if head else ''}{drawn}</table>" if drawn else ""


def section(title: str, body: str) -> str:
    """A heading and what stands under it; nothing where nothing does."""
    return f"<h2>{html.escape(title)}</h2>\n{body}\n" if body else ""


def picture(file: pathlib.Path, alt: str) -> str:
    """A PNG inside the page."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>" if text else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _body(page: Page, curves: pathlib.Path, rows: Rows, samples: Rows) -> str:
    names = [name for name in page.scores if any(name in row for row in rows if row["kind"] == "eval")]
    evals = [[row["step"], *(_number(row.get(name)) for name in names)] for row in rows if row["kind"] == "eval"]
    shown = [samples[0], samples[-1]] if len(samples) > 1 else samples
    parts = [
        f'<p class="verdict {page.verdict.tone}">{html.escape(page.verdict.text)}</p>' if page.verdict.text else "",
        table_of(page.summary.items()),
        section("Curves", picture(curves, "Loss, score, learning rate and speed over the steps")),
        section("Held-out evaluation", table_of(evals, ["step", *(name.replace("_", " ") for name in names)])),
        section(
            "What it writes" if page.writes else "What it predicts",
            "".join(f"<p>Step {row['step']}</p>{preformatted(row['text'])}" for row in shown),
        ),
        section("Next", preformatted("\n".join(page.commands))),
        section("Configuration", preformatted(page.config)),
    ]
    return "\n".join(part for part in parts if part)
