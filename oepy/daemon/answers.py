"""Connections: what IKE asks, answered out of the configuration; at once, but for what is asked of CAs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from oepy.connections.manager import Manager
from oepy.connections.model import Child, Connection
from oepy.daemon.book import Book
from oepy.daemon.connection_values import (
    Same,
    child_offers,
    ike_offers,
    in_common,
    is_of,
    lifetimes_of_child,
    listed,
    selectors,
)
from oepy.daemon.pools import Pools
from oepy.daemon.revocation import Revocation
from oepy.daemon.trust import CertificateRefused, asked_by_all
from oepy.daemon.vips import Vips
from oepy.ike import events as ike
from oepy.ike.settings import IkeSettings
from oepy.keys import HostKey
from oepy.model import Authenticated, Endpoint, IpAddress, PeerIdentity, Secret, TrafficSelector

if TYPE_CHECKING:
    from oepy.daemon.core import Core

NEVER_SECONDS = 10 * 365 * 86400.0
_AUTHENTICATED = {
    "psk": Authenticated.PSK,
    "pubkey": Authenticated.MANUAL,
    "x509": Authenticated.X509,
    "null": Authenticated.NULL,
}


@dataclass(frozen=True, slots=True)
class NotOurs:
    """The peer belongs to no connection: opportunistic encryption decides."""


NOT_OURS = NotOurs()


class Answers:
    """One for the daemon. `claims`: which child names a destination, so that no other peer gets it."""

    def __init__(
        self,
        core: Core,
        book: Book,
        manager: Manager,
        pools: Pools,
        vips: Vips,
        revocation: Revocation,
        claims: Callable[[IpAddress], str | None],
    ) -> None:
        self._core = core
        self._book = book
        self._manager = manager
        self._pools = pools
        self._vips = vips
        self._revocation = revocation
        self._claims = claims
        self.settings_of = functools.lru_cache(maxsize=4096)(self._make_settings)
        self._settings_of_all = functools.lru_cache(maxsize=4096)(self._make_settings_of_all)
        self.opportunistic = functools.cache(self._make_opportunistic)
        self.offers_of = functools.lru_cache(maxsize=4096)(child_offers)

    def forget_settings(self) -> None:
        """The configuration, or what is shown of it, is another."""
        self.settings_of.cache_clear()
        self._settings_of_all.cache_clear()
        self.opportunistic.cache_clear()

    def settings_for(self, local: Endpoint, remote: Endpoint) -> IkeSettings:
        """Of a peer that begins: by the addresses alone, as its identity is not known yet. Where the peer may
        belong to several connections, or to none, the proposals of all are acceptable; by its identity it is
        checked again."""
        asking = self._core.engine.settings.by_certificate(remote.address)
        base = self.opportunistic(asking=asking)
        if not self._book.configured.connections:
            return base
        found = self._book.matcher.by_address(local.address, remote.address, self._book.resolved)
        if not found:
            return base
        certain = all(self._known_address(connection, remote.address) for connection in found)
        return self._settings_of_all(tuple(found), certain, asking)

    def shows_certificate(self) -> bool:
        """To opportunistic peers."""
        vouching = self._book.configured.vouching
        return vouching is not None and bool(vouching.local.certs)

    def _make_opportunistic(self, asking: bool) -> IkeSettings:
        """Where no connection decides: with our certificate for those who ask, and `asking` for the peer's."""
        base, vouching = self._core.given.ike_settings, self._book.configured.vouching
        if vouching is None:
            return base
        certificates = self._book.trusts.settings(vouching)
        if not asking:
            certificates = replace(certificates, ask=False, authorities=(), ask_status=False)
        return replace(base, certificates=certificates)

    def _make_settings_of_all(
        self, found: tuple[Connection, ...], certain: bool, asking: bool
    ) -> IkeSettings:
        base = self.opportunistic(asking=asking)
        every = [self.settings_of(connection) for connection in found]
        best = every[0]
        offers = tuple(dict.fromkeys(map(Same, (o for one in every for o in one.ike_offers))))
        others = () if certain else tuple(map(Same, base.ike_offers))
        unique = dict.fromkeys((*offers, *others))
        chosen = best if certain else base
        return replace(
            chosen,
            ike_offers=tuple(item.offer for item in unique),
            certificates=replace(
                chosen.certificates,
                **asked_by_all(one.certificates for one in (*every, *(() if certain else (base,)))),
            ),
            # What one of them could want is announced; by the peer's identity the rest is decided
            ppk="require" if certain and all(one.ppk == "require" for one in every) else self._ppks(),
            childless="accept" if any(one.childless != "never" for one in every) else "never",
            fragmentation="no" if certain and all(one.fragmentation == "no" for one in every) else "yes",
        )

    def _ppks(self) -> str:
        return "accept" if self._book.configured.ppks else "never"

    def _known_address(self, connection: Connection, remote: IpAddress) -> bool:
        return any(
            place.address == remote or (place.name and remote in self._book.resolved.get(place.name, ()))
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
            secret = self._book.matcher.secret(
                ours, (event.identity, PeerIdentity.address(event.remote.address))
            )
            if secret is not None:
                self._book.connection_of[event.session] = connection
                return ike.Known(
                    psk=secret, authenticated=Authenticated.PSK, settings=self.settings_of(connection)
                )
        what = "no secret" if candidates else "no connection"
        pair = f"{listed(ours if candidates else {own} if own else ours)} and {event.identity}"
        self._core.journal.add(
            "no-secret-for-peer",
            peer=str(event.remote.address),
            id=str(event.identity),
            reason=f"{what} is configured for {pair}",
        )
        return Secret(self._core.given.random(32))

    def ppk(self, event: ike.NeedPpk) -> Secret | None:
        """The PPK by that name, unless the peer's connection uses another (RFC 8784)."""
        if not self._book.configured.ppks:
            return None
        name = event.name.decode(errors="replace")
        local = self._local_of(event)
        found = self._by_identity(local, event.remote.address, event.identity, None)
        if not any(connection.ppk_id in ("", name) for connection in found):
            return None
        secret = self._book.configured.ppk(name)
        if secret is not None:
            self._book.ppk_used.add(event.session)
        return secret

    def lease(self, event: ike.NeedLease) -> ike.Lease | None:
        connection = self._book.connection_of.get(event.session) or self._anonymous(event)
        if connection is None or not connection.pools:
            return None
        lease = self._pools.lease(event, connection.pools)
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
            connection = self._book.connection_of.get(event.session)
            return NOT_OURS if connection is None else self._certified(event, [connection])
        if not self._book.configured.connections:
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
            self._book.connection_of[event.session] = by_key[0]
            keys = tuple(dict.fromkeys(key for c in by_key for key in c.remote.pubkeys))
            return ike.Known(keys, None, Authenticated.MANUAL, self.settings_of(by_key[0]))
        return None if named else NOT_OURS

    def _certified(self, event: ike.NeedPeerKey, connections: list[Connection]) -> ike.Known | ike.Refused:
        """By the first of the connections that accepts the peer's certificate; the key is still to be proven."""
        reasons = []
        for connection in connections:
            try:
                key, path = self._book.trusts.accept(connection, event.certificates, event.identity)
            except CertificateRefused as refusal:
                reasons.append(f"{connection.name}: {refusal}")
                continue
            self._book.connection_of[event.session] = connection
            self._book.path_of[event.session] = path
            return ike.Known((key,), None, Authenticated.X509, self.settings_of(connection), certified=True)
        reason = f"its certificate is not accepted: {'; '.join(reasons[:4])}"
        self._core.journal.add(
            "certificate-refused", peer=str(event.remote.address), id=str(event.identity), reason=reason
        )
        return ike.Refused(reason)

    async def status(self, event: ike.NeedStatus) -> bool | ike.Refused:
        """Whether the certificates that prove this peer are still good, as far as anybody knows."""
        path, connection = self._book.path_of.get(event.session), self._book.connection_of.get(event.session)
        if path is None or connection is None:
            return ike.Refused("its connection has just changed")
        objection = await self._revocation.objection(path, connection.remote.revocation, event.responses)
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
        return self._book.matcher.by_identity(local, remote, identity, own, self._book.resolved)

    def _local_of(self, event: ike.NeedPsk | ike.NeedPeerKey | ike.NeedPpk) -> IpAddress:
        if not isinstance(event, ike.NeedPpk) and event.local is not None:
            return event.local.address
        info = self._core.negotiator.endpoint.session(event.session)
        assert info is not None
        return info.local.address

    def key_of(self, session: int) -> HostKey | None:
        """The private key that our side of this session has, None for the host key."""
        connection = self._book.connection_of.get(session)
        return self._book.keys.get(connection.local.key) if connection and connection.local.key else None

    def narrow(self, event: ike.NeedNarrowing) -> ike.Narrowed | ike.Refused | NotOurs:
        """Which child the peer's proposal is for, and what of it is allowed (RFC 7296 §2.9)."""
        connection = self._connection_of_peer(event)
        if connection is None:
            return self._unless_claimed(event)
        if connection.name not in self._book.by_name:
            return ike.Refused("its connection is no longer configured", peer=True)
        if connection.ppk_required and event.session not in self._book.ppk_used:
            return ike.Refused(f"the connection {connection.name} requires a PPK", peer=True)
        if not self._acceptable(connection, event.session):
            return ike.Refused(f"the IKE proposal is not one of the connection {connection.name}", peer=True)
        state = self._manager.by_spi(event.rekey_of) if event.rekey_of is not None else None
        if state is not None and event.rekey_of in state.tunnels:
            pair = state.tunnels[event.rekey_of].pair
            ours = in_common(event.local_ts, pair.local_ts)
            theirs = in_common(event.remote_ts, pair.remote_ts)
            return self._narrowed(connection, state.child, ours, theirs)
        found = []
        for order, child in enumerate(connection.children):
            here = self._vips.of(event.session) or (event.local.address,)
            there = self._pools.of(event.session) or (event.remote.address,)
            ours = in_common(event.local_ts, selectors(child.local_ts, here))
            theirs = in_common(event.remote_ts, selectors(child.remote_ts, there))
            theirs = self._pools.only_leased(connection.pools, event.session, theirs)
            if ours and theirs:
                whole = set(ours) == set(event.local_ts) and set(theirs) == set(event.remote_ts)
                found.append(((child.mode != event.mode, not whole, order), child, ours, theirs))
        if not found:
            if (
                connection.remote.auth == "null"
                and event.rekey_of is None
                and not self._pools.of(event.session)
            ):
                # Whoever proves nothing was taken for this one's by its address: it may be an opportunistic peer
                del self._book.connection_of[event.session]
                return self._unless_claimed(event)
            return ike.Refused(
                f"no child of {connection.name} has {listed(event.local_ts)} and {listed(event.remote_ts)}"
            )
        _, child, ours, theirs = min(found, key=lambda item: item[0])
        return self._narrowed(connection, child, ours, theirs)

    def _connection_of_peer(self, event: ike.NeedNarrowing) -> Connection | None:
        connection = self._book.connection_of.get(event.session)
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
                self._book.connection_of[event.session] = connection
            return connection
        return self._anonymous(event)

    def _anonymous(self, event: ike.NeedNarrowing | ike.NeedLease) -> Connection | None:
        """The connection of a peer that proves nothing, where one takes such peers from there."""
        if event.authenticated is not Authenticated.NULL:
            return None
        for candidate in self._book.matcher.by_address(
            event.local.address, event.remote.address, self._book.resolved
        ):
            if candidate.remote.auth == "null":
                self._book.connection_of[event.session] = candidate
                return candidate
        return None

    def _unless_claimed(self, event: ike.NeedNarrowing) -> ike.Refused | NotOurs:
        """Opportunistic peers get nothing that a connection names."""
        for selector in event.remote_ts[:16]:
            single = selector.start if selector.start == selector.end else event.remote.address
            if selector.contains_address(single) and (claimed := self._claims(single)):
                return ike.Refused(f"its traffic belongs to the connection {claimed}")
        return NOT_OURS

    def _acceptable(self, connection: Connection, session: int) -> bool:
        """Whether the IKE SA's algorithms are the connection's: by address it may have been taken for another."""
        suite = self._core.negotiator.endpoint.suite(session)
        return not suite or ike_offers(connection) is None or is_of(suite, connection.proposals)

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
            offers=self.offers_of(child.esp_proposals, child.ah_proposals),
            connection=connection.label(child),
            authenticated=_AUTHENTICATED[connection.remote.auth],
            mode=child.mode,
            settings=self.settings_of(connection),
            lifetimes=lifetimes_of_child(child),
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
            certificates=self._book.trusts.settings(connection),
            ike_offers=ike_offers(connection) or base.ike_offers,
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
            fragmentation=connection.fragmentation,
            heeds_initial_contact=connection.unique != "never",
            additional_addresses=tuple(place.address for place in connection.local_addrs if place.address),
            childless={"never": "never", "force": "force"}.get(connection.childless, "accept"),
        )
