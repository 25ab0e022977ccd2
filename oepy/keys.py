"""Host keys, and public keys in the form that DNS carries.

DNS forms: RSA by RFC 3110 §2 (exponent length in one byte, or 0 and two bytes), ECDSA by RFC 6605 §4 (x
and y, no leading byte), EdDSA by RFC 8080 §3. All integers are big-endian. The algorithm
numbers are IPSECKEY's (`model.KeyAlgorithm`), which is why the curve is told by the length alone.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from oepy.errors import KeyFormatError, ParseError
from oepy.model import KeyAlgorithm, PublicKey, Secret
from oepy.privatefile import MAX_KEY_FILE, read_private_file
from oepy.wire import Reader, Writer

_ENCRYPTED = b"ENCRYPTED"  # in PKCS#8's PEM label, and in the header of the older form
MIN_RSA_BITS = 1024
MAX_RSA_BITS = 8192
# A long public exponent makes each verification as dear as a signature: 8192 bits with an 8192-bit exponent
# would cost a peer's victim tens of milliseconds a message.
MAX_RSA_EXPONENT_BITS = 64
_RSA_PUBLIC_EXPONENT = 65537
_CURVE_OF_LENGTH: dict[int, ec.EllipticCurve] = {64: ec.SECP256R1(), 96: ec.SECP384R1()}
_CURVE_NAMES = {64: "ECDSA-P256", 96: "ECDSA-P384"}
_EDDSA_NAMES = {32: "Ed25519", 57: "Ed448"}

PublicKeyObject = (
    rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey
)
PrivateKeyObject = (
    rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
)

_GENERATORS: dict[str, Callable[[], PrivateKeyObject]] = {
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ed448": ed448.Ed448PrivateKey.generate,
    "ecdsa-p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "rsa-2048": lambda: rsa.generate_private_key(_RSA_PUBLIC_EXPONENT, 2048),
    "rsa-3072": lambda: rsa.generate_private_key(_RSA_PUBLIC_EXPONENT, 3072),
    "rsa-4096": lambda: rsa.generate_private_key(_RSA_PUBLIC_EXPONENT, 4096),
}
KINDS = tuple(_GENERATORS)


class HostKey:
    """This host's private key. `private` is cryptography's object; `public` is what DNS publishes."""

    __slots__ = ("private", "public")

    def __init__(self, private: PrivateKeyObject) -> None:
        self.private = private
        self.public = to_public_key(private.public_key())

    @classmethod
    def generate(cls, kind: str = "ed25519") -> HostKey:
        """A new key of one of `KINDS`. Raises KeyFormatError for another kind."""
        generator = _GENERATORS.get(kind)
        if generator is None:
            raise KeyFormatError(f"no key type {kind!r}", f"take one of {', '.join(KINDS)}")
        return cls(generator())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HostKey:
        """From a PEM file that only its owner can read; an encrypted one by its passphrase file. Raises
        KeyFormatError."""
        pem = read_private_file(Path(path), f"make it with `oepy key generate {path}`")
        passphrase = read_passphrase(Path(path)) if _ENCRYPTED in pem else None
        return cls.from_pem(pem, str(path), passphrase)

    @classmethod
    def from_pem(cls, pem: bytes, source: str = "key", passphrase: Secret | None = None) -> HostKey:
        """From the PEM text itself; `source` names it in errors. Raises KeyFormatError."""
        try:
            private = serialization.load_pem_private_key(pem, passphrase.reveal() if passphrase else None)
        except TypeError:
            raise KeyFormatError(f"{source} is encrypted, and no passphrase was given") from None
        except (ValueError, UnsupportedAlgorithm) as error:
            if passphrase and not isinstance(error, UnsupportedAlgorithm):
                raise KeyFormatError(f"the passphrase does not open {source}") from None
            raise KeyFormatError(
                f"{source} holds no private key in PEM form", "make one with `oepy key generate`"
            ) from None
        if not isinstance(private, PrivateKeyObject):
            raise KeyFormatError(f"{source}: a key of this kind is not usable for IPSECKEY")
        return cls(private)

    def save(self, path: str | os.PathLike[str], passphrase: Secret | None = None) -> None:
        """Write PKCS#8 PEM (encrypted, with a passphrase) with mode 0600, whole or not at all. Raises
        KeyFormatError where `path` exists."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise KeyFormatError(f"cannot write {target}: {error.strerror}") from None
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(self.to_pem(passphrase))
                stream.flush()
                os.fsync(stream.fileno())
            os.link(temporary, target)  # unlike rename, fails where the target exists
        except FileExistsError:
            raise KeyFormatError(
                f"{target} exists", "a key is never overwritten: move it away first"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def to_pem(self, passphrase: Secret | None = None) -> bytes:
        """PKCS#8, without a passphrase not encrypted: secret."""
        encryption = (
            serialization.BestAvailableEncryption(passphrase.reveal())
            if passphrase
            else serialization.NoEncryption()
        )
        return self.private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )

    def __repr__(self) -> str:
        return f"HostKey({describe(self.public)}, {fingerprint(self.public)})"


def is_encrypted(path: Path) -> bool:
    """Of a private key file. Raises KeyFormatError."""
    return _ENCRYPTED in read_private_file(path)


def read_passphrase(path: Path) -> Secret:
    """The passphrase of a key: the first line of `KEY.passphrase` beside it (a link to a place that is not on the
    same disk will do), or what systemd gives as the credential `oepy-passphrase`. Raises KeyFormatError."""
    base = path.name.removesuffix(".next").removesuffix(".retired")  # those of a roll-over have the same
    places = [path.with_name(f"{base}.passphrase")]
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials:
        places.insert(0, Path(credentials) / "oepy-passphrase")
    for place in places:
        if place.exists():
            line = read_private_file(place).split(b"\n", 1)[0].rstrip(b"\r")
            if not line:
                raise KeyFormatError(f"the first line of {place} is empty", "write the passphrase there")
            return Secret(line)
    raise KeyFormatError(
        f"{path} is encrypted, and there is no passphrase", f"write it to {places[-1]}, mode 0600"
    )


def to_public_key(key: object) -> PublicKey:
    """The DNS form of a cryptography public key. Raises KeyFormatError for a kind DNS has no form for."""
    if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        return PublicKey(KeyAlgorithm.EDDSA, key.public_bytes_raw())
    if isinstance(key, ec.EllipticCurvePublicKey):
        return PublicKey(KeyAlgorithm.ECDSA, _ecdsa_data(key))
    if isinstance(key, rsa.RSAPublicKey):
        return PublicKey(KeyAlgorithm.RSA, _rsa_data(key))
    raise KeyFormatError(f"a {type(key).__name__} has no IPSECKEY form", f"take one of {', '.join(KINDS)}")


def _ecdsa_data(key: ec.EllipticCurvePublicKey) -> bytes:
    numbers = key.public_numbers()
    for length, curve in _CURVE_OF_LENGTH.items():
        if curve.name == key.curve.name:
            half = length // 2
            return numbers.x.to_bytes(half, "big") + numbers.y.to_bytes(half, "big")
    raise KeyFormatError(f"curve {key.curve.name} has no IPSECKEY form", "use P-256 or P-384")


def _rsa_data(key: rsa.RSAPublicKey) -> bytes:
    numbers = key.public_numbers()
    _check_rsa(numbers.n, numbers.e)
    exponent = numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8, "big")
    writer = Writer()
    writer.push_u8(len(exponent))  # at most 8 bytes by _check_rsa, so never the long form
    writer.push_bytes(exponent)
    writer.push_bytes(numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big"))
    return writer.finish()


@functools.lru_cache(maxsize=1024)
def from_public_key(key: PublicKey) -> PublicKeyObject:
    """cryptography's object of a key in DNS form. Raises KeyFormatError, saying why. Peers come again, and to look
    whether a point is on its curve takes a good part of what a handshake may cost."""
    try:
        if key.algorithm is KeyAlgorithm.RSA:
            return _rsa_object(key.data)
        if key.algorithm is KeyAlgorithm.ECDSA:
            return _ecdsa_object(key.data)
        return _eddsa_object(key.data)
    except ParseError as error:
        raise KeyFormatError(str(error)) from None


def _rsa_object(data: bytes) -> rsa.RSAPublicKey:
    modulus, exponent = parse_rsa(data)
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError as error:
        raise KeyFormatError(f"RSA key: {error}") from None


def parse_rsa(data: bytes) -> tuple[int, int]:
    """Modulus and exponent of RFC 3110 §2. Raises ParseError or KeyFormatError."""
    reader = Reader(data, what="RSA key")
    length = reader.pull_u8()
    if length == 0:
        length = reader.pull_u16()
    exponent, modulus = reader.pull_bytes(length), reader.pull_rest()
    if not exponent or not modulus:
        raise KeyFormatError("RSA key: the exponent or the modulus is empty")
    if exponent[0] == 0 or modulus[0] == 0:
        raise KeyFormatError("RSA key: leading zero bytes are prohibited (RFC 3110 §2)")
    # The bounds are checked on lengths before any arithmetic on the numbers.
    if len(exponent) * 8 > MAX_RSA_EXPONENT_BITS or len(modulus) * 8 > MAX_RSA_BITS:
        raise KeyFormatError(
            f"RSA key: {len(modulus) * 8}-bit modulus with {len(exponent) * 8}-bit exponent is over the "
            f"limit of {MAX_RSA_BITS} and {MAX_RSA_EXPONENT_BITS}"
        )
    numbers = int.from_bytes(modulus, "big"), int.from_bytes(exponent, "big")
    _check_rsa(*numbers)
    return numbers


def _check_rsa(modulus: int, exponent: int) -> None:
    if not MIN_RSA_BITS <= modulus.bit_length() <= MAX_RSA_BITS:
        raise KeyFormatError(
            f"RSA key: {modulus.bit_length()} bits are outside of {MIN_RSA_BITS}..{MAX_RSA_BITS}"
        )
    if modulus % 2 == 0:
        raise KeyFormatError("RSA key: the modulus is even")
    if exponent < 3 or exponent % 2 == 0 or exponent.bit_length() > MAX_RSA_EXPONENT_BITS:
        raise KeyFormatError(f"RSA key: the exponent must be odd and of 2 to {MAX_RSA_EXPONENT_BITS} bits")


def _ecdsa_object(data: bytes) -> ec.EllipticCurvePublicKey:
    curve = _CURVE_OF_LENGTH.get(len(data))
    if curve is None:
        raise KeyFormatError(f"ECDSA key: {len(data)} bytes, neither 64 (P-256) nor 96 (P-384)")
    half = len(data) // 2
    x, y = int.from_bytes(data[:half], "big"), int.from_bytes(data[half:], "big")
    try:
        return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except ValueError:
        raise KeyFormatError(f"ECDSA key: not a point of the curve {curve.name}") from None


def _eddsa_object(data: bytes) -> ed25519.Ed25519PublicKey | ed448.Ed448PublicKey:
    if len(data) == 32:
        return ed25519.Ed25519PublicKey.from_public_bytes(data)
    if len(data) == 57:
        return ed448.Ed448PublicKey.from_public_bytes(data)
    raise KeyFormatError(f"EdDSA key: {len(data)} bytes, neither 32 (Ed25519) nor 57 (Ed448)")


def parse_public(text: str | bytes, source: str = "key") -> PublicKey:
    """A public key from PEM, or `ALGORITHM BASE64` (IPSECKEY's number, the DNS form). KeyFormatError else."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    if len(data) > MAX_KEY_FILE:
        raise KeyFormatError(f"{source} is too long for a public key")
    if b"-----BEGIN" in data:
        return _public_from_pem(data, source)
    number, _, encoded = data.strip().partition(b" ")
    if not number.isdigit():
        raise KeyFormatError(f"{source} is neither PEM nor an algorithm number with base64")
    return public_from_dns_form(int(number[:4]), b"".join(encoded.split()), source)


def _public_from_pem(data: bytes, source: str) -> PublicKey:
    if b"PRIVATE KEY-----" in data:
        raise KeyFormatError(f"{source} is a private key", "give the output of `oepy key show --format pem`")
    try:
        return to_public_key(serialization.load_pem_public_key(data))
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFormatError(f"{source} holds no public key in PEM form") from None


def public_from_dns_form(algorithm: int, encoded: bytes, source: str = "key") -> PublicKey:
    """From an IPSECKEY algorithm number and base64, checked to be a usable key. Raises KeyFormatError."""
    try:
        kind = KeyAlgorithm(algorithm)
    except ValueError:
        raise KeyFormatError(
            f"{source}: algorithm {algorithm} is unknown", "2 is RSA, 3 ECDSA, 4 EdDSA"
        ) from None
    try:
        key = PublicKey(kind, base64.b64decode(encoded, validate=True))
    except binascii.Error:
        raise KeyFormatError(f"{source}: not valid base64") from None
    from_public_key(key)
    return key


def public_pem(key: PublicKey) -> str:
    """SubjectPublicKeyInfo in PEM form. Raises KeyFormatError."""
    return (
        from_public_key(key)
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode("ascii")
    )


def encode(key: PublicKey) -> str:
    """Base64 of the DNS form."""
    return base64.b64encode(key.data).decode("ascii")


def fingerprint(key: PublicKey) -> str:
    """The first 16 hex digits of SHA-256 over algorithm number and DNS form: for people, not proofs."""
    return hashlib.sha256(bytes([key.algorithm]) + key.data).hexdigest()[:16]


def describe(key: PublicKey) -> str:
    """A short name such as Ed25519, ECDSA-P256 or RSA-3072. Never raises."""
    if key.algorithm is KeyAlgorithm.EDDSA:
        return _EDDSA_NAMES.get(len(key.data), "EdDSA")
    if key.algorithm is KeyAlgorithm.ECDSA:
        return _CURVE_NAMES.get(len(key.data), "ECDSA")
    try:
        return f"RSA-{parse_rsa(key.data)[0].bit_length()}"
    except (ParseError, KeyFormatError):
        return "RSA"
