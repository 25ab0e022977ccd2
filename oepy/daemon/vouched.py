"""Opportunistic peers that publish no key, and for which a CA vouches.

The peer shows a certificate that gives it its identity. One that names the peer's address proves that the address
is the peer's. One that names a domain proves only that whoever owns the domain is there, and counts as a key at a
forward name does (`oepy.dns.claims`): the name must lead to the address by secure records, and the alternative must
be the clear, for a certificate of some domain anybody can get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oepy.daemon.book import Book
from oepy.daemon.revocation import Revocation
from oepy.daemon.trust import CertificateRefused
from oepy.ike import events as ike
from oepy.model import Authenticated, IdType, IpAddress, PeerIdentity, PolicyGroup
from oepy.x509.identity import speaks_for
from oepy.x509.path import Path
from oepy.x509.trust import Trust

if TYPE_CHECKING:
    from oepy.daemon.core import Core


@dataclass(slots=True)
class _Vouched:
    """`path` is there when a certificate was accepted; the peer's proof of its key may still be to come."""

    destination: IpAddress
    path: Path | None = None


class VouchedPeers:
    """By IKE session, as long as it lives."""

    def __init__(self, core: Core, book: Book, revocation: Revocation) -> None:
        self._core, self._book, self._revocation = core, book, revocation
        self._sessions: dict[int, _Vouched] = {}

    def begin(self, session: int, destination: IpAddress) -> None:
        self._sessions[session] = _Vouched(destination)

    def follow(self, session: int, replaces: int) -> None:
        """A reauthentication."""
        if replaces in self._sessions:
            self.begin(session, self._sessions[replaces].destination)

    def end(self, session: int) -> None:
        self._sessions.pop(session, None)

    def _counts_at(self, address: IpAddress) -> bool:
        """Whether a certificate may stand in for the key that nobody publishes there."""
        return self._core.engine.settings.by_certificate(address)

    def has(self, session: int) -> bool:
        return session in self._sessions

    def address_of(self, session: int) -> IpAddress | None:
        """Whose traffic the peer of an established session may have."""
        known = self._sessions.get(session)
        return known.destination if known is not None and known.path is not None else None

    def reload(self, before: Trust | None) -> None:
        """Another configuration: who was trusted by what is no longer there is let go."""
        vouching = self._book.configured.vouching
        same = vouching is not None and self._book.trusts.of(vouching) == before
        for session, known in list(self._sessions.items()):
            if not same or not self._counts_at(known.destination):
                self._core.negotiator.end_session(session)

    async def keys(self, event: ike.NeedPeerKey) -> ike.Known | ike.Refused:
        """The key that the peer must prove."""
        known, vouching = self._sessions.get(event.session), self._book.configured.vouching
        if known is None or vouching is None or not self._counts_at(known.destination):
            return ike.Refused("no key of it is published, and certificates do not count for it")
        try:
            key, path = self._book.trusts.accept(vouching, event.certificates, event.identity)
        except CertificateRefused as refusal:
            return self._refused(event, f"its certificate is not accepted: {refusal}")
        authenticated = Authenticated.X509
        if not speaks_for(path.leaf, PeerIdentity.address(known.destination)):
            authenticated = Authenticated.NAME
            objection = await self._objection_to_name(event.identity, known.destination)
            if objection:
                return self._refused(
                    event, f"its certificate does not name {known.destination}, and {objection}"
                )
        known.path = path
        return ike.Known((key,), None, authenticated, certified=True)

    async def _objection_to_name(self, identity: PeerIdentity, destination: IpAddress) -> str:
        if identity.type is not IdType.FQDN:
            return f"{identity} is no domain name"
        if PolicyGroup.PRIVATE in self._core.engine.settings.possible(destination):
            return "the group private wants proof of the address itself"
        return await self._core.keys.doubts(str(identity), destination)

    async def status(self, event: ike.NeedStatus) -> bool | ike.Refused:
        """Whether the certificates are still good, as far as anybody knows."""
        known, vouching = self._sessions.get(event.session), self._book.configured.vouching
        if known is None or known.path is None or vouching is None:
            return ike.Refused("certificates do not count for it any more")
        objection = await self._revocation.objection(known.path, vouching.remote.revocation, event.responses)
        return self._refused(event, objection) if objection else True

    def _refused(self, event: ike.NeedPeerKey | ike.NeedStatus, reason: str) -> ike.Refused:
        self._core.journal.add(
            "certificate-refused", peer=str(event.remote.address), id=str(event.identity), reason=reason
        )
        return ike.Refused(reason)


__all__ = ["VouchedPeers"]
