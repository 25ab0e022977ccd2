"""X.509 in the daemon: which certificates a connection shows, which it accepts, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from oepy.connections.model import Authority, Connection, ConnectionSet
from oepy.daemon.revocation import NOTHING_CONFIGURED, RETRY_SECONDS, Revocation
from oepy.errors import KeyFormatError
from oepy.ike.settings import Certificates
from oepy.keys import to_public_key
from oepy.model import PeerIdentity, PublicKey
from oepy.x509.certificates import Certificate, subject_of, to_der
from oepy.x509.path import Path, PathError, remaining
from oepy.x509.trust import Trust, accept

MAX_OF_SITE = 8  # certificates in a file that somebody has chosen one by one
EXPIRES_SOON = 14 * 86400.0  # seconds before its end from which on a certificate is spoken of


@dataclass(frozen=True, slots=True)
class Ending:
    """A certificate of the configuration that has ended, or will soon."""

    certificate: str
    file: str
    own: bool  # ours, not one that peers are trusted by
    remaining: float  # seconds

    def __str__(self) -> str:
        when = "has expired" if self.remaining < 0 else f"expires in {self.remaining / 86400:.1f} days"
        return f"{self.certificate} in {self.file} {when}"

    @property
    def mend(self) -> str:
        return "renew it, and `oepy connection load`" if self.own else "ask its CA for the one that follows"


def endings(configured: ConnectionSet, now: float) -> list[Ending]:
    """Of what the connections show and trust; the soonest first. `now` in seconds since 1970. Not of a system's
    whole bundle of CAs, of which some always end."""
    shown = {file for connection in configured.certified for file in connection.local.certs}
    trusted = {
        file
        for connection in configured.certified
        for file in (*connection.remote.cacerts, *connection.remote.certs)
    }
    found = [
        Ending(subject_of(certificate), file, file in shown, left)
        for file in sorted(shown | trusted)
        for certificate in configured.certificates[file]
        if len(configured.certificates[file]) <= MAX_OF_SITE
        and (left := remaining(certificate, now)) < EXPIRES_SOON
    ]
    return sorted(found, key=lambda ending: ending.remaining)


class CertificateRefused(Exception):
    """The text says why, and nothing that the peer does not know."""


class Trusts:
    """Of one configuration. `wall_clock` in seconds since 1970."""

    def __init__(self, configured: ConnectionSet, wall_clock: Callable[[], float]) -> None:
        self._configured = configured
        self._wall_clock = wall_clock
        self._authorities: dict[Certificate, Authority] | None = None
        self._responses: dict[Certificate | None, tuple[bytes, ...]] = {}  # by our own certificate
        self._ask_again: dict[Certificate, float] = {}
        self._trust: dict[tuple[tuple[str, ...], tuple[str, ...]], Trust] = {}

    def of(self, connection: Connection) -> Trust:
        """Connections that name the same files share one."""
        key = (connection.remote.cacerts, connection.remote.certs)
        if key not in self._trust:
            self._trust[key] = Trust.of(*map(self._configured.certificates_of, key))
        return self._trust[key]

    def authority_of(self, certificate: Certificate) -> Authority:
        """What is configured of this CA, of all sections together."""
        if self._authorities is None:
            self._authorities = {}
            for one in self._configured.authorities:
                for authority in self._configured.certificates_of((one.cacert,)):
                    known = self._authorities.get(authority, NOTHING_CONFIGURED)
                    self._authorities[authority] = Authority(
                        one.cacert, (*known.crl_uris, *one.crl_uris), (*known.ocsp_uris, *one.ocsp_uris)
                    )
        return self._authorities.get(certificate, NOTHING_CONFIGURED)

    def _shown(self, connection: Connection) -> Certificate | None:
        certs = self._configured.certificates_of(connection.local.certs)
        return certs[0] if certs else None

    async def refresh_responses(self, revocation: Revocation) -> bool:
        """Ask about our own certificates, each when half of its last answer's time is over. Whether anything is
        another answer now."""
        changed = False
        everybody = [one for found in self._configured.certificates.values() for one in found]
        shown = [self._shown(one) for one in self._configured.certified if one.send_cert != "never"]
        for certificate in dict.fromkeys(shown):
            now = self._wall_clock()
            if certificate is None or now < self._ask_again.get(certificate, 0.0):
                continue
            issuer = next((one for one in everybody if one.subject == certificate.issuer), None)
            if issuer is None:
                continue
            found = await revocation.own_response(certificate, issuer)
            before = self._responses.get(certificate, ())
            self._responses[certificate] = () if found is None else (found[0],)
            self._ask_again[certificate] = now + (
                RETRY_SECONDS if found is None else max((found[1] - now) / 2, 60.0)
            )
            changed = changed or before != self._responses[certificate]
        return changed

    def settings(self, connection: Connection) -> Certificates:
        remote = connection.remote
        ask = remote.auth == "x509" and connection.send_certreq and bool(remote.cacerts or remote.certs)
        return Certificates(
            chain=tuple(map(to_der, self._configured.certificates_of(connection.local.certs))),
            send=connection.send_cert,
            ask=ask,
            authorities=self.of(connection).key_hashes() if ask else (),
            responses=self._responses.get(self._shown(connection), ()),
            ask_status=ask and remote.revocation != "relaxed",
        )

    def accept(
        self, connection: Connection, sent: Sequence[bytes], identity: PeerIdentity
    ) -> tuple[PublicKey, Path]:
        """The key that the peer must prove. Raises CertificateRefused."""
        if not connection.remote.id.matches(identity):
            raise CertificateRefused(f"the peer is {identity}, not {connection.remote.id.text}")
        try:
            path = accept(self.of(connection), sent, identity, self._wall_clock())
            return to_public_key(path.leaf.public_key()), path
        except (PathError, KeyFormatError) as error:
            raise CertificateRefused(str(error)) from None


def asked_by_all(all_of_them: Iterable[Certificates]) -> dict[str, Any]:
    """The request for certificates of a peer that may belong to any of several connections."""
    asking = [one for one in all_of_them if one.ask]
    authorities = dict.fromkeys(name for one in asking for name in one.authorities)
    return {
        "ask": bool(asking),
        "authorities": tuple(authorities),
        "ask_status": any(one.ask_status for one in asking),
    }
