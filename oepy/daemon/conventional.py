"""Conventional connections in the daemon: the manager's actions carried out, IKE SAs begun, IKE's news told; what
IKE asks is in `answers`."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from oepy.connections import messages as m
from oepy.connections.manager import Manager
from oepy.connections.model import Child, Connection, ConnectionSet
from oepy.daemon.answers import Answers
from oepy.daemon.book import Book, Changes
from oepy.daemon.connection_values import (
    ike_offers,
    lifetimes_of_child,
    listed,
    names_of,
    selectors,
)
from oepy.daemon.crlreader import read_long_crl
from oepy.daemon.paths import Paths
from oepy.daemon.pools import Pools
from oepy.daemon.revocation import Revocation
from oepy.daemon.traffic import Traffic
from oepy.daemon.trust import Trusts, endings
from oepy.daemon.updown import Updown
from oepy.daemon.vips import Vips
from oepy.daemon.vouched import VouchedPeers
from oepy.daemon.whereabouts import Whereabouts
from oepy.errors import OepyError
from oepy.exchange import Exchange
from oepy.ike import events as ike
from oepy.ike.settings import ChildRequest, Initiate, Ppk
from oepy.keys import HostKey
from oepy.model import (
    IKE_PORT,
    Authenticated,
    Endpoint,
    IpAddress,
    PeerIdentity,
    Secret,
)

if TYPE_CHECKING:
    from oepy.daemon.core import Core

LOOK_SECONDS = 60.0  # between two looks at certificates
TOLD_AGAIN = 86400.0  # seconds between two alerts about one certificate that ends
MAX_ENDINGS_TOLD = 16
_PERMANENT = (ike.FailureKind.REJECTED, ike.FailureKind.PROOF_FAILED, ike.FailureKind.REFUSED)


class Conventional:
    """One for the daemon. Answers come at once: nothing here waits for a network but the names in remote_addrs."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.book = Book.empty(self._wall_clock)
        self.traffic = Traffic(core)
        self.whereabouts = Whereabouts(core, self.book)
        self._contacted: set[tuple[str, IpAddress]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.updown = Updown(core.journal.add)
        self.vips = Vips(core)
        self.paths = Paths(core)

    def wire(self) -> None:
        given = self._core.given
        self.manager = Manager(given.random)
        self.pools = Pools(given.leases, self._core.journal.add)
        self.revocation = Revocation(given.fetch, read_long_crl, given.wall_clock)
        self.vouched = VouchedPeers(self._core, self.book, self.revocation)
        self.answers = Answers(
            *(
                self._core,
                self.book,
                self.manager,
                self.pools,
                self.vips,
                self.revocation,
                self.traffic.claims,
            )
        )

    def _wall_clock(self) -> float:
        return self._core.given.wall_clock()

    # ------------------------------------------------------------ configuration

    def load(self, configured: ConnectionSet, keys: dict[str, HostKey]) -> None:
        """`keys`: the private keys that local sides name, by file."""
        self.apply(self.book.changes(configured), keys)

    def apply(self, changes: Changes, keys: dict[str, HostKey]) -> None:
        """Only the difference takes effect."""
        configured = changes.configured
        trusts = Trusts(configured, self._wall_clock)
        touched = self._touched(configured, keys, trusts)
        secrets = self._secrets_before(changes)
        vouching = self.book.configured.vouching
        trusted = self.book.trusts.of(vouching) if vouching is not None else None
        self.pools.load(configured.pools, self._core.given.own_addresses)
        self.book.load(changes, trusts, keys)
        touched |= {
            name
            for name, secret in secrets.items()
            if name in self.book.by_name and self._secret_of(self.book.by_name[name]) != secret
        }
        self.revocation.begin_anew(trusts.authority_of)
        self.answers.forget_settings()
        self.traffic.load(changes.connections)
        self.vouched.reload(trusted)
        anew = touched.difference(connection.name for connection in changes.connections.fresh)
        again = [self.book.by_name[name] for name in anew]
        gone, fresh = changes.connections.gone, changes.connections.fresh
        self.feed(m.Load(Exchange((*gone, *again), (*fresh, *again)), frozenset(touched)))

    def _touched(self, configured: ConnectionSet, keys: dict[str, HostKey], trusts: Trusts) -> set[str]:
        """The connections whose pool, PPK or key, or whom they trust, is another, though they read the same; their
        secrets are looked at elsewhere. An own certificate that was renewed disturbs nobody: it is shown from the
        next IKE SA on."""
        before = self.book.configured
        pools = self.pools.changed(configured.pools)
        ppks = configured.ppks != before.ppks
        others = {
            file
            for file, key in keys.items()
            if file in self.book.keys and self.book.keys[file].public != key.public
        }
        files = {
            file
            for file, found in configured.certificates.items()
            if before.certificates.get(file, found) != found
        }
        if not (pools or ppks or others or files):
            return set()
        return {
            one.name
            for one in configured.connections
            if not pools.isdisjoint(one.pools)
            or one.local.key in others
            or (ppks and one.ppk_id and configured.ppk(one.ppk_id) != before.ppk(one.ppk_id))
            or (
                not files.isdisjoint((*one.remote.cacerts, *one.remote.certs))
                and self.book.by_name.get(one.name) == one
                and self.book.trusts.of(one) != trusts.of(one)
            )
        }

    def _secrets_before(self, changes: Changes) -> dict[str, Secret | None]:
        """Of the connections whose secret may be another afterwards."""
        concerned = self.book.matcher.concerned((*changes.secrets.gone, *changes.secrets.fresh))
        if concerned is None:
            concerned = self.book.configured.connections
        return {one.name: self._secret_of(one) for one in concerned if one.local.auth == "psk"}

    def _secret_of(self, connection: Connection) -> Secret | None:
        """By what the configuration names; addresses that are not known before are left out."""
        ours, theirs = (
            names_of(connection.local.id, connection.local_addrs),
            names_of(connection.remote.id.exact(), connection.remote_addrs),
        )
        return self.book.matcher.secret(ours, theirs)

    # ------------------------------------------------------------ the manager

    def feed(self, message: m.ManagerInput) -> None:
        for action in self.manager.handle(message, self._core.given.monotonic()):
            self._core.steps.do(functools.partial(self._act, self._complete(action)))
        self._arm()

    def _complete(self, action: m.ManagerAction) -> m.ManagerAction:
        """What may be forgotten by the time that the action has its turn."""
        if not isinstance(action, m.RunUpdown):
            return action
        told = self.vips.told(action.session)
        return replace(action, addresses=told.addresses, dns=told.dns)

    def _arm(self) -> None:
        when = self.manager.next_timer()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if when is not None:
            delay = max(when - self._core.given.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self.feed, m.Tick())

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.updown.stop()
        self.paths.stop()
        if hasattr(self, "pools"):
            self.pools.write()

    def _act(self, action: m.ManagerAction) -> Any:
        """Carry out one action; what is returned is awaited before the next."""
        core = self._core
        match action:
            case m.Begin():
                core.spawn(self._begin(action))
            case m.AddChild(session, connection, child):
                self._add_child(session, connection, child)
            case m.Install():
                return core.at_once(self._install(action))
            case m.Remove(spi_in):
                return core.at_once(core.datapath.remove(spi_in))
            case m.Join():
                self._join(action)
            case m.RefuseHeld(number):
                core.trap.refuse(number)
            case m.Resettle(numbers):
                self.traffic.settle(numbers)
            case m.CloseChild(spi_in):
                core.negotiator.close(spi_in)
            case m.CloseSession(session):
                core.negotiator.end_session(session)
            case m.ReadUse(spis):
                core.spawn(self._read_use(spis))
            case m.RunUpdown():
                core.spawn(self._run_updown(action))
            case m.Tell(event, fields, alert):
                core.journal.add(event, alert, **fields)
        return None

    async def _install(self, action: m.Install) -> None:
        core, pair = self._core, action.pair
        if core.given.key_log is not None and not action.moves:
            core.given.key_log.write_esp(pair)
        try:
            await core.datapath.install(pair, outbound=action.outbound)
        except OepyError as error:
            core.journal.add("install-failed", True, connection=pair.connection, reason=str(error))
            # What could not move is negotiated anew, like what a datapath that ended has lost
            reason = "datapath" if action.moves else f"the datapath refused it: {error}"
            # After the rest of what was to be done
            asyncio.get_running_loop().call_soon(self._install_failed, pair.spi_in, reason)

    def _install_failed(self, spi_in: int, reason: str) -> None:
        self.feed(m.ChildWent(spi_in, reason))
        self._core.negotiator.close(spi_in)

    def _join(self, action: m.Join) -> None:
        state = self.manager.by_number(action.number)
        if state is None or not (state.child.if_id_in and state.child.if_id_out):
            self._core.trap.join(action.number, action.gone, action.fresh)
        if state is not None:  # else unloaded meanwhile: `settle` forgets it
            self.traffic.carry(state, action)
        self.vips.settle()

    async def _read_use(self, spis: tuple[int, ...]) -> None:
        try:
            counters = await self._core.datapath.counters(spis)
        except OepyError:
            return  # the process has ended, and all tunnels with it
        self.feed(m.Use({c.spi_in: c.packets_in + c.packets_out for c in counters}))

    async def _run_updown(self, action: m.RunUpdown) -> None:
        await self._core.steps.idle()  # the answer is sent, the SA is there
        await self.updown.run(action)

    # ------------------------------------------------------------ as initiator

    async def _begin(self, action: m.Begin) -> None:
        connection, child = action.connection, action.child
        problem = ""
        request: Initiate | None = None
        await self.whereabouts.resolve(connection)
        ends = self.whereabouts.ends(connection)
        if ends is None:
            wanted = ", ".join(str(place) for place in connection.remote_addrs)
            problem = f"no route to {wanted}, or the name is not known now"
        else:
            request, problem = self._request(connection, child, *ends)
        if request is None:
            self.feed(m.Failed(action.attempt, 0, problem, permanent=False))
            return
        session = self._core.negotiator.initiate(request)
        self.book.connection_of[session] = connection
        if request.ppk is not None:
            self.book.ppk_used.add(session)  # where it is required, IKE has seen to it
        if len(self._contacted) < 100_000:
            self._contacted.add((connection.name, request.remote.address))
        self.feed(m.Began(action.attempt, session))
        self._core.negotiator.pump()

    def connection_of(self, session: int) -> Connection | None:
        return self.book.connection_of.get(session)

    def _request(
        self, connection: Connection, child: Child, local: IpAddress, remote: IpAddress
    ) -> tuple[Initiate | None, str]:
        local_ts = selectors(child.local_ts, () if connection.vips else (local,))
        remote_ts = selectors(child.remote_ts, (remote,))
        ppk = None
        if connection.ppk_id or connection.ppk_required:
            secret = self.book.configured.ppk(connection.ppk_id)
            if secret is None:
                return None, f"no PPK {connection.ppk_id!r} is configured (a secret of type ppk)"
            ppk = Ppk(connection.ppk_id.encode(), secret, connection.ppk_required)
        psk = None
        if connection.local.auth == "psk":
            ours = {connection.local.id or PeerIdentity.address(local), PeerIdentity.address(local)}
            theirs = {PeerIdentity.address(remote)} | {connection.remote.id.exact()} - {None}
            psk = self.book.matcher.secret(ours, [one for one in theirs if one is not None])
            if psk is None:
                return None, f"no secret for {listed(ours)} and {listed(theirs)} is configured"
        return Initiate(
            local=Endpoint(local, IKE_PORT),
            remote=Endpoint(remote, IKE_PORT),
            local_ts=local_ts,
            remote_ts=remote_ts,
            remote_keys=connection.remote.pubkeys,
            psk=psk,
            accept_null=connection.remote.auth == "null",
            own_auth="pubkey" if connection.local.auth == "x509" else connection.local.auth,
            by_certificate=connection.remote.auth == "x509",
            identity=connection.local.id,
            expected_identity=None if connection.remote.auth == "null" else connection.remote.id.exact(),
            ike_offers=ike_offers(connection),
            esp_offers=self.answers.offers_of(child.esp_proposals, child.ah_proposals),
            initial_contact=(connection.name, remote) not in self._contacted,
            authenticated_by="manual",
            connection=connection.label(child),
            lifetimes=lifetimes_of_child(child),
            settings=self.answers.settings_of(connection),
            mode=child.mode,
            want_addresses=tuple(sorted(address.version for address in connection.vips)),
            had_addresses=self._wanted(connection),
            ppk=ppk,
            childless=connection.childless if connection.childless in ("prefer", "force") else "never",
        ), ""

    def _wanted(self, connection: Connection) -> tuple[IpAddress, ...]:
        """Named in the configuration, or what we had last time."""
        had = {address.version: address for address in self.vips.had(connection.name)}
        wanted = (
            had.get(address.version) if address.is_unspecified else address for address in connection.vips
        )
        return tuple(address for address in wanted if address is not None)

    def _add_child(self, session: int, connection: Connection, child: Child) -> None:
        info = self._core.negotiator.endpoint.session(session)
        if info is None:
            self.feed(m.ChildRefused(connection.label(child), "the IKE SA has just gone", permanent=False))
            return
        self._core.negotiator.create_child(
            session,
            ChildRequest(
                selectors(child.local_ts, self.vips.of(session) or (info.local.address,)),
                selectors(child.remote_ts, self.pools.of(session) or (info.remote.address,)),
                self.answers.offers_of(child.esp_proposals, child.ah_proposals),
                child.mode,
                connection=connection.label(child),
                lifetimes=lifetimes_of_child(child),
            ),
        )

    async def watch_certificates(self) -> None:
        """Those that end, and what responders say of our own, to send along (RFC 4806)."""
        told: dict[str, float] = {}
        while True:
            now = self._wall_clock()
            for ending in endings(self.book.configured, now)[:MAX_ENDINGS_TOLD]:
                if now - told.get(ending.certificate, float("-inf")) >= TOLD_AGAIN:
                    told[ending.certificate] = now
                    reason = f"{ending}; {ending.mend}"
                    self._core.journal.add(
                        "certificate-ends", True, subject=ending.certificate, reason=reason
                    )
            if await self.book.trusts.refresh_responses(self.revocation):
                self.answers.forget_settings()
            await asyncio.sleep(LOOK_SECONDS)

    # ------------------------------------------------------------ IKE's news

    def has_session(self, session: int) -> bool:
        return session in self.book.connection_of

    def established(self, event: ike.IkeEstablished) -> None:
        connection = self.book.connection_of[event.session]
        wrong = event.initiator and connection.remote.auth != "null"
        if wrong and not connection.remote.id.matches(event.identity):
            text = f"the peer is {event.identity}, not {connection.remote.id.text}"
            self._core.negotiator.end_session(event.session)
            self.feed(m.Failed(0, event.session, text, permanent=True))
            return
        if connection.ppk_required and event.session not in self.book.ppk_used:
            self._core.negotiator.end_session(event.session)  # without a child nobody has asked before
            return
        anonymous = event.authenticated is Authenticated.NULL
        identity = "" if anonymous else str(event.identity)
        # Where many may have one identity, nobody asks
        again = connection.unique in ("keep", "replace") and any(
            info is not None and info.remote == event.remote
            for info in map(
                self._core.negotiator.endpoint.session, self.manager.sessions_of(connection.name, identity)
            )
        )
        self.feed(m.Established(event.session, connection.name, identity, event.initiator, again))

    def assigned(self, event: ike.AddressesAssigned) -> None:
        connection = self.book.connection_of.get(event.session)
        if connection is not None:
            self.vips.assign(connection.name, event)

    def reauthenticating(self, event: ike.ReauthenticationBegun) -> None:
        """The new session is of the same connection; what comes up in it takes the place of the old one's."""
        self.book.connection_of[event.session] = self.book.connection_of[event.replaces]
        if event.replaces in self.book.ppk_used:
            self.book.ppk_used.add(event.session)

    def _forget(self, session: int) -> None:
        self.book.ppk_used.discard(session)
        self.vips.release(session)
        self.pools.release(session)

    def failed(self, event: ike.SessionFailed) -> None:
        connection = self.book.connection_of.pop(event.session)
        self.book.path_of.pop(event.session, None)
        self._forget(event.session)
        text = event.text + (f" ({event.notify})" if event.notify else "")
        if event.kind is ike.FailureKind.SILENT:
            self._contacted.discard((connection.name, event.remote.address))
        if not event.initiator:
            self._core.journal.add(
                "connection-refused",
                connection=connection.name,
                peer=str(event.remote.address),
                id=str(event.identity),
                failure=event.kind.value,
                reason=text,
            )
            return
        superseded = event.kind is ike.FailureKind.SUPERSEDED
        self.feed(m.Failed(0, event.session, text, event.kind in _PERMANENT, superseded))

    def down(self, session: int) -> None:
        self.book.connection_of.pop(session, None)
        self.book.path_of.pop(session, None)
        self._forget(session)
        self.feed(m.Gone(session))

    def child_failed(self, event: ike.ChildFailed) -> None:
        text = event.text + (f" ({event.notify})" if event.notify else "")
        temporary = event.notify == "TEMPORARY_FAILURE" or event.kind is not ike.FailureKind.REJECTED
        self.feed(m.ChildRefused(event.connection, text, permanent=not temporary))


__all__ = ["Conventional"]
