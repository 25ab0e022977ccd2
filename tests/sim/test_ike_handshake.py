"""Handshakes between two endpoints over the in-memory router."""

from __future__ import annotations

import pytest
from oepy.ike.authentication import PrivateKey
from oepy.ike.events import IkeEstablished
from oepy.model import Authenticated

from tests.sim.ike_net import ED25519_B, P256, P384, Net, assert_one_tunnel, request, rsa_key, two_hosts


@pytest.mark.parametrize("key", [ED25519_B, P256, P384, rsa_key()], ids=["ed25519", "p256", "p384", "rsa"])
def test_a_handshake_ends_in_one_tunnel_whatever_the_kind_of_key(key: PrivateKey) -> None:
    """Both sides have one pair with mirrored SPIs and equal keys, and know the key that was proven."""
    a, b = two_hosts(key_b=key)
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    one, _ = assert_one_tunnel(a, b)
    assert one.authenticated is Authenticated.DNS
    for host, peer in ((a, b), (b, a)):
        [established] = host.of(IkeEstablished)
        assert isinstance(established, IkeEstablished)
        assert established.key == peer.public[0]
