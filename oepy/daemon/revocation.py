"""Whether certificates are revoked: OCSP responses and CRLs fetched, kept, and asked; `oepy.x509` reads them.

Bounded in time, in bytes and in number. Nobody waits for another peer's server: each check has its own time, an URL
is fetched once for all who want it, and one that failed is left alone for a while.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from oepy.connections.model import Authority
from oepy.x509.certificates import Certificate, subject_of, to_der
from oepy.x509.crl import Crl
from oepy.x509.path import Path
from oepy.x509.revocation import (
    Standing,
    Status,
    Unusable,
    crl_urls,
    ocsp_request,
    ocsp_urls,
    read_any,
    read_ocsp,
)

CHECK_SECONDS = 12.0  # for all of one peer's certificates: IKE waits for 30
FETCH_SECONDS = 6.0
RETRY_SECONDS = 60.0  # after a fetch that failed
REFETCH_SECONDS = 24 * 3600.0  # a CRL that still holds is fetched again after so long
MAX_CRL_BYTES = 32 * 1024 * 1024  # of all that are kept, in the short form
MAX_CRLS = 64
MAX_STATUSES = 4096
MAX_FAILED = 1024
MAX_OWN_RESPONSE = 8 * 1024  # bytes; it goes into IKE_AUTH


class FetchFailed(Exception):
    """The text says what happened, without the URL."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """`body`: what is posted (OCSP), empty where nothing is."""

    url: str
    body: bytes = b""


Fetcher = Callable[[Fetch], Awaitable[bytes]]
"""Raises FetchFailed."""


async def nothing_fetched(_: Fetch) -> bytes:
    """A host without a network for it."""
    raise FetchFailed("nothing is fetched here")


CrlReader = Callable[[bytes, Certificate, float], Awaitable[Crl]]
"""Raises Unusable."""


NOTHING_CONFIGURED = Authority("")


class Revocation:
    """One for the daemon. `wall_clock` in seconds since 1970."""

    def __init__(
        self,
        fetch: Fetcher,
        read_crl: CrlReader,
        wall_clock: Callable[[], float],
    ) -> None:
        self._fetch, self._read_crl = fetch, read_crl
        self._wall_clock = wall_clock
        self._authority_of: Callable[[Certificate], Authority] = lambda _: NOTHING_CONFIGURED
        self._crls: OrderedDict[str, tuple[Crl, float]] = OrderedDict()  # URL → list, when it was fetched
        self._statuses: OrderedDict[bytes, Status] = OrderedDict()  # by certificate and issuer
        self._failed: OrderedDict[str, tuple[float, str]] = OrderedDict()  # URL → when again, why not
        self._running: dict[Fetch, asyncio.Task[bytes]] = {}

    def begin_anew(self, authority_of: Callable[[Certificate], Authority]) -> None:
        """After a reload: what is configured of a CA may be another, and a list that was replaced is read anew."""
        self._authority_of = authority_of
        self._crls.clear()
        self._statuses.clear()
        self._failed.clear()

    async def objection(self, path: Path, policy: str, responses: Sequence[bytes]) -> str:
        """Why the path does not hold, "" where it does. `policy`: strict | ifuri | relaxed (as with strongSwan);
        `responses`: OCSP from the peer."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                for certificate, issuer in path.issued():
                    status, asked = await self._status(certificate, issuer, responses)
                    if status.standing is Standing.REVOKED:
                        return status.text
                    wanted = policy == "strict" or (policy == "ifuri" and asked)
                    if status.standing is Standing.UNKNOWN and wanted:
                        return f"nobody could say whether {subject_of(certificate)} is revoked: {status.text}"
        except TimeoutError:
            if policy != "relaxed":
                return "the servers that know whether its certificate is revoked took too long"
        return ""

    async def own_response(self, certificate: Certificate, issuer: Certificate) -> tuple[bytes, float] | None:
        """What a responder says of our own certificate, to send along (RFC 4806), and until when; None where nobody
        says that it is good."""
        for url in self._responders(certificate, issuer):
            try:
                data, status = await self._from_responder(url, certificate, issuer)
            except (FetchFailed, Unusable):
                continue
            if status.standing is Standing.GOOD and len(data) <= MAX_OWN_RESPONSE:
                return data, status.until
        return None

    async def _status(
        self, certificate: Certificate, issuer: Certificate, responses: Sequence[bytes]
    ) -> tuple[Status, bool]:
        """And whether there is anybody who should know."""
        now = self._wall_clock()
        responders = self._responders(certificate, issuer)
        lists = list(dict.fromkeys((*self._authority_of(issuer).crl_uris, *crl_urls(certificate))))
        key = hashlib.sha256(to_der(certificate) + to_der(issuer)).digest()
        known = self._statuses.get(key)
        if known is not None and known.until > now:
            return known, True
        found = read_any(responses, certificate, issuer, now)
        reasons: list[str] = []
        if found is None:
            found = await self._ask(responders, certificate, issuer, reasons)
        if found is None:
            found = await self._look(lists, certificate, issuer, reasons)
        if found is not None:
            self._keep(key, found)
            return found, True
        asked = bool(responders or lists)
        text = "; ".join(reasons) or "its CA names neither a responder nor a list"
        return Status(Standing.UNKNOWN, text), asked

    def _keep(self, key: bytes, status: Status) -> None:
        self._statuses[key] = status
        self._statuses.move_to_end(key)
        while len(self._statuses) > MAX_STATUSES:
            self._statuses.popitem(last=False)

    def _responders(self, certificate: Certificate, issuer: Certificate) -> list[str]:
        return list(dict.fromkeys((*self._authority_of(issuer).ocsp_uris, *ocsp_urls(certificate))))

    async def _from_responder(
        self, url: str, certificate: Certificate, issuer: Certificate
    ) -> tuple[bytes, Status]:
        """Raises FetchFailed or Unusable."""
        data = await self._get(Fetch(url, ocsp_request(certificate, issuer)))
        return data, read_ocsp(data, certificate, issuer, self._wall_clock())

    async def _ask(
        self, urls: Sequence[str], certificate: Certificate, issuer: Certificate, reasons: list[str]
    ) -> Status | None:
        for url in urls:
            try:
                _, status = await self._from_responder(url, certificate, issuer)
                return status
            except (FetchFailed, Unusable) as error:
                reasons.append(f"{url}: {error}")
        return None

    async def _look(
        self, urls: Sequence[str], certificate: Certificate, issuer: Certificate, reasons: list[str]
    ) -> Status | None:
        for url in urls:
            try:
                crl = await self._crl(url, issuer)
                return crl.status(certificate, self._wall_clock())
            except (FetchFailed, Unusable) as error:
                reasons.append(f"{url}: {error}")
        return None

    async def _crl(self, url: str, issuer: Certificate) -> Crl:
        now = self._wall_clock()
        kept = self._crls.get(url)
        fresh = kept is not None and kept[0].issuer == issuer and kept[0].until > now
        if kept is not None and fresh and now - kept[1] < REFETCH_SECONDS:
            self._crls.move_to_end(url)
            return kept[0]
        try:
            data = await self._get(Fetch(url))
            try:
                crl = await self._read_crl(data, issuer, self._wall_clock())
            except Unusable as error:
                self._note_failure(url, str(error))
                raise
        except (FetchFailed, Unusable):
            if kept is not None and fresh:
                return kept[0]  # it holds until its time, whatever its server does
            raise
        self._crls[url] = crl, now
        self._crls.move_to_end(url)
        while len(self._crls) > 1 and (
            len(self._crls) > MAX_CRLS
            or sum(len(crl.records) for crl, _ in self._crls.values()) > MAX_CRL_BYTES
        ):
            self._crls.popitem(last=False)
        return crl

    async def _get(self, wanted: Fetch) -> bytes:
        """Raises FetchFailed."""
        retry_at, reason = self._failed.get(wanted.url, (0.0, ""))
        if self._wall_clock() < retry_at:
            raise FetchFailed(f"{reason} (not tried again yet)")
        task = self._running.get(wanted)
        if task is None:
            task = asyncio.create_task(self._bounded(wanted))
            self._running[wanted] = task
            task.add_done_callback(lambda done: self._ended(wanted, done))
        # Whoever waits may give up; the others, and the cache, still get it
        return await asyncio.shield(task)

    async def _bounded(self, wanted: Fetch) -> bytes:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                return await self._fetch(wanted)
        except TimeoutError:
            raise FetchFailed(f"no answer within {FETCH_SECONDS:g} s") from None

    def _ended(self, wanted: Fetch, task: asyncio.Task[bytes]) -> None:
        self._running.pop(wanted, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._failed.pop(wanted.url, None)
            return
        self._note_failure(wanted.url, str(error) or type(error).__name__)

    def _note_failure(self, url: str, reason: str) -> None:
        self._failed[url] = (self._wall_clock() + RETRY_SECONDS, reason)
        while len(self._failed) > MAX_FAILED:
            self._failed.popitem(last=False)
