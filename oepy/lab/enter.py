"""Run a command with the lab's resolver: `python -m oepy.lab.enter RESOLV_CONF -- COMMAND …`.

It gets a mount namespace of its own in which /etc/resolv.conf is the given file and names are looked up in
files and DNS only, so nothing of the host is changed and nothing has to be cleaned up.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _bind(source: Path, target: Path) -> None:
    _check(
        _libc.mount(str(source).encode(), str(target.resolve()).encode(), None, _MS_BIND, None),
        f"mount {source} on {target}",
    )


def enter(resolv_conf: Path) -> None:
    """Give this process its own view of /etc/resolv.conf and /etc/nsswitch.conf. Needs root."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "make mounts private")
    _bind(resolv_conf, Path("/etc/resolv.conf"))
    switch = resolv_conf.with_name("nsswitch.conf")
    if switch.exists() and Path("/etc/nsswitch.conf").exists():
        _bind(switch, Path("/etc/nsswitch.conf"))


def main() -> None:
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit("usage: python -m oepy.lab.enter RESOLV_CONF -- COMMAND [ARGUMENT…]")
    enter(Path(sys.argv[1]))
    os.execvp(sys.argv[3], sys.argv[3:])  # noqa: S606 - an argument list, no shell


if __name__ == "__main__":
    main()
