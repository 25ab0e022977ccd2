"""What benchmarks ask of the processes that they measure."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from oepy.control import protocol
from oepy.control.client import ControlClient
from oepy.errors import DaemonUnreachable, OepyError

START_SECONDS = 300.0


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads so far, to the nanosecond: /proc/PID/stat counts
    ticks of 10 ms."""
    return time.clock_gettime(
        (~pid << 3) | 2
    )  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED), see clock_getres(2)


def resident_bytes(pid: int) -> int:
    """By proc(5) statm."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def await_daemon(client: ControlClient, process: subprocess.Popen[Any], log: Path) -> None:
    """Until the daemon says that it is ready. Raises OepyError with the end of its log."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get(protocol.STATUS)["ready"]:
                return
        except DaemonUnreachable:
            pass
        time.sleep(0.02)
    raise OepyError("the daemon did not start", log.read_text(errors="replace")[-1000:])
