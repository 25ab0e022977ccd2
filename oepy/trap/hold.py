"""Which packets are held, for whom, and which one has to go when there are too many. No IO.

Of each destination the first packets and the last one are kept (RFC 4322 asks for the first and the last):
a burst loses its middle, so that the flow's opening and its newest retransmission both survive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from oepy.model import Flow, IpAddress, PolicyGroup

MAX_PACKETS_PER_DESTINATION = 64
MAX_BYTES_PER_DESTINATION = 512 * 1024
MAX_PACKETS = 4096
MAX_BYTES = 32 << 20
HOLD_SECONDS = 60.0  # an engine that never decides must not keep packets in the kernel for ever

Destination = tuple[PolicyGroup | int, IpAddress]  # a group, or the number of a connection's child


@dataclass(frozen=True, slots=True)
class HeldPacket:
    """`id` and `queue` name it in the kernel; `mark` is the one it was queued with."""

    queue: int
    id: int
    mark: int
    length: int
    flow: Flow


@dataclass(slots=True)
class _Waiting:
    since: float
    packets: list[HeldPacket] = field(default_factory=list)
    bytes: int = 0


class Hold:
    """`packets` and `bytes` are the totals held now."""

    def __init__(self) -> None:
        self._waiting: dict[Destination, _Waiting] = {}
        self.packets = 0
        self.bytes = 0

    def __contains__(self, destination: Destination) -> bool:
        return destination in self._waiting

    def add(self, destination: Destination, packet: HeldPacket, now: float) -> tuple[bool, list[HeldPacket]]:
        """Hold a packet. Returns whether its destination is new here, and the packets to drop instead."""
        waiting = self._waiting.get(destination)
        new = waiting is None
        if waiting is None:
            # insertion order is age: `expire` relies on it
            waiting = self._waiting[destination] = _Waiting(now)
        waiting.packets.append(packet)
        waiting.bytes += packet.length
        self.packets += 1
        self.bytes += packet.length
        dropped = []
        while self._too_much(waiting) and len(waiting.packets) > 1:
            # the middle: the packet before the newest, but never the very first
            index = -2 if len(waiting.packets) > 2 else -1
            victim = waiting.packets.pop(index)
            self._subtract(waiting, victim)
            dropped.append(victim)
        if new and self._too_much(waiting):  # full of others' packets
            self._subtract(waiting, packet)
            del self._waiting[destination]
            return False, [packet]
        return new, dropped

    def _too_much(self, waiting: _Waiting) -> bool:
        return (
            len(waiting.packets) > MAX_PACKETS_PER_DESTINATION
            or waiting.bytes > MAX_BYTES_PER_DESTINATION
            or self.packets > MAX_PACKETS
            or self.bytes > MAX_BYTES
        )

    def _subtract(self, waiting: _Waiting, packet: HeldPacket) -> None:
        waiting.bytes -= packet.length
        self.packets -= 1
        self.bytes -= packet.length

    def release(self, destination: Destination) -> list[HeldPacket]:
        """All packets of a destination in their order; it is no longer held."""
        waiting = self._waiting.pop(destination, None)
        if waiting is None:
            return []
        self.packets -= len(waiting.packets)
        self.bytes -= waiting.bytes
        return waiting.packets

    def take_from(self, source: IpAddress) -> Iterator[tuple[PolicyGroup, list[HeldPacket], Flow | None]]:
        """Of each destination for which packets from `source` are held: its group, these packets, which are no
        longer held, and the flow of the first one that stays."""
        for destination, waiting in list(self._waiting.items()):
            if isinstance(destination[0], int):
                continue  # the configuration's, whoever sends it
            taken = [packet for packet in waiting.packets if packet.flow.source == source]
            if not taken:
                continue
            waiting.packets = [packet for packet in waiting.packets if packet.flow.source != source]
            for packet in taken:
                self._subtract(waiting, packet)
            if not waiting.packets:
                del self._waiting[destination]
            yield destination[0], taken, waiting.packets[0].flow if waiting.packets else None

    def expire(self, now: float) -> list[HeldPacket]:
        """What has waited for longer than HOLD_SECONDS: to be dropped."""
        overdue = []
        for destination, waiting in list(self._waiting.items()):
            if now - waiting.since < HOLD_SECONDS:
                break
            overdue += self.release(destination)
        return overdue

    def counts(self) -> dict[Destination, int]:
        return {destination: len(waiting.packets) for destination, waiting in self._waiting.items()}

    def of_number(self, number: int) -> list[Destination]:
        return [destination for destination in self._waiting if destination[0] == number]

    def destinations(self) -> list[Destination]:
        return list(self._waiting)
