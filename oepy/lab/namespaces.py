"""Network namespaces for tests, benchmarks and the lab: made, wired together, and certainly removed again.

Every namespace is named `oepy-PID-START-LABEL`, PID being the process that made it and START that process's
start time in clock ticks since boot (proc(5), stat field 22), both in hex. So a namespace left by a run that
was killed is recognisable even when its PID is in use again, and nothing else is ever removed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from oepy.errors import OepyError

PREFIX = "oepy"
RUN_SECONDS = 30.0  # default limit of one command
END_SECONDS = 3.0  # between SIGTERM and SIGKILL

_NAME = re.compile(rf"{PREFIX}-([0-9a-f]+)-([0-9a-f]+)-\w+\Z")
_NETNS_DIRECTORY = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _start_ticks(pid: int) -> int | None:
    """Start time of a living process, None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat[stat.rindex(")") + 2 :].split()[19])


def namespaces_here() -> list[str]:
    """The names of all namespaces that some run of oepy made, dead or alive."""
    try:
        return sorted(name for name in os.listdir(_NETNS_DIRECTORY) if _NAME.match(name))
    except FileNotFoundError:
        return []


def remove_stale() -> list[str]:
    """Remove what runs left behind whose process is no more. Returns the removed names."""
    removed = []
    for name in namespaces_here():
        match = _NAME.match(name)
        assert match is not None
        if _start_ticks(int(match[1], 16)) != int(match[2], 16):
            _remove(name)
            removed.append(name)
    return removed


def _pids_inside(name: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split() if int(word) != os.getpid()]


def _remove(name: str) -> None:
    """End the processes in the namespace, which can only be ours, then the namespace itself."""
    deadline = time.monotonic() + END_SECONDS
    number = signal.SIGTERM
    while pids := _pids_inside(name):
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.02)
        if time.monotonic() > deadline + END_SECONDS:
            break
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _command(argv: Sequence[str], timeout: float = RUN_SECONDS) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise OepyError(
            f"`{' '.join(argv)}` failed: {done.stderr.strip()}", "namespaces need root and iproute2"
        )


class Namespace:
    """One network namespace. Made by `Lab.namespace`."""

    def __init__(self, name: str, label: str) -> None:
        self.name = name
        self.label = label
        self._processes: list[subprocess.Popen[Any]] = []

    def __repr__(self) -> str:
        return f"Namespace({self.name})"

    def command(self, *argv: str) -> list[str]:
        """The argument list that runs `argv` inside."""
        return ["ip", "netns", "exec", self.name, *argv]

    def run(
        self,
        *argv: str,
        check: bool = True,
        input: str | None = None,
        timeout: float = RUN_SECONDS,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end and return the text. Raises OepyError with stderr where `check` and status ≠ 0."""
        done = subprocess.run(
            self.command(*argv),
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=env,
            check=False,
        )
        if check and done.returncode:
            raise OepyError(
                f"in {self.name}: `{' '.join(argv)}` ended with {done.returncode}: "
                f"{(done.stderr.strip() or done.stdout.strip())[-2000:]}"
            )
        return done

    def popen(
        self,
        *argv: str,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: dict[str, str] | None = None,
        text: bool = True,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[Any]:
        """Start a process inside; it is ended with the namespace at the latest."""
        process = subprocess.Popen(
            self.command(*argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            text=text,
            pass_fds=pass_fds,
        )
        self._processes.append(process)
        return process

    def ip(self, *argv: str) -> None:
        """One `ip` command (iproute2) on this namespace."""
        _command(["ip", "-n", self.name, *argv])

    def sysctl(self, key: str, value: int | str) -> None:
        """`key` in the dotted form; a dot inside of a device name is not supported."""
        with self.entered():
            Path("/proc/sys", *key.split(".")).write_text(f"{value}\n")

    def address(self, device: str, *addresses: str) -> None:
        """Add addresses in prefix notation, at once usable (no duplicate address detection)."""
        for address in addresses:
            extra = ["nodad"] if ":" in address else []
            self.ip("address", "add", address, "dev", device, *extra)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in the namespace: sockets made here stay there."""
        with open("/proc/thread-self/ns/net") as home, open(_NETNS_DIRECTORY / self.name) as there:
            join_namespace(there.fileno())
            try:
                yield
            finally:
                join_namespace(home.fileno())

    def end_processes(self) -> None:
        """End what `popen` started and is still there, by its id: SIGTERM, then SIGKILL."""
        living = [process for process in self._processes if process.poll() is None]
        for process in living:
            process.terminate()
        deadline = time.monotonic() + END_SECONDS
        for process in living:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def remove(self) -> None:
        self.end_processes()
        _remove(self.name)


def join_namespace(descriptor: int) -> None:
    """Move the calling thread into the network namespace of an open descriptor. Raises OSError."""
    # os.setns came with Python 3.12
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Wire:
    """An Ethernet segment: a bridge in a namespace of its own, to which hosts are attached."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.ports: list[str] = []
        namespace.ip("link", "add", "br0", "type", "bridge", "mcast_snooping", "0", "forward_delay", "0")
        namespace.ip("link", "set", "br0", "up")

    def attach(
        self, host: Namespace, device: str = "eth0", addresses: Iterable[str] = (), mtu: int = 1500
    ) -> str:
        """Give `host` a device on this wire. Returns the name of the port on the wire's side."""
        port = f"p{len(self.ports)}-{host.label}"[:15]
        _veth(host, device, self.namespace, port, mtu)
        self.namespace.ip("link", "set", port, "master", "br0")
        self.ports.append(port)
        host.address(device, *addresses)
        return port


def _veth(left: Namespace, left_device: str, right: Namespace, right_device: str, mtu: int) -> None:
    left.ip(
        *["link", "add", left_device, "mtu", str(mtu), "type", "veth"],
        *["peer", "name", right_device, "mtu", str(mtu), "netns", right.name],
    )
    left.ip("link", "set", left_device, "up")
    right.ip("link", "set", right_device, "up")


class Lab:
    """All namespaces of one run. Use as a context manager; an exit by signal or exception cleans up as well.

    Not for use from several threads at once.
    """

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise OepyError("network namespaces need root", "run this as root")
        self._pid = os.getpid()
        self._start = _start_ticks(self._pid) or 0
        self.namespaces: list[Namespace] = []
        atexit.register(self.cleanup)

    def namespace(self, label: str) -> Namespace:
        """A new namespace with its loopback up, and without addresses that come by themselves."""
        if not re.fullmatch(r"\w{1,10}", label):
            raise ValueError(f"{label!r} is no label: 1 to 10 letters, digits or _")
        name = f"{PREFIX}-{self._pid:x}-{self._start:x}-{label}"
        taken = set(namespaces_here())
        count = 0
        while name in taken:
            count += 1
            name = f"{PREFIX}-{self._pid:x}-{self._start:x}-{label}_{count}"
        _command(["ip", "netns", "add", name])
        namespace = Namespace(name, label)
        self.namespaces.append(namespace)
        namespace.ip("link", "set", "lo", "up")
        for scope in ("all", "default"):
            namespace.sysctl(f"net.ipv6.conf.{scope}.accept_ra", 0)
            namespace.sysctl(f"net.ipv6.conf.{scope}.accept_dad", 0)
            namespace.sysctl(f"net.ipv6.conf.{scope}.router_solicitations", 0)
        return namespace

    def wire(self, label: str = "wire") -> Wire:
        return Wire(self.namespace(label))

    def veth(
        self,
        left: Namespace,
        right: Namespace,
        left_device: str = "eth0",
        right_device: str = "eth0",
        mtu: int = 1500,
    ) -> None:
        """A cable between two namespaces, both ends up."""
        _veth(left, left_device, right, right_device, mtu)

    def cleanup(self) -> None:
        """Remove everything this lab made; may be called again."""
        if os.getpid() != self._pid:
            return  # a forked child inherits the atexit hook, but not the lab
        while self.namespaces:
            self.namespaces[-1].remove()
            self.namespaces.pop()
        atexit.unregister(self.cleanup)

    def __enter__(self) -> Lab:
        remove_stale()
        exit_on_signals()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cleanup()


def exit_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process by SystemExit, as SIGINT does by KeyboardInterrupt, so that
    context managers and exit hooks run. Handlers that somebody else has set stay."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(ValueError):  # not in the main thread: whoever started us cares for signals
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _exit_by_signal)


def _exit_by_signal(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
