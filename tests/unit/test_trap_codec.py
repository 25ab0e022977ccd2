"""The trap's netlink codecs: known bytes, both ways, and what happens with broken ones."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.errors import ParseError
from oepy.trap import netlink as nl
from oepy.trap import queue, tables


def test_a_verdict_is_these_bytes() -> None:
    """NFQNL_MSG_VERDICT for packet 7 of queue 5, accept, mark 0x10000000 (nfnetlink_queue.h)."""
    expected = (
        struct.pack("=IHHII", 40, 0x0301, 1, 0, 0)
        + bytes.fromhex("00000005")  # family, version, queue
        + struct.pack("=HH", 12, 2)
        + bytes.fromhex("0000000100000007")
        + struct.pack("=HH", 8, 3)
        + bytes.fromhex("10000000")
    )
    assert queue.verdict(5, 7, queue.ACCEPT, 0x10000000) == expected


def test_a_set_element_is_these_bytes() -> None:
    """NFT_MSG_NEWSETELEM, one IPv4 key that lives 1.5 s (linux/netfilter/nf_tables.h)."""
    nested = 0x8000
    key = struct.pack("=HH", 12, 1 | nested) + struct.pack("=HH", 8, 1) + bytes((192, 0, 2, 1))
    timeout = struct.pack("=HH", 12, 4) + (1500).to_bytes(8, "big")
    element = struct.pack("=HH", 28, 1 | nested) + key + timeout
    names = struct.pack("=HH", 9, 1) + b"oepy\0" + bytes(3) + struct.pack("=HH", 11, 2) + b"clear4\0" + b"\0"
    body = bytes((1, 0, 0, 0)) + names + struct.pack("=HH", 4 + len(element), 3 | nested) + element
    expected = struct.pack("=IHHII", 16 + len(body), 0x0A0C, 0x401, 0, 0) + body
    assert tables.add_elements("oepy", "clear4", [tables.element(bytes((192, 0, 2, 1)), 1.5)]) == expected


def test_the_xt_target_is_these_bytes() -> None:
    """`target` NFQUEUE revision 3 with struct xt_NFQ_info_v3 in host order, padded to 8."""
    rule = tables.insert_queue_rule("oepy", "ask_open", 17733, bypass=True, native=False)
    assert struct.pack("=HHHH", 17733, 1, 1, 0) in rule
    assert b"NFQUEUE\0" in rule
    native = tables.insert_queue_rule("oepy", "ask_open", 17733, bypass=False, native=True)
    assert b"queue\0" in native
    assert struct.pack("!H", 17733) in native


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=60), max_size=8))
def test_attributes_come_back(values: dict[int, bytes]) -> None:
    """Built and parsed, with any padding; nested ones by the same number."""
    assert (
        nl.parse_attributes(b"".join(nl.attribute(kind, value) for kind, value in values.items())) == values
    )
    assert nl.parse_attributes(b"".join(nl.nested(kind, value) for kind, value in values.items())) == values


@given(st.integers(0, 0xFFFF), st.binary(max_size=40), st.integers(0, 255), st.integers(0, 0xFFFF))
def test_messages_come_back(kind: int, body: bytes, family: int, resource: int) -> None:
    """Several in one datagram, apart from the kinds that netlink itself uses."""
    if kind in (nl.NLMSG_ERROR, nl.NLMSG_DONE):
        return
    padded = body + bytes(-len(body) & 3)
    one = nl.message(kind, 0, padded, family=family, resource=resource, sequence=9)
    parsed = list(nl.parse_messages(one + one))
    assert parsed == [nl.Message(kind, 1, 9, family, resource, padded)] * 2


@given(
    st.integers(0, 0xFFFF),
    st.integers(0, 2**32 - 1),
    st.integers(0, 4),
    st.binary(max_size=60),
    st.integers(0, 2**32 - 1),
)
def test_queued_packets_come_back(number: int, packet_id: int, hook: int, payload: bytes, mark: int) -> None:
    """A packet as the kernel sends it, cut off with its real length beside."""
    body = (
        nl.attribute(1, struct.pack("!IHB", packet_id, 0x0800, hook))
        + nl.u32(3, mark)
        + nl.u32(13, 5000)
        + nl.attribute(10, payload)
    )
    (message,) = nl.parse_messages(nl.message(queue.MSG_PACKET, 0, body, resource=number))
    assert queue.parse_packet(message) == queue.QueuedPacket(number, packet_id, hook, mark, 5000, payload)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_parse_error_or_messages(data: bytes) -> None:
    """Parse, or ParseError, never anything else, and never without end."""
    try:
        for message in nl.parse_messages(data):
            queue.parse_packet(message)
            tables.table_userdata(message)
    except ParseError:
        pass


@pytest.mark.parametrize(
    "data", [b"\0" * 16, struct.pack("=IHHII", 15, 2, 0, 0, 0), b"\1", struct.pack("=IHHII", 17, 2, 0, 0, 0)]
)
def test_lengths_that_do_not_fit_are_refused(data: bytes) -> None:
    """0, less than the header, and more than there is."""
    with pytest.raises(ParseError):
        list(nl.parse_messages(data))


def test_an_attribute_of_length_0_is_refused() -> None:
    """It would be a loop without end."""
    with pytest.raises(ParseError):
        nl.parse_attributes(bytes(8))


def test_errors_carry_their_number() -> None:
    """NLMSG_ERROR has -errno in host order."""
    data = struct.pack("=IHHII", 20, nl.NLMSG_ERROR, 0, 3, 0) + struct.pack("=i", -17)
    (message,) = nl.parse_messages(data)
    assert (message.error, message.sequence) == (17, 3)
