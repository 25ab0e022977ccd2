"""Keeps automatic trust anchors: asks for the key sets when they are due, tells the validator, writes the file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import dns.rdatatype

from oepy.dns.anchorfile import read_points, write_points
from oepy.dns.anchors import Anchor, TrustAnchors
from oepy.dns.autoanchors import TrustPoint, changes, observe, retry_later
from oepy.dns.limits import LimitExceeded
from oepy.dns.signatures import SignatureFailure
from oepy.dns.transport import NoReply
from oepy.dns.validator import Validator

LONGEST_SLEEP = 3600.0  # so that a clock that was set is noticed
_DNSKEY = int(dns.rdatatype.DNSKEY)

# What happened, for the log: zone, words, and whether somebody should look.
Report = Callable[[str, str, bool], None]


def apply_points(anchors: TrustAnchors, points: Sequence[TrustPoint]) -> None:
    """Where keys of a zone are on record, they stand instead of what is configured for it."""
    for point in points:
        configured = anchors.at(point.zone)
        if point.keys and configured is not None and not configured.is_negative:
            anchors.put(point.anchor())


class AnchorKeeper:
    """For the anchors that `validator` began with, and the file that remembers. `clock`: seconds since 1970."""

    def __init__(
        self,
        path: Path,
        configured: TrustAnchors,
        validator: Validator,
        clock: Callable[[], float],
        report: Report,
    ) -> None:
        self._path = path
        self._validator = validator
        self._clock = clock
        self._report = report
        known = {point.zone: point for point in read_points(path)}
        self._initial: list[Anchor] = [anchor for anchor in configured if not anchor.is_negative]
        self.points = [known.get(anchor.zone, TrustPoint(anchor.zone)) for anchor in self._initial]

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            now = self._clock()
            wait = min((point.due for point in self.points), default=now + LONGEST_SLEEP) - now
            if wait > 0:
                await asyncio.sleep(min(wait, LONGEST_SLEEP))
                continue
            await self.check_due()

    async def check_due(self) -> None:
        """One round. What it learns is in the file before the validator relies on it."""
        for index, point in enumerate(self.points):
            if point.due <= self._clock():
                after = await self._look(point, self._initial[index])
                self._take(index, after)

    async def _look(self, point: TrustPoint, initial: Anchor) -> TrustPoint:
        reply = await self._validator.ask_early(point.zone, _DNSKEY)
        now = int(self._clock())
        why = ""
        if isinstance(reply, NoReply):
            why = reply.reason
        elif (rrset := reply.find(point.zone, _DNSKEY)) is None:
            why = f"the resolver gives no DNSKEY of {point.zone}"
        else:
            try:
                return observe(point, rrset, initial, now, self._validator.policy)
            except (SignatureFailure, LimitExceeded) as failure:
                why = str(failure)
        self._report(str(point.zone), f"its trust anchors could not be checked: {why}", False)
        return retry_later(point, now)

    def _take(self, index: int, after: TrustPoint) -> None:
        before, self.points[index] = self.points[index], after
        try:
            write_points(self._path, self.points)
        except OSError as error:
            self._report(str(after.zone), f"{self._path} cannot be written: {error.strerror}", True)
        for line in changes(before, after):
            self._report(str(after.zone), line, True)
        if before.anchor() != after.anchor():
            apply_points(self._validator.anchors, [after])
            self._validator.flush()
