"""Checks of a zone, from a file, a transfer or answers: would oepy use its key records, can they be reached, and
are they what the inventory says?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.TXT
import dns.tsig
import dns.xfr
import dns.zone

from oepy.dns.inventory import Inventory
from oepy.dns.message import NameKey, name_key
from oepy.dns.records import Gateway, is_oe_text, is_old_oe_text, parse_ipseckey, parse_oe_text
from oepy.dns.zonefile import Placement, Record
from oepy.errors import ConfigError, OepyError, ParseError
from oepy.model import IpAddress

MAX_FINDINGS = 1000
TRANSFER_SECONDS = 600.0  # for the whole zone
SILENCE_SECONDS = 20.0
_SHOWN = 100  # characters of a record in a finding
_KEYS = (dns.rdatatype.IPSECKEY, dns.rdatatype.TXT)
_ADDRESSES = (dns.rdatatype.A, dns.rdatatype.AAAA)

Rdata = dns.rdata.Rdata
Place = tuple[NameKey, int]  # owner and type


@dataclass(slots=True)
class Records:
    """The records of a zone, or as many of them as were asked for. `sets` is by owner and type."""

    zone: dns.name.Name
    sets: dict[Place, tuple[dns.name.Name, list[Rdata]]] = field(default_factory=dict)

    def add(self, owner: dns.name.Name, rdata: Rdata) -> None:
        self.sets.setdefault((name_key(owner), int(rdata.rdtype)), (owner, []))[1].append(rdata)

    def has(self, owner: dns.name.Name, types: Iterable[int]) -> bool:
        return any((name_key(owner), int(rdtype)) in self.sets for rdtype in types)


@dataclass(slots=True)
class Checked:
    """`good` counts usable key records, `problems` says what is wrong, `kinds` counts that: `unusable` records,
    `gateway`, `delegation`, `insecure`, and against the inventory `missing`, `wrong`, `surplus`."""

    zone: dns.name.Name
    good: int = 0
    problems: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    def complain(self, kind: str, owner: dns.name.Name, rdtype: int, text: str) -> None:
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if len(self.problems) < MAX_FINDINGS:
            self.problems.append(
                f"{owner} {dns.rdatatype.to_text(dns.rdatatype.RdataType.make(rdtype))}: {text}"
            )


def read_file(path: Path) -> Records:
    """Raises ConfigError where the file is no zone file at all (naming the first line that is not)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    try:
        origin = _origin(path, text)
        zone = dns.zone.from_text(text, origin, relativize=False, check_origin=False, filename=path.name)
    except (dns.exception.DNSException, ValueError) as error:
        raise ConfigError(str(path), [f"no zone file: {error}"]) from None
    return _records(zone, origin)


def transfer(zone: dns.name.Name, server: IpAddress, port: int, key: dns.tsig.Key | None) -> Records:
    """The whole zone by AXFR (RFC 5936) over TCP, with TSIG where there is a key. Raises OepyError."""
    content = dns.zone.Zone(zone, relativize=False)
    query, _serial = dns.xfr.make_query(content, serial=None, keyring=key)
    try:
        dns.query.inbound_xfr(str(server), content, query, port, SILENCE_SECONDS, TRANSFER_SECONDS)
    except (dns.exception.DNSException, OSError, EOFError, ValueError) as error:
        text = str(error) or type(error).__name__
        raise OepyError(
            f"no transfer of {zone} from {server} port {port}: {text}",
            "does the server have the zone, and let this host (or this TSIG key) transfer it?",
        ) from None
    return _records(content, zone)


def _records(zone: dns.zone.Zone, origin: dns.name.Name) -> Records:
    records = Records(origin)
    for owner, _ttl, rdata in zone.iterate_rdatas():
        records.add(owner, rdata)
    return records


def _origin(path: Path, text: str) -> dns.name.Name:
    """`db.ZONE` names its zone, unless the file says so itself."""
    match = re.search(r"^\$ORIGIN\s+(\S+)", text, re.MULTILINE | re.IGNORECASE)
    name = match[1] if match else path.name.removeprefix("db.")
    try:
        return dns.name.from_text(name, dns.name.root)
    except (dns.exception.DNSException, ValueError):
        return dns.name.root


# ---- the records by themselves -----------------------------------------------------------------------------


def check_keys(records: Records, checked: Checked, *, is_whole: bool = True) -> None:
    """Each key record that oepy would use: does it parse, is its key usable, can its gateway be one? Whether a
    gateway's name has an address is told of a whole zone only."""
    for (_key, rdtype), (owner, rdatas) in records.sets.items():
        if rdtype not in _KEYS:
            continue
        for rdata in rdatas:
            try:
                found = _read_key(rdata)
            except ParseError as error:
                checked.complain("unusable", owner, rdtype, str(error))
                continue
            if found is not None:
                checked.good += 1
                fault = _gateway_fault(found[0], records, is_whole)
                if fault:
                    checked.complain("gateway", owner, rdtype, fault)


def _read_key(rdata: Rdata) -> tuple[Gateway] | None:
    """The gateway; None for a TXT that is none of ours. Raises ParseError for a record that is not usable."""
    if isinstance(rdata, dns.rdtypes.ANY.TXT.TXT):
        joined = b"".join(rdata.strings)
        if is_old_oe_text(joined):
            raise ParseError("X-IPsec-Gateway is an old form; write X-IPsec-Server")
        return (parse_oe_text(rdata.strings).gateway,) if is_oe_text(joined) else None
    record = parse_ipseckey(rdata.to_wire() or b"")
    record.public_key()
    return (record.gateway,)


def _gateway_fault(gateway: Gateway, records: Records, is_whole: bool) -> str:
    """Why nobody could reach that gateway, as far as the zone tells; empty for nothing."""
    if isinstance(gateway, IPv4Address | IPv6Address):
        if gateway.is_unspecified or gateway.is_multicast or gateway.is_loopback:
            return f"no other host reaches the gateway {gateway}"
        if gateway == IPv4Address("255.255.255.255"):
            return f"the gateway {gateway} is a broadcast address"
    elif gateway == dns.name.root:
        return "the gateway is the root: write gateway type 0 for none"
    elif gateway is not None and is_whole and gateway.is_subdomain(records.zone):
        is_here = records.has(gateway, (*_ADDRESSES, dns.rdatatype.CNAME))
        if not is_here and _cut_above(gateway, records) is None:
            return f"the gateway {gateway} lies in this zone and has no address"
    return ""


def check_delegations(records: Records, checked: Checked) -> None:
    """Of a whole zone: SOA and name servers, addresses for name servers inside of it, and nothing of use below a
    delegation, where no resolver looks for it (RFC 1034 §4.2.1)."""
    for needed in (dns.rdatatype.SOA, dns.rdatatype.NS):
        if not records.has(records.zone, (needed,)):
            checked.complain("delegation", records.zone, needed, "is missing: no server would load the zone")
    for (_name, rdtype), (owner, rdatas) in records.sets.items():
        if rdtype == dns.rdatatype.NS:
            for rdata in rdatas:
                target = rdata.target  # type: ignore[attr-defined]
                if target.is_subdomain(records.zone) and not records.has(target, _ADDRESSES):
                    cut = _cut_above(target, records)
                    if cut is None or cut == owner:
                        checked.complain("delegation", owner, rdtype, f"{target} has no address here")
        elif rdtype in (*_KEYS, dns.rdatatype.PTR, dns.rdatatype.CNAME):
            cut = _cut_above(owner, records)
            if cut is not None:
                checked.complain(
                    "delegation", owner, rdtype, f"lies below the delegation of {cut}: put it into that zone"
                )


def _cut_above(name: dns.name.Name, records: Records) -> dns.name.Name | None:
    """The delegation at or above the name."""
    for depth in range(len(name) - len(records.zone)):
        ancestor = dns.name.Name(name.labels[depth:])
        if records.has(ancestor, (dns.rdatatype.NS,)):
            return ancestor
    return None


# ---- against the inventory ---------------------------------------------------------------------------------


class Expected:
    """What the inventory wants of one zone. Implements `zonefile.Sink`."""

    def __init__(self, inventory: Inventory, zone: dns.name.Name) -> None:
        """Raises ConfigError with every mistake of the inventory, or where it does not list the zone."""
        self.records = Records(zone)
        self._zone = zone
        rows = inventory.rows()
        first = next(rows, None)  # reads the head
        if not inventory.zones:
            inventory.zones.append(zone)
        if zone not in inventory.zones:
            inventory.complain(1, f"{zone} is none of its zones")
            inventory.raise_problems()
        placement = Placement(inventory, self)
        if first is not None:
            placement.hosts([first])
        placement.hosts(rows)
        placement.finish()
        inventory.raise_problems()
        for server in inventory.name_servers:
            self.add(Record(zone, zone, "NS", str(server.name)))

    def add(self, record: Record) -> None:
        if record.zone == self._zone:
            rdata = dns.rdata.from_text(
                dns.rdataclass.IN, record.type, record.rdata, dns.name.root, relativize=False
            )
            self.records.add(record.owner, rdata)

    def compare(self, records: Records, checked: Checked) -> None:
        """Missing, wrong and surplus records. Of others' records only key records count as surplus: a zone may
        hold more than the inventory knows."""
        for place, (owner, wanted) in self.records.sets.items():
            _owner, found = records.sets.get(place, (owner, []))
            there = {_digest(rdata) for rdata in found if _is_ours(rdata)}
            absent = [rdata for rdata in wanted if _digest(rdata) not in there]
            surplus = [rdata for rdata in found if _is_ours(rdata) and rdata not in wanted]
            for rdata in absent:
                if surplus:
                    text = f"is {_shown(surplus.pop(0))}, the inventory says {_shown(rdata)}"
                    checked.complain("wrong", owner, place[1], text)
                else:
                    checked.complain("missing", owner, place[1], f"is missing: {_shown(rdata)}")
            for rdata in surplus:
                checked.complain("surplus", owner, place[1], f"is not in the inventory: {_shown(rdata)}")
        for place, (owner, found) in records.sets.items():
            if place[1] in _KEYS and place not in self.records.sets:
                for rdata in filter(_is_ours, found):
                    checked.complain("surplus", owner, place[1], f"is not in the inventory: {_shown(rdata)}")


def _digest(rdata: Rdata) -> bytes:
    return rdata.to_digestable(dns.name.root)


def _is_ours(rdata: Rdata) -> bool:
    """False for everybody else's TXT."""
    if not isinstance(rdata, dns.rdtypes.ANY.TXT.TXT):
        return True
    joined = b"".join(rdata.strings)
    return is_oe_text(joined) or is_old_oe_text(joined)


def _shown(rdata: Rdata) -> str:
    text = rdata.to_text()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def check_zone(records: Records, inventory: Inventory | None = None) -> Checked:
    """Everything that can be said of a whole zone. Raises ConfigError for mistakes of the inventory."""
    checked = Checked(records.zone)
    check_keys(records, checked)
    check_delegations(records, checked)
    if inventory is not None:
        Expected(inventory, records.zone).compare(records, checked)
    return checked
