"""Text files: lines end at LF and CRLF alone; encodings; JSON lines survive any text."""

import json
import pathlib

import pytest

from jaxlm.report.record import Record, read_rows
from jaxlm.text_files import json_line, open_text, parse_json, read_lines, read_text, undecodable, write_json_lines

NO_LINE_ENDS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e"  # where str.splitlines cuts a text


def lines(file: pathlib.Path, encoding=None) -> list[str]:
    found = list(read_lines(file, encoding))
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    return [line for _, line in found]


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (f"a{NO_LINE_ENDS}b\nc\n".encode(), [f"a{NO_LINE_ENDS}b", "c"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\rb\nc", ["a\rb", "c"]),  # a lone CR is text where lines end at LF
        (b"a\rb\rc\r", ["a", "b", "c"]),  # and ends a line where nothing else does
        (b"a\n\n \nb\n\n", ["a", "", " ", "b", ""]),
        (b"\xef\xbb\xbfa\nb", ["a", "b"]),
        (b"", []),
        (b"\n", [""]),
    ],
)
def test_lines_end_at_lf_and_crlf_alone(tmp_path, raw, wanted):
    (tmp_path / "a.txt").write_bytes(raw)
    assert lines(tmp_path / "a.txt") == wanted


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding):
    text = "caf\u00e9 \U0001f98a\r\n\u4f60\u597d\u2028\n"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert lines(tmp_path / "a.txt") == ["caf\u00e9 \U0001f98a", "\u4f60\u597d\u2028"]
    assert read_text(tmp_path / "a.txt") == text


def test_an_encoding_that_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("\u4f60\u597d\n".encode("gb18030"))
    assert lines(tmp_path / "a.txt", "gb18030") == ["\u4f60\u597d"]
    assert undecodable(lines(tmp_path / "a.txt")[0]) == "is not UTF-8: byte 0xc4"
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 0 is 0xc4"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="unknown encoding 'klingon'"), open_text(tmp_path / "a.txt", "klingon"):
        pass


def test_half_a_surrogate_pair_never_stops_a_reader_or_a_writer(tmp_path):
    assert parse_json('{"a": ["x \\ud83d", {"\\udc00": "\\ud83e\\udd8a"}]}') == {"a": ["x ?", {"?": "\U0001f98a"}]}
    assert json.loads(json_line({"a": "x \ud83d"})) == {"a": "x ?"}
    write_json_lines(tmp_path / "a.jsonl", [{"a": NO_LINE_ENDS}, {"a": "\ud83d"}])
    assert [json.loads(line) for line in lines(tmp_path / "a.jsonl")] == [{"a": NO_LINE_ENDS}, {"a": "?"}]


def test_a_record_keeps_every_row_when_it_is_opened_again(tmp_path):
    """A sample with U+2028 cut its line in two, and everything behind it was deleted by rewriting the file."""
    record = Record(tmp_path)
    record.write("sample", 1, text=f"a{NO_LINE_ENDS}b")
    record.write("sample", 2, text="half an emoji \ud83d")
    record.write("eval", 3, loss=1.0)
    record.close()
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"kind": "eval", "st')  # a crash cut this line off
    Record(tmp_path, 3).close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["text"] == f"a{NO_LINE_ENDS}b" and rows[1]["text"] == "half an emoji ?"
