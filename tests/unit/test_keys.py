"""Host keys and the DNS form of public keys."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from oepy import keys
from oepy.errors import KeyFormatError
from oepy.keyring import KeyRing
from oepy.keys import HostKey, is_encrypted, parse_public, read_passphrase
from oepy.model import KeyAlgorithm, PublicKey, Secret

KINDS = ["ed25519", "ed448", "ecdsa-p256", "ecdsa-p384", "rsa-2048"]
NAMES = {"ed25519": "Ed25519", "ed448": "Ed448", "ecdsa-p256": "ECDSA-P256", "ecdsa-p384": "ECDSA-P384"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_survives_file_dns_form_and_pem(kind, tmp_path):
    """Saved and loaded it has the same public key, and each public form reads back the same."""
    key = keys.HostKey.generate(kind)
    key.save(tmp_path / "host.key")
    assert keys.HostKey.load(tmp_path / "host.key").public == key.public
    assert keys.to_public_key(keys.from_public_key(key.public)) == key.public
    assert keys.parse_public(keys.public_pem(key.public)) == key.public
    assert keys.parse_public(f"{int(key.public.algorithm)} {keys.encode(key.public)}\n") == key.public
    assert keys.describe(key.public) == NAMES.get(kind, "RSA-2048")


def test_saving_is_private_and_never_overwrites(tmp_path):
    """The file has mode 0600 whatever the umask, a second save fails, and no temporary file is left."""
    before = os.umask(0)
    try:
        key = keys.HostKey.generate()
        key.save(tmp_path / "host.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "host.key").stat().st_mode) == 0o600
    with pytest.raises(KeyFormatError, match="exists"):
        keys.HostKey.generate().save(tmp_path / "host.key")
    assert keys.HostKey.load(tmp_path / "host.key").public == key.public
    assert os.listdir(tmp_path) == ["host.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_file_that_others_can_read_is_refused_with_the_mend(mode, tmp_path):
    """Group or world readable: an error that names chmod 600."""
    path = tmp_path / "host.key"
    keys.HostKey.generate().save(path)
    path.chmod(mode)
    with pytest.raises(KeyFormatError, match="chmod 600"):
        keys.HostKey.load(path)


def test_unusable_key_files_say_why(tmp_path):
    """Missing, not a file, not PEM: a KeyFormatError each."""
    (tmp_path / "text").write_text("hello")
    (tmp_path / "text").chmod(0o600)
    for name, reason in [("none", "does not exist"), ("text", "no private key"), (".", "regular file")]:
        with pytest.raises(KeyFormatError, match=reason):
            keys.HostKey.load(tmp_path / name)


def test_repr_hides_the_private_key():
    """Nothing of the private key is in repr."""
    key = keys.HostKey.generate()
    assert key.private.private_bytes_raw().hex() not in repr(key)
    assert repr(key).startswith("HostKey(Ed25519, ")


def test_a_private_key_is_refused_as_public():
    """Who gives a private key where a public one belongs is told so."""
    with pytest.raises(KeyFormatError, match="private key"):
        keys.parse_public(keys.HostKey.generate().to_pem())


MODULUS = rsa.generate_private_key(65537, 1024).public_key().public_numbers().n.to_bytes(128, "big")


def test_rsa_exponent_length_in_three_bytes_is_read():
    """RFC 3110 §2: a zero byte, then two bytes of exponent length."""
    short = PublicKey(KeyAlgorithm.RSA, b"\x03\x01\x00\x01" + MODULUS)
    long = PublicKey(KeyAlgorithm.RSA, b"\x00\x00\x03\x01\x00\x01" + MODULUS)
    assert keys.to_public_key(keys.from_public_key(long)) == short


@pytest.mark.parametrize(
    ("algorithm", "data", "reason"),
    [
        (2, b"", "wants 1 bytes"),
        (2, b"\x00\x01", "wants 2 bytes"),
        (2, b"\x05\x01", "wants 5 bytes"),
        (2, b"\x00\x00\x00" + MODULUS, "empty"),
        (2, b"\x03\x01\x00\x01", "empty"),
        (2, b"\x03\x00\x00\x03" + MODULUS, "leading zero"),
        (2, b"\x01\x03\x00" + MODULUS, "leading zero"),
        (2, b"\x01\x03" + MODULUS[:64], "outside of 1024"),
        (2, b"\x01\x03" + b"\xff" * 1025, "over the limit"),
        (2, b"\x09" + b"\xff" * 9 + MODULUS, "over the limit"),
        (2, b"\x01\x01" + MODULUS, "exponent must be odd"),
        (2, b"\x01\x04" + MODULUS, "exponent must be odd"),
        (2, b"\x01\x03" + MODULUS[:-1] + b"\x02", "even"),
        (3, b"\x01" * 63, "63 bytes"),
        (3, b"\x01" * 64, "not a point"),
        (3, b"\xff" * 96, "not a point"),
        (4, b"\x01" * 33, "33 bytes"),
    ],
    ids=lambda value: "data" if isinstance(value, bytes) else None,  # the same in every process
)
def test_malformed_dns_forms_are_refused_with_the_reason(algorithm, data, reason):
    """Each bound and each shape has its own words."""
    with pytest.raises(KeyFormatError, match=reason):
        keys.from_public_key(PublicKey(KeyAlgorithm(algorithm), data))


@given(st.sampled_from(list(KeyAlgorithm)), st.binary(max_size=200))
def test_any_bytes_are_a_key_or_a_key_format_error(algorithm, data):
    """The parser gives a key that encodes to one of the same kind, or KeyFormatError, nothing else."""
    key = PublicKey(algorithm, data)
    try:
        loaded = keys.from_public_key(key)
    except KeyFormatError:
        keys.describe(key)
        return
    assert keys.to_public_key(loaded).algorithm is algorithm


@given(st.binary(max_size=100))
def test_any_text_is_a_public_key_or_a_key_format_error(data):
    """parse_public raises nothing but KeyFormatError."""
    with contextlib.suppress(KeyFormatError):
        keys.parse_public(data)


# ---- encrypted keys -----------------------------------------------------------------------------------------


def passphrase_in(path: Path, text: bytes = b"correct horse\n") -> Path:
    path.write_bytes(text)
    path.chmod(0o600)
    return path


def test_an_encrypted_key_opens_by_the_file_beside_it(tmp_path):
    """PKCS#8 that openssl's tools read too; without the passphrase nothing of the key can be had."""
    path = tmp_path / "host.key"
    passphrase_in(tmp_path / "host.key.passphrase")
    made = HostKey.generate("ed25519")
    made.save(path, read_passphrase(path))
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert HostKey.load(path).public == made.public
    found = subprocess.run(
        ["openssl", "pkey", "-in", str(path), "-passin", "pass:correct horse", "-pubout"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert parse_public(found.stdout) == made.public


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        (None, 0o600, "there is no passphrase"),
        (b"wrong\n", 0o600, "does not open"),
        (b"\n", 0o600, "first line of"),
        (b"correct horse\n", 0o644, "read by others"),
    ],
)
def test_an_encrypted_key_without_its_passphrase_says_what_to_do(tmp_path, text, mode, why):
    path = tmp_path / "host.key"
    HostKey.generate("ed25519").save(path, Secret(b"correct horse"))
    if text is not None:
        passphrase_in(tmp_path / "host.key.passphrase", text).chmod(mode)
    with pytest.raises(KeyFormatError, match=why) as caught:
        HostKey.load(path)
    assert "correct" not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_systemds_credential_comes_first(tmp_path, monkeypatch):
    """`LoadCredential=oepy-passphrase:…` needs no file beside the key."""
    path = tmp_path / "host.key"
    HostKey.generate("rsa-2048").save(path, Secret(b"from systemd"))
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    passphrase_in(credentials / "oepy-passphrase", b"from systemd")
    passphrase_in(tmp_path / "host.key.passphrase")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert HostKey.load(path)


def test_the_next_key_of_an_encrypted_one_is_encrypted_too(tmp_path):
    path = tmp_path / "host.key"
    passphrase_in(tmp_path / "host.key.passphrase")
    HostKey.generate("ed25519").save(path, read_passphrase(path))
    ring = KeyRing(path)
    ring.begin("ed25519")
    assert is_encrypted(ring.next)
    ring.switch()
    assert is_encrypted(path)
    assert len(ring.listed()) == 2
    assert HostKey.load(path).public != HostKey.load(ring.retired).public
