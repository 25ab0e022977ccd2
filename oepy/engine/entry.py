"""One destination as the engine knows it, and the gateways that its records offer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from oepy.engine.messages import Proof
from oepy.engine.table import MAX_GATEWAYS, TRANSITIONS, State
from oepy.errors import MisuseError
from oepy.model import Authenticated, IpAddress, KeyAnswer, PeerKey, PolicyGroup, PublicKey, SaPair

Key = tuple[PolicyGroup, IpAddress]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One gateway with every key that its records give: in a roll-over any of them may be right."""

    gateway: IpAddress
    keys: tuple[PublicKey, ...]
    by: Proof = Proof.RECORD


def candidates_of(
    keys: Iterable[PeerKey], source: IpAddress | None, by: Proof = Proof.RECORD
) -> list[Candidate]:
    """Gateways in the order of the records. Where a record names several addresses of one gateway, those of
    the source's family come first."""
    by_gateway: dict[IpAddress, list[PublicKey]] = {}
    for record in keys:
        gateways = list(record.gateways)
        if source is not None:
            gateways.sort(key=lambda address: address.version != source.version)
        for gateway in gateways:
            known = by_gateway.setdefault(gateway, [])
            if record.key not in known:
                known.append(record.key)
    return [Candidate(gateway, tuple(found), by) for gateway, found in by_gateway.items()][:MAX_GATEWAYS]


@dataclass(slots=True)
class Tunnel:
    """A pair that protects an entry's traffic."""

    spi_in: int
    spi_out: int
    authenticated: Authenticated
    since: float
    encap: bool


@dataclass(slots=True)
class Entry:
    group: PolicyGroup
    destination: IpAddress
    prefix: str
    since: float
    state: State = State.NEW
    reason: str = ""
    expires: float | None = None
    refresh_at: float = 0.0  # when the kernel's element is renewed
    source: IpAddress | None = None
    uncovered: IpAddress | None = None  # a further source address that wants a tunnel of its own
    answer: KeyAnswer | None = None
    answered_at: float = 0.0
    candidates: list[Candidate] = field(default_factory=list)
    names: tuple[str, ...] = ()  # that have caused a lookup already
    refused: frozenset[PublicKey] = frozenset()  # claimed keys that the address could not prove ...
    refused_until: float = 0.0  # ... and are not tried before then
    tried: int = 0
    attempt: int = 0  # of the running negotiation, 0 for none
    failures: int = 0  # in a row
    worst: object = None  # the weightiest Failure of this round
    last_error: str = ""
    dns_seconds: float | None = None  # how long the last lookup kept packets waiting
    ike_seconds: float | None = None  # and the last negotiation, all gateways together
    wanted: bool = True  # by a packet or a command of this host, not only by what a stranger sent
    tunnels: list[Tunnel] = field(default_factory=list)  # newest last

    @property
    def key(self) -> Key:
        return (self.group, self.destination)

    @property
    def published(self) -> bool:
        """Whether the candidates are what the destination's own records name."""
        return all(candidate.by is Proof.RECORD for candidate in self.candidates)

    @property
    def authenticated(self) -> Authenticated | None:
        return self.tunnels[-1].authenticated if self.tunnels else None

    def move(self, state: State, reason: str, now: float) -> None:
        """The one place where a state changes. Raises MisuseError for a change that the table lacks, and for
        `private` without a tunnel."""
        if state not in TRANSITIONS[self.state]:
            raise MisuseError(f"{self.destination}: {self.state.value} never becomes {state.value}")
        if state is State.PRIVATE and not self.tunnels:
            raise MisuseError(f"{self.destination}: private without a tunnel")
        self.state = state
        self.reason = reason
        self.since = now

    def tunnel(self, spi_in: int) -> Tunnel | None:
        return next((t for t in self.tunnels if t.spi_in == spi_in), None)


def tunnel_of(pair: SaPair, now: float) -> Tunnel:
    return Tunnel(pair.spi_in, pair.spi_out, pair.authenticated, now, pair.encap)
