"""The lab's hosts and what runs on them.

        alpha   beta   gamma   legacy   impostor   unsigned   broken      ns (BIND)
          │       │      │       │         │          │          │         │
    ──────┴───────┴──────┴───────┴─────────┴──────────┴──────────┴─────────┴──── wire (captured)

All are dual-stack on one segment, 198.18.0.0/15 and 2001:2::/48 (RFC 2544, RFC 5180: benchmarking), because
resolvers answer the reverse zones of documentation prefixes by themselves. alpha and beta run oepy and
publish keys; gamma runs oepy without a record; legacy runs nothing; impostor runs oepy with another key than
the published one; the reverse zone of unsigned has no signatures, that of broken wrong ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oepy.control import protocol
from oepy.control.client import ControlClient
from oepy.errors import DaemonUnreachable, OepyError
from oepy.keys import HostKey
from oepy.lab.capture import Capture
from oepy.lab.nameserver import ExtraHost, LabDns
from oepy.lab.namespaces import Lab, Namespace, Wire
from oepy.model import PublicKey

START_SECONDS = 240.0  # an emulated machine takes a minute for six daemons
PAGE_PORT = 80


@dataclass(frozen=True, slots=True)
class HostPlan:
    """`daemon`: runs oepy. `publishes`: own (its own key), other (somebody else's), given (of `public_keys`),
    none."""

    name: str
    v4: str
    v6: str
    daemon: bool
    publishes: str


HOSTS = (
    HostPlan("alpha", "198.18.0.10", "2001:2::10", True, "own"),
    HostPlan("beta", "198.18.0.20", "2001:2::20", True, "own"),
    HostPlan("gamma", "198.18.0.30", "2001:2::30", True, "none"),
    HostPlan("legacy", "198.18.0.40", "2001:2::40", False, "none"),
    HostPlan("impostor", "198.18.0.50", "2001:2::50", True, "other"),
    HostPlan("unsigned", "198.18.1.10", "2001:2:0:1::10", False, "own"),
    HostPlan("broken", "198.18.2.10", "2001:2:0:2::10", False, "own"),
)
NS_V4, NS_V6 = "198.18.0.53", "2001:2::53"
DOMAIN = "oe.example"


@dataclass
class LabHost:
    """One host: its namespace, its files, and the daemon on it."""

    plan: HostPlan
    namespace: Namespace
    directory: Path
    anchors: Path
    resolv_conf: Path
    policy: dict[str, Any] = field(default_factory=dict)
    key_log: Path | None = None
    datapath: str = "auto"
    trap: str = "auto"
    identity: str | None = None
    certs: tuple[str, ...] = ()  # files that it shows to peers that ask
    dns: dict[str, Any] = field(default_factory=dict)  # besides resolvers and anchors
    process: subprocess.Popen[Any] | None = None

    @property
    def config_file(self) -> Path:
        return self.directory / "oepy.yaml"

    @property
    def client(self) -> ControlClient:
        return ControlClient(self.directory / "oepy.sock")

    def address(self, version: int) -> str:
        return self.plan.v4 if version == 4 else self.plan.v6

    def write_config(self) -> None:
        import yaml

        config: dict[str, Any] = {
            "identity": {
                "key": str(self.directory / "host.key"),
                "id": self.identity,
                "certs": list(self.certs),
            },
            "dns": {"resolvers": [NS_V4], "trust_anchors": [str(self.anchors)], **self.dns},
            "policy": self.policy,
            "control": {"socket": str(self.directory / "oepy.sock")},
            "datapath": self.datapath,
            "trap": self.trap,
        }
        if self.key_log is not None:
            config["debug"] = {"key_log": str(self.key_log)}
        self.config_file.write_text(yaml.safe_dump(config, sort_keys=False))

    def start_daemon(self) -> None:
        """Start `oepy run` and wait until it answers. Raises OepyError with the end of its log."""
        self.write_config()
        log = (self.directory / "daemon.log").open("ab")
        self.process = self.namespace.popen(
            *[sys.executable, "-m", "oepy", "-c", str(self.config_file), "run", "-v"],
            stdout=log,
            stderr=log,
        )
        log.close()

    def await_daemon(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if self.client.get(protocol.STATUS)["ready"]:
                    return
            except DaemonUnreachable:
                pass
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise OepyError(f"the daemon of {self.plan.name} did not start", self.log_end())
            time.sleep(0.1)

    def log_end(self) -> str:
        return (self.directory / "daemon.log").read_text(errors="replace")[-2000:]

    def daemon_pid(self) -> int:
        """`ip netns exec` replaces itself by the command, so its PID is the daemon's."""
        assert self.process is not None
        return self.process.pid

    def stop_daemon(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(START_SECONDS)
        self.process = None

    def kill_daemon(self) -> None:
        """As a crash would: no chance to clean up."""
        if self.process is not None:
            os.kill(self.daemon_pid(), signal.SIGKILL)
            self.process.wait(START_SECONDS)
        self.process = None

    def reload_daemon(self) -> None:
        self.write_config()
        before = self.client.get(protocol.STATUS)["reloads"]
        os.kill(self.daemon_pid(), signal.SIGHUP)
        deadline = time.monotonic() + START_SECONDS
        while self.client.get(protocol.STATUS)["reloads"] == before:
            if time.monotonic() > deadline:
                raise OepyError(f"the daemon of {self.plan.name} did not reload", self.log_end())
            time.sleep(0.02)

    def command(self, *argv: str) -> list[str]:
        """`argv` inside this host, names resolved by the lab's BIND."""
        return self.namespace.command(
            sys.executable, "-m", "oepy.lab.enter", str(self.resolv_conf), "--", *argv
        )


class LabNetwork:
    """Everything that `oepy lab` has: made in `directory`, removed by `close`."""

    def __init__(
        self,
        directory: Path,
        *,
        key_log: bool = False,
        datapath: str = "auto",
        trap: str = "auto",
        hosts: tuple[HostPlan, ...] = HOSTS,
        extra_dns: Sequence[ExtraHost] = (),
        host_keys: Mapping[str, HostKey] | None = None,
        odd_records: Mapping[str, Sequence[str]] | None = None,
        public_keys: Mapping[str, PublicKey] | None = None,
        gateway: str = "self",
        update_key: str = "",
    ) -> None:
        self._update_key = update_key
        self.directory = directory
        self._key_log = key_log
        self._datapath = datapath
        self._trap = trap
        self._plans = hosts
        self._extra_dns = extra_dns
        self._host_keys = host_keys or {}
        self._public_keys = public_keys or {}
        self._gateway = gateway
        self._odd_records = odd_records or {}  # by zone, for tests
        self.lab = Lab()
        self.hosts: dict[str, LabHost] = {}
        self.wire: Wire
        self.dns: LabDns
        self.ns: Namespace

    def __enter__(self) -> LabNetwork:
        self.lab.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        for host in self.hosts.values():
            if host.process is not None and host.process.poll() is None:
                host.process.terminate()
        for host in self.hosts.values():
            host.stop_daemon()
        if hasattr(self, "dns"):
            self.dns.stop()
        self.lab.cleanup()

    def build(self) -> None:
        """Namespaces, DNS, pages and daemons, in this order; returns when all of them answer."""
        self.wire = self.lab.wire()
        self.ns = self.lab.namespace("ns")
        self.wire.attach(self.ns, "eth0", [f"{NS_V4}/15", f"{NS_V6}/48"])
        keys = self._make_hosts()
        self.dns = LabDns(
            self.directory / "ns",
            self.ns.name,
            keys,
            extra_hosts=self._extra_dns,
            resource_records=self._odd_records,
            gateway=self._gateway,
            update_key=self._update_key,
        )
        self.dns.start()
        for host in self.hosts.values():
            host.anchors.write_bytes(self.dns.trust_anchor.read_bytes())
            _serve_page(host)

    def _make_hosts(self) -> dict[str, PublicKey]:
        """Namespaces and key pairs; returns the public keys to publish."""
        published: dict[str, PublicKey] = {}
        for plan in self._plans:
            directory = self.directory / plan.name
            directory.mkdir(parents=True)
            namespace = self.lab.namespace(plan.name)
            self.wire.attach(namespace, "eth0", [f"{plan.v4}/15", f"{plan.v6}/48"])
            # As on a real wire: no bursts that a card would still have to cut. Captures are read packet by packet.
            namespace.ip("link", "set", "eth0", "gso_max_segs", "1")
            resolv_conf = directory / "resolv.conf"
            resolv_conf.write_text(f"nameserver {NS_V4}\noptions timeout:2 attempts:2\n")
            (directory / "nsswitch.conf").write_text("hosts: files dns\n")
            host = LabHost(plan, namespace, directory, directory / "anchors.key", resolv_conf)
            host.datapath, host.trap = self._datapath, self._trap
            if self._key_log:
                host.key_log = directory / "keylog"
            self.hosts[plan.name] = host
            key = self._host_keys.get(plan.name) or HostKey.generate("ed25519")
            key.save(directory / "host.key")
            if plan.publishes == "own":
                published[plan.name] = key.public
            elif plan.publishes == "other":
                published[plan.name] = HostKey.generate("ed25519").public
            elif plan.publishes == "given":
                published[plan.name] = self._public_keys[plan.name]
        return published

    def start_daemons(self) -> None:
        running = [host for host in self.hosts.values() if host.plan.daemon]
        for host in running:
            host.start_daemon()
        for host in running:
            host.await_daemon()

    def trap_of(self, host: str) -> str:
        """The trap that the daemon of this host has found."""
        return str(self.hosts[host].client.get(protocol.STATUS)["trap"])

    def capture(self, path: Path) -> Capture:
        """Every frame on the wire, once."""
        return Capture(self.wire.namespace, self.wire.ports, path, incoming_only=True)


def _serve_page(host: LabHost) -> None:
    pages = host.directory / "www"
    pages.mkdir()
    (pages / "index.html").write_text(f"This is {host.plan.name}.\n")
    log = (host.directory / "www.log").open("ab")
    host.namespace.popen(
        # "::" serves IPv4 as well: http.server clears IPV6_V6ONLY
        *[sys.executable, "-m", "http.server", str(PAGE_PORT), "--bind", "::", "--directory", str(pages)],
        stdout=log,
        stderr=log,
    )
    log.close()
