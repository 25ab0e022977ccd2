"""Messages to the kernel's SAD and SPD: values in, `Request`s out.

A struct codec of our own, not message classes of pyroute2: it has none for XFRM, so that they would have to be
declared all the same, and its generic encoder costs many times as much for each message.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from oepy.model import IpNetwork, Mark
from oepy.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, attribute
from oepy.xfrm import pieces as p
from oepy.xfrm import values as v


class Request(NamedTuple):
    """A message to the kernel, but for its sequence number."""

    kind: int
    flags: int
    body: bytes


# ---- SAs ---------------------------------------------------------------------------------------------------


def new_sa(sa: v.Sa) -> Request:
    """Refused with EEXIST where there is one with its destination, SPI, protocol and mark."""
    return Request(p.MSG_NEWSA, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, sa_body(sa))


def update_sa(sa: v.Sa) -> Request:
    """Fills what ALLOCSPI or an ACQUIRE has begun. Of an SA with keys only limits, encapsulation and marks
    change: its keys and sequence numbers stay."""
    return Request(p.MSG_UPDSA, NLM_F_ACK, sa_body(sa))


def delete_sa(sa: v.SaId) -> Request:
    return Request(p.MSG_DELSA, NLM_F_ACK, _sa_id(sa))


def get_sa(sa: v.SaId) -> Request:
    """Answered by one Sa, or refused with ESRCH."""
    return Request(p.MSG_GETSA, NLM_F_ACK, _sa_id(sa))


def dump_sas(source: IpNetwork | None = None, destination: IpNetwork | None = None) -> Request:
    """Everybody's, keys included; or only those between two networks of one family. For reqid and mark the
    kernel has no filter."""
    if source is None or destination is None:
        return Request(p.MSG_GETSA, NLM_F_DUMP, b"")
    between = p.FILTER.pack(
        source.network_address.packed,
        destination.network_address.packed,
        p.family_of(source),
        source.prefixlen,
        destination.prefixlen,
    )
    return Request(p.MSG_GETSA, NLM_F_DUMP, attribute(p.A_ADDRESS_FILTER, between))


def flush_sas(protocol: int = v.ESP) -> Request:
    """Everybody's of this protocol: for namespaces that are wholly one's own."""
    return Request(p.MSG_FLUSHSA, NLM_F_ACK, p.SA_FLUSH.pack(protocol))


def allocate_spi(sa: v.Sa, first: int, last: int) -> Request:
    """A larval inbound SA with an SPI of `first` to `last` that is free; answered by it as an Sa. It is to be
    filled by `update_sa` before the kernel's `net.core.xfrm_acq_expires` seconds are over."""
    return Request(p.MSG_ALLOCSPI, NLM_F_ACK, sa_body(sa, p.SPI_RANGE.pack(first, last)))


def sad_info() -> Request:
    return Request(p.MSG_GETSADINFO, NLM_F_ACK, p.U32.pack(0xFFFFFFFF))


def spd_info() -> Request:
    return Request(p.MSG_GETSPDINFO, NLM_F_ACK, p.U32.pack(0xFFFFFFFF))


def _sa_id(sa: v.SaId) -> bytes:
    body = p.SA_ID.pack(
        sa.destination.packed, p.build_spi(sa.spi), p.family_of(sa.destination), sa.protocol
    ) + _mark(sa.mark)
    if sa.source is not None:
        body += attribute(p.A_SRCADDR, sa.source.packed.ljust(16, b"\0"))
    return body


def sa_info(sa: v.Sa) -> bytes:
    """struct xfrm_usersa_info."""
    usage = sa.usage
    return p.SA.pack(
        p.build_selector(sa.selector),
        p.ID.pack(sa.destination.packed, p.build_spi(sa.spi), sa.protocol),
        sa.source.packed,
        p.build_limits(sa.limits),
        *(usage.bytes, usage.packets, usage.added, usage.used),
        *(sa.out_of_window, sa.replayed, sa.integrity_failed),
        sa.sequence,
        sa.reqid,
        p.family_of(sa.destination),
        sa.mode,
        sa.replay_window,
        sa.flags,
    )


def sa_body(sa: v.Sa, between: bytes = b"") -> bytes:
    """An Sa with its attributes; `between` stands behind the fixed structure."""
    parts = [sa_info(sa), between]
    if sa.aead is not None:
        parts.append(p.build_algorithm_icv(p.A_AEAD, sa.aead))
    if sa.integrity is not None:
        parts.append(p.build_algorithm_icv(p.A_AUTH_TRUNC, sa.integrity))
    if sa.encryption is not None:
        parts.append(p.build_algorithm(p.A_CRYPT, sa.encryption))
    if sa.encapsulation is not None:
        parts.append(encapsulation(sa.encapsulation))
    if sa.replay is not None:
        parts.append(_replay(sa.replay))
    if sa.set_mark is not None:
        parts.append(_u32(p.A_SET_MARK, sa.set_mark.value))
        parts.append(_u32(p.A_SET_MARK_MASK, sa.set_mark.mask))
    if sa.extra_flags:
        parts.append(_u32(p.A_EXTRA_FLAGS, sa.extra_flags))
    if sa.tfc_padding:
        parts.append(_u32(p.A_TFCPAD, sa.tfc_padding))
    if sa.care_of is not None:
        parts.append(attribute(p.A_COADDR, sa.care_of.packed.ljust(16, b"\0")))
    if sa.last_used:
        parts.append(attribute(p.A_LASTUSED, p.U64.pack(sa.last_used)))
    parts.append(_mark(sa.mark))
    parts.append(_if_id(sa.if_id))
    return b"".join(parts)


def _replay(replay: v.Replay) -> bytes:
    words = max((replay.window + 31) // 32, len(replay.bitmap) // 4)
    mask = 0xFFFFFFFF
    head = p.REPLAY.pack(
        words,
        replay.sequence_out & mask,
        replay.sequence_in & mask,
        replay.sequence_out >> 32,
        replay.sequence_in >> 32,
        replay.window,
    )
    return attribute(p.A_REPLAY_ESN, head + replay.bitmap[: 4 * words].ljust(4 * words, b"\0"))


def encapsulation(value: v.Encapsulation) -> bytes:
    ports = p.TWO_PORTS.pack(value.source_port, value.destination_port)
    return attribute(p.A_ENCAP, p.ENCAP.pack(value.kind, ports, p.UNSET))


# ---- policies ----------------------------------------------------------------------------------------------


def new_policy(policy: v.Policy) -> Request:
    """Refused with EEXIST where there is one with its direction, selector, mark and if_id."""
    return Request(p.MSG_NEWPOLICY, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, policy_body(policy))


def update_policy(policy: v.Policy) -> Request:
    """Replaces the one with its direction, selector, mark and if_id in one step, or is a new one."""
    return Request(p.MSG_UPDPOLICY, NLM_F_ACK, policy_body(policy))


def delete_policy(policy: v.PolicyId) -> Request:
    return Request(p.MSG_DELPOLICY, NLM_F_ACK, policy_id_body(policy))


def get_policy(policy: v.PolicyId) -> Request:
    """Answered by one Policy, or refused with ENOENT."""
    return Request(p.MSG_GETPOLICY, NLM_F_ACK, policy_id_body(policy))


def dump_policies() -> Request:
    """Everybody's."""
    return Request(p.MSG_GETPOLICY, NLM_F_DUMP, b"")


def flush_policies() -> Request:
    """Everybody's: for namespaces that are wholly one's own."""
    return Request(p.MSG_FLUSHPOLICY, NLM_F_ACK, b"")


def migrate(move: v.Migrate) -> Request:
    """Give the SAs of a policy other outer addresses; their keys and sequence numbers go along."""
    moves = b"".join(
        p.MOVE.pack(
            item.old_destination.packed,
            item.old_source.packed,
            item.new_destination.packed,
            item.new_source.packed,
            item.protocol,
            item.mode,
            0,
            item.reqid,
            p.family_of(item.old_destination),
            p.family_of(item.new_destination),
        )
        for item in move.moves
    )
    body = policy_id_body(move.policy) + attribute(p.A_MIGRATE, moves)
    if move.encapsulation is not None:
        body += encapsulation(move.encapsulation)
    return Request(p.MSG_MIGRATE, NLM_F_ACK, body)


def policy_info(policy: v.Policy) -> bytes:
    """struct xfrm_userpolicy_info; alone it is what the IP_XFRM_POLICY socket option takes."""
    usage = policy.usage
    return p.POLICY.pack(
        p.build_selector(policy.selector),
        p.build_limits(policy.limits),
        *(usage.bytes, usage.packets, usage.added, usage.used),
        policy.priority,
        policy.index,
        policy.direction,
        policy.action,
        policy.flags,
        0,
    )


def policy_body(policy: v.Policy) -> bytes:
    parts = [policy_info(policy)]
    if policy.templates:
        parts.append(attribute(p.A_TMPL, b"".join(map(_template, policy.templates))))
    if policy.sub:
        parts.append(_policy_type(policy.sub))
    parts.append(_mark(policy.mark))
    parts.append(_if_id(policy.if_id))
    return b"".join(parts)


def policy_id_body(policy: v.PolicyId) -> bytes:
    return (
        p.POLICY_ID.pack(p.build_selector(policy.selector), policy.index, policy.direction)
        + _mark(policy.mark)
        + _if_id(policy.if_id)
    )


def _template(template: v.Template) -> bytes:
    return p.TEMPLATE.pack(
        p.ID.pack(template.destination.packed, p.build_spi(template.spi), template.protocol),
        p.family_of(template.destination),
        template.source.packed,
        template.reqid,
        template.mode,
        0,
        template.optional,
        p.ALL_ALGORITHMS,
        p.ALL_ALGORITHMS,
        p.ALL_ALGORITHMS,
    )


def _policy_type(sub: bool) -> bytes:
    return attribute(p.A_POLICY_TYPE, p.POLICY_TYPE.pack(int(sub), 0, 0))


# ---- common ------------------------------------------------------------------------------------------------


_U32_ATTRIBUTE = struct.Struct("=HHI")


def _u32(kind: int, value: int) -> bytes:
    return _U32_ATTRIBUTE.pack(8, kind, value)


def _if_id(if_id: int) -> bytes:
    return _u32(p.A_IF_ID, if_id) if if_id else b""


def _mark(mark: Mark | None) -> bytes:
    return b"" if mark is None else attribute(p.A_MARK, p.MARK.pack(mark.value, mark.mask))
