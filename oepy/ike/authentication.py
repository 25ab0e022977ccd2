"""What AUTH covers, and its proof: digital signatures (RFC 7427, RFC 8420, RFC 4754, RFC 7296 §3.8), shared
secrets (§2.15) and none at all (RFC 7619).

`sign_auth` is a pure function of a private key and the octets, so that keys can live in another process.
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Collection, Iterable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from oepy.errors import KeyFormatError
from oepy.ike.crypto import prf
from oepy.keys import from_public_key
from oepy.model import PublicKey, Secret

PrivateKey = (
    rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
)

_KEY_PAD = b"Key Pad for IKEv2"
MAX_KEYS_TRIED = 16


class AuthMethod(enum.IntEnum):
    RSA = 1
    PSK = 2
    ECDSA_256 = 9
    ECDSA_384 = 10
    ECDSA_521 = 11
    NULL = 13
    SIGNATURE = 14


class HashId(enum.IntEnum):
    """RFC 7427 §7, RFC 8420 §2."""

    SHA1 = 1
    SHA2_256 = 2
    SHA2_384 = 3
    SHA2_512 = 4
    IDENTITY = 5


OUR_HASHES = (HashId.SHA2_256, HashId.SHA2_384, HashId.SHA2_512, HashId.IDENTITY)
"""What we announce in SIGNATURE_HASH_ALGORITHMS."""

_HASHES: dict[HashId, hashes.HashAlgorithm] = {
    HashId.SHA1: hashes.SHA1(),  # noqa: S303 - only for method 1, where nothing else was agreed
    HashId.SHA2_256: hashes.SHA256(),
    HashId.SHA2_384: hashes.SHA384(),
    HashId.SHA2_512: hashes.SHA512(),
}

ED25519_IDENTIFIER = bytes.fromhex("300506032b6570")
ED448_IDENTIFIER = bytes.fromhex("300506032b6571")
_ECDSA_IDENTIFIERS = {
    bytes.fromhex("300a06082a8648ce3d040302"): HashId.SHA2_256,
    bytes.fromhex("300a06082a8648ce3d040303"): HashId.SHA2_384,
    bytes.fromhex("300a06082a8648ce3d040304"): HashId.SHA2_512,
}
_PKCS1_IDENTIFIERS = {
    bytes.fromhex("300d06092a864886f70d01010b0500"): HashId.SHA2_256,
    bytes.fromhex("300d06092a864886f70d01010c0500"): HashId.SHA2_384,
    bytes.fromhex("300d06092a864886f70d01010d0500"): HashId.SHA2_512,
}


def _der(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes((tag, len(body))) + body


def _pss_identifier(hash_id: HashId, *, null: bool) -> bytes:
    """RFC 7427 appendix A.4; the parameters of the hash are NULL or absent, both are in use."""
    size = _HASHES[hash_id].digest_size
    oid = bytes.fromhex("0609608648016503040200")[:-1] + bytes((hash_id - 1,))
    digest = _der(0x30, oid, b"\x05\x00" if null else b"")
    mgf = _der(0x30, bytes.fromhex("06092a864886f70d010108"), digest)
    parameters = _der(0x30, _der(0xA0, digest), _der(0xA1, mgf), _der(0xA2, _der(0x02, bytes((size,)))))
    return _der(0x30, bytes.fromhex("06092a864886f70d01010a"), parameters)


_PSS_IDENTIFIERS = {
    _pss_identifier(hash_id, null=null): hash_id
    for null in (False, True)
    for hash_id in (HashId.SHA2_256, HashId.SHA2_384, HashId.SHA2_512)
}


def signed_octets(message: bytes, nonce: bytes, prf_name: str, sk_p: Secret, id_body: bytes) -> bytes:
    """RFC 7296 §2.15: our first message, the other's nonce, and our identity under SK_p."""
    return message + nonce + prf(prf_name, sk_p.reveal(), id_body)


def psk_auth(prf_name: str, secret: Secret, octets: bytes) -> bytes:
    return prf(prf_name, prf(prf_name, secret.reveal(), _KEY_PAD), octets)


def null_auth(prf_name: str, sk_p: Secret, octets: bytes) -> bytes:
    """RFC 7619 §2.1: SK_pi or SK_pr stands in for the secret that there isn't."""
    return psk_auth(prf_name, sk_p, octets)


def matches(expected: bytes, received: bytes) -> bool:
    return hmac.compare_digest(expected, received)


# ---- signing -------------------------------------------------------------------------------------------


def sign_auth(private_key: PrivateKey, data: bytes, peer_hashes: Collection[int]) -> tuple[int, bytes]:
    """The AUTH method and authentication data over `data`. `peer_hashes`: the peer's
    SIGNATURE_HASH_ALGORITHMS, empty where it announced none (then RFC 4754 or method 1 with SHA-1, which is
    all that such a peer knows). Raises KeyFormatError where the peer can verify nothing that this key makes.
    """
    if isinstance(private_key, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)):
        if HashId.IDENTITY not in peer_hashes:
            raise KeyFormatError("the peer does not announce RFC 8420, so an EdDSA key proves nothing to it")
        identifier = (
            ED25519_IDENTIFIER if isinstance(private_key, ed25519.Ed25519PrivateKey) else ED448_IDENTIFIER
        )
        return AuthMethod.SIGNATURE, _pack(identifier, private_key.sign(data))
    if isinstance(private_key, ec.EllipticCurvePrivateKey):
        return _sign_ecdsa(private_key, data, peer_hashes)
    return _sign_rsa(private_key, data, peer_hashes)


def _pack(identifier: bytes, signature: bytes) -> bytes:
    return bytes((len(identifier),)) + identifier + signature


def _sign_ecdsa(
    key: ec.EllipticCurvePrivateKey, data: bytes, peer_hashes: Collection[int]
) -> tuple[int, bytes]:
    methods = {
        256: (HashId.SHA2_256, AuthMethod.ECDSA_256),
        384: (HashId.SHA2_384, AuthMethod.ECDSA_384),
        521: (HashId.SHA2_512, AuthMethod.ECDSA_521),
    }
    fitting, method = methods[key.curve.key_size]
    for hash_id in (fitting, HashId.SHA2_512, HashId.SHA2_384, HashId.SHA2_256):
        if hash_id in peer_hashes:
            identifier = next(der for der, value in _ECDSA_IDENTIFIERS.items() if value is hash_id)
            return AuthMethod.SIGNATURE, _pack(identifier, key.sign(data, ec.ECDSA(_HASHES[hash_id])))
    size = (key.curve.key_size + 7) // 8
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(_HASHES[fitting])))
    return method, r.to_bytes(size, "big") + s.to_bytes(size, "big")


def _sign_rsa(key: rsa.RSAPrivateKey, data: bytes, peer_hashes: Collection[int]) -> tuple[int, bytes]:
    common = [h for h in (HashId.SHA2_256, HashId.SHA2_512, HashId.SHA2_384) if h in peer_hashes]
    for hash_id in common:
        digest = _HASHES[hash_id]
        if (
            key.key_size - 1 + 7
        ) // 8 < 2 * digest.digest_size + 2:  # RFC 8017 §9.1.1: 1024 bits and SHA2-512
            continue
        scheme = padding.PSS(padding.MGF1(digest), digest.digest_size)
        identifier = _pss_identifier(hash_id, null=True)
        return AuthMethod.SIGNATURE, _pack(identifier, key.sign(data, scheme, digest))
    if common:
        raise KeyFormatError(f"an RSA key of {key.key_size} bits is too short for the peer's hashes")
    return AuthMethod.RSA, key.sign(data, padding.PKCS1v15(), _HASHES[HashId.SHA1])


# ---- verifying -----------------------------------------------------------------------------------------


def verify_auth(
    keys: Iterable[PublicKey], method: int, auth: bytes, octets: bytes, *, allow_sha1: bool = False
) -> PublicKey | None:
    """The key among `keys` that made this signature, None where none did. Unusable keys are passed over."""
    for key in list(keys)[:MAX_KEYS_TRIED]:
        try:
            loaded = from_public_key(key)
        except KeyFormatError:
            continue
        if isinstance(loaded, rsa.RSAPublicKey):
            good = _verify_rsa(loaded, method, auth, octets, allow_sha1)
        elif isinstance(loaded, ec.EllipticCurvePublicKey):
            good = _verify_ecdsa(loaded, method, auth, octets)
        else:
            good = _verify_eddsa(loaded, method, auth, octets)
        if good:
            return key
    return None


def _unpack(method: int, auth: bytes) -> tuple[bytes, bytes]:
    """Algorithm identifier and signature of method 14; empty ones where the form is wrong."""
    if method != AuthMethod.SIGNATURE or not auth or len(auth) <= auth[0] + 1:
        return b"", b""
    end = auth[0] + 1
    return auth[1:end], auth[end:]


def _verify_eddsa(
    key: ed25519.Ed25519PublicKey | ed448.Ed448PublicKey, method: int, auth: bytes, octets: bytes
) -> bool:
    identifier, signature = _unpack(method, auth)
    wanted = ED25519_IDENTIFIER if isinstance(key, ed25519.Ed25519PublicKey) else ED448_IDENTIFIER
    if identifier != wanted:
        return False
    try:
        key.verify(signature, octets)
    except InvalidSignature:
        return False
    return True


def _verify_ecdsa(key: ec.EllipticCurvePublicKey, method: int, auth: bytes, octets: bytes) -> bool:
    size = (key.curve.key_size + 7) // 8
    fixed = {
        (AuthMethod.ECDSA_256, 256): HashId.SHA2_256,
        (AuthMethod.ECDSA_384, 384): HashId.SHA2_384,
        (AuthMethod.ECDSA_521, 521): HashId.SHA2_512,
    }
    if method == AuthMethod.SIGNATURE:
        identifier, signature = _unpack(method, auth)
        hash_id = _ECDSA_IDENTIFIERS.get(identifier)
    else:
        hash_id = next(
            (h for (m, bits), h in fixed.items() if m == method and bits == key.curve.key_size), None
        )
        if len(auth) != 2 * size:
            return False
        signature = encode_dss_signature(
            int.from_bytes(auth[:size], "big"), int.from_bytes(auth[size:], "big")
        )
    if hash_id is None:
        return False
    try:
        key.verify(signature, octets, ec.ECDSA(_HASHES[hash_id]))
    except InvalidSignature:
        return False
    return True


def _verify_rsa(key: rsa.RSAPublicKey, method: int, auth: bytes, octets: bytes, allow_sha1: bool) -> bool:
    candidates: list[tuple[HashId, padding.AsymmetricPadding]] = []
    signature = auth
    if method == AuthMethod.SIGNATURE:
        identifier, signature = _unpack(method, auth)
        pss, pkcs1 = _PSS_IDENTIFIERS.get(identifier), _PKCS1_IDENTIFIERS.get(identifier)
        if pss is not None:
            digest = _HASHES[pss]
            candidates = [(pss, padding.PSS(padding.MGF1(digest), digest.digest_size))]
        elif pkcs1 is not None:
            candidates = [(pkcs1, padding.PKCS1v15())]
    elif method == AuthMethod.RSA:
        # RFC 7296 §3.8 names SHA-1 for method 1 where nothing else is known; some sign with SHA-2
        order = [HashId.SHA2_256, HashId.SHA2_384, HashId.SHA2_512] + [HashId.SHA1] * allow_sha1
        candidates = [(hash_id, padding.PKCS1v15()) for hash_id in order]
    for hash_id, scheme in candidates:
        try:
            key.verify(signature, octets, scheme, _HASHES[hash_id])
        except InvalidSignature:
            continue
        return True
    return False
