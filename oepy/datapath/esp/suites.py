"""ESP transforms: what protects a packet's bytes, given its sequence number.

The plaintext already has its trailer. `spi` stands in every packet of the SA.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from oepy.datapath.esp.inner import Bytes
from oepy.errors import OepyError, RemoteError
from oepy.model import EspSuite, SaKeys

_SALT = 4  # RFC 4106 §4, RFC 7634 §2
_AEAD_IV = 8
_AEAD_TAG = 16
_CBC_BLOCK = 16
_CTR_IV = 8
ESP_HEADER = 8  # SPI and the sequence number's low half
_AEAD_PREFIX = ESP_HEADER + _AEAD_IV
_HEADER = struct.Struct("!II")
_HEADER_IV = struct.Struct("!IIQ")
# Key and ICV lengths of RFC 4868 §2.3
_HMAC = {"sha256": (32, 16), "sha384": (48, 24), "sha512": (64, 32)}
_AEADS: dict[str, tuple[int, Callable[[bytes], AESGCM | ChaCha20Poly1305]]] = {
    "aes128gcm16": (16, AESGCM),
    "aes192gcm16": (24, AESGCM),
    "aes256gcm16": (32, AESGCM),
    "chacha20poly1305": (32, ChaCha20Poly1305),
}
# AES-CTR's key has its nonce at the end (RFC 3686 §5.1)
_CIPHER_KEYS = {
    "null": 0,
    "aes128": 16,
    "aes192": 24,
    "aes256": 32,
    "aes128ctr": 20,
    "aes192ctr": 28,
    "aes256ctr": 36,
}


class IntegrityError(RemoteError):
    """The packet's ICV does not fit: changed on its way, forged, or for other keys."""


class Transform(Protocol):
    """One direction's cipher with its keys. Packets lie in buffers: ESP header, IV, plaintext, ICV."""

    alignment: int  # what the plaintext's length, with its trailer, is a multiple of
    prefix: int  # bytes before the plaintext: ESP header and IV
    icv: int  # bytes after it

    def seal(self, buffer: memoryview, start: int, length: int, sequence: int, count: int) -> None:
        """Seal `count` packets of `length` bytes, one behind the other from `start` on. Each has its plaintext in
        its place already, and is encrypted there. `sequence` is the first one's whole number; none is ever used
        twice."""

    def open(self, datagram: memoryview, sequence: int) -> bytes:
        """The plaintext with its trailer. Raises IntegrityError."""

    def open_ahead(self, data: memoryview, start: int, size: int, top: int) -> list[bytes]:
        """The plaintexts of as many datagrams of `size` bytes from `start` on as are authentic and follow `top`
        without a gap. The first other one ends it, and is for `open`, which knows why."""


class AeadTransform:
    """AES-GCM (RFC 4106) and ChaCha20-Poly1305 (RFC 7634): the same construction."""

    alignment = 4
    prefix = ESP_HEADER + _AEAD_IV
    icv = _AEAD_TAG

    def __init__(self, cipher: AESGCM | ChaCha20Poly1305, salt: bytes, suite: EspSuite, spi: int) -> None:
        self._encrypt_into = cipher.encrypt_into
        self._decrypt = cipher.decrypt
        self._salt = salt
        self._esn = suite.esn
        self._number = spi
        self._spi = spi.to_bytes(4, "big")

    def seal(self, buffer: memoryview, start: int, length: int, sequence: int, count: int) -> None:
        encrypt_into, pack_into = self._encrypt_into, _HEADER_IV.pack_into
        number, salt, spi, esn = self._number, self._salt, self._spi, self._esn
        body, end, stop = start + _AEAD_PREFIX, start + length - _AEAD_TAG, start + length
        for _ in range(count):
            # The IV must never repeat under a key; the sequence number never does
            pack_into(buffer, start, number, sequence & 0xFFFFFFFF, sequence)
            iv = sequence.to_bytes(8, "big")
            # RFC 4106 §5: with ESN the AAD holds all 64 bits
            associated = spi + iv if esn else buffer[start : start + ESP_HEADER]
            encrypt_into(salt + iv, buffer[body:end], associated, buffer[body:stop])
            start, body, end, stop = stop, body + length, end + length, stop + length
            sequence += 1

    def open(self, datagram: memoryview, sequence: int) -> bytes:
        if len(datagram) < _AEAD_PREFIX + _AEAD_TAG:
            raise IntegrityError("too short for IV and ICV")
        associated = self._spi + sequence.to_bytes(8, "big") if self._esn else datagram[:ESP_HEADER]
        try:
            return self._decrypt(
                self._salt + datagram[ESP_HEADER:_AEAD_PREFIX], datagram[_AEAD_PREFIX:], associated
            )
        except InvalidTag:
            raise IntegrityError("wrong ICV") from None

    def open_ahead(self, data: memoryview, start: int, size: int, top: int) -> list[bytes]:
        opened: list[bytes] = []
        total, sequence = len(data), top
        decrypt, unpack, salt, esn = self._decrypt, _HEADER.unpack_from, self._salt, self._esn
        mine, spi, mask = self._number, self._spi, 0xFFFFFFFF if esn else -1
        while start + _AEAD_PREFIX + _AEAD_TAG <= total:
            number, low = unpack(data, start)
            sequence += 1
            if number != mine or low != sequence & mask:
                break
            iv = start + ESP_HEADER
            body = iv + _AEAD_IV
            associated = spi + sequence.to_bytes(8, "big") if esn else data[start:iv]
            start += size
            try:
                opened.append(decrypt(salt + data[iv:body], data[body:start], associated))
            except InvalidTag:
                break
        return opened


class MacTransform:
    """Encrypt-then-MAC with HMAC-SHA2 (RFC 4868): AES-CBC (RFC 3602), AES-CTR (RFC 3686) or NULL (RFC 2410)."""

    def __init__(self, key: bytes, mac: tuple[str, bytes], suite: EspSuite, spi: int) -> None:
        self._hash, self._mac_key = mac
        self._esn = suite.esn
        self._spi = spi.to_bytes(4, "big")
        self._counter_mode = suite.encryption.endswith("ctr")
        key, self._salt = (key[:-_SALT], key[-_SALT:]) if self._counter_mode else (key, b"")
        self._algorithm = algorithms.AES(key) if key else None
        self._iv = _CTR_IV if self._counter_mode else _CBC_BLOCK if key else 0
        self.alignment = _CBC_BLOCK if key and not self._counter_mode else 4
        self.prefix = ESP_HEADER + self._iv
        self.icv = _HMAC[self._hash][1]

    def _mac(self, packet: memoryview, sequence: int) -> bytes:
        # RFC 4303 §2.2.1: with ESN the high bits follow the packet, implicitly
        data = b"".join((packet, (sequence >> 32).to_bytes(4, "big"))) if self._esn else packet
        return hmac.digest(self._mac_key, data, self._hash)[: self.icv]

    def _cipher(self, iv: Bytes) -> Cipher[modes.CBC | modes.CTR]:
        assert self._algorithm is not None
        if self._counter_mode:  # RFC 3686 §4: nonce, IV, and a counter that begins with 1
            return Cipher(self._algorithm, modes.CTR(self._salt + iv + b"\0\0\0\1"))
        return Cipher(self._algorithm, modes.CBC(bytes(iv)))

    def seal(self, buffer: memoryview, start: int, length: int, sequence: int, count: int) -> None:
        for number in range(count):
            at = start + number * length
            self._seal_one(buffer[at : at + length], sequence + number)

    def _seal_one(self, packet: memoryview, sequence: int) -> None:
        body, end = self.prefix, len(packet) - self.icv
        packet[:4] = self._spi
        packet[4:ESP_HEADER] = (sequence & 0xFFFFFFFF).to_bytes(4, "big")
        if self._algorithm is not None:
            # RFC 3602 §3 wants CBC's unpredictable, RFC 3686 §3.1 CTR's unique
            iv = sequence.to_bytes(_CTR_IV, "big") if self._counter_mode else os.urandom(_CBC_BLOCK)
            packet[ESP_HEADER:body] = iv
            encryptor = self._cipher(iv).encryptor()
            packet[body:end] = encryptor.update(packet[body:end]) + encryptor.finalize()
        packet[end:] = self._mac(packet[:end], sequence)

    def open(self, datagram: memoryview, sequence: int) -> bytes:
        end = len(datagram) - self.icv
        if end < self.prefix:
            raise IntegrityError("too short for IV and ICV")
        if not hmac.compare_digest(self._mac(datagram[:end], sequence), datagram[end:]):
            raise IntegrityError("wrong ICV")
        body = datagram[self.prefix : end]
        if self._algorithm is None:
            return bytes(body)
        if len(body) % self.alignment:
            raise IntegrityError("not a multiple of the cipher's block")
        decryptor = self._cipher(datagram[ESP_HEADER : self.prefix]).decryptor()
        return decryptor.update(body) + decryptor.finalize()

    def open_ahead(self, data: memoryview, start: int, size: int, top: int) -> list[bytes]:
        return []  # with two passes over each packet, the calls in between do not count


def make_transform(suite: EspSuite, keys: SaKeys, spi: int) -> Transform:
    """Raises OepyError for an unknown suite, or keys of the wrong length."""
    encryption, integrity = keys.encryption.reveal(), keys.integrity.reveal()
    if suite.encryption in _AEADS:
        length, cipher = _AEADS[suite.encryption]
        _expect(suite, "encryption key with salt", encryption, length + _SALT)
        _expect(suite, "integrity key", integrity, 0)
        return AeadTransform(cipher(encryption[:length]), encryption[length:], suite, spi)
    if suite.integrity not in _HMAC or suite.encryption not in _CIPHER_KEYS:
        raise OepyError(f"ESP suite {suite} is not supported")
    _expect(suite, "encryption key", encryption, _CIPHER_KEYS[suite.encryption])
    _expect(suite, "integrity key", integrity, _HMAC[suite.integrity][0])
    return MacTransform(encryption, (suite.integrity, integrity), suite, spi)


def _expect(suite: EspSuite, what: str, key: bytes, length: int) -> None:
    if len(key) != length:
        raise OepyError(f"ESP suite {suite} wants an {what} of {length} bytes, got {len(key)}")
