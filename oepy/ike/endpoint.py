"""The IKE room's door: datagrams and time in; datagrams, events and questions out.

Nothing here reads a clock, a socket or a key file. `receive` never raises for what bytes do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from oepy.errors import MisuseError, ParseError
from oepy.ike.child_request import create_child, report_failure
from oepy.ike.context import Context, SettingsFor
from oepy.ike.events import ChildUsable, Datagram, DownReason, FailureKind, IkeEvent
from oepy.ike.header import (
    FLAG_RESPONSE,
    FLAG_VERSION,
    NO_SPI,
    VERSION_2,
    Exchange,
    Header,
    parse_header,
)
from oepy.ike.inbound import receive
from oepy.ike.lifetimes import (
    handle_timer,
    start_delete_child,
    start_liveness,
    start_rekey_child,
    start_rekey_ike,
    terminate,
)
from oepy.ike.message import Message, build_plain
from oepy.ike.mobike import move
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import notify as notify_payload
from oepy.ike.payloads import parse_chain
from oepy.ike.reauthentication import begin, reauthenticate
from oepy.ike.responder import receive_init
from oepy.ike.session import Session
from oepy.ike.settings import ChildRequest, IkeSettings, Initiate
from oepy.ike.states import State
from oepy.model import Authenticated, Endpoint, EspSuite, IpAddress, PeerIdentity, TrafficSelector

MAX_INFORMED = 8  # unprotected error answers a second, to everybody together


@dataclass(frozen=True, slots=True)
class ChildInfo:
    spi_in: int
    spi_out: int
    suite: EspSuite
    local_ts: tuple[TrafficSelector, ...]
    remote_ts: tuple[TrafficSelector, ...]
    initiator: bool
    usable: bool
    installed_at: float
    rekey_at: float
    expires_at: float
    connection: str


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """For `status` and `explain`. Times are those that the caller passed in; infinity is never."""

    session: int
    state: str
    initiator: bool
    exchange: str  # what is under way, "" for nothing
    last_error: str
    local: Endpoint
    remote: Endpoint
    spi_i: str
    spi_r: str
    identity: PeerIdentity | None
    authenticated: Authenticated | None
    suite: str
    encap: bool
    created: float
    established_at: float
    heard_at: float
    rekey_at: float
    message_ids: tuple[int, int]
    children: tuple[ChildInfo, ...]
    label: str
    connection: str
    mobike: str = ""  # decides | follows: whether we may move it, or the peer; "" for nobody
    peer_addresses: tuple[IpAddress, ...] = ()  # at which it can be reached besides


class IkeEndpoint:
    """`random(n)` gives n unpredictable bytes. One endpoint serves all local addresses and both ports.

    `settings_for(local, remote)` says with which settings a peer that begins is answered (a connection's);
    without it, and for all bounds of the endpoint as such, `settings` count. It must not fail, and be quick:
    anybody can have it called.
    """

    def __init__(
        self,
        settings: IkeSettings,
        random: Callable[[int], bytes],
        settings_for: SettingsFor | None = None,
    ) -> None:
        self._context = Context(settings, random, settings_for)
        self._informed_at = 0.0
        self._informed = 0

    # ---- bytes and time ----

    def receive(self, data: bytes, local: Endpoint, remote: Endpoint, now: float) -> None:
        """One UDP payload, the non-ESP marker already taken off. Malformed and foreign ones are counted."""
        context = self._context
        context.now = now
        context.counters["received"] += 1
        if data == b"\xff":  # RFC 3948 §2.3
            context.counters["keepalives"] += 1
            return
        try:
            header = parse_header(data)
            if header.version >> 4 != 2:
                self._other_version(header, local, remote)
                return
            session = self._session_of(header, remote)
            chain = parse_chain(data, header.next_payload, 28)
            outer = Message(header, chain, data)
            if session is not None:
                receive(session, outer, local, remote)
            elif header.exchange == Exchange.IKE_SA_INIT and _begins(header):
                receive_init(context, outer, local, remote)
            else:
                context.counters["unknown_spi"] += 1
        except ParseError:
            context.counters["malformed"] += 1

    def _session_of(self, header: Header, remote: Endpoint) -> Session | None:
        own = header.spi_r if header.from_initiator else header.spi_i
        if own == NO_SPI:
            return self._context.half_open.get((remote, header.spi_i))
        session = self._context.by_spi.get(own)
        if session is None or session.initiator == header.from_initiator:
            return None
        peer = header.spi_i if header.from_initiator else header.spi_r
        if peer != session.spi_peer and session.state is not State.INIT_SENT:
            return None
        return session

    def _other_version(self, header: Header, local: Endpoint, remote: Endpoint) -> None:
        """RFC 7296 §2.5: a higher major version is told ours; the rest is not for us."""
        context = self._context
        if header.version >> 4 < 2:
            context.counters["ikev1"] += 1
            return
        context.counters["other_version"] += 1
        if header.is_response or not self._may_inform():
            return
        answer = Header(
            header.spi_i,
            header.spi_r,
            0,
            VERSION_2,
            header.exchange,
            FLAG_RESPONSE | FLAG_VERSION,
            header.message_id,
        )
        context.send(local, remote, build_plain(answer, [notify_payload(NotifyType.INVALID_MAJOR_VERSION)]))

    def _may_inform(self) -> bool:
        now = self._context.now
        if now - self._informed_at >= 1.0:
            self._informed_at, self._informed = now, 0
        self._informed += 1
        return self._informed <= MAX_INFORMED

    def handle_timer(self, now: float) -> None:
        self._context.now = now
        for session in self._context.due():
            handle_timer(session)

    def next_timer(self) -> float | None:
        """When to call `handle_timer` next; None while nothing waits."""
        return self._context.next_timer()

    def datagrams(self) -> list[Datagram]:
        """What to send now, in order. Take the events first: what they install must be there already."""
        taken, self._context.datagrams = self._context.datagrams, []
        return taken

    def events(self) -> list[IkeEvent]:
        taken, self._context.events = self._context.events, []
        return taken

    def answer(self, token: int, value: object, now: float) -> None:
        """The answer to a question; for a token that is no longer waited for nothing happens."""
        self._context.now = now
        flow = self._context.questions.pop(token, None)
        if flow is None:
            self._context.counters["late_answers"] += 1
            return
        flow.session.resume(flow, value)

    # ---- commands; an unknown session or SPI is ignored, for it may just have gone ----

    def initiate(self, request: Initiate, now: float) -> int:
        """Begin a negotiation; the session's number."""
        selectors = (request.local_ts or request.want_addresses) and request.remote_ts
        if request.childless == "never" and not selectors:
            raise MisuseError("a child SA needs traffic selectors on both sides")
        self._context.now = now
        return begin(self._context, request).number

    def create_child(self, session: int, request: ChildRequest, now: float) -> None:
        """A further child SA of an established IKE SA: ChildUp or ChildFailed follows (see there)."""
        if not request.local_ts or not request.remote_ts:
            raise MisuseError("a child SA needs traffic selectors on both sides")
        self._context.now = now
        problem = "there is no such IKE SA"
        for found in self._with_number(session, now):
            begun = found.start("create-child", lambda it: create_child(it, request))
            problem = "" if begun else "too many exchanges of this IKE SA are waiting"
        if problem:
            report_failure(self._context, session, request, FailureKind.LOCAL, problem)

    def _with_child(self, spi_in: int, now: float) -> Iterator[Session]:
        self._context.now = now
        session = self._context.by_number.get(self._context.by_child.get(spi_in, 0))
        if session is not None and spi_in in session.children:
            yield session
            session.reschedule()

    def _with_number(self, number: int, now: float) -> Iterator[Session]:
        self._context.now = now
        session = self._context.by_number.get(number)
        if session is not None:
            yield session
            session.reschedule()

    def rekey_child(self, spi_in: int, now: float) -> None:
        for session in self._with_child(spi_in, now):
            start_rekey_child(session, spi_in)

    def delete_child(self, spi_in: int, now: float) -> None:
        for session in self._with_child(spi_in, now):
            start_delete_child(session, spi_in, DownReason.LOCAL)

    def rekey_ike(self, session: int, now: float) -> None:
        for found in self._with_number(session, now):
            start_rekey_ike(found)

    def reauthenticate(self, session: int, now: float, request: Initiate | None = None) -> int:
        """A new IKE SA with new proofs and all children takes the place of an established one, which is deleted
        after (RFC 7296 §2.8.3). The number of the new one; where it fails (SessionFailed) the old one stays.
        Without `request` the one of last time counts. 0 where nothing is begun: it is under way already, or the
        peer began the session and there is no request."""
        self._context.now = now
        number = 0
        for found in self._with_number(session, now):
            new = reauthenticate(found, request)
            number = new.number if new is not None else 0
        return number

    def terminate(self, session: int, now: float) -> None:
        """Children go at once, the peer is told; a handshake under way simply ends."""
        for found in self._with_number(session, now):
            terminate(found, DownReason.LOCAL)

    def check_liveness(self, session: int, now: float) -> None:
        for found in self._with_number(session, now):
            if found.state is State.ESTABLISHED:
                start_liveness(found)

    def move(self, session: int, local: Endpoint, remote: Endpoint, now: float) -> bool:
        """By MOBIKE (RFC 4555): our end is `local` from now on, or (where we decide, see `SessionInfo.mobike`) the
        peer is to be reached at `remote`. ESP follows with PeerMoved. False where that cannot be done."""
        done = False
        for found in self._with_number(session, now):
            done = move(found, local, remote)
        return done

    def traffic_seen(self, spi_in: int, now: float) -> None:
        """Good ESP packets came in on this SA: the peer lives, and has the SA (RFC 7296 §2.4, 2.8)."""
        for session in self._with_child(spi_in, now):
            session.heard_at = now
            child = session.children[spi_in]
            if not child.usable:
                child.usable = True
                self._context.emit(ChildUsable(session.number, spi_in))

    # ---- looking in ----

    @property
    def counters(self) -> Mapping[str, int]:
        counters = dict(self._context.counters)
        counters["half_open"] = len(self._context.half_open)
        counters["sessions"] = len(self._context.by_number)
        return counters

    def sessions(self) -> list[SessionInfo]:
        return [_info(session) for session in self._context.by_number.values()]

    def session(self, number: int) -> SessionInfo | None:
        session = self._context.by_number.get(number)
        return None if session is None else _info(session)

    def suite(self, number: int) -> str:
        """The algorithms of a session's IKE SA, "" where there is none."""
        session = self._context.by_number.get(number)
        return str(session.suite or "") if session is not None else ""

    def session_with_child(self, spi_in: int) -> SessionInfo | None:
        return self.session(self._context.by_child.get(spi_in, 0))


def _begins(header: Header) -> bool:
    return (
        header.spi_r == NO_SPI and header.message_id == 0 and header.from_initiator and not header.is_response
    )


def _info(session: Session) -> SessionInfo:
    return SessionInfo(
        session.number,
        session.state.value,
        session.initiator,
        " ".join(flow.what for flow in (session.own, session.serving) if flow is not None),
        session.last_error,
        session.local,
        session.remote,
        session.spi_i.hex(),
        session.spi_r.hex(),
        session.identity,
        session.authenticated,
        str(session.suite or ""),
        session.encap,
        session.created,
        session.established_at,
        session.heard_at,
        session.rekey_at,
        (session.window.next_own, session.window.next_peer),
        tuple(
            ChildInfo(
                child.spi_in,
                child.spi_out,
                child.suite,
                child.local_ts,
                child.remote_ts,
                child.initiator,
                child.usable,
                child.installed_at,
                child.rekey_at,
                child.expires_at,
                child.connection,
            )
            for child in session.children.values()
        ),
        session.label,
        session.connection,
        "" if session.mobike is None else "decides" if session.mobike.decides else "follows",
        session.mobike.peer_addresses if session.mobike is not None else (),
    )
