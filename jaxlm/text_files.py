"""Text files: decompress, decode, split into lines; read and write JSON lines.

Every file of texts goes through this module, so a line means the same everywhere: it ends at LF or CRLF. U+2028, U+0085, form
feeds and a lone CR are text; only a file whose first block holds CR and no LF has lines that end at CR (classic Mac OS).

Encodings: the one that is named, else UTF-16 or UTF-32 where the file begins with their byte-order mark (or every second byte of
its first block is 0), else UTF-8 with or without one.
"""

import codecs
import contextlib
import io
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

PACKED = (".gz", ".zst")

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_ESCAPED = re.compile("[\udc80-\udcff]")  # how Python's "surrogateescape" keeps a byte that cannot be decoded
_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """The text with each lone surrogate replaced by `?`: such a text has no UTF-8, and Rust libraries refuse it."""
    return text if text.isascii() else _SURROGATE.sub("?", text)


def well_formed_tree(value: Any) -> Any:
    """A JSON value with `well_formed` applied to every string in it."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, list):
        return [well_formed_tree(item) for item in value]
    if isinstance(value, dict):
        return {well_formed_tree(key): well_formed_tree(item) for key, item in value.items()}
    return value


# --- reading ----------------------------------------------------------------------------------


@contextlib.contextmanager
def open_binary(file: pathlib.Path) -> Iterator[Any]:
    """The bytes of a file, decompressed. Anything wrong with them while they are read is a ValueError of one line."""
    with contextlib.ExitStack() as stack:
        raw: Any = stack.enter_context(file.open("rb"))
        if file.suffix.lower() == ".gz":
            import gzip

            raw = stack.enter_context(gzip.GzipFile(fileobj=raw))
        elif file.suffix.lower() == ".zst":
            import zstandard

            raw = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
        try:
            yield raw
        except UnicodeDecodeError as error:
            where = (
                f"byte {error.start} is {error.object[error.start]:#04x}" if error.start < len(error.object) else "it is cut off"
            )
            raise ValueError(f"{file} is not {_spelt(error.encoding)} text: {where}") from None
        except ValueError:
            raise
        except Exception as error:  # a damaged archive: gzip, zlib and zstandard each have errors of their own
            raise ValueError(f"{file} cannot be read: {error}") from None


@contextlib.contextmanager
def open_text(file: pathlib.Path, encoding: str | None = None, *, strict: bool = False) -> Iterator[io.TextIOWrapper]:
    """The text of a file without its byte-order mark; iterating gives lines with their ends.

    Bytes that are not valid in UTF-8 or a named encoding are kept as escapes, which `undecodable` finds: they spoil their
    line and not the file, unless `strict`. Raises ValueError for an encoding that does not exist.
    """
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ValueError(
                f"unknown encoding {encoding!r}: expected one that Python knows, such as utf-8, latin-1 or gb18030"
            ) from None
    with open_binary(file) as raw:
        head = bytes(raw.peek(8192)[: 1 << 16])
        marked = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None) or _unmarked_utf16(head)
        named = encoding if encoding and codecs.lookup(encoding).name != "utf-8" else None
        chosen = named or marked or "utf-8-sig"
        errors = "strict" if strict else "replace" if chosen == marked else "surrogateescape"
        start = head.decode(chosen, "ignore")
        newline = "\r" if "\r" in start.removesuffix("\r") and "\n" not in start else "\n"
        yield io.TextIOWrapper(raw, encoding=chosen, errors=errors, newline=newline)


def _unmarked_utf16(head: bytes) -> str | None:
    """UTF-16 without a byte-order mark, where half of the bytes are 0 at odd or at even places and none at the others."""
    odd, even = head[1::2].count(0), head[::2].count(0)
    if min(odd, even) > 0 or max(odd, even) < max(len(head) // 4, 1):
        return None
    return "utf-16-le" if odd else "utf-16-be"


def read_lines(file: pathlib.Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """Lines without their ends, numbered from 1. An end of line at the end of the file begins no further line."""
    with open_text(file, encoding) as text:
        for number, line in enumerate(text, 1):
            yield number, line.removesuffix("\n").removesuffix("\r")


def read_text(file: pathlib.Path, encoding: str | None = None) -> str:
    """The whole text with its line ends as they are. Raises ValueError where it cannot be decoded."""
    with open_text(file, encoding, strict=True) as text:
        return text.read()


def undecodable(text: str, encoding: str | None = None) -> str | None:
    """Why a text from `open_text` could not be decoded ("is not UTF-8: byte 0xe9"), or None where it could."""
    match = None if text.isascii() else _ESCAPED.search(text)
    return f"is not {_spelt(encoding)}: byte {ord(match[0]) - 0xDC00:#04x}" if match else None


def _spelt(encoding: str | None) -> str:
    name = codecs.lookup(encoding or "utf-8").name
    return "UTF-8" if name in ("utf-8", "utf-8-sig") else name


# --- JSON lines -------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """A JSON value; half a surrogate pair (`\\ud83d` alone) becomes `?`. Raises ValueError; RecursionError if nested too deep."""
    value = json.loads(text)
    return well_formed_tree(value) if "\\u" in text else value


def json_line(value: Any) -> str:
    """A value as one line of JSON with its end. Lone surrogates become `?`; what JSON does not know is written as text."""
    return well_formed(json.dumps(value, ensure_ascii=False, default=str)) + "\n"


def write_json_lines(file: pathlib.Path, values: Iterable[Any]) -> None:
    """Write one JSON value per line, ended by LF on every platform."""
    with file.open("w", encoding="utf8", newline="\n") as out:
        out.writelines(map(json_line, values))
