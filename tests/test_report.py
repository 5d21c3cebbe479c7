"""What is recorded and shown: rows that survive a crash, a page that stands alone, figures a person can read."""

import json
import math
import subprocess
import time

import pytest

from jaxlm.report import Page, Record, Verdict, bar, command, count, option, seconds, write_page
from jaxlm.report.console import _Plain, console
from jaxlm.report.record import read_rows


def test_a_record_reopened_at_a_step_drops_what_came_after(tmp_path):
    record = Record(tmp_path)
    for step in (1, 2, 3):
        record.write("train", step, loss=1.0 / step)
    record.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')  # cut off by a crash
    again = Record(tmp_path, step=2)
    again.write("train", 3, loss=9.0)
    again.close()
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_rows_are_json_even_where_a_number_is_not(tmp_path):
    record = Record(tmp_path)
    record.write("train", 1, loss=math.nan, grad_norm=math.inf, text="naïve ✓")
    record.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"kind": "train", "step": 1, "loss": None, "grad_norm": None, "text": "naïve ✓"}


def test_numbers_reach_tensorboard(tmp_path):
    record = Record(tmp_path)
    record.write("train", 5, loss=2.5)
    record.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    from tensorboardX.proto.event_pb2 import Event

    raw, values, at = file.read_bytes(), {}, 0
    while at < len(raw):  # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(raw[at : at + 8], "little")
        event = Event.FromString(raw[at + 12 : at + 12 + size])
        values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += 16 + size
    assert values == {("train/loss", 5): 2.5}


def test_the_page_escapes_what_a_model_writes(tmp_path):
    rows = [
        {"kind": "train", "step": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 5.0},
        {"kind": "eval", "step": 1, "loss": 2.0, "bits_per_byte": 3.0},
        {"kind": "sample", "step": 1, "text": "<script>alert('```')</script>"},
    ]
    write_page(tmp_path, Page("t<i>ny", {"a": "<b>"}, Verdict("fine"), {"xz -9": 2.5}, ["jaxlm generate x"], "seed: 0"), rows)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "t&lt;i&gt;ny" in page
    assert "````" in (tmp_path / "samples.md").read_text(), "the fence is longer than any in the text"


def test_a_run_without_rows_still_has_a_page(tmp_path):
    write_page(tmp_path, Page("empty", {}), [])
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("value, text", [(7.4, "7 s"), (125, "2 m 05 s"), (12_000, "3 h 20 m")])
def test_durations(value, text):
    assert seconds(value) == text


@pytest.mark.parametrize("value, text", [(950, "950"), (12_345, "12.3k"), (4_500_000, "4.5M"), (70.6e9, "70.6B")])
def test_counts(value, text):
    assert count(value) == text


def test_the_time_left_is_not_that_of_compiling(capsys, monkeypatch):
    """The first and the third of 1,001 steps compile for a minute each, the others take a tenth of a second: 99 s are left after
    eleven, not hours."""
    monkeypatch.setattr(_Plain.__init__, "__defaults__", (0.0,))
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with bar("training", 1001, "steps") as shown:
        for took in (60.0, 0.1, 60.0, *[0.1] * 8):
            now += took
            shown.advance()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [f"training {step}/1,001 steps" for step in range(1, 6)], "too few steps to tell"
    assert lines[-1] == "training 11/1,001 steps · 1 m 39 s left"


@pytest.mark.parametrize(
    "text",
    [
        "$(touch here)", "`touch here`", "it's \"fine\"; touch here", "a\ntouch here", "--file x & touch here", "!!touch here",
        "\x1b[2J$(touch here)",
    ],
)  # fmt: skip
def test_a_command_may_be_pasted_whatever_text_it_holds(text, tmp_path):
    """Pasted into bash nothing of the text is executed, and the program gets the text, control characters as spaces."""
    line = command("printf", "%s\\n", *option("text", text))
    assert "\n" not in line
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not list(tmp_path.iterdir()), "something of it was executed"
    shown = text.replace("\n", " ").replace("\x1b", " ")
    assert done.stdout == (f"--text={shown}\n" if text.startswith("--") else f"--text\n{shown}\n")


def test_a_page_heads_only_texts_as_writing(tmp_path):
    rows = [{"kind": "sample", "step": 1, "text": "a film → good"}]
    for writes, head in ((True, "What it writes"), (False, "What it predicts")):
        write_page(tmp_path, Page("run", {}, writes=writes), rows)
        assert f"<h2>{head}</h2>" in (tmp_path / "report.html").read_text()


def test_a_bar_is_plain_lines_off_a_terminal_and_keeps_its_figures(capsys, monkeypatch):
    monkeypatch.setattr(_Plain.__init__, "__defaults__", (0.0,))  # a line for each step
    assert not console().is_terminal
    with bar("training", 3, "steps") as shown:
        shown.advance(1, loss="2.00")
        shown.advance(2)
    out = capsys.readouterr().out
    assert "training 1/3 steps · loss 2.00" in out and "training 3/3 steps · loss 2.00 · 0 s left" in out
