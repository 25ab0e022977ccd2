"""Packets for which no SA is there yet: kept for a moment, as the daemon is asked for one. They leave by an SA or
not at all; bounded in time, in number and in bytes, in all and for each pair of addresses."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from oepy.datapath.esp.offload import Offload

LIFE = 10.0  # seconds; a negotiation over a bad line takes a few
MAX_PACKETS = 1024
MAX_BYTES = 2 * 1024 * 1024
MAX_OF_ONE = 32  # packets of one pair of addresses

Ends = bytes
"""Source and destination as they stand in the packet."""


@dataclass(slots=True)
class Waiting:
    """In their order."""

    _queues: dict[Ends, deque[tuple[float, bytes, Offload]]] = field(default_factory=dict)
    _packets: int = 0
    _bytes: int = 0

    def __len__(self) -> int:
        return self._packets

    def hold(self, ends: Ends, packet: bytes, offload: Offload, now: float) -> None:
        queue = self._queues.get(ends)
        full = self._packets >= MAX_PACKETS or self._bytes + len(packet) > MAX_BYTES
        if full or (queue is not None and len(queue) >= MAX_OF_ONE):
            return
        if queue is None:
            queue = self._queues[ends] = deque()
        queue.append((now + LIFE, packet, offload))
        self._packets += 1
        self._bytes += len(packet)

    def ends(self) -> list[Ends]:
        return list(self._queues)

    def first(self, ends: Ends) -> bytes:
        return self._queues[ends][0][1]

    def release(self, ends: Ends) -> Iterator[tuple[bytes, Offload]]:
        for _, packet, offload in self._queues.pop(ends, ()):
            self._packets -= 1
            self._bytes -= len(packet)
            yield packet, offload

    def expire(self, now: float) -> None:
        for ends in self.ends():
            queue = self._queues[ends]
            while queue and queue[0][0] <= now:
                self._bytes -= len(queue.popleft()[1])
                self._packets -= 1
            if not queue:
                del self._queues[ends]
