"""Fingerprint of a model's files, by which what was computed from a model is known to fit it."""

import hashlib
import pathlib
from collections.abc import Iterable

BLOCKS, BLOCK_BYTES = 256, 4096
"""Of a large file that many blocks are read, evenly spread: 1 MiB. Training changes nearly all bytes of a model."""


def fingerprint_files(root: pathlib.Path, files: Iterable[pathlib.Path]) -> str:
    """Hash of names below `root`, sizes and contents: of small files the whole, of large ones evenly spread blocks.

    Times of change play no part, so that a copy of a folder has the fingerprint of the original.
    """
    whole = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        size = file.stat().st_size
        whole.update(f"{file.relative_to(root)}\0{size}\0".encode())
        with file.open("rb") as raw:
            if size <= BLOCKS * BLOCK_BYTES:
                whole.update(raw.read())
                continue
            for i in range(BLOCKS):
                raw.seek((size - BLOCK_BYTES) * i // (BLOCKS - 1))
                whole.update(raw.read(BLOCK_BYTES))
    return whole.hexdigest()
