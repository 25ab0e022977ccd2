"""What happened, newest last: a bounded ring that `oepy events` reads and follows.

Field names are fixed (docs/architecture.md): peer, group, reason, spi_in, gateway, seconds … Never a secret.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from typing import Any

MAX_EVENTS = 5000
MAX_FOLLOWERS = 32
MAX_BACKLOG = 1000  # of one follower; a slow one loses the oldest and is told how many

Event = dict[str, Any]


class Journal:
    """Time comes from `wall_clock` (seconds since the epoch); `on_alert` is called for what needs an eye."""

    def __init__(
        self, wall_clock: Callable[[], float], on_event: Callable[[Event], None] | None = None
    ) -> None:
        self._clock = wall_clock
        self._on_event = on_event
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._followers: set[asyncio.Queue[Event]] = set()
        self._number = 0
        self.counts: Counter[str] = Counter()
        self.last_alerts: deque[Event] = deque(maxlen=10)

    def add(self, event: str, alert: bool = False, **fields: object) -> None:
        self._number += 1
        entry: Event = {"number": self._number, "time": round(self._clock(), 6), "event": event, **fields}
        if alert:
            entry["alert"] = True
            self.last_alerts.append(entry)
        self.counts[event] += 1
        self._events.append(entry)
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(entry)
        if self._on_event is not None:
            self._on_event(entry)

    def recent(self, limit: int = MAX_EVENTS) -> list[Event]:
        return list(self._events)[-limit:]

    async def follow(self) -> AsyncIterator[Event]:
        """Events from now on. Raises RuntimeError when too many follow already."""
        if len(self._followers) >= MAX_FOLLOWERS:
            raise RuntimeError(f"{MAX_FOLLOWERS} followers already")
        queue: asyncio.Queue[Event] = asyncio.Queue(MAX_BACKLOG)
        self._followers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)
