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
from dataclasses import replace

from oepy.interfaces import ConfiguredRule, TrapPolicy
from oepy.model import PolicyGroup
from oepy.trap import islands, kernel
from oepy.trap.configured import Configured
from oepy.trap.islands import Chains, Difference, Line, past_device
from oepy.trap.rules import (
    ASK_CLOSED,
    BRACKET_TABLE,
    DECRYPTED,
    GUARD_TABLE,
    KERNEL,
    SORT,
    TABLE,
    TUNNEL,
    Ruleset,
    removing,
)

_CHAINS = Chains(TUNNEL, KERNEL, DECRYPTED, ASK_CLOSED, SORT)


def _running(policy: TrapPolicy) -> Configured:
    def lines_of(rule: ConfiguredRule) -> list[Line]:
        return islands.running_lines(rule, _CHAINS, by_kernel=past_device(policy, rule))

    return Configured(TABLE, lines_of)


def _load_shut(policy: TrapPolicy, table: str, changer: kernel.Tables) -> bool:
    """The table that keeps shut what fails closed by `policy`; False where nothing does."""
    shut = Ruleset(policy, table)
    if not shut.needed:
        return False
    kernel.load(shut.loading())

    def lines_of(rule: ConfiguredRule) -> list[Line]:
        by_kernel = past_device(policy, rule)
        return islands.shut_lines(rule, _CHAINS, bracket=table == BRACKET_TABLE, by_kernel=by_kernel)

    Configured(table, lines_of).change(changer, shut.islands)
    return True


@contextlib.contextmanager
def bracketed(policy: TrapPolicy, changer: kernel.Tables) -> Iterator[None]:
    """What fails closed by `policy` is kept shut by a table of its own meanwhile."""
    try:
        stands = _load_shut(policy, BRACKET_TABLE, changer)
    except BaseException:
        kernel.load(removing(BRACKET_TABLE))
        raise
    try:
        yield
    finally:
        if stands:
            kernel.load(removing(BRACKET_TABLE))


def take_over(policy: TrapPolicy, ruleset: Ruleset, changer: kernel.Tables) -> Configured:
    """Load the trap's table in the place of whatever an earlier run has left, its guard included."""
    with bracketed(policy, changer):
        kernel.load(ruleset.loading(GUARD_TABLE))
        configured = _running(policy)
        configured.change(changer, ruleset.islands)
    return configured


def change(
    policy: TrapPolicy, old: Ruleset, new: Ruleset, configured: Configured, changer: kernel.Tables
) -> None:
    """From a running policy to the next; sets and queues stay as they are. Raises OepyError: all is as before."""
    with bracketed(policy, changer):
        kernel.load(new.replacing(old))
        before = dict(configured.there)
        try:
            configured.change(changer, new.islands)
        except BaseException:
            configured.change(changer, before)
            kernel.load(old.replacing(new))
            raise
        kernel.load(new.without(old.lengths - new.lengths))


def change_configured(
    policy: TrapPolicy, found: Difference, configured: Configured, changer: kernel.Tables
) -> None:
    """The same where nothing but configured rules are others, and all maps are there. What is new and what goes has
    nothing to fear between the generations of rules: before and after, it is the groups' traffic."""
    others = tuple(rule for rules in found.fresh.values() for rule in rules)
    narrow = replace(policy, rules=(), default=PolicyGroup.CLEAR, configured=others if found.gone else ())
    with bracketed(narrow, changer):
        before = dict(configured.there)
        try:
            configured.apply(changer, found)
        except BaseException:
            configured.change(changer, before)
            raise


def leave(policy: TrapPolicy, guard: bool, changer: kernel.Tables) -> None:
    """Remove the trap's table; with `guard`, and where anything fails closed, the guard stands before."""
    if guard and _load_shut(policy, GUARD_TABLE, changer):
        kernel.load(removing(TABLE, BRACKET_TABLE))
    else:
        kernel.load(removing(TABLE, GUARD_TABLE, BRACKET_TABLE))
