"""The live SAs: found by SPI inward, and by the inner packet's destination outward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from oepy.datapath.esp.inner import Bytes, addresses
from oepy.datapath.esp.sa import EspPair
from oepy.model import Mark, TrafficSelector

MAX_PAIRS = 1 << 18
_PORTS, _PROTOCOL, _ANY = range(3)
_IPV6 = 0x60  # from here on, a packet's first byte is IPv6's


@dataclass(frozen=True, slots=True)
class _Entry:
    """One prefix of a pair's remote selectors, for sources of one local selector. The lowest `rank` carries a
    packet: by the pair's standing, the narrowest remote and then local selector, those with ports before those with
    a protocol alone and those without, those with a mark, the newest."""

    rank: tuple[bool, int, int, int, int, bool, int]
    pair: EspPair
    first: bytes
    last: bytes


_Table = dict[int, list[_Entry]]


class SaDatabase:
    """Of several pairs for one destination the one enabled last sends (a rekey); all of them receive. Finding one
    takes as long with many pairs as with few: it grows with the number of different prefix lengths only."""

    def __init__(self) -> None:
        self.by_spi: dict[bytes, EspPair] = {}  # by the first four bytes of a datagram
        # One host to one host: by both addresses as they stand in the packet, newest first
        self._direct: dict[bytes, list[EspPair]] = {}
        # All others: by width of the address and host bits, then by the bits before those
        self._prefixes: dict[tuple[int, int], _Table] = {}
        self._enabled = 0
        self._marked = 0  # of `_direct`

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
            others = self._direct.setdefault(pair.selectors.direct, [])
            others.insert(0, pair)
            others.sort(key=_direct_rank)  # stable: then the newest
            self._marked += pair.pair.marks.outward is not None
            return
        self._enabled += 1
        for remote, local in product(pair.pair.remote_ts, pair.pair.local_ts):
            if remote.start.version != local.start.version:
                continue
            sizes = _size(remote), _size(local)
            unmarked = pair.pair.marks.outward is None
            rank = (*pair.pair.standing, *sizes, _narrowness(remote, local), unmarked, -self._enabled)
            entry = _Entry(rank, pair, local.start.packed, local.end.packed)
            for width, shift, bits in _prefixes_of(remote):
                self._prefixes.setdefault((width, shift), {}).setdefault(bits, []).append(entry)

    def remove(self, spi_in: int) -> EspPair | None:
        pair = self.by_spi.pop(spi_in.to_bytes(4, "big"), None)
        if pair is None:
            return None
        if pair.sending and pair.selectors.direct:
            others = [other for other in self._direct[pair.selectors.direct] if other is not pair]
            if others:
                self._direct[pair.selectors.direct] = others
            else:
                del self._direct[pair.selectors.direct]
            self._marked -= pair.pair.marks.outward is not None
        elif pair.sending:
            for selector in pair.pair.remote_ts:
                for width, shift, bits in _prefixes_of(selector):
                    self._take_out((width, shift), bits, pair)
        pair.sending = False
        return pair

    def _take_out(self, kind: tuple[int, int], bits: int, pair: EspPair) -> None:
        table = self._prefixes.get(kind, {})
        entries = [entry for entry in table.get(bits, ()) if entry.pair is not pair]
        if entries:
            table[bits] = entries
            return
        table.pop(bits, None)
        if not table:
            self._prefixes.pop(kind, None)

    def outbound(self, packet: Bytes, mark: Mark | None = None) -> EspPair | None:
        """The pair that carries this IP packet; None where none may. `mark`: the one that it is known to have."""
        found = self._direct.get(bytes(packet[12:20] if packet[0] < _IPV6 else packet[8:40]))
        direct = None
        if found is not None:
            direct = next((pair for pair in found if _takes(pair, mark)), None) if self._marked else found[0]
            if direct is not None and not self._prefixes:
                return direct
        source, destination = addresses(packet)
        number, best = int.from_bytes(destination, "big"), None
        for (width, shift), table in self._prefixes.items():
            if width != len(destination):
                continue
            for entry in table.get(number >> shift, ()):
                better = (best is None or entry.rank < best.rank) and entry.first <= source <= entry.last
                if better and _takes(entry.pair, mark) and entry.pair.selectors.allow_outward(packet):
                    best = entry
        # Two addresses are narrower than anything but one address with protocol and ports
        if direct is not None and (best is None or _direct_rank(direct) <= best.rank[:-1]):
            return direct
        return None if best is None else best.pair


def _direct_rank(pair: EspPair) -> tuple[bool, int, int, int, int, bool]:
    return (*pair.pair.standing, 0, 0, _ANY, pair.pair.marks.outward is None)


def _takes(pair: EspPair, mark: Mark | None) -> bool:
    wanted = pair.pair.marks.outward
    return wanted is None or wanted == mark


def _size(selector: TrafficSelector) -> int:
    return int(selector.end) - int(selector.start)


def _narrowness(*selectors: TrafficSelector) -> int:
    if any((each.start_port, each.end_port) != (0, 65535) for each in selectors):
        return _PORTS
    return _PROTOCOL if any(each.protocol for each in selectors) else _ANY


def _prefixes_of(selector: TrafficSelector) -> Iterator[tuple[int, int, int]]:
    """The prefixes that a range is made of: bytes of an address, host bits, the bits before them."""
    width = len(selector.start.packed)
    first, last = int(selector.start), int(selector.end)
    while first <= last:
        # The largest block that begins here and does not reach beyond the end
        shift = min(
            (first & -first).bit_length() - 1 if first else width * 8, (last - first + 1).bit_length() - 1
        )
        yield width, shift, first >> shift
        first += 1 << shift
