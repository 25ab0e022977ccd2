"""Changes from one table to another, with no moment in which a prefix that fails closed is open.

One transaction is not enough for that. Where it deletes one base chain and adds another, a packet that is on
its way through the hook just then can pass the new chain by the old generation of rules (in which it is still
empty) and the old chain by the new one (in which it is empty already). Measured with a sender that never
stops: 16 packets leaked in 100 changes. In the same way a packet in the middle of a chain could look into a
map that the transaction has emptied. So whatever replaces a chain or its maps happens while another table,
loaded before and removed afterwards, keeps the same prefixes shut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from oepy.interfaces import TrapPolicy
from oepy.trap import kernel
from oepy.trap.rules import BRACKET_TABLE, GUARD_TABLE, TABLE, Ruleset, removing


@contextlib.contextmanager
def bracketed(policy: TrapPolicy) -> Iterator[None]:
    """What fails closed by `policy` is kept shut by a table of its own meanwhile."""
    bracket = Ruleset(policy, BRACKET_TABLE)
    if not bracket.needed:
        yield
        return
    kernel.load(bracket.loading())
    try:
        yield
    finally:
        kernel.load(removing(BRACKET_TABLE))


def take_over(policy: TrapPolicy, ruleset: Ruleset) -> None:
    """Load the trap's table in the place of whatever an earlier run has left, its guard included."""
    with bracketed(policy):
        kernel.load(ruleset.loading(GUARD_TABLE))


def change(policy: TrapPolicy, old: Ruleset, new: Ruleset) -> None:
    """From a running policy to the next; sets and queues stay as they are."""
    with bracketed(policy):
        kernel.load(new.replacing(old))


def leave(policy: TrapPolicy, guard: bool) -> None:
    """Remove the trap's table; with `guard`, and where anything fails closed, the guard stands before."""
    closed = Ruleset(policy, GUARD_TABLE)
    if guard and closed.needed:
        kernel.load(closed.loading())
        kernel.load(removing(TABLE, BRACKET_TABLE))
    else:
        kernel.load(removing(TABLE, GUARD_TABLE, BRACKET_TABLE))
