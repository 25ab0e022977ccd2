"""One pair of ESP SAs (RFC 4303), in tunnel or transport mode: seal what goes out, open what comes in, count
and age.

Choices where the RFCs leave one: the outer ECN field is Not-ECT and the inner one is left as it is (RFC 6040
§4.3's compatibility mode); DSCP is not copied outward; the inner TTL is the kernel's business, which has
decremented it where it forwards.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from oepy.datapath.esp import aggfrag
from oepy.datapath.esp.aggfrag import Packer, Packet, Unpacker
from oepy.datapath.esp.inner import Bytes, Selectors, inner_length
from oepy.datapath.esp.replay import ReplayWindow, infer_sequence
from oepy.datapath.esp.suites import ESP_HEADER, IntegrityError, make_transform
from oepy.datapath.esp.transport import TransportHeader
from oepy.errors import OepyError, ParseError, RemoteError
from oepy.model import Lifetime, SaCounters, SaPair

_HEADER = struct.Struct("!II")
NEXT_HEADER = {4: 4, 6: 41}  # IP version → protocol number in the trailer
_DUMMY = 59  # RFC 4303 §2.6
_PLAIN, _PLAIN_LENGTH = 0x45, 20  # an IPv4 header without options
_FULL = bytes((0, aggfrag.NEXT_HEADER))  # the trailer of an AGGFRAG payload that needs no padding
_MAX_PAD = 255
_PADDING = bytes(range(1, _MAX_PAD + 1))
# By the padding's length and the next header
_TRAILERS = [[_PADDING[:pad] + bytes((pad, number)) for number in range(256)] for pad in range(16)]
_WIRE = 1500  # bytes of an outer packet
_IPV6_UDP = 48
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
        hard_bytes = lifetime.hard_bytes or math.inf
        hard_packets = min(lifetime.hard_packets or math.inf, last)
        return cls(
            min(lifetime.soft_bytes or math.inf, hard_bytes),
            hard_bytes,
            min(lifetime.soft_packets or math.inf, int(last * _SOFT_SHARE), hard_packets),
            hard_packets,
        )

    def spend(self, count: int, packets: int = 1) -> None:
        self.packets += packets
        self.bytes += count
        if self.packets >= self.soft_packets or self.bytes >= self.soft_bytes:
            ended = self.packets >= self.hard_packets or self.bytes >= self.hard_bytes
            self.alarm = "hard-expire" if ended else "soft-expire"


class EspPair:
    """The two SAs of a `SaPair`. `now` is monotonic time in seconds, taken from the caller."""

    def __init__(self, pair: SaPair, now: float) -> None:
        """Raises OepyError where protocol, mode, suite or keys are not supported."""
        if pair.protocol != "esp":
            raise OepyError(
                f"the userland datapath does not know {pair.protocol.upper()}, only ESP",
                "use the kernel's datapath (`datapath: xfrm`), or ESP with `null` encryption",
            )
        self.pair = pair
        self.selectors = Selectors(pair.local_ts, pair.remote_ts)
        self.transport = TransportHeader.of(pair) if pair.mode == "transport" else None
        self.packer: Packer | None = None
        self._unpacker: Unpacker | None = None
        self.sending = False
        self.for_this_host = False  # whether what comes out is for our own outer address, not to be forwarded
        self._inward4 = self.selectors.inward if len(self.selectors.inward) == 8 else b""
        outward = make_transform(pair.suite, pair.keys_out, pair.spi_out)
        self.seal = outward.seal  # with numbers that were reserved
        inward = make_transform(pair.suite, pair.keys_in, pair.spi_in)
        self._open, self._open_ahead = inward.open, inward.open_ahead
        self.prefix = outward.prefix
        self._mask = outward.alignment - 1
        self._around = self.prefix + outward.icv
        if pair.aggregation:
            if self.transport is not None:
                raise OepyError("aggregation is for tunnel mode (RFC 9347)", "leave one of them out")
            self.packer = Packer(self._room(outward.alignment), pair.fragments)
            self._unpacker = Unpacker(pair.super_packets)
        self._esn = pair.suite.esn
        self._sequence = 0
        self.latest = 0  # sequence number of the datagram opened last
        self._last_sequence = (1 << 64 if self._esn else 1 << 32) - 1
        self._window = ReplayWindow(pair.replay_window)
        self.budget_out = Budget.of(pair.lifetime, self._esn)
        self.budget_in = Budget.of(pair.lifetime, self._esn)
        self._soft_at = now + (pair.lifetime.soft_seconds or math.inf)
        self._hard_at = now + (pair.lifetime.hard_seconds or math.inf)
        self._told: set[str] = set()
        self.replayed = self.integrity_failures = self.selector_mismatches = self.malformed = 0
        self.last_in = self.last_out = 0.0

    def sealed_length(self, payload: int) -> int:
        """Bytes of the ESP packet around so many bytes of payload."""
        return self._around + (payload + 2 + self._mask & ~self._mask)

    def _room(self, alignment: int) -> int:
        """Data of an AGGFRAG payload that fills a packet of _WIRE bytes over either family."""
        payload = (_WIRE - _IPV6_UDP - self._around) // alignment * alignment - 2
        return payload - aggfrag.HEADER

    def reserve(self, packets: int, length: int) -> tuple[int, int]:
        """Take sequence numbers for packets with so many bytes of payload in all: the first of them, and how
        many there are, which is fewer before a hard limit by packets; one by bytes ends the SA with the batch
        that reaches it. Raises SaEnded behind a limit."""
        budget = self.budget_out
        if not budget.alarm and self._sequence + packets <= budget.soft_packets:
            first = self._sequence + 1  # the usual case: all limits are far away
            self._sequence += packets
            budget.spend(length, packets)
            return first, packets
        left = min(self._last_sequence - self._sequence, budget.hard_packets - budget.packets)
        if budget.alarm == "hard-expire" or left < 1:
            raise SaEnded("hard limit reached")
        if left < packets:
            packets = int(left)
        first = self._sequence + 1
        self._sequence += packets
        budget.spend(length, packets)
        return first, packets

    def trailer(self, length: int, next_header: int) -> bytes:
        """What follows `length` bytes of payload: padding, its length, and the next header (RFC 4303 §2.4)."""
        return _TRAILERS[-(length + 2) & self._mask][next_header]

    def open(self, datagram: memoryview) -> bytes:
        """The plaintext, with its trailer, of a datagram that begins with our SPI and is fresh and authentic
        (RFC 4303 §3.4.3, §3.4.4).

        Raises ReplayError, IntegrityError, ParseError or SaEnded, each counted here. The replay window moves only
        once the packet has proved authentic.
        """
        if len(datagram) < ESP_HEADER:
            self.malformed += 1
            raise ParseError("ESP packet without a whole header")
        if self.budget_in.alarm == "hard-expire":
            raise SaEnded("hard limit reached")
        _, low = _HEADER.unpack_from(datagram)
        window = self._window
        sequence = infer_sequence(low, window.top, window.size) if self._esn else low
        if sequence is None or not window.check(sequence):
            self.replayed += 1
            raise ReplayError(f"sequence number {low}")
        try:
            plaintext = self._open(datagram, sequence)
        except IntegrityError:
            self.integrity_failures += 1
            raise
        window.update(sequence)
        self.latest = sequence
        return plaintext

    def open_ahead(self, data: memoryview, start: int, size: int) -> list[bytes]:
        """Plaintexts as of `open`, of all datagrams of `size` bytes from `start` on that come one after the other
        as they were sent, up to another one: the usual case, and a faster way through it."""
        if self.budget_in.alarm == "hard-expire" or not self._window.size:
            return []
        opened = self._open_ahead(data, start, size, self._window.top)
        if opened:
            self._window.advance(len(opened))
            self.latest = self._window.top
        return opened

    def packet(self, plaintext: bytes, now: float) -> bytes | None:
        """The IP packet in an authentic plaintext; None for a dummy packet.

        Raises ParseError, SelectorError or SaEnded, each counted here.
        """
        budget = self.budget_in
        if budget.alarm == "hard-expire":
            raise SaEnded("hard limit reached")
        try:
            end, next_header = _strip(plaintext)
            if next_header == _DUMMY:
                return None
            if self.transport is None:
                plain = next_header == 4 and end >= _PLAIN_LENGTH and plaintext[0] == _PLAIN
                if not plain or plaintext[2] << 8 | plaintext[3] != end:
                    end = inner_length(plaintext, next_header, end)
                packet = plaintext[:end]
            else:
                packet = self.transport.rebuild(plaintext, next_header, end)
        except ParseError:
            self.malformed += 1
            raise
        if (next_header != 4 or packet[12:20] != self._inward4) and not self.selectors.allow_inward(packet):
            self.selector_mismatches += 1
            raise SelectorError("inbound packet outside of the selectors")
        budget.spend(end)
        self.last_in = now
        return packet

    def packets(self, plaintext: bytes, sequence: int, now: float) -> Sequence[Packet]:
        """The IP packets that are complete with this authentic AGGFRAG payload; each to be asked for with
        `permits`. Raises as `packet` does, but for SelectorError."""
        assert self._unpacker is not None
        if self.budget_in.alarm == "hard-expire":
            raise SaEnded("hard limit reached")
        try:
            if plaintext[-2:] == _FULL:
                end = len(plaintext) - 2
            else:
                end, next_header = _strip(plaintext)
                if next_header == _DUMMY:
                    return ()
                if next_header != aggfrag.NEXT_HEADER:
                    raise ParseError(f"next header {next_header} where AGGFRAG payloads were agreed on")
            packets = self._unpacker.add(memoryview(plaintext)[:end], sequence)
        except ParseError:
            self.malformed += 1
            raise
        self.budget_in.spend(end)
        self.last_in = now
        return packets

    def permits(self, packet: Bytes) -> bool:
        """Whether this SA may carry this inbound packet, of which at least the IP header is there."""
        if self.selectors.allow_inward(packet):
            return True
        self.selector_mismatches += 1
        return False

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


def _strip(plaintext: bytes) -> tuple[int, int]:
    """Check trailer and padding (RFC 4303 §2.4): where the payload ends, and the next header."""
    if len(plaintext) < 2:
        raise ParseError("ESP payload without trailer")
    pad, next_header = plaintext[-2], plaintext[-1]
    end = len(plaintext) - 2 - pad
    if end < 0:
        raise ParseError("ESP padding is longer than the payload")
    if pad and plaintext[end:-2] != _PADDING[:pad]:
        raise ParseError("ESP padding is not 1, 2, 3 …")
    return end, next_header
