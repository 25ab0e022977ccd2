"""oepy's side of the matrix: one daemon for all cases, its connection loaded for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oepy.control import protocol
from oepy.control.client import ControlClient
from oepy.keys import HostKey, public_pem
from tests.fakes.certificates import pem
from tests.interop.matrix.cases import OEPY, PEER, Setup
from tests.interop.matrix.credentials import OEPY_ID, PEER_ID, SECRET, Credentials
from tests.interop.matrix.ground import Ground, wait_for
from tests.net.daemon_host import Host

LIVENESS_SECONDS = 1
POOL, POOL_FIRST, POOL_LAST = "10.3.0.0/28", "10.3.0.1", "10.3.0.14"


class Oepy:
    def __init__(self, ground: Ground, directory: Path, datapath: str, credentials: Credentials) -> None:
        self._ground = ground
        self._datapath = datapath
        self.host = Host(ground.oepy, directory)
        self.client = ControlClient(self.host.socket)
        secrets = {"psk": SECRET.encode()}
        for kind, key in credentials.oepy_keys.items():
            secrets[f"{kind}.key"] = key.to_pem()
        for kind, site in credentials.sites.items():
            secrets[f"{kind}.key"] = HostKey(site.oepy.key).to_pem()
            (directory / f"{kind}.pem").write_bytes(pem(site.oepy, site.middle))
            (directory / f"{kind}.root.pem").write_bytes(pem(site.root))
        for name, content in secrets.items():
            (directory / name).touch(mode=0o600)
            (directory / name).write_bytes(content)
        for kind, public in credentials.peer_public.items():
            (directory / f"{kind}.peer.pem").write_text(public_pem(public))
        self.host.start({}, **self._common())

    def _common(self) -> dict[str, Any]:
        return {"datapath": self._datapath}

    def load(self, setup: Setup) -> None:
        ground = self._ground
        local: dict[str, Any] = {"auth": "psk", "id": OEPY_ID}
        remote: dict[str, Any] = {"auth": "psk", "id": PEER_ID}
        if setup.is_x509:
            local |= {"auth": "x509", "certs": [f"{setup.auth}.pem"], "key": f"{setup.auth}.key"}
            remote |= {"auth": "x509", "cacerts": [f"{setup.auth}.root.pem"]}
        elif setup.is_raw:
            local |= {"auth": "pubkey", "key": f"{setup.auth}.key"}
            remote |= {"auth": "pubkey", "pubkeys": [f"{setup.auth}.peer.pem"]}
        given = setup.begins if setup.assigns else ""
        connection: dict[str, Any] = {
            "local_addrs": ["%any"] if setup.moves else [ground.own(setup, OEPY)],
            "remote_addrs": [ground.seen(setup, PEER)],
            "local": local,
            "remote": remote,
            "dpd_delay": LIVENESS_SECONDS if OEPY in setup.asking else 0,
            "children": {
                "net": {
                    "mode": setup.mode,
                    "local_ts": ground.selectors(setup, OEPY) or ["dynamic"],
                    "remote_ts": ground.selectors(setup, PEER) or ["dynamic"],
                }
            },
        }
        if given == OEPY:
            connection["vips"] = ["0.0.0.0"]
        elif given:
            connection["pools"] = ["some"]
        pools = {"pools": {"some": {"addrs": POOL}}} if given == PEER else {}
        secrets = [{"type": "ike", "id": [OEPY_ID, PEER_ID], "secret_file": "psk"}]
        self.host.write({}, **self._common(), connections={"site": connection}, secrets=secrets, **pools)
        self._change("load", "")

    def _change(self, operation: str, name: str, seconds: float = 20.0) -> Any:
        seconds *= self._ground.pace
        body = {"operation": operation, "name": name, "timeout": seconds}
        return self.client.post(protocol.CONNECTIONS, body, timeout=seconds + 10)

    def up(self) -> None:
        told = self._change("up", "site/net")
        assert [child["state"] for child in told["children"]] == ["up"], told

    def down(self) -> None:
        if self.client.get(protocol.CONNECTIONS):
            self._change("down", "site/net")

    def sas(self) -> list[dict[str, Any]]:
        return [sa for sa in self.client.get(protocol.SAS) if sa["connection"] == "site/net"]

    def ike(self, setup: Setup) -> dict[str, Any]:
        """Of the IKE SA that the tunnel belongs to."""
        address = self._ground.ends(setup)[1].called
        found = self.client.get(protocol.EXPLAIN, destination=address)["ike"]
        assert isinstance(found, dict), found
        return found

    def rekey(self, setup: Setup, *, ike: bool) -> None:
        address = self._ground.ends(setup)[1].called
        told = self.client.post(protocol.REKEY, {"destination": address, "ike": ike})
        assert told["rekeyed"] == 1, told

    def spis(self, setup: Setup, *, ike: bool) -> str:
        """They change with a rekey."""
        if ike:
            found = self.ike(setup)
            return str(found["spi_i"]) + str(found["spi_r"])
        return ",".join(sorted(sa["spi_in"] for sa in self.sas()))

    def wait_until_gone(self, seconds: float = 10.0) -> None:
        wait_for(lambda: not self.sas(), seconds * self._ground.pace, lambda: f"{self.sas()} {self.log()}")

    def log(self) -> str:
        events = self.client.get(protocol.EVENTS, limit="12")
        return "\n".join(["", *map(str, events)]) + "\n"

    def stop(self) -> None:
        self.host.stop()
