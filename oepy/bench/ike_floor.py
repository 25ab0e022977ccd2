"""The bare cryptography of one IKE handshake, side by side with nothing around it: the primitives that IKE_SA_INIT,
IKE_INTERMEDIATE (with ML-KEM) and IKE_AUTH with a child SA take, on bytes of their usual sizes.

    X25519, AES-256-GCM, PRF_HMAC_SHA2_256, one signature and one verification (or PSK), ML-KEM-768 on request
"""

from __future__ import annotations

import hashlib
import hmac
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from oepy.ike.authentication import OUR_HASHES, sign_auth, verify_auth
from oepy.keys import HostKey

# Bytes, as seen between two oepy
_INIT_MESSAGE = 300
_AUTH_MESSAGE = 300
_INTERMEDIATE = 1_250
_IDENTITY = 20
_PRF = 32
_IKE_MATERIAL = 3 * _PRF + 2 * 36  # SK_d, SK_pi, SK_pr, and two keys of AES-256-GCM with their salts
_CHILD_MATERIAL = 2 * 36
_NAT_HASHES = 4
_BLOCK = 50
_BLOCKS = 7


@dataclass(frozen=True, slots=True)
class Floor:
    """CPU seconds a handshake."""

    auth: str
    kem: bool
    initiator: float
    responder: float


def measure(auth: str, kem: bool, key: HostKey | None) -> Floor:
    """`key` None: by a PSK."""
    side = _Side(key)
    initiator = [side.handshake, side.kem_initiator] if kem else [side.handshake]
    responder = [side.handshake, side.kem_responder] if kem else [side.handshake]
    return Floor(auth, kem, _time(initiator), _time(responder))


def _time(steps: list[Callable[[], None]]) -> float:
    def work() -> None:
        for step in steps:
            step()

    work()
    times = []
    for _ in range(_BLOCKS):
        begun = time.process_time()
        for _ in range(_BLOCK):
            work()
        times.append((time.process_time() - begun) / _BLOCK)
    return statistics.median(times)


def _prf(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _prf_plus(key: bytes, seed: bytes, size: int) -> bytes:
    block = output = b""
    counter = 0
    while len(output) < size:
        counter += 1
        block = _prf(key, block + seed + bytes((counter,)))
        output += block
    return output[:size]


class _Side:
    """Our half of a handshake, against a peer whose values are made beforehand."""

    def __init__(self, key: HostKey | None) -> None:
        self._key = key
        self._share = X25519PrivateKey.generate().public_key().public_bytes_raw()
        self._octets = os.urandom(_INIT_MESSAGE + 32 + _PRF)
        self._sealing = os.urandom(32)
        self._iv = os.urandom(12)
        self._sealed = {
            size: AESGCM(self._sealing).encrypt(self._iv, bytes(size), bytes(32))
            for size in (_AUTH_MESSAGE, _INTERMEDIATE)
        }
        self._proof = (0, b"")
        if key is not None:
            self._proof = sign_auth(key.private, self._octets, OUR_HASHES)
        self._kem_private = MLKEM768PrivateKey.generate()
        self._kem_public = self._kem_private.public_key().public_bytes_raw()
        self._kem_ciphertext = MLKEM768PublicKey.from_public_bytes(self._kem_public).encapsulate()[1]

    def handshake(self) -> None:
        """Without ML-KEM both sides have the same to do."""
        self._exchange()
        self._proofs()
        self._protect(_AUTH_MESSAGE)
        _prf_plus(self._sealing, bytes(64), _CHILD_MATERIAL)

    def _exchange(self) -> None:
        os.urandom(8)
        nonces = os.urandom(32) + bytes(32)
        private = X25519PrivateKey.generate()
        private.public_key().public_bytes_raw()
        shared = private.exchange(X25519PublicKey.from_public_bytes(self._share))
        for _ in range(_NAT_HASHES):
            hashlib.sha1(bytes(22), usedforsecurity=False).digest()
        self._derive(_prf(nonces, shared))

    def _derive(self, seed: bytes) -> None:
        _prf_plus(seed, bytes(64 + 16), _IKE_MATERIAL)

    def _proofs(self) -> None:
        for _ in range(2):
            _prf(self._sealing, bytes(_IDENTITY))
            if self._key is None:
                _prf(_prf(self._sealing, bytes(17)), self._octets)
        if self._key is not None:
            sign_auth(self._key.private, self._octets, OUR_HASHES)
            if verify_auth([self._key.public], *self._proof, self._octets) is None:
                raise AssertionError

    def _protect(self, size: int) -> None:
        AESGCM(self._sealing).encrypt(self._iv, bytes(size), bytes(32))
        AESGCM(self._sealing).decrypt(self._iv, self._sealed[size], bytes(32))

    def kem_initiator(self) -> None:
        private = MLKEM768PrivateKey.generate()
        private.public_key().public_bytes_raw()
        self._kem_private.decapsulate(self._kem_ciphertext)
        self._mix()

    def kem_responder(self) -> None:
        MLKEM768PublicKey.from_public_bytes(self._kem_public).encapsulate()
        self._mix()

    def _mix(self) -> None:
        """Both messages opened or sealed and authenticated (IntAuth), and all keys made anew."""
        self._protect(_INTERMEDIATE)
        for _ in range(2):
            _prf(self._sealing, bytes(_INTERMEDIATE))
        self._derive(_prf(self._sealing, bytes(32 + 64)))
