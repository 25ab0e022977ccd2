"""A peer that speaks as libreswan 4.10 was seen to speak: its proposals, groups, signatures and fragments."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from oepy.ike.algorithms import ENCRYPTIONS, ESN_NO, ESN_YES, INTEGRITIES, PRFS, Offer, to_proposals
from oepy.ike.events import IkeEstablished, NeedSignature, Question
from oepy.ike.header import FLAG_INITIATOR, Exchange, Header, PayloadType, parse_header
from oepy.ike.message import build_plain
from oepy.ike.notify import NotifyType
from oepy.ike.payload_sa import SaPayload, Transform, TransformType, build_sa
from oepy.ike.payloads import Notify, build_ke, notify, parse_chain
from oepy.ike.settings import IkeSettings
from oepy.model import Authenticated, IdType
from tests.sim.ike_net import Host, Net, assert_one_tunnel, request, rsa_key, two_hosts

GROUPS_IN_ORDER = (14, 15, 16, 18, 19, 20, 21, 31)
PSS_SHA512 = bytes.fromhex(
    "304106092a864886f70d01010a3034a00f300d06096086480165030402030500"
    "a11c301a06092a864886f70d010108300d06096086480165030402030500a203020140"
)


def offers(groups: tuple[int, ...]) -> tuple[Offer, ...]:
    """AES-GCM-256, AES-GCM-128, AES-CBC-256, AES-CBC-128, each with PRF SHA2-512 and SHA2-256."""
    made = []
    for cipher in ("aes256gcm16", "aes128gcm16", "aes256", "aes128"):
        offer: Offer = {
            TransformType.ENCR: (ENCRYPTIONS[cipher],),
            TransformType.PRF: (PRFS["prfsha512"], PRFS["prfsha256"]),
        }
        if not cipher.endswith("gcm16"):
            offer[TransformType.INTEG] = (INTEGRITIES["sha512"], INTEGRITIES["sha256"])
        offer[TransformType.KE] = tuple(Transform(TransformType.KE, group) for group in groups)
        made.append(offer)
    return tuple(made)


def esp_offers() -> tuple[Offer, ...]:
    """GCM first, no key exchange, ESN yes then no."""
    made: list[Offer] = []
    for cipher in ("aes256gcm16", "aes128gcm16", "aes256", "aes128"):
        offer: Offer = {TransformType.ENCR: (ENCRYPTIONS[cipher],), TransformType.ESN: (ESN_YES, ESN_NO)}
        if not cipher.endswith("gcm16"):
            offer[TransformType.INTEG] = (INTEGRITIES["sha512"], INTEGRITIES["sha256"])
        made.append(offer)
    return tuple(made)


class Libreswan(Host):
    def reply(self, question: Question) -> object:
        if not isinstance(question, NeedSignature):
            return super().reply(question)
        digest = hashes.SHA512()
        signature = rsa_key().sign(question.data, padding.PSS(padding.MGF1(digest), 64), digest)
        return 14, bytes((len(PSS_SHA512),)) + PSS_SHA512 + signature


@pytest.mark.parametrize(
    ("groups", "wanted"), [(GROUPS_IN_ORDER, 31), (GROUPS_IN_ORDER[:-1], 19), ((14, 20), 20), ((14, 15), 0)]
)
def test_a_first_key_share_in_group_14_is_told_a_group_that_we_know(
    groups: tuple[int, ...], wanted: int
) -> None:
    """INVALID_KE_PAYLOAD names the best group of the proposals, without any state; without one,
    NO_PROPOSAL_CHOSEN."""
    a, b = two_hosts()
    payloads = [
        (PayloadType.SA, build_sa(SaPayload(to_proposals(offers(groups), b"")))),
        (PayloadType.KE, build_ke(14, b"\x07" * 256)),
        (PayloadType.NONCE, b"n" * 32),
        notify(NotifyType.FRAGMENTATION_SUPPORTED),
    ]
    header = Header(b"LIBRESWN", bytes(8), 0, 0x20, Exchange.IKE_SA_INIT, FLAG_INITIATOR, 0)
    b.ike.receive(build_plain(header, payloads), b.at, a.at, 1.0)
    [answer] = [datagram.data for datagram in b.ike.datagrams()]
    chain = parse_chain(answer, parse_header(answer).next_payload, 28)
    [said] = chain.parsed[PayloadType.NOTIFY]
    assert isinstance(said, Notify)
    if wanted:
        assert (said.type, said.data) == (NotifyType.INVALID_KE_PAYLOAD, wanted.to_bytes(2, "big"))
    else:
        assert said.type == NotifyType.NO_PROPOSAL_CHOSEN
    assert parse_header(answer).spi_i == b"LIBRESWN"
    assert b.ike.sessions() == []


@pytest.mark.parametrize("auth", ["null", "pubkey"])
def test_its_second_ike_sa_init_leads_to_a_tunnel(auth: str) -> None:
    """ID_NULL with AUTH NULL, or method 14 with RSASSA-PSS/SHA2-512, in fragments of 540 bytes."""
    _, b = two_hosts()
    settings = IkeSettings(liveness_interval=0.0, fragment_size=540, force_encap=False)
    groups = (31, *GROUPS_IN_ORDER[:-1])
    settings = replace(settings, ike_offers=offers(groups), esp_offers=esp_offers())
    a = Libreswan("a", "192.0.2.1", rsa_key(), settings, 1)
    b.keys[a.address] = list(a.public)
    net = Net([a, b])
    a.ike.initiate(request(a, b, own_auth=auth), net.now)
    net.run(5)
    one, _ = assert_one_tunnel(a, b)
    assert str(one.suite) == "aes256gcm16-esn"
    [established] = b.of(IkeEstablished)
    assert isinstance(established, IkeEstablished)
    wanted = (Authenticated.NULL, IdType.NULL) if auth == "null" else (Authenticated.DNS, IdType.IPV4_ADDR)
    assert (established.authenticated, established.identity.type) == wanted
    sent = [data for _, source, _, data in net.carried if source.address == a.at.address]
    pieces = [data for data in sent if parse_header(data).next_payload == PayloadType.SKF]
    assert len(pieces) > 1 or auth == "null"
    assert all(len(data) <= 540 for data in pieces)
