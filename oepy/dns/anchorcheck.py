"""Whether the zones still use the keys that are trusted: what an administrator checks before and after a
roll-over of such a key. Nothing is changed here."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import dns.name
import dns.rdata
import dns.rdatatype

from oepy.dns.anchorfile import read_points
from oepy.dns.anchors import Anchor
from oepy.dns.autoanchors import KeyState
from oepy.dns.signatures import REVOKE, Dnskey, Ds, digest_fits
from oepy.dns.validator import Validator
from oepy.model import Security


@dataclass(frozen=True, slots=True)
class AnchorState:
    """One DS or DNSKEY (`kind`). `state`: in use, revoked (RFC 5011), not published, unknown (the key set could not
    be had or validated, `reason` says why), negative, pending (an automatic one that is not trusted yet)."""

    zone: str
    kind: str
    key_tag: int
    algorithm: int
    state: str
    reason: str = ""


async def check_anchors(validator: Validator) -> list[AnchorState]:
    """Asks each anchored zone for its keys, which are validated with these very anchors."""
    found = []
    for anchor in validator.anchors:
        if anchor.is_negative:
            found.append(AnchorState(str(anchor.zone), "", 0, 0, "negative"))
            continue
        outcome = await validator.lookup(anchor.zone, int(dns.rdatatype.DNSKEY))
        keys = outcome.rdatas if outcome.status is Security.SECURE else None
        found += _states(anchor, keys, outcome.reason)
    return found


def untrusted(path: Path) -> list[AnchorState]:
    """Keys on record that are not trusted yet, or no more (RFC 5011). Raises ConfigError."""
    found = []
    for point in read_points(path):
        for each in point.keys:
            if each.state.is_trusted:
                continue
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(each.until))
            state, why = "revoked", "never to be trusted again"
            if each.state is KeyState.ADD_PENDING:
                state, why = "pending", f"trusted when its zone still uses it at {when}"
            tag, algorithm = each.key.key_id(), int(each.key.algorithm)
            found.append(AnchorState(str(point.zone), "DNSKEY", tag, algorithm, state, why))
    return found


def _states(anchor: Anchor, keys: Iterable[dns.rdata.Rdata] | None, reason: str) -> list[AnchorState]:
    published = [key for key in keys or () if isinstance(key, Dnskey)]
    states = []
    records: tuple[Ds | Dnskey, ...] = (*anchor.digests, *anchor.keys)
    for trusted in records:
        kind = "DS" if isinstance(trusted, Ds) else "DNSKEY"
        tag = trusted.key_tag if isinstance(trusted, Ds) else trusted.key_id()
        state = "unknown" if keys is None else _state(anchor.zone, trusted, published)
        why = reason if keys is None else ""
        states.append(AnchorState(str(anchor.zone), kind, tag, int(trusted.algorithm), state, why))
    return states


def _state(zone: dns.name.Name, trusted: Ds | Dnskey, published: list[Dnskey]) -> str:
    for key in published:
        flags = int(key.flags) & ~REVOKE
        plain = Dnskey(key.rdclass, key.rdtype, flags, key.protocol, key.algorithm, key.key)  # type: ignore[no-untyped-call]
        same = digest_fits(plain, zone, trusted) if isinstance(trusted, Ds) else plain.key == trusted.key
        if same and int(plain.algorithm) == int(trusted.algorithm):
            return "revoked" if int(key.flags) & REVOKE else "in use"
    return "not published"
