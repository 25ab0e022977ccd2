"""Which connection a peer belongs to, and which secret two identities share: the most exact one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from oepy.connections.model import Connection, ConnectionSet, IdPattern, Place, SharedSecret
from oepy.model import IdType, IpAddress, PeerIdentity, Secret

Resolved = Mapping[str, frozenset[IpAddress]]
"""The addresses of names, as last heard."""


def place_rank(places: Iterable[Place], address: IpAddress, resolved: Resolved) -> int | None:
    """How exactly the address is named, the lower the better; None where it is not."""
    ranks = [place.rank for place in places if _holds(place, address, resolved)]
    return min(ranks, default=None)


def _holds(place: Place, address: IpAddress, resolved: Resolved) -> bool:
    if place.name:
        return address in resolved.get(place.name, ())
    return place.network is None or address in place.network


class Matcher:
    """Finds connections by addresses and identities. Those with one fixed remote address are found by a dictionary,
    however many there are; the others are looked through."""

    def __init__(self, configured: ConnectionSet) -> None:
        # Wildcards and secrets for everybody are looked through; the rest is found by name
        self._shared = configured.secrets
        self._wide: list[int] = []
        self._alone: dict[_Key, list[int]] = {}  # with one ID
        self._paired: dict[_Key, list[int]] = {}
        for number, shared in enumerate(configured.secrets):
            exact = [each.exact() for each in shared.ids]
            if not exact or any(one is None or one.type is IdType.DER_ASN1_DN for one in exact):
                self._wide.append(number)
                continue
            table = self._alone if len(exact) == 1 else self._paired
            for key in {_key(one) for one in exact if one is not None}:
                table.setdefault(key, []).append(number)
        self._by_address: dict[IpAddress, list[tuple[int, Connection]]] = {}
        self._others: list[tuple[int, Connection]] = []
        for number, connection in enumerate(configured.connections):
            addresses = [place.address for place in connection.remote_addrs]
            if any(address is None for address in addresses):
                self._others.append((number, connection))
                continue
            for address in addresses:
                assert address is not None
                self._by_address.setdefault(address, []).append((number, connection))

    def by_address(self, local: IpAddress, remote: IpAddress, resolved: Resolved) -> list[Connection]:
        """All that this pair of outer addresses may belong to, the most exact first."""
        found = []
        for number, connection in (*self._by_address.get(remote, ()), *self._others):
            there = place_rank(connection.remote_addrs, remote, resolved)
            here = place_rank(connection.local_addrs, local, resolved)
            if there is not None and here is not None:
                found.append(((there, here, number), connection))
        return [connection for _, connection in sorted(found, key=lambda item: item[0])]

    def by_identity(
        self,
        local: IpAddress,
        remote: IpAddress,
        identity: PeerIdentity,
        own: PeerIdentity | None,
        resolved: Resolved,
    ) -> list[Connection]:
        """Of these, those whose remote ID it can be, exact ones first; `own`: the one that the peer wants us to
        be, None where it does not say."""
        fitting = [
            connection
            for connection in self.by_address(local, remote, resolved)
            if connection.remote.id.matches(identity)
            and (own is None or own.same_as(connection.local.id or PeerIdentity.address(local)))
        ]
        return sorted(fitting, key=lambda connection: connection.remote.id.rank)  # stable: then by address

    def secret(self, ours: Iterable[PeerIdentity], theirs: Iterable[PeerIdentity]) -> Secret | None:
        """The secret of a pair. Each side may be known by several names: its ID, its address. Both named is better
        than one, one is better than none; among these, exact before wildcards."""
        ours, theirs = tuple(ours), tuple(theirs)
        best: tuple[tuple[int, int], Secret] | None = None
        for shared in self._candidates(ours, theirs):
            rank = _secret_rank(shared.ids, ours, theirs)
            if rank is not None and (best is None or rank < best[0]):
                best = rank, shared.secret
        return None if best is None else best[1]

    def _candidates(
        self, ours: tuple[PeerIdentity, ...], theirs: tuple[PeerIdentity, ...]
    ) -> Iterator[SharedSecret]:
        """In the order of the file. Our own name is in most of the pairs: only the peer's leads to one."""
        numbers = set(self._wide)
        for one in theirs:
            numbers.update(self._paired.get(_key(one), ()))
        for one in (*ours, *theirs):
            numbers.update(self._alone.get(_key(one), ()))
        for number in sorted(numbers):
            yield self._shared[number]


_Key = tuple[IdType, bytes]


def _key(identity: PeerIdentity) -> _Key:
    """The same for identities that are `same_as` each other, but for distinguished names."""
    return identity.type, identity.data.lower() if identity.type is IdType.FQDN else identity.data


def _secret_rank(
    ids: tuple[IdPattern, ...], ours: tuple[PeerIdentity, ...], theirs: tuple[PeerIdentity, ...]
) -> tuple[int, int] | None:
    if not ids:
        return (3, 0)
    mine, others = list(_ranks(ids, ours)), list(_ranks(ids, theirs))
    if not others:
        # one ID alone is the peer's, or (a secret for everybody) ours
        return (2, min(mine)) if mine and len(ids) == 1 else None
    if mine:
        return (0, min(mine) + min(others))
    return (1, min(others)) if len(ids) == 1 else None


def _ranks(ids: tuple[IdPattern, ...], names: tuple[PeerIdentity, ...]) -> Iterator[int]:
    for pattern in ids:
        if any(pattern.matches(name) for name in names):
            yield pattern.rank


__all__ = ["Matcher", "Resolved", "place_rank"]
