"""Threads with a deep stack.

llguidance recurses as deep as a constraint is nested: a chain of some thousand rules overflows a stack of the usual 8 MiB, which
ends the whole process.
"""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
STACK = 512 << 20
"""Bytes of address space, of which only what is used takes memory: up to about 80 MB for what `constrain.LENGTH` admits."""
_LOCK = threading.Lock()


def start_deep(function: Callable[[], object], name: str) -> None:
    """Run a function in a daemon thread with a stack of `STACK` bytes. Raises RuntimeError where no thread can be started."""
    with _LOCK:  # the size holds for all threads that are started meanwhile
        usual = threading.stack_size(STACK)
        try:
            threading.Thread(target=function, name=name, daemon=True).start()
        finally:
            threading.stack_size(usual)


def on_deep_stack(function: Callable[[], T]) -> T:
    """The function's result, computed in such a thread; raises what the function raises."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    start_deep(run, "deep")
    return future.result()
