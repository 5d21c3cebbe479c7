"""Steps of work on disk: finished by a rename, done by one process at a time."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

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
