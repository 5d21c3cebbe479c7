"""What a fine-tuned model is worth, for a person: scores.html, confusion.png and reliability.png, from plain data.

C classes.
"""

import functools
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.report.console import count
from jaxlm.report.page import Rows, document, picture, section, table_of

NUMBERED = 12
"""Up to so many classes a confusion matrix shows its numbers; above, the most confused pairs are listed."""
# What DejaVu Sans, which matplotlib brings along, has no letters for; tried where installed.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans", "Arial Unicode MS", "Noto Sans Devanagari",
    "Noto Sans Thai", "Noto Sans", "Nirmala UI",
)  # fmt: skip


def write_scores(
    folder: pathlib.Path,
    title: str,
    summary: Mapping[str, str],
    scores: Mapping[str, tuple[float, float, float]],
    confusion: tuple[Sequence[str], Any] | None = None,
    errors: Sequence[Mapping[str, str]] = (),
    reliability: Sequence[tuple[float, float, float, float, int]] | None = None,
    curve: pathlib.Path | Rows | None = None,
    level: float = 0.95,
    per_class: Sequence[Sequence[str]] = (),
) -> pathlib.Path:
    """Write `scores.html` (self-contained) and the pictures that it shows into the folder; gives the page's path.

    scores: name → (value, low, high), the bounds those of an interval of this `level`, nan where there is none.
    confusion: the labels, and counts_CC with a row for each actual class. errors: the worst ones, as rows of the same
    keys (such as text, expected, predicted, confidence). reliability: bins of (low, high, mean confidence, accuracy,
    number). per_class: rows of (class, precision, recall, F1, support). curve: a PNG, or rows of `metrics.jsonl` to draw
    `curve.png` from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [table_of(summary.items()), section("Scores", _scores(scores, level))]
    parts.append(section("Scores of each class", table_of(per_class, ["", "precision", "recall", "f1", "support"])))
    if confusion is not None:
        labels, counts_CC = [_flat(str(label)) for label in confusion[0]], np.asarray(confusion[1])
        assert counts_CC.shape == (len(labels), len(labels)), f"{counts_CC.shape} counts for {len(labels)} labels"
        draw_confusion(folder / "confusion.png", labels, counts_CC)
        drawn = picture(folder / "confusion.png", "Confusion matrix: actual classes down, predicted classes across")
        wide = len(labels) > NUMBERED
        parts.append(section("Confusion", (f'<div class="wide">{drawn}</div>' if wide else drawn) + _legend(labels)))
        if wide:
            parts.append(section("Most confused", _pairs(labels, counts_CC)))
    if reliability is not None and any(row[4] for row in reliability):
        draw_reliability(folder / "reliability.png", reliability)
        parts.append(section("Reliability", picture(folder / "reliability.png", "Accuracy against confidence")))
    if errors:
        rows = [[_cut(str(value), 600) for value in row.values()] for row in errors]
        parts.append(section("Worst errors", table_of(rows, list(errors[0]))))
    if curve is not None:
        file = curve if isinstance(curve, pathlib.Path) else folder / "curve.png"
        if not isinstance(curve, pathlib.Path):
            draw_curve(file, curve)
        parts.append(section("Training", picture(file, "Loss and scores over the steps")))
    page = folder / "scores.html"
    page.write_text(document(title, "\n".join(part for part in parts if part)), encoding="utf8", errors="replace")
    return page


def _scores(scores: Mapping[str, tuple[float, float, float]], level: float) -> str:
    rows = []
    for name, (value, low, high) in scores.items():
        bounds = "" if math.isnan(low) or math.isnan(high) else f"{_number(low)} to {_number(high)}"
        rows.append((name, _number(value), bounds))
    return table_of(rows, ["score", "value", f"{level:.0%} interval"])


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def _pairs(labels: Sequence[str], counts_CC: np.ndarray, most: int = 15) -> str:
    """The classes most often taken for another, by number and then by place."""
    C = len(labels)
    wrong = [(int(counts_CC[a, p]), a, p) for a, p in itertools.permutations(range(C), 2) if counts_CC[a, p]]
    total_C = counts_CC.sum(1)
    rows = [
        (labels[a], labels[p], n, f"{n / total_C[a]:.1%} of {total_C[a]:,}")
        for n, a, p in sorted(wrong, key=lambda each: (-each[0], *each[1:]))[:most]
    ]
    return (
        table_of(rows, ["actual", "predicted", "times", "share of the actual class"]) or "<p>None: every prediction is right.</p>"
    )


# --- pictures --------------------------------------------------------------------------------


def draw_confusion(file: pathlib.Path, labels: Sequence[str], counts_CC: np.ndarray) -> None:
    """Shares of each actual class as colours, with the counts in the cells of a small matrix."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    C, small = len(labels), len(labels) <= NUMBERED
    share_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    names = _names(labels)
    cell = 0.6 if small else min(0.16, 14 / C)  # inches
    figure = Figure(figsize=(max(2.5, cell * C), max(2.5, cell * C)))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))  # names stand outside; saving makes room for them
    # Few examples off the diagonal must still be seen among many classes.
    image = axes.imshow(share_CC, cmap="Blues", norm=PowerNorm(1.0 if small else 0.5, 0, 1))
    every = math.ceil(0.13 / cell)
    size = 9 if small else min(9.0, 45 * cell * every)
    font: dict[str, Any] = {"fontsize": size, "fontfamily": _fonts(), "parse_math": False}
    fits = max(map(len, names)) * 0.08 < figure.get_figwidth() / C
    axes.set_xticks(range(0, C, every), names[::every], rotation=0 if fits else 40 if small else 90, **font)
    if small and not fits:
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(0, C, every), names[::every], **font)
    axes.set(xlabel="predicted", ylabel="actual")
    if small:
        for actual, predicted in np.ndindex(C, C):
            n, share = int(counts_CC[actual, predicted]), share_CC[actual, predicted]
            colour = "white" if share > 0.55 else "#1d2129" if n else "#a0a6ad"
            text = f"{n}" if n < 100_000 else count(n)
            axes.text(predicted, actual, text, ha="center", va="center", color=colour, fontsize=9)
    width = figure.get_figwidth()
    beside = figure.add_axes((1 + 0.2 / width, 0.1, 0.15 / width, 0.8))
    figure.colorbar(image, cax=beside, label="share of the actual class")
    figure.savefig(file, dpi=110, bbox_inches="tight", pad_inches=0.12)


def draw_reliability(file: pathlib.Path, bins: Sequence[tuple[float, float, float, float, int]]) -> None:
    """Accuracy in bins of confidence against the diagonal of perfect calibration; below, where the examples lie."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    there = [row for row in bins if row[4]]
    total = sum(row[4] for row in there)
    error = sum(row[4] / total * abs(row[3] - row[2]) for row in there)
    left, width = [row[0] for row in there], [row[1] - row[0] for row in there]
    above.bar(
        left, [row[3] for row in there], width, align="edge", color="tab:blue", alpha=0.55, edgecolor="white", label="accuracy"
    )
    above.plot([0, 1], [0, 1], color="tab:gray", linestyle="--", linewidth=1, label="as confident as right")
    above.plot(
        [row[2] for row in there], [row[3] for row in there], "o", color="tab:blue", markersize=4, label="at the mean confidence"
    )
    above.set(title=f"expected calibration error {error:.3f}", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    above.legend(frameon=False, loc="upper left")
    below.bar(left, [row[4] / total for row in there], width, align="edge", color="tab:gray", edgecolor="white")
    below.set(xlabel="confidence", ylabel="share of\nexamples")
    for axes in (above, below):
        axes.grid(alpha=0.25)
    figure.savefig(file, dpi=110)


def draw_curve(file: pathlib.Path, rows: Rows) -> None:
    """Training and held-out loss over the steps and, beside it, every other number of the evaluations."""
    from matplotlib.figure import Figure

    evals = [row for row in rows if row["kind"] == "eval"]
    names = {
        name: None
        for row in evals
        for name, value in row.items()
        if isinstance(value, int | float) and name not in ("step", "loss")
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, others = figure.subplots(1, 2)
    lines = [(loss, "train", "loss", "training"), (loss, "eval", "loss", "held out"), *((others, "eval", n, n) for n in names)]
    for axes, kind, name, label in lines:
        points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and row.get(name) is not None]
        if points:
            dots: dict[str, Any] = {"marker": "o", "markersize": 4} if kind == "eval" else {}
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, **dots)
    for axes, title in ((loss, "loss"), (others, "held-out scores")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


# --- names in pictures -----------------------------------------------------------------------


def _flat(text: str) -> str:
    return " ".join(text.split()) or '""'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _names(labels: Sequence[str]) -> list[str]:
    """The labels as a picture can show them: cut, or their number where no font here has their letters."""
    return [_cut(label, 28) if _drawable(label) else f"class {i}" for i, label in enumerate(labels)]


def _legend(labels: Sequence[str]) -> str:
    """The names of the classes that the picture calls by number."""
    missing = [(f"class {i}", label) for i, label in enumerate(labels) if not _drawable(label)]
    return table_of(missing, ["in the picture", "label"])


@functools.cache
def _fonts() -> list[str]:
    from matplotlib import font_manager

    there = set(font_manager.get_font_names())
    return [name for name in _FONTS if name in there]


@functools.cache
def _letters() -> frozenset[int]:
    """Every code point that one of the fonts can draw."""
    from matplotlib import font_manager

    return frozenset(itertools.chain.from_iterable(font_manager.get_font(font_manager.findfont(n)).get_charmap() for n in _fonts()))


def _drawable(label: str) -> bool:
    return all(ord(char) in _letters() for char in label)
