"""What a person sees while something runs: lines, bars and tables on one shared console."""

import collections
import contextlib
import functools
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxlm.text_files import well_formed


@functools.cache
def console() -> Any:
    """The one rich console; a test or a second process may silence it with `console().quiet`."""
    import rich.console

    return rich.console.Console(highlight=False, soft_wrap=True)


def say(text: str = "") -> None:
    """One line for the person, printed above any live bar. Text is shown as it is, without markup."""
    console().print(well_formed(text), markup=False)


def warn(text: str) -> None:
    """One line on standard error, so that it is not part of a text that a command writes."""
    if not console().quiet:
        print(f"warning: {well_formed(text)}", file=sys.stderr)


class Bar(Protocol):
    """A running bar: `advance` moves it, `fields` are the figures shown beside it."""

    def advance(self, by: int = 1, **fields: str) -> None: ...


class RemainingTime:
    """Estimate of the remaining time: the median time of recent steps, which a few that compile or evaluate do not move."""

    RECENT, FEWEST = 101, 5

    def __init__(self) -> None:
        self._last: float | None = None
        self._took: collections.deque[float] = collections.deque(maxlen=self.RECENT)

    def advance(self, by: int, left: int) -> str:
        """` · TIME left` after `by` more units with `left` to go; nothing as long as too few steps were timed."""
        now = time.monotonic()
        if self._last is not None and by > 0:
            self._took.append((now - self._last) / by)
        self._last = now
        if left <= 0:
            return " · 0 s left"
        if len(self._took) < self.FEWEST:
            return ""
        return f" · {seconds(statistics.median(self._took) * left)} left"


class _Plain:
    """Lines for a log file: at most one each `every` seconds, and one at the end."""

    def __init__(self, title: str, total: int, unit: str, start: int, every: float = 5.0):
        self.title, self.total, self.unit, self.every = title, total, unit, every
        self.done, self.last, self.shown = start, time.monotonic(), ""
        self.remaining = RemainingTime()

    def advance(self, by: int = 1, **fields: str) -> None:
        self.done += by
        if fields:
            self.shown = "".join(f" · {name} {value}" for name, value in fields.items())
        left = self.remaining.advance(by, self.total - self.done)
        now = time.monotonic()
        if now - self.last < self.every and self.done < self.total:
            return
        self.last = now
        say(f"{self.title} {self.done:,}/{self.total:,} {self.unit}{self.shown}{left}")


class _Live:
    """A rich progress bar; `fields` replace the ones shown before."""

    def __init__(self, progress: Any, task: Any, left: int):
        self.progress, self.task, self.left = progress, task, left
        self.remaining = RemainingTime()

    def advance(self, by: int = 1, **fields: str) -> None:
        self.left -= by
        text = {"figures": " · ".join(f"{k} {v}" for k, v in fields.items())} if fields else {}
        self.progress.update(self.task, advance=by, left=self.remaining.advance(by, self.left), **text)


@contextlib.contextmanager
def bar(title: str, total: int, unit: str = "", start: int = 0) -> Iterator[Bar]:
    """A progress bar on a terminal, plain lines elsewhere.

    `total` and `start` are in `unit`s; call `advance(n, loss="3.1")` to move and to show figures.
    """
    if not console().is_terminal:
        yield _Plain(title, total, unit, start)
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[unit]} · {task.fields[figures]}" if unit else "{task.fields[figures]}"),
        progress.TextColumn("{task.fields[left]}"),
    )
    with progress.Progress(*columns, console=console(), transient=True) as live:
        task = live.add_task(title, total=total, completed=start, unit=unit, figures="", left="")
        yield _Live(live, task, total - start)


def command(*words: object) -> str:
    """A command that a person may paste into a shell: every word quoted where it has to be, whatever text it holds."""
    shown = ("".join(c if c.isprintable() else " " for c in str(word)) for word in words)  # no line ends, no control sequences
    return shlex.join(shown)


def option(name: str, value: object) -> tuple[str, ...]:
    """The words of an option for `command`: one word where the value would itself be read as an option."""
    return (f"--{name}={value}",) if str(value).startswith("--") else (f"--{name}", str(value))


def table(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Rows of the same keys as a table."""
    import rich.box
    import rich.table

    drawn = rich.table.Table(title=title or None, box=rich.box.SIMPLE, title_justify="left")
    for name in rows[0] if rows else ():
        drawn.add_column(name)
    for row in rows:
        drawn.add_row(*(str(value) for value in row.values()))
    console().print(drawn)


def seconds(value: float) -> str:
    """A duration for a person: 7 s, 2 m 05 s, 3 h 20 m."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def count(value: float) -> str:
    """A large number for a person: 950, 12.3k, 4.5M, 70.6B."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{suffix}"
    return f"{value:.0f}"
