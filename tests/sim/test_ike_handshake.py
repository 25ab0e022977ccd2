"""Handshakes between two endpoints over the in-memory router."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oepy.ike.algorithms import parse_esp_proposal, parse_ike_proposal
from oepy.ike.authentication import PrivateKey
from oepy.ike.events import (
    ChildDown,
    FailureKind,
    IkeEstablished,
    NeedPeerKey,
    Refused,
    SessionDown,
    SessionFailed,
)
from oepy.ike.settings import IkeSettings
from oepy.model import Authenticated, Endpoint, PeerIdentity, Secret, TrafficSelector
from tests.sim.ike_net import (
    ED25519_A,
    ED25519_B,
    P256,
    P384,
    Host,
    Net,
    assert_one_tunnel,
    request,
    rsa_key,
    two_hosts,
)

QUIET = IkeSettings(liveness_interval=0.0)


def failure(host: Host) -> SessionFailed:
    [event] = host.of(SessionFailed)
    assert isinstance(event, SessionFailed)
    return event


@pytest.mark.parametrize("key", [ED25519_B, P256, P384, rsa_key()], ids=["ed25519", "p256", "p384", "rsa"])
def test_a_handshake_ends_in_one_tunnel_whatever_the_kind_of_key(key: PrivateKey) -> None:
    """Both sides have one pair with mirrored SPIs and equal keys, and know the key that was proven."""
    a, b = two_hosts(key_b=key)
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    one, _ = assert_one_tunnel(a, b)
    assert one.authenticated is Authenticated.DNS
    assert one.encap
    assert one.remote == Endpoint(b.at.address, 4500)
    for host, peer in ((a, b), (b, a)):
        [established] = host.of(IkeEstablished)
        assert isinstance(established, IkeEstablished)
        assert established.key == peer.public[0]
        assert host.ike.counters["half_open"] == 0


@pytest.mark.parametrize(
    "proposal",
    [
        f"{cipher}-{prf}-{group}"
        for cipher in ("aes256gcm16", "aes128gcm16", "chacha20poly1305", "aes256-sha384", "aes128-sha512")
        for prf, group in (("prfsha256", "ecp256"), ("prfsha512", "ecp384"), ("prfsha384", "x25519"))
    ],
)
def test_every_ike_suite_works(proposal: str) -> None:
    """Each cipher, PRF and group that can be configured carries a handshake and a rekey."""
    a, b = two_hosts(replace(QUIET, ike_offers=(parse_ike_proposal(proposal),)))
    net = Net([a, b])
    session = a.ike.initiate(request(a, b), net.now)
    net.run(5)
    assert_one_tunnel(a, b)
    a.ike.rekey_ike(session, net.now)
    net.run(5)
    assert a.ike.counters["ike_rekeyed"] == b.ike.counters["ike_rekeyed"] == 1


@pytest.mark.parametrize(
    "proposal", ["aes128gcm16-noesn", "chacha20poly1305-esn", "aes256-sha512", "null-sha256"]
)
def test_every_esp_suite_gives_keys_of_its_size(proposal: str) -> None:
    """The pair names the suite that was proposed, with ESN as agreed."""
    a, b = two_hosts()
    net = Net([a, b])
    offers = (parse_esp_proposal(proposal),)
    b.settings = a.settings
    object.__setattr__(b.settings, "esp_offers", offers)
    a.ike.initiate(request(a, b, esp_offers=offers), net.now)
    net.run(5)
    one, _ = assert_one_tunnel(a, b)
    assert proposal.startswith(str(one.suite).removesuffix("-esn"))
    assert one.suite.esn == ("noesn" not in proposal)
    sizes = {"aes128gcm16": 20, "chacha20poly1305": 36, "aes256": 32, "null": 0}
    assert len(one.keys_in.encryption) == sizes[one.suite.encryption]


@pytest.mark.parametrize("seed", range(25))
def test_a_lossy_network_changes_nothing_but_the_time(seed: int) -> None:
    """With 30 % loss, duplicates and reordering each handshake ends in exactly one tunnel on both sides."""
    a, b = two_hosts()
    b.delay = 0.05 if seed % 2 else 0.0
    net = Net([a, b], seed, loss=0.3, copies=0.3, delay=0.05)
    a.ike.initiate(request(a, b, retransmission=replace(QUIET.established, total=60.0)), net.now)
    net.run(60)
    assert_one_tunnel(a, b)
    assert len(a.established()) == len(b.established()) == 1


def test_the_wrong_group_first_costs_one_round_trip() -> None:
    """A responder without X25519 asks for P-256 and gets it, before it has a session."""
    a, b = two_hosts()
    b.settings = replace(QUIET, ike_offers=(parse_ike_proposal("aes256gcm16-prfsha256-ecp256"),))
    b.__post_init__()
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    assert_one_tunnel(a, b)
    assert b.ike.counters["invalid_ke"] == 1
    assert a.ike.sessions()[0].suite == "aes256gcm16-prfsha256-ecp256"


def test_cookies_are_demanded_before_there_is_a_session() -> None:
    """With threshold 0 the first request gets a cookie and leaves nothing behind; the second goes through."""
    a, b = two_hosts(replace(QUIET, cookie_threshold=0))
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    assert_one_tunnel(a, b)
    assert b.ike.counters["cookies_sent"] == 1


def test_an_impostor_fails_its_proof() -> None:
    """A responder with another key than the published: PROOF_FAILED here, and the peer hears of it."""
    a, b = two_hosts()
    net = Net([a, b])
    a.ike.initiate(request(a, b, remote_keys=a.public), net.now)
    net.run(5)
    assert failure(a).kind is FailureKind.PROOF_FAILED
    assert not a.pairs
    assert not b.pairs
    assert not a.ike.sessions()
    assert not b.ike.sessions()


def test_our_own_wrong_proof_is_a_rejection() -> None:
    """The responder knows another key of us: REJECTED with AUTHENTICATION_FAILED, PROOF_FAILED over there."""
    a, b = two_hosts()
    b.keys[a.address] = list(b.public)
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    assert failure(a).kind is FailureKind.REJECTED
    assert failure(a).notify == "AUTHENTICATION_FAILED"
    assert failure(b).kind is FailureKind.PROOF_FAILED
    assert not b.ike.sessions()


def test_a_peer_without_a_key_record_is_refused() -> None:
    """No key for the identity: the initiator hears AUTHENTICATION_FAILED, nothing stays."""
    a, b = two_hosts()
    b.keys.clear()
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    assert failure(a).notify == "AUTHENTICATION_FAILED"
    assert failure(b).kind is FailureKind.REFUSED
    assert not a.ike.sessions()
    assert not b.ike.sessions()


def test_all_published_keys_are_tried() -> None:
    """Key roll-over: the right key may be the second one, on both sides."""
    a, b = two_hosts()
    b.keys[a.address] = [*b.public, *a.public]
    net = Net([a, b])
    a.ike.initiate(request(a, b, remote_keys=(*a.public, *b.public)), net.now)
    net.run(5)
    assert_one_tunnel(a, b)


def test_a_null_initiator_is_nobody_and_verifies_the_responder() -> None:
    """RFC 7619: the responder sees NULL whatever was claimed, the initiator knows the responder's key."""
    a, b = two_hosts()
    a.key = None
    net = Net([a, b])
    a.ike.initiate(request(a, b, own_auth="null"), net.now)
    net.run(5)
    one, two = assert_one_tunnel(a, b)
    assert one.authenticated is Authenticated.DNS
    assert two.authenticated is Authenticated.NULL
    assert two.peer == PeerIdentity.null()


def test_a_null_initiator_can_be_unwelcome() -> None:
    """allow_null_initiator False answers AUTHENTICATION_FAILED."""
    a, b = two_hosts(replace(QUIET, allow_null_initiator=False))
    net = Net([a, b])
    a.ike.initiate(request(a, b, own_auth="null"), net.now)
    net.run(5)
    assert failure(a).notify == "AUTHENTICATION_FAILED"
    assert not b.pairs


def test_a_null_responder_is_no_proof_where_a_key_is_expected() -> None:
    """A peer that answers with AUTH NULL although its key is published fails its proof."""
    a, b = two_hosts(replace(QUIET, own_auth="null"))
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    assert failure(a).kind is FailureKind.PROOF_FAILED


@pytest.mark.parametrize("right", [True, False])
def test_pre_shared_keys(right: bool) -> None:
    """The same secret makes a tunnel, another one fails cleanly on both sides."""
    a, b = two_hosts()
    b.psks["alpha.example"] = Secret(b"correct horse")
    net = Net([a, b])
    secret = Secret(b"correct horse" if right else b"battery staple")
    changes = {
        "own_auth": "psk",
        "psk": secret,
        "remote_keys": (),
        "identity": PeerIdentity.parse("alpha.example"),
    }
    a.ike.initiate(request(a, b, **changes), net.now)
    net.run(5)
    if right:
        one, two = assert_one_tunnel(a, b)
        assert one.authenticated is two.authenticated is Authenticated.PSK
    else:
        assert failure(a).notify == "AUTHENTICATION_FAILED"
        assert failure(b).kind is FailureKind.PROOF_FAILED
        assert not b.ike.sessions()


def test_refused_selectors_leave_nothing_behind() -> None:
    """TS_UNACCEPTABLE ends the IKE SA on both sides, as a rejection and not as a failed proof."""
    a, b = two_hosts()
    b.refuse = Refused("not here")
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    assert failure(a).kind is FailureKind.REJECTED
    assert failure(a).notify == "TS_UNACCEPTABLE"
    assert not a.ike.sessions()
    assert not b.ike.sessions()
    assert b.of(SessionDown)


def test_the_responder_narrows() -> None:
    """Both sides use the narrowed selectors of the responder's policy."""
    a, b = two_hosts()
    net = Net([a, b])
    everything = (TrafficSelector.of(a.at.address), TrafficSelector.of(Endpoint(b.at.address, 0).address))
    host = b.reply
    b.reply = lambda question: (  # type: ignore[method-assign]
        replace(answer, local_ts=b.selector) if hasattr(answer := host(question), "local_ts") else answer
    )
    a.ike.initiate(request(a, b, remote_ts=everything), net.now)
    net.run(5)
    one, _ = assert_one_tunnel(a, b)
    assert one.remote_ts == b.selector


def test_a_silent_peer_is_given_up_in_time() -> None:
    """Nobody there: SILENT after the schedule's total, and not a datagram later."""
    a, b = two_hosts()
    net = Net([a])
    start = net.now
    a.ike.initiate(request(a, b), net.now)
    net.run(60)
    assert failure(a).kind is FailureKind.SILENT
    sent = [moment - start for moment, *_ in net.carried]
    assert sent == pytest.approx([0, 0.5, 1.4, 3.02, 5.936], abs=0.01)
    assert not a.ike.sessions()


def test_a_slow_key_lookup_suspends_and_absorbs_retransmissions() -> None:
    """While the daemon looks for the key, repeated requests neither ask again nor disturb."""
    a, b = two_hosts()
    b.delay = 2.0
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(30)
    assert_one_tunnel(a, b)
    assert len(b.of(NeedPeerKey)) == 1
    assert b.ike.counters["retransmits_absorbed"] >= 1


def test_a_host_that_moves_to_another_identity_is_noticed() -> None:
    """expected_identity: the right key under another name is no proof."""
    a, b = two_hosts()
    net = Net([a, b])
    a.ike.initiate(request(a, b, expected_identity=PeerIdentity.parse("other.example")), net.now)
    net.run(5)
    assert failure(a).kind is FailureKind.PROOF_FAILED
    assert not a.of(ChildDown)


def test_long_messages_go_in_fragments() -> None:
    """With a fragment size of 200 bytes no protected datagram is longer, and loss doesn't hurt."""
    a, b = two_hosts(replace(QUIET, fragment_size=200), key_a=rsa_key(), key_b=ED25519_A)
    net = Net([a, b], 3, loss=0.2)
    a.ike.initiate(request(a, b, retransmission=replace(QUIET.established, total=60.0)), net.now)
    net.run(60)
    assert_one_tunnel(a, b)
    protected = [data for _, _, target, data in net.carried if target.port == 4500]
    assert len(protected) > 4
    assert max(map(len, protected)) <= 200
