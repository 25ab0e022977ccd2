"""Puts the room together for the daemon and the commands: here, and only here, the real clocks come in."""

from __future__ import annotations

import calendar
import os
import random
import time
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import dns.exception
import dns.name

from oepy.configfile import RESOLV_CONF, system_resolvers
from oepy.dns.anchorfile import read_points
from oepy.dns.anchorkeeper import AnchorKeeper, Report, apply_points
from oepy.dns.anchors import TrustAnchors
from oepy.dns.claims import NamedKeySource
from oepy.dns.peers import DnsKeySource
from oepy.dns.signatures import STRICT, WITH_SHA1
from oepy.dns.transport import StubTransport
from oepy.dns.validator import Validator
from oepy.errors import ConfigError, UsageError
from oepy.resolvers import Resolver


def make_validator(
    resolvers: Sequence[Resolver] = (),
    *,
    tls_bundle: str | None = None,
    trust_anchors: Sequence[str | os.PathLike[str]] = (),
    negative_trust_anchors: Sequence[str] = (),
    auto_trust_anchors: Path | None = None,
    sha1: bool = False,
    mark: int = 0,
    at: int | None = None,
) -> Validator:
    """A validator on real sockets. Call it inside the event loop that will use it.

    `resolvers` empty means those of /etc/resolv.conf, `tls_bundle` None the system's certificates, `trust_anchors`
    empty the IANA root; `negative_trust_anchors` are zones that are not to be checked (RFC 7646);
    `auto_trust_anchors` is the file of anchors that are kept up to date, read here only; `sha1`: take SHA-1 for
    protection; `mark` is the SO_MARK of its sockets; `at` fixes the time for signatures (seconds since 1970).
    Raises ConfigError.
    """
    transport = StubTransport(resolvers or default_resolvers(), mark, tls_bundle=tls_bundle)
    clock = time.time if at is None else lambda: float(at)
    try:
        negative = [dns.name.from_text(zone) for zone in negative_trust_anchors]
    except (dns.exception.DNSException, UnicodeError) as error:
        raise ConfigError(
            "dns.negative_trust_anchors", [f"holds something that is no zone: {error}"]
        ) from None
    anchors = TrustAnchors.load(trust_anchors, negative)
    if auto_trust_anchors is not None:
        apply_points(anchors, read_points(auto_trust_anchors))
    return Validator(transport, anchors, clock, time.monotonic, WITH_SHA1 if sha1 else STRICT)


def make_anchor_keeper(
    validator: Validator, path: Path, trust_anchors: Sequence[str | os.PathLike[str]], report: Report
) -> AnchorKeeper:
    """For the daemon: keeps `path`, which `validator` was made with. Raises ConfigError."""
    return AnchorKeeper(path, TrustAnchors.load(trust_anchors), validator, time.time, report)


def default_resolvers(path: Path = RESOLV_CONF) -> tuple[Resolver, ...]:
    """Those of resolv.conf; 127.0.0.1 where it names none, as the C library does."""
    return tuple(map(Resolver, system_resolvers(path) or (ip_address("127.0.0.1"),)))


def make_key_source(validator: Validator, trusted_names: Sequence[str] = ()) -> NamedKeySource:
    """The daemon's `KeySource`; records of equal precedence come in random order. `trusted_names` are zones whose
    names speak for the addresses they lead to."""
    source = DnsKeySource(validator, random.SystemRandom().shuffle)
    return NamedKeySource(source, validator, [dns.name.from_text(zone) for zone in trusted_names])


def parse_time(text: str) -> int:
    """`YYYYMMDDHHMMSS` in UTC, as in RRSIG records, to seconds since 1970. Raises UsageError."""
    try:
        if len(text) != 14 or not text.isdigit():
            raise ValueError
        return calendar.timegm(time.strptime(text, "%Y%m%d%H%M%S"))
    except ValueError:
        raise UsageError(f"{text!r} is no time", "write YYYYMMDDHHMMSS, in UTC") from None
