"""Values by network. A lookup costs one probe for each prefix length in use, whatever the number of networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from oepy.model import IpAddress, IpNetwork

T = TypeVar("T")


class PrefixTable(Generic[T]):
    """Several values may stand at one network, in the order in which they came."""

    def __init__(self) -> None:
        self._tables: dict[
            tuple[int, int], dict[int, list[T]]
        ] = {}  # by version and length, then by the bits

    def __bool__(self) -> bool:
        return bool(self._tables)

    def add(self, network: IpNetwork, value: T) -> None:
        place, bits = _place(network)
        self._tables.setdefault(place, {}).setdefault(bits, []).append(value)

    def remove(self, network: IpNetwork, value: T) -> None:
        """Once; harmless where it is not there."""
        place, bits = _place(network)
        values = self._tables.get(place, {}).get(bits, [])
        if value not in values:
            return
        values.remove(value)
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


def _place(network: IpNetwork) -> tuple[tuple[int, int], int]:
    bits = int(network.network_address) >> network.max_prefixlen - network.prefixlen
    return (network.version, network.prefixlen), bits
