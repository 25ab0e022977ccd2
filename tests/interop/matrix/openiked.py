"""OpenIKED's side: an iked.conf for each setup. Its paths are built in, so it gets a mount namespace with its own
/etc/iked; it is started anew for each setup, as it has one private key at a time."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from oepy.errors import OepyError
from oepy.keys import HostKey, public_pem
from tests.fakes.certificates import pem
from tests.interop.matrix.cases import OEPY, OPENIKED, PEER, Setup
from tests.interop.matrix.credentials import OEPY_ID, PEER_ID, SECRET, Credentials
from tests.interop.matrix.ground import Ground, wait_for
from tests.interop.matrix.ours import POOL

IKED, IKECTL = "/usr/sbin/iked", "/usr/sbin/ikectl"
_USER = "_iked"  # it gives its rights away to, and is locked up in the home of
_LIVENESS_SECONDS = 2  # `set dpd_check_interval`
REKEY_SECONDS = 8  # where it is to rekey: there is no command for it
# PF_KEY gives Linux neither AES-GCM nor the right length of HMAC-SHA2-256's value (RFC 4868)
_CONF = """\
set fragmentation
set {mobike}
set enforcesingleikesa
set dpd_check_interval {dpd}
ikev2 "site" {activity} {mode} esp inet{family} \\
{selectors}\
    local {own} peer {remote} \\
    ikesa enc aes-256-gcm prf hmac-sha2-384 group curve25519 \\
    childsa enc aes-256 auth hmac-sha2-512 \\
    srcid {own_id} dstid {peer_id} \\
    ikelifetime {ike_lifetime} lifetime {lifetime} \\
    {auth}
"""


class OpenIked:
    name = OPENIKED
    asks_within = 20.0
    rekeys_on_command = False
    rekeys_within = 2.0 * REKEY_SECONDS

    def __init__(self, ground: Ground, directory: Path, credentials: Credentials) -> None:
        self._ground = ground
        self._directory = directory
        self._credentials = credentials
        self._process: subprocess.Popen[Any] | None = None
        self._setup: Setup | None = None
        self._socket = str(directory / "iked.sock")
        directory.mkdir()
        told = subprocess.run([IKED, "-V"], capture_output=True, text=True, check=False)
        found = re.search(r"OpenIKED (\S+)", told.stdout + told.stderr)
        assert found, told
        self.version = found[1]
        home = directory / "home"
        home.mkdir()
        for name, line in (
            ("passwd", f"{_USER}:x:9500:9500::{home}:/usr/sbin/nologin"),
            ("group", f"{_USER}:x:9500:"),
        ):
            (directory / name).write_text(Path("/etc", name).read_text() + line + "\n")
        Path("/etc/iked").mkdir(exist_ok=True)  # in the second kernel, whose changes do not stay

    def start(self) -> None:
        """`load` does it."""

    def load(self, setup: Setup) -> None:
        self.stop()
        self._setup = setup
        self._ground.speak_as(setup, PEER)  # what it begins does not come from its `local`
        self._write_keys(setup)
        conf = self._write(setup, "passive")
        script = (
            "mount --bind $1/passwd /etc/passwd && mount --bind $1/group /etc/group && "
            "mount --bind $1/iked /etc/iked && exec $2 -dvv -f $3 -s $4"
        )
        with (self._directory / "iked.log").open("wb") as log:
            self._process = self._ground.peer.popen(
                *["unshare", "-m", "sh", "-c", script, "sh"],
                *[str(self._directory), IKED, str(conf), self._socket],
                stdout=log,
                stderr=log,
            )
        wait_for(self._is_ready, 10 * self._ground.pace, self.log)

    def _is_ready(self) -> bool:
        """Its processes answer commands before they have the configuration."""
        call = self._ground.peer.run(IKECTL, "-s", self._socket, "show", "sa", check=False)
        return call.returncode == 0 and "compilation done" in (self._directory / "iked.log").read_text()

    def _write_keys(self, setup: Setup) -> None:
        base = self._directory / "iked"
        shutil.rmtree(base, ignore_errors=True)
        for name in ("private", "pubkeys/fqdn", "certs", "ca", "crls"):
            (base / name).mkdir(parents=True)
        kind = setup.auth if setup.auth != "psk" else "ecdsa-p256"
        site = self._credentials.sites.get(setup.auth)
        own = HostKey(site.peer.key) if site else self._credentials.peer_keys[kind]
        key = base / "private/local.key"
        key.touch(mode=0o600)
        key.write_bytes(own.to_pem())
        (base / "local.pub").write_text(public_pem(own.public))
        if site:
            (base / "certs" / f"{PEER_ID}.crt").write_bytes(pem(site.peer))
            (base / "ca/middle.crt").write_bytes(pem(site.middle))
            (base / "ca/root.crt").write_bytes(pem(site.root))
        else:
            public = self._credentials.oepy_keys[kind].public
            (base / "pubkeys/fqdn" / OEPY_ID).write_text(public_pem(public))

    def _write(self, setup: Setup, activity: str) -> Path:
        ground = self._ground
        ours, theirs = ground.selectors(setup, PEER), ground.selectors(setup, OEPY)
        pairs = [(ground.own(setup, PEER), ground.seen(setup, OEPY))]
        if setup.assigns:
            pairs = [((ours or ["dynamic"])[0], (theirs or ["dynamic"])[0])]
        elif ours:
            pairs = list(zip(ours, theirs, strict=True))
        address = ""
        if setup.assigns and setup.begins == PEER:
            # Its routes lead to that device: from lo nothing comes into a tunnel
            address = " \\\n    request address any \\\n    iface lan"
        elif setup.assigns:
            address = f" \\\n    config address {POOL}"
        conf = self._directory / f"{activity}.conf"
        conf.touch(mode=0o600)
        conf.write_text(
            _CONF.format(
                mobike="mobike" if setup.moves else "nomobike",
                dpd=_LIVENESS_SECONDS if PEER in setup.asking else 0,
                activity=activity,
                mode=setup.mode,
                family="6" if setup.outer == 6 else "",
                selectors="".join(f"    from {one} to {other} \\\n" for one, other in pairs),
                own=ground.own(setup, PEER),
                remote=ground.seen(setup, OEPY),
                own_id=PEER_ID,
                peer_id=OEPY_ID,
                ike_lifetime=REKEY_SECONDS if setup.peer_rekeys == "ike" else 0,
                lifetime=REKEY_SECONDS if setup.peer_rekeys == "child" else 0,
                auth=(f'psk "{SECRET}"' if setup.auth == "psk" else "rfc7427") + address,
            )
        )
        return conf

    def _ctl(self, *arguments: str, check: bool = True) -> str:
        done = self._ground.peer.run(
            IKECTL, "-s", self._socket, *arguments, check=False, timeout=10 * self._ground.pace
        )
        if check and done.returncode:
            raise OepyError(f"ikectl {' '.join(arguments)}: {done.stdout}{done.stderr}", self.log())
        return done.stdout + done.stderr

    def up(self) -> None:
        assert self._setup is not None
        self._ctl("load", str(self._write(self._setup, "active")))
        wait_for(lambda: self.children() == 1, 20 * self._ground.pace, self.log)

    def down(self) -> None:
        self._ctl("reset", "id", f"FQDN/{OEPY_ID}")

    def take_address(self, address: str) -> None:
        """It does it itself (`iface`)."""

    def rekey(self, *, ike: bool) -> None:
        """It does by itself, by `Setup.peer_rekeys`."""

    def children(self) -> int:
        return len(re.findall(r"sa_childsas: \S+ ESP \S+ in ", self._ctl("show", "sa")))

    def clear(self) -> None:
        self.stop()

    def log(self) -> str:
        file = self._directory / "iked.log"
        lines = file.read_text(errors="replace").splitlines() if file.exists() else ["(no log)"]
        told = [line for line in lines if line != "ikev2_info: called"]  # by `show sa`
        return "\n".join(told[-60:])

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
