"""The commands' side of the control socket: plain HTTP over a Unix socket with the standard library, so that
a command starts quickly."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from oepy.errors import DaemonUnreachable, OepyError


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("oepy", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class ControlClient:
    """Raises DaemonUnreachable (exit status 3) when no daemon answers, OepyError for what it refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, path: str, **query: str) -> Any:
        return self._call("GET", path + (f"?{urlencode(query)}" if query else ""), None)

    def post(self, path: str, body: dict[str, Any], timeout: float = 30.0) -> Any:
        return self._call("POST", path, json.dumps(body).encode(), timeout)

    def stream(self, path: str, **query: str) -> Iterator[Any]:
        """One JSON value a line, until the daemon ends."""
        connection = self._open("GET", f"{path}?{urlencode(query)}", None, None)
        response = connection.getresponse()
        try:
            while line := response.readline():
                yield json.loads(line)
        except (ConnectionError, http.client.HTTPException):
            return
        finally:
            connection.close()

    def _open(self, method: str, path: str, body: bytes | None, timeout: float | None) -> _UnixConnection:
        connection = _UnixConnection(self.path, timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        except PermissionError:
            raise DaemonUnreachable(f"no right to open {self.path}", "run this command as root") from None
        except OSError as error:
            raise DaemonUnreachable(
                f"no daemon answers on {self.path} ({error.strerror or error})",
                "start it with `oepy run`, or name its configuration with -c",
            ) from None
        return connection

    def _call(self, method: str, path: str, body: bytes | None, timeout: float = 30.0) -> Any:
        connection = self._open(method, path, body, timeout)
        try:
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise DaemonUnreachable(
                f"the daemon on {self.path} did not finish its answer ({error})",
                "see `oepy events` or its journal",
            ) from None
        finally:
            connection.close()
        try:
            value = json.loads(data)
        except json.JSONDecodeError:
            raise OepyError(f"the daemon failed ({response.status})", "see its journal") from None
        if response.status >= 400:
            refusal = OepyError(str(value.get("error", "refused")), str(value.get("mend", "")))
            refusal.exit_status = int(value.get("exit_status", 1))
            raise refusal
        return value
