"""The guard: the small table that a stopped oepy leaves, so that what must be private stays shut."""

from __future__ import annotations

from oepy.trap import kernel
from oepy.trap.rules import BRACKET_TABLE, COMMENT, GUARD_TABLE, removing


def guard_status() -> bool:
    """Whether the guard stands in this network namespace. Raises OepyError without rights."""
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
    if not guard_status():
        return False
    kernel.load(removing(GUARD_TABLE, BRACKET_TABLE))
    return True
