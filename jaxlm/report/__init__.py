"""What a person sees: lines and bars while it runs, a record of what happened, a page to read afterwards."""

from jaxlm.report.console import Bar, bar, command, count, option, say, seconds, table, warn
from jaxlm.report.page import Page, Verdict, write_page
from jaxlm.report.record import Record, read_rows
from jaxlm.report.scores import write_scores

__all__ = [
    "Bar",
    "Page",
    "Record",
    "Verdict",
    "bar",
    "command",
    "count",
    "option",
    "read_rows",
    "say",
    "seconds",
    "table",
    "warn",
    "write_page",
    "write_scores",
]
