"""What becomes of each child of each connection: `handle(input, now)` returns actions; no IO, no clock.

Theory of operation. A child is

    down ──up, start──▶ connecting ──▶ up          (retried with growing pauses, `keyingtries` times)
    trapped ──packet──▶ connecting ──▶ up          (start_action trap: its traffic is held, never in the clear)
    up ──closed, peer gone──▶ what close_action or dpd_action says, else where it came from

One IKE SA serves all children of a connection between two ends: the first child begins it, the others join. A peer
may begin as well; where its addresses are `dynamic` or wildcards, one child has many peers, each with SAs of its
own. So a child has *tunnels* (SA pairs), and is up while it has one.

Order is safety. On the way up: the SA is installed, then the trap leads packets there (`Join`), then held ones go.
On the way down: the trap asks (or hands the packets to the next policy), then the SA goes.
"""

from __future__ import annotations

import enum
import heapq
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from oepy.connections.messages import (
    AddChild,
    Asked,
    Began,
    Begin,
    ChildCame,
    ChildMoved,
    ChildRefused,
    ChildUsable,
    ChildWent,
    CloseChild,
    CloseSession,
    Down,
    Established,
    Failed,
    Gone,
    Install,
    Join,
    Load,
    ManagerAction,
    ManagerInput,
    ReadUse,
    RefuseHeld,
    Remove,
    Resettle,
    RunUpdown,
    Tell,
    Tick,
    Up,
    Use,
)
from oepy.connections.model import Action, Child, Connection
from oepy.model import NO_MARKS, NOT_COPIED, AddressRange, SaPair

RETRY_FIRST, RETRY_LONGEST = 2.0, 300.0  # seconds; each pause is shortened by up to a half at random
REPLACE_SECONDS = 10.0  # after which a session that has been replaced is ended, if the peer has not done so
STARTS_A_SECOND = 100  # connections that begin by themselves after a start
_order = operator.attrgetter("order")
_BY_PEER = frozenset({"peer-delete", "superseded", "expired", "ike-down"})


class State(enum.Enum):
    DOWN = "down"
    TRAPPED = "trapped"
    CONNECTING = "connecting"
    UP = "up"


@dataclass(slots=True)
class Tunnel:
    """One SA pair of a child."""

    pair: SaPair
    since: float
    session: int
    used: float  # when traffic was seen last
    usable: bool
    counted: int = 0
    successor: Tunnel | None = None  # by a rekey, which is no use: it goes on with what is known of this one


@dataclass(slots=True)
class ChildState:
    label: str
    number: int  # by which the trap knows it
    connection: Connection
    child: Child
    state: State
    since: float
    trapped: bool  # its traffic is held while it is not up
    wanted: bool = False  # should be up: begin again by itself
    failures: int = 0
    retry_at: float | None = None
    attempt: int = 0
    last_error: str = ""
    idle_at: float = 0.0  # when to look whether it is used
    tunnels: dict[int, Tunnel] = field(default_factory=dict)
    _carried: Counter[AddressRange] = field(default_factory=Counter)  # by how many of the tunnels

    def take(self, tunnel: Tunnel) -> Join:
        """One tunnel more: which addresses go into tunnels now that did not before."""
        self.tunnels[tunnel.pair.spi_in] = tunnel
        ranges = _ranges(tunnel.pair)
        fresh = tuple(each for each in ranges if not self._carried[each])
        self._carried.update(ranges)
        return Join(self.number, (), fresh)

    def drop(self, spi_in: int) -> tuple[Tunnel, Join]:
        """The tunnel, and the addresses that no other carries."""
        tunnel = self.tunnels.pop(spi_in)
        ranges = _ranges(tunnel.pair)
        self._carried.subtract(ranges)
        gone = tuple(each for each in ranges if not self._carried[each])
        for each in gone:
            del self._carried[each]
        return tunnel, Join(self.number, gone, ())


@dataclass(slots=True)
class _Group:
    """A connection at work."""

    connection: Connection
    attempt: int = 0  # that is under way
    session: int = 0  # of that attempt, 0 until it has begun
    sessions: dict[int, str] = field(default_factory=dict)  # established, with the peer's identity
    by_identity: dict[str, dict[int, None]] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)  # children that join as soon as it is established

    def enter(self, session: int, identity: str) -> None:
        self.sessions[session] = identity
        self.by_identity.setdefault(identity, {})[session] = None

    def leave(self, session: int) -> None:
        identity = self.sessions.pop(session, None)
        if identity is not None:
            del self.by_identity[identity][session]
            if not self.by_identity[identity]:
                del self.by_identity[identity]


class Manager:
    """All connections. `random(n)` gives n bytes."""

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._random = random
        self.children: dict[str, ChildState] = {}
        self.counts: Counter[str] = Counter()
        self._groups: dict[str, _Group] = {}
        self._by_number: dict[int, str] = {}
        self._by_spi: dict[int, str] = {}
        self._by_session: dict[int, str] = {}  # connection
        self._by_attempt: dict[int, str] = {}
        self._numbers = 0
        self._attempts = 0
        self._timers: list[tuple[float, int, str, str]] = []
        self._timer_number = 0
        self._handlers: dict[type, Callable[..., Iterator[ManagerAction]]] = {
            Load: self._load,
            Up: self._up,
            Down: self._down,
            Asked: self._asked,
            Began: self._began,
            Established: self._established,
            ChildCame: self._child_came,
            ChildUsable: self._child_usable,
            ChildMoved: self._child_moved,
            ChildWent: self._child_went,
            ChildRefused: self._child_refused,
            Failed: self._failed,
            Gone: self._gone,
            Use: self._use,
            Tick: self._tick,
        }

    def handle(self, message: ManagerInput, now: float) -> list[ManagerAction]:
        """What to do about it, in this order."""
        return list(self._handlers[type(message)](message, now))

    def next_timer(self) -> float | None:
        return self._timers[0][0] if self._timers else None

    def tunnels(self) -> Iterator[tuple[int, Tunnel]]:
        for state in self.children.values():
            yield from state.tunnels.items()

    def owns(self, spi_in: int) -> bool:
        return spi_in in self._by_spi

    def by_spi(self, spi_in: int) -> ChildState | None:
        return self.children.get(self._by_spi.get(spi_in, ""))

    def by_number(self, number: int) -> ChildState | None:
        return self.children.get(self._by_number.get(number, ""))

    def find(self, name: str) -> list[ChildState]:
        """By `connection/child`, by the child alone, or all children of a connection."""
        if name in self.children:
            return [self.children[name]]
        return [state for state in self.in_order() if name in (state.child.name, state.connection.name)]

    def in_order(self) -> list[ChildState]:
        """All, as they stand in the configuration."""
        return sorted(self.children.values(), key=lambda state: state.connection.order)

    def sessions_of(self, connection: str, identity: str) -> list[int]:
        group = self._groups.get(connection)
        return list(group.by_identity.get(identity, ())) if group and identity else []

    def session_of(self, connection: str) -> list[int]:
        group = self._groups.get(connection)
        return list(group.sessions) if group else []

    # ------------------------------------------------------------ configuration

    def _load(self, message: Load, now: float) -> Iterator[ManagerAction]:
        """What reads the same keeps its SAs."""
        fresh = {connection.name: connection for connection in message.connections.fresh}
        numbers: list[int] = []
        changed = False
        for old in message.connections.gone:
            group, new = self._groups[old.name], fresh.get(old.name)
            numbers += [state.number for state in self._states_of(group)]
            if new is not None and new == group.connection and old.name not in message.touched:
                self._renew(group, fresh.pop(old.name))
                continue
            changed = True
            yield from self._unload(group, now)
        starting = 0
        for connection in sorted(fresh.values(), key=_order):
            self._groups[connection.name] = _Group(connection)
            for child in connection.children:
                state = self._add(connection, child, now)
                numbers.append(state.number)
                if child.start:
                    state.wanted = True
                    self._retry(state, now + starting / STARTS_A_SECOND)
                    starting += 1
        if numbers:
            yield Resettle(tuple(numbers))
        if fresh or changed:
            reason = f"{len(self._groups)} connections, {len(fresh)} new or changed"
            yield Tell("connections-loaded", {"reason": reason})

    def _states_of(self, group: _Group) -> Iterator[ChildState]:
        for child in group.connection.children:
            yield self.children[group.connection.label(child)]

    def _renew(self, group: _Group, connection: Connection) -> None:
        """It reads the same, perhaps at another place in the configuration."""
        for state, child in zip(self._states_of(group), connection.children, strict=True):
            state.connection, state.child = connection, child
        group.connection = connection

    def _add(self, connection: Connection, child: Child, now: float) -> ChildState:
        self._numbers += 1
        label = connection.label(child)
        base = State.TRAPPED if child.trap else State.DOWN
        state = ChildState(label, self._numbers, connection, child, base, now, child.trap)
        self.children[label] = state
        self._by_number[state.number] = label
        if child.inactivity:
            self._watch_use(state, now)
        return state

    def _unload(self, group: _Group, now: float) -> Iterator[ManagerAction]:
        name = group.connection.name
        for child in group.connection.children:
            label = group.connection.label(child)
            state = self.children[label]
            spis = list(state.tunnels)
            for spi in spis:
                self._by_spi.pop(spi, None)
                tunnel, _ = state.drop(spi)
                yield from self._updown(state, tunnel, up=False)
                yield Remove(spi)
            yield RefuseHeld(state.number)
            del self.children[label]
            self._by_number.pop(state.number, None)
            if spis:
                yield Tell("connection-down", {"connection": label, "reason": "the configuration changed"})
        for session in (*group.sessions, *((group.session,) if group.session else ())):
            self._by_session.pop(session, None)
            yield CloseSession(session)
        self._by_attempt.pop(group.attempt, None)
        del self._groups[name]

    # ------------------------------------------------------------ commands and packets

    def _up(self, message: Up, now: float) -> Iterator[ManagerAction]:
        state = self.children.get(message.label)
        if state is not None and state.state is not State.UP:
            state.failures = 0
            yield from self._connect(state, now)

    def _down(self, message: Down, now: float) -> Iterator[ManagerAction]:
        """Until the next `up`, packet (trap) or restart of the daemon."""
        state = self.children.get(message.label)
        if state is None:
            return
        state.wanted, state.retry_at = False, None
        group = self._groups[state.connection.name]
        if message.label in group.waiting:
            group.waiting.remove(message.label)
        if state.state is State.CONNECTING and state.attempt and group.attempt == state.attempt:
            yield from self._call_off(group)
        if state.state is State.CONNECTING:
            yield from self._rest(state, now, "taken down by command")
        for spi in list(state.tunnels):
            yield CloseChild(spi)

    def _call_off(self, group: _Group) -> Iterator[ManagerAction]:
        self._by_attempt.pop(group.attempt, None)
        if group.session:
            self._by_session.pop(group.session, None)
            yield CloseSession(group.session)
        group.attempt = group.session = 0

    def _asked(self, message: Asked, now: float) -> Iterator[ManagerAction]:
        state = self.by_number(message.number)
        if state is None:
            yield RefuseHeld(message.number)
            return
        self.counts["asked"] += 1
        if state.state is State.CONNECTING:
            if state.retry_at is not None and state.attempt == 0 and not self._waits(state):
                yield RefuseHeld(state.number)  # between two tries
            return
        yield Tell("connection-asked", {"connection": state.label, "peer": str(message.flow.destination)})
        # A child that is up may be asked for more of its selectors than the peer has agreed upon
        yield from self._connect(state, now)

    def _waits(self, state: ChildState) -> bool:
        return state.label in self._groups[state.connection.name].waiting

    def _connect(self, state: ChildState, now: float) -> Iterator[ManagerAction]:
        group = self._groups[state.connection.name]
        state.retry_at = None
        if not state.connection.initiates and not group.sessions:
            state.last_error = "the connection names no address or name of the peer: it can only wait for it"
            yield RefuseHeld(state.number)
            return
        if state.state is not State.UP:
            state.state, state.since = State.CONNECTING, now
        if group.sessions:
            session = max(group.sessions)
            yield AddChild(session, state.connection, state.child)
            return
        if group.attempt:
            if state.label not in group.waiting:
                group.waiting.append(state.label)
            return
        self._attempts += 1
        group.attempt, group.session = self._attempts, 0
        state.attempt = self._attempts
        self._by_attempt[self._attempts] = state.label
        yield Begin(self._attempts, state.connection, state.child)

    # ------------------------------------------------------------ from IKE

    def _began(self, message: Began, _now: float) -> Iterator[ManagerAction]:
        group = self._group_of_attempt(message.attempt)
        if group is None:
            yield CloseSession(message.session)
            return
        group.session = message.session
        self._by_session[message.session] = group.connection.name

    def _group_of_attempt(self, attempt: int) -> _Group | None:
        state = self.children.get(self._by_attempt.get(attempt, ""))
        group = self._groups.get(state.connection.name) if state else None
        return group if group is not None and group.attempt == attempt else None

    def _established(self, message: Established, now: float) -> Iterator[ManagerAction]:
        group = self._groups.get(message.connection)
        if group is None:
            yield CloseSession(message.session)
            return
        others = group.by_identity.get(message.identity) if message.identity else None
        if others and group.connection.unique == "keep" and not message.initiator and not message.again:
            yield CloseSession(message.session)
            yield Tell(
                "connection-refused",
                {
                    "connection": message.connection,
                    "id": message.identity,
                    "reason": "unique: keep, and the peer is here already",
                },
            )
            return
        replaced = list(others or ()) if group.connection.unique == "replace" else []
        group.enter(message.session, message.identity)
        self._by_session[message.session] = message.connection
        for session in replaced:
            if message.again:  # make before break: it has children to carry over
                self._arm(now + REPLACE_SECONDS, "replaced", str(session))
            else:
                yield CloseSession(session)
        if message.session == group.session:
            self._by_attempt.pop(group.attempt, None)
            group.attempt = group.session = 0
        waiting, group.waiting = group.waiting, []
        for label in waiting:
            state = self.children.get(label)
            if state is not None and state.state is State.CONNECTING:
                yield AddChild(message.session, state.connection, state.child)

    def _child_came(self, message: ChildCame, now: float) -> Iterator[ManagerAction]:
        pair = message.pair
        state = self.children.get(pair.connection)
        if state is None or message.session not in self._by_session:
            yield CloseChild(pair.spi_in)
            return
        pair = _as_configured(pair, state.child)
        before = state.tunnels.get(message.replaces or 0)
        tunnel = Tunnel(pair, now, message.session, before.used if before else now, message.outbound)
        join = state.take(tunnel)
        self._by_spi[pair.spi_in] = state.label
        self.counts["children_up"] += message.replaces is None
        yield Install(pair, message.outbound)
        yield join
        if state.state is not State.UP:
            state.state, state.since = State.UP, now
        state.failures, state.retry_at, state.attempt, state.last_error = 0, None, 0, ""
        if before is not None and state.child.inactivity:
            before.successor = tunnel
            yield ReadUse((before.pair.spi_in,))  # while it is there
        if message.replaces is None:
            yield Tell("connection-up", _told(state, pair) | {"initiator": message.initiator})
            yield from self._updown(state, tunnel, up=True)

    def _updown(self, state: ChildState, tunnel: Tunnel, *, up: bool) -> Iterator[ManagerAction]:
        if state.child.updown:
            yield RunUpdown(
                state.child.updown, up, state.connection, state.child, tunnel.pair, tunnel.session
            )

    def _child_usable(self, message: ChildUsable, _now: float) -> Iterator[ManagerAction]:
        tunnel = self._tunnel(message.spi_in)
        if tunnel is not None:
            tunnel.usable = True
            yield Install(tunnel.pair, True)

    def _child_moved(self, message: ChildMoved, _now: float) -> Iterator[ManagerAction]:
        tunnel = self._tunnel(message.spi_in)
        if tunnel is not None:
            tunnel.pair = replace(
                tunnel.pair, local=message.local, remote=message.remote, encap=message.encap
            )
            yield Install(tunnel.pair, tunnel.usable, moves=True)

    def _tunnel(self, spi_in: int) -> Tunnel | None:
        state = self.children.get(self._by_spi.get(spi_in, ""))
        return state.tunnels.get(spi_in) if state else None

    def _child_went(self, message: ChildWent, now: float) -> Iterator[ManagerAction]:
        state = self.children.get(self._by_spi.pop(message.spi_in, ""))
        if state is None:
            return
        tunnel, join = state.drop(message.spi_in)
        yield join
        if message.reason != "rekeyed":
            yield Tell("connection-down", _told(state, tunnel.pair) | {"reason": message.reason})
            yield from self._updown(state, tunnel, up=False)
        if not state.tunnels:
            yield from self._lost(state, message.reason, now)
        yield Remove(message.spi_in)

    def _lost(self, state: ChildState, reason: str, now: float) -> Iterator[ManagerAction]:
        """The last tunnel of a child is gone."""
        action = Action.NONE
        if reason == "liveness":
            action = state.child.dpd_action
        elif reason in _BY_PEER:
            action = state.child.close_action
        if reason == "datapath" and (state.wanted or state.child.start):
            action = Action.START
        if action is Action.TRAP and not state.trapped:
            state.trapped = True
            yield from self._rest(state, now, reason)
            yield Resettle((state.number,))
            return
        yield from self._rest(state, now, reason)
        if action is Action.START and state.connection.initiates:
            state.wanted = True
            state.state = State.CONNECTING
            self._retry(state, now + self._jitter(RETRY_FIRST / 2))

    def _rest(self, state: ChildState, now: float, reason: str) -> Iterator[ManagerAction]:
        state.state = State.UP if state.tunnels else State.TRAPPED if state.trapped else State.DOWN
        state.since, state.attempt = now, 0
        if reason:
            state.last_error = reason
        yield RefuseHeld(state.number)

    def _child_refused(self, message: ChildRefused, now: float) -> Iterator[ManagerAction]:
        state = self.children.get(message.label)
        if state is not None:
            yield from self._try_again(state, message.text, now, permanent=message.permanent)

    def _failed(self, message: Failed, now: float) -> Iterator[ManagerAction]:
        """An attempt has come to nothing, before or after it was a session."""
        group = self._group_of_attempt(message.attempt)
        if group is None and message.session in self._by_session:
            found = self._groups.get(self._by_session[message.session])
            group = found if found is not None and found.session == message.session else None
        self._by_session.pop(message.session, None)
        if group is None:
            return
        label = self._by_attempt.pop(group.attempt, "")
        group.attempt = group.session = 0
        waiting, group.waiting = group.waiting, []
        for name in dict.fromkeys((label, *waiting)):
            state = self.children.get(name)
            if state is None or (state.state is State.UP and not message.superseded):
                continue
            if message.superseded and state.state is not State.CONNECTING:
                continue
            yield from self._try_again(state, message.text, now, permanent=message.permanent)

    def _try_again(
        self, state: ChildState, text: str, now: float, *, permanent: bool
    ) -> Iterator[ManagerAction]:
        state.failures += 1
        tries = state.connection.keyingtries
        again = state.wanted and (state.failures < tries or tries == 0)
        yield Tell(
            "connection-failed",
            {"connection": state.label, "reason": text, "attempt": state.failures},
            alert=state.failures == 1,
        )
        yield from self._rest(state, now, text)
        if again and not state.tunnels:
            pause = (
                RETRY_LONGEST if permanent else min(RETRY_FIRST * 2 ** min(state.failures, 10), RETRY_LONGEST)
            )
            state.state = State.CONNECTING
            self._retry(state, now + self._jitter(pause))

    def _gone(self, message: Gone, now: float) -> Iterator[ManagerAction]:
        """An established session has ended; its children went before."""
        group = self._groups.get(self._by_session.pop(message.session, ""))
        if group is None:
            return
        group.leave(message.session)
        for child in group.connection.children:
            state = self.children[group.connection.label(child)]
            lost = state.state is State.CONNECTING
            if lost and state.retry_at is None and not group.attempt:
                self._retry(state, now + self._jitter(RETRY_FIRST))
        yield from ()

    # ------------------------------------------------------------ time

    def _jitter(self, seconds: float) -> float:
        return seconds * (1.0 - int.from_bytes(self._random(2), "big") / 131072.0)

    def _retry(self, state: ChildState, when: float) -> None:
        state.retry_at = when
        self._arm(when, "retry", state.label)

    def _watch_use(self, state: ChildState, now: float) -> None:
        state.idle_at = now + state.child.inactivity / 2
        self._arm(state.idle_at, "idle", state.label)

    def _arm(self, when: float, kind: str, label: str) -> None:
        self._timer_number += 1
        heapq.heappush(self._timers, (when, self._timer_number, kind, label))

    def _tick(self, _message: Tick, now: float) -> Iterator[ManagerAction]:
        while self._timers and self._timers[0][0] <= now:
            when, _, kind, label = heapq.heappop(self._timers)
            if kind == "replaced" and int(label) in self._by_session:
                yield CloseSession(int(label))
            state = self.children.get(label)
            if state is None:
                continue
            if kind == "retry" and state.retry_at == when and state.state is not State.UP:
                yield from self._connect(state, now)
            elif kind == "idle" and state.idle_at == when:
                self._watch_use(state, now)
                if state.tunnels:
                    yield ReadUse(tuple(state.tunnels))

    def _use(self, message: Use, now: float) -> Iterator[ManagerAction]:
        for spi_in, packets in message.packets.items():
            tunnel = self._tunnel(spi_in)
            if tunnel is None:
                continue
            if packets != tunnel.counted:
                tunnel.counted, tunnel.used = packets, now
                if tunnel.successor is not None:
                    tunnel.successor.used = now
            state = self.children[self._by_spi[spi_in]]
            if now - tunnel.used >= state.child.inactivity > 0:
                yield CloseChild(spi_in)


def _as_configured(pair: SaPair, child: Child) -> SaPair:
    """With what the child says of its tunnels, which IKE does not negotiate."""
    said = child.if_id_in, child.if_id_out, child.marks, child.copied, child.priority
    if said != (0, 0, NO_MARKS, NOT_COPIED, 0):
        pair = replace(
            pair,
            if_id_in=child.if_id_in,
            if_id_out=child.if_id_out,
            marks=child.marks,
            copied=child.copied,
            priority=child.priority,
        )
    if child.tfc_padding and pair.takes_tfc and pair.mode == "tunnel":
        pair = replace(pair, tfc_padding=child.tfc_padding)
    return pair


def _ranges(pair: SaPair) -> tuple[AddressRange, ...]:
    return tuple({(selector.start, selector.end): None for selector in pair.remote_ts})


def _told(state: ChildState, pair: SaPair) -> dict[str, object]:
    return {
        "connection": state.label,
        "peer": str(pair.remote.address),
        "id": str(pair.peer),
        "spi_in": f"{pair.spi_in:08x}",
        "spi_out": f"{pair.spi_out:08x}",
        "authenticated": pair.authenticated.value,
    }
