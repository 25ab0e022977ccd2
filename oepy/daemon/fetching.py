"""Fetches revocation data: http, files of this host (configured ones only), ldap with the extra `oepy[ldap]`.
Bounded in bytes; the caller bounds the time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp

from oepy.daemon.revocation import Fetch, FetchFailed
from oepy.x509.crl import MAX_CRL
from oepy.x509.revocation import MAX_OCSP

MAX_REDIRECTS = 3
MAX_AT_ONCE = 16
LDAP_SECONDS = 5
_OCSP = {"Content-Type": "application/ocsp-request", "Accept": "application/ocsp-response"}


class Fetching:
    """`session` is made at the first fetch, within the loop."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def __call__(self, wanted: Fetch) -> bytes:
        """Raises FetchFailed."""
        scheme = urlsplit(wanted.url).scheme.lower()
        async with self._slots:
            try:
                if scheme == "file":
                    return await asyncio.to_thread(_read, Path(unquote(urlsplit(wanted.url).path)))
                if scheme == "ldap":
                    return await asyncio.to_thread(_search, wanted.url)
                return await self._http(wanted)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise FetchFailed(str(error) or type(error).__name__) from None

    async def _http(self, wanted: Fetch) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False
            )
        limit = MAX_OCSP if wanted.body else MAX_CRL
        url = wanted.url
        for _ in range(MAX_REDIRECTS + 1):
            if urlsplit(url).scheme.lower() != "http":
                raise FetchFailed(f"it leads to {url[:80]!r}, which is not http")
            request = self._session.request(
                "POST" if wanted.body else "GET",
                url,
                data=wanted.body or None,
                headers=_OCSP if wanted.body else None,
                allow_redirects=False,
            )
            async with request as answer:
                if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                    url = urljoin(url, answer.headers["Location"])
                    continue
                if answer.status != 200:
                    raise FetchFailed(f"the server answers {answer.status}")
                return await _bounded(answer, limit)
        raise FetchFailed(f"more than {MAX_REDIRECTS} redirections")


async def _bounded(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    if answer.content_length is not None and answer.content_length > limit:
        raise FetchFailed(f"{answer.content_length} bytes are over the limit of {limit}")
    found = bytearray()
    async for chunk in answer.content.iter_chunked(64 * 1024):
        found += chunk
        if len(found) > limit:
            raise FetchFailed(f"more than the limit of {limit} bytes")
    return bytes(found)


def _read(path: Path) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(MAX_CRL + 1)
    if len(data) > MAX_CRL:
        raise FetchFailed(f"more than the limit of {MAX_CRL} bytes")
    return data


def _search(url: str) -> bytes:
    """The first value of the attribute that the URL names (RFC 4516), by default the CRL of the entry."""
    try:
        import ldap3  # type: ignore[import-untyped]
    except ImportError:
        raise FetchFailed("ldap needs the extra: install oepy[ldap]") from None
    parts = urlsplit(url)
    attribute, _, rest = parts.query.partition("?")
    attribute = unquote(attribute.partition(",")[0]) or "certificateRevocationList;binary"
    scope = {"one": ldap3.LEVEL, "sub": ldap3.SUBTREE}.get(rest.partition("?")[0], ldap3.BASE)
    server = ldap3.Server(
        parts.hostname, parts.port or 389, connect_timeout=LDAP_SECONDS, get_info=ldap3.NONE
    )
    try:
        with ldap3.Connection(server, receive_timeout=LDAP_SECONDS, auto_bind=True) as connection:
            connection.search(
                *(unquote(parts.path.lstrip("/")), "(objectClass=*)", scope),
                attributes=[attribute],
                size_limit=1,
            )
            values = [
                value
                for entry in connection.response or ()
                for name, found in entry.get("raw_attributes", {}).items()
                if name.lower().partition(";")[0] == attribute.lower().partition(";")[0]
                for value in found
            ]
    except ldap3.core.exceptions.LDAPException as error:
        raise FetchFailed(f"{type(error).__name__}: {str(error)[:120]}") from None
    if not values:
        raise FetchFailed(f"no {attribute} there")
    if len(values[0]) > MAX_CRL:
        raise FetchFailed(f"more than the limit of {MAX_CRL} bytes")
    return bytes(values[0])
