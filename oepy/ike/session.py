"""One IKE SA: state, windows, protection, timers. What its exchanges mean is in the flows (see states.py)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from oepy.errors import MisuseError, ParseError
from oepy.ike.crypto import IkeKeyMaterial, Protection, protection
from oepy.ike.deadlines import next_deadline
from oepy.ike.events import (
    ChildDown,
    DownReason,
    FailureKind,
    IkeKeys,
    Question,
    SessionDown,
    SessionFailed,
)
from oepy.ike.flow import ChildRefused, Flow, HandshakeFailed, OwnSteps, PeerSteps, Send
from oepy.ike.header import (
    FLAG_INITIATOR,
    FLAG_RESPONSE,
    NO_SPI,
    VERSION_2,
    Exchange,
    Header,
    PayloadType,
)
from oepy.ike.message import (
    Message,
    Reassembly,
    build_plain,
    build_sealed,
)
from oepy.ike.notify import NotifyType, ProtocolError
from oepy.ike.payloads import Delete, Payload, build_chain, build_delete, notify
from oepy.ike.settings import IkeSettings, Initiate, Retransmission
from oepy.ike.states import HANDSHAKE, LIVE, NEEDS_EVIDENCE, TRANSITIONS, Happening, State
from oepy.ike.window import MAX_MESSAGE_ID, Window
from oepy.model import Authenticated, Endpoint, PeerIdentity, PublicKey

if TYPE_CHECKING:
    from oepy.ike.algorithms import IkeSuite
    from oepy.ike.child import ChildSa
    from oepy.ike.context import Context, HalfOpenKey
    from oepy.ike.followup import Followup
    from oepy.ike.handshake import Handshake
    from oepy.ike.mobike import Mobike
    from oepy.model import Secret

MAX_QUEUED = 16
MAX_CHILDREN = 32
NEVER = float("inf")

Starter = Callable[["Session"], OwnSteps]


class Session:
    __slots__ = (
        "arrived",
        "authenticated",
        "candidate",
        "candidate_for",
        "certified",
        "childless_since",
        "children",
        "closing",
        "connection",
        "context",
        "created",
        "early_deletes",
        "encap",
        "established_at",
        "followup",
        "half_open_key",
        "handshake",
        "heard_at",
        "identity",
        "initiator",
        "keepalive_at",
        "key",
        "label",
        "last_error",
        "leaving",
        "local",
        "mobike",
        "moved_to",
        "nat_local",
        "nat_remote",
        "number",
        "origin",
        "own",
        "own_proof",
        "peer_fragments",
        "predecessors",
        "queue",
        "reassembly",
        "reauth_at",
        "reauthenticated_by",
        "reauthenticates",
        "rekey_at",
        "remote",
        "request",
        "retransmission",
        "serving",
        "settings",
        "sk_d",
        "spi_own",
        "spi_peer",
        "state",
        "suite",
        "transmit",
        "unprotect",
        "wake",
        "window",
    )

    def __init__(
        self,
        context: Context,
        number: int,
        local: Endpoint,
        remote: Endpoint,
        *,
        initiator: bool,
        spi: bytes = b"",
        settings: IkeSettings | None = None,
    ) -> None:
        self.context = context
        self.settings = settings or context.settings
        self.number = number
        self.initiator = initiator  # the original initiator of this IKE SA
        self.local, self.remote = local, remote
        self.spi_own, self.spi_peer = spi or context.new_spi(), NO_SPI
        self.state = State.NEW
        self.window = Window()
        self.suite: IkeSuite | None = None
        self.sk_d: Secret | None = None
        self.transmit: Protection | None = None
        self.unprotect: Protection | None = None
        self.handshake: Handshake | None = None
        self.own: Flow | None = None  # our exchange
        self.serving: Flow | None = None  # the peer's
        self.queue: deque[tuple[str, Starter]] | None = None
        self.children: dict[int, ChildSa] = {}
        self.reassembly: Reassembly | None = None
        self.peer_fragments = False
        self.identity: PeerIdentity | None = None
        self.authenticated: Authenticated | None = None
        self.key: PublicKey | None = None
        self.origin = (initiator, b"")
        """Whether we began the first IKE SA of this one's line, and the SPIs of that, the initiator's first."""
        self.certified = self.own_proof = False
        """Whether the key is out of a certificate, and whether we proved one too (not NULL)."""
        self.early_deletes: tuple[int, ...] = ()
        """Outbound SPIs that the peer deleted before we had its answer that makes them."""
        self.label = self.connection = self.last_error = ""
        self.encap = self.nat_local = self.nat_remote = False
        self.mobike: Mobike | None = None  # where both agreed on it
        self.arrived = (local, remote)  # our end and the peer's of its last request
        self.created = self.heard_at = context.now
        self.established_at = self.childless_since = NEVER
        self.rekey_at = self.reauth_at = self.keepalive_at = NEVER
        self.request: Initiate | None = None  # ours, with which it began: for a reauthentication
        self.reauthenticates = self.reauthenticated_by = 0
        """Numbers of the session that this one is to replace, and of the one that is to replace this."""
        self.candidate: tuple[Session, bytes] | None = None
        """The SA that the peer's simultaneous rekey made, and the lower nonce of that exchange."""
        self.followup: Followup | None = None  # a rekey of the peer's that waits for its IKE_FOLLOWUP_KE
        self.candidate_for: Session | None = None  # the same, seen from the new SA
        self.moved_to: Session | None = None  # the SA that replaced this one
        self.predecessors: tuple[Session, ...] = ()  # replaced ones that await their Delete
        self.half_open_key: HalfOpenKey | None = None
        self.retransmission: Retransmission | None = None
        self.closing: DownReason | None = None  # ends with this reason once the answer is sent
        self.leaving = DownReason.LOCAL  # why we delete it
        self.wake = NEVER
        context.add(self)

    # ---- state ----

    def move(self, happening: Happening) -> None:
        """The one setter of `state`. Raises MisuseError for a transition that is not in the table."""
        after = TRANSITIONS.get((self.state, happening))
        if after is None:
            raise MisuseError(f"{happening.value} cannot happen in state {self.state.value}")
        if after is NEEDS_EVIDENCE and self.authenticated is None:
            raise MisuseError("no IKE SA is established before the peer's proof was verified")
        if after is not self.state:
            self.context.counters[f"state_{after.value}"] += 1
        self.state = after

    @property
    def spi_i(self) -> bytes:
        return self.spi_own if self.initiator else self.spi_peer

    @property
    def spi_r(self) -> bytes:
        return self.spi_peer if self.initiator else self.spi_own

    @property
    def esp_ends(self) -> tuple[Endpoint, Endpoint, bool]:
        """Our end and the peer's of ESP, and whether it is in UDP: behind those of IKE while the peer moves."""
        return self.mobike.settled if self.mobike is not None else (self.local, self.remote, self.encap)

    def set_keys(self, suite: IkeSuite, keys: IkeKeyMaterial, *, final: bool = True) -> None:
        """`final` False: others follow before IKE_AUTH, so these are of no use to a reader of captures."""
        self.suite = suite
        self.sk_d = keys.d
        from_initiator = protection(suite, keys.ei, keys.ai, self.context.random)
        from_responder = protection(suite, keys.er, keys.ar, self.context.random)
        self.transmit, self.unprotect = (
            (from_initiator, from_responder) if self.initiator else (from_responder, from_initiator)
        )
        if self.settings.key_log and final:
            self.context.emit(
                IkeKeys(
                    self.number,
                    self.spi_i,
                    self.spi_r,
                    suite.encryption,
                    suite.integrity,
                    keys.ei,
                    keys.er,
                    keys.ai,
                    keys.ar,
                )
            )

    # ---- sending ----

    def _header(self, exchange: int, message_id: int, *, response: bool) -> Header:
        flags = (FLAG_INITIATOR if self.initiator else 0) | (FLAG_RESPONSE if response else 0)
        return Header(self.spi_i, self.spi_r, 0, VERSION_2, exchange, flags, message_id)

    def build(
        self, exchange: int, message_id: int, payloads: list[Payload], *, response: bool
    ) -> list[bytes]:
        header = self._header(exchange, message_id, response=response)
        if exchange == Exchange.IKE_SA_INIT:
            return [build_plain(header, payloads)]
        if exchange == Exchange.IKE_INTERMEDIATE and self.handshake is not None:
            from oepy.ike.intermediate import note

            note(self, header, *build_chain(payloads))
        assert self.transmit is not None
        fragments = self.peer_fragments and self.settings.fragmentation == "yes"
        size = self.settings.fragment_size if fragments else 0
        return build_sealed(header, payloads, self.transmit, size)

    def send(
        self, datagrams: list[bytes], remote: Endpoint | None = None, local: Endpoint | None = None
    ) -> None:
        for data in datagrams:
            self.context.send(local or self.local, remote or self.remote, data)

    def _send_request(self, want: Send) -> None:
        if self.window.next_own > MAX_MESSAGE_ID - 16:
            self.fail(FailureKind.PROTOCOL, "message IDs are used up")
            return
        datagrams = self.build(want.exchange, self.window.next_own, want.payloads, response=False)
        settings = self.settings
        if self.state in HANDSHAKE:
            schedule = self.retransmission or settings.handshake
        else:
            schedule = settings.established
        self.window.request(want.exchange, datagrams, schedule, self.context.now)
        self.send(datagrams)

    # ---- flows ----

    def start(self, what: str, starter: Starter) -> bool:
        """Begin an exchange of ours, or queue it behind the running one. False where the queue is full."""
        if self.own is not None or self.window.outstanding is not None or self.waits_for_peer:
            if self.queue is None:
                self.queue = deque()
            if len(self.queue) >= MAX_QUEUED:
                return False
            self.queue.append((what, starter))
            return True
        self.own = Flow(self, starter(self), what)
        self.drive(self.own, None)
        self.reschedule()
        return True

    @property
    def waits_for_peer(self) -> bool:
        """Our rekey of the IKE SA has given way to the peer's, which is not complete yet: it could not take over
        while an exchange of ours is under way, and none would be left."""
        waiting = self.followup
        return waiting is not None and waiting.decided and self.context.now <= waiting.until

    def busy_with(self, what: str) -> bool:
        return (self.own is not None and self.own.what == what) or any(
            queued == what for queued, _ in self.queue or ()
        )

    def serve(self, generator: PeerSteps, message: Message, what: str, first_datagram: bytes) -> None:
        self.serving = Flow(self, generator, what, message.header.message_id, first_datagram)
        self.drive(self.serving, message)

    def resume(self, flow: Flow, value: object) -> None:
        """The answer to a question."""
        flow.token = 0
        self.drive(flow, value)
        self.reschedule()

    def drive(self, flow: Flow, value: Any) -> None:
        try:
            if flow.request_id is not None and flow.token == 0 and isinstance(value, Message):
                want = next(flow.generator)
            else:
                want = flow.generator.send(value)
        except StopIteration as stop:
            self._finished(flow, stop.value)
        except HandshakeFailed as failure:
            self._failed(flow, failure)
        except ProtocolError as error:
            self._failed(flow, HandshakeFailed(FailureKind.PROTOCOL, str(error), error.notify, error.notify))
        except ParseError as error:
            self._failed(
                flow,
                HandshakeFailed(
                    FailureKind.PROTOCOL, str(error), NotifyType.INVALID_SYNTAX, NotifyType.INVALID_SYNTAX
                ),
            )
        else:
            if isinstance(want, Send):
                self._send_request(want)
            else:
                assert isinstance(want, Question)
                flow.asked_at = self.context.now
                flow.token = self.context.ask(flow, want)

    def _finished(self, flow: Flow, result: list[Payload] | None) -> None:
        if flow.request_id is None:
            if self.own is flow:
                self.own = None
            self.next_queued()
            return
        self.serving = None
        if self.state is State.CLOSED:
            return
        exchange = _EXCHANGE_OF.get(flow.what, Exchange.CREATE_CHILD_SA)
        self._respond(flow, exchange, result or [])
        if self.handshake is not None and self.handshake.pending:
            from oepy.ike.intermediate import mix

            shared, self.handshake.pending = self.handshake.pending, b""
            mix(self, self.handshake, shared)
        if self.closing is not None:
            self.end(self.closing)

    def _respond(self, flow: Flow, exchange: Exchange, payloads: list[Payload]) -> None:
        assert flow.request_id is not None
        datagrams = self.build(exchange, flow.request_id, payloads, response=True)
        self.window.respond(flow.first_datagram, datagrams)
        local, remote = self.local, self.remote
        if self.mobike is not None:
            local, remote = flow.path  # to where it was asked from, which may be a path that is only tried
        self.send(datagrams, remote, local)

    def _failed(self, flow: Flow, failure: HandshakeFailed) -> None:
        if flow.request_id is not None:
            self.serving = None
            if failure.answer is not None:
                exchange = _EXCHANGE_OF.get(flow.what, Exchange.CREATE_CHILD_SA)
                self._respond(flow, exchange, [notify(failure.answer)])
        elif failure.answer is not None and self.transmit is not None:
            # RFC 7296 §2.21.2: an INFORMATIONAL of its own tells the peer; nobody waits for its answer
            payloads = [notify(failure.answer), (PayloadType.DELETE, build_delete(Delete(1)))]
            self.send(self.build(Exchange.INFORMATIONAL, self.window.next_own, payloads, response=False))
        self.fail(failure.kind, failure.text, failure.notify)

    def next_queued(self) -> None:
        while self.own is None and self.queue and self.state in LIVE and not self.waits_for_peer:
            what, starter = self.queue.popleft()
            self.own = Flow(self, starter(self), what)
            self.drive(self.own, None)
        if not self.queue:
            self.queue = None

    # ---- time ----

    def reschedule(self) -> None:
        if self.state is State.CLOSED:
            return
        deadline = next_deadline(self)
        if deadline not in (self.wake, NEVER):
            self.context.schedule(self, deadline)
        elif deadline == NEVER:
            self.wake = NEVER

    # ---- ending ----

    def give_up(self, kind: FailureKind, text: str) -> None:
        """End a handshake of ours. Where IKE_AUTH is out, the peer may be established already or be about to
        be: the session lingers without a sound, and a late answer is met with a Delete, lest the peer keeps
        a tunnel whose other end is gone."""
        if self.state is not State.AUTH_SENT or self.window.outstanding is None:
            self.fail(kind, text)
            return
        self.context.counters[f"failed_{kind.value}"] += 1
        self._emit_failed(kind, text, "")
        self.move(Happening.DELETE_SENT)
        self.own = None
        outstanding = self.window.outstanding
        outstanding.next_at = NEVER
        outstanding.give_up_at = self.context.now + self.settings.question_timeout
        self.reschedule()

    def _emit_failed(self, kind: FailureKind, text: str, notify_text: str) -> None:
        self.last_error = text
        self.context.emit(
            SessionFailed(
                self.number, kind, self.initiator, notify_text, text, self.remote, self.identity, self.label
            )
        )

    def fail(self, kind: FailureKind, text: str, notify_text: str = "") -> None:
        """The end of a session, with its reason. After establishment it is a SessionDown."""
        if self.state is State.CLOSED:
            return
        self.last_error = text
        self.context.counters[f"failed_{kind.value}"] += 1
        if self.state in HANDSHAKE:
            from oepy.ike.duplicates import has_replacement

            if kind is FailureKind.REJECTED and has_replacement(self):
                kind = FailureKind.SUPERSEDED
            self._emit_failed(kind, text, notify_text)
            self.end()
        else:
            self.end(DownReason.IKE_DOWN)

    def child_down(self, spi_in: int, reason: DownReason) -> None:
        child = self.children.pop(spi_in, None)
        if child is None:
            return
        self.context.drop_child(child)
        from oepy.ike.duplicates import remaining_child

        self.context.emit(ChildDown(self.number, spi_in, child.spi_out, reason, remaining_child(self, child)))
        if not self.children:
            self.childless_since = self.context.now

    def end_after_answer(self, reason: DownReason) -> None:
        self.closing = reason

    def end(self, reason: DownReason = DownReason.LOCAL) -> None:
        """Drop everything at once; whoever wants to tell the peer has done so before."""
        if self.state is State.CLOSED:
            return
        was_established = self.established_at != NEVER
        replaced = self.moved_to is not None
        self.move(Happening.ENDED)
        for spi_in in list(self.children):
            self.child_down(spi_in, reason)
        for flow in (self.own, self.serving):
            if flow is not None and flow.token:
                self.context.questions.pop(flow.token, None)
        self.own = self.serving = None
        self.queue = None
        self.window.outstanding = None
        self.handshake = None
        self.reassembly = None
        if self.half_open_key is not None:
            self.context.drop_half_open(self.half_open_key)
            self.half_open_key = None
        if self.candidate_for is not None and self.candidate_for.candidate is not None:
            self.candidate_for.candidate = None
        self.context.forget(self)
        if was_established and not replaced:
            self.context.emit(SessionDown(self.number, reason, self.remote, self.label))


_EXCHANGE_OF = {
    "auth": Exchange.IKE_AUTH,
    "informational": Exchange.INFORMATIONAL,
    "intermediate": Exchange.IKE_INTERMEDIATE,
    "followup": Exchange.IKE_FOLLOWUP_KE,
}

__all__ = ["MAX_CHILDREN", "ChildRefused", "Session"]
