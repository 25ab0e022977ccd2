"""The lab's own tools: namespaces that go away, captures that see each frame once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oepy.lab.capture import Capture
from oepy.lab.namespaces import Lab, namespaces_here, remove_stale
from oepy.lab.probe import ping

pytestmark = pytest.mark.root

# What a shell starts beside itself, or by nohup, ignores such signals, and its children would too
_MAKES_ONE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from oepy.lab.namespaces import Lab
with Lab() as lab:
    print(lab.namespace("solo").name, flush=True)
    time.sleep(60)
"""


def _child() -> tuple[subprocess.Popen[str], str]:
    child = subprocess.Popen([sys.executable, "-c", _MAKES_ONE], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_run_removes_its_namespaces(number: signal.Signals) -> None:
    """SIGTERM, SIGINT and SIGHUP all end with nothing left behind."""
    child, name = _child()
    assert name in namespaces_here()
    child.send_signal(number)
    child.wait(20)
    assert name not in namespaces_here()


def test_a_killed_run_is_cleaned_up_by_the_next_one() -> None:
    """After kill -9 the namespace stays, and remove_stale removes it, but not that of a living run."""
    child, name = _child()
    child.kill()
    child.wait(10)
    assert name in namespaces_here()
    with Lab() as lab:
        mine = lab.namespace("mine").name
        remove_stale()
        assert name not in namespaces_here()
        assert mine in namespaces_here()
    assert mine not in namespaces_here()


def test_a_wire_connects_hosts_and_its_capture_sees_each_frame_once(tmp_path: Path) -> None:
    """Three pings over a bridge are three requests and three replies in the capture, in IPv4 and IPv6."""
    with Lab() as lab:
        wire = lab.wire()
        hosts = [lab.namespace(f"h{number}") for number in range(3)]
        for number, host in enumerate(hosts, 1):
            wire.attach(host, addresses=[f"192.0.2.{number}/24", f"2001:db8::{number}/64"])
        with Capture(wire.namespace, wire.ports, tmp_path / "wire.pcap", incoming_only=True) as capture:
            before = time.time()
            assert None not in ping(hosts[0], "192.0.2.2", count=3)
            assert None not in ping(hosts[0], "2001:db8::3", count=3, size=1400)
            packets = capture.packets()
        for protocol in (1, 58):
            echoes = [packet for packet in packets if packet.protocol == protocol and packet.kind == "clear"]
            assert len(echoes) == 6
            assert all(abs(packet.time - before) < 30 for packet in echoes)
        assert capture.result["dropped"] == 0


def test_sockets_made_inside_stay_inside() -> None:
    """`entered` changes this thread's namespace and comes back."""
    home = os.readlink("/proc/thread-self/ns/net")
    with Lab() as lab:
        with lab.namespace("in").entered():
            assert os.readlink("/proc/thread-self/ns/net") != home
        assert os.readlink("/proc/thread-self/ns/net") == home
