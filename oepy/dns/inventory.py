"""The inventory of hosts from which zone files are made: YAML, or CSV with the same column names.

Hosts come out one at a time, each with its line, so that a CSV of any length needs no memory of its own. All
mistakes are collected in `Inventory.problems`; nobody writes anything while there is one.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import dns.exception
import dns.name
import yaml

from oepy.dns.message import name_key
from oepy.errors import ConfigError, KeyFormatError
from oepy.keys import describe, parse_public
from oepy.model import IpAddress, KeyAlgorithm, PublicKey

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

# The cells of a line of CSV, in the order of `Inventory.columns`, or a mapping of YAML.
Row = list[str] | Mapping[str, Any]

MAX_PROBLEMS = 1000  # a wrong column would else list a million lines
MAX_KEPT_KEYS = 1000
MAX_CELL = 4 << 20  # characters: the zones of a large network stand in one cell
DEFAULT_TTL = 3600
RECORD_KINDS = ("ipseckey", "txt")
_HOST_FIELDS = frozenset({"name", "addresses", "keys", "gateway", "precedence", "records"})
_HEAD_FIELDS = frozenset({"ttl", "zones", "name_servers"})
_LINE = "__line__"


@dataclass(frozen=True, slots=True)
class NameServer:
    """A name server of every zone; `addresses` only where it lies in a listed zone and is no host of it."""

    name: dns.name.Name
    addresses: tuple[IpAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Host:
    """One host. `gateway` is "self", "none", an address or a name."""

    line: int
    name: dns.name.Name
    addresses: tuple[IpAddress, ...]
    keys: tuple[PublicKey, ...]
    gateway: str | IpAddress | dns.name.Name = "self"
    precedence: int = 10
    records: tuple[str, ...] = ("ipseckey",)


@dataclass(slots=True)
class Inventory:
    """What heads the inventory, and the mistakes found so far (in the order of their lines)."""

    source: Path
    ttl: int = DEFAULT_TTL
    zones: list[dns.name.Name] = field(default_factory=list)
    name_servers: list[NameServer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    position: int = 0  # bytes read of a CSV so far, for a progress bar
    columns: tuple[str, ...] = ()  # of a CSV, while it is read
    _keys: dict[str, PublicKey] = field(default_factory=dict)

    def preset(self, zones: Iterable[str], name_servers: Iterable[str], ttl: int | None) -> None:
        """What the command line adds; the file's own TTL comes before `ttl`."""
        head: dict[str, Any] = {"zones": list(zones), "name_servers": list(name_servers)}
        self._head(0, head if ttl is None else head | {"ttl": ttl})

    def complain(self, line: int, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(f"line {line}: {text}")

    def raise_problems(self) -> None:
        if self.problems:
            raise ConfigError(str(self.source), self.problems)

    def hosts(self) -> Iterator[Host]:
        """Every host without a mistake; call `raise_problems` when through. Raises ConfigError at once
        where the file cannot be read as YAML or CSV at all."""
        for line, row in self.rows():
            host = self.host(line, row)
            if host is not None:
                yield host

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The rows as they stand in the file, with their lines; `zones` and the like are known from the first
        row on. Raises ConfigError as `hosts` does."""
        self.columns = ()
        try:
            yield from self._csv_rows() if self.source.suffix.lower() == ".csv" else self._yaml_rows()
        except OSError as error:
            raise ConfigError(str(self.source), [f"cannot be read: {error.strerror}"]) from None
        except UnicodeDecodeError as error:
            raise ConfigError(str(self.source), [f"no CSV or YAML text in UTF-8: {error}"]) from None

    def host(self, line: int, row: Row) -> Host | None:
        """The host of a row of `rows`; None where it has mistakes, which are in `problems` then."""
        if isinstance(row, list):
            row = {name: cell for name, cell in zip(self.columns, row, strict=False) if cell}
        return self._host(line, row)

    # ---- the two forms -----------------------------------------------------------------------------------

    def _yaml_rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        with self.source.open("rb") as stream:
            try:
                document = yaml.load(stream, _LineLoader)  # noqa: S506 - a SafeLoader with line numbers
            except yaml.YAMLError as error:
                raise ConfigError(str(self.source), [f"no valid YAML: {error}"]) from None
        if not isinstance(document, dict):
            raise ConfigError(str(self.source), ["is no mapping with `zones` and `hosts`"])
        for name in document.keys() - _HEAD_FIELDS - {"hosts", _LINE}:
            self.complain(document[_LINE], f"unknown field {name!r}")
        self._head(document[_LINE], document)
        hosts = document.get("hosts")
        if not isinstance(hosts, list):
            self.complain(document[_LINE], "`hosts` is missing or no list")
            return
        for row in hosts:
            if isinstance(row, dict):
                yield row[_LINE], row
            else:
                self.complain(document[_LINE], f"host {row!r} is no mapping")

    def _csv_rows(self) -> Iterator[tuple[int, list[str]]]:
        with self.source.open("rb") as raw:
            stream = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
            csv.field_size_limit(MAX_CELL)
            reader = csv.reader(stream, skipinitialspace=True, strict=True)
            try:
                self.columns = tuple(next(reader, ()))
                if self._check_columns():
                    yield from self._csv_hosts(reader, raw)
            except csv.Error as error:
                self.complain(reader.line_num, f"no CSV from here on: {error}; check the quotes")

    def _check_columns(self) -> bool:
        for name in sorted(set(self.columns) - _HOST_FIELDS - _HEAD_FIELDS):
            self.complain(1, f"unknown column {name!r}")
        for name in sorted({name for name in self.columns if self.columns.count(name) > 1}):
            self.complain(1, f"column {name!r} stands there twice")
        if "name" not in self.columns:
            self.complain(1, "column `name` is missing")
        return "name" in self.columns

    def _csv_hosts(self, reader: CsvReader, raw: IO[bytes]) -> Iterator[tuple[int, list[str]]]:
        width = len(self.columns)
        head_cells = [at for at, name in enumerate(self.columns) if name in _HEAD_FIELDS]
        head: dict[int, str] | None = None
        for count, cells in enumerate(reader):
            if not cells:
                continue
            if len(cells) != width:
                if len(cells) > width:
                    self.complain(reader.line_num, "more cells than columns")
                    continue
                cells.extend([""] * (width - len(cells)))
            if head is None:
                head = {at: cells[at] for at in head_cells}
                self._head(reader.line_num, {self.columns[at]: text for at, text in head.items() if text})
            else:
                for at in head_cells:
                    if cells[at] and cells[at] != head[at]:
                        self.complain(
                            reader.line_num, f"{self.columns[at]} differs: write it in the first row"
                        )
            if not count & 1023:
                self.position = raw.tell()
            yield reader.line_num, cells

    # ---- fields ------------------------------------------------------------------------------------------

    def _head(self, line: int, row: Mapping[str, Any]) -> None:
        ttl = _integer(row.get("ttl", self.ttl), 0, 2**31 - 1)
        if ttl is None:
            self.complain(line, f"ttl {row['ttl']!r} is no number of seconds")
        else:
            self.ttl = ttl
        listed = {name_key(zone) for zone in self.zones}
        for text in _words(row.get("zones")):
            zone = self._name(line, text, "zone")
            if zone is not None and name_key(zone) not in listed:
                listed.add(name_key(zone))
                self.zones.append(zone)
        known = {server.name for server in self.name_servers}
        for entry in _items(row.get("name_servers")):
            name_text, *address_texts = entry.split()
            name = self._name(line, name_text, "name server")
            addresses = tuple(
                a for a in (self._address(line, text) for text in address_texts) if a is not None
            )
            if name is not None and name not in known:
                self.name_servers.append(NameServer(name, addresses))

    def _host(self, line: int, row: Mapping[str, Any]) -> Host | None:
        before = len(self.problems)
        for unknown in sorted(str(key) for key in row.keys() - _HOST_FIELDS - _HEAD_FIELDS - {_LINE}):
            self.complain(line, f"unknown field {unknown!r}")
        name = self._name(line, row.get("name"), "name")
        texts = _words(row.get("addresses"))
        addresses = tuple(a for a in (self._address(line, text) for text in texts) if a is not None)
        if len(set(addresses)) != len(addresses):
            self.complain(line, "an address is listed twice")
        keys = tuple(k for k in (self.key(line, item) for item in _items(row.get("keys"))) if k is not None)
        precedence = _integer(row.get("precedence", 10), 0, 255)
        if precedence is None:
            self.complain(line, f"precedence {row['precedence']!r} is not in 0..255")
        records = self._records(line, row, keys)
        gateway = self.gateway(line, row.get("gateway", "self"))
        if len(self.problems) > before or name is None or precedence is None or gateway is None:
            return None
        return Host(line, name, addresses, keys, gateway, precedence, records)

    def _records(self, line: int, row: Mapping[str, Any], keys: tuple[PublicKey, ...]) -> tuple[str, ...]:
        records = tuple(word.lower() for word in _words(row.get("records", "ipseckey")))
        for word in records:
            if word not in RECORD_KINDS:
                self.complain(line, f"record kind {word!r} is not one of {', '.join(RECORD_KINDS)}")
        if "txt" in records and keys and not any(key.algorithm is KeyAlgorithm.RSA for key in keys):
            self.complain(line, f"records: txt needs an RSA key, this host's is {describe(keys[0])}")
        return records

    def gateway(self, line: int, value: object) -> str | IpAddress | dns.name.Name | None:
        text = str(value).strip()
        if text.lower() in ("self", "none"):
            return text.lower()
        try:
            return ip_address(text)
        except ValueError:
            return self._name(line, text, "gateway")

    def _name(self, line: int, value: object, what: str) -> dns.name.Name | None:
        text = str(value).strip() if isinstance(value, str | int) else ""
        if not re.fullmatch(r"[!-~]+", text):
            self.complain(line, f"{what} {value!r} is no domain name")
            return None
        try:
            return dns.name.from_text(text, dns.name.root)
        except (dns.exception.DNSException, ValueError):
            self.complain(line, f"{what} {text!r} is no domain name")
            return None

    def _address(self, line: int, text: str) -> IpAddress | None:
        try:
            address = ip_address(text)
        except ValueError:
            self.complain(line, f"{text!r} is no IP address")
            return None
        if getattr(address, "scope_id", None):
            self.complain(line, f"{text} has a zone index and cannot stand in the DNS")
            return None
        return address

    def key(self, line: int, item: str) -> PublicKey | None:
        """From `ALGORITHM BASE64`, or a file beside the inventory. Fleets share few keys: they are kept."""
        try:
            key = self._keys.get(item)
            if key is None:
                if len(self._keys) >= MAX_KEPT_KEYS:
                    self._keys.clear()
                if re.match(r"\d+\s", item):
                    key = parse_public(item, "key")
                else:
                    key = parse_public((self.source.parent / item).read_bytes(), item)
                self._keys[item] = key
            return key
        except OSError as error:
            self.complain(line, f"key file {item}: {error.strerror}")
        except KeyFormatError as error:
            self.complain(line, str(error))
        return None


class _LineLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml: 8 times as fast
    """Puts the line number of each mapping into it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = dict(super().construct_mapping(node, deep=deep))
        mapping[_LINE] = node.start_mark.line + 1
        return mapping


def _items(value: object) -> list[str]:
    """List items; in a CSV cell they are separated by `;`."""
    if value is None:
        return []
    parts = value if isinstance(value, list) else str(value).split(";")
    return [str(part).strip() for part in parts if str(part).strip()]


def _words(value: object) -> list[str]:
    """List items that hold no blanks; in a CSV cell `;`, `,` or blanks separate them."""
    return [word for item in _items(value) for word in item.replace(",", " ").split()]


def _integer(value: object, low: int, high: int) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str) or not re.fullmatch(r"\d+", str(value)):
        return None
    return number if low <= (number := int(value)) <= high else None
