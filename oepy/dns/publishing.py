"""Bringing key records into live zones and looking whether they are there: the IO around `publish`.

Names go through in chunks, so that memory does not grow with the inventory. Each chunk is read from the primary,
planned, and only the difference is sent. Nothing is remembered between runs: a run that was killed is resumed by
running it again, because what is there already is not sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from itertools import chain, islice

import dns.name
import dns.rcode
import dns.rdatatype
import dns.rdtypes.ANY.CNAME
import dns.rdtypes.ANY.NS
import dns.rdtypes.ANY.SOA
import dns.rdtypes.IN.A
import dns.rdtypes.IN.AAAA

from oepy.dns.inventory import Host, Inventory
from oepy.dns.message import NameKey, Question, Reply, name_key
from oepy.dns.primary import LostError, Server, ServerError, StaleError
from oepy.dns.publish import (
    KINDS,
    MAX_BATCH_BYTES,
    MAX_BATCH_CHANGES,
    Change,
    Conflict,
    Found,
    FoundSet,
    Wanted,
    batches,
    compare,
    plan,
    wanted_of,
)
from oepy.dns.transport import NoReply, Transport
from oepy.dns.validator import Outcome, Validator
from oepy.dns.zonefile import host_records
from oepy.dns.zonemap import ZoneMap
from oepy.errors import UsageError
from oepy.model import IpAddress, PublicKey, Security

CHUNK_HOSTS = 200
MIN_UNREAD = 10  # names of a zone in a chunk from which on it is worth to guess before reading
NEAR = 25  # names that are looked at together where one of them is odd
MAX_ATTEMPTS = 5  # with a batch whose zone changes under our hands, or whose connection breaks
MAX_SHOWN = 100  # conflicts and differences that are kept to be shown; all are counted
MAX_SERVERS = 32  # name servers of one zone
MAX_ALIASES = 8

Name = dns.name.Name


# ---- what is wanted --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """The hosts whose names are looked after: of an inventory, or this one host. `hosts` starts anew each time."""

    hosts: Callable[[], Iterator[Host]]
    zones: ZoneMap
    ttl: int
    more_keys: tuple[PublicKey, ...] = ()

    def chunks(self, *, withdraw: bool = False) -> Iterator[list[Wanted]]:
        hosts = self.hosts()
        while chunk := list(islice(hosts, CHUNK_HOSTS)):
            yield wanted_of(chunk, self.zones, self.ttl, self.more_keys, withdraw=withdraw)


def task_of(make_inventory: Callable[[], Inventory]) -> tuple[Task, int]:
    """The task of an inventory, and its number of hosts. It is read through once, so that a mistake in the last
    line stops everything before anything is sent. Raises ConfigError."""
    inventory = make_inventory()
    hosts = iter(inventory.hosts())
    first = next(hosts, None)
    if not inventory.zones:
        inventory.complain(1, "no zones: list them in `zones`")
    zones = ZoneMap(inventory.zones)
    count = 0
    for host in chain(() if first is None else (first,), hosts):
        count += 1
        if zones.zones and next(host_records(host, zones), None) is None and zones.find(host.name) is None:
            inventory.complain(host.line, f"{host.name} and its addresses are outside of every listed zone")
    inventory.raise_problems()

    return Task(lambda: make_inventory().hosts(), zones, inventory.ttl), count


# ---- finding zones and servers ---------------------------------------------------------------------------


class Finder:
    """Asks the resolver where zones and their servers are. Not validated: TSIG, or the validator, decides later."""

    def __init__(self, transport: Transport, mark: int = 0) -> None:
        self._transport = transport
        self._mark = mark

    async def zone_of(self, owner: Name) -> Name:
        """The zone in which this name's records are, after its aliases. Raises UsageError."""
        target = owner
        for _ in range(MAX_ALIASES):
            reply = await self._ask(target, dns.rdatatype.SOA)
            for rrset in (*reply.answer, *reply.authority):
                if rrset.type == dns.rdatatype.SOA and target.is_subdomain(rrset.name):
                    return rrset.name
            alias = reply.find(target, int(dns.rdatatype.CNAME))
            if alias is None or not isinstance(alias.rdatas[0], dns.rdtypes.ANY.CNAME.CNAME):
                break
            target = alias.rdatas[0].target
        raise UsageError(
            f"no zone holds {owner}", "does somebody serve it? An inventory with `zones` says where"
        )

    async def primary_of(self, zone: Name) -> Name:
        """SOA's MNAME. Raises ServerError."""
        reply = await self._ask(zone, dns.rdatatype.SOA)
        rrset = reply.find(zone, int(dns.rdatatype.SOA))
        if rrset is None or not isinstance(rrset.rdatas[0], dns.rdtypes.ANY.SOA.SOA):
            raise ServerError(f"the resolver knows no zone {zone}", "give --server")
        return rrset.rdatas[0].mname

    async def servers_of(self, zone: Name) -> list[Name]:
        """The NS set. Raises ServerError."""
        reply = await self._ask(zone, dns.rdatatype.NS)
        rrset = reply.find(zone, int(dns.rdatatype.NS))
        names = [r.target for r in rrset.rdatas if isinstance(r, dns.rdtypes.ANY.NS.NS)] if rrset else []
        if not names:
            raise ServerError(f"the resolver knows no name servers of {zone}", "is the zone delegated?")
        return sorted(names)[:MAX_SERVERS]

    async def addresses_of(self, name: Name) -> list[IpAddress]:
        """IPv4 first. Raises ServerError where there is none."""
        found: list[IpAddress] = []
        for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
            for rrset in (await self._ask(name, kind)).answer:
                for rdata in rrset.rdatas:
                    if isinstance(rdata, dns.rdtypes.IN.A.A):
                        found.append(IPv4Address(rdata.address))
                    elif isinstance(rdata, dns.rdtypes.IN.AAAA.AAAA):
                        found.append(IPv6Address(rdata.address))
        if not found:
            raise ServerError(f"the name server {name} has no address", "give --server")
        return found

    async def authorities_of(self, zone: Name) -> AsyncIterator[tuple[str, Server]]:
        """Every address of every server of the NS set, with a label. Raises ServerError."""
        for name in await self.servers_of(zone):
            for address in await self.addresses_of(name):
                yield f"{name} {address}", Server(address, 53, None, self._mark)

    async def _ask(self, name: Name, kind: dns.rdatatype.RdataType) -> Reply:
        reply = await self._transport.ask(Question(name, int(kind)))
        if isinstance(reply, NoReply):
            raise ServerError(f"the resolver does not answer for {name} ({reply.reason})", "give --resolver")
        if reply.rcode not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            raise ServerError(
                f"the resolver answers {reply.rcode_text} for {name}", "give --server, or --resolver"
            )
        return reply


# ---- publish and withdraw --------------------------------------------------------------------------------


@dataclass(slots=True)
class Published:
    """What a run did (or, `dry_run`, would do). `cache_seconds`: how long caches may hold what was before."""

    names: int = 0
    unchanged: int = 0
    changed: int = 0
    added: int = 0
    removed: int = 0
    batches: int = 0
    conflict_count: int = 0
    conflicts: list[Conflict] = field(default_factory=list)
    cache_seconds: int = 0
    servers: dict[str, str] = field(default_factory=dict)


class Publisher:
    """Sends differences to the primaries. `connect` gives the server of a zone, once for each zone."""

    def __init__(
        self,
        connect: Callable[[Name], Awaitable[Server]],
        *,
        replace: bool = False,
        dry_run: bool = False,
        show: Callable[[Change], None] = lambda change: None,
    ) -> None:
        self._connect = connect
        self._replace = replace
        self._dry_run = dry_run
        self._show = show
        self._servers: dict[NameKey, tuple[Server, int]] = {}
        self._guesses = [self._nothing_there, self._all_there]  # the one that was right last comes first
        self._guessed_right = True
        self.done = Published()

    async def run(self, chunks: Iterable[list[Wanted]]) -> Published:
        """All of them. Raises ServerError; what was done until then stays, and `done` says how much."""
        try:
            for chunk in chunks:
                for wanted in by_zone(chunk):
                    await self._bring(wanted)
        finally:
            for server, _ in self._servers.values():
                await server.close()
        return self.done

    async def _bring(self, wanted: list[Wanted]) -> None:
        """The names of one zone."""
        server, negative_ttl = await self._server(wanted[0].zone)
        self.done.names += len(wanted)
        if len(wanted) >= MIN_UNREAD and not self._dry_run:
            wanted = await self._left_by_guesses(server, wanted, negative_ttl)
        if not wanted:
            return
        changes = self._plan(wanted, await server.find([one.owner for one in wanted]))
        for batch in batches(changes):
            await self._send(server, batch, {name_key(one.owner): one for one in wanted}, negative_ttl)

    async def _left_by_guesses(self, server: Server, wanted: list[Wanted], negative_ttl: int) -> list[Wanted]:
        """The names that must be read. Where most guesses are right, one odd name costs those near it only."""
        left: list[Wanted] = []
        for piece in pieces(wanted):
            was_right = self._guessed_right
            self._guessed_right = await self._guess(server, piece, negative_ttl)
            if self._guessed_right:
                continue
            if not was_right:
                left += piece
                continue
            for start in range(0, len(piece), NEAR):
                near = piece[start : start + NEAR]
                if not await self._guess(server, near, negative_ttl):
                    left += near
        return left

    async def _guess(self, server: Server, piece: list[Wanted], negative_ttl: int) -> bool:
        """One message about all these names instead of two questions about each: that they have no key record yet,
        or just those wanted (a run is resumed)."""
        for guess in self._guesses:
            try:
                right = await guess(server, piece, negative_ttl)
            except (StaleError, LostError):
                right = False
            if right:
                if guess is not self._guesses[0]:
                    self._guesses.reverse()  # the next names will be like these
                return True
        return False

    async def _nothing_there(self, server: Server, piece: list[Wanted], negative_ttl: int) -> bool:
        changes = [step for one in piece if isinstance(step := plan(one, Found()), Change)]
        if not changes:
            return False
        await server.update(piece[0].zone, changes, unread=True)
        self.done.unchanged += len(piece) - len(changes)
        self._count(changes, negative_ttl)
        return True

    async def _all_there(self, server: Server, piece: list[Wanted], negative_ttl: int) -> bool:
        await server.demand(piece)
        # The demand does not see the TTL. Updates are whole messages: one that differs does so at an end. What a
        # server signs beside the zone that it updates may show later, and is no reason to doubt.
        ends = [piece[0], piece[-1]]
        found = await server.find([one.owner for one in ends])
        if any(
            rrset.ttl != one.ttl for one, at in zip(ends, found, strict=True) for rrset in at.sets.values()
        ):
            return False
        self.done.unchanged += len(piece)
        return True

    def _plan(self, wanted: Sequence[Wanted], found: Sequence[Found]) -> list[Change]:
        changes = []
        for one, there in zip(wanted, found, strict=True):
            step = plan(one, there, replace=self._replace)
            if isinstance(step, Change):
                changes.append(step)
            elif step is None:
                self.done.unchanged += 1
            else:
                self.done.conflict_count += 1
                if len(self.done.conflicts) < MAX_SHOWN:
                    self.done.conflicts.append(step)
        return changes

    async def _send(
        self, server: Server, batch: list[Change], wanted: dict[NameKey, Wanted], negative_ttl: int
    ) -> None:
        for attempt in range(MAX_ATTEMPTS):
            if not batch:
                return
            try:
                if not self._dry_run:
                    await server.update(batch[0].zone, batch)
            except (StaleError, LostError) as error:
                if attempt + 1 == MAX_ATTEMPTS:
                    if isinstance(error, LostError):
                        raise
                    raise ServerError(
                        f"{batch[0].zone} keeps changing while it is updated ({error})",
                        "who else writes there?",
                    ) from None
                await asyncio.sleep(0.1 * attempt)
                again = [wanted[name_key(change.owner)] for change in batch]
                batch = self._plan(again, await server.find([one.owner for one in again]))
                continue
            self._count(batch, negative_ttl)
            return

    def _count(self, batch: list[Change], negative_ttl: int) -> None:
        self.done.batches += 1
        for change in batch:
            self.done.changed += 1
            self.done.added += sum(len(rrset.added) for rrset in change.sets)
            self.done.removed += sum(len(rrset.removed) for rrset in change.sets)
            self.done.cache_seconds = max(self.done.cache_seconds, change.old_ttl(negative_ttl))
            self._show(change)

    async def _server(self, zone: Name) -> tuple[Server, int]:
        key = name_key(zone)
        if key not in self._servers:
            server = await self._connect(zone)
            _, negative_ttl = await server.soa(zone)
            self._servers[key] = server, negative_ttl
            self.done.servers[str(zone)] = str(server)
        return self._servers[key]


def pieces(wanted: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """Names of one zone in lists that fit into one message with all that it demands."""
    piece: list[Wanted] = []
    size = 0
    for one in wanted:
        head = len(one.owner.to_wire() or b"") + 10
        needed = 5 * head + sum(head + len(record.data) for record in one.records)
        if piece and (size + needed > MAX_BATCH_BYTES or len(piece) >= MAX_BATCH_CHANGES):
            yield piece
            piece, size = [], 0
        piece.append(one)
        size += needed
    if piece:
        yield piece


def by_zone(wanted: Iterable[Wanted]) -> list[list[Wanted]]:
    zones: dict[NameKey, list[Wanted]] = {}
    for one in wanted:
        zones.setdefault(name_key(one.zone), []).append(one)
    return list(zones.values())


# ---- verify ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class View:
    """How one server (or the validator) sees the names of one zone."""

    zone: str
    server: str
    serial: int | None = None
    right: int = 0
    missing: int = 0
    different: int = 0
    error: str = ""
    note: str = ""
    details: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return not (self.missing or self.different or self.error)

    def tell(self, text: str) -> None:
        if len(self.details) < MAX_SHOWN:
            self.details.append(text)

    def judge(self, wanted: Wanted, found: Found) -> None:
        """Count one name."""
        if found.unreadable or (found.alias is not None and wanted.records):
            self.different += 1
            self.tell(f"{wanted.owner}: {found.unreadable or f'is an alias of {found.alias}'}")
            return
        difference = compare(wanted, found)
        if not difference:
            self.right += 1
            return
        if any(found.sets.values()) or difference.extra:
            self.different += 1
        else:
            self.missing += 1
        self.tell(f"{wanted.owner}: {difference}")


@dataclass(slots=True)
class Verified:
    """`cache_seconds`: the longest that any cache may hold something older, from the change on."""

    names: int = 0
    views: dict[tuple[str, str], View] = field(default_factory=dict)
    cache_seconds: int = 0

    @property
    def all_right(self) -> bool:
        return bool(self.names) and all(view.is_right for view in self.views.values())


class Verifier:
    """`servers_of` gives the authoritative servers of a zone, each with a label; `validator` None asks none."""

    def __init__(
        self,
        servers_of: Callable[[Name], AsyncIterator[tuple[str, Server]]],
        validator: Validator | None,
        parallel: int = 32,
    ) -> None:
        self._servers_of = servers_of
        self._validator = validator
        self._slots = asyncio.Semaphore(parallel)
        self._servers: dict[NameKey, list[tuple[View, Server]]] = {}
        self.done = Verified()

    async def run(self, chunks: Iterable[list[Wanted]]) -> Verified:
        try:
            for chunk in chunks:
                for wanted in by_zone(chunk):
                    await self._look(wanted)
        finally:
            for servers in self._servers.values():
                for _, server in servers:
                    await server.close()
        return self.done

    async def _look(self, wanted: list[Wanted]) -> None:
        self.done.names += len(wanted)
        self.done.cache_seconds = max(self.done.cache_seconds, *(one.ttl for one in wanted))
        for view, server in await self._open(wanted[0].zone):
            if view.error or view.note:
                continue
            try:
                found = await server.find([one.owner for one in wanted])
            except ServerError as error:
                view.error = str(error)
                continue
            for one, there in zip(wanted, found, strict=True):
                view.judge(one, there)
        if self._validator is not None:
            view = self._view(wanted[0].zone, "validator")
            for one, there in zip(
                wanted, await asyncio.gather(*(self._validated(one) for one in wanted)), strict=True
            ):
                view.judge(one, there)

    def _view(self, zone: Name, label: str) -> View:
        return self.done.views.setdefault((str(zone), label), View(str(zone), label))

    async def _open(self, zone: Name) -> list[tuple[View, Server]]:
        key = name_key(zone)
        if key not in self._servers:
            servers = self._servers[key] = []
            async for label, server in self._servers_of(zone):
                view = self._view(zone, label)
                servers.append((view, server))
                try:
                    view.serial, negative_ttl = await server.soa(zone)
                except ServerError as error:
                    if "unreachable" in error.what and server.address.version == 6:
                        view.note = "not asked: this host has no IPv6"
                    else:
                        view.error = str(error)
                    continue
                self.done.cache_seconds = max(self.done.cache_seconds, negative_ttl)
            if not any(not view.error and not view.note for view, _ in servers):
                self._view(zone, "servers").error = f"no authoritative server of {zone} could be asked"
        return self._servers[key]

    async def _validated(self, wanted: Wanted) -> Found:
        assert self._validator is not None
        sets = {}
        for kind in KINDS:
            async with self._slots:
                outcome: Outcome = await self._validator.lookup(wanted.owner, kind)
            if outcome.status is not Security.SECURE:
                return Found(unreadable=f"{outcome.status.value}, {outcome.reason}")
            if outcome.rdatas:
                data = frozenset(rdata.to_wire() or b"" for rdata in outcome.rdatas)
                sets[kind] = FoundSet(outcome.ttl, data)
        return Found(sets)
