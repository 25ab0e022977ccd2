"""The daemon's side of the control socket. Only root (or who may open the 0600 socket) gets here."""

from __future__ import annotations

import asyncio
import json
import math
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from oepy.control import protocol
from oepy.errors import OepyError, UsageError
from oepy.model import IpAddress


class Controllable(Protocol):
    """What a daemon offers to its control socket; every value is ready for JSON."""

    async def status(self) -> dict[str, Any]: ...

    async def peers(self) -> list[dict[str, Any]]: ...

    async def sas(self) -> list[dict[str, Any]]: ...

    async def policies(self) -> list[dict[str, Any]]: ...

    async def explain(self, destination: IpAddress) -> dict[str, Any]: ...

    async def initiate(self, destination: IpAddress, seconds: float) -> dict[str, Any]: ...

    async def terminate(self, destination: IpAddress) -> dict[str, Any]: ...

    async def rekey(self, destination: IpAddress, *, ike: bool) -> dict[str, Any]: ...

    async def flush(self, destination: IpAddress | None, dns: IpAddress | str | None) -> dict[str, Any]: ...

    async def manual_list(self, *, everybodys: bool) -> dict[str, Any]: ...

    async def manual_change(self, operation: str, entry: object) -> dict[str, Any]: ...

    async def connections(self) -> list[dict[str, Any]]: ...

    async def connection_change(self, operation: str, name: str, seconds: float) -> dict[str, Any]: ...

    def recent_events(self, limit: int) -> list[dict[str, Any]]: ...

    def follow_events(self) -> AsyncIterator[dict[str, Any]]: ...


def _destination(text: object) -> IpAddress:
    try:
        return ip_address(str(text))
    except ValueError:
        raise UsageError(f"{text!r} is no IP address", "give one like 192.0.2.1") from None


class ControlServer:
    """Serves `target` on a Unix socket until `stop`."""

    def __init__(self, target: Controllable, path: Path) -> None:
        self._target = target
        self._path = path
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Open the socket, mode 0600. Raises OepyError when another daemon answers there."""
        app = web.Application(client_max_size=protocol.MAX_BODY, middlewares=[_errors])
        target = self._target
        app.router.add_get(protocol.STATUS, _reader(target.status))
        app.router.add_get(protocol.PEERS, _reader(target.peers))
        app.router.add_get(protocol.SAS, _reader(target.sas))
        app.router.add_get(protocol.POLICIES, _reader(target.policies))
        app.router.add_get(protocol.EXPLAIN, self._explain)
        app.router.add_get(protocol.EVENTS, self._events)
        app.router.add_post(protocol.INITIATE, self._initiate)
        app.router.add_post(protocol.TERMINATE, self._terminate)
        app.router.add_post(protocol.REKEY, self._rekey)
        app.router.add_post(protocol.FLUSH, self._flush)
        app.router.add_get(protocol.MANUAL, self._manual_list)
        app.router.add_post(protocol.MANUAL, self._manual_change)
        app.router.add_get(protocol.CONNECTIONS, _reader(target.connections))
        app.router.add_post(protocol.CONNECTIONS, self._connection_change)
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._remove_stale()
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        previous = os.umask(0o177)
        try:
            await web.UnixSite(self._runner, str(self._path)).start()
        finally:
            os.umask(previous)

    def _remove_stale(self) -> None:
        """The caller holds the lock of the live daemon: a socket file found here is a dead one's."""
        try:
            if stat.S_ISSOCK(self._path.lstat().st_mode):
                self._path.unlink()
            else:
                raise OepyError(f"{self._path} is no socket", "move that file away or set control.socket")
        except FileNotFoundError:
            pass

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self._path.unlink(missing_ok=True)

    async def _explain(self, request: web.Request) -> web.Response:
        return web.json_response(
            await self._target.explain(_destination(request.query.get("destination", "")))
        )

    async def _initiate(self, request: web.Request) -> web.Response:
        body = await _body(request)
        timeout = _timeout(body)
        return web.json_response(await self._target.initiate(_destination(body.get("destination")), timeout))

    async def _connection_change(self, request: web.Request) -> web.Response:
        body = await _body(request)
        operation, name = str(body.get("operation")), str(body.get("name") or "")
        return web.json_response(await self._target.connection_change(operation, name, _timeout(body)))

    async def _terminate(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return web.json_response(await self._target.terminate(_destination(body.get("destination"))))

    async def _rekey(self, request: web.Request) -> web.Response:
        body = await _body(request)
        destination, ike = _destination(body.get("destination")), body.get("ike", False) is True
        return web.json_response(await self._target.rekey(destination, ike=ike))

    async def _flush(self, request: web.Request) -> web.Response:
        body = await _body(request)
        wanted, dns = body.get("destination"), body.get("dns")
        return web.json_response(
            await self._target.flush(
                None if wanted is None else _destination(wanted),
                dns if dns in (None, "all") else _destination(dns),
            )
        )

    async def _manual_list(self, request: web.Request) -> web.Response:
        everybodys = request.query.get("all") == "1"
        return web.json_response(await self._target.manual_list(everybodys=everybodys))

    async def _manual_change(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return web.json_response(
            await self._target.manual_change(str(body.get("operation")), body.get("entry"))
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        limit_text = request.query.get("limit", "100")
        limit = min(int(limit_text), 10_000) if limit_text.isdigit() else 100
        past = self._target.recent_events(limit) if limit else []
        if request.query.get("follow") != "1":
            return web.json_response(past)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        for event in past:
            await response.write(json.dumps(event).encode() + b"\n")
        try:
            async for event in self._target.follow_events():
                await response.write(json.dumps(event).encode() + b"\n")
        except (ConnectionResetError, RuntimeError):
            pass
        return response


def _reader(read: Callable[[], Awaitable[Any]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(_request: web.Request) -> web.Response:
        value = await read()
        # Of 100,000 destinations the text alone takes a second: the loop has packets to release
        return web.Response(text=await asyncio.to_thread(json.dumps, value), content_type="application/json")

    return handler


def _timeout(body: dict[str, Any]) -> float:
    wanted = body.get("timeout", 15.0)
    if not isinstance(wanted, int | float) or not math.isfinite(wanted):
        raise UsageError(f"{wanted!r} is no number of seconds", "give one like 15")
    return min(max(float(wanted), 0.1), 120.0)


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except json.JSONDecodeError:
        raise UsageError("the request body is no JSON", "send an object") from None
    if not isinstance(body, dict):
        raise UsageError("the request body is no JSON object", "send an object")
    return body


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except OepyError as error:
        return web.json_response(
            {"error": error.what, "mend": error.mend, "exit_status": error.exit_status}, status=400
        )
