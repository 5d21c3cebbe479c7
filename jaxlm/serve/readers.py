"""Threads that read requests: what a client can make long is done neither in the event loop nor in the engine's thread."""

import asyncio
import concurrent.futures
import weakref
from collections.abc import Callable
from typing import TypeVar

from jaxlm.serve.fields import bad

T = TypeVar("T")


class Readers:
    """A pool of threads of which one client has only some, so that its slow requests (long prompts and conversations, grammars that
    are large to compile) leave threads to the others."""

    def __init__(self, threads: int = 8, each: int = 2, seconds: float = 30.0):
        """A client has at most `each` of the `threads` at a time; reading one request may take `seconds`, waiting included."""
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="reader")
        self._each, self._seconds = each, seconds
        self._gates: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()

    async def run(self, client: str, function: Callable[..., T], *args: object) -> T:
        """`function(*args)` in a thread. ApiError where it takes too long."""
        loop = asyncio.get_running_loop()
        gate = self._gates.get(client)
        if gate is None:
            gate = self._gates[client] = asyncio.Semaphore(self._each)
        try:
            async with asyncio.timeout(self._seconds):
                await gate.acquire()
                future = self._pool.submit(function, *args)
                # A thread that is given up goes on: only then may the client have another one.
                future.add_done_callback(lambda _: _release(loop, gate))
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise bad(
                f"the request takes more than {self._seconds:g} s to read: give shorter texts or a simpler grammar",
                code="request_too_complex",
            ) from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _release(loop: asyncio.AbstractEventLoop, gate: asyncio.Semaphore) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(gate.release)
