"""Connections from text, as the configuration gives them, with files from a dictionary."""

from __future__ import annotations

from typing import Any

import yaml

from oepy.connections.model import ConnectionSet
from oepy.connections.reading import Files, Problem, bounds_and_pools, read_connections
from oepy.errors import UsageError
from oepy.ike.algorithms import parse_ah_proposal, parse_esp_proposal, parse_ike_proposal
from oepy.keys import HostKey, to_public_key
from oepy.model import PublicKey
from oepy.x509.certificates import Certificate
from oepy.x509.identity import identities_of


def read(
    text: str,
    private: dict[str, bytes] | None = None,
    public: dict[str, PublicKey] | None = None,
    certificates: dict[str, list[Certificate]] | None = None,
) -> tuple[ConnectionSet, list[Problem]]:
    return read_data(yaml.safe_load(text) or {}, private, public, certificates)


def read_data(
    data: dict[str, object],
    private: dict[str, bytes] | None = None,
    public: dict[str, PublicKey] | None = None,
    certificates: dict[str, list[Certificate]] | None = None,
) -> tuple[ConnectionSet, list[Problem]]:
    loaded: dict[str, Any] = {}

    def of(files: dict[str, Any], name: str) -> Any:
        if name not in files:
            raise UsageError(f"{name} does not exist")
        return files[name]

    def own_key(name: str) -> str:
        HostKey.from_pem(of(private or {}, name))
        return name

    def certificate_file(name: str) -> str:
        loaded[name] = tuple(of(certificates or {}, name))
        return name

    def proves(name: str, key: str) -> bool:
        return to_public_key(loaded[name][0].public_key()) == HostKey.from_pem(of(private or {}, key)).public

    found, problems = read_connections(
        data,
        Files(
            private=lambda name: of(private or {}, name),
            public=lambda name: of(public or {}, name),
            own_key=own_key,
            certificates=certificate_file,
            proves=proves,
            identities=lambda name: identities_of(loaded[name][0]),
            read=loaded,
            proposal_ike=parse_ike_proposal,
            proposal_esp=parse_esp_proposal,
            proposal_ah=parse_ah_proposal,
        ),
    )
    return found, [*problems, *bounds_and_pools(found)]


def good(
    text: str,
    private: dict[str, bytes] | None = None,
    public: dict[str, PublicKey] | None = None,
    certificates: dict[str, list[Certificate]] | None = None,
) -> ConnectionSet:
    found, problems = read(text, private, public, certificates)
    assert problems == []
    return found


def between(here: str, there: str, *, own: str, peer: str, start: str = "none", **more: Any) -> str:
    """A connection `site` with one child `net`, both ends with PSK by names."""
    child = {
        "local_ts": [f"{here}/32"],
        "remote_ts": [f"{there}/32"],
        "start_action": start,
        **more.pop("child", {}),
    }
    connection = {
        "local_addrs": [here],
        "remote_addrs": [there],
        "local": {"auth": "psk", "id": own},
        "remote": {"auth": "psk", "id": peer},
        "children": more.pop("children", {"net": child}),
        **more,
    }
    secrets = [{"type": "ike", "id": [own, peer], "secret_file": "psk"}]
    return str(yaml.safe_dump({"connections": {"site": connection}, "secrets": secrets}, sort_keys=False))
