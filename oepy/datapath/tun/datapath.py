"""The daemon's side of the userland datapath: starts the process, and asks it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from oepy.datapath.routes import TUNNEL_MTU
from oepy.datapath.tun import control
from oepy.errors import MisuseError, OepyError, ParseError
from oepy.interfaces import DatapathEvent
from oepy.model import Endpoint, SaCounters, SaPair
from oepy.udp import UdpSocket

START_SECONDS = 60.0  # a slow machine, or an emulated one, takes some 20 to start a program
ANSWER_SECONDS = 10.0
STOP_SECONDS = 5.0
READS_PER_WAKEUP = 64
_CHANNEL_BUFFER = 1 << 20
_MIN_SPI = 256  # RFC 4303 §2.1: 1..255 are reserved
_STDERR_LIMIT = 4096

OnIke = Callable[[bytes, Endpoint, Endpoint], None]


class TunDatapath:
    """Implements `interfaces.Datapath` over a TUN device, always UDP-encapsulated.

    `nat_t_sockets` (udp.IkeSockets.nat_t) are read by the process alone from `start` on; the daemon goes on
    sending on them, and gets the IKE messages among what arrives by `on_ike(data, local, remote)`, without
    the non-ESP marker. A peer whose outer address changes (a NAT's new mapping) is not followed by itself:
    `install` the same pair with its new endpoints.
    """

    waits = True

    def __init__(
        self,
        nat_t_sockets: Sequence[UdpSocket],
        on_ike: OnIke,
        *,
        device: str = "oe0",
        mtu: int = TUNNEL_MTU,
    ) -> None:
        self.device = device
        self.mtu = mtu
        self._sockets = tuple(nat_t_sockets)
        self._on_ike = on_ike
        self._on_event: Callable[[DatapathEvent], None] = lambda _: None
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._ike: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._answers: dict[int, asyncio.Future[object]] = {}
        self._next_id = 0
        self._spis: set[int] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._reason = ""
        self._sending = asyncio.Lock()  # one waits for the channel at a time

    # -- interfaces.Datapath -------------------------------------------------------------------------

    async def start(self, on_event: Callable[[DatapathEvent], None]) -> None:
        """Start the process; device and routes are there when this returns. Raises OepyError with the mend.
        May be called again after a `failed` event: then no SA is installed."""
        if self._process is not None:
            raise MisuseError("this datapath is running already")
        self._on_event = on_event
        self._reason = ""
        self._spis.clear()
        ours, theirs = _channel(), _channel()
        self._control, self._ike = ours[0], theirs[0]
        children = [ours[1], theirs[1]]
        descriptors = [sock.fileno() for sock in children] + [sock.fileno() for sock in self._sockets]
        try:
            self._process = await asyncio.create_subprocess_exec(
                # -P: the working directory, which may be anybody's, is no place to import from
                *[sys.executable, "-P", "-m", "oepy.datapath.tun.process"],
                *["--device", self.device, "--mtu", str(self.mtu)],
                *["--control", str(descriptors[0]), "--ike", str(descriptors[1])],
                *(word for number in descriptors[2:] for word in ("--outer", str(number))),
                pass_fds=descriptors,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=_environment(),
            )
        except OSError as error:
            self._forget()
            raise OepyError("cannot start the datapath process", str(error)) from error
        finally:
            for sock in children:
                sock.close()
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        loop.add_reader(self._control.fileno(), self._control_readable)
        loop.add_reader(self._ike.fileno(), self._ike_readable)
        self._watcher = loop.create_task(self._watch(self._process))
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), START_SECONDS)
        except TimeoutError as error:
            await self._end(kill=True)
            raise OepyError(
                "the datapath process did not get ready", f"it had {START_SECONDS:.0f} s"
            ) from error
        except OepyError:
            await self._end(kill=True)
            raise

    def allocate_spi(self) -> int:
        while True:
            spi = int.from_bytes(os.urandom(4), "big")
            if spi >= _MIN_SPI and spi not in self._spis:
                self._spis.add(spi)
                return spi

    async def install(self, pair: SaPair, *, outbound: bool = True) -> None:
        """See `interfaces.Datapath`. The same pair again with other endpoints moves it there; ESP goes to the
        remote endpoint's port as given. Raises OepyError where the pair is not supported or its SPI in use."""
        self._spis.add(pair.spi_in)
        await self._ask("install", pair=control.encode_pair(pair), outbound=outbound)

    async def remove(self, spi_in: int) -> None:
        """Of an unknown SPI, or without a process: nothing. Also gives back an SPI that was only allocated."""
        self._spis.discard(spi_in)
        if self._control is not None:
            await self._ask("remove", spi=spi_in)

    async def counters(self, spis: Collection[int] | None = None) -> Sequence[SaCounters]:
        """Of all pairs, or of those of `spis` that exist."""
        wanted = list(spis) if spis is not None else await self._ask("spis")
        assert isinstance(wanted, list)
        found: list[SaCounters] = []
        for start in range(0, len(wanted), control.SPIS_PER_ANSWER):
            answer = await self._ask("counters", spis=wanted[start : start + control.SPIS_PER_ANSWER])
            assert isinstance(answer, list)
            found += [control.decode_counters(value) for value in answer]
        return found

    async def stop(self) -> None:
        """Device, rules and routes are gone when this returns. Stop the trap before: nothing must be marked
        any more. May be called without a start."""
        if self._process is None:
            return
        with contextlib.suppress(OepyError):
            await self._ask("stop")
        await self._end(kill=False)

    # -- beyond the interface ------------------------------------------------------------------------

    async def statistics(self) -> Mapping[str, int]:
        """The process's own counters: unknown_spi, replayed, integrity_failed, malformed_in, no_sa …"""
        answer = await self._ask("statistics")
        assert isinstance(answer, dict)
        return answer

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    # -- inside --------------------------------------------------------------------------------------

    async def _ask(self, operation: str, **arguments: object) -> object:
        if self._control is None:
            raise OepyError("the datapath process is not running", self._reason or "start the datapath")
        self._next_id += 1
        number = self._next_id
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[object] = loop.create_future()
        self._answers[number] = answer
        process = self._process
        try:
            message = control.encode({"id": number, "op": operation, **arguments})
            async with asyncio.timeout(ANSWER_SECONDS):
                async with self._sending:
                    if self._control is not None:
                        await loop.sock_sendall(self._control, message)
                return await answer
        except TimeoutError as error:
            if answer.done() and not answer.cancelled():
                return answer.result()  # it was our own loop that stood still, under a long `nft` say
            # It answers between any two packets: it hangs, and with it every decision. The watcher tells.
            if process is not None and process.returncode is None:
                process.kill()
            raise OepyError("the datapath process does not answer", "it is ended and started anew") from error
        except OSError as error:
            raise OepyError("the datapath process is gone") from error
        finally:
            self._answers.pop(number, None)

    def _control_readable(self) -> None:
        for _ in range(READS_PER_WAKEUP):
            if self._control is None:
                return
            try:
                data = self._control.recv(control.MAX_MESSAGE)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:  # it has ended: the watcher sees to the rest
                asyncio.get_running_loop().remove_reader(self._control.fileno())
                return
            self._take(control.decode(data))

    def _take(self, message: control.Json) -> None:
        if "id" in message:
            answer = self._answers.get(message["id"])
            if answer is not None and not answer.done():
                if "error" in message:
                    answer.set_exception(OepyError(message["error"]))
                else:
                    answer.set_result(message.get("result"))
        elif message["event"] == "ready":
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        else:
            event = control.decode_event(message)
            if event.kind == "hard-expire":
                self._spis.discard(event.spi)
            self._on_event(event)

    def _ike_readable(self) -> None:
        for _ in range(READS_PER_WAKEUP):
            if self._ike is None:
                return
            try:
                message = self._ike.recv(control.MAX_MESSAGE)
            except BlockingIOError:
                return
            except ConnectionResetError:
                message = b""
            if not message:
                asyncio.get_running_loop().remove_reader(self._ike.fileno())
                return
            with contextlib.suppress(ParseError):
                self._on_ike(*control.decode_ike(message))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Until the process ends. Where nobody asked for that, tell the daemon."""
        assert process.stderr is not None
        output = b""
        while chunk := await process.stderr.read(_STDERR_LIMIT):
            output = (output + chunk)[-_STDERR_LIMIT:]
        await process.wait()
        if process is not self._process:
            return
        lines = output.decode(errors="replace").strip().splitlines()
        self._reason = lines[-1] if lines else f"it ended with status {process.returncode}"
        was_ready = self._ready is not None and self._ready.done()
        if not was_ready and self._ready is not None:
            self._ready.set_exception(OepyError("the datapath process did not start", self._reason))
        self._forget()
        if was_ready:
            self._on_event(DatapathEvent("failed", detail=self._reason))

    def _forget(self) -> None:
        """Close our ends; whoever waits for an answer is told."""
        loop = asyncio.get_running_loop()
        for channel in (self._control, self._ike):
            if channel is not None:
                loop.remove_reader(channel.fileno())
                channel.close()
        self._control = self._ike = self._process = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(OepyError("the datapath process is gone", self._reason))
        self._spis.clear()

    async def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        self._forget()
        if process is None:
            return
        if kill and process.returncode is None:
            process.kill()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
        if self._watcher is not None:
            await self._watcher


def _channel() -> tuple[socket.socket, socket.socket]:
    """Packets stay whole, and the end of one side is seen by the other."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in pair:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BUFFER)
    return pair


def _environment() -> dict[str, str]:
    """Our own, with our package's place first: oepy may be run from a clone that is not installed."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path}
