"""strongSwan's side: swanctl.conf for each setup."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from oepy.keys import HostKey, public_pem
from oepy.lab.charon import CHARON, Charon
from tests.fakes.certificates import pem
from tests.interop.matrix.cases import OEPY, PEER, STRONGSWAN, Setup
from tests.interop.matrix.credentials import OEPY_ID, PEER_ID, SECRET, Credentials
from tests.interop.matrix.ground import Ground, wait_for
from tests.interop.matrix.ours import LIVENESS_SECONDS, POOL

_CONF = """
connections {{
  site {{
    version = 2
    local_addrs = {own}
    remote_addrs = {remote}
    encap = {encap}
    dpd_delay = {dpd}
    proposals = aes256gcm16-prfsha384-x25519
    mobike = {mobike}
    {given}
    local {{
      auth = {auth}
      {local_key}
      id = {own_id}
    }}
    remote {{
      auth = {auth}
      {remote_key}
      id = {peer_id}
    }}
    children {{
      net {{
        mode = {mode}
        {selectors}
        dpd_action = clear
        esp_proposals = aes256gcm16-x25519
      }}
    }}
  }}
}}
pools {{ some {{ addrs = {pool} }} }}
secrets {{
  ike-site {{
    id-1 = {own_id}
    id-2 = {peer_id}
    secret = "{secret}"
  }}
}}
"""


class StrongSwan:
    name = STRONGSWAN
    rekeys_on_command = True
    rekeys_within = 10.0
    asks_within = 10.0

    def __init__(self, ground: Ground, directory: Path, credentials: Credentials, *, userland: bool) -> None:
        self._ground = ground
        self._userland = userland
        self._charon = Charon(ground.peer.name, directory)
        self._files: dict[str, bytes] = {}
        for kind, key in credentials.peer_keys.items():
            self._files[f"private/{kind}.pem"] = key.to_pem()
            self._files[f"pubkey/own-{kind}.pem"] = public_pem(key.public).encode()
            self._files[f"pubkey/peer-{kind}.pem"] = public_pem(credentials.oepy_keys[kind].public).encode()
        for kind, site in credentials.sites.items():
            self._files[f"private/{kind}.pem"] = HostKey(site.peer.key).to_pem()
            self._files[f"x509/{kind}.pem"] = pem(site.peer)
            self._files[f"x509ca/{kind}-root.pem"] = pem(site.root)
            self._files[f"x509ca/{kind}-middle.pem"] = pem(site.middle)
        told = subprocess.run([str(CHARON), "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"strongSwan U?(\d[\w.]+)", told)
        assert found, told
        self.version = found[1]

    def start(self) -> None:
        self._charon.start()

    def load(self, setup: Setup) -> None:
        ground = self._ground
        local_key = remote_key = ""
        if setup.is_raw:
            local_key, remote_key = f"pubkeys = own-{setup.auth}.pem", f"pubkeys = peer-{setup.auth}.pem"
        elif setup.is_x509:
            local_key, remote_key = f"certs = {setup.auth}.pem", f"cacerts = {setup.auth}-root.pem"
        ours, theirs = ground.selectors(setup, PEER), ground.selectors(setup, OEPY)
        text = _CONF.format(
            own="%any" if setup.moves else ground.own(setup, PEER),
            mobike="yes" if setup.moves else "no",
            given="" if not setup.assigns else "vips = 0.0.0.0" if setup.begins == PEER else "pools = some",
            pool=POOL,
            remote=ground.seen(setup, OEPY),
            # Its userland ESP is ESP in UDP, and so is oepy's
            encap="yes" if self._userland else "no",
            dpd=f"{LIVENESS_SECONDS}s" if PEER in setup.asking else "0s",
            auth="psk" if setup.auth == "psk" else "pubkey",
            local_key=local_key,
            remote_key=remote_key,
            own_id=PEER_ID,
            peer_id=OEPY_ID,
            mode=setup.mode,
            selectors=f"local_ts = {','.join(ours) or 'dynamic'}\n remote_ts = {','.join(theirs) or 'dynamic'}",
            secret=SECRET,
        )
        self._charon.load(text, self._files)
        self._files = {}

    def up(self) -> None:
        seconds = str(int(15 * self._ground.pace))
        self._charon.swanctl("--initiate", "--child", "net", "--timeout", seconds)

    def down(self) -> None:
        self._charon.swanctl("--terminate", "--ike", "site")

    def take_address(self, address: str) -> None:
        """charon does it itself."""

    def rekey(self, *, ike: bool) -> None:
        self._charon.swanctl("--rekey", *(("--ike", "site") if ike else ("--child", "net")))

    def children(self) -> int:
        return self._charon.sas().count("INSTALLED")

    def clear(self) -> None:
        self._charon.swanctl("--terminate", "--ike", "site", "--force", "--timeout", "1", check=False)
        wait_for(lambda: "site" not in self._charon.sas(), 20 * self._ground.pace, self.log)

    def log(self) -> str:
        return self._charon.tail(40)

    def stop(self) -> None:
        self._charon.stop()
