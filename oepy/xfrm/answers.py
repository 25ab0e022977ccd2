"""Messages from the kernel's SAD and SPD: frames in, values out. Every field is bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from oepy.errors import ParseError
from oepy.model import IpAddress, Mark
from oepy.netlink import Frame, parse_attributes
from oepy.xfrm import pieces as p
from oepy.xfrm import values as v


def parse(frame: Frame) -> v.Answer | None:
    """None for a kind of message that we have no use for. Raises ParseError."""
    parser = _PARSERS.get(frame.kind)
    return None if parser is None else parser(frame.body)


# ---- SAs ---------------------------------------------------------------------------------------------------


def _sa(body: bytes, between: int = 0) -> v.Sa:
    """struct xfrm_usersa_info, `between` bytes that are skipped, attributes."""
    (
        selector,
        identity,
        source,
        limits,
        counted_bytes,
        counted_packets,
        added,
        used,
        out_of_window,
        replayed,
        integrity_failed,
        sequence,
        reqid,
        family,
        mode,
        window,
        flags,
    ) = p.unpack(p.SA, body, "SA")
    destination, spi, protocol = p.ID.unpack(identity)
    attributes = parse_attributes(body[p.SA.size + between :])
    return v.Sa(
        source=p.parse_address(source, family),
        destination=p.parse_address(destination, family),
        spi=int.from_bytes(spi, "big"),
        protocol=protocol,
        mode=_mode(mode),
        reqid=reqid,
        selector=p.parse_selector(selector),
        limits=p.parse_limits(limits),
        encryption=p.parse_algorithm(attributes.get(p.A_CRYPT), p.ALGORITHM),
        integrity=_integrity(attributes),
        aead=p.parse_algorithm(attributes.get(p.A_AEAD), p.ALGORITHM_ICV),
        encapsulation=_encapsulation(attributes.get(p.A_ENCAP)),
        replay=_replay(attributes.get(p.A_REPLAY_ESN)),
        replay_window=window,
        flags=v.SaFlag(flags),
        mark=_mark(attributes),
        set_mark=_set_mark(attributes),
        if_id=_u32(attributes, p.A_IF_ID),
        extra_flags=_u32(attributes, p.A_EXTRA_FLAGS),
        tfc_padding=_u32(attributes, p.A_TFCPAD),
        care_of=_care_of(attributes.get(p.A_COADDR), family),
        usage=v.Usage(counted_bytes, counted_packets, added, used),
        out_of_window=out_of_window,
        replayed=replayed,
        integrity_failed=integrity_failed,
        last_used=p.unpack(p.U64, attributes[p.A_LASTUSED], "time")[0] if p.A_LASTUSED in attributes else 0,
        sequence=sequence,
    )


def _mode(number: int) -> v.Mode:
    try:
        return v.Mode(number)
    except ValueError:
        raise ParseError(f"xfrm mode {number} is not known") from None


def _integrity(attributes: dict[int, bytes]) -> v.Algorithm | None:
    """The kernel repeats an algorithm in the older form, without its ICV's length; that one counts last."""
    found = p.parse_algorithm(attributes.get(p.A_AUTH_TRUNC), p.ALGORITHM_ICV)
    return found or p.parse_algorithm(attributes.get(p.A_AUTH), p.ALGORITHM)


def _encapsulation(data: bytes | None) -> v.Encapsulation | None:
    if data is None:
        return None
    kind, ports, _ = p.unpack(p.ENCAP, data, "encapsulation")
    source, destination = p.TWO_PORTS.unpack(ports)
    return v.Encapsulation(source, destination, kind)


def _replay(data: bytes | None) -> v.Replay | None:
    if data is None:
        return None
    words, out, inward, out_high, in_high, window = p.unpack(p.REPLAY, data, "replay state")
    bitmap = data[p.REPLAY.size : p.REPLAY.size + 4 * words]
    if words > p.MAX_REPLAY_WORDS or window > 32 * words or len(bitmap) not in (0, 4 * words):
        raise ParseError(f"xfrm replay window of {window} packets in {words} words, {len(bitmap)} bytes")
    return v.Replay(window, in_high << 32 | inward, out_high << 32 | out, bitmap)


def _care_of(data: bytes | None, family: int) -> IpAddress | None:
    if data is None:
        return None
    if len(data) != 16:
        raise ParseError(f"xfrm address of {len(data)} bytes")
    return p.parse_address(data, family)


def _sa_id(body: bytes) -> v.SaId:
    destination, spi, family, protocol = p.unpack(p.SA_ID, body, "SA id")
    attributes = parse_attributes(body[p.SA_ID.size :])
    return v.SaId(
        p.parse_address(destination, family),
        int.from_bytes(spi, "big"),
        protocol,
        _mark(attributes),
        _care_of(attributes.get(p.A_SRCADDR), family),
    )


def _sa_deleted(body: bytes) -> v.SaDeleted:
    attributes = parse_attributes(body[p.SA_ID.size :])
    return v.SaDeleted(_sa_id(body), _replay(attributes.get(p.A_REPLAY_ESN)))


def _expire(body: bytes) -> v.Expire:
    hard = p.unpack(p.EXPIRE, body, "expiry")[1]
    return v.Expire(_sa(body, between=p.EXPIRE.size - p.SA.size), bool(hard))


def _mapping(body: bytes) -> v.Mapping:
    identity, reqid, old, new, ports = p.unpack(p.MAPPING, body, "mapping")
    found = _sa_id(identity)
    family = p.family_of(found.destination)
    old_port, new_port = p.TWO_PORTS.unpack(ports)
    old_source, new_source = p.parse_address(old, family), p.parse_address(new, family)
    return v.Mapping(found, reqid, old_source, new_source, old_port, new_port)


def _sad_info(body: bytes) -> v.SadInfo:
    attributes = parse_attributes(body[p.U32.size :])
    buckets, most = (
        p.unpack(p.SAD_HINFO, attributes[p.SAD_HASH], "SAD size") if p.SAD_HASH in attributes else (0, 0)
    )
    return v.SadInfo(_u32(attributes, p.SAD_COUNT), buckets, most)


def _spd_info(body: bytes) -> v.SpdInfo:
    attributes = parse_attributes(body[p.U32.size :])
    return v.SpdInfo(*p.unpack(p.SPD_COUNTS, attributes.get(p.SPD_INFO, b""), "SPD size"))


class Counted(NamedTuple):
    """What is read of very many SAs at once. `destination` is the 16-byte field of the kernel."""

    destination: bytes
    spi: int
    protocol: int
    reqid: int
    bytes: int
    packets: int
    out_of_window: int
    replayed: int
    integrity_failed: int


def counted(frame: Frame) -> Counted:
    """An SA's counters alone, without its attributes. Raises ParseError."""
    fields = p.unpack(p.SA, frame.body, "SA")
    destination, spi, protocol = p.ID.unpack(fields[1])
    return Counted(destination, int.from_bytes(spi, "big"), protocol, fields[12], *fields[4:6], *fields[8:11])


# ---- policies ----------------------------------------------------------------------------------------------


def _policy(body: bytes, between: int = 0) -> v.Policy:
    attributes = parse_attributes(body[p.POLICY.size + between :])
    return _policy_of(body, attributes)


def _policy_of(info: bytes, attributes: dict[int, bytes]) -> v.Policy:
    (
        selector,
        limits,
        counted_bytes,
        counted_packets,
        added,
        used,
        priority,
        index,
        direction,
        action,
        flags,
        _,
    ) = p.unpack(p.POLICY, info, "policy")
    try:
        direction, action = v.PolicyDirection(direction), v.PolicyAction(action)
    except ValueError as error:
        raise ParseError(f"xfrm policy: {error}") from None
    return v.Policy(
        direction=direction,
        selector=p.parse_selector(selector),
        templates=_templates(attributes.get(p.A_TMPL, b"")),
        action=action,
        priority=priority,
        limits=p.parse_limits(limits),
        flags=v.PolicyFlag(flags),
        mark=_mark(attributes),
        if_id=_u32(attributes, p.A_IF_ID),
        sub=_is_sub(attributes),
        index=index,
        usage=v.Usage(counted_bytes, counted_packets, added, used),
    )


def _templates(data: bytes) -> tuple[v.Template, ...]:
    if len(data) % p.TEMPLATE.size or len(data) > p.MAX_TEMPLATES * p.TEMPLATE.size:
        raise ParseError(f"xfrm templates of {len(data)} bytes")
    return tuple(map(_template, p.TEMPLATE.iter_unpack(data)))


def _template(fields: tuple[bytes, int, bytes, int, int, int, int, int, int, int]) -> v.Template:
    identity, family, source, reqid, mode, _, optional, _, _, _ = fields
    destination, spi, protocol = p.ID.unpack(identity)
    return v.Template(
        p.parse_address(source, family),
        p.parse_address(destination, family),
        protocol,
        _mode(mode),
        reqid,
        int.from_bytes(spi, "big"),
        bool(optional),
    )


def _is_sub(attributes: dict[int, bytes]) -> bool:
    if p.A_POLICY_TYPE not in attributes:
        return False
    return bool(p.unpack(p.POLICY_TYPE, attributes[p.A_POLICY_TYPE], "policy type")[0])


def _policy_deleted(body: bytes) -> v.PolicyDeleted:
    """By selector with the policy's own structure as attribute, or by index alone."""
    selector, index, direction = p.unpack(p.POLICY_ID, body, "policy id")
    attributes = parse_attributes(body[p.POLICY_ID.size :])
    if p.A_POLICY in attributes:
        policy = _policy_of(attributes[p.A_POLICY], attributes)
        return v.PolicyDeleted(policy.id)
    if direction not in tuple(v.PolicyDirection):
        raise ParseError(f"xfrm policy with the direction {direction}")
    found = v.PolicyId(
        v.PolicyDirection(direction),
        p.parse_selector(selector),
        _mark(attributes),
        _u32(attributes, p.A_IF_ID),
        index,
    )
    return v.PolicyDeleted(found)


def _policy_expire(body: bytes) -> v.PolicyExpire:
    hard = p.unpack(p.POLICY_EXPIRE, body, "policy's expiry")[1]
    return v.PolicyExpire(_policy(body, between=p.POLICY_EXPIRE.size - p.POLICY.size), bool(hard))


def _acquire(body: bytes) -> v.Acquire:
    identity, source, selector, info, _, _, _, sequence = p.unpack(p.ACQUIRE, body, "acquire")
    destination, _, protocol = p.ID.unpack(identity)
    policy = _policy_of(info, parse_attributes(body[p.ACQUIRE.size :]))
    wanted = p.parse_selector(selector)
    # A tunnel's outer family is its template's
    first = policy.templates[0] if policy.templates else None
    tunnel = first is not None and first.mode is not v.Mode.TRANSPORT
    family = p.family_of(first.destination if first is not None and tunnel else wanted.destination)
    return v.Acquire(
        p.parse_address(source, family),
        p.parse_address(destination, family),
        protocol,
        wanted,
        policy,
        sequence,
    )


def _migrate(body: bytes) -> v.Migrate:
    attributes = parse_attributes(body[p.POLICY_ID.size :])
    selector, index, direction = p.unpack(p.POLICY_ID, body, "migration")
    if direction not in tuple(v.PolicyDirection):
        raise ParseError(f"xfrm policy with the direction {direction}")
    data = attributes.get(p.A_MIGRATE, b"")
    if len(data) % p.MOVE.size or len(data) > p.MAX_TEMPLATES * p.MOVE.size:
        raise ParseError(f"xfrm migration of {len(data)} bytes")
    policy = v.PolicyId(
        v.PolicyDirection(direction),
        p.parse_selector(selector),
        _mark(attributes),
        _u32(attributes, p.A_IF_ID),
        index,
    )
    moves = tuple(_move(fields) for fields in p.MOVE.iter_unpack(data))
    return v.Migrate(policy, moves, _encapsulation(attributes.get(p.A_ENCAP)))


def _move(fields: tuple[bytes, bytes, bytes, bytes, int, int, int, int, int, int]) -> v.Move:
    old_to, old_from, new_to, new_from, protocol, mode, _, reqid, old_family, new_family = fields
    return v.Move(
        p.parse_address(old_from, old_family),
        p.parse_address(old_to, old_family),
        p.parse_address(new_from, new_family),
        p.parse_address(new_to, new_family),
        protocol,
        _mode(mode),
        reqid,
    )


# ---- common ------------------------------------------------------------------------------------------------


def _u32(attributes: dict[int, bytes], kind: int) -> int:
    data = attributes.get(kind)
    if data is None:
        return 0
    number: int = p.unpack(p.U32, data, "number")[0]
    return number


def _mark(attributes: dict[int, bytes]) -> Mark | None:
    data = attributes.get(p.A_MARK)
    return None if data is None else Mark(*p.unpack(p.MARK, data, "mark"))


def _set_mark(attributes: dict[int, bytes]) -> Mark | None:
    if p.A_SET_MARK not in attributes:
        return None
    mask = _u32(attributes, p.A_SET_MARK_MASK) if p.A_SET_MARK_MASK in attributes else 0xFFFFFFFF
    return Mark(_u32(attributes, p.A_SET_MARK), mask)


_PARSERS: dict[int, Callable[[bytes], v.Answer]] = {
    p.MSG_NEWSA: _sa,
    p.MSG_UPDSA: _sa,
    p.MSG_DELSA: _sa_deleted,
    p.MSG_NEWPOLICY: _policy,
    p.MSG_UPDPOLICY: _policy,
    p.MSG_DELPOLICY: _policy_deleted,
    p.MSG_ACQUIRE: _acquire,
    p.MSG_EXPIRE: _expire,
    p.MSG_POLEXPIRE: _policy_expire,
    p.MSG_MIGRATE: _migrate,
    p.MSG_MAPPING: _mapping,
    p.MSG_NEWSADINFO: _sad_info,
    p.MSG_NEWSPDINFO: _spd_info,
}
