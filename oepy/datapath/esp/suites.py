"""ESP transforms: what protects a packet's bytes, given its sequence number.

All of them turn (header, sequence, plaintext) into what follows the 8-byte ESP header, and back. The
plaintext already has its trailer; `alignment` is what its length must be a multiple of.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from oepy.errors import OepyError, RemoteError
from oepy.model import EspSuite, SaKeys

_SALT = 4  # RFC 4106 §4, RFC 7634 §2
_AEAD_IV = 8
_AEAD_TAG = 16
_CBC_BLOCK = 16
# Key and ICV lengths of RFC 4868 §2.3
_HMAC = {"sha256": (32, 16), "sha384": (48, 24), "sha512": (64, 32)}
_AEADS: dict[str, tuple[int, Callable[[bytes], AESGCM | ChaCha20Poly1305]]] = {
    "aes128gcm16": (16, AESGCM),
    "aes192gcm16": (24, AESGCM),
    "aes256gcm16": (32, AESGCM),
    "chacha20poly1305": (32, ChaCha20Poly1305),
}
_CBC_KEYS = {"aes128": 16, "aes192": 24, "aes256": 32}


class IntegrityError(RemoteError):
    """The packet's ICV does not fit: changed on its way, forged, or for other keys."""


class Transform(Protocol):
    """One direction's cipher with its keys. `overhead` in bytes: IV and ICV."""

    alignment: int
    overhead: int

    def seal(self, header: bytes, sequence: int, plaintext: bytes) -> bytes:
        """`header`: SPI and low sequence bits as sent. `sequence`: the whole number."""

    def open(self, header: bytes, sequence: int, body: memoryview) -> bytes:
        """The plaintext with its trailer. Raises IntegrityError."""


class AeadTransform:
    """AES-GCM (RFC 4106) and ChaCha20-Poly1305 (RFC 7634): the same construction."""

    alignment = 4
    overhead = _AEAD_IV + _AEAD_TAG

    def __init__(self, cipher: AESGCM | ChaCha20Poly1305, salt: bytes, esn: bool) -> None:
        self._encrypt = cipher.encrypt
        self._decrypt = cipher.decrypt
        self._salt = salt
        self._esn = esn

    def _associated(self, header: bytes, sequence: int) -> bytes:
        # RFC 4106 §5: with ESN the AAD holds all 64 bits
        return header[:4] + sequence.to_bytes(8, "big") if self._esn else header

    def seal(self, header: bytes, sequence: int, plaintext: bytes) -> bytes:
        # The IV must never repeat under a key; the sequence number never does
        iv = sequence.to_bytes(8, "big")
        return iv + self._encrypt(self._salt + iv, plaintext, self._associated(header, sequence))

    def open(self, header: bytes, sequence: int, body: memoryview) -> bytes:
        if len(body) < self.overhead:
            raise IntegrityError("too short for IV and ICV")
        nonce = self._salt + body[:_AEAD_IV]
        try:
            return self._decrypt(nonce, body[_AEAD_IV:], self._associated(header, sequence))
        except InvalidTag:
            raise IntegrityError("wrong ICV") from None


class MacTransform:
    """Encrypt-then-MAC: AES-CBC (RFC 3602) or NULL (RFC 2410) with HMAC-SHA2 (RFC 4868)."""

    def __init__(self, key: bytes, mac: tuple[str, bytes], esn: bool) -> None:
        self._hash, self._mac_key = mac
        self._icv = _HMAC[self._hash][1]
        self._esn = esn
        self._algorithm = algorithms.AES(key) if key else None
        self._iv = _CBC_BLOCK if key else 0
        self.alignment = _CBC_BLOCK if key else 4
        self.overhead = self._iv + self._icv

    def _mac(self, header: bytes, sequence: int, body: bytes | memoryview) -> bytes:
        # RFC 4303 §2.2.1: with ESN the high bits follow the packet, implicitly
        high = (sequence >> 32).to_bytes(4, "big") if self._esn else b""
        return hmac.digest(self._mac_key, b"".join((header, body, high)), self._hash)[: self._icv]

    def seal(self, header: bytes, sequence: int, plaintext: bytes) -> bytes:
        body = plaintext
        if self._algorithm is not None:
            iv = os.urandom(_CBC_BLOCK)  # RFC 3602 §3: unpredictable
            encryptor = Cipher(self._algorithm, modes.CBC(iv)).encryptor()
            body = iv + encryptor.update(plaintext) + encryptor.finalize()
        return body + self._mac(header, sequence, body)

    def open(self, header: bytes, sequence: int, body: memoryview) -> bytes:
        end = len(body) - self._icv
        if end < self._iv:
            raise IntegrityError("too short for IV and ICV")
        if not hmac.compare_digest(self._mac(header, sequence, body[:end]), bytes(body[end:])):
            raise IntegrityError("wrong ICV")
        if self._algorithm is None:
            return bytes(body[:end])
        if (end - self._iv) % _CBC_BLOCK:
            raise IntegrityError("not a multiple of the cipher's block")
        decryptor = Cipher(self._algorithm, modes.CBC(bytes(body[: self._iv]))).decryptor()
        return decryptor.update(body[self._iv : end]) + decryptor.finalize()


def make_transform(suite: EspSuite, keys: SaKeys) -> Transform:
    """Raises OepyError for an unknown suite, or keys of the wrong length."""
    encryption, integrity = keys.encryption.reveal(), keys.integrity.reveal()
    if suite.encryption in _AEADS:
        length, cipher = _AEADS[suite.encryption]
        _expect(suite, "encryption key with salt", encryption, length + _SALT)
        _expect(suite, "integrity key", integrity, 0)
        return AeadTransform(cipher(encryption[:length]), encryption[length:], suite.esn)
    if suite.integrity not in _HMAC or suite.encryption not in (*_CBC_KEYS, "null"):
        raise OepyError(f"ESP suite {suite} is not supported")
    _expect(suite, "encryption key", encryption, _CBC_KEYS.get(suite.encryption, 0))
    _expect(suite, "integrity key", integrity, _HMAC[suite.integrity][0])
    return MacTransform(encryption, (suite.integrity, integrity), suite.esn)


def _expect(suite: EspSuite, what: str, key: bytes, length: int) -> None:
    if len(key) != length:
        raise OepyError(f"ESP suite {suite} wants an {what} of {length} bytes, got {len(key)}")
