"""The keys and certificates of both ends, made once for all cases."""

from __future__ import annotations

import copy
import datetime
import functools
from dataclasses import dataclass

from oepy.keys import HostKey
from oepy.model import PublicKey
from tests.fakes.certificates import DNS, Holder

OEPY_ID, PEER_ID = "alpha.example", "gw.example"
SECRET = "of two ends, and of nobody else"
RAW_KINDS = ("ed25519", "ecdsa-p256", "ecdsa-p384", "rsa-3072")
# With the kind of both ends' keys; long RSA keys take many seconds in an emulated machine
X509_KINDS = {"x509-rsa": "rsa-2048", "x509-ecdsa": "ecdsa-p256"}


@dataclass(frozen=True)
class Site:
    """A root, a CA below it, and below that a certificate for each end."""

    root: Holder
    middle: Holder
    oepy: Holder
    peer: Holder


@functools.cache
def _made() -> Credentials:
    return Credentials()


def credentials() -> Credentials:
    """The same for all peers of a run, as RSA keys take minutes in an emulated machine; own public keys."""
    found = copy.copy(_made())
    found.peer_public = dict(found.peer_public)
    return found


class Credentials:
    """`oepy_keys` and `peer_keys` by kind. A peer that makes its own keys replaces those of `peer_public`."""

    def __init__(self) -> None:
        self.oepy_keys = {kind: HostKey.generate(kind) for kind in RAW_KINDS}
        self.peer_keys = {kind: HostKey.generate(kind) for kind in RAW_KINDS}
        self.peer_public: dict[str, PublicKey] = {kind: key.public for kind, key in self.peer_keys.items()}
        self.sites = {name: self._site(name, kind) for name, kind in X509_KINDS.items()}

    def _site(self, label: str, kind: str) -> Site:
        now = datetime.datetime.now(datetime.UTC)
        root = Holder(f"{label} root", key=HostKey.generate(kind).private, moment=now)
        middle = Holder(f"{label} CA", root, key=HostKey.generate(kind).private, moment=now)
        # Keys of their own, as strongSwan believes a key that it has had for the same name before; and subjects of
        # their own, by which libreswan's key store tells certificates apart
        ends = (
            Holder(
                *(f"{label} {name}", middle),
                ca=False,
                key=HostKey.generate(kind).private,
                moment=now,
                alternatives=[DNS(name)],
            )
            for name in (OEPY_ID, PEER_ID)
        )
        return Site(root, middle, *ends)
