"""A whole roll-over of both peers' keys while tunnels between them come up again and again."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from oepy.control import protocol
from oepy.errors import OepyError
from oepy.keys import HostKey, fingerprint
from oepy.lab.network import HOSTS, LabHost, LabNetwork
from oepy.lab.probe import Pinger

pytestmark = pytest.mark.root

SECRET = base64.b64encode(os.urandom(32)).decode()
TSIG = f'key "oepy-update" {{ algorithm hmac-sha256; secret "{SECRET}"; }};\n'
PEERS = tuple(plan for plan in HOSTS if plan.name in ("alpha", "beta"))


def command(host: LabHost, tsig: Path, ttl: int, *words: str) -> list[str]:
    where = ["--address", host.plan.v4, "--address", host.plan.v6, "--name", f"{host.plan.name}.oe.example"]
    call = [sys.executable, "-m", "oepy", "-c", str(host.config_file), *words, *where]
    return host.namespace.command(*call, "--tsig-file", str(tsig), "--ttl", str(ttl))


def flow(source: LabHost, destination: LabHost, *, fresh: bool) -> str:
    """A first packet to a destination with which there is no tunnel any more: "" where it is answered, else what
    the source says of it. `fresh`: the DNS is asked anew; else its cached answer counts as long as its TTL says."""
    for host, other in ((source, destination), (destination, source)):
        with contextlib.suppress(OepyError):  # there may be none just now
            host.client.post(protocol.TERMINATE, {"destination": other.plan.v4})
        host.client.post(
            protocol.FLUSH, {"destination": other.plan.v4, "dns": other.plan.v4 if fresh else None}
        )
    with source.namespace.entered(), Pinger(destination.plan.v4) as pinger:
        pinger.send(0)
        if pinger.receive(15.0) is not None:
            return ""
    return json.dumps(source.client.get(protocol.EXPLAIN, destination=destination.plan.v4))


@pytest.mark.parametrize(
    ("ttl", "least"), [(2, 20), pytest.param(30, 1000, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_both_peers_change_their_keys_under_traffic(tmp_path, ttl, least):
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
            subprocess.run(
                command(host, tsig, ttl, "dns", "publish"), check=True, timeout=60, capture_output=True
            )
        network.start_daemons()
        old = {
            host: HostKey.load(network.hosts[host].directory / "host.key").public for host in network.hosts
        }
        assert not flow(alpha, beta, fresh=True)
        outcomes: list[str] = []
        results: list[subprocess.CompletedProcess[str]] = []

        def roll_over() -> None:
            for host in (alpha, beta):
                words = [*command(host, tsig, ttl, "key", "rotate"), "--trust-anchor", str(host.anchors)]
                results.append(
                    subprocess.run(words, check=False, timeout=300, capture_output=True, text=True)
                )

        rolling = threading.Thread(target=roll_over)
        rolling.start()
        while rolling.is_alive() or len(outcomes) < least:
            pair = (alpha, beta) if len(outcomes) % 2 else (beta, alpha)
            outcomes.append(flow(*pair, fresh=len(outcomes) % 3 == 0))
        rolling.join()
        outcomes.append(flow(alpha, beta, fresh=True))
        assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 2
        assert not any(outcomes), [story for story in outcomes if story]
        for host in (alpha, beta):
            key = host.client.get(protocol.STATUS)["key"]["fingerprint"]
            new = HostKey.load(host.directory / "host.key").public
            assert new != old[host.plan.name]
            assert key == fingerprint(new)
