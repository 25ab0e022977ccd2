"""The message window of size 1 (RFC 7296 §2.1–2.3): our request with its retransmissions, and the cached
response to the peer's last request.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from oepy.ike.settings import Retransmission

MAX_MESSAGE_ID = 0xFFFFFFFF


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


@dataclass(slots=True)
class Outstanding:
    """A request of ours that waits for its response. Times are the caller's."""

    message_id: int
    exchange: int
    datagrams: list[bytes]
    schedule: Retransmission
    pause: float
    next_at: float
    give_up_at: float

    def due(self, now: float) -> bool:
        return now >= min(self.next_at, self.give_up_at)

    def exhausted(self, now: float) -> bool:
        return now >= self.give_up_at

    def sent_again(self, now: float) -> None:
        self.pause *= self.schedule.factor
        self.next_at = now + self.pause


class Window:
    __slots__ = ("_answered", "_response", "next_own", "next_peer", "outstanding")

    def __init__(self) -> None:
        self.next_own = 0
        self.next_peer = 0
        self.outstanding: Outstanding | None = None
        self._answered: bytes = b""  # digest of the last request's first datagram
        self._response: list[bytes] = []

    def request(self, exchange: int, datagrams: list[bytes], schedule: Retransmission, now: float) -> None:
        self.outstanding = Outstanding(
            self.next_own,
            exchange,
            datagrams,
            schedule,
            schedule.first,
            now + schedule.first,
            now + schedule.total,
        )

    def answered(self) -> None:
        """Our outstanding request has its response."""
        self.outstanding = None
        self.next_own += 1

    def respond(self, request_digest: bytes, datagrams: list[bytes]) -> None:
        self._answered = request_digest
        self._response = datagrams
        self.next_peer += 1

    def cached(self, message_id: int, request: bytes) -> list[bytes] | None:
        """The datagrams to send again, if `request` is bit for bit the last one that we answered."""
        if message_id == self.next_peer - 1 and self._response and digest(request) == self._answered:
            return self._response
        return None
