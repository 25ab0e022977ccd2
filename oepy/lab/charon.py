"""strongSwan's charon in a network namespace, with all its files under a directory of ours.

Nothing of the host is touched: binaries are copies (AppArmor confines the originals by path), /run is a
private mount, the vici socket and the configuration are ours. ESP is charon's own, over TUN
(kernel-libipsec), so it needs UDP encapsulation and no kernel ESP; in the second kernel it is the kernel's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oepy.errors import OepyError

CHARON = Path("/usr/lib/ipsec/charon")
SWANCTL = Path("/usr/sbin/swanctl")
LIBIPSEC = Path("/usr/lib/ipsec/plugins/libstrongswan-kernel-libipsec.so")
KERNEL_ESP = bool(os.environ.get("OEPY_SECOND_KERNEL"))
START_SECONDS = 15.0
COMMAND_SECONDS = 30.0

_CONF = """
charon {{
  load = {plugins}
{settings}
  plugins {{
    vici {{ socket = unix://{directory}/charon.vici }}
{plugin_settings}
  }}
{log}
}}
"""
_LOG = """
  filelog {{
    log {{
      path = {path}
      default = 1
      ike = 2
      cfg = 2
      enc = 1
      flush_line = yes
    }}
  }}
"""


@dataclass(frozen=True, slots=True)
class Options:
    """Of strongswan.conf: the plugins in the order of preference, lines for `charon` and for `charon.plugins`."""

    plugins: str
    settings: str = ""
    plugin_settings: str = ""
    logs: bool = True


_CRYPTO = (
    "random nonce aes sha1 sha2 hmac kdf gcm chapoly openssl curve25519 pem pkcs1 pkcs8 pubkey x509 vici"
)
_PATIENCE = """
  retransmit_timeout = 1.0
  retransmit_tries = 3
  make_before_break = no
"""
# The selectors are the peers' own addresses, as opportunistic tunnels have them: charon's own packets carry a mark,
# and all without it go into its TUN device
_USERLAND = """
    kernel-libipsec {
      load = 20
      allow_peer_ts = yes
    }
    kernel-netlink { fwmark = !0x42 }
    socket-default { fwmark = 0x42 }
"""
PEER = (
    Options(f"{_CRYPTO} kernel-netlink socket-default", _PATIENCE)
    if KERNEL_ESP
    else Options(f"{_CRYPTO} kernel-libipsec kernel-netlink socket-default", _PATIENCE, _USERLAND)
)
"""A peer to interoperate with, with the ESP that works on this kernel."""


def is_missing() -> str:
    """What of it is not installed; "" where all is there."""
    return ", ".join(str(path) for path in (CHARON, SWANCTL, LIBIPSEC) if not path.exists())


class Charon:
    """A running charon. `load` takes a swanctl.conf; keys go into `files`, as `pubkey/peer.pem` and so on.
    All raise OepyError where charon refuses."""

    def __init__(self, namespace: str, directory: Path, options: Options = PEER) -> None:
        self.namespace = namespace
        self.directory = directory
        self.vici = f"unix://{directory}/charon.vici"
        self.log = directory / "charon.log"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        directory, options = self.directory, self._options
        (directory / "run").mkdir(parents=True)
        shutil.copy(CHARON, directory / "charon")
        shutil.copy(SWANCTL, directory / "swanctl")
        (directory / "strongswan.conf").write_text(
            _CONF.format(
                directory=directory,
                plugins=options.plugins,
                settings=options.settings,
                plugin_settings=options.plugin_settings,
                log=_LOG.format(path=self.log) if options.logs else "",
            )
        )
        script = 'mount --bind "$1/run" /run && exec "$1/charon"'
        with (directory / "charon.out").open("wb") as output:
            self._process = subprocess.Popen(
                [
                    *["ip", "netns", "exec", self.namespace],
                    *["unshare", "-m", "sh", "-c", script, "sh", str(directory)],
                ],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + START_SECONDS
        while not (directory / "charon.vici").exists():
            if time.monotonic() > deadline or self._process.poll() is not None:
                said = (directory / "charon.out").read_text(errors="replace")
                raise OepyError(f"charon does not start: {said[-2000:]}")
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
            timeout=COMMAND_SECONDS,
            env=self._environment(),
            check=False,
        )
        if check and result.returncode:
            raise OepyError(
                f"swanctl {' '.join(arguments)}: {result.stdout}{result.stderr}".strip(), self.tail()
            )
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
            path.touch(mode=0o600)
            path.write_bytes(content)
        path = base / "swanctl.conf"
        path.touch(mode=0o600)
        path.write_text(configuration)
        self.swanctl("--load-all", "--file", str(path))

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
def charon(namespace: str, directory: Path, options: Options = PEER) -> Iterator[Charon]:
    daemon = Charon(namespace, directory, options)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()
