"""Drives the IKE room: bytes in from the sockets, its questions answered, its events told to the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from oepy.connections import messages as conventional
from oepy.daemon.admission import Admission, Admissions, Offer
from oepy.daemon.answers import NotOurs
from oepy.daemon.conventional import Conventional
from oepy.daemon.own import OwnRecord, OwnRecords
from oepy.engine.messages import (
    Failure,
    Input,
    NegotiationFailed,
    OutboundReady,
    Proof,
    StartIke,
    TunnelDown,
    TunnelMoved,
    TunnelUp,
)
from oepy.errors import KeyFormatError
from oepy.ike import events as ike
from oepy.ike.authentication import sign_auth
from oepy.ike.endpoint import IkeEndpoint, SessionInfo
from oepy.ike.settings import ChildRequest, Initiate, Retransmission
from oepy.keys import HostKey
from oepy.model import IKE_PORT, Authenticated, Endpoint, IpAddress, TrafficSelector

_FAILURES = {
    ike.FailureKind.SILENT: Failure.SILENT,
    ike.FailureKind.PROOF_FAILED: Failure.PROOF_FAILED,
}
# Whoever owns a zone can let a name lead anywhere, and most hosts know nothing of IKE: where the destination itself
# publishes nothing, packets to there must not be held for long
UNPUBLISHED = Retransmission(total=3.0)
MAX_CONTACTED = 100_000
MAX_QUESTIONS = 4096  # running DNS questions of responders
ADMISSION_SECONDS = 20.0  # for all lookups of one offer; IKE waits for 30
SIGN_ALERT_SECONDS = 60.0  # between two alerts about peers that cannot read our signature


@dataclass(frozen=True, slots=True)
class Ports:
    """What the negotiator needs of the rest of the daemon."""

    feed: Callable[[Input], None]
    send: Callable[[list[ike.Datagram]], None]
    report: Callable[..., None]
    allocate_spi: Callable[[], int]
    monotonic: Callable[[], float]
    source_towards: Callable[[IpAddress], IpAddress | None]
    log_ike_keys: Callable[[ike.IkeKeys], None]


class Negotiator:
    """One for the daemon. Engine attempts and IKE sessions are matched here."""

    def __init__(
        self,
        endpoint: IkeEndpoint,
        host_key: HostKey,
        identity: str | None,
        own: OwnRecords,
        admissions: Admissions,
        connections: Conventional,
        ports: Ports,
    ) -> None:
        self.endpoint = endpoint
        self._key = host_key
        self._identity = identity
        self._own = own
        self._admissions = admissions
        self._connections = connections
        self._vouched = connections.vouched
        self._ports = ports
        self._attempt_of: dict[int, tuple[int, IpAddress]] = {}  # session → attempt, destination
        self._session_of: dict[int, int] = {}  # attempt → session
        self._starting: set[int] = set()  # attempts whose session has not begun
        self._cancelled: set[int] = set()  # of those the ones called off
        self._contacted: set[IpAddress] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._pumping = False
        self._closing = False
        self._sign_alert_at = float("-inf")

    # ------------------------------------------------------------ from the network and the engine

    def receive(self, data: bytes, local: Endpoint, remote: Endpoint) -> None:
        if self._closing and data[8:16] == bytes(8):
            return  # nothing begins any more: the peer would keep a tunnel that has no other end
        self.endpoint.receive(data, local, remote, self._ports.monotonic())
        self.pump()

    def use_key(self, host_key: HostKey) -> None:
        """Prove this key from now on; what is established stays."""
        self._key = host_key

    def start(self, action: StartIke) -> None:
        if self._closing:
            return
        self._starting.add(action.attempt)
        self._spawn(self._begin(action))

    async def _begin(self, action: StartIke) -> None:
        try:
            await self._start(action)
        finally:
            self._starting.discard(action.attempt)
            self._cancelled.discard(action.attempt)

    async def _start(self, action: StartIke) -> None:
        gateway = action.gateway
        local = action.source
        if local is None or local.version != gateway.version or not self._is_ours(local):
            local = self._ports.source_towards(gateway)
        if local is None:
            self._ports.feed(
                NegotiationFailed(
                    action.destination, action.attempt, Failure.SILENT, f"no route to gateway {gateway}"
                )
            )
            return
        own = await self._own.get(self._identity or local)
        if action.attempt in self._cancelled:
            return
        inner = action.source if action.source is not None else local
        by_certificate = action.by is Proof.CERTIFICATE
        now = self._ports.monotonic()
        session = self.endpoint.initiate(
            Initiate(
                local=Endpoint(local, IKE_PORT),
                remote=Endpoint(gateway, IKE_PORT),
                local_ts=(TrafficSelector.of(inner),),
                remote_ts=(TrafficSelector.of(action.destination),),
                remote_keys=action.keys,
                own_auth=self._own_auth(own),
                initial_contact=gateway not in self._contacted,
                retransmission=None if action.by is Proof.RECORD else UNPUBLISHED,
                authenticated_by="name" if action.by is Proof.NAME else "dns",
                by_certificate=by_certificate,
                settings=self._connections.answers.opportunistic(asking=by_certificate),
            ),
            now,
        )
        if by_certificate:
            self._vouched.begin(session, action.destination)
        if len(self._contacted) < MAX_CONTACTED:
            self._contacted.add(gateway)
        self._attempt_of[session] = (action.attempt, action.destination)
        self._session_of[action.attempt] = session
        self.pump()

    def _own_auth(self, own: OwnRecord) -> str:
        """As long as it is not certain that no key of ours is published, we prove ours: loudly refused is better
        than quietly trusted less."""
        if own.state != "absent":
            return "pubkey"
        return "if-asked" if self._connections.answers.shows_certificate() else "null"

    def _is_ours(self, address: IpAddress) -> bool:
        return self._admissions.is_own(address)

    def cancel(self, attempt: int) -> None:
        session = self._session_of.pop(attempt, None)
        if session is None:
            if attempt in self._starting:
                self._cancelled.add(attempt)
            return
        self._attempt_of.pop(session, None)
        self.endpoint.terminate(session, self._ports.monotonic())
        self.pump()

    def initiate(self, request: Initiate) -> int:
        """Of a connection; the session's number. `pump` follows."""
        return self.endpoint.initiate(request, self._ports.monotonic())

    def create_child(self, session: int, request: ChildRequest) -> None:
        self.endpoint.create_child(session, request, self._ports.monotonic())
        self.pump()

    def end_session(self, session: int) -> None:
        self.endpoint.terminate(session, self._ports.monotonic())
        self.pump()

    def move(self, session: int, local: Endpoint, remote: Endpoint) -> bool:
        """By MOBIKE; whether it can be done."""
        done = self.endpoint.move(session, local, remote, self._ports.monotonic())
        self.pump()
        return done

    def check_liveness(self, session: int) -> None:
        self.endpoint.check_liveness(session, self._ports.monotonic())
        self.pump()

    def close(self, spi_in: int) -> None:
        """Delete one CHILD SA, and its IKE SA with the last of them."""
        self.endpoint.delete_child(spi_in, self._ports.monotonic())
        self.pump()

    def rekey(self, spi_in: int) -> None:
        self.endpoint.rekey_child(spi_in, self._ports.monotonic())
        self.pump()

    def rekey_ike(self, session: int) -> None:
        self.endpoint.rekey_ike(session, self._ports.monotonic())
        self.pump()

    async def shutdown(self, seconds: float) -> int:
        """Send Deletes to everyone, wait a little for the answers. Returns how many sessions there were."""
        self._closing = True
        now = self._ports.monotonic()
        sessions = self.endpoint.sessions()
        for info in sessions:
            self.endpoint.terminate(info.session, now)
        self.pump()
        deadline = now + seconds
        # A bounded wait, once in the daemon's life: not worth an event.
        while self.endpoint.sessions() and self._ports.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for task in list(self._tasks):
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        return len(sessions)

    def session_with(self, spi_in: int) -> SessionInfo | None:
        """The IKE SA that this CHILD SA belongs to."""
        return self.endpoint.session_with_child(spi_in)

    # ------------------------------------------------------------ what the endpoint wants

    def pump(self) -> None:
        """Handle all events, then send, then set the timer. Events may feed the engine, which may come back
        here: the outermost call does the work for all."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while events := self.endpoint.events():
                for event in events:
                    try:
                        self._handle(event)
                    except Exception as error:  # noqa: BLE001 - told; other sessions' events and timers go on
                        self._internal_error(error)
        finally:
            self._pumping = False
        datagrams = self.endpoint.datagrams()
        if datagrams:
            self._ports.send(datagrams)
        self._arm()

    def _arm(self) -> None:
        """A timer that is set already and too early does no harm; to set it anew with each message would cost."""
        when = self.endpoint.next_timer()
        if self._timer is not None:
            if when is not None and self._timer_at <= when:
                return
            self._timer.cancel()
            self._timer = None
        if when is not None:
            delay = max(0.0, when - self._ports.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._timer_fired)
            self._timer_at = when

    def _timer_fired(self) -> None:
        self._timer = None
        try:
            self.endpoint.handle_timer(self._ports.monotonic())
        except Exception as error:  # noqa: BLE001 - told; the timer must be set again
            self._internal_error(error)
        self.pump()

    def _handle(self, event: ike.IkeEvent) -> None:
        match event:
            case ike.NeedSpi() | ike.NeedSignature() | ike.NeedPsk() | ike.NeedPpk() | ike.NeedLease():
                self._answer(event.token, self._known_at_once(event))
            case ike.AddressesAssigned():
                self._connections.assigned(event)
            case ike.ReauthenticationBegun():
                self._reauthenticating(event)
            case ike.NeedPeerKey() | ike.NeedNarrowing() if self._answered(event):
                pass
            case ike.NeedPeerKey() | ike.NeedNarrowing() if len(self._tasks) >= MAX_QUESTIONS:
                self._answer(event.token, None)
            case ike.NeedStatus():
                self._spawn(self._check_status(event))
            case ike.NeedPeerKey():
                self._spawn(self._find_key(event))
            case ike.NeedNarrowing():
                self._spawn(self._narrow(event))
            case ike.ChildUp():
                self._child_up(event)
            case ike.ChildUsable() if self._connections.manager.owns(event.spi_in):
                self._connections.feed(conventional.ChildUsable(event.spi_in))
            case ike.ChildUsable():
                self._ports.feed(OutboundReady(event.spi_in))
            case ike.PathLost() if self._connections.has_session(event.session):
                self._connections.paths.lost(event)
            case ike.PeerMoved():
                session = self.endpoint.session(event.session)
                for child in session.children if session else ():
                    if self._connections.manager.owns(child.spi_in):
                        moved = conventional.ChildMoved(child.spi_in, event.local, event.remote, event.encap)
                        self._connections.feed(moved)
                        continue
                    self._ports.feed(TunnelMoved(child.spi_in, event.local, event.remote))
            case ike.ChildDown() if self._connections.manager.owns(event.spi_in):
                self._connections.feed(conventional.ChildWent(event.spi_in, event.reason.value))
            case ike.ChildFailed():
                self._connections.child_failed(event)
            case ike.ChildDown():
                self._ports.feed(TunnelDown(event.spi_in, event.reason.value))
            case ike.SessionFailed() if self._connections.has_session(event.session):
                self._connections.failed(event)
            case ike.SessionFailed():
                self._session_failed(event)
            case ike.IkeKeys():
                self._ports.log_ike_keys(event)
            case ike.IkeEstablished():
                self._ports.report(
                    "ike-established",
                    peer=str(event.remote.address),
                    id=str(event.identity),
                    authenticated=event.authenticated.value,
                    initiator=event.initiator,
                    suite=event.suite,
                )
                if self._connections.has_session(event.session):
                    self._connections.established(event)
            case ike.SessionDown():
                self._session_down(event)

    def _reauthenticating(self, event: ike.ReauthenticationBegun) -> None:
        if self._connections.has_session(event.replaces):
            self._connections.reauthenticating(event)
        else:
            self._vouched.follow(event.session, event.replaces)

    def _known_at_once(self, event: ike.Question) -> object:
        match event:
            case ike.NeedSpi():
                return self._ports.allocate_spi()
            case ike.NeedSignature():
                return self._sign(event)
            case ike.NeedPsk():
                return self._connections.answers.psk(event)
            case ike.NeedPpk():
                return self._connections.answers.ppk(event)
            case ike.NeedLease():
                return self._connections.answers.lease(event)
        return None

    def _answered(self, event: ike.NeedPeerKey | ike.NeedNarrowing) -> bool:
        """Whether a connection has the answer: what it refuses never becomes an opportunistic offer."""
        ask = self._connections.answers
        answer = ask.keys(event) if isinstance(event, ike.NeedPeerKey) else ask.narrow(event)
        if isinstance(answer, NotOurs):
            return False
        if isinstance(answer, ike.Refused) and isinstance(event, ike.NeedNarrowing):
            self._ports.report("offer-refused", peer=str(event.remote.address), reason=answer.reason)
        if answer is None and isinstance(event, ike.NeedPeerKey):
            reason = "its connection knows no key of it"
            self._ports.report(
                "no-key-for-peer", peer=str(event.remote.address), id=str(event.identity), reason=reason
            )
        self._answer(event.token, answer)
        return True

    def _sign(self, event: ike.NeedSignature) -> tuple[int, bytes] | None:
        try:
            key = self._connections.answers.key_of(event.session) or self._key
            return sign_auth(key.private, event.data, event.peer_hashes)
        except KeyFormatError as error:  # the peer knows no hash that suits our key
            now = self._ports.monotonic()
            alert = now >= self._sign_alert_at  # any stranger can have this: it must not fill the log
            if alert:
                self._sign_alert_at = now + SIGN_ALERT_SECONDS
            self._ports.report("cannot-sign", alert=alert, reason=str(error))
            return None

    def traffic_seen(self, spi_in: int) -> None:
        self.endpoint.traffic_seen(spi_in, self._ports.monotonic())

    def _answer(self, token: int, value: object) -> None:
        self.endpoint.answer(token, value, self._ports.monotonic())

    def _child_up(self, event: ike.ChildUp) -> None:
        if event.pair.connection:
            self._connections.feed(
                conventional.ChildCame(
                    event.session, event.pair, event.initiator, event.replaces, event.outbound
                )
            )
            return
        attempt, _ = self._attempt_of.get(event.session, (0, None))
        if event.replaces is None:
            self._forget_attempt(event.session)
        self._ports.feed(
            TunnelUp(event.pair, event.initiator, attempt, replaces=event.replaces, outbound=event.outbound)
        )

    def _forget_attempt(self, session: int) -> tuple[int, IpAddress] | None:
        known = self._attempt_of.pop(session, None)
        if known is not None:
            self._session_of.pop(known[0], None)
        return known

    def _session_failed(self, event: ike.SessionFailed) -> None:
        self._vouched.end(event.session)
        known = self._forget_attempt(event.session)
        text = event.text + (f" ({event.notify})" if event.notify else "")
        if known is None:
            self._ports.report(
                "ike-refused", peer=str(event.remote.address), failure=event.kind.value, reason=text
            )
            return
        attempt, destination = known
        failure = _FAILURES.get(event.kind, Failure.REJECTED)
        if failure is Failure.SILENT:
            self._contacted.discard(event.remote.address)  # INITIAL_CONTACT may never have arrived
        self._ports.feed(NegotiationFailed(destination, attempt, failure, text))

    def _session_down(self, event: ike.SessionDown) -> None:
        self._ports.report("ike-down", peer=str(event.remote.address), reason=event.reason.value)
        if self._connections.has_session(event.session):
            self._connections.down(event.session)
        self._vouched.end(event.session)
        known = self._forget_attempt(event.session)
        if known is not None:
            attempt, destination = known
            self._ports.feed(NegotiationFailed(destination, attempt, Failure.REJECTED, event.reason.value))

    # ------------------------------------------------------------ questions that take time

    async def _find_key(self, event: ike.NeedPeerKey) -> None:
        self._answer(event.token, await self._keys_for(event))
        self.pump()

    async def _keys_for(self, event: ike.NeedPeerKey) -> object:
        """What the DNS says comes before certificates; where we began, it has been asked already."""
        if self._vouched.has(event.session):
            return await self._vouched.keys(event)
        keys, reason = await self._admissions.keys_of(event.identity)
        if keys:
            return keys
        if event.certificates and self.endpoint.session(event.session) is not None:
            self._vouched.begin(event.session, event.remote.address)
            return await self._vouched.keys(event)
        self._ports.report(
            "no-key-for-peer", peer=str(event.remote.address), id=str(event.identity), reason=reason
        )
        return None

    async def _check_status(self, event: ike.NeedStatus) -> None:
        vouched = self._vouched.has(event.session)
        asked = self._vouched.status if vouched else self._connections.answers.status
        self._answer(event.token, await asked(event))
        self.pump()

    async def _narrow(self, event: ike.NeedNarrowing) -> None:
        offer = Offer(
            event.remote.address,
            event.local.address,
            event.authenticated,
            event.key,
            event.remote_ts,
            event.local_ts,
            event.identity,
            event.remote.port,
            self._vouched.address_of(event.session),
        )
        try:
            async with asyncio.timeout(ADMISSION_SECONDS):
                admission = await self._admissions.decide(offer)
        except TimeoutError:
            admission = Admission(refusal="the lookups for this offer took too long")
        if admission.refusal:
            self._ports.report("offer-refused", peer=str(event.remote.address), reason=admission.refusal)
            self._answer(event.token, ike.Refused(admission.refusal))
        else:
            authenticated = Authenticated.NAME if admission.by_name else None
            self._answer(
                event.token,
                ike.Narrowed(admission.local_ts, admission.remote_ts, authenticated=authenticated),
            )
        self.pump()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._internal_error(error)

    def _internal_error(self, error: BaseException) -> None:
        self._ports.report("internal-error", alert=True, reason=f"{type(error).__name__}: {error}")
        asyncio.get_running_loop().call_exception_handler(
            {"message": "a step of IKE failed", "exception": error}
        )
