"""Steps of work on disk: ranges of bounded size, finished by a rename, done by one process at a time."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator

import numpy as np

from jaxlm.report import say


@contextlib.contextmanager
def finished(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to; it becomes `file` (or folder) in one rename, and only when nothing went wrong."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    yield unfinished
    if unfinished.is_file():
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
    unfinished.replace(file)


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a folder: two processes that start at once build it once."""
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"Waiting for the process that is building {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def ranges(chunks: Iterable[np.ndarray], size: int) -> Iterator[tuple[int, int]]:
    """Split consecutive items into ranges [first, stop) whose items begin within the same multiple of `size`.

    `chunks` are the items' sizes, a bounded number at a time, so that memory does not grow with the number of items.
    """
    first = start = total = before = 0
    for sizes in chunks:
        ends = total + np.cumsum(sizes)
        bins = np.concatenate([[total], ends[:-1]]) // size
        for edge in (start + np.flatnonzero(np.diff(bins, prepend=before))).tolist():
            if edge > first:
                yield first, edge
                first = edge
        start, before, total = start + len(sizes), int(bins[-1]), int(ends[-1])
    if first < start:
        yield first, start
