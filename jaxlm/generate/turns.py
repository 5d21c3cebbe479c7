"""Fair request queue: round-robin over clients, and over the users of each, so no client can starve the rest."""

import collections
from typing import Generic, TypeVar

T = TypeVar("T")


class FairRequestQueue(Generic[T]):
    """Waiting items by client and user: a client that names many users has no more turns than one that names none.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._clients: dict[str, dict[str, collections.deque[T]]] = {}
        """The client and the user whose turn is next come first."""

    def __len__(self) -> int:
        return sum(map(self.count, self._clients))

    def __bool__(self) -> bool:
        return bool(self._clients)

    def count(self, client: str) -> int:
        """Number of this client's items."""
        return sum(map(len, self._clients.get(client, {}).values()))

    def share(self, size: int) -> int:
        """A client's part of `size` places, with one more client than those that wait."""
        return size // (len(self._clients) + 1)

    def put(self, client: str, item: T, user: str = "") -> None:
        """Add an item behind all others of its client's user."""
        self._clients.setdefault(client, {}).setdefault(user, collections.deque()).append(item)

    def take(self) -> T:
        """Remove and return the next item; the queue must not be empty."""
        client = next(iter(self._clients))
        users = self._clients.pop(client)
        user = next(iter(users))
        items = users.pop(user)
        item = items.popleft()
        if items:
            users[user] = items
        if users:
            self._clients[client] = users
        return item

    def discard(self, client: str, item: T, user: str = "") -> bool:
        """Remove an item; False if it is not in the queue."""
        users = self._clients.get(client, {})
        if item not in users.get(user, ()):
            return False
        users[user].remove(item)
        if not users[user]:
            del users[user]
        if not users:
            del self._clients[client]
        return True

    def clear(self) -> list[T]:
        """Remove and return all items."""
        items = [item for users in self._clients.values() for items in users.values() for item in items]
        self._clients.clear()
        return items
