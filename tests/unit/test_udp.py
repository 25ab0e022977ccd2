"""What a datagram on port 4500 is, and sockets that answer from the address they were asked at."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from oepy.errors import OepyError
from oepy.model import Endpoint
from oepy.udp import IkeSockets, Kind, classify, open_socket, received_at, source_ancillary


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (bytes(4) + b"ike", Kind.IKE),
        (bytes(4), Kind.IKE),
        (b"\xff", Kind.KEEPALIVE),
        (b"\xff\xff", Kind.ESP),
        (b"\x00\x00\x00\x01" + bytes(20), Kind.ESP),
        (b"", Kind.ESP),
        (bytes(3), Kind.ESP),
    ],
)
def test_datagrams_are_told_apart(data: bytes, kind: Kind) -> None:
    """RFC 3948 §2: four zero bytes are IKE, one 0xff is a keepalive, all else is ESP (or for its parser)."""
    assert classify(data) is kind
    assert classify(memoryview(data)) is kind


@pytest.mark.root
@pytest.mark.parametrize("loopback", ["127.0.0.1", "::1"])
def test_addresses_and_marker_on_both_ports(loopback: str) -> None:
    """On loopback: the destination is known, the marker is added and stripped, keepalives are skipped."""
    address = ip_address(loopback)
    ike, nat_t = open_socket(address.version, 0), open_socket(address.version, 0)
    sockets = IkeSockets([ike], [nat_t])
    here, there = Endpoint(address, ike.port), Endpoint(address, nat_t.port)
    assert sockets.send(b"a", here, here)
    datagram = sockets.receive(ike)
    assert datagram is not None
    assert (datagram.data, datagram.local, datagram.remote) == (b"a", here, here)
    assert sockets.keepalive(there, there)
    assert sockets.send(b"b", there, there)
    datagram = sockets.receive(nat_t)
    assert datagram is not None
    assert (datagram.data, datagram.local, datagram.remote) == (b"b", there, there)
    assert sockets.receive(nat_t) is None
    nat_t.send(b"c", address, there)
    assert nat_t.receive().data == b"c"  # type: ignore[union-attr]
    assert not sockets.send(b"x", Endpoint(address, 1), here)
    assert not sockets.send(
        b"x", here, Endpoint(ip_address("192.0.2.1" if address.version == 6 else "::1"), 1)
    )
    with pytest.raises(OepyError, match="is taken"):
        open_socket(address.version, ike.port)
    sockets.close()


@pytest.mark.parametrize("text", ["192.0.2.1", "2001:db8::1"])
def test_the_source_to_use_is_not_the_destination_seen(text: str) -> None:
    """struct in_pktinfo has both; in6_pktinfo has one field for them."""
    seen = received_at(source_ancillary(ip_address(text)))
    assert seen == (ip_address(text) if ":" in text else ip_address("0.0.0.0"))
    assert received_at([]) is None
    assert received_at([(0, 8, b"short")]) is None
