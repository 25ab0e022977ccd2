"""Fetching revocation data from real servers on loopback, good ones and bad ones; from files; from LDAP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import ldap3
import pytest
from aiohttp import web

from oepy.daemon.fetching import MAX_REDIRECTS, Fetching
from oepy.daemon.revocation import Fetch, FetchFailed
from oepy.x509.crl import MAX_CRL
from oepy.x509.revocation import MAX_OCSP

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[tuple[Fetching, str]]:
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fetching = Fetching()
    try:
        yield fetching, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await fetching.close()
        await runner.cleanup()


def test_lists_are_got_and_questions_are_posted() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            assert request.content_type == "application/ocsp-request"
            return web.Response(body=b"about " + await request.read())
        return web.Response(body=b"the list")

    async def main() -> None:
        async with serving(answer) as (fetch, base):
            assert await fetch(Fetch(f"{base}/crl")) == b"the list"
            assert await fetch(Fetch(f"{base}/ocsp", b"x")) == b"about x"

    asyncio.run(main())


def test_answers_out_of_all_bounds_are_cut_off() -> None:
    """By what the server announces, and by what it sends without announcing; the rest is not read."""
    sent = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        if request.path == "/announced":
            return web.Response(body=bytes(MAX_OCSP + 1))
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(200):
            await response.write(bytes(1024 * 1024))
            sent += 1
        return response

    async def main() -> None:
        async with serving(answer) as (fetch, base):
            with pytest.raises(FetchFailed, match="over the limit"):
                await fetch(Fetch(f"{base}/announced", b"x"))
            with pytest.raises(FetchFailed, match="more than the limit"):
                await fetch(Fetch(f"{base}/endless"))

    asyncio.run(main())
    assert MAX_CRL <= sent * 1024 * 1024 < 3 * MAX_CRL


def test_redirections_are_followed_a_few_times_and_to_http_only() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        name, _, number = request.path.lstrip("/").partition("-")
        if name == "away":
            raise web.HTTPFound("file:///etc/passwd")
        if name == "round" or int(number) > 0:
            raise web.HTTPFound(f"/{name}-{int(number or 0) - 1}")
        return web.Response(body=b"there")

    async def main() -> None:
        async with serving(answer) as (fetch, base):
            assert await fetch(Fetch(f"{base}/hop-{MAX_REDIRECTS}")) == b"there"
            for path, why in (("hop-9", "redirections"), ("round-1", "redirections"), ("away-1", "not http")):
                with pytest.raises(FetchFailed, match=why):
                    await fetch(Fetch(f"{base}/{path}"))

    asyncio.run(main())


def test_refusals_and_absences_are_told() -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    async def main() -> None:
        async with serving(answer) as (fetch, base):
            with pytest.raises(FetchFailed, match="503"):
                await fetch(Fetch(base))
            with pytest.raises(FetchFailed, match="Cannot connect"):
                await fetch(Fetch("http://127.0.0.1:1/crl"))

    asyncio.run(main())


def test_files(tmp_path: Path) -> None:
    async def main() -> None:
        fetch = Fetching()
        (tmp_path / "a list").write_bytes(b"the list")
        assert await fetch(Fetch(f"file://{tmp_path}/a%20list")) == b"the list"
        with pytest.raises(FetchFailed, match="No such file"):
            await fetch(Fetch(f"file://{tmp_path}/none"))

    asyncio.run(main())


def test_ldap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL says where, and which attribute; against the library's own imitation of a server."""

    def imitated(server: ldap3.Server, **more: object) -> ldap3.Connection:
        assert (server.host, server.port) == ("directory.example", 1389)
        assert more["receive_timeout"]
        connection = real(server, client_strategy=ldap3.MOCK_SYNC)
        entry = {"objectClass": "cRLDistributionPoint", "certificateRevocationList;binary": b"the list"}
        connection.strategy.add_entry("cn=ca,o=acme", entry)
        connection.bind()
        return connection

    real = ldap3.Connection
    monkeypatch.setattr(ldap3, "Connection", imitated)

    async def main() -> None:
        fetch = Fetching()
        base = "ldap://directory.example:1389"
        assert await fetch(Fetch(f"{base}/cn=ca,o=acme?certificateRevocationList;binary")) == b"the list"
        assert await fetch(Fetch(f"{base}/cn=ca,o=acme")) == b"the list"
        with pytest.raises(FetchFailed, match="no deltaRevocationList there"):
            await fetch(Fetch(f"{base}/cn=ca,o=acme?deltaRevocationList"))

    asyncio.run(main())
