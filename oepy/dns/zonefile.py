"""Zone files with key records from an inventory, one file a zone, host by host.

Owner names: the host's own name, and the reverse name of each address. In a reverse zone that RFC 2317 cuts
below a byte (`64/26.2.0.192.in-addr.arpa`), the records stand under the cut zone and the zone above gets the
CNAME, where both are listed. A listed zone below another listed zone is delegated from it.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from itertools import chain
from pathlib import Path
from typing import Protocol

import dns.name

from oepy.dns.inventory import Host, Inventory, Row
from oepy.dns.message import NameKey, name_key
from oepy.dns.records import Gateway, IpsecKey, OeText, build_oe_text, text_rdata
from oepy.dns.zonemap import ZoneMap, reverse_name
from oepy.dns.zoneplain import PlainRows
from oepy.errors import UsageError
from oepy.model import IpAddress, KeyAlgorithm

BUFFERED = 1 << 20  # characters of all zones that wait to be written, and as many more for each zone:
BUFFERED_OF_ZONE = 4096
MAX_WARNINGS = 100


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


def file_name(zone: dns.name.Name) -> str:
    """`db.ZONE`; the slash of RFC 2317 becomes a dash, `db.root` is the root."""
    text = zone.to_text(omit_final_dot=True).lower()
    return "db." + ("root" if text in ("", ".") else text.replace("/", "-"))


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


class Sink(Protocol):
    def add(self, record: Record) -> None: ...


class Output:
    """Zone files under construction. What is written waits in memory, within a bound, so that an inventory
    in any order costs few writes and no file stays open."""

    def __init__(self, directory: Path, serial: int, inventory: Inventory) -> None:
        self.directory = directory
        self.zones = tuple(inventory.zones)
        self.records = 0
        self._serial, self._ttl, self._servers = serial, inventory.ttl, inventory.name_servers
        self._suffix = secrets.token_hex(4)
        self._index = {name_key(zone): index for index, zone in enumerate(self.zones)}
        self._waiting: list[list[str]] = [[] for _ in self.zones]
        self._size = 0
        self._bound = BUFFERED + BUFFERED_OF_ZONE * len(self.zones)

    def index(self, zone: dns.name.Name) -> int:
        return self._index[name_key(zone)]

    def begin(self) -> None:
        first = self._servers[0].name
        mail = dns.name.Name((b"hostmaster", *first.parent().labels))
        negative = min(self._ttl, 3600)
        servers = "".join(f"@ IN NS {server.name}\n" for server in self._servers)
        for index, zone in enumerate(self.zones):
            soa = f"@ IN SOA {first} {mail} {self._serial} 7200 900 1209600 {negative}\n"
            self.put(index, f"$ORIGIN {zone}\n$TTL {self._ttl}\n{soa}{servers}")

    def add(self, record: Record) -> None:
        owner = record.owner.relativize(record.zone).to_text()
        self.put(self.index(record.zone), f"{owner} IN {record.type} {record.rdata}\n")
        self.records += 1

    def put(self, index: int, text: str) -> None:
        """Whole lines for the zone of that index."""
        self._waiting[index].append(text)
        self._size += len(text)
        if self._size > self._bound:
            self.flush()

    def flush(self) -> None:
        for zone, texts in zip(self.zones, self._waiting, strict=True):
            if texts:
                with self._temporary(zone).open("a", encoding="ascii", newline="\n") as stream:
                    stream.writelines(texts)
                texts.clear()
        self._size = 0

    def publish(self) -> tuple[Path, ...]:
        """Each file takes the place of the old one at once."""
        self.flush()
        files = tuple(self.directory / file_name(zone) for zone in self.zones)
        for zone, path in zip(self.zones, files, strict=True):
            os.replace(self._temporary(zone), path)
        return files

    def discard(self) -> None:
        for zone in self.zones:
            self._temporary(zone).unlink(missing_ok=True)

    def _temporary(self, zone: dns.name.Name) -> Path:
        return self.directory / f".{file_name(zone)}.{self._suffix}"


def generate(
    inventory: Inventory,
    directory: Path,
    serial: int,
    progress: Callable[[int], None] = lambda position: None,
    *,
    plain: bool = True,
) -> Generated:
    """Write `db.ZONE` for every zone of the inventory, all of them or none. `progress` hears of the bytes
    read so far. `plain` only says whether `PlainRows` may take the rows that it knows: the bytes are the same.

    Raises ConfigError with every mistake and its line, UsageError where the directory cannot be written.
    """
    rows = inventory.rows()
    first = next(rows, None)  # reads the head
    _check_head(inventory)
    output = Output(directory, serial, inventory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            writing = Placement(inventory, output)
            output.begin()
            writing.hosts(chain([first] if first else [], rows), progress, output if plain else None)
            writing.finish()
            inventory.raise_problems()
            files = output.publish()
        finally:
            output.discard()
    except OSError as error:
        raise UsageError(f"cannot write zone files into {directory}: {error.strerror}") from None
    return Generated(files, writing.count, output.records, tuple(writing.warnings))


def _check_head(inventory: Inventory) -> None:
    if not inventory.zones:
        inventory.complain(1, "no zones: list them in `zones`")
    if not inventory.name_servers:
        inventory.complain(1, "no name servers: list them in `name_servers`")
    names = Counter(file_name(zone) for zone in inventory.zones)
    for name in sorted(name for name, count in names.items() if count > 1):
        inventory.complain(1, f"two zones would both be written to {name}")
    if not inventory.zones or not inventory.name_servers:
        for _ in inventory.hosts():
            pass  # so that the hosts' mistakes are listed as well
        inventory.problems[:] = list(dict.fromkeys(inventory.problems))
        inventory.raise_problems()


class Placement:
    """One run over the rows of an inventory, whose head is read: each record goes to `sink`."""

    def __init__(self, inventory: Inventory, sink: Sink) -> None:
        self.count = 0
        self.warnings: list[str] = []
        self._inventory, self._sink = inventory, sink
        self._zones = ZoneMap(inventory.zones)
        self._servers = {name_key(server.name) for server in inventory.name_servers}
        self._glue: dict[NameKey, tuple[IpAddress, ...]] = {}

    def hosts(
        self,
        rows: Iterable[tuple[int, Row]],
        progress: Callable[[int], None] = lambda position: None,
        output: Output | None = None,
    ) -> None:
        """Rows of the usual form go the short way into `output`, where there is one."""
        plain = output and PlainRows(self._inventory, self._zones, output, self._servers, self._warn)
        for line, row in rows:
            self.count += 1
            if not self.count & 1023:
                progress(self._inventory.position)
            if plain and isinstance(row, list) and plain.add(line, row):
                continue
            host = self._inventory.host(line, row)
            if host is not None:
                self._host(host)

    def _host(self, host: Host) -> None:
        if name_key(host.name) in self._servers and host.addresses:
            self._glue[name_key(host.name)] = host.addresses
        records = list(host_records(host, self._zones))
        if not records and self._zones.find(host.name) is None:
            self._inventory.complain(
                host.line, f"{host.name} and its addresses are outside of every listed zone"
            )
        for record in records:
            self._sink.add(record)
        for address in host.addresses:
            owner = reverse_name(address)
            if not self._zones.find(owner) and not self._zones.classless(owner):
                self._warn(host.line, str(address), str(host.name))

    def _warn(self, line: int, address: str, name: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(f"line {line}: no listed reverse zone holds {address} of {name}")

    def finish(self) -> None:
        """Delegations between the listed zones, and the addresses of name servers that are no hosts."""
        servers = self._inventory.name_servers
        for server in servers:
            home = self._zones.find(server.name)
            if home is None or name_key(server.name) in self._glue:
                continue
            self._glue[name_key(server.name)] = server.addresses
            for address in server.addresses:
                self._sink.add(_address_record(home, server.name, address))
            if not server.addresses:
                self.warnings.append(
                    f"name server {server.name} lies in a listed zone but has no address: add it as a host, or "
                    f"write `{server.name} ADDRESS` in name_servers (name servers refuse the zone without)"
                )
        for zone in self._zones.zones:
            parent = self._zones.parent_of(zone)
            if parent is None:
                continue
            for server in servers:
                self._sink.add(Record(parent, zone, "NS", str(server.name)))
                if server.name.is_subdomain(zone):
                    for address in self._glue.get(name_key(server.name), ()):
                        self._sink.add(_address_record(parent, server.name, address))


def _address_record(zone: dns.name.Name, owner: dns.name.Name, address: IpAddress) -> Record:
    return Record(zone, owner, "A" if isinstance(address, IPv4Address) else "AAAA", str(address))
