"""Certificates for libreswan, which keeps them in an NSS database."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12

from oepy.lab.libreswan import run
from tests.fakes.certificates import Holder, pem

_PASSWORD = "of the test"


def take_own(directory: Path, nss: str, name: str, own: Holder, chain: Sequence[Holder] = ()) -> None:
    """A certificate with its key; `directory` gets a file of both."""
    file = directory / f"{name}.p12"
    file.touch(mode=0o600)
    file.write_bytes(
        pkcs12.serialize_key_and_certificates(
            *(name.encode(), own.key, own.certificate, [one.certificate for one in chain]),
            BestAvailableEncryption(_PASSWORD.encode()),
        )
    )
    run("pk12util", "-i", str(file), "-d", nss, "-W", _PASSWORD, "-K", "")


def take_root(directory: Path, nss: str, name: str, root: Holder) -> None:
    """A CA to trust."""
    file = directory / f"{name}.pem"
    file.write_bytes(pem(root))
    run("certutil", "-A", "-a", "-i", str(file), "-d", nss, "-n", name, "-t", "CT,,")
