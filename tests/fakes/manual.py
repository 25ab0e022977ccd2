"""Manual sections of two hosts that belong together."""

from __future__ import annotations

from typing import Any

KEYS = {"encryption": "aes256", "integrity": "sha256"}


def key(seed: int, length: int = 32) -> str:
    return "0x" + bytes((seed + index) % 256 for index in range(length)).hex()


def sa(src: str, dst: str, spi: int, **changes: Any) -> dict[str, Any]:
    """One ESP SA in UDP, in tunnel mode; its keys follow from its SPI."""
    made = {
        "src": src,
        "dst": dst,
        "protocol": "esp",
        "spi": hex(spi),
        "mode": "tunnel",
        **KEYS,
        "encryption_key": key(spi),
        "integrity_key": key(spi + 7),
        "encap": {"sport": 4500, "dport": 4500},
    }
    made.update(changes)
    return {name: value for name, value in made.items() if value is not None}


def sas(here: str, there: str, **changes: Any) -> list[dict[str, Any]]:
    """Both directions between two hosts: the same list serves both of them."""
    first, second = sorted((here, there))
    return [sa(first, second, 0x1001, **changes), sa(second, first, 0x1002, **changes)]


def policies(
    here: str,
    there: str,
    *,
    near: str = "",
    far: str = "",
    template: dict[str, Any] | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Out and in of the host `here`, for traffic between `near` and `far` (by default the hosts themselves)."""
    near, far = near or here, far or there
    made = []
    for direction, src, dst, outer in (("out", near, far, (here, there)), ("in", far, near, (there, here))):
        wanted = {"protocol": "esp", "mode": "tunnel", "src": outer[0], "dst": outer[1], **(template or {})}
        if wanted["mode"] == "transport":
            del wanted["src"], wanted["dst"]
        made.append({"direction": direction, "src": src, "dst": dst, "template": wanted, **changes})
    return made


def section(here: str, there: str, **changes: Any) -> dict[str, Any]:
    return {"sas": sas(here, there, **changes), "policies": policies(here, there)}
