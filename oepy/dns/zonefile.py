"""Zone files with key records from an inventory, one file a zone, host by host.

Owner names: the host's own name, and the reverse name of each address. In a reverse zone that RFC 2317 cuts
below a byte (`64/26.2.0.192.in-addr.arpa`), the records stand under the cut zone and the zone above gets the
CNAME, where both are listed. A listed zone below another listed zone is delegated from it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import TextIO

import dns.name

from oepy.dns.inventory import Host, Inventory, NameServer
from oepy.dns.message import NameKey, name_key
from oepy.dns.records import Gateway, IpsecKey, OeText, build_oe_text, text_rdata
from oepy.errors import UsageError
from oepy.model import IpAddress, KeyAlgorithm

MAX_OPEN_FILES = 64
_CLASSLESS = re.compile(rb"(\d{1,3})([/-])(\d{1,3})")
_IN_ADDR = dns.name.from_text("in-addr.arpa.")


@dataclass(frozen=True, slots=True)
class Generated:
    """What `generate` wrote. `warnings` are oddities that hinder nobody."""

    files: tuple[Path, ...]
    hosts: int
    records: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Record:
    zone: dns.name.Name
    owner: dns.name.Name
    type: str
    rdata: str


def reverse_name(address: IpAddress) -> dns.name.Name:
    """`10.2.0.192.in-addr.arpa.`, or the nibbles under ip6.arpa."""
    if address.version == 4:
        labels = [b"%d" % byte for byte in reversed(address.packed)]
        return dns.name.Name((*labels, b"in-addr", b"arpa", b""))
    nibbles = address.packed.hex().encode("ascii")[::-1]
    return dns.name.Name((*(nibbles[at : at + 1] for at in range(32)), b"ip6", b"arpa", b""))


def file_name(zone: dns.name.Name) -> str:
    """`db.ZONE`; the slash of RFC 2317 becomes a dash, `db.root` is the root."""
    text = zone.to_text(omit_final_dot=True).lower()
    return "db." + ("root" if text in ("", ".") else text.replace("/", "-"))


class ZoneMap:
    """Which of the listed zones holds a name: the deepest one."""

    def __init__(self, zones: list[dns.name.Name]) -> None:
        self.zones = tuple(zones)
        self._known = {name_key(zone): zone for zone in zones}
        # (parent, first, last) of each RFC 2317 zone, by its parent
        self._classless: dict[NameKey, list[tuple[int, int, dns.name.Name]]] = {}
        for zone in zones:
            span = classless_span(zone)
            if span is not None:
                self._classless.setdefault(name_key(zone.parent()), []).append((*span, zone))

    def find(self, name: dns.name.Name) -> dns.name.Name | None:
        key = name_key(name)
        for depth in range(len(key)):
            zone = self._known.get(key[depth:])
            if zone is not None:
                return zone
        return None

    def parent_of(self, zone: dns.name.Name) -> dns.name.Name | None:
        return self.find(zone.parent()) if zone != dns.name.root else None

    def classless(self, name: dns.name.Name) -> dns.name.Name | None:
        """The owner below an RFC 2317 zone for a plain IPv4 reverse name, if one is listed."""
        if not self._classless or not name.labels[0].isdigit():
            return None
        number = int(name.labels[0])
        for first, last, zone in self._classless.get(name_key(name)[1:], ()):
            if first <= number <= last:
                return dns.name.Name((name.labels[0], *zone.labels))
        return None


def classless_span(zone: dns.name.Name) -> tuple[int, int] | None:
    """First and last number that an RFC 2317 zone holds: `64/26`, `64-26` or `64-127`; None for others."""
    match = _CLASSLESS.fullmatch(zone.labels[0])
    if match is None or len(zone.labels) != 7 or not zone.is_subdomain(_IN_ADDR):
        return None
    first, second = int(match[1]), int(match[3])
    if second > first and first + second <= 510 and second <= 255 and (match[2] == b"-" or second > 32):
        size = second - first + 1
        if size & (size - 1) == 0 and first % size == 0:
            return first, second
    if 24 < second <= 32 and first <= 255:
        size = 1 << (32 - second)
        return (first, first + size - 1) if first % size == 0 else None
    return None


def host_records(host: Host, zones: ZoneMap) -> Iterator[Record]:
    """All records of one host that fall into the zones, in a fixed order."""
    forward = zones.find(host.name)
    if forward is not None:
        for address in host.addresses:
            kind = "A" if address.version == 4 else "AAAA"
            yield Record(forward, host.name, kind, str(address))
        yield from _key_records(host, forward, host.name, None)
    for address in host.addresses:
        owner = reverse_name(address)
        zone = zones.find(owner)
        cut = zones.classless(owner)
        if cut is not None:
            if zone is not None:
                yield Record(zone, owner, "CNAME", str(cut))
            zone, owner = zones.find(cut), cut
        if zone is not None:
            yield Record(zone, owner, "PTR", str(host.name))
            yield from _key_records(host, zone, owner, address)


def _key_records(
    host: Host, zone: dns.name.Name, owner: dns.name.Name, address: IpAddress | None
) -> Iterator[Record]:
    """`address` is that of the reverse owner, None at the forward name (whose "self" is every address)."""
    gateway: Gateway
    if host.gateway == "none":
        gateway = None
    elif host.gateway == "self":
        gateway = address
    else:
        gateway = host.gateway  # type: ignore[assignment]  # the inventory lets no other text through
    for key in host.keys:
        if "ipseckey" in host.records:
            record = IpsecKey(host.precedence, int(key.algorithm), gateway, key.data)
            yield Record(zone, owner, "IPSECKEY", record.to_text())
        if "txt" in host.records and key.algorithm is KeyAlgorithm.RSA:
            # RFC 4322 has no "none": at a reverse name it is the address, at a forward name the name itself.
            text = OeText(host.precedence, gateway or address or host.name, key)
            yield Record(zone, owner, "TXT", text_rdata(build_oe_text(text)))


@dataclass(slots=True)
class _Output:
    """Zone files under construction: each a temporary file, few of them open at a time."""

    directory: Path
    serial: int
    ttl: int
    servers: list[NameServer]
    suffix: str = field(default_factory=lambda: secrets.token_hex(4))
    _open: OrderedDict[NameKey, TextIO] = field(default_factory=OrderedDict)
    records: int = 0

    def temporary(self, zone: dns.name.Name) -> Path:
        return self.directory / f".{file_name(zone)}.{self.suffix}"

    def begin(self, zone: dns.name.Name) -> None:
        first = self.servers[0].name
        stream = self._stream(zone)
        stream.write(f"$ORIGIN {zone}\n$TTL {self.ttl}\n")
        mail = dns.name.Name((b"hostmaster", *first.parent().labels))
        negative = min(self.ttl, 3600)
        stream.write(f"@ IN SOA {first} {mail} {self.serial} 7200 900 1209600 {negative}\n")
        for server in self.servers:
            stream.write(f"@ IN NS {server.name}\n")

    def add(self, record: Record) -> None:
        owner = record.owner.relativize(record.zone).to_text()
        self._stream(record.zone).write(f"{owner} IN {record.type} {record.rdata}\n")
        self.records += 1

    def _stream(self, zone: dns.name.Name) -> TextIO:
        key = name_key(zone)
        stream = self._open.get(key)
        if stream is None:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            stream = self._open[key] = self.temporary(zone).open("a", encoding="ascii")
        self._open.move_to_end(key)
        return stream

    def close(self) -> None:
        for stream in self._open.values():
            stream.close()
        self._open.clear()

    def discard(self, zones: tuple[dns.name.Name, ...]) -> None:
        self.close()
        for zone in zones:
            with contextlib.suppress(FileNotFoundError):
                self.temporary(zone).unlink()


def generate(
    inventory: Inventory,
    directory: Path,
    serial: int,
    progress: Callable[[int], None] = lambda position: None,
) -> Generated:
    """Write `db.ZONE` for every zone of the inventory, all of them or none. `progress` hears of the bytes
    read so far.

    Raises ConfigError with every mistake and its line, UsageError where the directory cannot be written.
    """
    hosts = inventory.hosts()
    first = next(hosts, None)  # reads the head
    _check_head(inventory)
    zones = ZoneMap(inventory.zones)
    output = _Output(directory, serial, inventory.ttl, inventory.name_servers)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            result = _write(inventory, zones, output, _chain(first, hosts), progress)
            inventory.raise_problems()
            for zone in zones.zones:
                os.replace(output.temporary(zone), directory / file_name(zone))
        finally:
            output.discard(zones.zones)
    except OSError as error:
        raise UsageError(f"cannot write zone files into {directory}: {error.strerror}") from None
    return result


def _chain(first: Host | None, rest: Iterator[Host]) -> Iterator[Host]:
    if first is not None:
        yield first
    yield from rest


def _check_head(inventory: Inventory) -> None:
    if not inventory.zones:
        inventory.complain(1, "no zones: list them in `zones`")
    if not inventory.name_servers:
        inventory.complain(1, "no name servers: list them in `name_servers`")
    names = [file_name(zone) for zone in inventory.zones]
    for name in sorted({name for name in names if names.count(name) > 1}):
        inventory.complain(1, f"two zones would both be written to {name}")
    if not inventory.zones or not inventory.name_servers:
        for _ in inventory.hosts():
            pass  # so that the hosts' mistakes are listed as well
        inventory.problems[:] = list(dict.fromkeys(inventory.problems))
        inventory.raise_problems()


def _write(
    inventory: Inventory,
    zones: ZoneMap,
    output: _Output,
    hosts: Iterator[Host],
    progress: Callable[[int], None],
) -> Generated:
    warnings: list[str] = []
    for zone in zones.zones:
        output.begin(zone)
    missing = {
        server.name for server in inventory.name_servers if not server.addresses and zones.find(server.name)
    }
    glue: dict[dns.name.Name, tuple[IpAddress, ...]] = {}
    servers = {server.name for server in inventory.name_servers}
    count = 0
    for host in hosts:
        count += 1
        if count % 1000 == 0:
            progress(inventory.position)
        if host.name in servers and host.addresses:
            missing.discard(host.name)
            glue[host.name] = host.addresses
        for record in _placed(host, zones, inventory, warnings):
            output.add(record)
    _finish(zones, output, inventory, glue)
    warnings += [
        f"name server {name} lies in a listed zone but has no address: add it as a host, or write "
        f"`{name} ADDRESS` in name_servers (name servers refuse the zone without)"
        for name in sorted(missing)
    ]
    output.close()
    files = tuple(output.directory / file_name(zone) for zone in zones.zones)
    return Generated(files, count, output.records, tuple(warnings))


def _placed(host: Host, zones: ZoneMap, inventory: Inventory, warnings: list[str]) -> list[Record]:
    if len(zones.zones) != len(inventory.zones):
        inventory.complain(host.line, "new zones in the middle of the file: list all in the first row")
        return []
    records = list(host_records(host, zones))
    if not records and zones.find(host.name) is None:
        inventory.complain(host.line, f"{host.name} and its addresses are outside of every listed zone")
        return []
    for address in host.addresses:
        owner = reverse_name(address)
        if not zones.find(owner) and not zones.classless(owner) and len(warnings) < 100:
            warnings.append(f"line {host.line}: no listed reverse zone holds {address} of {host.name}")
    return records


def _finish(
    zones: ZoneMap,
    output: _Output,
    inventory: Inventory,
    glue: dict[dns.name.Name, tuple[IpAddress, ...]],
) -> None:
    """Delegations between the listed zones, and the addresses of name servers that are no hosts."""
    for server in inventory.name_servers:
        home = zones.find(server.name)
        if home is not None and server.name not in glue:
            for address in server.addresses:
                output.add(_address_record(home, server.name, address))
            glue[server.name] = server.addresses
    for zone in zones.zones:
        parent = zones.parent_of(zone)
        if parent is None:
            continue
        for server in inventory.name_servers:
            output.add(Record(parent, zone, "NS", str(server.name)))
            if server.name.is_subdomain(zone):
                for address in glue.get(server.name, ()):
                    output.add(_address_record(parent, server.name, address))


def _address_record(zone: dns.name.Name, owner: dns.name.Name, address: IpAddress) -> Record:
    return Record(zone, owner, "A" if isinstance(address, IPv4Address) else "AAAA", str(address))
