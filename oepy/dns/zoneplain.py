"""The short way from a line of CSV to the text of its records, for rows of the usual form.

A host's row costs a hundred microseconds when it goes through name and address objects, which is ten times what a
name server needs to read its records. Here it goes from text to text. A row of which anything is unusual is refused
(`add` says False, nothing is written) and takes the long way, which also finds the words for every mistake. Both
ways give the same bytes (a property test compares them).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import dns.name

from oepy.dns.message import NameKey
from oepy.dns.records import MAX_TEXT_CHUNK, Gateway, OeText, gateway_text, gateway_type_of
from oepy.dns.zonemap import ZoneMap, reverse_name
from oepy.model import KeyAlgorithm

if TYPE_CHECKING:
    from oepy.dns.inventory import Inventory
    from oepy.dns.zonefile import Output

_RSA = int(KeyAlgorithm.RSA)
MAX_KEPT = 4096  # entries of each memory: a sorted inventory needs one or two
# Letters, digits, `-`, `_`: nothing that a zone file would escape.
_PLAIN_NAME = re.compile(r"(?:[A-Za-z0-9_-]{1,63}\.){1,126}[A-Za-z0-9_-]{1,63}\.?").fullmatch
_MAX_NAME = 253  # characters without the last dot: 255 bytes on the wire
_ED25519 = re.compile(r"4 ([A-Za-z0-9+/]{43}=)").fullmatch
_SEPARATORS = str.maketrans(";,", "  ")


_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the names below some name belong: `zone` is an index of `Output`, or None for no listed zone. An
    owner is what is special to it, and `rest`."""

    zone: int | None
    rest: str


@dataclass(frozen=True, slots=True)
class _Style:
    """What `precedence`, `gateway` and `records` of a row mean. `own` is "self", else `fixed` is gateway type and
    gateway in text; `text_gateway` is that of TXT, empty for the host itself."""

    precedence: int
    own: bool
    fixed: tuple[int, str]
    text_gateway: str
    ipseckey: bool
    txt: bool

    def records(
        self, owner: str, keys: list[tuple[int, str]], gateway: tuple[int, str], itself: str
    ) -> list[str]:
        """The lines of all keys at an owner; `itself` is the host as TXT names it there."""
        lines = []
        number, address = gateway if self.own else self.fixed
        for algorithm, key in keys:
            if self.ipseckey:
                lines.append(f"{owner} IN IPSECKEY {self.precedence} {number} {algorithm} {address} {key}\n")
            if self.txt and algorithm == _RSA:
                pieces = '" "'.join(
                    key[at : at + MAX_TEXT_CHUNK] for at in range(0, len(key), MAX_TEXT_CHUNK)
                )
                head = f"X-IPsec-Server({self.precedence})={self.text_gateway or itself} "
                lines.append(f'{owner} IN TXT "{head}" "{pieces}"\n')
        return lines


class _Spot(NamedTuple):
    """Where the reverse records of one address belong. `alias` is the zone and the line of an RFC 2317 CNAME."""

    zone: int | None
    owner: str
    address: str
    alias: tuple[int, str] | None = None


class PlainRows:
    def __init__(
        self,
        inventory: Inventory,
        zones: ZoneMap,
        output: Output,
        servers: set[NameKey],
        warn: Callable[[int, str, str], None],
    ) -> None:
        """`servers` are names of which the caller must see the addresses; `warn` hears of line, address and host
        where no listed zone holds an address."""
        self._inventory, self._zones, self._output, self._warn = inventory, zones, output, warn
        special = {dns.name.Name(server).to_text().lower() for server in servers}
        self._special = special | {zone.to_text().lower() for zone in zones.zones}
        self._parents: dict[str, _Place | None] = {}
        self._nets: dict[str, _Place | None] = {}
        self._styles: dict[tuple[str, str, str], _Style | None] = {}
        # Where a column is missing, its cell is an empty one behind all others.
        self._at = [
            inventory.columns.index(name) if name in inventory.columns else len(inventory.columns)
            for name in ("name", "addresses", "keys", "precedence", "gateway", "records")
        ]

    def add(self, line: int, cells: list[str]) -> bool:
        """Write the records of a row; False where it is none of the usual form."""
        name_at, addresses_at, keys_at, precedence_at, gateway_at, records_at = self._at
        cells = [*cells, ""]
        name = cells[name_at]
        if not _PLAIN_NAME(name):
            return False
        if name[-1] != ".":
            name += "."
        if len(name) > _MAX_NAME + 1 or name.lower() in self._special:
            return False
        label, _, parent = name.partition(".")
        home = self._parents[parent] if parent in self._parents else self._parent(parent)
        if home is None:
            return False
        kind = (cells[precedence_at], cells[gateway_at], cells[records_at])
        style = self._styles[kind] if kind in self._styles else self._style(line, kind)
        keys = self._keys(line, cells[keys_at])
        if style is None or keys is None or (style.txt and keys and all(one[0] != _RSA for one in keys)):
            return False
        addresses = cells[addresses_at].translate(_SEPARATORS).split()
        found = self._reverse(name, addresses, keys, style)
        if found is None:
            return False
        reverse, forward, homeless = found
        if home.zone is not None:
            owner = label + home.rest
            lines = [f"{owner} IN {address}\n" for address in forward]
            lines += style.records(owner, keys, (0, "."), f"@{name[:-1]}")
            self._write(home.zone, lines)
        elif not reverse:
            return False
        for zone, lines in reverse:
            self._write(zone, lines)
        for address in homeless:
            self._warn(line, address, name)
        return True

    def _write(self, zone: int, lines: list[str]) -> None:
        self._output.put(zone, "".join(lines))
        self._output.records += len(lines)

    def _reverse(
        self, name: str, addresses: list[str], keys: list[tuple[int, str]], style: _Style
    ) -> tuple[list[tuple[int, list[str]]], list[str], list[str]] | None:
        """Zone and records of each address; the rdata of the forward address records; the addresses that are in no
        listed zone."""
        reverse: list[tuple[int, list[str]]] = []
        forward, homeless = [], []
        for text in addresses:
            if ":" in text:
                number, kind, spot = 2, "AAAA", self._locate_v6(text)
            else:
                number, kind, spot = 1, "A", self._locate_v4(text)
            if spot is None:
                return None
            address, owner = spot.address, spot.owner
            forward.append(f"{kind} {address}")
            if spot.alias is not None:
                reverse.append((spot.alias[0], [spot.alias[1]]))
            if spot.zone is None:
                homeless.append(address)
                continue
            lines = [f"{owner} IN PTR {name}\n"]
            lines += style.records(owner, keys, (number, address), address)
            reverse.append((spot.zone, lines))
        if len(forward) > 1 and len(set(forward)) != len(forward):
            return None
        return reverse, forward, homeless

    def _locate_v4(self, address: str) -> _Spot | None:
        try:
            packed = inet_pton(AF_INET, address)
        except (OSError, ValueError):
            return None
        if inet_ntop(AF_INET, packed) != address:
            return None
        net, _, last = address.rpartition(".")
        if net in self._nets:
            place = self._nets[net]
        else:
            place = self._net(net, ".".join(reversed(net.split("."))) + ".in-addr.arpa.")
        if place is None:
            return self._locate_alone(reverse_name(IPv4Address(packed)), address)
        return _Spot(place.zone, last + place.rest, address)

    def _locate_v6(self, address: str) -> _Spot | None:
        try:
            packed = inet_pton(AF_INET6, address)
        except (OSError, ValueError):
            return None
        text = inet_ntop(AF_INET6, packed)
        if "." in text:  # embedded IPv4, which is written in more than one way
            return None
        nibbles = ".".join(packed.hex()[::-1])
        net = nibbles[32:]  # the upper 64 bits
        place = self._nets[net] if net in self._nets else self._net(net, f"{net}.ip6.arpa.")
        if place is None:
            return self._locate_alone(reverse_name(IPv6Address(packed)), text)
        return _Spot(place.zone, nibbles[:31] + place.rest, text)

    def _locate_alone(self, owner: dns.name.Name, address: str) -> _Spot:
        """In a network that several zones share."""
        zone, cut = self._zones.find(owner), self._zones.classless(owner)
        alias = None
        if cut is not None:
            if zone is not None:
                line = f"{owner.relativize(zone).to_text()} IN CNAME {cut}\n"
                alias = (self._output.index(zone), line)
            zone, owner = self._zones.find(cut), cut
        if zone is None:
            return _Spot(None, "", address)
        return _Spot(self._output.index(zone), owner.relativize(zone).to_text(), address, alias)

    # ---- what rows have in common, found the long way once ------------------------------------------------

    def _parent(self, parent: str) -> _Place | None:
        return _keep(self._parents, parent, self._place(parent))

    def _net(self, net: str, name: str) -> _Place | None:
        owner = dns.name.from_text(name)
        # Below a /24 or /64 that has zones of its own (RFC 2317 and others), each address is a case of its own.
        place = None if self._zones.is_above_zone(owner) else self._place(name)
        return _keep(self._nets, net, place)

    def _place(self, name: str) -> _Place | None:
        owner = dns.name.from_text(name)
        zone = self._zones.find(owner)
        if zone is None:
            return _Place(None, "")
        rest = owner.relativize(zone).to_text()
        return _Place(self._output.index(zone), "" if rest == "@" else f".{rest}")

    def _style(self, line: int, cells: tuple[str, str, str]) -> _Style | None:
        return _keep(self._styles, cells, self._read_style(line, cells))

    def _read_style(self, line: int, cells: tuple[str, str, str]) -> _Style | None:
        precedence_text, gateway_cell, records = cells
        kinds = records.lower().translate(_SEPARATORS).split() if records else ["ipseckey"]
        if not re.fullmatch(r"[0-9]{0,3}", precedence_text) or not set(kinds) <= {"ipseckey", "txt"}:
            return None
        precedence = int(precedence_text or "10")
        before = len(self._inventory.problems)
        value = self._inventory.gateway(line, gateway_cell or "self")
        del self._inventory.problems[before:]  # the long way says it
        if value is None or precedence > 255:
            return None
        gateway: Gateway = None if isinstance(value, str) else value
        fixed = int(gateway_type_of(gateway)), gateway_text(gateway)
        text_gateway = "" if gateway is None else OeText(precedence, gateway, None).gateway_text
        return _Style(precedence, value == "self", fixed, text_gateway, "ipseckey" in kinds, "txt" in kinds)

    def _keys(self, line: int, cell: str) -> list[tuple[int, str]] | None:
        """Algorithm and base64 of each key."""
        match = _ED25519(cell)
        if match is not None:
            # Any 32 bytes are taken as an Ed25519 key; but the last digit may have bits that are none of the key's.
            text = match[1]
            is_canonical = binascii.b2a_base64(binascii.a2b_base64(text), newline=False).decode() == text
            return [(4, text)] if is_canonical else None
        keys = []
        before = len(self._inventory.problems)
        for item in cell.split(";"):
            if item and not item.isspace():
                key = self._inventory.key(line, item.strip())
                if key is None:
                    del self._inventory.problems[before:]
                    return None
                keys.append((int(key.algorithm), base64.b64encode(key.data).decode("ascii")))
        return keys


def _keep(memory: dict[_K, _V], key: _K, value: _V) -> _V:
    if len(memory) >= MAX_KEPT:
        memory.clear()
    memory[key] = value
    return value
