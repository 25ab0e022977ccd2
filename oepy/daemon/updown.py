"""`updown`: a command of the administrator's, run for each tunnel that comes and goes. No shell, one at a time,
with a limit of time; its environment has strongSwan's names (PLUTO_…), and nothing secret."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator

from oepy.connections.messages import RunUpdown
from oepy.model import SaPair, TrafficSelector

SECONDS = 30.0  # for one run
MAX_WAITING = 1000
MAX_RUNS = 32  # of one tunnel: one for each pair of selectors
_OUTPUT = 400  # characters of a failure that are told
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Updown:
    """`report(event, alert, **fields)`."""

    def __init__(self, report: Callable[..., None]) -> None:
        self._report = report
        self._lock = asyncio.Lock()
        self._waiting = 0
        self._running: asyncio.subprocess.Process | None = None

    async def run(self, action: RunUpdown) -> None:
        """For every pair of selectors, in the order of the calls."""
        if self._waiting >= MAX_WAITING:
            self._report(
                "updown-skipped", True, connection=action.connection.name, reason="too many are waiting"
            )
            return
        self._waiting += 1
        try:
            async with self._lock:
                for environment in list(environments(action))[:MAX_RUNS]:
                    await self._once(action, environment)
        finally:
            self._waiting -= 1

    async def _once(self, action: RunUpdown, environment: dict[str, str]) -> None:
        label = action.connection.label(action.child)
        # A file and no pipe: what the program leaves running in the background may keep it open
        with tempfile.TemporaryFile() as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    *action.command,
                    env=environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=output,
                    start_new_session=True,
                )
            except OSError as error:
                reason = f"{action.command[0]}: {error.strerror}"
                self._report("updown-failed", True, connection=label, reason=reason)
                return
            if await self._ends_in_time(process, label) and process.returncode:
                output.seek(0)
                text = " ".join(output.read(4 * _OUTPUT).decode(errors="replace").split())[:_OUTPUT]
                reason = f"{action.command[0]} ended with {process.returncode}: {text}"
                self._report("updown-failed", True, connection=label, reason=reason)

    async def _ends_in_time(self, process: asyncio.subprocess.Process, label: str) -> bool:
        self._running = process
        try:
            async with asyncio.timeout(SECONDS):
                await process.wait()
        except TimeoutError:
            self._kill(process)
            await process.wait()
            self._report(
                "updown-failed", True, connection=label, reason=f"did not end within {SECONDS:.0f} s"
            )
            return False
        finally:
            self._running = None
        return True

    def _kill(self, process: asyncio.subprocess.Process) -> None:
        """With what it has started: it is the first of a session of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """With the daemon: what runs is ended."""
        if self._running is not None:
            self._kill(self._running)


def environments(action: RunUpdown) -> Iterator[dict[str, str]]:
    """One for each pair of selectors of one family."""
    pair = action.pair
    for ours in pair.local_ts:
        for theirs in pair.remote_ts:
            if ours.start.version != theirs.start.version:
                continue
            host = ours.start == ours.end == pair.local.address
            family = "-v6" if ours.start.version == 6 else ""
            yield {
                "PATH": _PATH,
                "PLUTO_VERSION": "1.1",
                "PLUTO_VERB": f"{'up' if action.up else 'down'}-{'host' if host else 'client'}{family}",
                "PLUTO_CONNECTION": action.child.name,
                "PLUTO_IKE_CONNECTION": action.connection.name,
                "PLUTO_PROTO": pair.protocol,
                "PLUTO_MODE": pair.mode,
                "PLUTO_ME": str(pair.local.address),
                "PLUTO_MY_ID": str(action.connection.local.id or pair.local.address),
                "PLUTO_MY_CLIENT": _network(ours),
                "PLUTO_MY_PORT": str(ours.start_port if ours.start_port == ours.end_port else 0),
                "PLUTO_MY_PROTOCOL": str(ours.protocol),
                "PLUTO_PEER": str(pair.remote.address),
                "PLUTO_PEER_ID": str(pair.peer),
                "PLUTO_PEER_CLIENT": _network(theirs),
                "PLUTO_PEER_PORT": str(theirs.start_port if theirs.start_port == theirs.end_port else 0),
                "PLUTO_PEER_PROTOCOL": str(theirs.protocol),
                **dict(_marks(pair)),
                **{
                    f"PLUTO_IF_ID_{way}": str(number)
                    for way, number in (("IN", pair.if_id_in), ("OUT", pair.if_id_out))
                    if number
                },
                **({"PLUTO_UDP_ENC": str(pair.remote.port)} if pair.encap else {}),
                **dict(_assigned(action)),
            }


def _marks(pair: SaPair) -> Iterator[tuple[str, str]]:
    for name, mark in (("IN", pair.marks.inward), ("OUT", pair.marks.outward)):
        if mark is not None:
            yield f"PLUTO_MARK_{name}", f"{mark.value}/{mark.mask:#010x}"


def _assigned(action: RunUpdown) -> Iterator[tuple[str, str]]:
    """What the peer gave us: numbered, by families."""
    for name, addresses in (("PLUTO_MY_SOURCEIP", action.addresses), ("PLUTO_DNS", action.dns)):
        for version in (4, 6):
            for number, address in enumerate((a for a in addresses if a.version == version), 1):
                yield f"{name}{version}_{number}", str(address)
    if action.addresses:
        yield "PLUTO_MY_SOURCEIP", str(action.addresses[0])


def _network(selector: TrafficSelector) -> str:
    return str(TrafficSelector(selector.start, selector.end))
