"""IKEv2's crypto against published vectors, and its authentication methods against each other."""

from __future__ import annotations

import hashlib
import hmac
from ipaddress import IPv4Address

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, padding

from oepy.errors import KeyFormatError, ParseError, UsageError
from oepy.ike.algorithms import (
    DEFAULT_ESP,
    DEFAULT_IKE,
    accepted,
    choose,
    esp_suite,
    ike_suite,
    parse_ah_proposal,
    parse_esp_proposal,
    parse_ike_proposal,
    to_proposals,
)
from oepy.ike.authentication import (
    OUR_HASHES,
    AuthMethod,
    HashId,
    PrivateKey,
    psk_auth,
    sign_auth,
    signed_octets,
    verify_auth,
)
from oepy.ike.cookies import ROTATION, CookieJar
from oepy.ike.crypto import (
    AeadProtection,
    CbcProtection,
    derive_child_keys,
    derive_ike_keys,
    encryption_key_size,
    prf_plus,
)
from oepy.ike.key_exchange import EcpShare, X25519Share, generate
from oepy.ike.payload_sa import PROTOCOL_AH, PROTOCOL_ESP, PROTOCOL_IKE, Proposal, Transform, TransformType
from oepy.keys import to_public_key
from oepy.model import Endpoint, EspSuite, PublicKey, Secret
from tests.sim.ike_net import ED25519_A, ED25519_B, P256, P384, rsa_key

ALL = frozenset(OUR_HASHES)
DATA = b"the octets that AUTH covers"


def test_x25519_rfc_7748() -> None:
    """RFC 7748 §6.1: Alice, Bob, and what they share."""
    alice = X25519Share(bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = X25519Share(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert alice.shared_secret(bob.public).hex() == bob.shared_secret(alice.public).hex() == shared


@pytest.mark.parametrize(
    ("group", "private", "public", "peer", "shared"),
    [
        (
            "ecp256",
            "C88F01F510D9AC3F70A292DAA2316DE544E9AAB8AFE84049C62A9C57862D1433",
            "DAD0B65394221CF9B051E1FECA5787D098DFE637FC90B9EF945D0C3772581180"
            "5271A0461CDB8252D61F1C456FA3E59AB1F45B33ACCF5F58389E0577B8990BB3",
            "D12DFB5289C8D4F81208B70270398C342296970A0BCCB74C736FC7554494BF63"
            "56FBF3CA366CC23E8157854C13C58D6AAC23F046ADA30F8353E74F33039872AB",
            "D6840F6B42F6EDAFD13116E0E12565202FEF8E9ECE7DCE03812464D04B9442DE",
        ),
        (
            "ecp384",
            "099F3C7034D4A2C699884D73A375A67F7624EF7C6B3C0F160647B67414DCE655"
            "E35B538041E649EE3FAEF896783AB194",
            "667842D7D180AC2CDE6F74F37551F55755C7645C20EF73E31634FE72B4C55EE6DE3AC808ACB4BDB4C88732AEE95F41AA"
            "9482ED1FC0EEB9CAFC4984625CCFC23F65032149E0E144ADA024181535A0F38EEB9FCFF3C2C947DAE69B4C634573A81C",
            "E558DBEF53EECDE3D3FCCFC1AEA08A89A987475D12FD950D83CFA41732BC509D0D1AC43A0336DEF96FDA41D0774A3571"
            "DCFBEC7AACF3196472169E838430367F66EEBE3C6E70C416DD5F0C68759DD1FFF83FA40142209DFF5EAAD96DB9E6386C",
            "11187331C279962D93D604243FD592CB9D0A926F422E47187521287E7156C5C4D603135569B9E9D09CF5D4A270F59746",
        ),
    ],
)
def test_ecp_rfc_5903(group: str, private: str, public: str, peer: str, shared: str) -> None:
    """RFC 5903 §8.1 and 8.2: the public value without prefix, and x alone as the secret."""
    share = EcpShare(group, int(private, 16))
    assert share.public.hex().upper() == public
    assert share.shared_secret(bytes.fromhex(peer)).hex().upper() == shared


@pytest.mark.parametrize("group", ["x25519", "ecp256", "ecp384"])
def test_invalid_public_values_are_refused(group: str) -> None:
    """All zero, of wrong length, off the curve (RFC 5903 §9, RFC 8031 §4, RFC 6989)."""
    share = generate(group, lambda size: bytes(range(1, size + 1)))
    wrong = [bytes(len(share.public)), share.public[:-1], share.public + b"\0", b""]
    if group != "x25519":
        wrong.append(share.public[:-1] + bytes((share.public[-1] ^ 1,)))
    for value in wrong:
        with pytest.raises(ParseError):
            share.shared_secret(value)


def test_chacha20_poly1305_rfc_7634() -> None:
    """RFC 7634 appendix B: the IKEv2 example, opened by our protection."""
    key = Secret(bytes(range(0x80, 0xA0)) + bytes.fromhex("a0a1a2a3"))
    associated = bytes.fromhex("c0c1c2c3c4c5c6c7d0d1d2d3d4d5d6d72e202500000000090000004529000029")
    iv = bytes.fromhex("1011121314151617")
    sealed = bytes.fromhex("610394701f8d017f7c129248896b71bfe25236efd7cdc67066906315b2")
    plain = AeadProtection("chacha20poly1305", key).open(iv + sealed, associated)
    assert plain.hex() == "0000000c000040010000000a"


@pytest.mark.parametrize("name", ["sha256", "sha384", "sha512"])
@pytest.mark.parametrize("size", [0, 1, 32, 63, 64, 65, 127, 128, 129, 500])
def test_prf_plus_hashes_by_keys_of_any_length(name: str, size: int) -> None:
    key, seed = bytes(range(250)) * 2, b"seed"
    first = hmac.digest(key[:size], seed + b"\1", name)
    second = hmac.digest(key[:size], first + seed + b"\2", name)
    assert prf_plus(f"prf{name}", key[:size], seed, 2 * len(first)) == first + second


def test_prf_plus_is_what_the_rfc_says() -> None:
    """RFC 7296 §2.13, written out with the standard library alone."""
    key, seed = b"key", b"seed"
    t1 = hmac.new(key, seed + b"\1", hashlib.sha256).digest()
    t2 = hmac.new(key, t1 + seed + b"\2", hashlib.sha256).digest()
    t3 = hmac.new(key, t2 + seed + b"\3", hashlib.sha256).digest()
    assert prf_plus("prfsha256", key, seed, 80) == (t1 + t2 + t3)[:80]


def test_ike_keys_are_cut_in_the_order_of_the_rfc() -> None:
    """SK_d, SK_ai, SK_ar, SK_ei, SK_er, SK_pi, SK_pr (§2.14), with an AEAD's salt in SK_e."""
    suite = ike_suite(choose_one("aes128gcm16-prfsha384-x25519", PROTOCOL_IKE))
    keys = derive_ike_keys(suite, b"s" * 48, (b"n" * 16, b"m" * 16), b"i" * 8, b"r" * 8)
    stream = prf_plus("prfsha384", b"s" * 48, b"n" * 16 + b"m" * 16 + b"i" * 8 + b"r" * 8, 48 * 3 + 40)
    parts = (keys.d, keys.ai, keys.ar, keys.ei, keys.er, keys.pi, keys.pr)
    assert b"".join(part.reveal() for part in parts) == stream
    assert [len(part) for part in parts] == [48, 0, 0, 20, 20, 48, 48]


def choose_one(text: str, protocol: int):  # type: ignore[no-untyped-def]
    offer = parse_ike_proposal(text) if protocol == PROTOCOL_IKE else parse_esp_proposal(text)
    chosen = choose([offer], to_proposals([offer], b"spi4"))
    assert chosen is not None
    return chosen


def test_child_keys_go_initiator_first() -> None:
    """RFC 7296 §2.17: encryption before integrity, the SA of the initiator before the other."""
    suite = EspSuite("aes256", "sha256")
    first, second = derive_child_keys("prfsha256", Secret(b"d" * 32), suite, b"g", (b"i" * 16, b"r" * 16))
    stream = prf_plus("prfsha256", b"d" * 32, b"g" + b"i" * 16 + b"r" * 16, 128)
    parts = (first.encryption, first.integrity, second.encryption, second.integrity)
    assert b"".join(part.reveal() for part in parts) == stream
    assert [len(part) for part in parts] == [32, 32, 32, 32]


@pytest.mark.parametrize("name", ["aes256gcm16", "aes128gcm16", "chacha20poly1305"])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 200])
def test_aead_protection_both_ways(name: str, size: int) -> None:
    """What was sealed opens, once with the right associated data, and the IV is never repeated."""
    key = Secret(bytes(range(encryption_key_size(name))))
    one, two = AeadProtection(name, key), AeadProtection(name, key)
    sealed = one.seal(bytes(size), b"header")
    assert len(sealed) == size + one.overhead(size)
    assert two.open(sealed, b"header") == bytes(size)
    with pytest.raises(ParseError):
        two.open(sealed, b"headeR")
    assert one.seal(bytes(size), b"header")[:8] != sealed[:8]


@pytest.mark.parametrize("integrity", ["sha256", "sha384", "sha512"])
@pytest.mark.parametrize("size", [0, 15, 16, 200])
def test_cbc_protection_both_ways(integrity: str, size: int) -> None:
    """AES-CBC with HMAC: opens, and refuses a changed byte anywhere."""
    made = CbcProtection(integrity, Secret(bytes(32)), Secret(b"m" * 32), lambda n: b"v" * n)
    sealed = made.seal(bytes(size), b"header")
    assert len(sealed) == size + made.overhead(size)
    assert made.open(sealed, b"header") == bytes(size)
    for position in (0, 16, len(sealed) - 1):
        changed = bytearray(sealed)
        changed[position] ^= 1
        with pytest.raises(ParseError):
            made.open(bytes(changed), b"header")


KEYS: dict[str, PrivateKey] = {
    "ed25519": ED25519_A,
    "ed448": ed448.Ed448PrivateKey.generate(),
    "p256": P256,
    "p384": P384,
    "rsa": rsa_key(),
}


def public(key: PrivateKey) -> PublicKey:
    return to_public_key(key.public_key())


@pytest.mark.parametrize("kind", KEYS)
def test_signatures_prove_the_key_and_nothing_else(kind: str) -> None:
    """Each kind verifies with its key among others, and with no other data, method or key."""
    key = KEYS[kind]
    method, auth = sign_auth(key, DATA, ALL)
    assert method == AuthMethod.SIGNATURE
    others = [public(other) for name, other in KEYS.items() if name != kind] + [public(ED25519_B)]
    assert verify_auth([*others, public(key)], method, auth, DATA) == public(key)
    assert verify_auth(others, method, auth, DATA) is None
    assert verify_auth([public(key)], method, auth, DATA + b".") is None
    assert verify_auth([public(key)], method, auth[:-1] + bytes((auth[-1] ^ 1,)), DATA) is None
    for wrong in (AuthMethod.RSA, AuthMethod.ECDSA_256, AuthMethod.NULL, AuthMethod.PSK, 200):
        assert verify_auth([public(key)], wrong, auth, DATA) is None
    for cut in (b"", auth[:1], auth[: auth[0] + 1]):
        assert verify_auth([public(key)], method, cut, DATA) is None


def test_peers_without_rfc_7427_get_the_older_methods() -> None:
    """RFC 4754 for ECDSA, method 1 over SHA-1 for RSA (accepted only when allowed), nothing for EdDSA."""
    for key, expected in ((P256, AuthMethod.ECDSA_256), (P384, AuthMethod.ECDSA_384)):
        method, auth = sign_auth(key, DATA, ())
        assert method == expected
        assert verify_auth([public(key)], method, auth, DATA) == public(key)
    method, auth = sign_auth(rsa_key(), DATA, ())
    assert method == AuthMethod.RSA
    assert verify_auth([public(rsa_key())], method, auth, DATA) is None
    assert verify_auth([public(rsa_key())], method, auth, DATA, allow_sha1=True) == public(rsa_key())
    with pytest.raises(KeyFormatError):
        sign_auth(ED25519_A, DATA, (HashId.SHA2_256,))


@pytest.mark.parametrize("digest", [hashes.SHA256(), hashes.SHA384(), hashes.SHA512()])
def test_rsa_pkcs1_in_rfc_7427_is_accepted(digest: hashes.HashAlgorithm) -> None:
    """libreswan with authby=rsasig and others sign RSASSA-PKCS1-v1_5."""
    last = {"sha256": "0b", "sha384": "0c", "sha512": "0d"}[digest.name]
    identifier = bytes.fromhex(f"300d06092a864886f70d0101{last}0500")
    signature = rsa_key().sign(DATA, padding.PKCS1v15(), digest)
    auth = bytes((len(identifier),)) + identifier + signature
    assert verify_auth([public(rsa_key())], AuthMethod.SIGNATURE, auth, DATA) is not None


def test_the_pss_identifier_is_the_one_of_rfc_7427() -> None:
    """Appendix A.4.3: RSASSA-PSS with SHA-256, byte for byte."""
    _, auth = sign_auth(rsa_key(), DATA, (HashId.SHA2_256,))
    expected = (
        "304106092a864886f70d01010a3034a00f300d06096086480165030402010500"
        "a11c301a06092a864886f70d010108300d06096086480165030402010500a203020120"
    )
    assert auth[1 : 1 + auth[0]].hex() == expected


def test_an_ecdsa_signature_of_another_curve_is_none() -> None:
    """Method 9 with a P-384 key is not accepted."""
    _, auth = sign_auth(ec.derive_private_key(77, ec.SECP256R1()), DATA, ())
    assert verify_auth([public(P384)], AuthMethod.ECDSA_256, auth, DATA) is None


def test_psk_and_signed_octets_are_what_the_rfc_says() -> None:
    """RFC 7296 §2.15, written out with the standard library alone."""
    octets = signed_octets(b"message", b"nonce", "prfsha256", Secret(b"skp"), b"id")
    assert octets == b"message" + b"nonce" + hmac.new(b"skp", b"id", hashlib.sha256).digest()
    inner = hmac.new(b"secret", b"Key Pad for IKEv2", hashlib.sha256).digest()
    assert (
        psk_auth("prfsha256", Secret(b"secret"), octets) == hmac.new(inner, octets, hashlib.sha256).digest()
    )


def test_proposals_are_read_as_in_swanctl() -> None:
    """Names, alternatives, and what makes no sense is said with its reason."""
    for text in DEFAULT_IKE:
        parse_ike_proposal(text)
    for text in DEFAULT_ESP:
        parse_esp_proposal(text)
    offer = parse_ike_proposal("aes256-sha512-curve25519")
    assert offer[TransformType.PRF] == (Transform(TransformType.PRF, 7),)
    for wrong in (
        "aes256-x25519",
        "aes256gcm16-sha256-x25519",
        "aes256gcm16",
        "des-md5-modp768",
        "null-sha256-x25519",
    ):
        with pytest.raises(UsageError):
            parse_ike_proposal(wrong)
    for wrong in ("aes256", "x25519", "aes256gcm16-aes128-sha256", "rot13"):
        with pytest.raises(UsageError):
            parse_esp_proposal(wrong)


def test_our_order_decides_and_the_sent_group_is_preferred() -> None:
    """The responder takes its own best suite, but the key exchange whose share is already there."""
    ours = [parse_ike_proposal(text) for text in DEFAULT_IKE]
    theirs = to_proposals(
        [parse_ike_proposal("aes128gcm16-aes256gcm16-prfsha512-prfsha256-ecp256-x25519")], b""
    )
    chosen = choose(ours, theirs, prefer_group=19)
    assert chosen is not None
    assert str(ike_suite(chosen)) == "aes256gcm16-prfsha256-ecp256"
    elsewhere = tuple(Proposal(one.number, PROTOCOL_ESP, b"", one.transforms) for one in theirs)
    assert choose(ours, elsewhere) is None


def test_ah_is_an_offer_without_encryption() -> None:
    """Its proposals are of protocol 2; an ESP offer is none of AH's and the other way round, both ways."""
    ah, esp = parse_ah_proposal("sha256-sha512-x25519"), parse_esp_proposal("null-sha256")
    both = to_proposals([ah, esp], b"spi4")
    assert [proposal.protocol for proposal in both] == [PROTOCOL_AH, PROTOCOL_ESP]
    chosen = choose([ah], both)
    assert chosen is not None
    assert esp_suite(chosen) == EspSuite("", "sha256")
    assert str(esp_suite(chosen)) == "sha256-esn"
    assert chosen.proposal(b"spi5").protocol == PROTOCOL_AH
    assert choose([ah], to_proposals([esp], b"spi4")) is None
    assert choose([esp], to_proposals([ah], b"spi4")) is None
    answer = (Proposal(1, PROTOCOL_ESP, b"spi4", chosen.proposal(b"spi4").transforms),)
    assert accepted([ah], answer) is None
    for wrong in ("aes256", "sha1", "x25519", "", "aes256gcm16-sha256"):
        with pytest.raises(UsageError):
            parse_ah_proposal(wrong)


def test_a_proposal_that_insists_on_more_is_not_taken() -> None:
    """A transform type unknown here (RFC 9370's 6, say) refuses the proposal, unless NONE is offered."""
    ours = [parse_ike_proposal("aes256gcm16-prfsha256-x25519")]
    [base] = to_proposals(ours, b"")
    more = Proposal(1, PROTOCOL_IKE, b"", (*base.transforms, Transform(6, 36)))
    none = Proposal(1, PROTOCOL_IKE, b"", (*more.transforms, Transform(6, 0)))
    assert choose(ours, (more,)) is None
    assert choose(ours, (none,)) is not None


def test_an_answer_must_be_a_choice_out_of_ours() -> None:
    """Two transforms of a type, another number, another algorithm: not accepted."""
    ours = [parse_esp_proposal("aes128gcm16-aes256gcm16-esn")]
    [both] = to_proposals(ours, b"spi4")
    one = Proposal(1, PROTOCOL_ESP, b"spi4", (Transform(1, 20, 256), Transform(5, 1)))
    chosen = accepted(ours, (one,))
    assert chosen is not None
    assert esp_suite(chosen) == EspSuite("aes256gcm16")
    assert accepted(ours, (both,)) is None
    assert accepted(ours, (one, one)) is None
    assert accepted(ours, (Proposal(2, PROTOCOL_ESP, b"spi4", one.transforms),)) is None
    noesn = Proposal(1, PROTOCOL_ESP, b"spi4", (Transform(1, 20, 256), Transform(5, 0)))
    assert accepted(ours, (noesn,)) is None


def test_cookies_bind_address_nonce_and_time() -> None:
    """A cookie is good for its request only, for one rotation longer than its secret lives, and no more."""
    counter = iter(range(100))
    jar = CookieJar(lambda size: bytes((next(counter),)) * size)
    here = Endpoint(IPv4Address("192.0.2.1"), 500)
    cookie = jar.make(b"nonce", here, b"spi", 0.0)
    assert jar.check(cookie, b"nonce", here, b"spi", 1.0)
    assert not jar.check(cookie, b"nonsense", here, b"spi", 1.0)
    assert not jar.check(cookie, b"nonce", here, b"spy", 1.0)
    assert not jar.check(cookie, b"nonce", Endpoint(here.address, 501), b"spi", 1.0)
    assert not jar.check(b"", b"nonce", here, b"spi", 1.0)
    assert jar.check(cookie, b"nonce", here, b"spi", ROTATION + 1)
    assert not jar.check(cookie, b"nonce", here, b"spi", 2 * ROTATION + 2)
