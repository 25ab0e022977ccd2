"""Stand-ins for the rooms: a trap, a datapath and a key source that remember what they were told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from oepy.interfaces import DatapathEvent, TrapPolicy
from oepy.model import (
    Absent,
    AddressRange,
    Flow,
    IpAddress,
    IpNetwork,
    KeyAnswer,
    PolicyGroup,
    SaCounters,
    SaPair,
    Verdict,
)
from oepy.resolvers import ResolverState


class FakeTrap:
    """Verdicts by destination; `history` keeps their order."""

    def __init__(self) -> None:
        self.verdicts: dict[tuple[PolicyGroup, IpAddress], Verdict] = {}
        self.joined: dict[int, tuple[tuple[IpAddress, IpAddress], ...]] = {}
        self.refused: list[int] = []
        self.bystanders: dict[IpAddress, float] = {}
        self.history: list[tuple[IpAddress, Verdict | None]] = []

    def start(self, policy: TrapPolicy, on_trapped: Callable[[PolicyGroup, Flow], None]) -> None:
        self.policy = policy

    def decide(
        self, group: PolicyGroup, destination: IpAddress, verdict: Verdict, lifetime: float | None
    ) -> None:
        self.verdicts[group, destination] = verdict
        self.history.append((destination, verdict))

    def ask_for(self, on_asked: Callable[[int, Flow], None]) -> None:
        self.on_asked = on_asked

    def join(self, number: int, gone: Collection[AddressRange], fresh: Collection[AddressRange]) -> None:
        there = set(self.joined.get(number, ()))
        assert there.issuperset(gone)
        assert there.isdisjoint(fresh)
        self.joined[number] = tuple(sorted((there - set(gone)) | set(fresh), key=str))

    def refuse(self, number: int) -> None:
        self.refused.append(number)

    def commit(self) -> None:
        """Everything is committed at once here."""

    def forget(self, destinations: Iterable[tuple[PolicyGroup, IpAddress]]) -> None:
        for key in destinations:
            self.verdicts.pop(key, None)
            self.history.append((key[1], None))

    def pass_by(self, source: IpAddress, lifetime: float) -> bool:
        self.bystanders[source] = lifetime
        return True

    def held(self) -> Mapping[tuple[PolicyGroup | int, IpAddress], int]:
        return {}

    def statistics(self) -> Mapping[str, int]:
        return {}

    def reload(self, policy: TrapPolicy) -> None:
        self.policy = policy

    def stop(self, *, guard: bool) -> None:
        self.verdicts.clear()


class FakeHostAddresses:
    """The addresses and routes that the host has now; `history` keeps the sets of addresses."""

    def __init__(self) -> None:
        self.addresses: frozenset[IpAddress] = frozenset()
        self.routes: dict[IpNetwork, IpAddress] = {}
        self.history: list[frozenset[IpAddress]] = []

    async def apply(self, addresses: Collection[IpAddress], routes: Mapping[IpNetwork, IpAddress]) -> None:
        self.addresses, self.routes = frozenset(addresses), dict(routes)
        self.history.append(self.addresses)


class FakeDatapath:
    """Holds the pairs that are installed now."""

    waits = False

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self.pairs: dict[int, SaPair] = {}
        self.sending: dict[int, bool] = {}
        self.packets: dict[int, int] = {}  # that have come in
        self.peak = 0
        self._random = random

    async def start(self, on_event: Callable[[DatapathEvent], None]) -> None:
        self.on_event = on_event

    def allocate_spi(self) -> int:
        return 256 + int.from_bytes(self._random(3), "big")

    async def install(self, pair: SaPair, *, outbound: bool = True) -> None:
        self.pairs[pair.spi_in] = pair
        self.sending[pair.spi_in] = outbound
        self.peak = max(self.peak, len(self.pairs))

    async def remove(self, spi_in: int) -> None:
        self.pairs.pop(spi_in, None)

    async def counters(self, spis: Collection[int] | None = None) -> Sequence[SaCounters]:
        return [SaCounters(spi, packets_in=self.packets.get(spi, 0)) for spi in self.pairs]

    async def statistics(self) -> Mapping[str, int]:
        return {}

    async def stop(self) -> None:
        self.pairs.clear()


class FakeKeys:
    """A KeySource from a dictionary; everything else is absent."""

    def __init__(self, answers: dict[str, KeyAnswer]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.names: list[tuple[str, ...]] = []
        self.places: dict[str, tuple[IpAddress, ...]] = {}  # where names lead, securely

    async def peer_keys(self, subject: IpAddress | str, names: Sequence[str] = ()) -> KeyAnswer:
        self.asked.append(str(subject))
        self.names.append(tuple(names))
        return self.answers.get(str(subject), Absent(str(subject), "owner.", 60))

    async def doubts(self, name: str, address: IpAddress) -> str:
        return "" if address in self.places.get(name, ()) else f"{name} does not lead to {address}"

    def resolver_states(self) -> tuple[ResolverState, ...]:
        return ()

    def forget(self, subject: IpAddress | str | None) -> None:
        """Nothing is cached here."""
