"""First packets of oepy beside those of libreswan's opportunistic encryption: one topology, one DNS, one run.

        alpha (oepy) ─┐                      ┌─ farm (oepy): many addresses, each with its key in the DNS
                      ├── wire ── BIND ──────┤
    swan (libreswan) ─┘                      └─ swanfarm (libreswan): as many

Both ends of both pairs publish their keys (RSA-3072: libreswan knows no other) at their reverse names, signed, and
look the other's up. Every destination is cold: nobody has asked for its record, there is no SA. Rounds are
interleaved. Of each destination:

- ping: an echo request every 10 ms until the first reply: its time, and how many requests were never answered
- connect: how long TCP's connect() takes
- together: the same with 100 destinations at once

It needs a kernel with ESP: libreswan has no other datapath. `scripts/second-kernel` boots one.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from oepy.control import protocol
from oepy.errors import OepyError
from oepy.keys import HostKey
from oepy.lab.libreswan import KEY_BITS, Pluto
from oepy.lab.nameserver import ExtraHost
from oepy.lab.namespaces import Namespace
from oepy.lab.network import PAGE_PORT, HostPlan, LabNetwork
from oepy.lab.probe import Pinger
from oepy.model import PublicKey

INTERVAL, INTERVAL_TOGETHER = 0.01, 0.1  # seconds between two echo requests to one destination
REPLY_SECONDS, LATE_SECONDS = 15.0, 1.0
TOGETHER_SECONDS = 60.0
SYSTEMS = ("oepy", "libreswan")
WARM_UP = 2  # destinations of each system that are not counted: modules load, caches fill

_STARTS = {"oepy": ("alpha", "198.18.0.10"), "libreswan": ("swan", "198.18.0.11")}
_FARMS = {"oepy": ("farm", "198.19.1.1"), "libreswan": ("swanfarm", "198.19.5.1")}
_FARM_BASE = {"oepy": "198.19.0.1", "libreswan": "198.19.0.2"}

# As its authors' example for IPSECKEY on both sides has it, with one difference: no hook script is run
_INITIATOR = """conn private-or-clear
\tleft={local}
\tleftckaid={ckaid}
\tauthby=rsasig
\tright=%opportunisticgroup
\trightrsasigkey=%dnsondemand
\tnegotiationshunt=hold
\tfailureshunt=passthrough
\tikev2=insist
\tkeyingtries=1
\tretransmit-timeout=10s
\tleftupdown=%disabled
\tauto=ondemand
"""
_RESPONDER = """conn to-{local}
\tleft={local}
\tleftckaid={ckaid}
\tauthby=rsasig
\tright={peer}
\trightrsasigkey=%dnsondemand
\tikev2=insist
\tleftupdown=%disabled
\tauto=add
"""


@dataclass
class Echo:
    """One destination: seconds from the first request to the first reply, requests sent and never answered."""

    first_reply: float | None = None
    sent: int = 0
    lost: int = 0


@dataclass
class Figures:
    ping: list[Echo] = field(default_factory=list)
    connect: list[float | None] = field(default_factory=list)
    together: list[Echo] = field(default_factory=list)
    connect_together: list[float | None] = field(default_factory=list)


def volley(namespace: Namespace, addresses: Sequence[str], interval: float, seconds: float) -> list[Echo]:
    """Echo requests to all addresses, every `interval` seconds to each until its first reply."""
    with contextlib.ExitStack() as open_sockets, namespace.entered():
        pingers = [open_sockets.enter_context(Pinger(address)) for address in addresses]
        by_descriptor = {pinger.socket.fileno(): index for index, pinger in enumerate(pingers)}
        poll = select.epoll()
        open_sockets.callback(poll.close)
        for descriptor in by_descriptor:
            poll.register(descriptor, select.EPOLLIN)
        results = [Echo() for _ in pingers]
        answered: list[set[int]] = [set() for _ in pingers]
        begun = [0.0] * len(pingers)
        waiting = set(range(len(pingers)))
        start = time.monotonic()
        next_round, end = start, start + seconds
        while (now := time.monotonic()) < end:
            if waiting and now >= next_round:
                for index in sorted(waiting):
                    begun[index] = begun[index] or time.monotonic()
                    with contextlib.suppress(OSError):
                        pingers[index].send(results[index].sent)
                    results[index].sent += 1
                next_round = max(next_round + interval, time.monotonic())
            limit = next_round if waiting else end
            for descriptor, _ in poll.poll(max(0.0, min(limit, end) - time.monotonic())):
                index = by_descriptor[descriptor]
                sequence = pingers[index].receive(0.001)
                if sequence is None:
                    continue
                answered[index].add(sequence)
                if index in waiting:
                    waiting.discard(index)
                    results[index].first_reply = time.monotonic() - begun[index]
                    if not waiting:
                        end = min(end, time.monotonic() + LATE_SECONDS)
    for result, numbers in zip(results, answered, strict=True):
        result.lost = result.sent - len(numbers)
    return results


def connects(namespace: Namespace, addresses: Sequence[str], seconds: float) -> list[float | None]:
    """TCP connections to all addresses at once: seconds to each, None for none."""
    results: list[float | None] = [None] * len(addresses)
    with contextlib.ExitStack() as open_sockets, namespace.entered():
        poll = select.epoll()
        open_sockets.callback(poll.close)
        pending: dict[int, tuple[int, float, socket.socket]] = {}
        for index, address in enumerate(addresses):
            sock = open_sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            sock.setblocking(False)
            begun = time.monotonic()
            if sock.connect_ex((address, PAGE_PORT)) in (0, errno.EINPROGRESS, errno.EAGAIN):
                pending[sock.fileno()] = (index, begun, sock)
                poll.register(sock, select.EPOLLOUT)
        end = time.monotonic() + seconds
        while pending and (left := end - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left):
                index, begun, sock = pending.pop(descriptor)
                poll.unregister(descriptor)
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    results[index] = time.monotonic() - begun
    return results


class _Addresses:
    """Cold destinations of one farm, each handed out once."""

    def __init__(self, system: str, count: int) -> None:
        first = int(IPv4Address(_FARMS[system][1]))
        self.all = [str(IPv4Address(first + index)) for index in range(count)]
        self._left = iter(self.all)

    def take(self, count: int) -> list[str]:
        return [next(self._left) for _ in range(count)]


def run(
    rounds: int, together: int, key_type: str, datapath: str, on_progress: Callable[[int, int], None]
) -> dict[str, Figures]:
    """Raises OepyError where the lab cannot be built, or where libreswan is not there."""
    count = 2 * rounds + 2 * together + WARM_UP
    addresses = {system: _Addresses(system, count) for system in SYSTEMS}
    with _built(addresses, key_type, datapath) as network:
        starts = {system: network.hosts[_STARTS[system][0]].namespace for system in SYSTEMS}
        figures = {system: Figures() for system in SYSTEMS}
        for system in SYSTEMS:
            for address in addresses[system].take(WARM_UP):
                volley(starts[system], [address], INTERVAL, REPLY_SECONDS)
        for number in range(rounds):
            for system in SYSTEMS:
                _round(network, system, starts[system], addresses[system], figures[system])
            on_progress(number + 1, rounds)
        for system in SYSTEMS:
            _together(network, system, starts[system], addresses[system], figures[system], together)
    return figures


def _round(
    network: LabNetwork, system: str, start: Namespace, addresses: _Addresses, figures: Figures
) -> None:
    pinged, connected = addresses.take(1), addresses.take(1)
    figures.ping += _checked_volley(network, system, start, pinged, INTERVAL, REPLY_SECONDS)
    figures.connect += _checked_connects(network, system, start, connected, REPLY_SECONDS)


def _together(
    network: LabNetwork, system: str, start: Namespace, addresses: _Addresses, figures: Figures, count: int
) -> None:
    pinged, connected = addresses.take(count), addresses.take(count)
    figures.together = _checked_volley(network, system, start, pinged, INTERVAL_TOGETHER, TOGETHER_SECONDS)
    figures.connect_together = _checked_connects(network, system, start, connected, TOGETHER_SECONDS)


def _checked_volley(
    network: LabNetwork, system: str, start: Namespace, pinged: Sequence[str], interval: float, seconds: float
) -> list[Echo]:
    echoes = volley(start, pinged, interval, seconds)
    answered = [at for at, echo in zip(pinged, echoes, strict=True) if echo.first_reply is not None]
    _check_private(network, system, answered)
    return echoes


def _checked_connects(
    network: LabNetwork, system: str, start: Namespace, connected: Sequence[str], seconds: float
) -> list[float | None]:
    times = connects(start, connected, seconds)
    answered = [at for at, found in zip(connected, times, strict=True) if found is not None]
    _check_private(network, system, answered)
    return times


def _check_private(network: LabNetwork, system: str, addresses: Sequence[str]) -> None:
    """What was answered must have gone through tunnels. Of oepy it is known; libreswan is given the benefit."""
    if system != "oepy":
        return
    found: dict[str, str] = {}
    for event in network.hosts["alpha"].client.get(protocol.EVENTS, limit="5000"):
        if event["event"] in ("private", "clear", "blocked"):
            found.setdefault(event["peer"], event["event"])
    for address in addresses:
        if found.get(address) != "private":
            raise OepyError(f"oepy had no tunnel to {address}", f"it was {found.get(address, 'not decided')}")


@contextlib.contextmanager
def _built(addresses: dict[str, _Addresses], key_type: str, datapath: str) -> Iterator[LabNetwork]:
    with tempfile.TemporaryDirectory(prefix="oepy-bench-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)
        oepy_keys = {host: HostKey.generate(key_type) for host in ("alpha", "farm")}
        plutos = {
            host: Pluto(
                directory / f"pluto-{host}", directory / host / "resolv.conf", directory / "ns/anchor.key"
            )
            for host in ("swan", "swanfarm")
        }
        swan_keys = {host: pluto.make_key() for host, pluto in plutos.items()}
        plans = tuple(_plans())
        network = LabNetwork(
            directory,
            hosts=plans,
            extra_dns=[
                *_extra_hosts("oepy", addresses, oepy_keys["farm"].public),
                *_extra_hosts("libreswan", addresses, swan_keys["swanfarm"]),
                ExtraHost("swan.oe.example", IPv4Address(_STARTS["libreswan"][1]), None, swan_keys["swan"]),
            ],
            host_keys=oepy_keys,
            public_keys=swan_keys,
            gateway="none",
            datapath=datapath,
        )
        stack.enter_context(network)
        network.build()
        for system in SYSTEMS:
            for address in addresses[system].all:
                network.hosts[_FARMS[system][0]].namespace.address("eth0", f"{address}/15")
        network.start_daemons()
        for host, pluto in plutos.items():
            stack.callback(pluto.stop)
            pluto.start(network.hosts[host].namespace, *_pluto_config(host, pluto, addresses["libreswan"]))
        yield network


def _pluto_config(host: str, pluto: Pluto, farm: _Addresses) -> tuple[str, dict[str, Sequence[str]]]:
    start = _STARTS["libreswan"][1]
    if host == "swan":
        text = _INITIATOR.format(local=start, ckaid=pluto.ckaid)
        return text, {"private-or-clear": ["198.19.4.0/22"]}
    text = "\n".join(_RESPONDER.format(local=local, ckaid=pluto.ckaid, peer=start) for local in farm.all)
    return text, {}


def _plans() -> Iterator[HostPlan]:
    for number, system in enumerate(SYSTEMS):
        host, v4 = _STARTS[system]
        ours = system == "oepy"
        yield HostPlan(host, v4, f"2001:2::1{number}", ours, "own" if ours else "given")
        farm = _FARMS[system][0]
        yield HostPlan(farm, _FARM_BASE[system], f"2001:2:0:9::{number + 1}", ours, "none")


def _extra_hosts(system: str, addresses: dict[str, _Addresses], key: PublicKey) -> Iterator[ExtraHost]:
    name = _FARMS[system][0]
    for index, address in enumerate(addresses[system].all):
        yield ExtraHost(f"{name}{index}.oe.example", IPv4Address(address), None, key)


def _median(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def summary(figures: dict[str, Figures]) -> dict[str, Any]:
    """Medians in seconds, losses as counts; `ratio` is oepy's part of libreswan's."""
    rows: dict[str, Any] = {}
    for name, echoes, values in (
        ("ping", lambda f: f.ping, lambda f: [e.first_reply for e in f.ping]),
        ("connect", lambda f: [], lambda f: f.connect),
        ("ping together", lambda f: f.together, lambda f: [e.first_reply for e in f.together]),
        ("connect together", lambda f: [], lambda f: f.connect_together),
    ):
        row: dict[str, Any] = {}
        for system, found in figures.items():
            times = values(found)
            row[system] = {
                "destinations": len(times),
                "failed": sum(value is None for value in times),
                "median": _median(times),
                "worst": max((value for value in times if value is not None), default=None),
                "sent": sum(echo.sent for echo in echoes(found)),
                "lost": sum(echo.lost for echo in echoes(found)),
            }
        ours, theirs = row["oepy"]["median"], row["libreswan"]["median"]
        row["ratio"] = ours / theirs if ours and theirs else None
        rows[name] = row
    return rows


__all__ = ["KEY_BITS", "run", "summary"]
