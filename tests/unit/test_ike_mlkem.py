"""ML-KEM by NIST's known answers; the key schedule of RFC 9242 and RFC 9370 computed once more by plain HMAC."""

from __future__ import annotations

import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from oepy.errors import ParseError, UsageError
from oepy.ike import followup, handshake, ike_rekey, intermediate
from oepy.ike.algorithms import ike_suite, parse_esp_proposal, parse_ike_proposal
from oepy.ike.events import NeedSignature
from oepy.ike.header import Exchange, parse_header
from oepy.ike.key_exchange import generate, respond
from oepy.ike.payloads import build_id
from oepy.ike.settings import IkeSettings
from tests.sim.ike_net import Net, assert_one_tunnel, identity, request, two_hosts

# Of the known answers for FIPS 203 that cryptography is tested with, the first of each size. `ct_n` is not a
# ciphertext of this key: its secret is the one of implicit rejection.
VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "mlkem.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["size"]))
def test_known_answers(vector: dict[str, Any]) -> None:
    """Key generation from a seed, decapsulation, implicit rejection."""
    value = {name: bytes.fromhex(text) for name, text in vector.items() if name != "size"}
    name = f"mlkem{vector['size']}"
    share = generate(name, lambda size: (value["d"] + value["z"])[:size])
    assert share.public == value["pk"]
    assert share.shared_secret(value["ct"]) == value["ss"]
    assert share.shared_secret(value["ct_n"]) == value["ss_n"]
    answer, secret = respond(name, share.public, bytes)
    assert share.shared_secret(answer) == secret
    assert len(answer) == len(value["ct"])
    for wrong in (answer[:-1], answer + b"\0", b""):
        with pytest.raises(ParseError):
            share.shared_secret(wrong)
    overflowing = b"\xff\xff\xff" + share.public[3:]  # coefficients of 4095, which FIPS 203 §7.2 refuses
    for wrong in (share.public[:-1], share.public + b"\0", b"", overflowing):
        with pytest.raises(ParseError):
            respond(name, wrong, bytes)


def test_proposals_in_strongswans_spelling() -> None:
    """`ke1_mlkem768`; the first key exchange stays a classic one, and child SAs have none of these."""
    offer = parse_ike_proposal("aes256gcm16-prfsha384-x25519-ke1_mlkem768-ke1_mlkem1024-ke2_ecp384-ke2_none")
    assert [(kind.value, [t.id for t in transforms]) for kind, transforms in offer.items()] == [
        *[(1, [20]), (2, [6]), (4, [31])],
        *[(6, [36, 37]), (7, [20, 0])],
    ]
    for text in (
        "aes256gcm16-prfsha384-mlkem768",
        "aes256gcm16-x25519-ke8_mlkem768",
        "aes256gcm16-ke1_mlkem768",
    ):
        with pytest.raises(UsageError):
            parse_ike_proposal(text)
    with pytest.raises(UsageError):
        parse_esp_proposal("aes256gcm16-ke1_mlkem768")


# ---- the key schedule ----------------------------------------------------------------------------------


def _prf(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, "sha384").digest()


def _keys(skeyseed: bytes, seed: bytes) -> dict[str, bytes]:
    """SK_d, SK_ei, SK_er, SK_pi, SK_pr for AES-256-GCM and HMAC-SHA2-384."""
    material, block = b"", b""
    for counter in range(1, 8):
        block = _prf(skeyseed, block + seed + bytes((counter,)))
        material += block
    cuts = {"d": 48, "ei": 36, "er": 36, "pi": 48, "pr": 48}
    found, at = {}, 0
    for name, size in cuts.items():
        found[name] = material[at : at + size]
        at += size
    return found


def _int_auth(key: bytes, data: bytes, sk_p: bytes, before: bytes) -> bytes:
    """Of a message that was not fragmented: decrypt it, and write it as if it were not encrypted."""
    aead = AESGCM(key[:32])
    plain = aead.decrypt(key[32:] + data[32:40], data[40:], data[:32])[:-1]
    covered = bytearray(data[:32]) + plain
    covered[24:28] = len(covered).to_bytes(4, "big")
    covered[30:32] = (len(plain) + 4).to_bytes(2, "big")
    return _prf(sk_p, before + bytes(covered))


def test_the_key_schedule_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two additional key exchanges, then a rekey with both of them: SK_d of each step, and what AUTH covers."""
    offers = (parse_ike_proposal("aes256gcm16-prfsha384-x25519-ke1_mlkem768-ke2_mlkem1024"),)
    settings = IkeSettings(liveness_interval=0.0, ike_offers=offers, fragment_size=4000)
    first: list[bytes] = []
    secrets: list[bytes] = []
    original = handshake.skeyseed_initial

    def initial(suite: Any, shared: bytes, nonce_i: bytes, nonce_r: bytes) -> bytes:
        first[:] = [shared, nonce_i, nonce_r]
        return original(suite, shared, nonce_i, nonce_r)

    def recording(method: str, peer: bytes, random: Any) -> tuple[bytes, bytes]:
        answer, secret = respond(method, peer, random)
        secrets.append(secret)
        return answer, secret

    monkeypatch.setattr(handshake, "skeyseed_initial", initial)
    monkeypatch.setattr(intermediate, "respond", recording)
    monkeypatch.setattr(followup, "respond", recording)
    a, b = two_hosts(settings)
    net = Net([a, b])
    number = a.ike.initiate(request(a, b), net.now)
    net.run(3)
    assert_one_tunnel(a, b)
    session = a.ike._context.by_number[number]
    assert session.sk_d is not None
    assert len(secrets) == 2
    shared, nonce_i, nonce_r = first
    nonces = nonce_i + nonce_r
    steps = [_keys(_prf(nonces, shared), nonces + session.spi_i + session.spi_r)]
    for secret in secrets:
        seed = _prf(steps[-1]["d"], secret + nonces)
        steps.append(_keys(seed, nonces + session.spi_i + session.spi_r))
    assert session.sk_d.reveal() == steps[2]["d"]
    exchanges = [data for *_, data in net.carried if parse_header(data).exchange == Exchange.IKE_INTERMEDIATE]
    assert len(exchanges) == 4
    int_i = int_r = b""
    for step, (asked, answered) in enumerate((exchanges[:2], exchanges[2:])):
        int_i = _int_auth(steps[step]["ei"], asked, steps[step]["pi"], int_i)
        int_r = _int_auth(steps[step]["er"], answered, steps[step]["pr"], int_r)
    [signed] = a.of(NeedSignature)
    assert isinstance(signed, NeedSignature)
    maced = _prf(steps[2]["pi"], build_id(identity(a)))
    message = net.carried[0][3]
    assert signed.data == message + nonce_r + maced + int_i + int_r + (3).to_bytes(4, "big")

    rekeyed: list[Any] = []
    make = ike_rekey._successor

    def successor(old: Any, made: Any, *, initiator: bool) -> Any:
        rekeyed.append(made)
        return make(old, made, initiator=initiator)

    monkeypatch.setattr(ike_rekey, "_successor", successor)
    a.ike.rekey_ike(number, net.now)
    net.run(3)
    new = a.ike._context.by_number[number]
    assert len(rekeyed) == 2
    assert len(secrets) == 4
    made = rekeyed[0]
    seed = _prf(steps[2]["d"], made.shared + b"".join(made.nonces) + secrets[2] + secrets[3])
    assert new.sk_d is not None
    assert new.sk_d.reveal() == _keys(seed, b"".join(made.nonces) + new.spi_i + new.spi_r)["d"]
    assert ike_suite(made.chosen).additional == ("mlkem768", "mlkem1024")
    assert "shared" not in repr(made)
