"""nf_tables messages (linux/netfilter/nf_tables.h) that must be quick or that `nft` cannot say: set elements,
the queue rule through the xt target, and the question whether a table is ours."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from oepy.trap import netlink as nl

_SUBSYSTEM = 10 << 8
MSG_NEWTABLE = _SUBSYSTEM | 0
_MSG_GETTABLE = _SUBSYSTEM | 1
_MSG_NEWRULE = _SUBSYSTEM | 6
_MSG_NEWSETELEM = _SUBSYSTEM | 12
_MSG_DELSETELEM = _SUBSYSTEM | 14

NFPROTO_INET = 1
_TABLE_NAME, _TABLE_USERDATA = 1, 6
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_LIST_ELEM = 1
_EXPR_NAME, _EXPR_DATA = 1, 2
_TARGET_NAME, _TARGET_REV, _TARGET_INFO = 1, 2, 3
_QUEUE_NUM, _QUEUE_TOTAL, _QUEUE_FLAGS = 1, 2, 3
_QUEUE_BYPASS = 1
_ELEMS_TABLE, _ELEMS_SET, _ELEMS_ELEMENTS = 1, 2, 3
_ELEM_KEY, _ELEM_FLAGS, _ELEM_TIMEOUT = 1, 3, 4
_INTERVAL_END = 1
_DATA_VALUE = 1

# An attribute is at most 64 KiB long; an IPv6 element that leads to a chain takes 80 bytes.
MAX_ELEMENTS_PER_MESSAGE = 750


def element(key: bytes, timeout: float | None = None) -> bytes:
    """A set element; `key` is the packed address, `timeout` in seconds (None: as long as the set)."""
    body = nl.nested(_ELEM_KEY, nl.attribute(_DATA_VALUE, key))
    if timeout is not None:
        body += nl.u64(_ELEM_TIMEOUT, max(1, round(timeout * 1000)))
    return nl.nested(_LIST_ELEM, body)


def interval(first: bytes, after: bytes | None) -> list[bytes]:
    """The elements of a range in a set with `flags interval`: it begins at `first` and ends before `after` (None:
    it goes to the last address)."""
    begin = nl.nested(_LIST_ELEM, nl.nested(_ELEM_KEY, nl.attribute(_DATA_VALUE, first)))
    if after is None:
        return [begin]
    key = nl.nested(_ELEM_KEY, nl.attribute(_DATA_VALUE, after))
    return [begin, nl.nested(_LIST_ELEM, nl.u32(_ELEM_FLAGS, _INTERVAL_END) + key)]


def element_list(kind: int, flags: int, table: str, name: str, elements: Sequence[bytes]) -> bytes:
    head = nl.text(_ELEMS_TABLE, table) + nl.text(_ELEMS_SET, name)
    return b"".join(
        nl.message(
            kind,
            flags,
            head + nl.nested(_ELEMS_ELEMENTS, b"".join(elements[start : start + MAX_ELEMENTS_PER_MESSAGE])),
            family=NFPROTO_INET,
        )
        for start in range(0, len(elements), MAX_ELEMENTS_PER_MESSAGE)
    )


def add_elements(table: str, name: str, elements: Sequence[bytes]) -> bytes:
    """Messages for a batch. Adding what is there already succeeds and leaves its timeout as it was."""
    return element_list(_MSG_NEWSETELEM, nl.NLM_F_CREATE, table, name, elements)


def delete_elements(table: str, name: str, elements: Sequence[bytes]) -> bytes:
    """Messages for a batch, which fails as a whole (ENOENT) where an element is not there."""
    return element_list(_MSG_DELSETELEM, 0, table, name, elements)


def batch(messages: Iterable[bytes], sequence: int) -> bytes:
    """One transaction: all of it or nothing. The acknowledgement comes for its end."""
    subsystem = _SUBSYSTEM >> 8
    begin = nl.message(nl.NFNL_MSG_BATCH_BEGIN, 0, b"", resource=subsystem, sequence=sequence)
    end = nl.message(nl.NFNL_MSG_BATCH_END, 0, b"", resource=subsystem, sequence=sequence)
    return b"".join((begin, *messages, end))


def _queue_expression(number: int, bypass: bool, native: bool) -> bytes:
    if native:
        data = (
            nl.attribute(_QUEUE_NUM, struct.pack("!H", number))
            + nl.attribute(_QUEUE_TOTAL, struct.pack("!H", 1))
            + nl.attribute(_QUEUE_FLAGS, struct.pack("!H", _QUEUE_BYPASS if bypass else 0))
        )
        name = "queue"
    else:
        # struct xt_NFQ_info_v3, in host byte order and padded to 8 (XT_ALIGN)
        data = (
            nl.text(_TARGET_NAME, "NFQUEUE")
            + nl.u32(_TARGET_REV, 3)
            + nl.attribute(_TARGET_INFO, struct.pack("=HHH2x", number, 1, int(bypass)))
        )
        name = "target"
    return nl.nested(_LIST_ELEM, nl.text(_EXPR_NAME, name) + nl.nested(_EXPR_DATA, data))


def insert_queue_rule(table: str, chain: str, number: int, *, bypass: bool, native: bool) -> bytes:
    """A message for a batch: put `queue` at the head of a chain. Without `native` it is the xt target, by way
    of nft_compat, for kernels that lack nftables' own expression."""
    body = (
        nl.text(_RULE_TABLE, table)
        + nl.text(_RULE_CHAIN, chain)
        + nl.nested(_RULE_EXPRESSIONS, _queue_expression(number, bypass, native))
    )
    return nl.message(_MSG_NEWRULE, nl.NLM_F_CREATE | nl.NLM_F_ACK, body, family=NFPROTO_INET)


def get_table(name: str, sequence: int = 0) -> bytes:
    """Ask for one table; the answer is MSG_NEWTABLE, or an error (ENOENT)."""
    return nl.message(
        _MSG_GETTABLE, nl.NLM_F_ACK, nl.text(_TABLE_NAME, name), family=NFPROTO_INET, sequence=sequence
    )


def table_userdata(message: nl.Message) -> bytes:
    """What the maker of a table wrote to it (nft's comment is in there); empty where nothing."""
    return nl.parse_attributes(message.body).get(_TABLE_USERDATA, b"")
