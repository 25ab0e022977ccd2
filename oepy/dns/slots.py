"""A bound on the questions that are open at once, shared so that one slow zone never keeps others waiting.

Questions are counted by neighbourhood: some labels of their names, about what one set of name servers answers for.
When all slots are taken, a newcomer of a smaller neighbourhood takes the place of the oldest question of the
largest; those of the largest wait for each other. Pure, but for the callbacks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from oepy.dns.message import NameKey, Question

YIELD_SECONDS = 0.2  # a question this young never gives way
_ARPA = b"arpa"
# Labels with the root: x.y.in-addr.arpa, the eight nibbles of a /32 below ip6.arpa, two labels elsewhere
_LABELS = {b"in-addr": 5, b"ip6": 11}
_PLAIN = 3


def neighbourhood(question: Question) -> NameKey:
    key = question.key
    if len(key) > 3 and key[-2] == _ARPA:
        return key[-_LABELS.get(key[-3], _PLAIN) :]
    return key[-_PLAIN:]


@dataclass(eq=False, slots=True)
class Ticket:
    """A question that has a slot (`since` a time) or waits for one. `on_enter` is called when it gets one,
    `on_evict` when it must give it up."""

    area: NameKey
    on_enter: Callable[[], None]
    on_evict: Callable[[], None]
    since: float = 0.0  # 0 while it waits


class Slots:
    """Times are seconds on one clock."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[NameKey, OrderedDict[Ticket, None]] = {}
        self._waiting: dict[NameKey, OrderedDict[Ticket, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def enter(self, ticket: Ticket, now: float) -> float:
        """0.0 where it has a slot now. Else it waits: `on_enter` comes when its turn does, and calling this again
        after so many seconds may gain it a slot before. `leave` is needed in any case."""
        if ticket.since:
            return 0.0
        if self._count >= self._limit:
            patience = self._evict_for(ticket.area, now)
            if patience:
                self._waiting.setdefault(ticket.area, OrderedDict())[ticket] = None
                return patience
        _discard(self._waiting, ticket)
        self._take(ticket, now)
        return 0.0

    def leave(self, ticket: Ticket, now: float) -> None:
        """It is answered, evicted or given up. The next enters, of the neighbourhood with the fewest open."""
        if _discard(self._waiting, ticket) or not _discard(self._open, ticket):
            return
        self._count -= 1
        if self._waiting:
            area = min(self._waiting, key=lambda area: len(self._open.get(area, ())))
            entering = next(iter(self._waiting[area]))
            _discard(self._waiting, entering)
            self._take(entering, now)
            entering.on_enter()

    def _take(self, ticket: Ticket, now: float) -> None:
        ticket.since = now
        self._open.setdefault(ticket.area, OrderedDict())[ticket] = None
        self._count += 1

    def _evict_for(self, area: NameKey, now: float) -> float:
        """0.0 where a slot is free now; else the seconds after which one may be made so."""
        largest = max(self._open.values(), key=len)
        if len(largest) <= len(self._open.get(area, ())) + 1:
            return math.inf
        oldest = next(iter(largest))
        if (patience := oldest.since + YIELD_SECONDS - now) > 0:
            return patience
        _discard(self._open, oldest)
        self._count -= 1
        oldest.on_evict()
        return 0.0


def _discard(tickets: dict[NameKey, OrderedDict[Ticket, None]], ticket: Ticket) -> bool:
    held = tickets.get(ticket.area)
    if held is None or ticket not in held:
        return False
    del held[ticket]
    if not held:
        del tickets[ticket.area]
    return True
