"""Where the configuration is, a look at single values of it, and what resolv.conf says.

Commands look here, so that they work while the rest of the file is being edited, and start without pydantic.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from pathlib import Path

from oepy.errors import ConfigError
from oepy.model import IpAddress

DEFAULT_PATH = Path("/etc/oepy/oepy.yaml")
DEFAULT_SOCKET = Path("/run/oepy/oepy.sock")
RESOLV_CONF = Path("/etc/resolv.conf")
MAX_SYSTEM_RESOLVERS = 3  # as many as the C library looks at


def peek(path: str | None, section: str, key: str) -> object:
    """One value, None where the file (the default one only) or the value is missing. Nothing is checked.
    Raises ConfigError where the file cannot be read or is no YAML."""
    file = Path(path) if path else DEFAULT_PATH
    if not path and not file.exists():
        return None
    import yaml

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), [f"cannot be read: {error}"]) from None
    except yaml.YAMLError:
        raise ConfigError(str(file), ["is no YAML; `oepy run --check` shows where"]) from None
    part = data.get(section) if isinstance(data, dict) else None
    return part.get(key) if isinstance(part, dict) else None


def system_resolvers(path: Path = RESOLV_CONF) -> tuple[IpAddress, ...]:
    """The `nameserver` lines of resolv.conf; lines that hold no address are passed over as the libc does."""
    found: list[IpAddress] = []
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                address = ip_address(words[1])
            except ValueError:
                continue
            if not (isinstance(address, IPv6Address) and address.scope_id):
                found.append(address)
    return tuple(found[:MAX_SYSTEM_RESOLVERS])
