"""Addresses that this host gives to clients: the configured pools, and files in which leases outlive the daemon."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from oepy.connections.model import AddressPool
from oepy.errors import OepyError
from oepy.ike.events import Lease, NeedLease
from oepy.leases import Pool
from oepy.model import Authenticated, IpAddress, TrafficSelector

WRITE_SECONDS = 1.0  # after a change: what happens together is written once
MAX_LEASE_FILE = 16 << 20


@dataclass(slots=True)
class _Served:
    spec: AddressPool
    pool: Pool
    changed: bool = False


class Pools:
    """`directory`: of the files, one a pool; None: leases end with the daemon. `report(event, alert, **fields)`."""

    def __init__(self, directory: Path | None, report: Callable[..., None]) -> None:
        self._directory = directory
        self._report = report
        self._pools: dict[str, _Served] = {}
        self._leased: dict[int, tuple[IpAddress, ...]] = {}
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ configuration

    def changed(self, specs: Iterable[AddressPool]) -> frozenset[str]:
        """The pools that are other ones, or gone."""
        new = {spec.name: spec for spec in specs}
        return frozenset(name for name, served in self._pools.items() if new.get(name) != served.spec)

    def load(self, specs: tuple[AddressPool, ...], own: Callable[[], frozenset[IpAddress]]) -> None:
        """`own`: this host's addresses, which nobody else gets. Sessions of changed pools are to end."""
        wanted = {spec.name: spec for spec in specs}
        taken = own() if any(spec != self._spec(spec.name) for spec in specs) else frozenset()
        for name in self._pools.keys() - wanted.keys():
            del self._pools[name]
        for name, spec in wanted.items():
            if self._spec(name) == spec:
                continue
            pool = Pool.of(spec.addrs, taken | frozenset(spec.dns))
            before = self._pools.get(name)
            text = before.pool.dump() if before is not None else self._read(name)
            if text:
                try:
                    pool.load(text)
                except OepyError as error:
                    self._report("leases-lost", True, reason=f"pool {name}: {error}")
            self._pools[name] = _Served(spec, pool)

    def _spec(self, name: str) -> AddressPool | None:
        served = self._pools.get(name)
        return None if served is None else served.spec

    # ------------------------------------------------------------ clients

    def lease(self, event: NeedLease, names: tuple[str, ...]) -> Lease | None:
        """Out of these pools, an address of each family that is asked for and that there is one of."""
        # Whoever proves nothing is nobody: the same address for all of them would lead their traffic astray
        nobody = event.authenticated is Authenticated.NULL
        client = f"anonymous {event.session}" if nobody else str(event.identity)
        found: list[IpAddress] = []
        told: list[AddressPool] = []
        for family in event.families:
            wanted = next((address for address in event.wanted if address.version == family), None)
            for served in self._of_family(names, family):
                address = served.pool.acquire(client, event.session, wanted)
                if address is not None:
                    found.append(address)
                    told.append(served.spec)
                    self._note(served)
                    break
        if not found:
            return None
        self._leased[event.session] = tuple(found)
        return Lease(
            tuple(found),
            tuple(dict.fromkeys(item for spec in told for item in spec.dns)),
            tuple(dict.fromkeys(item for spec in told for item in spec.subnets)),
            tuple(dict.fromkeys(item for spec in told for item in spec.domains)),
        )

    def _of_family(self, names: tuple[str, ...], family: int) -> Iterable[_Served]:
        for name in names:
            served = self._pools.get(name)
            if served is not None and served.pool.start.version == family:
                yield served

    def of(self, session: int) -> tuple[IpAddress, ...]:
        """The addresses that the peer of a session has of us."""
        return self._leased.get(session, ())

    def release(self, session: int) -> None:
        if self._leased.pop(session, None) is None:
            return
        for served in self._pools.values():
            served.pool.release(session)

    def only_leased(
        self, names: tuple[str, ...], session: int, selectors: tuple[TrafficSelector, ...]
    ) -> tuple[TrafficSelector, ...]:
        """Without what belongs to other clients: of a pool's addresses a peer has those that it was given."""
        ranges = [
            (served.pool.start, served.pool.end)
            for served in (self._pools.get(name) for name in names)
            if served is not None
        ]
        mine = [TrafficSelector.of(address) for address in self.of(session)]
        found: list[TrafficSelector] = []
        for selector in selectors:
            if not any(_overlap(selector, *bounds) for bounds in ranges):
                found.append(selector)
                continue
            found += [common for own in mine if (common := selector.intersect(own)) is not None]
        return tuple(dict.fromkeys(found))

    # ------------------------------------------------------------ files

    def _note(self, served: _Served) -> None:
        served.changed = True
        if self._directory is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WRITE_SECONDS, self.write)

    def write(self) -> None:
        """Whatever has changed, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for name, served in self._pools.items():
            if not served.changed or self._directory is None:
                continue
            served.changed = False
            try:
                _replace(self._file(name), served.pool.dump())
            except OSError as error:
                self._report("leases-not-kept", True, reason=f"{self._file(name)}: {error.strerror}")

    def _file(self, name: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{name}.json"

    def _read(self, name: str) -> str:
        if self._directory is None:
            return ""
        try:
            with self._file(name).open("rb") as stream:
                return stream.read(MAX_LEASE_FILE).decode(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self._report("leases-lost", True, reason=f"{self._file(name)}: {error.strerror}")
            return ""


def _overlap(selector: TrafficSelector, start: IpAddress, end: IpAddress) -> bool:
    return (
        selector.start.version == start.version
        and int(selector.start) <= int(end)
        and int(start) <= int(selector.end)
    )


def _replace(path: Path, text: str) -> None:
    """All of the new or all of the old file, also after a crash. Mode 0600: it says who was here."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)
