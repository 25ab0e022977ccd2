"""The guard: what a stopped oepy leaves, so that what must be private stays shut. A small table of nftables, or
of the kernel's own trap a few IPsec policies."""

from __future__ import annotations

from oepy.trap import acquire, kernel
from oepy.trap.rules import BRACKET_TABLE, COMMENT, GUARD_TABLE, removing


def guard_status() -> bool:
    """Whether the guard stands in this network namespace. Raises OepyError without rights."""
    return acquire.guard_stands() or _table_stands()


def _table_stands() -> bool:
    changer = kernel.Tables()
    try:
        changer.refuse_foreign()
        comment = changer.table_comment(GUARD_TABLE)
    finally:
        changer.close()
    return comment is not None and COMMENT.encode() in comment


def remove_guard() -> bool:
    """Remove it; from then on `private` and `block` prefixes are in the clear. False where there was none.
    Raises OepyError without rights, or where the table is not ours."""
    removed = acquire.remove_guard()
    if _table_stands():
        kernel.load(removing(GUARD_TABLE, BRACKET_TABLE))
        removed = True
    return removed
