"""Outgoing ESP packets of one turn, gathered by peer: one system call for up to 64 KiB of them.

Payloads are laid where their packets are sent from, and sealed there in runs of one SA and one length. The kernel
cuts what it is given into datagrams of one size, of which only the last may be shorter (UDP_SEGMENT). So a batch
ends with a shorter packet, or before a longer one. The packets of one peer never change their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from oepy.datapath.esp.sa import EspPair, SaEnded
from oepy.datapath.tun.seams import OuterSocket, Route

MAX_BATCHES = 64  # peers at a time
MAX_PACKETS = 64  # UDP_MAX_SEGMENTS of linux/udp.h, as it was at first
MAX_BYTES = 65_535 - 8 - 40  # of UDP's payload, over either family


class Batch:
    """Packets for one route, one behind the other; the next one goes to `used`, in `view`. The last ones of them,
    `run_count` packets of `run_length` for `run_pair`, are not sealed yet."""

    __slots__ = (
        *("count", "route", "segment", "used", "view"),
        *("run_bytes", "run_count", "run_length", "run_pair"),
    )

    def __init__(self) -> None:
        self.view = memoryview(bytearray(MAX_BYTES))
        self.route: Route | None = None
        self.used = self.count = self.segment = 0
        self.run_pair: EspPair | None = None
        self.run_bytes = self.run_count = self.run_length = 0


class Outbox:
    """`counters` gets `send_failed` and `sa_ended`; `on_alarm` is told of pairs that have reached a limit."""

    def __init__(
        self,
        outers: Mapping[int, OuterSocket],
        counters: Counter[str],
        on_alarm: Callable[[EspPair], None],
    ) -> None:
        self._outers = outers
        self._counters = counters
        self._on_alarm = on_alarm
        self._open: dict[Route, Batch] = {}
        self._spare: list[Batch] = []

    def place(self, pair: EspPair, route: Route, length: int, wanted: int = 1) -> tuple[Batch, int]:
        """Where packets of `length` bytes are to be laid, and how many of those `wanted` fit: one behind the other
        from `used` on, each with `pair.prefix` bytes free before its payload, then the trailer, and room for the
        ICV. Lay all of them, and tell by `laid`."""
        batch = self._open.get(route)
        if batch is None:
            if len(self._open) >= MAX_BATCHES:
                self.flush()
            batch = self._spare.pop() if self._spare else Batch()
            batch.route = route
            self._open[route] = batch
        elif batch.count and (length > batch.segment or batch.used + length > MAX_BYTES):
            self._send(batch)
        if batch.run_pair is not pair or batch.run_length != length:
            self._seal(batch)
            batch.run_pair, batch.run_length = pair, length
        if wanted == 1 or length < batch.segment:
            return batch, 1
        return batch, min(wanted, MAX_PACKETS - batch.count, (MAX_BYTES - batch.used) // length)

    def laid(self, batch: Batch, payload: int, count: int = 1) -> None:
        """So many packets, with `payload` bytes in all, are in their places."""
        length = batch.run_length
        batch.used += count * length
        batch.count += count
        batch.run_count += count
        batch.run_bytes += payload
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

    def _seal(self, batch: Batch) -> None:
        """The run so far. Behind a hard limit its packets are taken out again."""
        pair, wanted, length = batch.run_pair, batch.run_count, batch.run_length
        batch.run_pair = None
        if pair is None or not wanted:
            return
        start = batch.used - wanted * length
        try:
            sequence, count = pair.reserve(wanted, batch.run_bytes)
        except SaEnded:
            sequence = count = 0
        batch.run_count = batch.run_bytes = 0
        if count < wanted:
            self._counters["sa_ended"] += wanted - count
            batch.used -= (wanted - count) * length
            batch.count -= wanted - count
        pair.seal(batch.view, start, length, sequence, count)
        if pair.budget_out.alarm:
            self._on_alarm(pair)

    def _send(self, batch: Batch) -> None:
        self._seal(batch)
        if batch.count:
            route = batch.route
            assert route is not None
            lost = self._outers[route.version].send(batch.view[: batch.used], route, batch.segment)
            if lost:
                self._counters["send_failed"] += lost
        batch.used = batch.count = batch.segment = 0
