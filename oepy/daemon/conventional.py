"""Conventional connections in the daemon: the manager's actions carried out, IKE's questions answered."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network, summarize_address_range
from typing import TYPE_CHECKING, Any

from oepy.connections import messages as m
from oepy.connections.manager import ChildState, Manager
from oepy.connections.match import Matcher
from oepy.connections.model import EMPTY, Child, Connection, ConnectionSet, Life, Place, Selector
from oepy.daemon.crlreader import read_long_crl
from oepy.daemon.paths import Paths
from oepy.daemon.pools import Pools
from oepy.daemon.revocation import Revocation
from oepy.daemon.trust import CertificateRefused, Trusts, asked_by_all, endings
from oepy.daemon.updown import Updown
from oepy.daemon.vips import Vips
from oepy.engine import messages as engine_messages
from oepy.errors import OepyError
from oepy.ike import events as ike
from oepy.ike.algorithms import DEFAULT_ESP, Offer, parse_ah_proposal, parse_esp_proposal, parse_ike_proposal
from oepy.ike.endpoint import SessionInfo
from oepy.ike.settings import ChildRequest, IkeSettings, Initiate, Lifetimes, Ppk
from oepy.interfaces import ConfiguredRule, Way
from oepy.keys import HostKey
from oepy.model import (
    IKE_PORT,
    AddressRange,
    Authenticated,
    Endpoint,
    IpAddress,
    IpNetwork,
    PeerIdentity,
    Secret,
    TrafficSelector,
    Verdict,
)
from oepy.prefixtable import PrefixTable
from oepy.x509.path import Path as X509Path

if TYPE_CHECKING:
    from oepy.daemon.core import Core

NEVER_SECONDS = 10 * 365 * 86400.0
RESOLVE_SECONDS = 60.0  # between two looks at the names in remote_addrs
RESOLVE_LIMIT = 10.0
TOLD_AGAIN = 86400.0  # seconds between two alerts about one certificate that ends
MAX_ENDINGS_TOLD = 16
_AUTHENTICATED = {
    "psk": Authenticated.PSK,
    "pubkey": Authenticated.MANUAL,
    "x509": Authenticated.X509,
    "null": Authenticated.NULL,
}
_PERMANENT = (ike.FailureKind.REJECTED, ike.FailureKind.PROOF_FAILED, ike.FailureKind.REFUSED)
_Ranked = tuple[tuple[tuple[int, ...], ConfiguredRule], ...]
_ANYWHERE = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}


@dataclass(frozen=True, slots=True)
class NotOurs:
    """The peer belongs to no connection: opportunistic encryption decides."""


NOT_OURS = NotOurs()


class Conventional:
    """One for the daemon. Answers come at once: nothing here waits for a network but the names in remote_addrs."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.configured: ConnectionSet = EMPTY
        self._by_name: dict[str, Connection] = {}
        self.matcher = Matcher(EMPTY)
        self.trusts = Trusts(EMPTY, self._wall_clock)
        self.resolved: dict[str, frozenset[IpAddress]] = {}
        self._keys: dict[str, HostKey] = {}
        self._connection_of: dict[int, Connection] = {}  # by IKE session
        self._claimed: PrefixTable[str] = (
            PrefixTable()
        )  # all fixed remote selectors: opportunistic peers get none of it
        self._settled: PrefixTable[str] = (
            PrefixTable()
        )  # what connections carry or hold now: the engine keeps off
        self._path_of: dict[int, X509Path] = {}  # by IKE session: the certificates that prove its peer
        self._rules: dict[int, tuple[tuple[object, ...], _Ranked]] = {}  # by child's number, and of what
        self._joined: dict[int, set[AddressRange]] = {}  # by child's number: what its tunnels carry
        self._contacted: set[tuple[str, IpAddress]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._resettles = False
        self.updown = Updown(core.journal.add)
        self.vips = Vips(core)
        self.paths = Paths(core)
        self._ppk_used: set[int] = set()  # IKE sessions of peers that have proved a PPK (RFC 8784)

    def wire(self) -> None:
        given = self._core.given
        self.manager = Manager(given.random)
        self.pools = Pools(given.leases, self._core.journal.add)
        self.revocation = Revocation(given.fetch, read_long_crl, given.wall_clock)
        self._settings_of = functools.lru_cache(maxsize=4096)(self._make_settings)
        self._settings_of_all = functools.lru_cache(maxsize=4096)(self._make_settings_of_all)
        self._offers_of = functools.lru_cache(maxsize=4096)(_child_offers)

    def _wall_clock(self) -> float:
        return self._core.given.wall_clock()

    # ------------------------------------------------------------ configuration

    def load(self, configured: ConnectionSet, keys: dict[str, HostKey]) -> None:
        """Only the difference takes effect. `keys`: the private keys that local sides name, by file."""
        matcher = Matcher(configured)
        trusts = Trusts(configured, self._wall_clock)
        touched = self._touched(configured, keys, matcher, trusts)
        self.pools.load(configured.pools, self._core.given.own_addresses)
        self._keys = keys
        self.configured = configured
        self._by_name = {connection.name: connection for connection in configured.connections}
        self.matcher = matcher
        self.trusts = trusts
        self.revocation.begin_anew(trusts.authority_of)
        self._forget_settings()
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
            if connection.ppk_id and configured.ppk(connection.ppk_id) != self.configured.ppk(
                connection.ppk_id
            ):
                found.add(connection.name)
            name = connection.local.key
            if name and name in self._keys and self._keys[name].public != keys[name].public:
                found.add(connection.name)
            if connection.local.auth == "psk" and self.secret_of(connection, self.matcher) != self.secret_of(
                connection, matcher
            ):
                found.add(connection.name)
            same = self._by_name.get(connection.name) == connection and connection.remote.auth == "x509"
            if same and self.trusts.of(connection) != trusts.of(connection):
                found.add(connection.name)
        return frozenset(found)

    def secret_of(self, connection: Connection, matcher: Matcher) -> Secret | None:
        """By what the configuration names; addresses that are not known before are left out."""
        ours, theirs = (
            _names(connection.local.id, connection.local_addrs),
            _names(connection.remote.id.exact(), connection.remote_addrs),
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
            known = of, tuple((_rank(rule), rule) for rule in self._rules_of(state, *ends))
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
                    yield from _both_ways(
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
        return _narrowest(self._settled, address)

    def claims(self, address: IpAddress) -> str | None:
        """Which child names this destination, up or not."""
        return _narrowest(self._claimed, address) or _narrowest(self._settled, address)

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
        self._core.trap.join(action.number, action.gone, action.fresh)
        state = self.manager.by_number(action.number)
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
        self._connection_of[session] = connection
        if request.ppk is not None:
            self._ppk_used.add(session)  # where it is required, IKE has seen to it
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
            found += [place.address] if place.address else sorted(self.resolved.get(place.name, ()), key=str)
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
        return self._connection_of.get(session)

    def _request(
        self, connection: Connection, child: Child, local: IpAddress, remote: IpAddress
    ) -> tuple[Initiate | None, str]:
        local_ts = _selectors(child.local_ts, () if connection.vips else (local,))
        remote_ts = _selectors(child.remote_ts, (remote,))
        ppk = None
        if connection.ppk_id or connection.ppk_required:
            secret = self.configured.ppk(connection.ppk_id)
            if secret is None:
                return None, f"no PPK {connection.ppk_id!r} is configured (a secret of type ppk)"
            ppk = Ppk(connection.ppk_id.encode(), secret, connection.ppk_required)
        psk = None
        if connection.local.auth == "psk":
            ours = {connection.local.id or PeerIdentity.address(local), PeerIdentity.address(local)}
            theirs = {PeerIdentity.address(remote)} | {connection.remote.id.exact()} - {None}
            psk = self.matcher.secret(ours, [one for one in theirs if one is not None])
            if psk is None:
                return None, f"no secret for {_text(ours)} and {_text(theirs)} is configured"
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
            ike_offers=_ike_offers(connection),
            esp_offers=self._offers_of(child.esp_proposals, child.ah_proposals),
            initial_contact=(connection.name, remote) not in self._contacted,
            authenticated_by="manual",
            connection=connection.label(child),
            lifetimes=_lifetimes(child),
            settings=self._settings_of(connection),
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
                _selectors(child.local_ts, self.vips.of(session) or (info.local.address,)),
                _selectors(child.remote_ts, self.pools.of(session) or (info.remote.address,)),
                self._offers_of(child.esp_proposals, child.ah_proposals),
                child.mode,
                connection=connection.label(child),
                lifetimes=_lifetimes(child),
            ),
        )

    async def _resolve(self, connection: Connection) -> None:
        names = [place.name for place in connection.remote_addrs if place.name]
        for name in names:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(RESOLVE_LIMIT):
                    found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_DGRAM)
                addresses = frozenset(ip_address(str(entry[4][0]).partition("%")[0]) for entry in found)
                if addresses != self.resolved.get(name):
                    self._core.journal.add(
                        "name-resolved", subject=name, reason=", ".join(sorted(map(str, addresses)))
                    )
                self.resolved[name] = addresses

    def _forget_settings(self) -> None:
        self._settings_of.cache_clear()
        self._settings_of_all.cache_clear()

    async def watch_certificates(self) -> None:
        """Those that end, and what responders say of our own, to send along (RFC 4806)."""
        told: dict[str, float] = {}
        while True:
            now = self._wall_clock()
            for ending in endings(self.configured, now)[:MAX_ENDINGS_TOLD]:
                if now - told.get(ending.certificate, float("-inf")) >= TOLD_AGAIN:
                    told[ending.certificate] = now
                    reason = f"{ending}; {ending.mend}"
                    self._core.journal.add(
                        "certificate-ends", True, subject=ending.certificate, reason=reason
                    )
            if await self.trusts.refresh_responses(self.revocation):
                self._forget_settings()
            await asyncio.sleep(RESOLVE_SECONDS)

    async def watch_names(self) -> None:
        """Peers known by a name may begin from a new address, and are followed to it."""
        while True:
            for connection in self.configured.connections:
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
        return bool(self.matcher.by_address(*ends, self.resolved))

    # ------------------------------------------------------------ IKE's questions

    def settings_for(self, local: Endpoint, remote: Endpoint) -> IkeSettings:
        """Of a peer that begins: by the addresses alone, as its identity is not known yet. Where the peer may
        belong to several connections, or to none, the proposals of all are acceptable; by its identity it is
        checked again."""
        base = self._core.given.ike_settings
        if not self.configured.connections:
            return base
        found = self.matcher.by_address(local.address, remote.address, self.resolved)
        if not found:
            return base
        certain = all(self._known_address(connection, remote.address) for connection in found)
        return self._settings_of_all(tuple(found), certain)

    def _make_settings_of_all(self, found: tuple[Connection, ...], certain: bool) -> IkeSettings:
        base = self._core.given.ike_settings
        every = [self._settings_of(connection) for connection in found]
        best = every[0]
        offers = tuple(dict.fromkeys(map(_Same, (o for one in every for o in one.ike_offers))))
        others = () if certain else tuple(map(_Same, base.ike_offers))
        unique = dict.fromkeys((*offers, *others))
        chosen = best if certain else base
        return replace(
            chosen,
            ike_offers=tuple(item.offer for item in unique),
            certificates=replace(chosen.certificates, **asked_by_all(one.certificates for one in every)),
            # What one of them could want is announced; by the peer's identity the rest is decided
            ppk="require" if certain and all(one.ppk == "require" for one in every) else self._ppks(),
            childless="accept" if any(one.childless != "never" for one in every) else "never",
        )

    def _ppks(self) -> str:
        return "accept" if self.configured.ppks else "never"

    def _known_address(self, connection: Connection, remote: IpAddress) -> bool:
        return any(
            place.address == remote or (place.name and remote in self.resolved.get(place.name, ()))
            for place in connection.remote_addrs
        )

    def psk(self, event: ike.NeedPsk) -> Secret | ike.Known:
        """A secret in any case: where there is none, one that nobody knows, so that the peer sees no difference
        in what comes back nor in when."""
        local = self._local_of(event)
        own = event.own_identity
        candidates = [
            connection
            for connection in self._by_identity(local, event.remote.address, event.identity, own)
            if connection.remote.auth == "psk"
        ]
        ours = {PeerIdentity.address(local)}
        for connection in candidates:
            ours = {connection.local.id or PeerIdentity.address(local), PeerIdentity.address(local)}
            secret = self.matcher.secret(ours, (event.identity, PeerIdentity.address(event.remote.address)))
            if secret is not None:
                self._connection_of[event.session] = connection
                return ike.Known(
                    psk=secret, authenticated=Authenticated.PSK, settings=self._settings_of(connection)
                )
        what = "no secret" if candidates else "no connection"
        pair = f"{_text(ours if candidates else {own} if own else ours)} and {event.identity}"
        self._core.journal.add(
            "no-secret-for-peer",
            peer=str(event.remote.address),
            id=str(event.identity),
            reason=f"{what} is configured for {pair}",
        )
        return Secret(self._core.given.random(32))

    def ppk(self, event: ike.NeedPpk) -> Secret | None:
        """The PPK by that name, unless the peer's connection uses another (RFC 8784)."""
        if not self.configured.ppks:
            return None
        name = event.name.decode(errors="replace")
        local = self._local_of(event)
        found = self._by_identity(local, event.remote.address, event.identity, None)
        if not any(connection.ppk_id in ("", name) for connection in found):
            return None
        secret = self.configured.ppk(name)
        if secret is not None:
            self._ppk_used.add(event.session)
        return secret

    def lease(self, event: ike.NeedLease) -> ike.Lease | None:
        connection = self._connection_of.get(event.session) or self._anonymous(event)
        if connection is None or not connection.pools:
            return None
        lease = self.pools.lease(event, connection.pools)
        peer, identity = str(event.remote.address), str(event.identity)
        if lease is None:
            reason = f"no address is left in {', '.join(connection.pools)}"
            self._core.journal.add(
                "no-address-left", True, connection=connection.name, peer=peer, id=identity, reason=reason
            )
        else:
            given = ", ".join(map(str, lease.addresses))
            self._core.journal.add(
                "address-leased", connection=connection.name, peer=peer, id=identity, reason=given
            )
        return lease

    def keys(self, event: ike.NeedPeerKey) -> ike.Known | ike.Refused | NotOurs | None:
        """The keys of the peer's connection; None where its connection knows no keys (so that it cannot come in by
        another door)."""
        if event.initiator:
            return self._certified(event, [self._connection_of[event.session]])
        if not self.configured.connections:
            return NOT_OURS
        local = self._local_of(event)
        found = self._by_identity(local, event.remote.address, event.identity, event.own_identity)
        named = [connection for connection in found if connection.remote.id.text != "%any"]
        by_key = [connection for connection in found if connection.remote.auth == "pubkey"]
        by_certificate = [connection for connection in found if connection.remote.auth == "x509"]
        pinned = any(connection.remote.certs for connection in by_certificate)
        if by_certificate and (event.certificates or pinned or named):
            answer = self._certified(event, by_certificate)
            if isinstance(answer, ike.Known) or (named and not by_key):
                return answer
        if by_key:
            self._connection_of[event.session] = by_key[0]
            keys = tuple(dict.fromkeys(key for c in by_key for key in c.remote.pubkeys))
            return ike.Known(keys, None, Authenticated.MANUAL, self._settings_of(by_key[0]))
        return None if named else NOT_OURS

    def _certified(self, event: ike.NeedPeerKey, connections: list[Connection]) -> ike.Known | ike.Refused:
        """By the first of the connections that accepts the peer's certificate; the key is still to be proven."""
        reasons = []
        for connection in connections:
            try:
                key, path = self.trusts.accept(connection, event.certificates, event.identity)
            except CertificateRefused as refusal:
                reasons.append(f"{connection.name}: {refusal}")
                continue
            self._connection_of[event.session] = connection
            self._path_of[event.session] = path
            return ike.Known((key,), None, Authenticated.X509, self._settings_of(connection))
        reason = f"its certificate is not accepted: {'; '.join(reasons[:4])}"
        self._core.journal.add(
            "certificate-refused", peer=str(event.remote.address), id=str(event.identity), reason=reason
        )
        return ike.Refused(reason)

    async def status(self, event: ike.NeedStatus) -> bool | ike.Refused:
        """Whether the certificates that prove this peer are still good, as far as anybody knows."""
        path, connection = self._path_of.get(event.session), self._connection_of.get(event.session)
        if path is None or connection is None:
            return ike.Refused("its connection has just changed")
        objection = await self.revocation.objection(path, connection.remote.revocation, event.responses)
        if not objection:
            return True
        self._core.journal.add(
            "certificate-refused",
            connection=connection.name,
            peer=str(event.remote.address),
            id=str(event.identity),
            reason=objection,
        )
        return ike.Refused(objection)

    def _by_identity(
        self, local: IpAddress, remote: IpAddress, identity: PeerIdentity, own: PeerIdentity | None
    ) -> list[Connection]:
        return self.matcher.by_identity(local, remote, identity, own, self.resolved)

    def _local_of(self, event: ike.NeedPsk | ike.NeedPeerKey | ike.NeedPpk) -> IpAddress:
        if not isinstance(event, ike.NeedPpk) and event.local is not None:
            return event.local.address
        info = self._core.negotiator.endpoint.session(event.session)
        assert info is not None
        return info.local.address

    def key_of(self, session: int) -> HostKey | None:
        """The private key that our side of this session has, None for the host key."""
        connection = self._connection_of.get(session)
        return self._keys.get(connection.local.key) if connection and connection.local.key else None

    def narrow(self, event: ike.NeedNarrowing) -> ike.Narrowed | ike.Refused | NotOurs:
        """Which child the peer's proposal is for, and what of it is allowed (RFC 7296 §2.9)."""
        connection = self._connection_of_peer(event)
        if connection is None:
            return self._unless_claimed(event)
        if connection.name not in self._by_name:
            return ike.Refused("its connection is no longer configured", peer=True)
        if connection.ppk_required and event.session not in self._ppk_used:
            return ike.Refused(f"the connection {connection.name} requires a PPK", peer=True)
        if not self._acceptable(connection, event.session):
            return ike.Refused(f"the IKE proposal is not one of the connection {connection.name}", peer=True)
        state = self.manager.by_spi(event.rekey_of) if event.rekey_of is not None else None
        if state is not None and event.rekey_of in state.tunnels:
            pair = state.tunnels[event.rekey_of].pair
            ours = _common(event.local_ts, pair.local_ts)
            theirs = _common(event.remote_ts, pair.remote_ts)
            return self._narrowed(connection, state.child, ours, theirs)
        found = []
        for order, child in enumerate(connection.children):
            here = self.vips.of(event.session) or (event.local.address,)
            there = self.pools.of(event.session) or (event.remote.address,)
            ours = _common(event.local_ts, _selectors(child.local_ts, here))
            theirs = _common(event.remote_ts, _selectors(child.remote_ts, there))
            theirs = self.pools.only_leased(connection.pools, event.session, theirs)
            if ours and theirs:
                whole = set(ours) == set(event.local_ts) and set(theirs) == set(event.remote_ts)
                found.append(((child.mode != event.mode, not whole, order), child, ours, theirs))
        if not found:
            if (
                connection.remote.auth == "null"
                and event.rekey_of is None
                and not self.pools.of(event.session)
            ):
                # Whoever proves nothing was taken for this one's by its address: it may be an opportunistic peer
                del self._connection_of[event.session]
                return self._unless_claimed(event)
            return ike.Refused(
                f"no child of {connection.name} has {_text(event.local_ts)} and {_text(event.remote_ts)}"
            )
        _, child, ours, theirs = min(found, key=lambda item: item[0])
        return self._narrowed(connection, child, ours, theirs)

    def _connection_of_peer(self, event: ike.NeedNarrowing) -> Connection | None:
        connection = self._connection_of.get(event.session)
        if connection is not None:
            by_key = connection.remote.auth == "pubkey" and event.key is not None
            if by_key and event.key not in connection.remote.pubkeys:
                # The same identity in several connections: the key decides
                connection = next(
                    (
                        other
                        for other in self._by_identity(
                            event.local.address, event.remote.address, event.identity, None
                        )
                        if event.key in other.remote.pubkeys
                    ),
                    connection,
                )
                self._connection_of[event.session] = connection
            return connection
        return self._anonymous(event)

    def _anonymous(self, event: ike.NeedNarrowing | ike.NeedLease) -> Connection | None:
        """The connection of a peer that proves nothing, where one takes such peers from there."""
        if event.authenticated is not Authenticated.NULL:
            return None
        for candidate in self.matcher.by_address(event.local.address, event.remote.address, self.resolved):
            if candidate.remote.auth == "null":
                self._connection_of[event.session] = candidate
                return candidate
        return None

    def _unless_claimed(self, event: ike.NeedNarrowing) -> ike.Refused | NotOurs:
        """Opportunistic peers get nothing that a connection names."""
        for selector in event.remote_ts[:16]:
            single = selector.start if selector.start == selector.end else event.remote.address
            if selector.contains_address(single) and (claimed := self.claims(single)):
                return ike.Refused(f"its traffic belongs to the connection {claimed}")
        return NOT_OURS

    def _acceptable(self, connection: Connection, session: int) -> bool:
        """Whether the IKE SA's algorithms are the connection's: by address it may have been taken for another."""
        suite = self._core.negotiator.endpoint.suite(session)
        return not suite or _ike_offers(connection) is None or _is_of(suite, connection.proposals)

    def _narrowed(
        self,
        connection: Connection,
        child: Child,
        ours: tuple[TrafficSelector, ...],
        theirs: tuple[TrafficSelector, ...],
    ) -> ike.Narrowed:
        return ike.Narrowed(
            ours,
            theirs,
            offers=self._offers_of(child.esp_proposals, child.ah_proposals),
            connection=connection.label(child),
            authenticated=_AUTHENTICATED[connection.remote.auth],
            mode=child.mode,
            settings=self._settings_of(connection),
            lifetimes=_lifetimes(child),
        )

    def _make_settings(self, connection: Connection) -> IkeSettings:
        base = self._core.given.ike_settings
        rekey, reauth = connection.rekey_time, connection.reauth_time
        longest = max(rekey, reauth)
        return replace(
            base,
            identity=connection.local.id,
            own_auth="null" if connection.local.auth == "null" else "pubkey",
            allow_null_initiator=connection.remote.auth == "null",
            certificates=self.trusts.settings(connection),
            ike_offers=_ike_offers(connection) or base.ike_offers,
            lifetimes=replace(
                base.lifetimes,
                ike_rekey=rekey or NEVER_SECONDS,
                ike_grace=connection.over_time or 600.0,
                ike_reauth=reauth,
                jitter=min(connection.rand_time / longest, 0.9) if longest else 0.0,
            ),
            liveness_interval=connection.dpd_delay,
            force_encap=base.force_encap or connection.encap,
            ppk="require" if connection.ppk_required else self._ppks(),
            mobike=connection.mobike,
            heeds_initial_contact=connection.unique != "never",
            additional_addresses=tuple(place.address for place in connection.local_addrs if place.address),
            childless={"never": "never", "force": "force"}.get(connection.childless, "accept"),
        )

    # ------------------------------------------------------------ IKE's news

    def has_session(self, session: int) -> bool:
        return session in self._connection_of

    def established(self, event: ike.IkeEstablished) -> None:
        connection = self._connection_of[event.session]
        wrong = event.initiator and connection.remote.auth != "null"
        if wrong and not connection.remote.id.matches(event.identity):
            text = f"the peer is {event.identity}, not {connection.remote.id.text}"
            self._core.negotiator.end_session(event.session)
            self.feed(m.Failed(0, event.session, text, permanent=True))
            return
        if connection.ppk_required and event.session not in self._ppk_used:
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
        connection = self._connection_of.get(event.session)
        if connection is not None:
            self.vips.assign(connection.name, event)

    def reauthenticating(self, event: ike.ReauthenticationBegun) -> None:
        """The new session is of the same connection; what comes up in it takes the place of the old one's."""
        self._connection_of[event.session] = self._connection_of[event.replaces]
        if event.replaces in self._ppk_used:
            self._ppk_used.add(event.session)

    def _forget(self, session: int) -> None:
        self._ppk_used.discard(session)
        self.vips.release(session)
        self.pools.release(session)

    def failed(self, event: ike.SessionFailed) -> None:
        connection = self._connection_of.pop(event.session)
        self._path_of.pop(event.session, None)
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
        self._connection_of.pop(session, None)
        self._path_of.pop(session, None)
        self._forget(session)
        self.feed(m.Gone(session))

    def child_failed(self, event: ike.ChildFailed) -> None:
        text = event.text + (f" ({event.notify})" if event.notify else "")
        temporary = event.notify == "TEMPORARY_FAILURE" or event.kind is not ike.FailureKind.REJECTED
        self.feed(m.ChildRefused(event.connection, text, permanent=not temporary))


# ---- values ------------------------------------------------------------------------------------------------


def _narrowest(table: PrefixTable[str], address: IpAddress) -> str | None:
    """The first label of the longest prefix."""
    found = max(table.matching(address), key=lambda item: item[0], default=None)
    return None if found is None else found[1][0]


class _Same:
    """An offer as a key: it is a dictionary."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self._key = tuple(offer.items())

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._key == other._key


def _child_offers(esp: tuple[str, ...], ah: tuple[str, ...]) -> tuple[Offer, ...] | None:
    """None: oepy's own list."""
    named = [parse_esp_proposal(text) for text in esp if text] or [
        parse_esp_proposal(text) for text in DEFAULT_ESP if esp
    ]
    return (*named, *map(parse_ah_proposal, ah)) or None


@functools.lru_cache(maxsize=4096)
def _offers(proposals: tuple[str, ...]) -> tuple[Offer, ...] | None:
    return tuple(parse_ike_proposal(text) for text in proposals if text) or None


def _ike_offers(connection: Connection) -> tuple[Offer, ...] | None:
    return _offers(connection.proposals)


@functools.lru_cache(maxsize=4096)
def _is_of(suite: str, proposals: tuple[str, ...]) -> bool:
    """Whether each algorithm of an IKE SA is in one of the proposals."""
    try:
        chosen = parse_ike_proposal(suite)
    except OepyError:
        return False
    return any(
        set(chosen) <= set(offer) and all(set(chosen[kind]) <= set(offer[kind]) for kind in chosen)
        for offer in _offers(proposals) or ()
    )


def _lifetimes(child: Child) -> Lifetimes:
    return _lifetimes_of(child.life)


@functools.lru_cache(maxsize=4096)
def _lifetimes_of(life: Life) -> Lifetimes:
    return Lifetimes(
        child_rekey=life.rekey_time,
        child_hard=life.life_time,
        child_soft_bytes=life.rekey_bytes,
        child_hard_bytes=life.life_bytes,
        child_soft_packets=life.rekey_packets,
        child_hard_packets=life.life_packets,
        child_jitter=min(life.rand_time / life.rekey_time, 0.9) if life.rekey_time else 0.0,
    )


def _selectors(configured: Iterable[Selector], dynamic: tuple[IpAddress, ...]) -> tuple[TrafficSelector, ...]:
    """`dynamic`: the addresses that the side has, inside where it was given some, else outside."""
    found = [
        selector.at(address)
        for selector in configured
        for address in (dynamic if selector.network is None else (None,))
    ]
    return tuple(selector for selector in found if selector is not None)


def _common(
    proposed: Iterable[TrafficSelector], allowed: Iterable[TrafficSelector]
) -> tuple[TrafficSelector, ...]:
    """What both have, without what lies in others of it."""
    allowed = tuple(allowed)
    found = dict.fromkeys(
        common for one in proposed for other in allowed if (common := one.intersect(other)) is not None
    )
    return tuple(one for one in found if not any(other != one and other.covers(one) for other in found))


def _names(identity: PeerIdentity | None, places: Iterable[Place]) -> list[PeerIdentity]:
    named = [identity] if identity is not None else []
    return named + [PeerIdentity.address(place.address) for place in places if place.address is not None]


def _text(items: Iterable[object]) -> str:
    return ", ".join(sorted(str(item) for item in items if item is not None)[:16])


def _both_ways(
    ours: IpNetwork,
    theirs: IpNetwork,
    protocol: int,
    our_port: int,
    their_port: int,
    *,
    number: int,
    required: bool,
    transport: bool,
) -> Iterable[ConfiguredRule]:
    common: dict[str, Any] = {
        "protocol": protocol,
        "required": required,
        "number": number,
        "transport": transport,
    }
    yield ConfiguredRule(
        *(Way.OUT, ours, theirs, Verdict.PRIVATE),
        source_port=our_port,
        destination_port=their_port,
        **common,
    )
    for way in (Way.IN, Way.FORWARD):
        yield ConfiguredRule(
            *(way, theirs, ours, Verdict.BLOCK),
            source_port=their_port,
            destination_port=our_port,
            **common,
        )


def _rank(rule: ConfiguredRule) -> tuple[int, ...]:
    remote, local = (
        (rule.destination, rule.source) if rule.way is Way.OUT else (rule.source, rule.destination)
    )
    return (
        remote.max_prefixlen - remote.prefixlen,
        local.max_prefixlen - local.prefixlen,
        not (rule.source_port or rule.destination_port),
        not rule.protocol,
    )


__all__ = ["NOT_OURS", "Conventional", "NotOurs"]
