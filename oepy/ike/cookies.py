"""Stateless cookies (RFC 7296 §2.6): who cannot receive at its address gets no session."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from oepy.model import Endpoint

ROTATION = 60.0
_SECRET_SIZE = 32
_VERSION_SIZE = 1


class CookieJar:
    """Secrets rotate every `ROTATION` seconds; the one before is still accepted."""

    __slots__ = ("_born", "_previous", "_random", "_secret", "_version")

    def __init__(self, random: Callable[[int], bytes], now: float = 0.0) -> None:
        self._random = random
        self._secret = random(_SECRET_SIZE)
        self._previous = b""
        self._version = 0
        self._born = now

    def _rotate(self, now: float) -> None:
        age = now - self._born
        if age < ROTATION:
            return
        self._previous = self._secret if age < 2 * ROTATION else b""
        self._secret = self._random(_SECRET_SIZE)
        self._version = (self._version + 1) & 0xFF
        self._born = now

    @staticmethod
    def _compute(secret: bytes, version: int, nonce: bytes, remote: Endpoint, spi_i: bytes) -> bytes:
        data = nonce + remote.address.packed + remote.port.to_bytes(2, "big") + spi_i
        return bytes((version,)) + hmac.digest(secret, data, "sha256")

    def make(self, nonce: bytes, remote: Endpoint, spi_i: bytes, now: float) -> bytes:
        self._rotate(now)
        return self._compute(self._secret, self._version, nonce, remote, spi_i)

    def check(self, cookie: bytes, nonce: bytes, remote: Endpoint, spi_i: bytes, now: float) -> bool:
        self._rotate(now)
        for secret, version in ((self._secret, self._version), (self._previous, (self._version - 1) & 0xFF)):
            if secret and cookie[:_VERSION_SIZE] == bytes((version,)):
                expected = self._compute(secret, version, nonce, remote, spi_i)
                return hmac.compare_digest(expected, cookie)
        return False
