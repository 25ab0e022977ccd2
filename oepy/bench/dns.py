"""Validated lookups a second and CPU per lookup, beside libunbound and beside the bare signature checks.

All ask one responder on loopback, a process of its own with answers signed beforehand, so that its work is
nobody's here. In turns, so that all see the same machine at the same time. Warm: the zone's keys are known and each
lookup is of a new name. Cold: each is in a zone not seen before, whose DS and keys are fetched too.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import dns.dnssec
import dns.flags
import dns.message
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from oepy.bench.unbound import SECURE, Unbound
from oepy.dns.anchors import TrustAnchors, parse_anchors
from oepy.dns.transport import StubTransport
from oepy.dns.validator import Validator
from oepy.errors import OepyError
from oepy.model import Security
from oepy.resolvers import Resolver

ALGORITHMS = {"rsa-2048": 8, "p256": 13, "ed25519": 15}
HOST = "127.0.0.1"
TOGETHER = 100
_TXT = int(dns.rdatatype.TXT)
_TTL = 3600
Name = dns.name.Name
Answers = dict[tuple[bytes, int], bytes]


@dataclass(frozen=True, slots=True)
class Row:
    """Times in seconds for one lookup: CPU of the process, and by the clock. `floor` is the CPU of the bare
    signature checks that a lookup cannot do without."""

    algorithm: str
    kind: str  # warm, warm at once, cold
    oepy_cpu: float
    oepy_time: float
    unbound_cpu: float
    unbound_time: float
    floor: float


# ---- the signed answers ------------------------------------------------------------------------------------


def _make_key(algorithm: int) -> Any:
    if algorithm == 8:
        return rsa.generate_private_key(65537, 2048)
    return (
        ec.generate_private_key(ec.SECP256R1()) if algorithm == 13 else ed25519.Ed25519PrivateKey.generate()
    )


class _Zone:
    def __init__(self, origin: Name, algorithm: int, private: Any) -> None:
        self.origin, self.private = origin, private
        self.dnskey = dns.dnssec.make_dnskey(private.public_key(), algorithm, flags=257)

    def answer(self, owner: Name, rdata: dns.rdata.Rdata) -> bytes:
        rrset = dns.rrset.from_rdata(owner, _TTL, rdata)
        now = int(time.time())
        signature = dns.dnssec.sign(
            rrset, self.private, self.origin, self.dnskey, inception=now - 3600, expiration=now + 86400
        )
        reply = dns.message.QueryMessage(0)
        reply.flags = dns.flags.QR | dns.flags.RD | dns.flags.RA
        reply.use_edns(0, dns.flags.DO, 1232)
        reply.question.append(dns.rrset.RRset(owner, dns.rdataclass.IN, rrset.rdtype))
        reply.answer += [rrset, dns.rrset.from_rdata(owner, _TTL, signature)]
        return reply.to_wire(max_size=4096)


@dataclass(frozen=True, slots=True)
class _Plan:
    answers: Answers
    anchor: str
    warm: dict[str, list[str]]
    cold: dict[str, list[str]]
    floors: dict[str, float]


def _plan(warm: int, cold: int) -> _Plan:
    """For each algorithm a zone of `warm` names and `cold` zones with one name each."""
    answers: Answers = {}
    root = _Zone(dns.name.root, 13, _make_key(13))
    names: dict[str, list[str]] = {}
    fresh: dict[str, list[str]] = {}
    floors = {}

    def put(zone: _Zone, owner: Name, rdata: dns.rdata.Rdata) -> None:
        answers[owner.to_wire() or b"", int(rdata.rdtype)] = zone.answer(owner, rdata)

    put(root, dns.name.root, root.dnskey)
    text = dns.rdata.from_text("IN", "TXT", f'"{"k" * 100}"')
    for algorithm, number in ALGORITHMS.items():
        private = _make_key(number)
        floors[algorithm] = _check_seconds(private)
        for index in range(cold + 1):
            zone = _Zone(dns.name.from_text(f"{algorithm}-{index}."), number, private)
            put(root, zone.origin, dns.dnssec.make_ds(zone.origin, zone.dnskey, "SHA256"))
            put(zone, zone.origin, zone.dnskey)
            owners = [f"h{host}.{zone.origin}" for host in range(1 if index else warm)]
            for owner in owners:
                put(zone, dns.name.from_text(owner), text)
            names.setdefault(algorithm, owners)
            if index:
                fresh.setdefault(algorithm, []).extend(owners)
    return _Plan(answers, f". IN DNSKEY {root.dnskey}", names, fresh, floors)


def _check_seconds(private: Any) -> float:
    """CPU of one signature check, as bare as the library allows."""
    data, public = b"x" * 250, private.public_key()
    check: Callable[[], None]
    if isinstance(private, rsa.RSAPrivateKey):
        signature = private.sign(data, padding.PKCS1v15(), hashes.SHA256())
        check = lambda: public.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())  # noqa: E731
    elif isinstance(private, ec.EllipticCurvePrivateKey):
        signature = private.sign(data, ec.ECDSA(hashes.SHA256()))
        check = lambda: public.verify(signature, data, ec.ECDSA(hashes.SHA256()))  # noqa: E731
    else:
        signature = private.sign(data)
        check = lambda: public.verify(signature, data)  # noqa: E731
    begin = time.process_time()
    for _ in range(300):
        check()
    return (time.process_time() - begin) / 300


def _serve(channel: socket.socket, answers: Answers) -> None:
    while True:
        query, peer = channel.recvfrom(4096)
        end = 12
        while query[end]:
            end += query[end] + 1
        key = (query[12 : end + 1].lower(), int.from_bytes(query[end + 1 : end + 3], "big"))
        wire = answers.get(key)
        if wire is not None:  # silence for what nobody should ask: an empty answer would be a lie
            channel.sendto(query[:2] + wire[2:], peer)


# ---- the measurements --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Spent:
    cpu: float
    time: float


def _measure(count: int, work: Callable[[], None]) -> _Spent:
    used, begin = _cpu(), time.perf_counter()
    work()
    return _Spent((_cpu() - used) / count, (time.perf_counter() - begin) / count)


def _cpu() -> float:
    """Of all threads: libunbound has some of its own."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Oepy:
    def __init__(self, port: int, anchor: str) -> None:
        anchors = TrustAnchors.of(parse_anchors(anchor, "bench"))
        self._loop = asyncio.new_event_loop()
        transport = StubTransport([Resolver(ip_address(HOST), port)])
        self._validator = Validator(transport, anchors, time.time, time.monotonic)

    def one_by_one(self, owners: Iterable[str]) -> None:
        async def run() -> None:
            for owner in owners:
                await self._ask(owner)

        self._loop.run_until_complete(run())

    def at_once(self, owners: Iterable[str]) -> None:
        async def run() -> None:
            await asyncio.gather(*map(self._ask, owners))

        self._loop.run_until_complete(run())

    async def _ask(self, owner: str) -> None:
        outcome = await self._validator.lookup(dns.name.from_text(owner), _TXT)
        if outcome.status is not Security.SECURE:
            raise OepyError(f"{owner} is {outcome.status.value}: {outcome.reason}")

    def close(self) -> None:
        self._loop.close()


class _Libunbound:
    def __init__(self, port: int, anchor: str) -> None:
        self._context = Unbound(HOST, port, [anchor])

    def one_by_one(self, owners: Iterable[str]) -> None:
        for owner in owners:
            said = self._context.ask(owner, _TXT)
            if said.status != SECURE:
                raise OepyError(f"{owner} is {said.status} for libunbound: {said.why}")

    def at_once(self, owners: Iterable[str]) -> None:
        if any(said.status != SECURE for said in self._context.ask_all(owners, _TXT)):
            raise OepyError("libunbound found something that is not secure")

    def close(self) -> None:
        self._context.close()


def run(turns: int, cold: int) -> list[Row]:
    """`turns` blocks of 100 lookups one by one and 100 at once, and `cold` fresh zones, for each algorithm."""
    plan = _plan(2 * turns * TOGETHER + 1, cold)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.bind((HOST, 0))
        serving = multiprocessing.get_context("fork").Process(target=_serve, args=(channel, plan.answers))
        serving.start()
        try:
            port = channel.getsockname()[1]
            return [row for algorithm in ALGORITHMS for row in _rows(algorithm, plan, port)]
        finally:
            serving.terminate()
            serving.join()


def _rows(algorithm: str, plan: _Plan, port: int) -> list[Row]:
    first, *owners = plan.warm[algorithm]
    systems: list[_Oepy | _Libunbound] = [_Oepy(port, plan.anchor), _Libunbound(port, plan.anchor)]
    spent: dict[tuple[str, int], list[_Spent]] = {}
    try:
        for system in systems:
            system.one_by_one([first])
        for start in range(0, len(owners), 2 * TOGETHER):
            serial, together = (
                owners[start : start + TOGETHER],
                owners[start + TOGETHER : start + 2 * TOGETHER],
            )
            for number, system in enumerate(systems):
                one = _measure(TOGETHER, lambda system=system, owners=serial: system.one_by_one(owners))  # type: ignore[misc]
                many = _measure(TOGETHER, lambda system=system, owners=together: system.at_once(owners))  # type: ignore[misc]
                spent.setdefault(("warm", number), []).append(one)
                spent.setdefault(("warm at once", number), []).append(many)
        for owner in plan.cold[algorithm]:
            for number, system in enumerate(systems):
                fresh = _measure(1, lambda system=system, owner=owner: system.one_by_one([owner]))  # type: ignore[misc]
                spent.setdefault(("cold", number), []).append(fresh)
    finally:
        for system in systems:
            system.close()
    # A fresh zone: its DS by the root's P-256 key, its keys and the answer by its own.
    floors = {"cold": 2 * plan.floors[algorithm] + plan.floors["p256"]}
    return [
        Row(
            algorithm,
            kind,
            statistics.median(each.cpu for each in spent[kind, 0]),
            statistics.median(each.time for each in spent[kind, 0]),
            statistics.median(each.cpu for each in spent[kind, 1]),
            statistics.median(each.time for each in spent[kind, 1]),
            floors.get(kind, plan.floors[algorithm]),
        )
        for kind in ("warm", "warm at once", "cold")
    ]


def render(rows: list[Row]) -> str:
    """Times of one lookup in milliseconds, and the two ratios that count."""
    head = f"{'':10}{'':14}{'oepy/s':>8}{'cpu':>8}{'time':>8}{'unbound/s':>11}{'cpu':>8}{'time':>8}"
    lines = [head + f"{'floor':>8}{'cpu/floor':>11}{'time/unbound':>14}"]
    for row in rows:
        ours, theirs = row.oepy_time, row.unbound_time
        lines.append(
            f"{row.algorithm:10}{row.kind:14}{1 / ours:8.0f}{row.oepy_cpu * 1e3:8.3f}{ours * 1e3:8.3f}"
            f"{1 / theirs:11.0f}{row.unbound_cpu * 1e3:8.3f}{theirs * 1e3:8.3f}{row.floor * 1e3:8.3f}"
            f"{row.oepy_cpu / row.floor:11.1f}{ours / theirs:14.2f}"
        )
    return "\n".join(lines)
