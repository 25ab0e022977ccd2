"""strongSwan's charon in a network namespace of its own, with all its files under the test's directory.

    [ns ..a: oepy's sockets, 198.18.0.1, 2001:2::1] ── veth ── [ns ..b: charon, 198.18.0.2, 2001:2::2]

Nothing of the host is touched: binaries are copies (AppArmor confines the originals by path), /run is a
private mount, the vici socket and the configuration are ours. ESP is charon's own, over TUN
(kernel-libipsec), so it needs UDP encapsulation and no kernel ESP; in the second kernel it is the kernel's.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHARON = Path("/usr/lib/ipsec/charon")
SWANCTL = Path("/usr/sbin/swanctl")
OURS, THEIRS = "198.18.0.1", "198.18.0.2"
OURS6, THEIRS6 = "2001:2::1", "2001:2::2"

_CONF = """
charon {{
  load = random nonce aes sha1 sha2 hmac kdf gcm chapoly openssl curve25519 pem pkcs1 pkcs8 pubkey x509 \
    vici {kernel} socket-default
  retransmit_timeout = 1.0
  retransmit_tries = 3
  make_before_break = no
  plugins {{
    vici {{ socket = unix://{vici} }}
{userland}  }}
  filelog {{
    log {{
      path = {log}
      default = 1
      ike = 2
      cfg = 2
      enc = 1
      flush_line = yes
    }}
  }}
}}
"""
KERNEL_ESP = bool(os.environ.get("OEPY_SECOND_KERNEL"))
_USERLAND = """
    # the selectors are the peers' own addresses, as opportunistic tunnels have them: charon's own packets
    # carry a mark, and all without it go into its TUN device
    kernel-libipsec {
      load = 20
      allow_peer_ts = yes
    }
    kernel-netlink { fwmark = !0x42 }
    socket-default { fwmark = 0x42 }
"""


def _configuration(vici: Path, log: Path) -> str:
    kernel = "kernel-netlink" if KERNEL_ESP else "kernel-libipsec kernel-netlink"
    return _CONF.format(vici=vici, log=log, kernel=kernel, userland="" if KERNEL_ESP else _USERLAND)


def run(*command: str, check: bool = True, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(command)}: {result.returncode}\n{result.stdout}{result.stderr}")
    return result


@dataclass
class Lab:
    """Two namespaces joined by a veth pair."""

    ours: str
    theirs: str


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    tag = f"{os.getpid():x}{secrets.token_hex(2)}"
    names = Lab(f"oepy-{tag}-a", f"oepy-{tag}-b")
    try:
        for name in (names.ours, names.theirs):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run(
            "ip",
            "-n",
            names.ours,
            "link",
            "add",
            "veth0",
            "type",
            "veth",
            "peer",
            "veth0",
            "netns",
            names.theirs,
        )
        for name, v4, v6 in ((names.ours, OURS, OURS6), (names.theirs, THEIRS, THEIRS6)):
            run("ip", "-n", name, "addr", "add", f"{v4}/24", "dev", "veth0")
            run("ip", "-n", name, "addr", "add", f"{v6}/64", "dev", "veth0", "nodad")
            run("ip", "-n", name, "link", "set", "veth0", "up")
        yield names
    finally:
        for name in (names.ours, names.theirs):
            run("ip", "netns", "del", name, check=False)


class Charon:
    """A running charon. `load` takes a swanctl.conf; keys go into `files`, as `pubkey/peer.pem` and so on."""

    def __init__(self, namespace: str, directory: Path) -> None:
        self.namespace = namespace
        self.directory = directory
        self.vici = f"unix://{directory}/charon.vici"
        self.log = directory / "charon.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        directory = self.directory
        (directory / "run").mkdir(parents=True)
        shutil.copy(CHARON, directory / "charon")
        shutil.copy(SWANCTL, directory / "swanctl")
        (directory / "strongswan.conf").write_text(_configuration(directory / "charon.vici", self.log))
        script = f"mount --bind {directory}/run /run && exec {directory}/charon"
        with (directory / "charon.out").open("wb") as output:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "-m", "sh", "-c", script],
                env=self._environment(),
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + 15
        while not (directory / "charon.vici").exists():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise AssertionError("charon does not start: " + (directory / "charon.out").read_text())
            time.sleep(0.05)

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "STRONGSWAN_CONF": str(self.directory / "strongswan.conf"),
            "SWANCTL_DIR": str(self.directory / "conf"),
        }

    def swanctl(self, *arguments: str, check: bool = True) -> str:
        result = subprocess.run(
            [str(self.directory / "swanctl"), *arguments, "--uri", self.vici],
            capture_output=True,
            text=True,
            timeout=30,
            env=self._environment(),
            check=False,
        )
        if check and result.returncode:
            raise AssertionError(f"swanctl {arguments}: {result.stdout}{result.stderr}\n{self.tail()}")
        return result.stdout + result.stderr

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A swanctl command that waits for us to play our part; the caller waits for it."""
        return subprocess.Popen(
            [str(self.directory / "swanctl"), *arguments, "--uri", self.vici],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment(),
        )

    def load(self, configuration: str, files: dict[str, bytes] | None = None) -> None:
        base = self.directory / "conf"
        base.mkdir(exist_ok=True)
        for name, content in (files or {}).items():
            path = base / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        (base / "swanctl.conf").write_text(configuration)
        self.swanctl("--load-all", "--file", str(base / "swanctl.conf"))

    def sas(self) -> str:
        return self.swanctl("--list-sas")

    def tail(self, lines: int = 60) -> str:
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)


@contextlib.contextmanager
def charon(namespace: str, directory: Path) -> Iterator[Charon]:
    daemon = Charon(namespace, directory)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()
