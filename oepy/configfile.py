"""Where the configuration is, and a look at single values of it.

Commands look here, so that they work while the rest of the file is being edited, and start without pydantic.
"""

from __future__ import annotations

from pathlib import Path

from oepy.errors import ConfigError

DEFAULT_PATH = Path("/etc/oepy/oepy.yaml")
DEFAULT_SOCKET = Path("/run/oepy/oepy.sock")


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
