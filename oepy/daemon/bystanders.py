"""Hosts behind this one: whether their records make it their gateway. Only for these it is one (RFC 4322 §3.2);
what others send passes by, and spoils nothing for them."""

from __future__ import annotations

from collections.abc import Callable

from oepy.daemon.own import OwnRecord, OwnRecords
from oepy.interfaces import KeySource
from oepy.model import IpAddress, PublicKey

LONGEST = 3600.0  # seconds for which nobody looks whether a host has a record by now
SHORTEST = 300.0
MAX_SOURCES = 4096


class Bystanders:
    """One for the daemon. `pass_by` is the trap's; `report` tells of each host once, and when it changes."""

    def __init__(
        self,
        keys: KeySource,
        public: PublicKey,
        monotonic: Callable[[], float],
        pass_by: Callable[[IpAddress, float], bool],
        report: Callable[[OwnRecord], None],
    ) -> None:
        self._records = OwnRecords(keys, public, monotonic, report, limit=MAX_SOURCES)
        self._now = monotonic
        self._pass_by = pass_by

    def use_key(self, public: PublicKey) -> None:
        self._records.use_key(public)

    async def passes_by(self, source: IpAddress) -> bool:
        """Whether the host has no record, or one with another's key, and the trap can let it pass. While the DNS
        says nothing certain it counts as ours: its peers will see."""
        record = await self._records.get(source)
        if record.state not in ("absent", "mismatch"):
            return False
        return self._pass_by(source, min(max(record.until - self._now(), SHORTEST), LONGEST))
