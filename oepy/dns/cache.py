"""A bounded cache whose entries end; the clock is the caller's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MAX_TTL = 86400.0  # RFC 8767's advice for a cap is a week; keys should be seen to change sooner


class TtlCache(Generic[K, V]):
    """At most `limit` entries; the least recently used goes first. Times are seconds on one clock."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K, now: float) -> V | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] <= now:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return entry[1]

    def remaining(self, key: K, now: float) -> float:
        """Seconds that the entry has left, 0.0 where there is none."""
        entry = self._entries.get(key)
        return max(0.0, entry[0] - now) if entry else 0.0

    def put(self, key: K, value: V, ttl: float, now: float) -> None:
        """A `ttl` of 0 or less stores nothing."""
        self._entries.pop(key, None)
        if ttl <= 0:
            return
        self._entries[key] = (now + min(ttl, MAX_TTL), value)
        while len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def remove(self, key: K) -> None:
        """Whether it is there or not."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        self._entries.clear()
