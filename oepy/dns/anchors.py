"""Trust anchors: DS or DNSKEY records of zones, as zone-file lines or as BIND's `trust-anchors { }`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import dns.exception
import dns.name
import dns.rdata
import dns.rdatatype
import dns.rrset
import dns.tokenizer

from oepy.dns.message import NameKey, name_key
from oepy.dns.signatures import STRICT, Dnskey, Ds, Policy, ZoneKey, matches_ds, strongest
from oepy.errors import ConfigError

MAX_ANCHOR_FILE = 1024 * 1024
# IANA's root key signing keys of 2017 and 2024, https://data.iana.org/root-anchors/root-anchors.xml
IANA_ROOT = """
. IN DS 20326 8 2 E06D44B80B8F1D39A95C0B0D7C65D08458E880409BBC683457104237C7F8EC8D
. IN DS 38696 8 2 683D2D0ACB8C9B712A1948B27F741219298D0A450D612C483AF444A4C0FB2B16
"""
_BIND_ENTRY = re.compile(
    r"(?P<zone>\S+)\s+(?P<kind>initial-key|static-key|initial-ds|static-ds)\s+"
    r"(?P<a>\d+)\s+(?P<b>\d+)\s+(?P<c>\d+)\s+\"(?P<data>[^\"]*)\"\s*;"
)
_BIND_BLOCK = re.compile(r"\b(?:trust-anchors|trusted-keys|managed-keys)\s*\{", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Anchor:
    """What is trusted to begin with at one zone; a negative one (RFC 7646) says that nothing is checked there
    and below, down to the next anchor."""

    zone: dns.name.Name
    digests: tuple[Ds, ...] = ()
    keys: tuple[Dnskey, ...] = ()
    is_negative: bool = False

    def accepts(self, key: ZoneKey, policy: Policy) -> bool:
        if any(matches_ds(key, self.zone, ds) for ds in strongest(self.digests, policy)):
            return True
        return any(key.dnskey.key == own.key and key.dnskey.algorithm == own.algorithm for own in self.keys)

    @property
    def text(self) -> str:
        tags = sorted({ds.key_tag for ds in self.digests} | {key.key_id() for key in self.keys})
        return ", ".join(str(tag) for tag in tags)


@dataclass(slots=True)
class TrustAnchors:
    """Anchors by zone. An empty store makes everything indeterminate."""

    _by_zone: dict[NameKey, Anchor] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Mapping[dns.name.Name, Iterable[dns.rdata.Rdata]]) -> TrustAnchors:
        store = cls()
        for zone, rdatas in records.items():
            everything = tuple(rdatas)
            store._by_zone[name_key(zone)] = Anchor(
                zone,
                tuple(r for r in everything if isinstance(r, Ds)),
                tuple(r for r in everything if isinstance(r, Dnskey)),
            )
        return store

    @classmethod
    def iana(cls) -> TrustAnchors:
        """The root zone's keys as shipped."""
        return cls.of(parse_anchors(IANA_ROOT, "built-in"))

    @classmethod
    def load(
        cls, paths: Iterable[str | os.PathLike[str]], negative: Iterable[dns.name.Name] = ()
    ) -> TrustAnchors:
        """From files; the IANA root where the list is empty. `negative` are zones not to be checked. Raises
        ConfigError."""
        records: dict[dns.name.Name, list[dns.rdata.Rdata]] = {}
        for path in map(Path, paths):
            try:
                with path.open("rb") as stream:
                    text = stream.read(MAX_ANCHOR_FILE).decode("utf-8", "replace")
            except OSError as error:
                raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
            for zone, rdatas in parse_anchors(text, str(path)).items():
                records.setdefault(zone, []).extend(rdatas)
        store = cls.of(records) if records else cls.iana()
        store.add_negative(negative)
        return store

    def add_negative(self, zones: Iterable[dns.name.Name]) -> None:
        """At a zone that has an anchor too, the negative one wins: somebody asked for it."""
        for zone in zones:
            self._by_zone[name_key(zone)] = Anchor(zone, is_negative=True)

    def put(self, anchor: Anchor) -> None:
        """Instead of what is there for its zone."""
        self._by_zone[name_key(anchor.zone)] = anchor

    def copy(self) -> TrustAnchors:
        return TrustAnchors(dict(self._by_zone))

    def __iter__(self) -> Iterator[Anchor]:
        return iter(self._by_zone.values())

    def closest(self, name: dns.name.Name) -> Anchor | None:
        """The anchor at the name or nearest above it."""
        key = name_key(name)
        for depth in range(len(key)):
            anchor = self._by_zone.get(key[depth:])
            if anchor is not None:
                return anchor
        return None

    def at(self, zone: dns.name.Name) -> Anchor | None:
        return self._by_zone.get(name_key(zone))

    def at_key(self, key: NameKey) -> Anchor | None:
        """As `at`, by the key of the zone's name."""
        return self._by_zone.get(key)


def parse_anchors(text: str, source: str) -> dict[dns.name.Name, list[dns.rdata.Rdata]]:
    """Zone-file lines (with comments, parentheses, optional TTL and class), or BIND's blocks.

    Raises ConfigError where nothing usable is in it.
    """
    try:
        entries = _bind_entries(text) if _BIND_BLOCK.search(text) else _zone_file_entries(text)
    except (dns.exception.DNSException, ValueError) as error:
        raise ConfigError(source, [f"holds no DS or DNSKEY records: {error}"]) from None
    found: dict[dns.name.Name, list[dns.rdata.Rdata]] = {}
    for zone, rdata in entries:
        if (isinstance(rdata, Ds) and int(rdata.digest_type) in STRICT.digests) or isinstance(rdata, Dnskey):
            found.setdefault(zone, []).append(rdata)
    if not found:
        raise ConfigError(source, ["holds no DS (SHA-256, SHA-384) or DNSKEY record"])
    return found


def _zone_file_entries(text: str) -> list[tuple[dns.name.Name, dns.rdata.Rdata]]:
    import dns.zonefile

    kinds = {"DS", "DNSKEY"}
    rrsets = dns.zonefile.read_rrsets(
        text,
        name=None,
        rdclass=None,
        default_rdclass="IN",
        default_ttl=3600,
        origin=dns.name.root,
        relativize=False,
    )
    return [
        (rrset.name, rdata)
        for rrset in rrsets
        if dns.rdatatype.to_text(rrset.rdtype) in kinds
        for rdata in rrset
    ]


def _bind_entries(text: str) -> list[tuple[dns.name.Name, dns.rdata.Rdata]]:
    text = re.sub(r"/\*.*?\*/|(?://|#)[^\n]*", "", text, flags=re.DOTALL)
    entries = []
    for match in _BIND_ENTRY.finditer(text):
        kind = "DS" if match["kind"].endswith("ds") else "DNSKEY"
        data = "".join(match["data"].split())
        rdata = dns.rdata.from_text("IN", kind, f"{match['a']} {match['b']} {match['c']} {data}")
        entries.append((dns.name.from_text(match["zone"].strip('"'), dns.name.root), rdata))
    return entries
