"""Whether the files of a Hugging Face tokenizer folder agree with the tokenizer that transformers makes of them.

transformers 5 may read a stale `tokenizer.json` where the vocabulary that the model was trained with is in an older file
(transformers#48967), or rebuild the tokenizer by a class that reads texts otherwise than `tokenizer.json` (#45701).
"""

import collections
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

VOCABULARIES = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model")
# Texts that tell apart how tokenizers treat case, accents, spaces, digits, punctuation, scripts and lines.
PROBES = (
    "Hello world", "the  naïve CAFÉ's 2,048 don't-stop!", "\tif x_1 == 3.14:\n    return [x]\n", "日本語の文章 and 中文",
    "Привет, мир 🎉",
)  # fmt: skip


def disagreements(folder: pathlib.Path, tokenizer: Any) -> Iterator[str]:
    """One line for each way in which the tokenizer that transformers made of a folder is not the one in its files.

    `tokenizer` is a fast tokenizer of transformers.
    """
    vocabulary: dict[str, int] = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    for name in VOCABULARIES:
        pieces = _read(folder / name)
        if pieces is None:
            continue
        # SentencePiece's ids may be shifted as a whole: fairseq's models have special tokens before them.
        shift = 0
        if name.endswith(".model"):
            shifts = collections.Counter(vocabulary[piece] - i for piece, i in pieces.items() if piece in vocabulary)
            shift = shifts.most_common(1)[0][0] if shifts else 0
        strange = [piece for piece, i in pieces.items() if vocabulary.get(piece) != i + shift]
        if strange:
            yield (
                f"{folder}: {len(strange):,} of the {len(pieces):,} entries of {name} (such as {strange[0]!r}) are missing from "
                f"the tokenizer that transformers opens, of {len(vocabulary):,} entries, or have another id: where tokenizer.json "
                "is stale, delete it"
            )
    yield from _other_merges(folder, tokenizer)
    yield from _other_ids(folder, tokenizer)


def _other_merges(folder: pathlib.Path, tokenizer: Any) -> Iterator[str]:
    file = folder / "merges.txt"
    if not file.is_file() or not (folder / "tokenizer.json").is_file():
        return
    definition = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    theirs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in definition.get("merges") or ()]
    lines = file.read_text(encoding="utf8").split("\n")
    ours = [tuple(line.strip("\r ").split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    if ours != theirs:
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        yield (
            f"{folder}: merges.txt has {len(ours):,} merges and tokenizer.json {len(theirs):,}, which differ from number "
            f"{first + 1:,} on: where tokenizer.json is stale, delete it"
        )


def _other_ids(folder: pathlib.Path, tokenizer: Any) -> Iterator[str]:
    """Compare the ids of some texts with those that `tokenizer.json` alone gives."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    import tokenizers

    alone = tokenizers.Tokenizer.from_file(str(file))
    for text in PROBES:
        expected = alone.encode(text, add_special_tokens=False)
        found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        if expected.ids != found.ids:
            yield (
                f"{folder}: transformers opens it as {type(tokenizer).__name__}, which reads {text!r} as {found.tokens[:8]}, and "
                f"tokenizer.json as {expected.tokens[:8]}: correct tokenizer_class in tokenizer_config.json"
            )
            return


def _read(file: pathlib.Path) -> Mapping[str, int] | None:
    """Entry → id of a vocabulary file; None where there is none, or where it is of another format."""
    if not file.is_file():
        return None
    if file.suffix == ".model":
        return _sentencepiece(file.read_bytes())
    try:
        text = file.read_text(encoding="utf8")
        if file.suffix == ".txt":
            lines = text.removesuffix("\n").split("\n")
            return {line.removesuffix("\r"): i for i, line in enumerate(lines) if line.strip("\r")}
        entries = json.loads(text)
    except ValueError:
        return None
    return entries if isinstance(entries, dict) and all(isinstance(i, int) for i in entries.values()) else None


def _sentencepiece(raw: bytes) -> dict[str, int] | None:
    """Ordinary pieces of a SentencePiece model: field 1 of its protobuf message holds them in the order of their ids.

    In each, field 1 is the text and field 3 the type (1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte).
    """
    try:
        pieces = [dict(_fields(piece)) for number, piece in _fields(raw) if number == 1]
        return {p[1].decode(): i for i, p in enumerate(pieces) if p.get(3, 1) in (1, 4, 6)} or None
    except (ValueError, KeyError, IndexError, AttributeError, TypeError):
        return None


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(raw):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"no protobuf message: wire type {kind}")
        size = {1: 8, 5: 4}.get(kind) or varint()
        if at + size > len(raw):
            raise ValueError("no protobuf message: it is cut short")
        yield number, raw[at : at + size]
        at += size
