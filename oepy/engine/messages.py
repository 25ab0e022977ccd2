"""What goes into the engine and what comes out: frozen values."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from oepy.model import (
    AddressRange,
    Endpoint,
    Flow,
    IpAddress,
    KeyAnswer,
    PolicyGroup,
    PublicKey,
    SaCounters,
    SaPair,
    Verdict,
)

# ---------------------------------------------------------------- inputs


@dataclass(frozen=True, slots=True)
class Trapped:
    group: PolicyGroup
    flow: Flow
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    """This host has asked for a name and been told this address: a packet may be about to follow."""

    destination: IpAddress
    name: str


@dataclass(frozen=True, slots=True)
class LookupDone:
    destination: IpAddress
    answer: KeyAnswer


class Failure(enum.Enum):
    """In the order in which they weigh when several gateways failed."""

    SILENT = 1
    REJECTED = 2
    PROOF_FAILED = 3


@dataclass(frozen=True, slots=True)
class NegotiationFailed:
    destination: IpAddress
    attempt: int
    failure: Failure
    text: str


@dataclass(frozen=True, slots=True)
class TunnelUp:
    """A CHILD SA is agreed. `replaces` names the inbound SPI of the pair that it rekeys; `attempt` is that of
    `StartIke` where we initiated for a destination, else 0."""

    pair: SaPair
    initiator: bool
    attempt: int = 0
    replaces: int | None = None
    outbound: bool = True


@dataclass(frozen=True, slots=True)
class OutboundReady:
    """The peer has shown that it uses the new pair: send on it as well."""

    spi_in: int


@dataclass(frozen=True, slots=True)
class TunnelMoved:
    """The peer proved that it is now at another outer address or port (RFC 7296 §2.23)."""

    spi_in: int
    local: Endpoint
    remote: Endpoint


@dataclass(frozen=True, slots=True)
class TunnelDown:
    spi_in: int
    reason: str


@dataclass(frozen=True, slots=True)
class InstallFailed:
    """The datapath did not take the pair: it carries nothing, whatever IKE agreed upon."""

    spi_in: int
    reason: str


@dataclass(frozen=True, slots=True)
class UnknownSpi:
    """The peer sends on a SA that we have lost."""

    peer: IpAddress


@dataclass(frozen=True, slots=True)
class NoSa:
    """A packet to a private destination came from an own address that none of its tunnels covers."""

    source: IpAddress
    destination: IpAddress


@dataclass(frozen=True, slots=True)
class Counters:
    counters: Sequence[SaCounters]


@dataclass(frozen=True, slots=True)
class Initiate:
    destination: IpAddress
    group: PolicyGroup
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Terminate:
    destination: IpAddress


@dataclass(frozen=True, slots=True)
class Flush:
    """Forget decisions (not tunnels) of one destination, or of all."""

    destination: IpAddress | None = None


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The engine has new settings; those of destinations `within` these ranges, None of all."""

    within: tuple[AddressRange, ...] | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Input = (
    Trapped
    | Named
    | LookupDone
    | NegotiationFailed
    | TunnelUp
    | OutboundReady
    | TunnelMoved
    | TunnelDown
    | InstallFailed
    | UnknownSpi
    | NoSa
    | Counters
    | Initiate
    | Terminate
    | Flush
    | Reloaded
    | Tick
)

# ---------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class StartLookup:
    destination: IpAddress


class Proof(enum.Enum):
    """What a gateway has to prove."""

    RECORD = "record"  # a key that the destination's own records name
    NAME = "name"  # one that a name claims which leads to the destination (`KeyAnswer.claims`)
    CERTIFICATE = "certificate"  # that a CA vouches for it: nothing is published


@dataclass(frozen=True, slots=True)
class StartIke:
    """Negotiate with `gateway`, which must prove one of `keys` (none with `Proof.CERTIFICATE`), for traffic to
    `destination`."""

    attempt: int
    destination: IpAddress
    gateway: IpAddress
    keys: tuple[PublicKey, ...]
    source: IpAddress | None  # the trapped packet's source where it is ours to protect
    by: Proof = Proof.RECORD


@dataclass(frozen=True, slots=True)
class CancelIke:
    attempt: int


@dataclass(frozen=True, slots=True)
class Decide:
    group: PolicyGroup
    destination: IpAddress
    verdict: Verdict
    lifetime: float


@dataclass(frozen=True, slots=True)
class Forget:
    group: PolicyGroup
    destination: IpAddress


@dataclass(frozen=True, slots=True)
class Install:
    pair: SaPair
    outbound: bool


@dataclass(frozen=True, slots=True)
class Remove:
    spi_in: int


@dataclass(frozen=True, slots=True)
class CloseTunnel:
    """Tell the peer (Delete) and forget the CHILD SA; a `TunnelDown` follows."""

    spi_in: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReadCounters:
    spis: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """One line for the event log; `fields` use the names of docs/architecture.md."""

    event: str
    fields: dict[str, object] = field(default_factory=dict)
    alert: bool = False


Action = (
    StartLookup
    | StartIke
    | CancelIke
    | Decide
    | Forget
    | Install
    | Remove
    | CloseTunnel
    | ReadCounters
    | Report
)
