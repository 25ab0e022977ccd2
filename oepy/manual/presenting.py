"""Manual SAs and policies as mappings: back to what `reading` takes, and for people without the keys."""

from __future__ import annotations

import dataclasses
from typing import Any

from oepy.manual.algorithms import AEADS
from oepy.manual.model import PROTOCOL_NAMES, ManualPolicy, ManualSa, Selector, Template
from oepy.model import Lifetime, Secret

Json = dict[str, Any]


def sa_mapping(sa: ManualSa) -> Json:
    """With the keys, in hexadecimal: for the control socket and for files of mode 0600 alone."""
    mapping = _sa_head(sa)
    for name, algorithm, key in _keys(sa):
        mapping[name] = algorithm
        if len(key):
            mapping[f"{name}_key"] = "0x" + key.reveal().hex()
    return mapping | _sa_tail(sa)


def sa_view(sa: ManualSa) -> Json:
    """Without the keys: their lengths in bits."""
    mapping = _sa_head(sa)
    for name, algorithm, key in _keys(sa):
        mapping[name] = algorithm
        mapping[f"{name}_key_bits"] = 8 * len(key)
    return mapping | _sa_tail(sa)


def _keys(sa: ManualSa) -> list[tuple[str, str, Secret]]:
    name = "aead" if sa.encryption in AEADS else "encryption"
    pairs = [(name, sa.encryption, sa.encryption_key), ("integrity", sa.integrity, sa.integrity_key)]
    return [item for item in pairs if item[1]]


def _sa_head(sa: ManualSa) -> Json:
    return {
        "src": str(sa.src),
        "dst": str(sa.dst),
        "protocol": sa.protocol,
        "spi": f"{sa.spi:#010x}",
        "mode": sa.mode,
    }


def _sa_tail(sa: ManualSa) -> Json:
    """What is not as by default."""
    tail: Json = {}
    if sa.reqid:
        tail["reqid"] = sa.reqid
    if sa.encap is not None:
        tail["encap"] = {"sport": sa.encap.source_port, "dport": sa.encap.destination_port}
    if sa.replay_window:
        tail["replay_window"] = sa.replay_window
    if sa.esn:
        tail["esn"] = True
    limits = {name: int(value) for name, value in dataclasses.asdict(sa.lifetime).items() if value}
    if sa.lifetime != Lifetime():
        tail["lifetime"] = limits
    if sa.allow_weak:
        tail["allow_weak"] = True
    return tail


def selector_mapping(direction: str, selector: Selector) -> Json:
    mapping: Json = {"direction": direction, "src": str(selector.src), "dst": str(selector.dst)}
    if selector.protocol:
        mapping["protocol"] = PROTOCOL_NAMES.get(selector.protocol, str(selector.protocol))
    if selector.sport:
        mapping["sport"] = selector.sport
    if selector.dport:
        mapping["dport"] = selector.dport
    return mapping


def policy_mapping(policy: ManualPolicy) -> Json:
    mapping = selector_mapping(policy.direction, policy.selector) | {"action": policy.action}
    if policy.templates:
        mapping["templates"] = [template_mapping(item) for item in policy.templates]
    mapping["priority"] = policy.priority
    return mapping


def template_mapping(template: Template) -> Json:
    mapping: Json = {"protocol": template.protocol, "mode": template.mode}
    if template.src is not None:
        mapping |= {"src": str(template.src), "dst": str(template.dst)}
    mapping["level"] = template.level
    if template.reqid:
        mapping["reqid"] = template.reqid
    if template.spi:
        mapping["spi"] = f"{template.spi:#010x}"
    return mapping


def template_from_text(text: str) -> Json:
    """`PROTOCOL/MODE/SRC-DST/LEVEL` as setkey(8) writes it, as a mapping; LEVEL is use, require or unique:REQID.
    Raises ValueError with the mend. The values themselves are checked by whoever reads the mapping."""
    parts = text.split("/")
    if len(parts) != 4:
        raise ValueError(f"{text[:80]!r} is not like esp/tunnel/192.0.2.1-192.0.2.2/require")
    protocol, mode, ends, level = parts
    mapping: Json = {"protocol": protocol, "mode": mode}
    if ends:
        source, dash, destination = ends.partition("-")
        if not dash:
            raise ValueError(f"{ends[:80]!r} are no two ends; write SRC-DST")
        mapping |= {"src": source, "dst": destination}
    name, colon, number = level.partition(":")
    if name == "unique":
        if not colon:
            raise ValueError(
                "level unique without a number takes SAs of IKE; write unique:REQID, and -u REQID there"
            )
        mapping |= {"level": "require", "reqid": number}
    elif level in ("use", "require"):
        mapping["level"] = level
    elif level == "default":
        raise ValueError("level default is what the system's setting says; write use or require")
    else:
        raise ValueError(f"{level[:40]!r} is no level; write use, require or unique:REQID")
    return mapping
