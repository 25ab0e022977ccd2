"""The seams between the rooms: what the daemon may ask of each, on one page."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from oepy.model import (
    AddressRange,
    Flow,
    IpAddress,
    IpNetwork,
    KeyAnswer,
    Mark,
    PolicyGroup,
    SaCounters,
    SaPair,
    Verdict,
)
from oepy.resolvers import ResolverState


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """One line of a policy group. `protocol` 0 means any; `port` 0 means any destination port."""

    group: PolicyGroup
    network: IpNetwork
    protocol: int = 0
    port: int = 0


class Way(enum.Enum):
    OUT = "out"  # leaves this host; of forwarded packets as well
    IN = "in"  # has come for this host, in the clear
    FORWARD = "forward"  # has come in the clear and is for others


@dataclass(frozen=True, slots=True)
class ConfiguredRule:
    """Traffic that the configuration settles before any group is asked: manual policies, connections. Of the rules
    that match, that of the lowest `rank` counts, and among equals the first. Protocol and ports 0 mean any; with a
    `mark` it is packets that have it.

    A rule with a `number` belongs to a connection's child: outward, what `Trap.join` has put there goes into the
    tunnel; of the rest, `required` is held and asked for, and what isn't is the next rule's. Inward such traffic is
    dropped: all of it where it is `required`, else that of joined addresses.

    `transport`: its SAs are in transport mode, so that the kernel's own (TrapPolicy.kernel_ipsec) protect it on the
    way to its destination and not behind the tunnel's device.

    `verdict`: outward PRIVATE goes into the tunnel; CLEAR passes and BLOCK is dropped, either way. `required` rules
    keep their traffic shut while no daemon runs.
    """

    way: Way
    source: IpNetwork
    destination: IpNetwork
    verdict: Verdict
    protocol: int = 0
    source_port: int = 0
    destination_port: int = 0
    required: bool = False
    number: int = 0
    transport: bool = False
    mark: Mark | None = None
    rank: tuple[Any, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class TrapPolicy:
    """All that the trap must know to catch and to exempt. Everything here is static until `reload`."""

    rules: tuple[PolicyRule, ...]
    default: PolicyGroup
    resolvers: tuple[IpAddress, ...]  # DNS to these (ports 53 and 853, UDP and TCP) passes untouched
    ike_ports: tuple[int, ...] = (500, 4500)
    forward: bool = True  # trap forwarded packets as well
    tunnel_device: str | None = "oe0"  # packets arriving from here are already decrypted; None: no device
    kernel_ipsec: bool = False  # the kernel's own SAs protect, and not a process behind the device
    clamp_mtu: int = 0  # TCP through the tunnel is told to fit into this; 0: the datapath tells it
    # In no order. Where a rule is the same as before, so is the object: `reload` looks at the others alone
    configured: tuple[ConfiguredRule, ...] = ()


class Trap(Protocol):
    """Catches first packets and holds them until a verdict."""

    def start(self, policy: TrapPolicy, on_trapped: Callable[[PolicyGroup, Flow], None]) -> None:
        """Install rules and begin; `on_trapped` is called once for each (group, destination) that begins to
        be held, not once a packet. Removes leftovers of an earlier run first, without a moment in which a
        fail-closed prefix is open. Raises OepyError with the mend."""

    def decide(
        self, group: PolicyGroup, destination: IpAddress, verdict: Verdict, lifetime: float | None
    ) -> None:
        """Enter the destination into the set of the verdict and release or drop its held packets.
        `lifetime` in seconds, None for unlimited. A later call replaces an earlier one."""

    def ask_for(self, on_asked: Callable[[int, Flow], None]) -> None:
        """Before `start`: whom to tell that packets of a rule with a number begin to be held, once for each
        destination."""

    def join(self, number: int, gone: Collection[AddressRange], fresh: Collection[AddressRange]) -> None:
        """From now on the addresses in `fresh` (first, last) go into the tunnel of the rules with this number, and
        what is held for them too; those in `gone` no longer do, where no other of its ranges holds them."""

    def refuse(self, number: int) -> None:
        """What is held for the rules with this number is dropped; the next packet asks again."""

    def commit(self) -> None:
        """Decisions so far are in the kernel when this returns: a peer may hear of them now."""

    def forget(self, destinations: Iterable[tuple[PolicyGroup, IpAddress]]) -> None:
        """Back to "ask": the next packet is trapped again."""

    def pass_by(self, source: IpAddress, lifetime: float) -> bool:
        """What comes from this host behind us is not ours to protect, for `lifetime` seconds: it is no question and
        goes into no tunnel. In the clear, where its destination's group is not `private`; else it is dropped. What
        is held of it goes the same way; where other packets of its destination are held, they are asked about
        anew. False where this trap sorts by destinations alone."""

    def held(self) -> Mapping[tuple[PolicyGroup | int, IpAddress], int]:
        """Held packets by destination; of a connection's child by its number."""

    def statistics(self) -> Mapping[str, int]: ...

    def reload(self, policy: TrapPolicy) -> None: ...

    def stop(self, *, guard: bool) -> None:
        """Remove everything that was made. `guard` leaves behind the one table that drops traffic to and from
        `private` and `block` prefixes while no daemon is there."""


class KeySource(Protocol):
    """Which keys does this peer publish?"""

    async def peer_keys(self, subject: IpAddress | str, names: Sequence[str] = ()) -> KeyAnswer:
        """By address (reverse name) or FQDN; `names` are some that may lead to the address, whose keys come back
        as `claims`. Bounded in time; never raises for what DNS does."""

    async def doubts(self, name: str, address: IpAddress) -> str:
        """Why it is not certain that the name leads to the address; "" where it is, by a secure A or AAAA record.
        Bounded in time; never raises for what DNS does."""

    def forget(self, subject: IpAddress | str | None) -> None:
        """Drop what is cached of this peer's records, or (None) everything, validated zone keys included."""

    def resolver_states(self) -> Sequence[ResolverState]:
        """How the resolvers do, in the order of the configuration. Inside the event loop only."""


@dataclass(frozen=True, slots=True)
class DatapathEvent:
    """`kind`: soft-expire, hard-expire, unknown-spi, selector-mismatch, no-sa, failed. `spi` is our inbound SPI.
    no-sa: a marked packet from `source` to `peer` that no SA covers was dropped."""

    kind: str
    spi: int = 0
    peer: IpAddress | None = None
    detail: str = ""
    source: IpAddress | None = None


class HostAddresses(Protocol):
    """Addresses that peers gave this host, and the routes that make them the source of what goes there."""

    async def apply(self, addresses: Collection[IpAddress], routes: Mapping[IpNetwork, IpAddress]) -> None:
        """These, and no others. Raises OepyError."""


class Datapath(Protocol):
    """SAs and policies, in the kernel or in userland."""

    waits: bool
    """Whether `install` and `remove` have to wait for somebody. Where they don't, they are no task of their own."""

    async def start(self, on_event: Callable[[DatapathEvent], None]) -> None: ...

    def allocate_spi(self) -> int:
        """An inbound SPI (>= 256) that no live SA has."""

    async def install(self, pair: SaPair, *, outbound: bool = True) -> None:
        """Install both SAs. With `outbound` False only receive on it: in a rekey the responder sends on the
        new SA only when the initiator has shown that it has it. A second call with True switches."""

    async def remove(self, spi_in: int) -> None: ...

    async def counters(self, spis: Collection[int] | None = None) -> Sequence[SaCounters]: ...

    async def statistics(self) -> Mapping[str, int]:
        """Counters that belong to no SA: unknown SPIs, malformed packets …"""

    async def stop(self) -> None: ...


__all__ = [
    "ConfiguredRule",
    "Datapath",
    "DatapathEvent",
    "HostAddresses",
    "KeySource",
    "PolicyRule",
    "Trap",
    "TrapPolicy",
    "Way",
]
