"""Key exchange methods: X25519 (RFC 8031), the NIST curves (RFC 5903), and ML-KEM (FIPS 203,
draft-ietf-ipsecme-ikev2-mlkem).

An IKE SA negotiates a list of them (RFC 9370): the first in KE, further ones in exchanges of their own. Whoever
begins makes a `Share` by `generate`, with what to send and how to finish; the other has all at once, by `respond`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec, mlkem
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from oepy.errors import ParseError

_CURVES: dict[str, tuple[ec.EllipticCurve, int, int]] = {
    "ecp256": (
        ec.SECP256R1(),
        32,
        0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    ),
    "ecp384": (
        ec.SECP384R1(),
        48,
        0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
    ),
}
_UNCOMPRESSED = b"\x04"


class Share(Protocol):
    """Our half of a key exchange. Use it once."""

    group: str
    public: bytes

    def shared_secret(self, peer: bytes) -> bytes:
        """Raises ParseError where `peer` is no valid public value."""


class X25519Share:
    __slots__ = ("_private", "group", "public")

    def __init__(self, private: bytes) -> None:
        self.group = "x25519"
        self._private = X25519PrivateKey.from_private_bytes(private)
        self.public = self._private.public_key().public_bytes_raw()

    def shared_secret(self, peer: bytes) -> bytes:
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError as error:  # wrong length, or the all-zero result of a point of small order
            raise ParseError(f"x25519 public value: {error}") from None


class EcpShare:
    """RFC 5903 §7: x and y without a prefix on the wire, and only x is the secret."""

    __slots__ = ("_private", "_size", "group", "public")

    def __init__(self, group: str, scalar: int) -> None:
        curve, self._size, _ = _CURVES[group]
        self.group = group
        self._private = ec.derive_private_key(scalar, curve)
        numbers = self._private.public_key().public_numbers()
        self.public = numbers.x.to_bytes(self._size, "big") + numbers.y.to_bytes(self._size, "big")

    def shared_secret(self, peer: bytes) -> bytes:
        curve = self._private.curve
        if len(peer) != 2 * self._size:
            raise ParseError(f"{self.group} public value of {len(peer)} bytes")
        try:  # refuses what is not on the curve; the point at infinity has no such form
            public = ec.EllipticCurvePublicKey.from_encoded_point(curve, _UNCOMPRESSED + peer)
        except ValueError:
            raise ParseError(f"{self.group} public value is not on the curve") from None
        return self._private.exchange(ec.ECDH(), public)


_KEMS: dict[str, tuple[type[mlkem.MLKEM768PrivateKey | mlkem.MLKEM1024PrivateKey], int]] = {
    "mlkem768": (mlkem.MLKEM768PrivateKey, 1088),
    "mlkem1024": (mlkem.MLKEM1024PrivateKey, 1568),
}
_ENCAPSULATORS: dict[str, type[mlkem.MLKEM768PublicKey | mlkem.MLKEM1024PublicKey]] = {
    "mlkem768": mlkem.MLKEM768PublicKey,
    "mlkem1024": mlkem.MLKEM1024PublicKey,
}
_SEED = 64


class MlKemShare:
    """What is sent is the encapsulation key, what comes back the ciphertext."""

    __slots__ = ("_private", "_size", "group", "public")

    def __init__(self, group: str, seed: bytes) -> None:
        kind, self._size = _KEMS[group]
        self.group = group
        self._private = kind.from_seed_bytes(seed)
        self.public = self._private.public_key().public_bytes_raw()

    def shared_secret(self, peer: bytes) -> bytes:
        if (
            len(peer) != self._size
        ):  # nothing else can fail: a wrong ciphertext gives another secret (FIPS 203)
            raise ParseError(f"{self.group} ciphertext of {len(peer)} bytes")
        return self._private.decapsulate(peer)


def respond(group: str, peer: bytes, random: Callable[[int], bytes]) -> tuple[bytes, bytes]:
    """What to answer to the peer's public value, and the shared secret. Raises ParseError. A KEM's answer has the
    library's own randomness: it takes none from outside."""
    if group not in _ENCAPSULATORS:
        share = generate(group, random)
        return share.public, share.shared_secret(peer)
    try:  # FIPS 203 §7.2: the length and the modulus are checked
        secret, ciphertext = _ENCAPSULATORS[group].from_public_bytes(peer).encapsulate()
    except ValueError as error:
        raise ParseError(f"{group} encapsulation key: {error}") from None
    return ciphertext, secret


def generate(group: str, random: Callable[[int], bytes]) -> Share:
    """A fresh share; `group` is a name of algorithms.GROUPS or algorithms.KEMS."""
    if group == "x25519":
        return X25519Share(random(32))
    if group in _KEMS:
        return MlKemShare(group, random(_SEED))
    _, size, order = _CURVES[group]
    # 64 bits more than the order keep the bias of the reduction negligible (FIPS 186-5 A.2.1)
    scalar = int.from_bytes(random(size + 8), "big") % (order - 1) + 1
    return EcpShare(group, scalar)
