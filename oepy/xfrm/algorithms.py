"""What the kernel calls an algorithm, by strongSwan's names for it, and what keys it wants."""

from __future__ import annotations

from dataclasses import dataclass

from oepy.errors import OepyError
from oepy.model import EspSuite, SaKeys, Secret
from oepy.xfrm.values import Algorithm


@dataclass(frozen=True, slots=True)
class Cipher:
    """`key` and `salt` in bytes; what IKE and `SaKeys` call the key ends in the salt. `icv_bits` is 0 but for
    an AEAD. `module` has it, where it is not built in."""

    kernel: str
    key: int
    salt: int = 0
    icv_bits: int = 0
    module: str = ""


@dataclass(frozen=True, slots=True)
class Mac:
    """`key` in bytes, and the ICV's length after truncation."""

    kernel: str
    key: int
    icv_bits: int
    module: str = ""


_GCM, _CTR, _CBC = "rfc4106(gcm(aes))", "rfc3686(ctr(aes))", "cbc(aes)"
CIPHERS: dict[str, Cipher] = {
    # RFC 4106, RFC 7634: 4 bytes of salt
    "aes128gcm16": Cipher(_GCM, 16, 4, 128, "gcm"),
    "aes192gcm16": Cipher(_GCM, 24, 4, 128, "gcm"),
    "aes256gcm16": Cipher(_GCM, 32, 4, 128, "gcm"),
    "chacha20poly1305": Cipher("rfc7539esp(chacha20,poly1305)", 32, 4, 128, "chacha20poly1305"),
    # RFC 3686: 4 bytes of nonce
    "aes128ctr": Cipher(_CTR, 16, 4, module="ctr"),
    "aes192ctr": Cipher(_CTR, 24, 4, module="ctr"),
    "aes256ctr": Cipher(_CTR, 32, 4, module="ctr"),
    # RFC 3602
    "aes128": Cipher(_CBC, 16, module="cbc"),
    "aes192": Cipher(_CBC, 24, module="cbc"),
    "aes256": Cipher(_CBC, 32, module="cbc"),
    # RFC 2451, for manual keys that ask for it
    "3des": Cipher("cbc(des3_ede)", 24, module="des_generic"),
    # RFC 2410
    "null": Cipher("ecb(cipher_null)", 0, module="crypto_null"),
}
MACS: dict[str, Mac] = {
    # RFC 4868 §2.3, RFC 2404
    "sha256": Mac("hmac(sha256)", 32, 128, "sha256_generic"),
    "sha384": Mac("hmac(sha384)", 48, 192, "sha512_generic"),
    "sha512": Mac("hmac(sha512)", 64, 256, "sha512_generic"),
    # As Linux cut it before RFC 4868
    "sha256_96": Mac("hmac(sha256)", 32, 96, "sha256_generic"),
    # RFC 3566
    "aesxcbc": Mac("xcbc(aes)", 16, 96, "xcbc"),
    "sha1": Mac("hmac(sha1)", 20, 96, "sha1_generic"),
}


@dataclass(frozen=True, slots=True)
class Transforms:
    """What an Sa wants for one direction."""

    encryption: Algorithm | None = None
    integrity: Algorithm | None = None
    aead: Algorithm | None = None


def transforms(protocol: str, suite: EspSuite, keys: SaKeys) -> Transforms:
    """Raises OepyError for a suite that `protocol` ("esp" or "ah") has not, or keys of the wrong length."""
    mac = MACS.get(suite.integrity)
    if suite.integrity and mac is None:
        raise OepyError(f"suite {suite}: {suite.integrity!r} is not known", f"one of {', '.join(MACS)}")
    if protocol == "ah":
        if mac is None or suite.encryption not in ("", "null"):
            raise OepyError(f"AH with {suite} is not possible", "AH takes integrity alone, sha256 say")
        _expect(suite, "encryption key", keys.encryption, 0)
        return Transforms(integrity=_integrity(suite, keys, mac))
    cipher = CIPHERS.get(suite.encryption)
    if cipher is None:
        raise OepyError(
            f"ESP suite {suite}: {suite.encryption!r} is not known", f"one of {', '.join(CIPHERS)}"
        )
    if cipher.icv_bits and mac is not None:
        raise OepyError(f"ESP suite {suite}: {suite.encryption} has integrity already", "leave one away")
    if not cipher.icv_bits and mac is None:
        # RFC 8221 §4: encryption without integrity must not be used, and null with nothing is no protection
        raise OepyError(f"ESP suite {suite} has no integrity", f"add one of {', '.join(MACS)}")
    what = "encryption key with salt" if cipher.salt else "encryption key"
    _expect(suite, what, keys.encryption, cipher.key + cipher.salt)
    if mac is None:
        _expect(suite, "integrity key", keys.integrity, 0)
        return Transforms(aead=Algorithm(cipher.kernel, keys.encryption, cipher.icv_bits))
    return Transforms(Algorithm(cipher.kernel, keys.encryption), _integrity(suite, keys, mac))


def _integrity(suite: EspSuite, keys: SaKeys, mac: Mac) -> Algorithm:
    _expect(suite, "integrity key", keys.integrity, mac.key)
    return Algorithm(mac.kernel, keys.integrity, mac.icv_bits)


def _expect(suite: EspSuite, what: str, key: Secret, length: int) -> None:
    if len(key) != length:
        raise OepyError(f"suite {suite} wants an {what} of {length} bytes, got {len(key)}")


def module_of(kernel_name: str) -> str:
    """The module that has an algorithm, by the kernel's name of it; "" for one that we do not know."""
    return _MODULES.get(kernel_name, "")


_MODULES = {cipher.kernel: cipher.module for cipher in CIPHERS.values()}
_MODULES.update({mac.kernel: mac.module for mac in MACS.values()})
