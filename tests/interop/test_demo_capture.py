"""tshark, given the demo's key log, decrypts the IKE and the ESP of its capture: what went over the wire is what
we say, read by somebody else."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from oepy.cli.lab import copy_key_logs
from oepy.control import protocol
from oepy.lab import demo
from oepy.lab.network import HOSTS, LabNetwork

pytestmark = [pytest.mark.root, pytest.mark.interop]


def test_tshark_reads_the_demo_with_the_key_log(tmp_path: Path) -> None:
    """The page that curl fetched, and the identities in IKE_AUTH, stand in tshark's output; without the keys
    they don't. The log is announced in `status` and as an alert, and is 0600."""
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    capture_file, keys = tmp_path / "wire.pcap", tmp_path / "keys"
    with LabNetwork(tmp_path / "lab", key_log=True, hosts=HOSTS[:2]) as network:
        network.build()
        with network.capture(capture_file):
            network.start_daemons()
            alpha, beta = network.hosts["alpha"], network.hosts["beta"]
            for version in (4, 6):
                assert demo.fetch(alpha, beta, version, 10).ok
            status = alpha.client.get(protocol.STATUS)
        copy_key_logs(network.hosts, keys)
    assert status["key_log"] == str(alpha.key_log)
    assert any(alert["event"] == "key-log-on" for alert in status["alerts"])
    assert {stat.S_IMODE(file.stat().st_mode) for file in keys.iterdir()} == {0o600}

    def read(config: Path) -> str:
        config.mkdir(exist_ok=True)
        done = subprocess.run(
            ["tshark", "-r", str(capture_file), "-V", "-o", "esp.enable_encryption_decode:TRUE"],
            env={**os.environ, "WIRESHARK_CONFIG_DIR": str(config)},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return done.stdout

    clear = read(keys)
    assert clear.count("This is beta.") >= 2
    assert "GET / HTTP/1.1" in clear
    assert "Identification Data:198.18.0.10" in clear.replace("Data: ", "Data:")
    opaque = read(tmp_path / "none")
    assert "This is beta." not in opaque
    assert "GET / HTTP/1.1" not in opaque
