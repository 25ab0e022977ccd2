"""PRF, prf+, key derivation, and the protection of SK payloads (RFC 7296 §2.13–2.14, 3.14; 5282; 7634)."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from oepy.errors import MisuseError, ParseError
from oepy.ike.algorithms import AEADS, ENCRYPTIONS, IkeSuite
from oepy.model import EspSuite, SaKeys, Secret

_PRF_HASH = {"prfsha256": ("sha256", 32), "prfsha384": ("sha384", 48), "prfsha512": ("sha512", 64)}
INTEGRITY = {"sha256": ("sha256", 32, 16), "sha384": ("sha384", 48, 24), "sha512": ("sha512", 64, 32)}
"""Integrity name → hash, key size, truncated size in bytes (RFC 4868)."""

_AEAD_SALT = 4
_AEAD_IV = 8
_AEAD_ICV = 16
_CBC_BLOCK = 16


def prf(name: str, key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, _PRF_HASH[name][0])


def prf_size(name: str) -> int:
    return _PRF_HASH[name][1]


class _KeyedHash:
    """HMAC (RFC 2104) of several texts by one key: what `hmac.digest` does anew for each takes most of its time."""

    def __init__(self, name: str, key: bytes) -> None:
        make, block = getattr(hashlib, name), _BLOCKS[name]
        padded = (key if len(key) <= block else make(key).digest()).ljust(block, b"\0")
        self._inner, self._outer = make(padded.translate(_INNER)), make(padded.translate(_OUTER))

    def digest(self, text: bytes) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(text)
        outer.update(inner.digest())
        found: bytes = outer.digest()
        return found


_BLOCKS = {"sha256": 64, "sha384": 128, "sha512": 128}
_INNER, _OUTER = (bytes(octet ^ pad for octet in range(256)) for pad in (0x36, 0x5C))


def prf_plus(name: str, key: bytes, seed: bytes, size: int) -> bytes:
    """RFC 7296 §2.13. At most 255 rounds, which no suite comes near."""
    keyed = _KeyedHash(_PRF_HASH[name][0], key)
    block, output, counter = b"", bytearray(), 0
    while len(output) < size:
        counter += 1
        if counter > 255:
            raise MisuseError("prf+ is defined for 255 rounds only")
        block = keyed.digest(block + seed + bytes((counter,)))
        output += block
    return bytes(output[:size])


def encryption_key_size(name: str) -> int:
    """Bytes of key material that an encryption algorithm takes, the salt of an AEAD included."""
    if name in ("null", ""):  # "": of AH
        return 0
    transform = ENCRYPTIONS[name]
    if name == "chacha20poly1305":
        return 32 + _AEAD_SALT
    return transform.key_length // 8 + (_AEAD_SALT if transform.id in AEADS else 0)


def integrity_key_size(name: str) -> int:
    return INTEGRITY[name][1] if name else 0


@dataclass(frozen=True, slots=True)
class IkeKeyMaterial:
    """SK_* of RFC 7296 §2.14."""

    d: Secret
    ai: Secret
    ar: Secret
    ei: Secret
    er: Secret
    pi: Secret
    pr: Secret


def derive_ike_keys(
    suite: IkeSuite, skeyseed: bytes, nonces: tuple[bytes, bytes], spi_i: bytes, spi_r: bytes
) -> IkeKeyMaterial:
    """`nonces` of the exchange's initiator and responder; the SPIs of the IKE SA that comes of it."""
    prf_length = prf_size(suite.prf)
    integrity, encryption = integrity_key_size(suite.integrity), encryption_key_size(suite.encryption)
    sizes = (prf_length, integrity, integrity, encryption, encryption, prf_length, prf_length)
    material = prf_plus(suite.prf, skeyseed, b"".join(nonces) + spi_i + spi_r, sum(sizes))
    parts, position = [], 0
    for size in sizes:
        parts.append(Secret(material[position : position + size]))
        position += size
    return IkeKeyMaterial(*parts)


def skeyseed_initial(suite: IkeSuite, shared: bytes, nonce_i: bytes, nonce_r: bytes) -> bytes:
    return prf(suite.prf, nonce_i + nonce_r, shared)


def skeyseed_rekey(
    old: IkeSuite, sk_d: Secret, shared: bytes, nonce_i: bytes, nonce_r: bytes, additional: bytes = b""
) -> bytes:
    """RFC 7296 §2.18: with the PRF of the old IKE SA. `additional`: the secrets of IKE_FOLLOWUP_KE, one after
    the other (RFC 9370 §2.2.4). Of IKE_INTERMEDIATE each is mixed in like a rekey's (§2.2.2)."""
    return prf(old.prf, sk_d.reveal(), shared + nonce_i + nonce_r + additional)


def derive_child_keys(
    prf_name: str, sk_d: Secret, suite: EspSuite, shared: bytes, nonces: tuple[bytes, bytes]
) -> tuple[SaKeys, SaKeys]:
    """Keys of the SA from the exchange's initiator, and of the SA from its responder (RFC 7296 §2.17)."""
    encryption, integrity = encryption_key_size(suite.encryption), integrity_key_size(suite.integrity)
    one = encryption + integrity
    material = prf_plus(prf_name, sk_d.reveal(), shared + b"".join(nonces), 2 * one)
    halves = []
    for start in (0, one):
        middle = start + encryption
        halves.append(SaKeys(Secret(material[start:middle]), Secret(material[middle : start + one])))
    return halves[0], halves[1]


class Protection(Protocol):
    """One direction of an IKE SA. `overhead(n)` is the size of IV, padding and ICV around n bytes."""

    def overhead(self, plain: int) -> int: ...

    def seal(self, plain: bytes, associated: bytes) -> bytes:
        """IV, ciphertext and ICV; `associated` is all of the message before the IV."""

    def open(self, sealed: bytes, associated: bytes) -> bytes:
        """The payloads inside, padding removed. Raises ParseError where anything is not as it was sent."""


class AeadProtection:
    """RFC 5282 and RFC 7634 §2. The IV is a counter: never the same twice under one key."""

    __slots__ = ("_aead", "_counter", "_salt")

    def __init__(self, name: str, key: Secret) -> None:
        material = key.reveal()
        raw, self._salt = material[:-_AEAD_SALT], material[-_AEAD_SALT:]
        self._aead = ChaCha20Poly1305(raw) if name == "chacha20poly1305" else AESGCM(raw)
        self._counter = 0

    def overhead(self, plain: int) -> int:
        return _AEAD_IV + 1 + _AEAD_ICV

    def seal(self, plain: bytes, associated: bytes) -> bytes:
        self._counter += 1
        iv = self._counter.to_bytes(_AEAD_IV, "big")
        return iv + self._aead.encrypt(self._salt + iv, plain + b"\0", associated)

    def open(self, sealed: bytes, associated: bytes) -> bytes:
        if len(sealed) < _AEAD_IV + 1 + _AEAD_ICV:
            raise ParseError("encrypted payload: too short")
        try:
            plain = self._aead.decrypt(self._salt + sealed[:_AEAD_IV], sealed[_AEAD_IV:], associated)
        except InvalidTag:
            raise ParseError("encrypted payload: the integrity check fails") from None
        return _strip_padding(plain)


class CbcProtection:
    """AES-CBC with encrypt-then-MAC (RFC 7296 §3.14). `random` gives the IVs, which must be unpredictable."""

    __slots__ = ("_integrity", "_key", "_mac", "_random")

    def __init__(self, integrity: str, key: Secret, mac: Secret, random: RandomBytes) -> None:
        self._key = algorithms.AES(key.reveal())
        self._mac = mac
        self._integrity = integrity
        self._random = random

    def overhead(self, plain: int) -> int:
        padding = -(plain + 1) % _CBC_BLOCK
        return _CBC_BLOCK + padding + 1 + INTEGRITY[self._integrity][2]

    def _tag(self, data: bytes) -> bytes:
        digest, _, size = INTEGRITY[self._integrity]
        return hmac.digest(self._mac.reveal(), data, digest)[:size]

    def seal(self, plain: bytes, associated: bytes) -> bytes:
        padding = -(len(plain) + 1) % _CBC_BLOCK
        iv = self._random(_CBC_BLOCK)
        encryptor = Cipher(self._key, modes.CBC(iv)).encryptor()
        body = iv + encryptor.update(plain + bytes(padding) + bytes((padding,))) + encryptor.finalize()
        return body + self._tag(associated + body)

    def open(self, sealed: bytes, associated: bytes) -> bytes:
        size = INTEGRITY[self._integrity][2]
        body, tag = sealed[:-size], sealed[-size:]
        if len(body) < 2 * _CBC_BLOCK or len(body) % _CBC_BLOCK:
            raise ParseError("encrypted payload: no whole number of blocks")
        if not hmac.compare_digest(self._tag(associated + body), tag):
            raise ParseError("encrypted payload: the integrity check fails")
        decryptor = Cipher(self._key, modes.CBC(body[:_CBC_BLOCK])).decryptor()
        return _strip_padding(decryptor.update(body[_CBC_BLOCK:]) + decryptor.finalize())


def _strip_padding(plain: bytes) -> bytes:
    padding = plain[-1]
    if padding + 1 > len(plain):
        raise ParseError("encrypted payload: more padding than payload")
    return plain[: len(plain) - padding - 1]


class RandomBytes(Protocol):
    def __call__(self, size: int, /) -> bytes: ...


def protection(suite: IkeSuite, key: Secret, mac: Secret, random: RandomBytes) -> Protection:
    if ENCRYPTIONS[suite.encryption].id in AEADS:
        return AeadProtection(suite.encryption, key)
    return CbcProtection(suite.integrity, key, mac, random)
