"""Who waits, and who is next: owners take turns, so that one who asks for much does not keep the others waiting."""

import collections
import itertools
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Things that wait, in a queue for each owner. Not for several threads at once."""

    def __init__(self) -> None:
        self._queues: dict[str, collections.deque[T]] = {}
        """Whose turn it is stands first."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def put(self, owner: str, thing: T) -> None:
        """Behind all others of this owner."""
        self._queues.setdefault(owner, collections.deque()).append(thing)

    def take(self) -> T:
        """The next one; its owner's turn comes again after everybody else's. Somebody must wait."""
        owner = next(iter(self._queues))
        queue = self._queues.pop(owner)
        thing = queue.popleft()
        if queue:
            self._queues[owner] = queue
        return thing

    def discard(self, owner: str, thing: T) -> bool:
        """Let it wait no longer; False where it does not wait."""
        queue = self._queues.get(owner)
        if queue is None or thing not in queue:
            return False
        queue.remove(thing)
        if not queue:
            del self._queues[owner]
        return True

    def clear(self) -> list[T]:
        """All that waited."""
        queues = list(self._queues.values())
        self._queues.clear()
        return list(itertools.chain.from_iterable(queues))
