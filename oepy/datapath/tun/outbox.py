"""Outgoing ESP packets of one turn, gathered by peer: one system call for up to 64 KiB of them.

The kernel cuts what it is given into datagrams of one size, of which only the last may be shorter (UDP_SEGMENT).
So a batch ends with a shorter packet, or before a longer one. The packets of one peer never change their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from oepy.datapath.tun.seams import OuterSocket, Route

MAX_BATCHES = 64  # peers at a time
MAX_PACKETS = 64  # UDP_MAX_SEGMENTS of linux/udp.h, as it was at first
MAX_BYTES = 65_535 - 8 - 40  # of UDP's payload, over either family


class Batch:
    """Packets for one route, one behind the other. The next one is made at `used`, in `view`."""

    __slots__ = ("count", "route", "segment", "used", "view")

    def __init__(self) -> None:
        self.view = memoryview(bytearray(MAX_BYTES))
        self.route: Route | None = None
        self.used = self.count = self.segment = 0


class Outbox:
    """`counters` gets `send_failed`."""

    def __init__(self, outers: Mapping[int, OuterSocket], counters: Counter[str]) -> None:
        self._outers = outers
        self._counters = counters
        self._open: dict[Route, Batch] = {}
        self._spare: list[Batch] = []

    def batch_for(self, route: Route, length: int, wanted: int = 1) -> tuple[Batch, int]:
        """Where ESP packets of `length` bytes for this route are to be made, and how many of those `wanted` fit:
        one behind the other from `used` on. Make all of them, and tell by `added`."""
        batch = self._open.get(route)
        if batch is None:
            if len(self._open) >= MAX_BATCHES:
                self.flush()
            batch = self._spare.pop() if self._spare else Batch()
            batch.route = route
            self._open[route] = batch
        elif batch.count and (length > batch.segment or batch.used + length > MAX_BYTES):
            self._send(batch)
        if wanted == 1 or length < batch.segment:
            return batch, 1
        return batch, min(wanted, MAX_PACKETS - batch.count, (MAX_BYTES - batch.used) // length)

    def added(self, batch: Batch, length: int, count: int = 1) -> None:
        """So many packets of this length were made."""
        batch.used += count * length
        batch.count += count
        if not batch.segment:
            batch.segment = length
        if length < batch.segment or batch.count >= MAX_PACKETS:
            self._send(batch)

    def flush(self) -> None:
        """Send everything."""
        if self._open:
            batches = list(self._open.values())
            self._open.clear()
            for batch in batches:
                self._send(batch)
                batch.route = None
            self._spare += batches

    def _send(self, batch: Batch) -> None:
        if batch.count:
            route = batch.route
            assert route is not None
            lost = self._outers[route.version].send(batch.view[: batch.used], route, batch.segment)
            if lost:
                self._counters["send_failed"] += lost
            batch.used = batch.count = batch.segment = 0
