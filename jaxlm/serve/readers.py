"""Threads that read requests: what a client can make long is done neither in the event loop nor in the engine's thread."""

import asyncio
import concurrent.futures
import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from jaxlm.serve.fields import bad

T = TypeVar("T")


class Client(NamedTuple):
    """Whose requests take turns with those of others: an address, and a user that it names, which it may invent."""

    address: str
    user: str = ""


NOBODY = Client("")


class Readers:
    """A pool of threads of which one address has only some, and of those each user that its requests name: slow requests (long
    prompts and conversations, grammars that are large to compile) leave threads to the others."""

    def __init__(self, threads: int = 8, address: int = 6, user: int = 2, seconds: float = 30.0):
        """An address has at most `address` of the `threads` at a time, and each of its users `user`; reading one request may take
        `seconds`, waiting included."""
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="reader")
        self._address, self._user, self._seconds = address, user, seconds
        self._gates: weakref.WeakValueDictionary[tuple[str, ...], asyncio.Semaphore] = weakref.WeakValueDictionary()

    async def run(self, client: Client, function: Callable[..., T], *args: object) -> T:
        """`function(*args)` in a thread. ApiError where it takes too long."""
        loop = asyncio.get_running_loop()
        gates = (self._gate(client, self._user), self._gate((client.address,), self._address))
        try:
            async with asyncio.timeout(self._seconds), contextlib.AsyncExitStack() as held:
                for gate in gates:
                    await gate.acquire()
                    held.callback(gate.release)
                future = self._pool.submit(_run, function, *args)
                # A thread that is given up goes on: only then may the client have another one.
                held.pop_all()
                future.add_done_callback(lambda _: _release(loop, gates))
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise bad(
                f"the request takes more than {self._seconds:g} s to read: give shorter texts or a simpler grammar",
                code="request_too_complex",
            ) from None

    def _gate(self, key: tuple[str, ...], size: int) -> asyncio.Semaphore:
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = asyncio.Semaphore(size)
        return gate

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _run(function: Callable[..., T], *args: object) -> T:
    """`function(*args)`; a panic of a library in Rust, which is no Exception, becomes a RuntimeError."""
    try:
        return function(*args)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(repr(error)[:300]) from error


def _release(loop: asyncio.AbstractEventLoop, gates: Sequence[asyncio.Semaphore]) -> None:
    for gate in gates:
        if not loop.is_closed():
            loop.call_soon_threadsafe(gate.release)
