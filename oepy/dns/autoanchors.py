"""Trust anchors that follow their zones' roll-overs (RFC 5011). Pure: key sets and times in, trust points out.

    (nothing) ──new key in a validated set──▶ ADDPEND ──30 days──▶ VALID ◀──seen again── MISSING
        ▲                                        │                   │                      ▲
        └────────── gone from the set ───────────┘                   ├── gone from the set ─┘
                                                                     └── revoked by itself ──▶ REVOKED
    REVOKED ──30 days──▶ REMOVED

VALID and MISSING keys are trusted. A key that was revoked never is again; so REMOVED ones stay on record. Where RFC
5011 §5 lets a zone whose anchors are all revoked become insecure, here it can't be judged (indeterminate): a host
that must not send in the clear shall not be made to by somebody who got hold of a key.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

import dns.name

from oepy.dns.anchors import Anchor
from oepy.dns.limits import Budget
from oepy.dns.message import RRset, Signature
from oepy.dns.signatures import (
    REVOKE,
    Dnskey,
    Policy,
    SignatureFailure,
    ZoneKey,
    usable_keys,
    verify,
)

DAY = 86400
ADD_HOLD_DOWN = REMOVE_HOLD_DOWN = 30 * DAY  # §2.4.1, §2.4.2
HOUR = 3600
MAX_TRACKED = 32  # keys of one zone; further new ones are not looked at
_SEP = 0x0001


class KeyState(enum.Enum):
    """§4.2."""

    ADD_PENDING = "ADDPEND"
    VALID = "VALID"
    MISSING = "MISSING"
    REVOKED = "REVOKED"
    REMOVED = "REMOVED"

    @property
    def is_trusted(self) -> bool:
        return self in (KeyState.VALID, KeyState.MISSING)


@dataclass(frozen=True, slots=True)
class TrackedKey:
    """`key` never has the REVOKE flag. In `state` since `since`; where that state ends by itself, at `until`
    (seconds since 1970, else 0)."""

    key: Dnskey
    state: KeyState
    since: int
    until: int = 0

    def is_same(self, other: Dnskey) -> bool:
        return bool(self.key.key == other.key and self.key.algorithm == other.algorithm)


@dataclass(frozen=True, slots=True)
class TrustPoint:
    """One zone. `checked` is when its key set was last validated, `due` when it is to be asked for again."""

    zone: dns.name.Name
    keys: tuple[TrackedKey, ...] = ()
    checked: int = 0
    due: int = 0

    def anchor(self) -> Anchor:
        """What is trusted now: nothing, where every key is revoked."""
        return Anchor(self.zone, keys=tuple(each.key for each in self.keys if each.state.is_trusted))

    def trusts(self, key: ZoneKey) -> bool:
        return any(each.state.is_trusted and each.is_same(key.dnskey) for each in self.keys)


def observe(point: TrustPoint, rrset: RRset, initial: Anchor, now: int, policy: Policy) -> TrustPoint:
    """The trust point after a look at the zone's key set. `initial` is what is trusted while no key is on record.

    Raises SignatureFailure or LimitExceeded where the set is not signed by a trusted key, and revokes none: then it
    says nothing.
    """
    budget = Budget()
    revoked = _with_revocations(point, rrset, now, policy, budget)
    try:
        entries = [
            key
            for key in usable_keys(rrset.rdatas, policy)
            if (revoked.trusts(key) if point.keys else initial.accepts(key, policy))
        ]
        if not entries:
            raise SignatureFailure(f"no DNSKEY of {point.zone} is a trusted one")
        verified = verify(rrset, point.zone, entries, now, budget)
    except SignatureFailure:
        if revoked == point:
            raise
        return replace(revoked, due=now + HOUR)
    signature = next(each for each in rrset.signatures if each.key_tag == verified.tag)
    keys = _present(revoked, rrset, None if point.keys else initial, now, signature.original_ttl, policy)
    return TrustPoint(point.zone, keys, now, now + _interval(signature, now))


def retry_later(point: TrustPoint, now: int) -> TrustPoint:
    """After a key set that could not be had or validated."""
    return replace(point, due=now + HOUR)


def _interval(signature: Signature, now: int) -> int:
    """§2.3: half of the TTL or of what the signature has left, between an hour and 15 days."""
    left = (signature.expiration - now) & 0xFFFFFFFF
    return int(max(HOUR, min(15 * DAY, signature.original_ttl // 2, left // 2)))


def _with_revocations(
    point: TrustPoint, rrset: RRset, now: int, policy: Policy, budget: Budget
) -> TrustPoint:
    """§2.1: a key that signs the set with its REVOKE flag takes itself out, whoever else signs or does not."""
    keys = list(point.keys)
    for candidate in usable_keys(rrset.rdatas, policy, revoked=True):
        for index, each in enumerate(keys):
            ended = each.state in (KeyState.REVOKED, KeyState.REMOVED)
            if ended or not each.is_same(candidate.dnskey):
                continue
            try:
                verify(rrset, point.zone, [candidate], now, budget)
            except SignatureFailure:
                continue
            keys[index] = replace(each, state=KeyState.REVOKED, since=now, until=now + REMOVE_HOLD_DOWN)
    return replace(point, keys=tuple(keys))


def _present(
    point: TrustPoint, rrset: RRset, initial: Anchor | None, now: int, ttl: int, policy: Policy
) -> tuple[TrackedKey, ...]:
    """The keys after a validated set: each known one in its next state, then the new ones."""
    published = usable_keys(rrset.rdatas, policy)
    keys: list[TrackedKey] = []
    for each in point.keys:
        seen = any(each.is_same(key.dnskey) for key in published)
        after = _next(each, now, seen=seen)
        if after is not None:
            keys.append(after)
    for key in published:
        if len(keys) >= MAX_TRACKED or any(each.is_same(key.dnskey) for each in keys):
            continue
        if initial is not None and initial.accepts(key, policy):
            keys.append(TrackedKey(key.dnskey, KeyState.VALID, now))
        elif int(key.dnskey.flags) & _SEP:  # §2.4.1
            # Whichever is longer, so that at least two sets must have shown it
            until = now + max(ADD_HOLD_DOWN, ttl)
            keys.append(TrackedKey(key.dnskey, KeyState.ADD_PENDING, now, until))
    return tuple(keys)


def _next(each: TrackedKey, now: int, *, seen: bool) -> TrackedKey | None:
    """§4.1, but for the revocation. None: back to the start."""
    match each.state:
        case KeyState.ADD_PENDING if not seen:
            return None
        case KeyState.ADD_PENDING if now >= each.until:
            return TrackedKey(each.key, KeyState.VALID, now)
        case KeyState.VALID if not seen:
            return TrackedKey(each.key, KeyState.MISSING, now)
        case KeyState.MISSING if seen:
            return TrackedKey(each.key, KeyState.VALID, now)
        case KeyState.REVOKED if now >= each.until:
            return TrackedKey(each.key, KeyState.REMOVED, now)
    return each


def changes(before: TrustPoint, after: TrustPoint) -> Sequence[str]:
    """What an administrator should read in the log, one line for each key that came into another state."""
    lines = []
    for each in after.keys:
        old = next((key for key in before.keys if key.is_same(each.key)), None)
        if old is None or old.state is not each.state:
            was = f"{old.state.value} → " if old else ""
            lines.append(f"key {each.key.key_id()} of {after.zone}: {was}{each.state.value}")
    for old in before.keys:
        if not any(each.is_same(old.key) for each in after.keys):
            lines.append(
                f"key {old.key.key_id()} of {after.zone}: {old.state.value} → withdrawn before its time"
            )
    return lines


__all__ = ["REVOKE", "KeyState", "TrackedKey", "TrustPoint", "changes", "observe", "retry_later"]
