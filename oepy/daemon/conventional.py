"""Conventional connections in the daemon: the manager's actions carried out, IKE SAs begun, IKE's news told; what
IKE asks is in `answers`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network, summarize_address_range
from typing import TYPE_CHECKING, Any

from oepy.connections import messages as m
from oepy.connections.manager import ChildState, Manager
from oepy.connections.match import Matcher
from oepy.connections.model import Child, Connection, ConnectionSet
from oepy.daemon.answers import Answers
from oepy.daemon.book import Book
from oepy.daemon.connection_values import (
    both_ways,
    ike_offers,
    lifetimes_of_child,
    listed,
    names_of,
    narrowest,
    past_the_trap,
    rank_of,
    selectors,
)
from oepy.daemon.crlreader import read_long_crl
from oepy.daemon.paths import Paths
from oepy.daemon.pools import Pools
from oepy.daemon.revocation import Revocation
from oepy.daemon.trust import Trusts, endings
from oepy.daemon.updown import Updown
from oepy.daemon.vips import Vips
from oepy.engine import messages as engine_messages
from oepy.errors import OepyError
from oepy.ike import events as ike
from oepy.ike.endpoint import SessionInfo
from oepy.ike.settings import ChildRequest, Initiate, Ppk
from oepy.interfaces import ConfiguredRule, Way
from oepy.keys import HostKey
from oepy.model import (
    IKE_PORT,
    AddressRange,
    Authenticated,
    Endpoint,
    IpAddress,
    PeerIdentity,
    Secret,
)
from oepy.prefixtable import PrefixTable

if TYPE_CHECKING:
    from oepy.daemon.core import Core

RESOLVE_SECONDS = 60.0  # between two looks at the names in remote_addrs
RESOLVE_LIMIT = 10.0
TOLD_AGAIN = 86400.0  # seconds between two alerts about one certificate that ends
MAX_ENDINGS_TOLD = 16
_PERMANENT = (ike.FailureKind.REJECTED, ike.FailureKind.PROOF_FAILED, ike.FailureKind.REFUSED)
_Ranked = tuple[tuple[tuple[int, ...], ConfiguredRule], ...]
_ANYWHERE = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}


class Conventional:
    """One for the daemon. Answers come at once: nothing here waits for a network but the names in remote_addrs."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.book = Book.empty(self._wall_clock)
        self._claimed: PrefixTable[str] = (
            PrefixTable()
        )  # all fixed remote selectors: opportunistic peers get none of it
        self._settled: PrefixTable[str] = (
            PrefixTable()
        )  # what connections carry or hold now: the engine keeps off
        self._rules: dict[int, tuple[tuple[object, ...], _Ranked]] = {}  # by child's number, and of what
        self._joined: dict[int, set[AddressRange]] = {}  # by child's number: what its tunnels carry
        self._contacted: set[tuple[str, IpAddress]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._resettles = False
        self.updown = Updown(core.journal.add)
        self.vips = Vips(core)
        self.paths = Paths(core)

    def wire(self) -> None:
        given = self._core.given
        self.manager = Manager(given.random)
        self.pools = Pools(given.leases, self._core.journal.add)
        self.revocation = Revocation(given.fetch, read_long_crl, given.wall_clock)
        self.answers = Answers(
            *(self._core, self.book, self.manager, self.pools, self.vips, self.revocation, self.claims)
        )

    def _wall_clock(self) -> float:
        return self._core.given.wall_clock()

    # ------------------------------------------------------------ configuration

    def load(self, configured: ConnectionSet, keys: dict[str, HostKey]) -> None:
        """Only the difference takes effect. `keys`: the private keys that local sides name, by file."""
        matcher = Matcher(configured)
        trusts = Trusts(configured, self._wall_clock)
        touched = self._touched(configured, keys, matcher, trusts)
        self.pools.load(configured.pools, self._core.given.own_addresses)
        self.book.load(configured, matcher, trusts, keys)
        self.revocation.begin_anew(trusts.authority_of)
        self.answers.forget_settings()
        self._claimed = PrefixTable()
        for connection in configured.connections:
            for child in connection.children:
                for selector in child.remote_ts:
                    if selector.network is not None and not selector.protocol:
                        self._claimed.add(selector.network, connection.label(child))
        self.feed(m.Load(configured, touched))

    def _touched(
        self, configured: ConnectionSet, keys: dict[str, HostKey], matcher: Matcher, trusts: Trusts
    ) -> frozenset[str]:
        """The connections whose secret or key, or whom they trust, is another, although they read the same. An own
        certificate that was renewed disturbs nobody: it is shown from the next IKE SA on."""
        found = set()
        other_pools = self.pools.changed(configured.pools)
        for connection in configured.connections:
            if other_pools & set(connection.pools):
                found.add(connection.name)
            if connection.ppk_id and configured.ppk(connection.ppk_id) != self.book.configured.ppk(
                connection.ppk_id
            ):
                found.add(connection.name)
            name = connection.local.key
            if name and name in self.book.keys and self.book.keys[name].public != keys[name].public:
                found.add(connection.name)
            if connection.local.auth == "psk" and self.secret_of(
                connection, self.book.matcher
            ) != self.secret_of(connection, matcher):
                found.add(connection.name)
            same = self.book.by_name.get(connection.name) == connection and connection.remote.auth == "x509"
            if same and self.book.trusts.of(connection) != trusts.of(connection):
                found.add(connection.name)
        return frozenset(found)

    def secret_of(self, connection: Connection, matcher: Matcher) -> Secret | None:
        """By what the configuration names; addresses that are not known before are left out."""
        ours, theirs = (
            names_of(connection.local.id, connection.local_addrs),
            names_of(connection.remote.id.exact(), connection.remote_addrs),
        )
        return matcher.secret(ours, theirs)

    def rules(self) -> tuple[ConfiguredRule, ...]:
        """For the trap: narrower destinations first, then in the order of the file."""
        found: list[tuple[tuple[int, ...], int, ConfiguredRule]] = []
        states = self.manager.children.values()
        for order, state in enumerate(states):
            found += [(rank, order, rule) for rank, rule in self._ranked(state)]
        if len(self._rules) > 2 * len(states) + 64:
            self._rules = {state.number: self._rules[state.number] for state in states}
        return tuple(rule for _, _, rule in sorted(found, key=lambda item: item[:2]))

    def _ranked(self, state: ChildState) -> _Ranked:
        """The same objects as last time, where nothing has changed: with ten thousand connections only the new ones
        have to be made and compared."""
        ends = self._fixed(state)
        of = (state.trapped, *ends)
        known = self._rules.get(state.number)
        if known is None or known[0] != of:
            known = of, tuple((rank_of(rule), rule) for rule in self._rules_of(state, *ends))
            self._rules[state.number] = known
        return known[1]

    def _rules_of(
        self, state: ChildState, here: IpAddress | None, there: IpAddress | None
    ) -> Iterable[ConfiguredRule]:
        for local in state.child.local_ts:
            for remote in state.child.remote_ts:
                for version in (4, 6):
                    ours = local.network or (ip_network(here) if here else _ANYWHERE[version])
                    theirs = remote.network or (ip_network(there) if there else _ANYWHERE[version])
                    both = local.protocol and remote.protocol and local.protocol != remote.protocol
                    if ours.version != version or theirs.version != version or both:
                        continue
                    if state.child.if_id:
                        protocol = local.protocol or remote.protocol
                        yield from past_the_trap(ours, theirs, protocol, local.port, remote.port)
                        continue
                    yield from both_ways(
                        *(ours, theirs, local.protocol or remote.protocol, local.port, remote.port),
                        number=state.number,
                        required=state.trapped,
                        transport=state.child.mode == "transport",
                    )

    def _fixed(self, state: ChildState) -> tuple[IpAddress | None, IpAddress | None]:
        """What `dynamic` is on each side, where it can be one address only: the outer one, unless one is assigned.
        A route is asked for only where ours is `dynamic`."""
        connection = state.connection
        remotes = [place.address for place in connection.remote_addrs]
        there = remotes[0] if len(remotes) == 1 and not connection.pools else None
        locals_ = [place.address for place in connection.local_addrs]
        here = locals_[0] if len(locals_) == 1 else None
        if connection.vips:
            return None, there  # our side is what the peer will give us
        is_dynamic = any(selector.network is None for selector in state.child.local_ts)
        if here is None and there is not None and is_dynamic:
            here = self._core.given.source_towards(there)
        return here, there

    def settles(self, address: IpAddress) -> str | None:
        """Which child has this destination now, so that the engine has nothing to do with it."""
        return narrowest(self._settled, address)

    def claims(self, address: IpAddress) -> str | None:
        """Which child names this destination, up or not."""
        return narrowest(self._claimed, address) or narrowest(self._settled, address)

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
                return self._install(action)
            case m.Remove(spi_in):
                return core.datapath.remove(spi_in)
            case m.Join():
                self._join(action)
            case m.RefuseHeld(number):
                core.trap.refuse(number)
            case m.Resettle(rules):
                self._settle(rules=rules)
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
            self.feed(m.ChildWent(pair.spi_in, reason))
            core.negotiator.close(pair.spi_in)

    def _join(self, action: m.Join) -> None:
        state = self.manager.by_number(action.number)
        if state is None or not state.child.if_id:
            self._core.trap.join(action.number, action.gone, action.fresh)
        if state is not None:  # else unloaded meanwhile: _settle forgets it
            self._carry(state, action)
        self.vips.settle()

    def _carry(self, state: ChildState, action: m.Join) -> None:
        joined = self._joined.setdefault(action.number, set())
        for gone in joined.intersection(action.gone):
            for network in summarize_address_range(*gone):
                self._settled.remove(network, state.label)
        for fresh in set(action.fresh) - joined:
            for network in summarize_address_range(*fresh):
                self._settled.add(network, state.label)
        joined.difference_update(action.gone)
        joined.update(action.fresh)
        if action.gone or action.fresh:
            self._later()

    def _settle(self, *, rules: bool) -> None:
        if rules:
            self._settled = PrefixTable()
            for number in list(self._joined):
                joined_by = self.manager.by_number(number)
                if joined_by is None:
                    del self._joined[number]
                    continue
                for carried in self._joined[number]:
                    for network in summarize_address_range(*carried):
                        self._settled.add(network, joined_by.label)
            for state in self.manager.children.values():
                for _, rule in self._ranked(state) if state.trapped else ():
                    if rule.way is Way.OUT and not rule.protocol:
                        self._settled.add(rule.destination, state.label)
            self._core.reload_trap()
        self._later()

    def _later(self) -> None:
        """The engine looks through all its destinations: once for what happens together."""
        if not self._resettles:
            asyncio.get_running_loop().call_soon(self._now)
        self._resettles = True

    def _now(self) -> None:
        self._resettles = False
        if self._core.engine.entries:
            self._core.feed(engine_messages.Reloaded())

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
        await self._resolve(connection)
        ends = self._ends(connection)
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

    def _ends(self, connection: Connection) -> tuple[IpAddress, IpAddress] | None:
        """The first remote address that there is a way to, and ours towards it."""
        for remote in self.remotes_of(connection):
            local = self.local_towards(connection, remote)
            if local is not None:
                return local, remote
        return None

    def remotes_of(self, connection: Connection) -> list[IpAddress]:
        """The addresses of the peer that are known, in the order of the configuration."""
        found: list[IpAddress] = []
        for place in connection.remote_addrs:
            found += (
                [place.address] if place.address else sorted(self.book.resolved.get(place.name, ()), key=str)
            )
        return found

    def local_towards(self, connection: Connection, remote: IpAddress) -> IpAddress | None:
        """Ours, as the routes have it where that is allowed, else the first of those named that this host has."""
        routed = self._core.given.source_towards(remote)
        places = connection.local_addrs
        if routed is not None and any(place.network is None or routed in place.network for place in places):
            return routed
        for place in places:
            address = place.address
            if address and address.version == remote.version and self._core.given.is_own(address):
                return address
        return None

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

    async def _resolve(self, connection: Connection) -> None:
        names = [place.name for place in connection.remote_addrs if place.name]
        for name in names:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(RESOLVE_LIMIT):
                    found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_DGRAM)
                addresses = frozenset(ip_address(str(entry[4][0]).partition("%")[0]) for entry in found)
                if addresses != self.book.resolved.get(name):
                    self._core.journal.add(
                        "name-resolved", subject=name, reason=", ".join(sorted(map(str, addresses)))
                    )
                self.book.resolved[name] = addresses

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
            await asyncio.sleep(RESOLVE_SECONDS)

    async def watch_names(self) -> None:
        """Peers known by a name may begin from a new address, and are followed to it."""
        while True:
            for connection in self.book.configured.connections:
                if not any(place.name for place in connection.remote_addrs):
                    continue
                await self._resolve(connection)
                for session in self.manager.session_of(connection.name):
                    info = self._core.negotiator.endpoint.session(session)
                    moved = info is not None and not self._is_known(connection, info)
                    if moved:
                        self._core.journal.add(
                            "connection-moved",
                            connection=connection.name,
                            reason="its name leads elsewhere now",
                        )
                        self._core.negotiator.check_liveness(session)
            await asyncio.sleep(RESOLVE_SECONDS)

    def _is_known(self, connection: Connection, info: SessionInfo) -> bool:
        """Whether the peer may still be where the session has it."""
        if info.mobike:  # who decides moves where it likes
            known = (*self.remotes_of(connection), *info.peer_addresses)
            return info.mobike == "follows" or info.remote.address in known
        ends = info.local.address, info.remote.address
        return bool(self.book.matcher.by_address(*ends, self.book.resolved))

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
        again = any(
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
