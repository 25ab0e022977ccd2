"""Whether a peer's certificates give it the identity that it claims: a connection's trust, applied to what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from oepy.errors import ParseError
from oepy.model import PeerIdentity
from oepy.x509.certificates import MAX_FROM_PEER, Certificate, from_der, key_hash, subject_of
from oepy.x509.identity import identities_of, speaks_for
from oepy.x509.path import Path, PathError, out_of_time, validate

MAX_NAMED = 4  # identities that a message lists


@dataclass(frozen=True, slots=True)
class Trust:
    """`pinned`: if there are any, the peer's certificate must be one of them, and that is enough. Else it must lead
    to one of `anchors`, by way of what the peer sends."""

    anchors: tuple[Certificate, ...] = ()
    pinned: tuple[Certificate, ...] = ()

    @classmethod
    def of(cls, authorities: Sequence[Certificate], pinned: Sequence[Certificate] = ()) -> Trust:
        """All configured CAs are anchors, as with strongSwan: an intermediate one alone may be what is trusted."""
        return cls(tuple(authorities), tuple(pinned))

    def key_hashes(self) -> tuple[bytes, ...]:
        """For CERTREQ (RFC 7296 §3.7)."""
        return tuple(dict.fromkeys(key_hash(anchor) for anchor in self.anchors))


def accept(trust: Trust, sent: Sequence[bytes], identity: PeerIdentity, now: float) -> Path:
    """The path of the certificate whose key the peer must prove now. `sent` as it came, the peer's own first
    (RFC 7296 §3.6); `now` in seconds since 1970. Raises PathError, its text says what is wrong and where."""
    leaf, others = _read(sent)
    if leaf is None:
        known = [pinned for pinned in trust.pinned if speaks_for(pinned, identity)]
        if not known:
            raise PathError(f"{identity} sent no certificate")
        leaf = known[0]
    if not speaks_for(leaf, identity):
        names = ", ".join(str(name) for name in identities_of(leaf)[:MAX_NAMED]) or "nobody"
        raise PathError(f"{subject_of(leaf)}: it speaks for {names}, not for {identity}")
    if trust.pinned:
        if leaf not in trust.pinned:
            raise PathError(
                f"{subject_of(leaf)}: it is not one of the certificates that are configured for this peer"
            )
        reason = out_of_time(leaf, datetime.fromtimestamp(now, UTC))
        if reason:
            raise PathError(f"{subject_of(leaf)}: {reason}")
        return Path((leaf,))
    return validate(leaf, others, trust.anchors, now)


def _read(sent: Sequence[bytes]) -> tuple[Certificate | None, list[Certificate]]:
    """What cannot be read among the others may still be none that is needed; the first must be readable."""
    if not sent:
        return None, []
    try:
        leaf = from_der(sent[0])
    except ParseError as error:
        raise PathError(str(error)) from None
    others = []
    for data in sent[1:MAX_FROM_PEER]:
        try:
            others.append(from_der(data))
        except ParseError:
            continue
    return leaf, others
