"""Two namespaces for strongSwan's charon (oepy.lab.charon) and an endpoint of ours:

[ns ..a: oepy's sockets, 198.18.0.1, 2001:2::1] ── veth ── [ns ..b: charon, 198.18.0.2, 2001:2::2]
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from oepy.lab.charon import KERNEL_ESP, Charon, charon

OURS, THEIRS = "198.18.0.1", "198.18.0.2"
OURS6, THEIRS6 = "2001:2::1", "2001:2::2"


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


__all__ = ["KERNEL_ESP", "OURS", "OURS6", "THEIRS", "THEIRS6", "Charon", "Lab", "charon", "lab", "run"]
