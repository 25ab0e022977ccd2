"""`oepy explain` without a daemon: what would happen to the first packet."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from oepy import config as configuration
from oepy.config import Config
from oepy.daemon import views
from oepy.daemon.addresses import is_own
from oepy.daemon.manual import first_match
from oepy.engine.forecast import STATIC, forecast
from oepy.interfaces import KeySource
from oepy.model import MARK_OWN, IpAddress
from oepy.policy import PolicyTable

if TYPE_CHECKING:
    from oepy.dns.validator import Validator


async def foretell(
    destination: IpAddress, policy: PolicyTable, source: KeySource, config: Config
) -> dict[str, Any]:
    """The story of a destination without an entry; asks the DNS where the group would."""
    match = policy.match_address(destination)
    if match.group in STATIC:
        return views.would_be(str(destination), match, None, STATIC[match.group])
    answer = await source.peer_keys(destination)
    outcome = forecast(
        *(match.group, answer),
        use_insecure_keys=config.insecure_keys,
        by_certificate=destination in config.certified_peers,
        is_own=is_own,
    )
    return views.would_be(str(destination), match, answer, outcome)


def explain_without_daemon(config_path: str | None, destination: IpAddress) -> dict[str, Any]:
    config = configuration.load(config_path)
    policy = PolicyTable(config.rules, config.default_group)
    manual = first_match(config.manual, destination)
    if manual is not None:
        data = views.manual_explanation(destination, manual, None)
        data["reason"] = (
            f"manual policy: action {manual.action}; no daemon runs here, this is what would happen"
        )
        data["disposition"] = {"ipsec": "private", "bypass": "clear", "block": "blocked"}[manual.action]
        return data

    async def ask() -> dict[str, Any]:
        source = key_source(config)
        return await foretell(destination, policy, source, config)

    data = asyncio.run(ask())
    data["trap"] = "no daemon runs here: this is what would happen"
    return data


def key_source(config: Config) -> KeySource:
    """The DNS room as this configuration wants it."""
    from oepy.dns.build import make_key_source

    return make_key_source(validator(config), config.trusted_names)


def validator(config: Config) -> Validator:
    """Its questions carry the daemon's mark."""
    from oepy.dns.build import make_validator

    return make_validator(
        config.resolvers,
        tls_bundle=str(config.tls_cert_bundle) if config.tls_cert_bundle else None,
        trust_anchors=config.trust_anchors,
        negative_trust_anchors=config.negative_trust_anchors,
        auto_trust_anchors=config.auto_trust_anchors,
        sha1=config.sha1,
        mark=MARK_OWN,
    )
