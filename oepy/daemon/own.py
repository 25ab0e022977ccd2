"""What the DNS says of this host itself: it decides whether we prove a key or come with AUTH NULL.

A host whose record is (provably) absent initiates with AUTH NULL (RFC 7619). A host whose published record
does not hold its key still offers the key: peers will refuse it, loudly, instead of trusting it less quietly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from oepy.interfaces import KeySource
from oepy.model import Absent, Insecure, IpAddress, KeyAnswer, PublicKey, Secure

RETRY_SECONDS = 60.0
MAX_SUBJECTS = 256


@dataclass(frozen=True, slots=True)
class OwnRecord:
    """`state`: published, absent, mismatch, or unknown (DNS gave no answer that counts)."""

    subject: str
    state: str
    reason: str
    until: float


class OwnRecords:
    """Own records by subject (an own address, or the configured FQDN), kept for their TTL."""

    def __init__(
        self,
        source: KeySource,
        public: PublicKey,
        monotonic: Callable[[], float],
        on_change: Callable[[OwnRecord], None],
        limit: int = MAX_SUBJECTS,
    ) -> None:
        self._source = source
        self._public = public
        self._now = monotonic
        self._on_change = on_change
        self._limit = limit
        self._records: dict[str, OwnRecord] = {}
        self._asking: dict[str, asyncio.Task[OwnRecord]] = {}

    def use_key(self, public: PublicKey) -> None:
        """This host has another key: what was judged by the old one is forgotten."""
        self._public = public
        self._records.clear()

    def known(self) -> list[OwnRecord]:
        return list(self._records.values())

    async def get(self, subject: IpAddress | str) -> OwnRecord:
        """The record, from memory while its TTL lasts. An old one is used while it is asked again."""
        key = str(subject)
        record = self._records.get(key)
        if record is not None and self._now() < record.until:
            return record
        task = self._asking.get(key)
        if task is None:
            task = asyncio.create_task(self._ask(subject))
            self._asking[key] = task
            task.add_done_callback(lambda _: self._asking.pop(key, None))
        if record is not None and record.state != "unknown":
            return record
        return await asyncio.shield(task)

    async def _ask(self, subject: IpAddress | str) -> OwnRecord:
        answer = await self._source.peer_keys(subject)
        record = self._judge(str(subject), answer)
        previous = self._records.get(record.subject)
        if len(self._records) >= self._limit:
            self._records.clear()
        self._records[record.subject] = record
        if previous is None or previous.state != record.state:
            self._on_change(record)
        return record

    def _judge(self, subject: str, answer: KeyAnswer) -> OwnRecord:
        until = self._now() + max(float(answer.ttl), RETRY_SECONDS)
        if isinstance(answer, Secure):
            if any(record.key == self._public for record in answer.keys):
                return OwnRecord(subject, "published", "", until)
            return OwnRecord(subject, "mismatch", f"{answer.owner} publishes another key", until)
        if isinstance(answer, (Absent, Insecure)):
            return OwnRecord(subject, "absent", answer.reason or f"no key at {answer.owner}", until)
        return OwnRecord(subject, "unknown", answer.reason, self._now() + RETRY_SECONDS)
