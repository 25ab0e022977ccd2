"""Manual SAs and policies as the text of oepy's configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from oepy.convert.drafts import Conversion
from oepy.manual.presenting import policy_mapping, sa_mapping

# (name for a file, the key as 0x…) → what the configuration says instead, None for the key itself
KeepKey = Callable[[str, str], str | None]


def render(conversion: Conversion, source: str, keep_key: KeepKey) -> str:
    """YAML. Where keys stand in it, its head says so: such a file must be of mode 0600."""
    lines: list[str] = []
    inline = False
    for place, sa in conversion.sas:
        mapping: dict[str, Any] = {}
        for name, value in sa_mapping(sa).items():
            path = None
            if name.endswith("_key"):
                file_name = (
                    f"{sa.protocol}-{sa.spi:08x}-{str(sa.dst).replace(':', '_')}.{name.removesuffix('_key')}"
                )
                path = keep_key(file_name, str(value))
                inline = inline or path is None
            if path is not None:
                mapping[f"{name}_file"] = path
            else:
                mapping[name] = value
        lines += [f"    # {place.file}:{place.line}".replace("\n", " "), *_item(mapping)]
    policies: list[str] = []
    for place, policy in conversion.policies:
        policies += [f"    # {place.file}:{place.line}".replace("\n", " "), *_item(policy_mapping(policy))]
    head = [f"# Made by `oepy convert` from {source}".replace("\n", " ")]
    if inline:
        head.append("# The keys stand in here: keep this file at mode 0600, or convert with --keys-dir DIR")
    text = [*head, "manual:"]
    text += ["  sas:", *lines] if lines else ["  sas: []"]
    text += ["  policies:", *policies] if policies else ["  policies: []"]
    return "\n".join(text) + "\n"


def _item(mapping: dict[str, Any]) -> list[str]:
    rows = [f"{name}: {_value(value)}" for name, value in mapping.items()]
    return [f"    - {rows[0]}", *(f"      {row}" for row in rows[1:])]


def _value(value: Any) -> str:
    """In YAML's flow style, which JSON is part of; plain words stay plain."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str) and value.replace("_", "").replace("-", "").isalnum() and value[:1].isalpha():
        return value
    return json.dumps(value)
