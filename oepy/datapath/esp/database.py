"""The live SAs: found by SPI inward, and by the inner packet's destination outward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from oepy.datapath.esp.inner import Bytes, addresses
from oepy.datapath.esp.sa import EspPair

MAX_PAIRS = 1 << 18
_IPV6 = 0x60  # from here on, a packet's first byte is IPv6's


@dataclass(frozen=True, slots=True)
class _Range:
    start: bytes
    end: bytes
    size: int
    pair: EspPair


class SaDatabase:
    """Of several pairs for one destination the one enabled last sends (a rekey); all of them receive."""

    def __init__(self) -> None:
        self.by_spi: dict[bytes, EspPair] = {}  # by the first four bytes of a datagram
        self._direct: dict[
            bytes, list[EspPair]
        ] = {}  # by source and destination as in the packet, newest first
        self._hosts: dict[bytes, list[EspPair]] = {}  # by destination, newest first
        self._ranges: list[_Range] = []  # narrowest first, then newest first

    def __len__(self) -> int:
        return len(self.by_spi)

    def __iter__(self) -> Iterator[EspPair]:
        return iter(list(self.by_spi.values()))

    def get(self, spi_in: int) -> EspPair | None:
        return self.by_spi.get(spi_in.to_bytes(4, "big"))

    def add(self, pair: EspPair) -> None:
        """Receive on it. Raises ValueError where the SPI is taken, or there are MAX_PAIRS."""
        key = pair.pair.spi_in.to_bytes(4, "big")
        if key in self.by_spi:
            raise ValueError(f"SPI {pair.pair.spi_in:#x} is in use")
        if len(self.by_spi) >= MAX_PAIRS:
            raise ValueError(f"there are {MAX_PAIRS} SA pairs already")
        self.by_spi[key] = pair

    def enable_sending(self, pair: EspPair) -> None:
        """From now on it sends, before older ones for the same destinations."""
        if pair.sending:
            return
        pair.sending = True
        if pair.selectors.direct:
            self._direct.setdefault(pair.selectors.direct, []).insert(0, pair)
            return
        for selector in pair.pair.remote_ts:
            start, end = selector.start.packed, selector.end.packed
            if start == end:
                self._hosts.setdefault(start, []).insert(0, pair)
            else:
                size = int(selector.end) - int(selector.start)
                self._ranges.insert(0, _Range(start, end, size, pair))
        self._ranges.sort(key=lambda item: item.size)

    def remove(self, spi_in: int) -> EspPair | None:
        pair = self.by_spi.pop(spi_in.to_bytes(4, "big"), None)
        if pair is None:
            return None
        _take_out(self._direct, pair.selectors.direct, pair)
        for selector in pair.pair.remote_ts:
            _take_out(self._hosts, selector.start.packed, pair)
        if any(item.pair is pair for item in self._ranges):
            self._ranges = [item for item in self._ranges if item.pair is not pair]
        pair.sending = False
        return pair

    def outbound(self, packet: Bytes) -> EspPair | None:
        """The pair that carries this IP packet; None where none may."""
        direct = self._direct.get(bytes(packet[12:20] if packet[0] < _IPV6 else packet[8:40]))
        if direct is not None and not self._hosts:
            return direct[0]
        _, destination = addresses(packet)
        hosts = self._hosts.get(destination, ())
        for pair in hosts:  # protocols and ports are narrower than two addresses
            if not pair.selectors.addresses_only and pair.selectors.allow_outward(packet):
                return pair
        if direct is not None:
            return direct[0]
        for pair in hosts:
            if pair.selectors.allow_outward(packet):
                return pair
        for item in self._ranges:
            covered = len(destination) == len(item.start) and item.start <= destination <= item.end
            if covered and item.pair.selectors.allow_outward(packet):
                return item.pair
        return None


def _take_out(table: dict[bytes, list[EspPair]], key: bytes, pair: EspPair) -> None:
    sharing = table.get(key)
    if sharing is not None:
        sharing[:] = [other for other in sharing if other is not pair]
        if not sharing:
            del table[key]
