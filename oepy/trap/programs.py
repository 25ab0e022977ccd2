"""nf_tables messages for chains, rules and sets (linux/netfilter/nf_tables.h): what `nft` would make of configured
rules. `nft` itself reads all sets of a table to change one, which takes seconds where there are ten thousand.

A rule is a list of expressions over registers: load a field, mask it, compare; a lookup; a verdict.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable

from oepy.interfaces import ConfiguredRule
from oepy.model import IpNetwork
from oepy.trap import netlink as nl
from oepy.trap.islands import ACCEPT, DROP, Line
from oepy.trap.tables import NFPROTO_INET, element_list

_SUBSYSTEM = 10 << 8
_NEWCHAIN, _DELCHAIN = _SUBSYSTEM | 3, _SUBSYSTEM | 5
_NEWRULE = _SUBSYSTEM | 6
_NEWSET, _DELSET = _SUBSYSTEM | 9, _SUBSYSTEM | 11
_NEWSETELEM, _DELSETELEM = _SUBSYSTEM | 12, _SUBSYSTEM | 14

_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_SET_TABLE, _SET_NAME, _SET_FLAGS, _SET_KEY_TYPE, _SET_KEY_LEN, _SET_ID = 1, 2, 3, 4, 5, 10
_SET_INTERVAL = 4
_LIST_ELEM = 1
_EXPR_NAME, _EXPR_DATA = 1, 2
_ELEM_KEY, _ELEM_DATA = 1, 2
_DATA_VALUE, _DATA_VERDICT = 1, 2
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_KEY_TYPES = {4: 7, 6: 8}  # what nft calls ipv4_addr and ipv6_addr
_JUMP, _GOTO = -3 & 0xFFFFFFFF, -4 & 0xFFFFFFFF
_CODES = {DROP: 0, ACCEPT: 1}
_REGISTER, _VERDICT_REGISTER = 1, 0
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_META_MARK, _META_NFPROTO, _META_L4PROTO, _META_SECPATH = 3, 15, 16, 25
_HOST = struct.Struct("=I")  # a mark is in the host's byte order
_OFFSETS = {(4, "saddr"): 12, (4, "daddr"): 16, (6, "saddr"): 8, (6, "daddr"): 24}


def new_chain(table: str, name: str) -> bytes:
    body = nl.text(_CHAIN_TABLE, table) + nl.text(_CHAIN_NAME, name)
    return nl.message(_NEWCHAIN, nl.NLM_F_CREATE, body, family=NFPROTO_INET)


def delete_chain(table: str, name: str) -> bytes:
    """With its rules. Fails (EBUSY) while anything leads there."""
    body = nl.text(_CHAIN_TABLE, table) + nl.text(_CHAIN_NAME, name)
    return nl.message(_DELCHAIN, 0, body, family=NFPROTO_INET)


def new_interval_set(table: str, name: str, version: int, number: int) -> bytes:
    """`number`: another one for each set of a transaction."""
    body = (
        nl.text(_SET_TABLE, table)
        + nl.text(_SET_NAME, name)
        + nl.u32(_SET_FLAGS, _SET_INTERVAL)
        + nl.u32(_SET_KEY_TYPE, _KEY_TYPES[version])
        + nl.u32(_SET_KEY_LEN, 4 if version == 4 else 16)
        + nl.u32(_SET_ID, number)
    )
    return nl.message(_NEWSET, nl.NLM_F_CREATE, body, family=NFPROTO_INET)


def delete_set(table: str, name: str) -> bytes:
    body = nl.text(_SET_TABLE, table) + nl.text(_SET_NAME, name)
    return nl.message(_DELSET, 0, body, family=NFPROTO_INET)


# Thousands of rules are made of the same few pieces
_remembered = functools.lru_cache(maxsize=1024)


def add_jumps(table: str, name: str, jumps: Iterable[tuple[bytes, str]]) -> bytes:
    """Elements of a verdict map: keys, and the chains that they lead to."""
    elements = [_key(key) + nl.nested(_ELEM_DATA, _verdict(_JUMP, chain)) for key, chain in jumps]
    return element_list(
        _NEWSETELEM, nl.NLM_F_CREATE, table, name, [nl.nested(_LIST_ELEM, body) for body in elements]
    )


def delete_jumps(table: str, name: str, found: Iterable[bytes]) -> bytes:
    return element_list(_DELSETELEM, 0, table, name, [nl.nested(_LIST_ELEM, _key(key)) for key in found])


def _key(key: bytes) -> bytes:
    return nl.nested(_ELEM_KEY, nl.attribute(_DATA_VALUE, key))


def new_rule(table: str, chain: str, line: Line, joined: str) -> bytes:
    """At the end of the chain. `joined`: the set of what is up of the rule's child."""
    expressions = _matches(line.rule)
    if line.joined:
        expressions += [
            _field(line.rule, "daddr" if line.rule.way.value == "out" else "saddr"),
            _expression("lookup", nl.text(1, joined) + nl.u32(2, _REGISTER)),
        ]
    if line.decrypted:
        expressions += [_meta(_META_SECPATH), _equals(b"\1")]
    code = _CODES.get(line.verdict)
    verdict = _verdict(_GOTO, line.verdict) if code is None else _verdict(code, "")
    expressions.append(_expression("immediate", nl.u32(1, _VERDICT_REGISTER) + nl.nested(2, verdict)))
    body = (
        nl.text(_RULE_TABLE, table)
        + nl.text(_RULE_CHAIN, chain)
        + nl.nested(_RULE_EXPRESSIONS, b"".join(expressions))
    )
    return nl.message(_NEWRULE, nl.NLM_F_CREATE | nl.NLM_F_APPEND, body, family=NFPROTO_INET)


@_remembered
def _verdict(code: int, chain: str) -> bytes:
    target = nl.text(_VERDICT_CHAIN, chain) if chain else b""
    return nl.nested(_DATA_VERDICT, nl.u32(_VERDICT_CODE, code) + target)


def _matches(rule: ConfiguredRule) -> list[bytes]:
    """The version is certain, as a map of its addresses has led to the chain; but `nft list` reads by it what the
    fields are."""
    found = [
        _meta(_META_NFPROTO),
        _equals(bytes((2 if rule.source.version == 4 else 10,))),
    ]
    if rule.mark is not None:
        found.append(_meta(_META_MARK))
        found += [_masked(_HOST.pack(rule.mark.mask)), _equals(_HOST.pack(rule.mark.value))]
    for field, network in (("saddr", rule.source), ("daddr", rule.destination)):
        if network.prefixlen:
            found += [_field(rule, field), *_within(network)]
    if rule.protocol:
        found += [_meta(_META_L4PROTO), _equals(bytes((rule.protocol,)))]
    for offset, port in ((0, rule.source_port), (2, rule.destination_port)):
        if port:
            found += [_payload(_TRANSPORT_HEADER, offset, 2), _equals(port.to_bytes(2, "big"))]
    return found


def _within(network: IpNetwork) -> list[bytes]:
    compare = _equals(network.network_address.packed)
    if network.prefixlen == network.max_prefixlen:
        return [compare]
    return [_masked(network.netmask.packed), compare]


def _masked(mask: bytes) -> bytes:
    """What is loaded, and these bits."""
    data = (
        nl.u32(1, _REGISTER)
        + nl.u32(2, _REGISTER)
        + nl.u32(3, len(mask))
        + nl.nested(4, nl.attribute(_DATA_VALUE, mask))
        + nl.nested(5, nl.attribute(_DATA_VALUE, bytes(len(mask))))
    )
    return _expression("bitwise", data)


def _field(rule: ConfiguredRule, name: str) -> bytes:
    version = rule.source.version
    return _payload(_NETWORK_HEADER, _OFFSETS[version, name], 4 if version == 4 else 16)


@_remembered
def _payload(base: int, offset: int, size: int) -> bytes:
    return _expression(
        "payload", nl.u32(1, _REGISTER) + nl.u32(2, base) + nl.u32(3, offset) + nl.u32(4, size)
    )


@_remembered
def _meta(what: int) -> bytes:
    return _expression("meta", nl.u32(1, _REGISTER) + nl.u32(2, what))


@_remembered
def _equals(value: bytes) -> bytes:
    return _expression(
        "cmp", nl.u32(1, _REGISTER) + nl.u32(2, 0) + nl.nested(3, nl.attribute(_DATA_VALUE, value))
    )


def _expression(name: str, data: bytes) -> bytes:
    return nl.nested(_LIST_ELEM, nl.text(_EXPR_NAME, name) + nl.nested(_EXPR_DATA, data))
