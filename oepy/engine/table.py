"""The decision table: what becomes of a destination, for each policy group and each thing that can happen.

Theory of operation. A destination is an entry (policy group, peer address), made by its first trapped packet:

    new ──▶ lookup ──▶ negotiating ──▶ private
              │             │             │ Delete, expiry, silence: the trap is put back, then `new` again
              └─────────────┴──▶ clear | blocked   each with a life; at its end the next packet asks again

`OUTCOMES` holds every end of a lookup or a negotiation. No other place opens or closes a destination: where
the table has no row, the entry is blocked (fail closed). Facts: RFC 4322 §3.2 and §4.2.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from oepy.model import PolicyGroup, Verdict

MAX_ENTRIES = 300_000  # destinations known at once
MAX_GATEWAYS = 8  # tried for one destination
HELD_LIMIT = 30.0  # seconds: no destination stays undecided longer
IDLE_FIRST_CHECK = 60.0  # seconds after a tunnel is up (RFC 4322 §3.4, aging)
IDLE_NEXT_CHECK = 1200.0
IDLE_RECENT = 30.0  # used within this many seconds: kept
PRIVATE_REFRESH = 60.0  # the kernel's element for a private destination is renewed this often ...
PRIVATE_ELEMENT_LIFE = 150.0  # ... and lives this long, so that a dead daemon's elements go away
CLAIM_REFUSED = 3600.0  # seconds for which a claimed key that could not be proven is not tried again
UNKNOWN_SPI_INTERVAL = 10.0  # seconds between two negotiations caused by unknown SPIs of one peer
LONGEST_LIFE = 86_400.0
SHORTEST_LIFE = 5.0


class State(enum.Enum):
    NEW = "new"
    LOOKUP = "lookup"
    NEGOTIATING = "negotiating"
    PRIVATE = "private"
    CLEAR = "clear"
    BLOCKED = "blocked"


class Cause(enum.Enum):
    """Why a lookup or a negotiation ended without a tunnel."""

    ABSENT = "no key published"
    OURS = "this host is its gateway"
    INSECURE = "keys in an unsigned zone do not count"
    UNREACHABLE = "DNS is silent"
    BOGUS = "DNSSEC validation failed"
    IKE_SILENT = "no gateway answered IKE"
    IKE_REJECTED = "the gateway refused"
    PROOF_FAILED = "the gateway could not prove the published key"
    NO_DATAPATH = "the datapath refuses the tunnel"
    OVERLOAD = "too many destinations"


class Life(enum.Enum):
    """Where the life of an outcome comes from."""

    RECORD = "remaining TTL of the answer"
    FIXED = "fixed"
    BACK_OFF = "doubles with each failure"


@dataclass(frozen=True, slots=True)
class Outcome:
    verdict: Verdict
    life: Life
    seconds: float = 0.0  # FIXED: the life; BACK_OFF: the first; RECORD: the longest
    alert: bool = False


_CLEAR, _BLOCK = Verdict.CLEAR, Verdict.BLOCK
_RECORD = (Life.RECORD, LONGEST_LIFE)
_TEN_MINUTES = (Life.FIXED, 600.0)
_HOUR = (Life.FIXED, 3600.0)
_MINUTE = (Life.FIXED, 60.0)
_SOON = (Life.BACK_OFF, 5.0)
BACK_OFF_LONGEST = 300.0

_PERMISSIVE = {
    Cause.ABSENT: Outcome(_CLEAR, *_RECORD),
    Cause.OURS: Outcome(_CLEAR, *_RECORD),
    Cause.INSECURE: Outcome(_CLEAR, *_RECORD),
    Cause.UNREACHABLE: Outcome(_CLEAR, *_MINUTE),
    Cause.BOGUS: Outcome(_BLOCK, *_MINUTE, alert=True),
    Cause.IKE_SILENT: Outcome(_CLEAR, *_TEN_MINUTES),
    Cause.IKE_REJECTED: Outcome(_CLEAR, *_HOUR),
    Cause.PROOF_FAILED: Outcome(_BLOCK, *_RECORD, alert=True),
    Cause.NO_DATAPATH: Outcome(_CLEAR, *_MINUTE),
    Cause.OVERLOAD: Outcome(_CLEAR, *_MINUTE),
}

_STRICT = {
    Cause.ABSENT: Outcome(_BLOCK, *_RECORD),
    Cause.OURS: Outcome(_BLOCK, *_RECORD),
    Cause.INSECURE: Outcome(_BLOCK, *_RECORD),
    Cause.UNREACHABLE: Outcome(_BLOCK, *_SOON),
    Cause.BOGUS: Outcome(_BLOCK, *_MINUTE, alert=True),
    Cause.IKE_SILENT: Outcome(_BLOCK, *_SOON),
    Cause.IKE_REJECTED: Outcome(_BLOCK, *_SOON),
    Cause.PROOF_FAILED: Outcome(_BLOCK, *_RECORD, alert=True),
    Cause.NO_DATAPATH: Outcome(_BLOCK, *_SOON),
    Cause.OVERLOAD: Outcome(_BLOCK, *_SOON),
}

OUTCOMES: dict[tuple[PolicyGroup, Cause], Outcome] = {
    **{(PolicyGroup.CLEAR_OR_PRIVATE, cause): outcome for cause, outcome in _PERMISSIVE.items()},
    **{(PolicyGroup.PRIVATE_OR_CLEAR, cause): outcome for cause, outcome in _PERMISSIVE.items()},
    **{(PolicyGroup.PRIVATE, cause): outcome for cause, outcome in _STRICT.items()},
}
_AFTER_FAILED_IKE = frozenset({Cause.IKE_SILENT, Cause.IKE_REJECTED, Cause.NO_DATAPATH})
FAIL_CLOSED = Outcome(_BLOCK, *_MINUTE, alert=True)

# Which groups start a negotiation for a packet, and which answer a peer's.
INITIATES = frozenset({PolicyGroup.PRIVATE_OR_CLEAR, PolicyGroup.PRIVATE})
RESPONDS = frozenset({PolicyGroup.CLEAR_OR_PRIVATE, PolicyGroup.PRIVATE_OR_CLEAR, PolicyGroup.PRIVATE})
RESPONDS_TO_NULL = frozenset({PolicyGroup.CLEAR_OR_PRIVATE, PolicyGroup.PRIVATE_OR_CLEAR})

# Every legal change of an entry's state; anything else is our own mistake and raises.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.NEW: frozenset({State.LOOKUP, State.PRIVATE, State.CLEAR, State.BLOCKED}),
    State.LOOKUP: frozenset({State.NEGOTIATING, State.PRIVATE, State.CLEAR, State.BLOCKED, State.NEW}),
    State.NEGOTIATING: frozenset({State.PRIVATE, State.CLEAR, State.BLOCKED, State.NEW}),
    State.PRIVATE: frozenset({State.NEW, State.LOOKUP}),
    State.CLEAR: frozenset({State.NEW, State.LOOKUP, State.PRIVATE}),
    State.BLOCKED: frozenset({State.NEW, State.LOOKUP, State.PRIVATE}),
}


def outcome_for(group: PolicyGroup, cause: Cause, *, after_failed_ike_blocks: bool) -> Outcome:
    """The row of the table. `after_failed_ike: block` turns the permissive IKE rows into blocks."""
    outcome = OUTCOMES.get((group, cause), FAIL_CLOSED)
    if after_failed_ike_blocks and cause in _AFTER_FAILED_IKE:
        return Outcome(Verdict.BLOCK, outcome.life, outcome.seconds, outcome.alert)
    return outcome


def life_of(outcome: Outcome, record_ttl: float, failures: int) -> float:
    """Seconds that the outcome holds. `failures` counts the attempts in a row that ended like this."""
    if outcome.life is Life.FIXED:
        return outcome.seconds
    if outcome.life is Life.BACK_OFF:
        return float(min(outcome.seconds * 2 ** min(max(failures - 1, 0), 16), BACK_OFF_LONGEST))
    return min(max(record_ttl, SHORTEST_LIFE), outcome.seconds)
