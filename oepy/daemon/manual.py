"""Manual keying in a running daemon: what is in effect, on whichever datapath, and the trap's rules for it."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from oepy.errors import OepyError, UsageError
from oepy.interfaces import ConfiguredRule, Datapath
from oepy.manual.algorithms import AEADS, CIPHERS
from oepy.manual.changes import changed, merged
from oepy.manual.checks import overlaps
from oepy.manual.model import NOTHING, ManualPolicy, ManualSet, SaIndex, SaKey, Selector
from oepy.manual.pairing import Pairing, configured_rules, pair_up
from oepy.manual.presenting import policy_mapping, sa_view
from oepy.model import IpAddress, SaCounters, SaPair
from oepy.prefixtable import PrefixTable

if TYPE_CHECKING:
    from oepy.datapath.xfrm.manual import ManualKernel

MAX_SPENT_KEYS = 100_000


class Backend(Protocol):
    """Where manual SAs and policies live."""

    def found(self) -> ManualSet:
        """What is there before the daemon has done anything: commands make it in the kernel."""

    async def change(self, old: ManualSet, new: ManualSet) -> None:
        """From one to the other. Raises OepyError; then all is as before."""

    def check(self, new: ManualSet) -> None:
        """Of a whole configuration. Raises OepyError where it cannot be served, as far as that shows beforehand."""

    def served(self) -> frozenset[Selector] | None:
        """See `pairing.configured_rules`."""

    async def in_use(self, manual: ManualSet) -> list[tuple[SaPair, SaCounters | None, float]]:
        """Pairs of SAs with what they have carried, and since when they are there (monotonic)."""

    async def sa_views(self, manual: ManualSet, *, everybodys: bool) -> list[dict[str, Any]]: ...

    async def policy_views(self, manual: ManualSet, *, everybodys: bool) -> list[dict[str, Any]]: ...

    def expires(self, spi_in: int, *, ended: bool) -> str | None:
        """See ManualKeying."""

    async def restarted(self, manual: ManualSet) -> list[str]:
        """The datapath has begun anew, with nothing in it. Returns what could not be put back, and why."""


class UserlandBackend:
    """Pairs of SAs for `interfaces.Datapath`."""

    def __init__(self, datapath: Datapath, monotonic: Callable[[], float]) -> None:
        self._datapath = datapath
        self._monotonic = monotonic
        self.pairs: dict[int, tuple[SaPair, float]] = {}  # by SPI inward, with the time of installation
        self._served: frozenset[Selector] = frozenset()
        self._waiting: dict[SaKey, str] = {}
        self._spent: set[bytes] = set()
        self._ended: set[int] = (
            set()
        )  # at a hard limit; they stay in `pairs`, so that nobody begins them anew

    def found(self) -> ManualSet:
        return NOTHING

    async def change(self, old: ManualSet, new: ManualSet) -> None:
        made, fresh, gone = self._plan(new)
        for pair in gone:
            await self._remove(pair)
        done: list[SaPair] = []
        try:
            for pair in fresh:
                await self._install(pair)
                done.append(pair)
        except OepyError:
            for pair in done:
                await self._remove(pair)
            for pair in gone:
                if not _counts_its_nonces(pair):
                    await self._install(pair)
            raise
        self._note(new, made.waiting)

    def _plan(self, new: ManualSet) -> tuple[Pairing, list[SaPair], list[SaPair]]:
        """What is to be there, and of that what is new and what is to go. Raises UsageError."""
        made = pair_up(new)
        if made.problems:
            raise UsageError("; ".join(made.problems[:20]))
        before = {spi: pair for spi, (pair, _) in self.pairs.items()}
        wanted = {pair.spi_in: pair for pair in made.pairs}
        fresh = [pair for spi, pair in wanted.items() if before.get(spi) != pair]
        for pair in fresh:
            self._refuse_spent(pair)
        return made, fresh, [pair for spi, pair in before.items() if wanted.get(spi) != pair]

    def check(self, new: ManualSet) -> None:
        made, _, _ = self._plan(new)
        if made.incomplete:
            raise UsageError("; ".join(made.incomplete[:20]))

    async def in_use(self, manual: ManualSet) -> list[tuple[SaPair, SaCounters | None, float]]:
        counters = {item.spi_in: item for item in await self._datapath.counters(list(self.pairs))}
        return [(pair, counters.get(spi), since) for spi, (pair, since) in self.pairs.items()]

    def _note(self, manual: ManualSet, waiting: dict[SaKey, str]) -> None:
        self._waiting = waiting
        in_use = {(pair.remote.address, pair.spi_out) for pair, _ in self.pairs.values()}
        sas = SaIndex(sa for sa in manual.sas if (sa.dst, sa.spi) in in_use)
        self._served = frozenset(
            policy.selector
            for policy in manual.policies
            if policy.direction == "out"
            for template in policy.templates
            if sas.fitting(template, policy.selector)
        )

    async def _install(self, pair: SaPair) -> None:
        await self._datapath.install(pair)
        if _counts_its_nonces(pair):
            self._spent.add(_fingerprint(pair))
        self.pairs[pair.spi_in] = (pair, self._monotonic())

    async def _remove(self, pair: SaPair) -> None:
        self.pairs.pop(pair.spi_in, None)
        self._ended.discard(pair.spi_in)
        await self._datapath.remove(pair.spi_in)

    def _refuse_spent(self, pair: SaPair) -> None:
        """A pair that is made anew counts from 1 again, and an AEAD must never see a nonce twice under one key."""
        if not _counts_its_nonces(pair):
            return
        if _fingerprint(pair) in self._spent or len(self._spent) >= MAX_SPENT_KEYS:
            raise UsageError(
                f"the key of the SA {pair.spi_out:#x} to {pair.remote.address} was in use before",
                f"{pair.suite.encryption} must not begin anew with it: give the SA a new key",
            )

    def served(self) -> frozenset[Selector] | None:
        return self._served

    async def sa_views(self, manual: ManualSet, *, everybodys: bool) -> list[dict[str, Any]]:
        counters = {item.spi_in: item for item in await self._datapath.counters(list(self.pairs))}
        inward = {(pair.local.address, spi): counters.get(spi) for spi, (pair, _) in self.pairs.items()}
        outward = {
            (pair.remote.address, pair.spi_out): counters.get(spi) for spi, (pair, _) in self.pairs.items()
        }
        ends = [self.pairs[spi][0] for spi in self._ended]
        ended = {(pair.local.address, pair.spi_in) for pair in ends}
        ended |= {(pair.remote.address, pair.spi_out) for pair in ends}
        listed = []
        for sa in manual.sas:
            view = sa_view(sa) | {"manual": True, "state": self._waiting.get(sa.key, "in use")}
            if (sa.dst, sa.spi) in ended:
                view["state"] = "has reached its hard limit"
            if (found := inward.get((sa.dst, sa.spi))) is not None:
                view |= {"bytes": found.bytes_in, "packets": found.packets_in, "replayed": found.replayed}
                view["integrity_failures"] = found.integrity_failures
            elif (found := outward.get((sa.dst, sa.spi))) is not None:
                view |= {"bytes": found.bytes_out, "packets": found.packets_out}
            listed.append(view)
        return listed

    async def policy_views(self, manual: ManualSet, *, everybodys: bool) -> list[dict[str, Any]]:
        return _policy_views(manual)

    def expires(self, spi_in: int, *, ended: bool) -> str | None:
        if spi_in not in self.pairs:
            return None
        if ended:
            self._ended.add(spi_in)
        return f"the SA {spi_in:#x} from {self.pairs[spi_in][0].remote.address}"

    async def restarted(self, manual: ManualSet) -> list[str]:
        lost = [pair for pair, _ in self.pairs.values()]
        self.pairs.clear()
        self._ended.clear()
        failures = []
        for pair in lost:
            try:
                self._refuse_spent(pair)
                await self._install(pair)
            except OepyError as error:
                failures.append(str(error))
        self._note(manual, self._waiting)
        return failures


class KernelBackend:
    """The kernel's own SAD and SPD."""

    def __init__(self, kernel: ManualKernel) -> None:
        self._kernel = kernel

    def found(self) -> ManualSet:
        return self._kernel.current()

    async def change(self, old: ManualSet, new: ManualSet) -> None:
        self._kernel.change(old, new)  # not by what is there: an SA at its hard limit must not begin anew

    def check(self, new: ManualSet) -> None:
        self._kernel.check(new)

    async def in_use(self, manual: ManualSet) -> list[tuple[SaPair, SaCounters | None, float]]:
        counted = {(view["dst"], view["spi"]): view for view in self._kernel.sa_views(everybodys=False)}
        now, wall = time.monotonic(), time.time()
        listed: list[tuple[SaPair, SaCounters | None, float]] = []
        for pair in pair_up(manual).pairs:
            inward = counted.get((str(pair.local.address), f"{pair.spi_in:#010x}"), {})
            outward = counted.get((str(pair.remote.address), f"{pair.spi_out:#010x}"), {})
            counters = SaCounters(
                pair.spi_in,
                inward.get("bytes", 0),
                outward.get("bytes", 0),
                inward.get("packets", 0),
                outward.get("packets", 0),
                inward.get("replayed", 0),
                inward.get("integrity_failures", 0),
            )
            listed.append((pair, counters, now - max(wall - inward.get("added", wall), 0)))
        return listed

    def served(self) -> frozenset[Selector] | None:
        return None

    async def sa_views(self, manual: ManualSet, *, everybodys: bool) -> list[dict[str, Any]]:
        return self._kernel.sa_views(everybodys=everybodys)

    async def policy_views(self, manual: ManualSet, *, everybodys: bool) -> list[dict[str, Any]]:
        return self._kernel.policy_views(everybodys=everybodys)

    def expires(self, spi_in: int, *, ended: bool) -> str | None:
        return None

    async def restarted(self, manual: ManualSet) -> list[str]:
        return []


class NoBackend:
    """`datapath: none` carries nothing, manual SAs neither."""

    def found(self) -> ManualSet:
        return NOTHING

    async def change(self, old: ManualSet, new: ManualSet) -> None:
        self.check(new)

    def check(self, new: ManualSet) -> None:
        if new:
            raise UsageError("manual keying needs a datapath", "`datapath: none` is for measuring IKE alone")

    async def in_use(self, manual: ManualSet) -> list[tuple[SaPair, SaCounters | None, float]]:
        return []

    def served(self) -> frozenset[Selector] | None:
        return frozenset()

    async def sa_views(self, manual: ManualSet, *, everybodys: bool) -> list[dict[str, Any]]:
        return []

    async def policy_views(self, manual: ManualSet, *, everybodys: bool) -> list[dict[str, Any]]:
        return []

    def expires(self, spi_in: int, *, ended: bool) -> str | None:
        return None

    async def restarted(self, manual: ManualSet) -> list[str]:
        return []


class ManualKeying:
    """What is in effect: the configuration's, and what commands have changed since."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.effective = NOTHING
        self._configured = NOTHING
        self._by_prefix: PrefixTable[ManualPolicy] = PrefixTable()

    async def start(self, configured: ManualSet) -> None:
        """What commands have made in the kernel before stays, where the configuration has nothing else in its
        place. Raises OepyError where the datapath cannot serve it all."""
        self.effective = self.backend.found()
        wanted = _with_found(configured, self.effective)
        self.backend.check(wanted)
        await self.take(wanted, configured)

    async def stop(self, *, keep_shut: bool = False) -> None:
        """What the configuration has brought goes with the daemon; what commands have made stays, where there is
        a kernel to hold it. `keep_shut`: no guard stands in for policies that demand an SA, so they stay, without
        their SAs: what they cover does not pass."""
        left = merged(self.effective, self._configured, NOTHING)
        if keep_shut:
            shut = tuple(policy for policy in self._configured.policies if policy.required)
            left = dataclasses.replace(left, policies=(*left.policies, *shut))
        await self.take(left, NOTHING)

    def after(self, operation: str, entry: object) -> ManualSet:
        """What a command would make of it. Raises OepyError."""
        return changed(self.effective, operation, entry, _no_files)

    def after_reload(self, configured: ManualSet) -> ManualSet:
        """What a new configuration makes of it. Raises OepyError, also where the datapath cannot serve it."""
        after = merged(self.effective, self._configured, configured)
        self.backend.check(after)
        return after

    def has(self, manual: ManualSet, configured: ManualSet) -> bool:
        """Whether that is in effect, and comes of that configuration."""
        return manual == self.effective and configured == self._configured

    async def take(self, manual: ManualSet, configured: ManualSet | None = None) -> None:
        """Bring it into effect; what is there already and stays is not touched. Raises OepyError."""
        await self.backend.change(self.effective, manual)
        self.effective = manual
        self._by_prefix = _by_prefix(manual)
        if configured is not None:
            self._configured = configured

    async def restarted(self) -> list[str]:
        """The datapath has begun anew. Returns what could not be put back, and why."""
        return await self.backend.restarted(self.effective)

    def rules(self) -> tuple[ConfiguredRule, ...]:
        return configured_rules(self.effective, self.backend.served())

    def in_order(self) -> list[ManualPolicy]:
        """The policies in the order in which they match."""
        return sorted(self.effective.policies, key=lambda policy: (policy.direction, policy.priority))

    async def in_use(self) -> list[tuple[SaPair, SaCounters | None, float]]:
        return await self.backend.in_use(self.effective)

    def concerns(self, address: IpAddress) -> ManualPolicy | None:
        """The first outbound policy that can be about this destination."""
        return _first(self._by_prefix, address)

    def expires(self, spi_in: int, *, ended: bool) -> str | None:
        """One of our inbound SPIs is near its limit, or at it: which SA that is; None where it is not by hand."""
        return self.backend.expires(spi_in, ended=ended)


def _with_found(configured: ManualSet, found: ManualSet) -> ManualSet:
    """The configuration comes first; leftovers of an earlier run that do not go with it are given up."""
    keys = {policy.key for policy in configured.policies}
    spis = {sa.key for sa in configured.sas}
    both = ManualSet(
        (*configured.sas, *(sa for sa in found.sas if sa.key not in spis)),
        (*configured.policies, *(policy for policy in found.policies if policy.key not in keys)),
    )
    return configured if overlaps(list(enumerate(both.policies))) else both


def first_match(manual: ManualSet, address: IpAddress) -> ManualPolicy | None:
    """The first outbound policy of a set that can be about this destination."""
    return _first(_by_prefix(manual), address)


def _first(by_prefix: PrefixTable[ManualPolicy], address: IpAddress) -> ManualPolicy | None:
    found = (policies[0] for _, policies in by_prefix.matching(address))
    return min(found, key=lambda policy: policy.priority, default=None)


def _by_prefix(manual: ManualSet) -> PrefixTable[ManualPolicy]:
    """Outbound policies by their destination, in their order."""
    found: PrefixTable[ManualPolicy] = PrefixTable()
    for policy in sorted(manual.policies, key=lambda policy: policy.priority):
        if policy.direction == "out":
            found.add(policy.selector.dst, policy)
    return found


def _policy_views(manual: ManualSet) -> list[dict[str, Any]]:
    ordered = sorted(manual.policies, key=lambda policy: (policy.direction, policy.priority))
    return [policy_mapping(policy) | {"manual": True} for policy in ordered]


def _counts_its_nonces(pair: SaPair) -> bool:
    return pair.suite.encryption in AEADS or bool(
        pair.suite.encryption in CIPHERS and pair.suite.encryption.endswith("ctr")
    )


def _fingerprint(pair: SaPair) -> bytes:
    return hashlib.sha256(b"oepy manual key" + pair.keys_out.encryption.reveal()).digest()


def _no_files(name: str) -> bytes:
    raise UsageError(f"{name[:200]}: the daemon reads no key file for a command", "send the key itself")


def open_backend(name: str, datapath: Datapath, monotonic: Callable[[], float]) -> Backend:
    """For the datapath of this name. Raises OepyError."""
    if name == "none":
        return NoBackend()
    if name == "tun":
        return UserlandBackend(datapath, monotonic)
    from oepy.daemon.addresses import is_own
    from oepy.datapath.xfrm.manual import ManualKernel
    from oepy.xfrm.socket import XfrmSocket

    return KernelBackend(ManualKernel(XfrmSocket(), is_own))
