"""A whole roll-over of both peers' keys while tunnels between them come up again and again."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from oepy.control import protocol
from oepy.keys import HostKey, fingerprint
from oepy.lab.network import HOSTS, LabHost, LabNetwork
from oepy.lab.probe import Pinger

pytestmark = pytest.mark.root

SECRET = base64.b64encode(os.urandom(32)).decode()
TSIG = f'key "oepy-update" {{ algorithm hmac-sha256; secret "{SECRET}"; }};\n'
PEERS = tuple(plan for plan in HOSTS if plan.name in ("alpha", "beta"))


def command(host: LabHost, tsig: Path, *words: str) -> list[str]:
    where = ["--address", host.plan.v4, "--address", host.plan.v6, "--name", f"{host.plan.name}.oe.example"]
    call = [sys.executable, "-m", "oepy", "-c", str(host.config_file), *words, *where]
    return host.namespace.command(*call, "--tsig-file", str(tsig), "--ttl", "2")


def flow(source: LabHost, destination: LabHost) -> bool:
    """A first packet to a destination of which nothing is known any more: is it answered, by a tunnel?"""
    for host, other in ((source, destination), (destination, source)):
        call = [sys.executable, "-m", "oepy", "-c", str(host.config_file), "flush", other.plan.v4, "--dns"]
        host.namespace.run(*call, timeout=30)
    with source.namespace.entered(), Pinger(destination.plan.v4) as pinger:
        pinger.send(0)
        return pinger.receive(5.0) is not None


def test_both_peers_change_their_keys_under_traffic(tmp_path):
    """No flow is blocked and none is clear: the group is `private`, so what is answered went through a tunnel."""
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    tsig = tmp_path / "tsig.key"
    tsig.write_text(TSIG)
    tsig.chmod(0o600)
    with LabNetwork(tmp_path / "run", hosts=PEERS, update_key=TSIG) as network:
        network.build()
        alpha, beta = network.hosts["alpha"], network.hosts["beta"]
        for host, other in ((alpha, beta), (beta, alpha)):
            host.policy = {"groups": {"private": [f"{other.plan.v4}/32"]}}
            host.write_config()
            subprocess.run(command(host, tsig, "dns", "publish"), check=True, timeout=60, capture_output=True)
        network.start_daemons()
        old = {
            host: HostKey.load(network.hosts[host].directory / "host.key").public for host in network.hosts
        }
        assert flow(alpha, beta)
        outcomes: list[bool] = []
        results: list[subprocess.CompletedProcess[str]] = []

        def roll_over() -> None:
            for host in (alpha, beta):
                words = [*command(host, tsig, "key", "rotate"), "--trust-anchor", str(host.anchors)]
                results.append(subprocess.run(words, check=False, timeout=90, capture_output=True, text=True))

        rolling = threading.Thread(target=roll_over)
        rolling.start()
        while rolling.is_alive():
            outcomes.append(flow(alpha, beta) if len(outcomes) % 2 else flow(beta, alpha))
        rolling.join()
        outcomes.append(flow(alpha, beta))
        assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 2
        assert len(outcomes) > 10
        assert all(outcomes)
        for host in (alpha, beta):
            key = host.client.get(protocol.STATUS)["key"]["fingerprint"]
            new = HostKey.load(host.directory / "host.key").public
            assert new != old[host.plan.name]
            assert key == fingerprint(new)
