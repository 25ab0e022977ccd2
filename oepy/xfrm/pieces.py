"""The structures of XFRM netlink messages (linux/xfrm.h): values in, bytes out, and back. No sockets.

A struct codec of our own and not pyroute2's message classes, which have no XFRM: they would have to be
declared, and cost some ten times as much for each message.

Integers are in host byte order, but SPIs, ports and addresses in network order. Structures carry the padding
that a 64-bit kernel's compiler gives them; a 32-bit x86 kernel has 4 bytes less in some.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from oepy.errors import ParseError
from oepy.model import IpAddress, IpNetwork, Secret
from oepy.netlink import attribute
from oepy.xfrm import values as v

NETLINK_XFRM = 6

# Messages
MSG_NEWSA, MSG_DELSA, MSG_GETSA, MSG_NEWPOLICY, MSG_DELPOLICY, MSG_GETPOLICY = range(0x10, 0x16)
MSG_ALLOCSPI, MSG_ACQUIRE, MSG_EXPIRE, MSG_UPDPOLICY, MSG_UPDSA, MSG_POLEXPIRE = range(0x16, 0x1C)
MSG_FLUSHSA, MSG_FLUSHPOLICY = 0x1C, 0x1D
MSG_MIGRATE, MSG_NEWSADINFO, MSG_GETSADINFO, MSG_NEWSPDINFO, MSG_GETSPDINFO, MSG_MAPPING = range(0x21, 0x27)

# Multicast groups, by number
GROUP_ACQUIRE, GROUP_EXPIRE, GROUP_SA, GROUP_POLICY = 1, 2, 3, 4
GROUP_MIGRATE, GROUP_MAPPING = 7, 8

# Attributes
A_AUTH, A_CRYPT, A_ENCAP, A_TMPL, A_SA, A_POLICY = 1, 2, 4, 5, 6, 7
A_SRCADDR, A_COADDR, A_LASTUSED, A_POLICY_TYPE, A_MIGRATE, A_AEAD = 13, 14, 15, 16, 17, 18
A_AUTH_TRUNC, A_MARK, A_TFCPAD, A_REPLAY_ESN, A_EXTRA_FLAGS = 20, 21, 22, 23, 24
A_ADDRESS_FILTER = 26
A_SET_MARK, A_SET_MARK_MASK, A_IF_ID = 29, 30, 31
SAD_COUNT, SAD_HASH, SPD_INFO = 1, 2, 1

AF_INET, AF_INET6 = 2, 10
INFINITE = 2**64 - 1
ALL_ALGORITHMS = 0xFFFFFFFF
UNSET = bytes(16)

# Bounds of what is parsed
MAX_TEMPLATES = 6  # XFRM_MAX_DEPTH
MAX_REPLAY_WORDS = 128  # XFRMA_REPLAY_ESN_MAX, 4096 packets
MAX_KEY_BITS = 8 * 512

SELECTOR_FORMAT = "16s16s8sHBBB3xiI"  # destination, source, ports, family, prefixes, protocol, ifindex, user
LIMITS_FORMAT = "8Q"
USAGE_FORMAT = "4Q"
SELECTOR = struct.Struct("=" + SELECTOR_FORMAT)
PORTS = struct.Struct("!HHHH")  # destination, its mask, source, its mask
LIMITS = struct.Struct("=" + LIMITS_FORMAT)
USAGE = struct.Struct("=" + USAGE_FORMAT)
ID = struct.Struct("=16s4sB3x")  # destination, SPI, protocol
SA = struct.Struct(f"=56s24s16s64s{USAGE_FORMAT}IIIIIHBBB7x")
SA_ID = struct.Struct("=16s4sHBx")
SA_FLUSH = struct.Struct("=B3x")
SPI_RANGE = struct.Struct("=II")
POLICY = struct.Struct(f"=56s64s{USAGE_FORMAT}IIBBBB4x")
POLICY_ID = struct.Struct("=56sIB3x")
POLICY_TYPE = struct.Struct("=BxHBx")
TEMPLATE = struct.Struct("=24sH2x16sIBBBxIII")
ACQUIRE = struct.Struct("=24s16s56s168sIIII")
EXPIRE = struct.Struct("=224sB7x")
POLICY_EXPIRE = struct.Struct("=168sB7x")
MOVE = struct.Struct("=16s16s16s16sBBHIHH")
MAPPING = struct.Struct("=24sI16s16s4s")
ENCAP = struct.Struct("=H4s2x16s")
TWO_PORTS = struct.Struct("!HH")
ALGORITHM = struct.Struct("=64sI")
ALGORITHM_ICV = struct.Struct("=64sII")  # with the ICV's length
REPLAY = struct.Struct("=IIIIII")  # words, out, in, high out, high in, window
MARK = struct.Struct("=II")
U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")
FILTER = struct.Struct("=16s16sHBB")
SAD_HINFO = struct.Struct("=II")
SPD_COUNTS = struct.Struct("=6I")

NO_LIMITS = LIMITS.pack(*(INFINITE,) * 4, 0, 0, 0, 0)


# ---- pieces ------------------------------------------------------------------------------------------------


def family_of(address: IpAddress | IpNetwork) -> int:
    return AF_INET if address.version == 4 else AF_INET6


def parse_address(data: bytes, family: int) -> IpAddress:
    """Of a 16-byte field."""
    if family == AF_INET:
        return IPv4Address(data[:4])
    if family == AF_INET6:
        return IPv6Address(data)
    raise ParseError(f"xfrm address of the family {family}")


def parse_network(data: bytes, family: int, prefix: int) -> IpNetwork:
    width = {AF_INET: 32, AF_INET6: 128}.get(family, -1)
    if prefix > width:
        raise ParseError(f"xfrm selector with a prefix of {prefix} bits in the family {family}")
    shift = width - prefix
    number = int.from_bytes(data[: width // 8], "big") >> shift << shift
    return IPv4Network((number, prefix)) if family == AF_INET else IPv6Network((number, prefix))


def build_selector(selector: v.Selector) -> bytes:
    if selector.wild:
        return SELECTOR.pack(UNSET, UNSET, bytes(8), 0, 0, 0, selector.protocol, selector.interface, 0)
    source, destination = selector.source, selector.destination
    return SELECTOR.pack(
        destination.network_address.packed,
        source.network_address.packed,
        PORTS.pack(*selector.destination_port, *selector.source_port),
        family_of(destination),
        destination.prefixlen,
        source.prefixlen,
        selector.protocol,
        selector.interface,
        0,
    )


def parse_selector(data: bytes) -> v.Selector:
    destination, source, ports, family, to_bits, from_bits, protocol, interface, _ = SELECTOR.unpack(data)
    if family == 0:
        return v.Selector(v.ANY_NETWORK, v.ANY_NETWORK, protocol, interface=interface, wild=True)
    to_port, to_mask, from_port, from_mask = PORTS.unpack(ports)
    return v.Selector(
        parse_network(source, family, from_bits),
        parse_network(destination, family, to_bits),
        protocol,
        (from_port, from_mask),
        (to_port, to_mask),
        interface,
    )


@lru_cache(maxsize=64)
def build_limits(limits: v.Limits) -> bytes:
    """0 of ours is the kernel's "infinite"; of seconds the kernel's own 0 is none."""
    counts = (limits.soft_bytes, limits.hard_bytes, limits.soft_packets, limits.hard_packets)
    return LIMITS.pack(
        *(count or INFINITE for count in counts), limits.soft_seconds, limits.hard_seconds, 0, 0
    )


def parse_limits(data: bytes) -> v.Limits:
    if data == NO_LIMITS:
        return UNLIMITED
    *counts, soft, hard, _, _ = LIMITS.unpack(data)
    finite = [0 if count == INFINITE else count for count in counts]
    return v.Limits(finite[0], finite[1], finite[2], finite[3], soft, hard)


UNLIMITED = v.Limits()


def build_spi(spi: int) -> bytes:
    return spi.to_bytes(4, "big")


def build_algorithm(kind: int, algorithm: v.Algorithm) -> bytes:
    key = algorithm.key.reveal()
    return attribute(kind, ALGORITHM.pack(algorithm.name.encode("ascii"), 8 * len(key)) + key)


def build_algorithm_icv(kind: int, algorithm: v.Algorithm) -> bytes:
    key = algorithm.key.reveal()
    head = ALGORITHM_ICV.pack(algorithm.name.encode("ascii"), 8 * len(key), algorithm.icv_bits)
    return attribute(kind, head + key)


def parse_algorithm(data: bytes | None, form: struct.Struct) -> v.Algorithm | None:
    if data is None:
        return None
    name, bits, *icv = unpack(form, data, "algorithm")
    key = data[form.size :]
    if bits > MAX_KEY_BITS or (bits + 7) // 8 > len(key):
        raise ParseError(f"xfrm algorithm with a key of {bits} bits in {len(key)} bytes")
    text = name.partition(b"\0")[0]
    if not text.isascii():
        raise ParseError("xfrm algorithm whose name is not ASCII")
    return v.Algorithm(text.decode("ascii"), Secret(key[: (bits + 7) // 8]), icv[0] if icv else 0)


def unpack(form: struct.Struct, data: bytes, what: str) -> tuple[Any, ...]:
    """Unpack the beginning of `data`, which may be longer. Raises ParseError where it is shorter."""
    if len(data) < form.size:
        raise ParseError(f"xfrm {what} of {len(data)} bytes, wants {form.size}")
    return form.unpack_from(data)
