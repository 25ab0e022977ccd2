"""One pair of ESP SAs in tunnel mode (RFC 4303): seal what goes out, open what comes in, count and age.

Choices where the RFCs leave one: the outer ECN field is Not-ECT and the inner one is left as it is (RFC 6040
§4.3's compatibility mode); DSCP is not copied outward; the inner TTL is the kernel's business, which has
decremented it where it forwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from oepy.datapath.esp.inner import Selectors, inner_length
from oepy.datapath.esp.replay import ReplayWindow, infer_sequence
from oepy.datapath.esp.suites import IntegrityError, make_transform
from oepy.errors import OepyError, ParseError, RemoteError
from oepy.model import Lifetime, SaCounters, SaPair

_HEADER = 8
_NEXT_HEADER = {4: 4, 6: 41}  # IP version → protocol number in the trailer
_DUMMY = 59  # RFC 4303 §2.6
_MAX_PAD = 255
_PADDING = bytes(range(1, _MAX_PAD + 1))
_TRAILERS = {
    (version, pad): _PADDING[:pad] + bytes((pad, protocol))
    for version, protocol in _NEXT_HEADER.items()
    for pad in range(16)
}
_SOFT_SHARE = 0.875  # of the sequence space, for a rekey before it is used up


class ReplayError(RemoteError):
    """A sequence number seen before, or below the window."""


class SelectorError(RemoteError):
    """An authentic packet that this SA must not carry (RFC 4301 §5.2)."""


class SaEnded(RemoteError):
    """A hard limit is reached or the sequence numbers are used up: nothing goes through any more."""


@dataclass(slots=True)
class Budget:
    """Soft and hard limits of one direction; `alarm` is "", "soft-expire" or "hard-expire"."""

    soft_bytes: float
    hard_bytes: float
    soft_packets: float
    hard_packets: float
    bytes: int = 0
    packets: int = 0
    alarm: str = ""

    @classmethod
    def of(cls, lifetime: Lifetime, esn: bool) -> Budget:
        last = (1 << 64 if esn else 1 << 32) - 1
        return cls(
            lifetime.soft_bytes or math.inf,
            lifetime.hard_bytes or math.inf,
            min(lifetime.soft_packets or math.inf, int(last * _SOFT_SHARE)),
            min(lifetime.hard_packets or math.inf, last),
        )

    def spend(self, count: int) -> None:
        self.packets += 1
        self.bytes += count
        if self.packets >= self.soft_packets or self.bytes >= self.soft_bytes:
            ended = self.packets >= self.hard_packets or self.bytes >= self.hard_bytes
            self.alarm = "hard-expire" if ended else "soft-expire"


class EspPair:
    """The two SAs of a `SaPair`. `now` is monotonic time in seconds, taken from the caller."""

    def __init__(self, pair: SaPair, now: float) -> None:
        """Raises OepyError where mode, suite or keys are not supported."""
        if pair.mode != "tunnel" or pair.protocol != "esp":
            raise OepyError(
                f"the userland datapath knows ESP in tunnel mode, not {pair.protocol} {pair.mode}"
            )
        self.pair = pair
        self.selectors = Selectors(pair.local_ts, pair.remote_ts)
        self.sending = False
        self._outward = make_transform(pair.suite, pair.keys_out)
        self._inward = make_transform(pair.suite, pair.keys_in)
        self._spi_out = pair.spi_out.to_bytes(4, "big")
        self._esn = pair.suite.esn
        self._sequence = 0
        self._last_sequence = (1 << 64 if self._esn else 1 << 32) - 1
        self._window = ReplayWindow(pair.replay_window)
        self.budget_out = Budget.of(pair.lifetime, self._esn)
        self.budget_in = Budget.of(pair.lifetime, self._esn)
        self._soft_at = now + (pair.lifetime.soft_seconds or math.inf)
        self._hard_at = now + (pair.lifetime.hard_seconds or math.inf)
        self._told: set[str] = set()
        self.replayed = self.integrity_failures = self.selector_mismatches = self.malformed = 0
        self.last_in = self.last_out = 0.0

    def seal(self, packet: bytes, now: float) -> bytes:
        """An ESP packet for this whole IP packet. Raises SelectorError, or SaEnded at a hard limit."""
        if self.budget_out.alarm == "hard-expire" or self._sequence >= self._last_sequence:
            raise SaEnded("hard limit reached")
        if not self.selectors.allow_outward(packet):
            self.selector_mismatches += 1
            raise SelectorError("outbound packet outside of the selectors")
        self._sequence = sequence = self._sequence + 1
        pad = -(len(packet) + 2) % self._outward.alignment
        header = self._spi_out + (sequence & 0xFFFFFFFF).to_bytes(4, "big")
        body = self._outward.seal(header, sequence, packet + _TRAILERS[packet[0] >> 4, pad])
        self.budget_out.spend(len(packet))
        self.last_out = now
        return header + body

    def open(self, datagram: memoryview, now: float) -> bytes | None:
        """The IP packet inside; None for a dummy packet. `datagram` begins with our SPI.

        Raises ReplayError, IntegrityError, ParseError, SelectorError or SaEnded, each counted here. The
        replay window moves only once the packet has proved authentic.
        """
        if len(datagram) < _HEADER:
            self.malformed += 1
            raise ParseError("ESP packet without a whole header")
        if self.budget_in.alarm == "hard-expire":
            raise SaEnded("hard limit reached")
        header = bytes(datagram[:_HEADER])
        low = int.from_bytes(header[4:], "big")
        sequence = infer_sequence(low, self._window.top, self._window.size) if self._esn else low
        if sequence is None or not self._window.check(sequence):
            self.replayed += 1
            raise ReplayError(f"sequence number {low}")
        try:
            plaintext = self._inward.open(header, sequence, datagram[_HEADER:])
        except IntegrityError:
            self.integrity_failures += 1
            raise
        self._window.update(sequence)
        try:
            packet = _strip(plaintext)
        except ParseError:
            self.malformed += 1
            raise
        if packet is None:
            return None
        if not self.selectors.allow_inward(packet):
            self.selector_mismatches += 1
            raise SelectorError("inbound packet outside of the selectors")
        self.budget_in.spend(len(packet))
        self.last_in = now
        return packet

    def new_alarms(self, now: float) -> list[str]:
        """`soft-expire` and `hard-expire`, each once, when the first of their limits is reached."""
        reached = {self.budget_in.alarm, self.budget_out.alarm}
        if now >= self._soft_at:
            reached.add("soft-expire")
        if now >= self._hard_at:
            reached.add("hard-expire")
        fresh = sorted(reached - self._told - {""}, reverse=True)
        self._told.update(fresh)
        return fresh

    @property
    def alarmed(self) -> bool:
        """Whether `new_alarms` may have something by bytes or packets (cheap: asked for every packet)."""
        return self.budget_out.alarm != "" or self.budget_in.alarm != ""

    def counters(self) -> SaCounters:
        return SaCounters(
            spi_in=self.pair.spi_in,
            bytes_in=self.budget_in.bytes,
            bytes_out=self.budget_out.bytes,
            packets_in=self.budget_in.packets,
            packets_out=self.budget_out.packets,
            replayed=self.replayed,
            integrity_failures=self.integrity_failures,
            selector_mismatches=self.selector_mismatches,
            last_in=self.last_in,
            last_out=self.last_out,
        )


def _strip(plaintext: bytes) -> bytes | None:
    """Check and remove trailer, padding (RFC 4303 §2.4) and TFC padding; None for a dummy packet."""
    if len(plaintext) < 2:
        raise ParseError("ESP payload without trailer")
    pad, next_header = plaintext[-2], plaintext[-1]
    end = len(plaintext) - 2 - pad
    if end < 0:
        raise ParseError("ESP padding is longer than the payload")
    if plaintext[end:-2] != _PADDING[:pad]:
        raise ParseError("ESP padding is not 1, 2, 3 …")
    if next_header == _DUMMY:
        return None
    payload = memoryview(plaintext)[:end]
    return bytes(payload[: inner_length(payload, next_header)])
