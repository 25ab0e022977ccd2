"""Which addresses are this host's own: asked of the kernel, true from the moment an address is there."""

from __future__ import annotations

import time
from ipaddress import ip_address

import pytest

from oepy.daemon.addresses import is_own, own_addresses, source_towards
from oepy.lab.namespaces import Lab

pytestmark = pytest.mark.root


def test_own_addresses_follow_the_kernel_at_once() -> None:
    """An address is own as soon as it is added and no longer when it is removed; foreign and unrouted ones
    never are; loopback is not among the addresses that a record can stand for."""
    with Lab() as lab:
        host, peer = lab.namespace("host"), lab.namespace("peer")
        lab.veth(host, peer)
        host.address("eth0", "198.18.0.1/24", "2001:2::1/64")
        with host.entered():
            deadline = time.monotonic() + 5
            while not is_own(ip_address("2001:2::1")):  # of IPv6 the kernel makes the route in a work queue
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert own_addresses() == {ip_address("198.18.0.1"), ip_address("2001:2::1")}
            for text, own in (
                ("198.18.0.1", True),
                ("2001:2::1", True),
                ("127.0.0.1", True),
                ("198.18.0.2", False),
                ("198.18.0.255", False),
                ("203.0.113.1", False),
                ("2001:db8::1", False),
            ):
                assert is_own(ip_address(text)) is own, text
            host.address("eth0", "198.18.0.2/24")
            assert is_own(ip_address("198.18.0.2"))
            host.ip("address", "del", "198.18.0.2/24", "dev", "eth0")
            assert not is_own(ip_address("198.18.0.2"))
            assert source_towards(ip_address("198.18.0.9")) == ip_address("198.18.0.1")
            assert source_towards(ip_address("203.0.113.1")) is None
