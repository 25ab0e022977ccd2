"""Which connection a peer belongs to, and which secret two identities share: the most exact one."""

from __future__ import annotations

import operator
from bisect import bisect_left, insort_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from oepy.connections.model import Connection, ConnectionSet, IdPattern, Place, SharedSecret
from oepy.exchange import Exchange
from oepy.model import IdType, IpAddress, PeerIdentity, Secret

T = TypeVar("T", Connection, SharedSecret)

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


class _Lists(Generic[T]):
    """By key, what has it, in the order of the configuration."""

    def __init__(self) -> None:
        self._lists: dict[Any, list[T]] = {}

    def add(self, key: object, item: T) -> None:
        insort_right(self._lists.setdefault(key, []), item, key=_order)

    def remove(self, key: object, item: T) -> None:
        """An item that is there."""
        items = self._lists[key]
        start = bisect_left(items, _order(item), key=_order)
        del items[next(place for place in range(start, len(items)) if items[place] is item)]
        if not items:
            del self._lists[key]

    def at(self, key: object) -> Sequence[T]:
        return self._lists.get(key, ())


_order = operator.attrgetter("order")
_WIDE, _ALONE, _PAIRED = "wide", "alone", "paired"


class Matcher:
    """Finds connections by addresses and identities. Those with one fixed remote address are found by a dictionary,
    however many there are; the others are looked through. A change costs what changes."""

    def __init__(self, configured: ConnectionSet) -> None:
        # Wildcards and secrets for everybody are looked through; the rest is found by name
        self._secrets: _Lists[SharedSecret] = _Lists()
        self._by_address: _Lists[Connection] = _Lists()  # at None those of which one address is not fixed
        self._by_name: _Lists[Connection] = _Lists()  # of the peer, where it is exact
        self._own: Counter[_Key] = Counter()  # names of ours
        self.take(Exchange((), configured.connections), Exchange((), configured.secrets))

    def take(self, connections: Exchange[Connection], secrets: Exchange[SharedSecret]) -> None:
        for shared in secrets.gone:
            for place in _places_of(shared):
                self._secrets.remove(place, shared)
        for shared in secrets.fresh:
            for place in _places_of(shared):
                self._secrets.add(place, shared)
        for connection in connections.gone:
            for address in _addresses_of(connection):
                self._by_address.remove(address, connection)
            for key in _peer_names(connection):
                self._by_name.remove(key, connection)
            for key in _own_names(connection):
                self._own[key] -= 1
                if not self._own[key]:
                    del self._own[key]
        for connection in connections.fresh:
            for address in _addresses_of(connection):
                self._by_address.add(address, connection)
            for key in _peer_names(connection):
                self._by_name.add(key, connection)
            self._own.update(_own_names(connection))

    def by_address(self, local: IpAddress, remote: IpAddress, resolved: Resolved) -> list[Connection]:
        """All that this pair of outer addresses may belong to, the most exact first."""
        found = []
        for connection in (*self._by_address.at(remote), *self._by_address.at(None)):
            there = place_rank(connection.remote_addrs, remote, resolved)
            here = place_rank(connection.local_addrs, local, resolved)
            if there is not None and here is not None:
                found.append(((there, here, connection.order), connection))
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
        """In the order of the configuration. Our own name is in most of the pairs: only the peer's leads to one."""
        places = [(_WIDE,), *((_PAIRED, *_key(one)) for one in theirs)]
        places += [(_ALONE, *_key(one)) for one in (*ours, *theirs)]
        found = {id(shared): shared for place in places for shared in self._secrets.at(place)}
        yield from sorted(found.values(), key=_order)

    def concerned(self, secrets: Iterable[SharedSecret]) -> Collection[Connection] | None:
        """The connections whose secret may be one of these; None: any."""
        found: dict[int, Connection] = {}
        for shared in secrets:
            for kind, *key in _places_of(shared):
                if kind == _WIDE or (kind == _ALONE and self._own[tuple(key)]):
                    return None
                address = PeerIdentity(*key).as_address()
                named = self._by_name.at(tuple(key))
                placed = (*self._by_address.at(address), *self._by_address.at(None)) if address else ()
                found.update((id(connection), connection) for connection in (*named, *placed))
        return found.values()


_Key = tuple[IdType, bytes]


def _key(identity: PeerIdentity) -> _Key:
    """The same for identities that are `same_as` each other, but for distinguished names."""
    return identity.type, identity.data.lower() if identity.type is IdType.FQDN else identity.data


def _places_of(shared: SharedSecret) -> set[tuple[Any, ...]]:
    """Where it is found."""
    exact = [each.exact() for each in shared.ids]
    if not exact or any(one is None or one.type is IdType.DER_ASN1_DN for one in exact):
        return {(_WIDE,)}
    kind = _ALONE if len(exact) == 1 else _PAIRED
    return {(kind, *_key(one)) for one in exact if one is not None}


def _addresses_of(connection: Connection) -> set[IpAddress | None]:
    addresses = {place.address for place in connection.remote_addrs}
    return {None} if None in addresses else addresses


def _peer_names(connection: Connection) -> list[_Key]:
    exact = connection.remote.id.exact()
    return [] if exact is None else [_key(exact)]


def _own_names(connection: Connection) -> set[_Key]:
    addresses = [place.address for place in connection.local_addrs]
    names = [connection.local.id, *(PeerIdentity.address(each) for each in addresses if each is not None)]
    return {_key(name) for name in names if name is not None}


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
