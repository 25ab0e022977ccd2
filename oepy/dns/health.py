"""Which resolver is asked first. Pure: times are seconds on one clock, given by the caller.

A resolver that leaves a question unanswered may only be busy with a slow zone. So it is not called down at once but
*suspect*: others are asked before it until a probe (a question that every resolver has the answer to) tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from oepy.resolvers import ResolverState

FIRST_RETRY = 1.0
LAST_RETRY = 60.0
_WEIGHT = 0.125  # of a new round trip in the smoothed one, as in RFC 6298 §2


@dataclass(slots=True)
class Health:
    """What is known of one resolver."""

    resolver: str
    questions: int = 0
    replies: int = 0
    round_trip: float | None = None
    reason: str = ""
    _last_reply: float = -math.inf
    _bad_since: float | None = None
    _probed: bool = False  # since it went bad, in vain
    _retry: float = 0.0  # the gap before the probe that comes next
    next_probe: float = -math.inf

    @property
    def is_good(self) -> bool:
        return self._bad_since is None

    def replied(self, now: float, seconds: float) -> None:
        """A useful reply, `seconds` after its question."""
        self.replies += 1
        self._last_reply = now
        old = self.round_trip
        self.round_trip = seconds if old is None else old + _WEIGHT * (seconds - old)
        self._bad_since, self._probed, self._retry, self.reason = None, False, 0.0, ""

    def was_silent(self, now: float, asked: float) -> None:
        """No reply to a question of the time `asked`. It says nothing where others have been answered since."""
        if self._last_reply < asked:
            self.failed(now, "no answer")

    def failed(self, now: float, reason: str) -> None:
        """It does not serve us as it should."""
        self.reason = reason
        if self._bad_since is None:
            self._bad_since = self.next_probe = now

    def probe_failed(self, now: float, reason: str) -> None:
        """Each next probe comes twice as late."""
        self.failed(now, reason)
        self._probed = True
        self._retry = min(max(2 * self._retry, FIRST_RETRY), LAST_RETRY)
        self.next_probe = now + self._retry

    def wants_probe(self, now: float) -> bool:
        return self._bad_since is not None and now >= self.next_probe

    def state(self, now: float) -> ResolverState:
        if self._bad_since is not None:
            word = "down" if self._probed else "suspect"
        else:
            word = "up" if self.replies else "unknown"
        return ResolverState(
            self.resolver,
            word,
            None if self.round_trip is None else round(self.round_trip * 1000, 3),
            self.questions,
            self.replies,
            self.reason,
            0.0 if self._bad_since is None else round(now - self._bad_since, 3),
        )
