"""Who sees our IKE_SA_INIT can forge answers to it, for nothing protects them. None of them may end, weaken or
turn a negotiation while the true peer answers as well (RFC 7296 §2.21.1)."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from oepy.errors import KeyFormatError
from oepy.ike.authentication import (
    _ECDSA_IDENTIFIERS,
    _PKCS1_IDENTIFIERS,
    _PSS_IDENTIFIERS,
    ED25519_IDENTIFIER,
    sign_auth,
    verify_auth,
)
from oepy.ike.events import FailureKind, SessionFailed
from oepy.ike.header import FLAG_RESPONSE, Exchange, Header, PayloadType, parse_header
from oepy.ike.message import build_plain
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import Payload, build_ke, notify
from oepy.ike.settings import IkeSettings
from oepy.keys import to_public_key
from oepy.model import Endpoint, KeyAlgorithm, PublicKey
from tests.sim.ike_net import ED25519_A, P256, P384, Host, Net, assert_one_tunnel, request, two_hosts

QUIET = IkeSettings(liveness_interval=0.0)


def answer_to(data: bytes, payloads: list[Payload], spi_r: bytes = b"\x66" * 8) -> bytes:
    header = Header(parse_header(data).spi_i, spi_r, 0, 0x20, Exchange.IKE_SA_INIT, FLAG_RESPONSE, 0)
    return build_plain(header, payloads)


class Forger:
    """Answers each IKE_SA_INIT of `a` before `b` can."""

    def __init__(self, a: Host, b: Host, net: Net, payloads: list[Payload]) -> None:
        self.a, self.b, self.net, self.payloads = a, b, net, payloads
        self.forged = 0
        net.filter = self.see

    def see(self, source: Endpoint, target: Endpoint, data: bytes) -> bool:
        header = parse_header(data)
        if source == self.a.at and header.exchange == Exchange.IKE_SA_INIT and not header.is_response:
            self.forged += 1
            self.net.at(self.net.now + 0.001, lambda: self.throw(answer_to(data, self.payloads)))
        return True

    def throw(self, forged: bytes) -> None:
        self.a.ike.receive(forged, self.a.at, self.b.at, self.net.now)
        self.net.flush(self.a)


FORGERIES: dict[str, list[Payload]] = {
    "no proposal": [notify(NotifyType.NO_PROPOSAL_CHOSEN)],
    "syntax": [notify(NotifyType.INVALID_SYNTAX)],
    "version": [notify(NotifyType.INVALID_MAJOR_VERSION)],
    "authentication": [notify(NotifyType.AUTHENTICATION_FAILED)],
    "unknown error": [notify(8191)],
    "other group that we offer": [notify(NotifyType.INVALID_KE_PAYLOAD, b"\x00\x13")],
    "group that we do not offer": [notify(NotifyType.INVALID_KE_PAYLOAD, b"\x00\x02")],
    "no group": [notify(NotifyType.INVALID_KE_PAYLOAD, b"")],
    "cookie": [notify(NotifyType.COOKIE, b"a cookie that nobody baked")],
    "long cookie": [notify(NotifyType.COOKIE, bytes(65))],
    "empty": [],
    "half an answer": [(PayloadType.NONCE, bytes(32)), (PayloadType.KE, build_ke(31, bytes(32)))],
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_answer_to_ike_sa_init_ends_nothing(name: str) -> None:
    """The tunnel comes up all the same, in a group that we offered, and no failure is told."""
    a, b = two_hosts(QUIET)
    net = Net([a, b])
    forger = Forger(a, b, net, FORGERIES[name])
    a.ike.initiate(request(a, b), net.now)
    net.run(20)
    assert forger.forged
    assert_one_tunnel(a, b)
    assert not a.of(SessionFailed)
    wanted = {"x25519", "ecp256"} if name == "other group that we offer" else {"x25519"}
    assert wanted & set(a.ike.sessions()[0].suite.split("-"))


def test_a_broken_copy_of_the_true_answer_ends_nothing() -> None:
    """A public value that is none, or a suite that was not proposed, is no answer; the true one follows."""
    a, b = two_hosts(QUIET)
    net = Net([a, b])

    def spoil(source: Endpoint, target: Endpoint, data: bytes) -> bool:
        if source == b.at and parse_header(data).exchange == Exchange.IKE_SA_INIT:
            start = data.index(b"\0\x28\0\x1f\0\0") + 6  # behind length and group of the KE payload
            a.ike.receive(data[:start] + bytes(32) + data[start + 32 :], a.at, b.at, net.now)
            a.ike.receive(data[:8] + bytes(8) + data[16:], a.at, b.at, net.now)
        return True

    net.filter = spoil
    a.ike.initiate(request(a, b), net.now)
    net.run(20)
    assert_one_tunnel(a, b)
    assert a.ike.counters["malformed"] >= 2


def test_a_true_refusal_is_believed_after_a_short_wait() -> None:
    """With nothing better within `refusal_patience` the negotiation ends as rejected, with the notify."""
    a, b = two_hosts(QUIET)
    net = Net([a, b])
    Forger(a, b, net, [notify(NotifyType.NO_PROPOSAL_CHOSEN)])
    see = net.filter
    net.filter = lambda source, target, data: see(source, target, data) and False
    a.ike.initiate(request(a, b), net.now)
    net.run(QUIET.refusal_patience - 0.1)
    assert not a.of(SessionFailed)
    net.run(0.2)
    [failed] = a.of(SessionFailed)
    assert isinstance(failed, SessionFailed)
    assert failed.kind is FailureKind.REJECTED
    assert failed.notify == "NO_PROPOSAL_CHOSEN"
    assert not a.ike.sessions()


def test_endless_demands_end() -> None:
    """A peer that asks again and again, by cookie or group, is asked a few times and then given up."""
    a, b = two_hosts(QUIET)
    net = Net([a, b])
    forger = Forger(a, b, net, FORGERIES["cookie"])
    see = net.filter
    net.filter = lambda source, target, data: see(source, target, data) and False
    a.ike.initiate(request(a, b), net.now)
    net.run(60)
    assert len(a.of(SessionFailed)) == 1
    assert forger.forged < 40
    assert not a.ike.sessions()


def test_our_own_request_thrown_back_begins_nothing() -> None:
    """Reflected, in both directions and to both ports: no session with ourselves."""
    a, b = two_hosts(replace(QUIET, own_auth="null"))
    net = Net([a, b])
    net.filter = lambda *_: False
    a.ike.initiate(request(a, b, own_auth="null", accept_null=True), net.now)
    net.flush(a)
    data = net.carried[0][3]
    for remote in (b.at, a.at, Endpoint(b.at.address, 4500)):
        a.ike.receive(data, a.at, remote, net.now)
    assert a.ike.counters["reflected"] == 3
    assert len(a.ike.sessions()) == 1
    assert a.ike.datagrams() == []


@pytest.fixture(scope="module")
def short_rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 1024)


def test_a_peer_cannot_make_a_short_rsa_key_fail(short_rsa: rsa.RSAPrivateKey) -> None:
    """1024 bits hold no RSASSA-PSS with SHA2-512: another hash where there is one, else a refusal of our
    kind and not the library's ValueError."""
    with pytest.raises(KeyFormatError):
        sign_auth(short_rsa, b"octets", {4})
    method, proof = sign_auth(short_rsa, b"octets", {4, 3})
    public = to_public_key(short_rsa.public_key())
    assert verify_auth([public], method, proof, b"octets") == public


def _signature_octets() -> list[bytes]:
    endings = (b"", b"0", b"\x30\x80", b"\x30\x84" + b"\xff" * 4, b"\xff" * 128, bytes(64), b"\xff" * 64)
    zeros = (bytes.fromhex("3006020100020100"), bytes.fromhex("300602010102010000"))
    return [*endings, *zeros, *(bytes(n) for n in (1, 127, 128, 129))]


@pytest.mark.parametrize("method", [0, 1, 2, 9, 10, 11, 12, 13, 14, 255])
def test_malformed_proofs_prove_nothing_and_raise_nothing(method: int, short_rsa: rsa.RSAPrivateKey) -> None:
    """Every method with every kind of key: empty, cut-off, all-zero and all-one signatures, broken DER, an
    identifier longer than the proof."""
    keys = [to_public_key(key.public_key()) for key in (short_rsa, P256, P384, ED25519_A)]
    identifiers = [b"", *_ECDSA_IDENTIFIERS, *_PKCS1_IDENTIFIERS, *_PSS_IDENTIFIERS, ED25519_IDENTIFIER]
    for signature in _signature_octets():
        for identifier in identifiers:
            for data in (signature, bytes((len(identifier),)) + identifier + signature, b"\xff" + signature):
                assert verify_auth(keys, method, data, b"octets", allow_sha1=True) is None


@pytest.mark.parametrize("exponent", [0, 1, 2, 4, 65536])
def test_rsa_keys_whose_exponent_proves_nothing_are_not_used(
    exponent: int, short_rsa: rsa.RSAPrivateKey
) -> None:
    """With exponent 1 everybody can sign: the signature is the padded digest itself."""
    modulus = short_rsa.public_key().public_numbers().n
    data = b"\x03" + exponent.to_bytes(3, "big") + modulus.to_bytes(128, "big")
    prefix = bytes.fromhex("3031300d060960864801650304020105000420")
    padded = b"\x00\x01" + b"\xff" * 74 + b"\x00" + prefix + hashlib.sha256(b"octets").digest()
    key = PublicKey(KeyAlgorithm.RSA, data)
    identifier = next(iter(_PKCS1_IDENTIFIERS))
    for method, proof in ((1, padded), (14, bytes((len(identifier),)) + identifier + padded)):
        assert verify_auth([key], method, proof, b"octets") is None
