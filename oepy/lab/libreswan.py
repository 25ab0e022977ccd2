"""libreswan's pluto on a lab host: the other opportunistic encryption, to interoperate with and to measure by.

It needs kernel ESP, and its programs where the package has them. The package conflicts with strongSwan's, so in
the second kernel they are linked there from where they were unpacked (`scripts/unpack-peers libreswan`).
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oepy.errors import OepyError
from oepy.keys import parse_public
from oepy.lab.namespaces import Namespace
from oepy.model import PublicKey

KEY_BITS = 3072  # what `ipsec newhostkey` makes at least; oepy's RSA keys in the labs have the same
START_SECONDS = 60.0
PROGRAMS = Path("/usr/libexec/ipsec")


class Pluto:
    """One pluto. `directory` gets its files; `anchors` holds the root's key."""

    def __init__(self, directory: Path, resolv_conf: Path, anchors: Path) -> None:
        self.directory = directory.resolve()
        self.log = self.directory / "pluto.log"
        self._resolv_conf = resolv_conf
        self._anchors = anchors
        self._namespace: Namespace
        self._process: subprocess.Popen[Any] | None = None
        self.ckaid = ""
        self.nss = f"sql:{self.directory / 'nss'}"
        for name in ("nss", "run", "ipsec.d/policies"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        if not (PROGRAMS / "pluto").exists():
            raise OepyError(f"no libreswan in {PROGRAMS}", "install it, or see scripts/unpack-peers")
        run("certutil", "-N", "--empty-password", "-d", self.nss)

    def make_key(self) -> PublicKey:
        """Its RSA host key, in its own key store."""
        nss = self.directory / "nss"
        run(str(PROGRAMS / "rsasigkey"), "--nssdir", str(nss), str(KEY_BITS))
        listed = self._show_key("--list")
        found = re.search(r"ckaid: ([0-9a-f]{40})", listed)
        if found is None:
            raise OepyError(f"libreswan made no key: {listed.strip()}")
        self.ckaid = found.group(1)
        return parse_public(self._show_key("--pem", "--ckaid", self.ckaid), "libreswan's key")

    def _show_key(self, *arguments: str) -> str:
        return run(str(PROGRAMS / "showhostkey"), "--nssdir", str(self.directory / "nss"), *arguments)

    def start(self, namespace: Namespace, connections: str, groups: dict[str, Sequence[str]]) -> None:
        """`connections` are `conn` sections; `groups` are the prefixes of each policy group. Returns when it
        listens and has everything loaded."""
        self._namespace = namespace
        config = self.directory / "ipsec.conf"
        config.write_text(
            f"config setup\n\tdnssec-enable=yes\n\tdnssec-rootkey-file={self._anchors}\n"
            f"\tipsecdir={self.directory}/ipsec.d\n\tnssdir={self.directory}/nss\n\n{connections}"
        )
        (self.directory / "ipsec.secrets").write_text("")
        for name, prefixes in groups.items():
            (self.directory / "ipsec.d/policies" / name).write_text("".join(f"{p}\n" for p in prefixes))
        self._process = self._namespace.popen(
            *[sys.executable, "-m", "oepy.lab.enter", str(self._resolv_conf), "--"],
            *[str(PROGRAMS / "pluto"), "--nofork", "--config", str(config)],
            *["--logfile", str(self.log), "--rundir", str(self.directory / "run")],
            *["--secretsfile", str(self.directory / "ipsec.secrets")],
            *["--ipsecdir", str(self.directory / "ipsec.d"), "--nssdir", str(self.directory / "nss")],
        )
        deadline = time.monotonic() + START_SECONDS
        while not re.search(r"loaded [1-9]", self.whack("--status")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise OepyError("pluto did not start", self.log_end())
            time.sleep(0.05)

    @property
    def control(self) -> Path:
        return self.directory / "run/pluto.ctl"

    def whack(self, *arguments: str) -> str:
        done = self._namespace.run(
            str(PROGRAMS / "whack"), "--ctlsocket", str(self.control), *arguments, check=False
        )
        return done.stdout

    def log_end(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.whack("--shutdown")
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None


def run(*argv: str) -> str:
    """What it wrote. Raises OepyError with its errors."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise OepyError(f"{Path(argv[0]).name} failed: {done.stderr.strip()}")
    return done.stdout
