"""What all sessions of one endpoint share: settings, time, outbox, questions, counters, timers."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from oepy.ike.cookies import CookieJar
from oepy.ike.events import Datagram, IkeEvent, Question
from oepy.ike.settings import IkeSettings
from oepy.model import Endpoint, IpAddress, PeerIdentity

if TYPE_CHECKING:
    from oepy.ike.child import ChildSa
    from oepy.ike.flow import Flow
    from oepy.ike.session import Session

K = TypeVar("K")
HalfOpenKey = tuple[Endpoint, bytes]
SettingsFor = Callable[[Endpoint, Endpoint], IkeSettings]


Prefix = tuple[int, int]
"""IP version, and the bits of an IPv4 /24 or an IPv6 /56."""


def prefix_of(address: IpAddress) -> Prefix:
    """The network whose half-open sessions are counted together."""
    return address.version, int(address) >> (8 if address.version == 4 else 72)


class Context:
    """`now` is set at every entry into the endpoint and is the same for all that one call causes."""

    def __init__(
        self, settings: IkeSettings, random: Callable[[int], bytes], settings_for: SettingsFor | None = None
    ) -> None:
        self.settings = settings
        self.settings_for: SettingsFor = settings_for or (lambda _, __: settings)
        self.random = random
        self.now = 0.0
        self.counters: Counter[str] = Counter()
        self.events: list[IkeEvent] = []
        self.datagrams: list[Datagram] = []
        self.cookies = CookieJar(random)
        self.by_spi: dict[bytes, Session] = {}
        self.by_number: dict[int, Session] = {}
        # Established ones, in this order. Behind one address (a NAT) and one identity there may be thousands
        self.by_remote: dict[IpAddress, dict[Session, None]] = {}
        self.by_identity: dict[PeerIdentity, dict[Session, None]] = {}
        self.by_child: dict[int, int] = {}  # our inbound ESP SPI → session number
        self._alike: dict[int, tuple[int, ...]] = {}  # inbound ESP SPIs by ChildSa.likeness
        self.half_open: dict[HalfOpenKey, Session] = {}
        self.half_open_of: Counter[Prefix] = Counter()
        self.questions: dict[int, Flow] = {}
        self._next_number = 0
        self._next_token = 0
        self._heap: list[tuple[float, int, bytes]] = []
        self._sequence = 0

    # ---- identifiers ----

    def new_number(self) -> int:
        self._next_number += 1
        return self._next_number

    def new_spi(self) -> bytes:
        while True:
            spi = self.random(8)
            if spi not in self.by_spi and any(spi):
                return spi

    # ---- output ----

    def emit(self, event: IkeEvent) -> None:
        self.events.append(event)

    def send(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        self.datagrams.append(Datagram(local, remote, data))

    def ask(self, flow: Flow, question: Question) -> int:
        self._next_token += 1
        self.questions[self._next_token] = flow
        object.__setattr__(question, "token", self._next_token)  # frozen, but nobody else has it yet
        self.events.append(question)
        return self._next_token

    def jitter(self, seconds: float, part: float) -> float:
        """`seconds`, shortened by a random part of the fraction `part`."""
        return seconds * (1.0 - part * int.from_bytes(self.random(2), "big") / 65536.0)

    # ---- tables ----

    def add(self, session: Session) -> None:
        self.by_spi[session.spi_own] = session
        self.by_number.setdefault(session.number, session)  # a rekeyed SA keeps its place for now

    def add_half_open(self, session: Session, key: HalfOpenKey) -> None:
        self.half_open[key] = session
        self.half_open_of[prefix_of(key[0].address)] += 1

    def drop_half_open(self, key: HalfOpenKey) -> None:
        if self.half_open.pop(key, None) is None:
            return
        prefix = prefix_of(key[0].address)
        self.half_open_of[prefix] -= 1
        if not self.half_open_of[prefix]:
            del self.half_open_of[prefix]

    def established(self, session: Session) -> None:
        assert session.identity is not None
        self.by_identity.setdefault(session.identity, {})[session] = None
        self.by_remote.setdefault(session.remote.address, {})[session] = None

    def forget(self, session: Session) -> None:
        self.by_spi.pop(session.spi_own, None)
        if self.by_number.get(session.number) is session:
            del self.by_number[session.number]
        self.moved(session, None)
        if session.identity is None:
            return
        _take_out(self.by_identity, session.identity, session)

    def moved(self, session: Session, remote: IpAddress | None) -> None:
        """Take the session out of the table of its remote address, and put it under the new one."""
        _take_out(self.by_remote, session.remote.address, session)
        if remote is not None:
            self.by_remote.setdefault(remote, {})[session] = None

    def add_child(self, session: Session, child: ChildSa) -> None:
        self.by_child[child.spi_in] = session.number
        likeness = child.likeness
        self._alike[likeness] = (*self._alike.get(likeness, ()), child.spi_in)

    def drop_child(self, child: ChildSa) -> None:
        self.by_child.pop(child.spi_in, None)
        likeness = child.likeness
        left = tuple(spi for spi in self._alike.get(likeness, ()) if spi != child.spi_in)
        if left:
            self._alike[likeness] = left
        else:
            self._alike.pop(likeness, None)

    def with_child_like(self, child: ChildSa) -> list[Session]:
        """The sessions that have (very likely: a hash says so) a child with its connection and selectors."""
        numbers = {self.by_child[spi]: None for spi in self._alike.get(child.likeness, ())}
        return [self.by_number[number] for number in numbers if number in self.by_number]

    # ---- timers ----

    def schedule(self, session: Session, when: float) -> None:
        """Wake the session at `when`; entries that a later call outdated are skipped when they come up."""
        session.wake = when
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, session.spi_own))
        if len(self._heap) > 64 + 8 * len(self.by_spi):
            self._heap = [entry for entry in self._heap if self._current(entry)]
            heapq.heapify(self._heap)

    def _current(self, entry: tuple[float, int, bytes]) -> bool:
        session = self.by_spi.get(entry[2])
        return session is not None and session.wake == entry[0]

    def next_timer(self) -> float | None:
        while self._heap and not self._current(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self) -> list[Session]:
        """The sessions whose time has come, taken off the heap."""
        sessions = []
        while (when := self.next_timer()) is not None and when <= self.now:
            session = self.by_spi[heapq.heappop(self._heap)[2]]
            session.wake = float("inf")
            sessions.append(session)
        return sessions


def _take_out(table: dict[K, dict[Session, None]], key: K, session: Session) -> None:
    there = table.get(key)
    if there is not None and session in there:
        del there[session]
        if not there:
            del table[key]
