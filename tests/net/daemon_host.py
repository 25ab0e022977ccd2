"""A daemon in a namespace of a test, with a configuration that the test gives, and what a capture saw."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oepy.control import protocol
from oepy.control.client import ControlClient
from oepy.errors import DaemonUnreachable
from oepy.lab.capture import Capture
from oepy.lab.namespaces import Namespace

START_SECONDS = 180.0  # in the second kernel, beside other work
SECRET = "a secret of two hosts"


@contextlib.contextmanager
def two_with_a_secret(first: Namespace, second: Namespace, directory: Path) -> Iterator[tuple[Host, Host]]:
    """A host in each, with one secret in their files `psk`; stopped in the end."""
    made = Host(first, directory / "one"), Host(second, directory / "other")
    for host in made:
        (host.directory / "psk").touch(mode=0o600)
        (host.directory / "psk").write_text(f"{SECRET}\n")
    try:
        yield made
    finally:
        for host in made:
            host.stop()


def ready(*hosts: Host) -> None:
    """Of several that have begun: they start side by side."""
    for host in hosts:
        host.wait_until_ready()


class Host:
    """A daemon in a namespace, with a configuration that is a dictionary."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        self.namespace = namespace
        self.directory = directory
        directory.mkdir()
        self.config_file = directory / "oepy.yaml"
        self.socket = directory / "s"
        self.process: subprocess.Popen[Any] | None = None

    def write(self, manual_section: dict[str, Any], **others: Any) -> None:
        config = {
            "identity": {"key": str(self.directory / "host.key")},
            "dns": {"resolvers": ["127.0.0.1"]},
            "policy": {"default": "clear"},
            "control": {"socket": str(self.socket)},
            "datapath": "tun",
            "manual": manual_section,
            **others,
        }
        self.config_file.touch(mode=0o600)
        self.config_file.write_text(json.dumps(config))

    def start(self, manual_section: dict[str, Any], **others: Any) -> None:
        self.begin(manual_section, **others)
        self.wait_until_ready()

    def begin(self, manual_section: dict[str, Any], **others: Any) -> None:
        """Without waiting for it."""
        self.write(manual_section, **others)
        log = (self.directory / "log").open("ab")
        self.process = self.namespace.popen(
            *[sys.executable, "-m", "oepy", "-c", str(self.config_file), "run", "-v"], stdout=log, stderr=log
        )
        log.close()

    def wait_until_ready(self) -> None:
        self.wait_for(lambda status: bool(status["ready"]))

    def wait_for(self, condition: Any) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if condition(ControlClient(self.socket).get(protocol.STATUS)):
                    return
            except DaemonUnreachable:
                pass
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def reload(self, manual_section: dict[str, Any], **others: Any) -> None:
        before = len(self.events())
        old = json.loads(self.config_file.read_text())["manual"]
        done = "reloaded" if manual_section == old else "manual-changed"
        self.write(manual_section, **others)
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGHUP)
        deadline = time.monotonic() + START_SECONDS
        while not {done, "reload-refused"} & set(self.events()[before:]):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def events(self) -> list[str]:
        return [event["event"] for event in ControlClient(self.socket).get(protocol.EVENTS, limit="1000")]

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-3000:]

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(15)
        self.process = None
        self.namespace.run("nft", "delete", "table", "inet", "oepy_guard", check=False)

    def oepy(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self.namespace.run(
            *[sys.executable, "-m", "oepy", "-c", str(self.config_file), *words],
            check=False,
            timeout=60,
            input=stdin,
        )

    def json(self, *words: str) -> Any:
        done = self.oepy(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def kinds(capture: Capture) -> set[str]:
    """What went over the wire, neighbour discovery and multicast aside."""
    return {packet.kind for packet in capture.packets()} - {"nd", "multicast"}
