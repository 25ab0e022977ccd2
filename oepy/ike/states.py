"""Theory of operation, and the transitions of an IKE SA as data.

An IKE SA is one `Session` object; the initiator's and the responder's are the same class. What happens to it
comes as a `Happening`; `TRANSITIONS` says which state follows, and a pair that is not in the table cannot
happen: `Session.move` is the one setter, it counts each transition and refuses to reach ESTABLISHED without
the evidence (the peer's proof was verified).

Initiator:   NEW ─start→ INIT_SENT ─init-answered→ AUTH_SENT ─proven→ ESTABLISHED
             INIT_SENT ─init-again→ INIT_SENT            (COOKIE or INVALID_KE_PAYLOAD: asked once more)
Responder:   NEW ─init-received→ HALF_OPEN ─auth-received→ AUTHENTICATING ─proven→ ESTABLISHED
             (a cookie is demanded before there is any Session; in AUTHENTICATING the session waits for the
             daemon's answers, and the peer's retransmissions are absorbed)
             (between the two, where both sides agreed on it, IKE_INTERMEDIATE for further key exchanges: the
             states stay AUTH_SENT and HALF_OPEN, IKE_AUTH is served only after the last of them)
Both:        ESTABLISHED ─replaced→ REPLACED ─delete-sent→ DELETING ─ended→ CLOSED
             ESTABLISHED ─delete-sent→ DELETING; any state ─ended→ CLOSED
Rekeyed:     NEW ─born-of-rekey→ ESTABLISHED             (its evidence is inherited from the SA it replaces)

Inside ESTABLISHED run *exchanges*, one of ours and one of the peer's at a time (window 1). Each is a
generator (`initiator.py`, `responder.py`, `child_exchange.py`, `ike_rekey.py`, `informational.py`) that
yields what it wants, a `Send` or one of the Need… events, and is resumed with the response or the daemon's
answer. So the order of an exchange is the order of its lines, nothing of a handshake outlives its generator,
and no exchange can block another session.

What keeps the rest simple:
- A message that fails its integrity check has no effect but a counter.
- An answer to IKE_SA_INIT may be anybody's: a refusal counts only where `refusal_patience` brings nothing better,
  a COOKIE is obeyed a little later, and what cannot be right is no answer (`initiator.weigh_init_answer`).
- Only an authenticated message moves the peer's address, the window, or the liveness clock.
- A response is kept as bytes until the next request, and sent again only for the identical request.
- Old SAs stay usable until their Delete: the new one is announced (`ChildUp`) before.

A reauthentication is a session of its own beside the old one, which it ends when it has all the children
(`reauthentication.py`); it is no duplicate.

Two tunnels where one would do (both ends began at once): both sides rank the two IKE SAs alike, by the number
of sides that proved a key (AUTH NULL counts 0), then by the lower SPI pair, which is that of the first IKE SA of
each line (`duplicates.py`). The *initiator* of the loser first makes sure, by an empty INFORMATIONAL in the
winner, that the peer has the winner as well, and only then deletes the loser; traffic can use either until then.
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    NEW = "new"
    INIT_SENT = "init-sent"
    AUTH_SENT = "auth-sent"
    HALF_OPEN = "half-open"
    AUTHENTICATING = "authenticating"
    ESTABLISHED = "established"
    REPLACED = "replaced"
    DELETING = "deleting"
    CLOSED = "closed"


class Happening(enum.Enum):
    START = "start"
    INIT_AGAIN = "init-again"
    INIT_ANSWERED = "init-answered"
    INIT_RECEIVED = "init-received"
    AUTH_RECEIVED = "auth-received"
    PROVEN = "proven"
    BORN_OF_REKEY = "born-of-rekey"
    REPLACED = "replaced"
    DELETE_SENT = "delete-sent"
    ENDED = "ended"


TRANSITIONS: dict[tuple[State, Happening], State] = {
    (State.NEW, Happening.START): State.INIT_SENT,
    (State.INIT_SENT, Happening.INIT_AGAIN): State.INIT_SENT,
    (State.INIT_SENT, Happening.INIT_ANSWERED): State.AUTH_SENT,
    (State.AUTH_SENT, Happening.PROVEN): State.ESTABLISHED,
    (State.NEW, Happening.INIT_RECEIVED): State.HALF_OPEN,
    (State.HALF_OPEN, Happening.AUTH_RECEIVED): State.AUTHENTICATING,
    (State.AUTHENTICATING, Happening.PROVEN): State.ESTABLISHED,
    (State.NEW, Happening.BORN_OF_REKEY): State.ESTABLISHED,
    (State.ESTABLISHED, Happening.REPLACED): State.REPLACED,
    (State.ESTABLISHED, Happening.DELETE_SENT): State.DELETING,
    (State.REPLACED, Happening.DELETE_SENT): State.DELETING,
    (State.AUTH_SENT, Happening.DELETE_SENT): State.DELETING,
} | {(state, Happening.ENDED): State.CLOSED for state in State if state is not State.CLOSED}

NEEDS_EVIDENCE = State.ESTABLISHED
LIVE = frozenset((State.ESTABLISHED, State.REPLACED))
HANDSHAKE = frozenset((State.NEW, State.INIT_SENT, State.AUTH_SENT, State.HALF_OPEN, State.AUTHENTICATING))
