"""Values by network. A lookup costs one probe for each prefix length in use, whatever the number of networks."""

from __future__ import annotations

from bisect import bisect_left, insort_right
from collections.abc import Callable, Iterable, Iterator
from ipaddress import summarize_address_range
from typing import Any, Generic, TypeVar

from oepy.model import AddressRange, IpAddress, IpNetwork

T = TypeVar("T")
_Kind = tuple[int, int]  # IP version and length of prefix


class PrefixTable(Generic[T]):
    """Several values may stand at one network: in the order of `order`, the lowest first, and among equals (without
    it: always) in that in which they came."""

    def __init__(self, order: Callable[[T], Any] = lambda _: 0) -> None:
        self._order = order
        # By version and length, then by the bits
        self._tables: dict[_Kind, dict[int, list[T]]] = {}

    def __bool__(self) -> bool:
        return bool(self._tables)

    def add(self, network: IpNetwork, value: T) -> None:
        self._add(*_place(network), value)

    def add_range(self, ends: AddressRange, value: T) -> None:
        """At the networks that it consists of."""
        for place, bits in _places(ends):
            self._add(place, bits, value)

    def _add(self, place: _Kind, bits: int, value: T) -> None:
        insort_right(self._tables.setdefault(place, {}).setdefault(bits, []), value, key=self._order)

    def remove(self, network: IpNetwork, value: T) -> None:
        """Once; harmless where it is not there."""
        self._remove(*_place(network), value)

    def remove_range(self, ends: AddressRange, value: T) -> None:
        for place, bits in _places(ends):
            self._remove(place, bits, value)

    def _remove(self, place: _Kind, bits: int, value: T) -> None:
        values = self._tables.get(place, {}).get(bits, [])
        start = bisect_left(values, self._order(value), key=self._order)
        try:
            del values[values.index(value, start)]
        except ValueError:
            return
        if not values:
            del self._tables[place][bits]
            if not self._tables[place]:
                del self._tables[place]

    def matching(self, address: IpAddress) -> Iterator[tuple[int, list[T]]]:
        """Prefix length and values of each network that holds the address, in no order of lengths."""
        for (version, length), table in self._tables.items():
            if version == address.version:
                values = table.get(int(address) >> address.max_prefixlen - length)
                if values:
                    yield length, values


def _places(ends: AddressRange) -> Iterable[tuple[_Kind, int]]:
    first, last = ends
    if first == last:  # most are of one address: it is its own bits
        return (((first.version, first.max_prefixlen), int(first)),)
    return map(_place, summarize_address_range(first, last))


def _place(network: IpNetwork) -> tuple[_Kind, int]:
    bits = int(network.network_address) >> network.max_prefixlen - network.prefixlen
    return (network.version, network.prefixlen), bits
