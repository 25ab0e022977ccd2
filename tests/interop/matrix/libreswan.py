"""libreswan's side: an ipsec.conf for each setup, keys and certificates in its NSS database."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from oepy.errors import OepyError
from oepy.keys import encode, parse_public
from oepy.lab.libreswan import PROGRAMS, run
from tests.interop.matrix.cases import LIBRESWAN, OEPY, PEER, Setup
from tests.interop.matrix.credentials import OEPY_ID, PEER_ID, SECRET, Credentials
from tests.interop.matrix.ground import Ground, wait_for
from tests.interop.matrix.ours import LIVENESS_SECONDS, POOL_FIRST, POOL_LAST
from tests.interop.nss import take_own, take_root

# The tools that make raw keys, and what the peer's are called in ipsec.conf
_RAW = {
    "rsa-3072": (("rsasigkey", "3072"), "rightrsasigkey"),
    "ecdsa-p256": (("ecdsasigkey", "secp256r1"), "rightecdsakey"),
    "ecdsa-p384": (("ecdsasigkey", "secp384r1"), "rightecdsakey"),
}


class Libreswan:
    name = LIBRESWAN
    rekeys_on_command = True
    rekeys_within = 10.0
    asks_within = 10.0

    def __init__(self, ground: Ground, directory: Path, credentials: Credentials) -> None:
        self._ground = ground
        self._directory = directory
        self._credentials = credentials
        self._process: subprocess.Popen[Any] | None = None
        self._has_keys = ""
        self._taken = ""  # the address that was assigned to it
        self._nss = f"sql:{directory / 'nss'}"
        for name in ("nss", "run", "ipsec.d"):
            (directory / name).mkdir(parents=True)
        found = re.search(r"Libreswan (\S+)", run(str(PROGRAMS / "pluto"), "--version"))
        assert found
        self.version = found[1]
        run("certutil", "-N", "--empty-password", "-d", self._nss)
        self._ckaids: dict[str, str] = {}
        for kind in _RAW:
            self._make_key(kind)
        for kind in credentials.sites:
            self._take_certificate(kind)

    def _make_key(self, kind: str) -> None:
        (tool, argument), _ = _RAW[kind]
        nss = str(self._directory / "nss")
        run(str(PROGRAMS / tool), "--nssdir", nss, argument)
        listed = run(str(PROGRAMS / "showhostkey"), "--nssdir", nss, "--list")
        (ckaid,) = set(re.findall(r"ckaid: ([0-9a-f]{40})", listed)) - set(self._ckaids.values())
        self._ckaids[kind] = ckaid
        text = run(str(PROGRAMS / "showhostkey"), "--nssdir", nss, "--pem", "--ckaid", ckaid)
        self._credentials.peer_public[kind] = parse_public(text, "libreswan's key")

    def _take_certificate(self, kind: str) -> None:
        site = self._credentials.sites[kind]
        take_own(self._directory, self._nss, kind, site.peer, [site.middle])
        take_root(self._directory, self._nss, f"{kind} root", site.root)

    @property
    def _control(self) -> str:
        return str(self._directory / "run/pluto.ctl")

    def start(self) -> None:
        directory = self._directory
        (directory / "ipsec.conf").write_text(
            f"config setup\n\tdnssec-enable=no\n\tipsecdir={directory}/ipsec.d\n\tnssdir={directory}/nss\n"
        )
        secrets = directory / "ipsec.secrets"
        secrets.touch(mode=0o600)
        secrets.write_text(f'@{PEER_ID} @{OEPY_ID} : PSK "{SECRET}"\n')
        self._process = self._ground.peer.popen(
            *[str(PROGRAMS / "pluto"), "--nofork", "--config", str(directory / "ipsec.conf")],
            *["--logfile", str(directory / "pluto.log"), "--rundir", str(directory / "run")],
            *["--secretsfile", str(secrets), "--ipsecdir", f"{directory}/ipsec.d"],
            *["--nssdir", str(directory / "nss")],
        )
        wait_for(lambda: "config" in self._whack("--status", check=False), 30 * self._ground.pace, self.log)
        self._whack("--listen")

    def _whack(self, *arguments: str, check: bool = True) -> str:
        return self._call("whack", "--ctlsocket", self._control, *arguments, check=check)

    def _call(self, program: str, *arguments: str, check: bool = True) -> str:
        """Raises OepyError with what it said."""
        done = self._ground.peer.run(
            *[str(PROGRAMS / program), *arguments], check=False, timeout=60 * self._ground.pace
        )
        said = done.stdout + done.stderr
        if check and done.returncode:
            raise OepyError(f"{program} {' '.join(arguments)}: {done.returncode}: {said}")
        return said

    def load(self, setup: Setup) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise OepyError(f"pluto has ended by itself ({self._process.returncode})", self.log())
        if setup.auth != "psk" and self._has_keys not in ("", setup.auth):
            # It keeps the keys of connections that are gone, and believes no others of the same name then
            self.stop()
            self.start()
        if setup.auth != "psk":
            self._has_keys = setup.auth
        file = self._directory / "site.conf"
        lines = "".join(f"\t{name}={value}\n" for name, value in self._section(setup).items())
        file.write_text(f"conn site\n{lines}")
        said = self._call("addconn", "--config", str(file), "--ctlsocket", self._control, "site")
        assert '"site"' in self._whack("--status"), said + self.log()

    def _section(self, setup: Setup) -> dict[str, str]:
        ground = self._ground
        section = {
            "left": ground.own(setup, PEER),
            "right": ground.seen(setup, OEPY),
            "leftid": f"@{PEER_ID}",
            "rightid": f"@{OEPY_ID}",
            "ikev2": "insist",
            "type": setup.mode,
            "ike": "aes_gcm256-sha2_384;dh31",
            "esp": "aes_gcm256",
            "fragmentation": "yes",
            "keyingtries": "1",
            "retransmit-timeout": f"{int(10 * ground.pace**0.5)}s",
            "leftupdown": "%disabled",
            "auto": "add",
        }
        if PEER in setup.asking:
            section |= {"dpddelay": f"{LIVENESS_SECONDS}s", "dpdtimeout": "10s", "dpdaction": "clear"}
        for side, who in (("left", PEER), ("right", OEPY)):
            asks = setup.assigns and who == setup.begins == PEER  # for a part of everything
            for subnet in ["0.0.0.0/0"] if asks else ground.selectors(setup, who)[:1]:
                section[f"{side}subnet"] = subnet
        if setup.assigns:
            client, server = ("left", "right") if setup.begins == PEER else ("right", "left")
            section |= {f"{client}modecfgclient": "yes", f"{server}modecfgserver": "yes", "narrowing": "yes"}
            if client == "right":
                section["rightaddresspool"] = f"{POOL_FIRST}-{POOL_LAST}"
        if setup.moves:
            section["mobike"] = "yes"
            section |= {"left": "%defaultroute"} if setup.begins == PEER else {"right": "%any"}
        if setup.auth == "psk":
            section["authby"] = "secret"
        elif setup.is_raw:
            section["authby"] = "rsasig" if setup.auth.startswith("rsa") else "ecdsa"
            section["leftckaid"] = self._ckaids[setup.auth]
            section[_RAW[setup.auth][1]] = "0s" + encode(self._credentials.oepy_keys[setup.auth].public)
        else:
            section["authby"] = "rsasig" if "rsa" in setup.auth else "ecdsa"
            section |= {"leftcert": setup.auth, "leftsendcert": "always", "sendca": "all", "rightca": "%same"}
        return section

    def up(self) -> None:
        self._whack("--initiate", "--name", "site")

    def down(self) -> None:
        self._whack("--terminate", "--name", "site")

    def take_address(self, address: str) -> None:
        """It leaves that to a script."""
        self._taken = address
        self._ground.peer.run("ip", "address", "replace", f"{address}/32", "dev", "lo")

    def rekey(self, *, ike: bool) -> None:
        self._whack("--rekey-ike" if ike else "--rekey-ipsec", "--name", "site")

    def children(self) -> int:
        return self._whack("--trafficstatus").count('"site"')

    def clear(self) -> None:
        self._whack("--delete", "--name", "site", check=False)
        if self._taken:
            self._ground.peer.run("ip", "address", "delete", f"{self._taken}/32", "dev", "lo")
            self._taken = ""

    def log(self) -> str:
        file = self._directory / "pluto.log"
        lines = file.read_text(errors="replace").splitlines() if file.exists() else ["(no log)"]
        return "\n".join(lines[-40:])

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._whack("--shutdown", check=False)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
