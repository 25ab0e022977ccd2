"""Checks of this host. Each tries the thing itself; none changes anything."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from oepy.config import Config
from oepy.configfile import RESOLV_CONF, system_resolvers
from oepy.daemon.addresses import own_addresses
from oepy.daemon.datapaths import choose
from oepy.daemon.forecast import key_source
from oepy.daemon.own import OwnRecords
from oepy.daemon.traps import choose_trap
from oepy.errors import OepyError
from oepy.interfaces import KeySource
from oepy.keys import HostKey, describe, fingerprint
from oepy.model import IKE_PORT, NAT_T_PORT, Bogus, IpAddress, KeyAnswer, Unreachable
from oepy.resolvers import DNS_PORT

_EARLIEST_PLAUSIBLE = 1_767_225_600  # 2026-01-01: a clock before it fails every DNSSEC signature


@dataclass(frozen=True, slots=True)
class Finding:
    """`verdict`: good, warning or bad."""

    subject: str
    verdict: str
    text: str
    mend: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(config: Config) -> list[Finding]:
    """All checks, in the order in which a packet would need them."""
    return [
        *_privilege(),
        *_clock(),
        *_kernel_ipsec(),
        *_tun(),
        *_datapath(config),
        *_trap(config),
        *_ports(),
        *_key(config),
        *_certificates(config),
        *asyncio.run(_names(config)),
        *judge_relay(config.relay, system_resolvers()),
        *_guard(),
    ]


def _privilege() -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield Finding("root", "good", "running as root")
    else:
        yield Finding("root", "warning", "not root: some checks can't be made", "run `sudo oepy doctor`")


def _clock() -> Iterator[Finding]:
    if time.time() < _EARLIEST_PLAUSIBLE:
        yield Finding("clock", "bad", f"it says {time.ctime()}", "set it: DNSSEC signatures have dates")
    else:
        yield Finding("clock", "good", time.strftime("%Y-%m-%d %H:%M:%S %Z"))


def _tun() -> Iterator[Finding]:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except FileNotFoundError:
        yield Finding(
            "TUN", "warning", "no /dev/net/tun", "load the module `tun`, or give the container the device"
        )
    except OSError as error:
        yield Finding("TUN", "warning", f"/dev/net/tun: {error.strerror}", "give this process CAP_NET_ADMIN")
    else:
        yield Finding("TUN", "good", "/dev/net/tun opens")


def _kernel_ipsec() -> Iterator[Finding]:
    """Tried with an SA and a device that are removed at once."""
    from oepy.datapath.xfrm.probe import probe

    found = probe()
    for trial in (*found.esp, found.interface):
        if trial.error is None:
            yield Finding(trial.what, "good", "works in this kernel")
        else:
            yield Finding(trial.what, "warning", trial.error.what, trial.error.mend)


def _datapath(config: Config) -> Iterator[Finding]:
    try:
        name, mode, reason = choose(config.datapath)
    except OepyError as error:
        yield Finding("datapath", "bad", f"`datapath: {config.datapath}`: {error.what}", error.mend)
    else:
        by = f" by {mode}" if mode else ""
        yield Finding("datapath", "good", f"`datapath: {config.datapath}` is {name}{by}: {reason}")


def _trap(config: Config) -> Iterator[Finding]:
    """Tried with a table of nftables that is removed at once."""
    from oepy.trap.probe import packet_queue

    lacking = packet_queue()
    if lacking is None:
        yield Finding("packet queue", "good", "packets can be queued")
    else:
        yield Finding("packet queue", "warning", lacking.what, lacking.mend)
    try:
        name, reason = choose_trap(config.trap, config.datapath)
    except OepyError as error:
        yield Finding("trap", "bad", f"`trap: {config.trap}`: {error.what}", error.mend)
    else:
        yield Finding("trap", "good", f"`trap: {config.trap}` is {name}: {reason}")


def _ports() -> Iterator[Finding]:
    for port in (IKE_PORT, NAT_T_PORT):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.bind(("0.0.0.0", port))  # noqa: S104 - only to see whether it is free
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    text, mend = "in use", "oepy itself may run already; else stop the other IKE daemon"
                    yield Finding(f"UDP {port}", "warning", text, mend)
                else:
                    yield Finding(f"UDP {port}", "warning", str(error.strerror), "run as root")
            else:
                yield Finding(f"UDP {port}", "good", "free")


def _key(config: Config) -> Iterator[Finding]:
    if not config.key.exists():
        yield Finding("host key", "warning", f"no {config.key}", "`oepy run` makes one at its first start")
        return
    try:
        key = HostKey.load(config.key)
    except OepyError as error:
        yield Finding("host key", "bad", error.what, error.mend)
    except PermissionError:
        yield Finding("host key", "warning", f"{config.key} is not readable for this user", "run as root")
    else:
        yield Finding("host key", "good", f"{describe(key.public)} {fingerprint(key.public)}")


def _certificates(config: Config) -> Iterator[Finding]:
    from oepy.daemon.trust import endings

    if not config.connections.certificates:
        return
    found = endings(config.connections, time.time())
    for ending in found:
        yield Finding("certificate", "bad" if ending.remaining < 0 else "warning", str(ending), ending.mend)
    if not found:
        yield Finding("certificates", "good", "none of the connections' ends soon")


async def _names(config: Config) -> list[Finding]:
    source = key_source(config)
    addresses = sorted(own_addresses(), key=str)
    subjects: list[IpAddress | str] = [config.identity] if config.identity else list(addresses)
    if not subjects:
        return [Finding("addresses", "bad", "this host has no address", "bring the network up")]
    # Each for itself: a good one beside it would hide one that is dead or strips
    alone = [key_source(replace(config, resolvers=(resolver,))) for resolver in config.resolvers]
    answers = await asyncio.gather(*(each.peer_keys(subjects[0]) for each in alone))
    findings = [
        judge_resolver(str(who), answer) for who, answer in zip(config.resolvers, answers, strict=True)
    ]
    return findings + await _own_records(config, source, subjects)


def judge_resolver(resolver: str, answer: KeyAnswer) -> Finding:
    """What the lookup of this host's own name says of the resolver."""
    if isinstance(answer, Unreachable):
        mend = "name another resolver in dns.resolvers"
        if "TLS: " in answer.reason or "pinned" in answer.reason:
            mend = "compare the name or pin behind # in dns.resolvers, and dns.tls_cert_bundle, with the server's"
        return Finding("resolver", "bad", f"{resolver}: {answer.reason}", mend)
    text = f"{resolver} answers; {answer.owner} is {type(answer).__name__.lower()}"
    if not isinstance(answer, Bogus):
        return Finding("DNSSEC", "good", text)
    mend = "the zone is broken, or somebody forges its answers: try `oepy dns lookup NAME TYPE`"
    if answer.stripped:
        mend = (
            "name a resolver that passes DNSSEC records on in dns.resolvers: with this one no key is believed"
        )
    return Finding("DNSSEC", "bad", f"{text} ({answer.reason})", mend)


def judge_relay(relay: tuple[IpAddress, int] | None, asked: Sequence[IpAddress]) -> Iterator[Finding]:
    """`asked`: the resolvers of this host's programs."""
    if relay is None:
        return
    address, port = relay
    if port == DNS_PORT and asked[:1] == (address,):
        yield Finding("relay", "good", f"programs ask {address} first")
    elif port == DNS_PORT:
        text = f"nothing is learned from names: programs ask {', '.join(map(str, asked)) or 'nobody'}"
        yield Finding("relay", "warning", text, f"put `nameserver {address}` first in {RESOLV_CONF}")
    else:
        text = f"it listens at port {port}, where resolv.conf cannot lead"
        yield Finding("relay", "warning", text, f"let your local resolver forward to {address}, port {port}")


async def _own_records(config: Config, source: KeySource, subjects: list[IpAddress | str]) -> list[Finding]:
    try:
        key = HostKey.load(config.key)
    except (OepyError, OSError):
        return []
    own = OwnRecords(source, key.public, time.monotonic, lambda _: None)
    found = []
    for subject in subjects:
        record = await own.get(subject)
        if record.state == "published":
            found.append(Finding("own record", "good", f"{subject} publishes this host's key"))
        elif record.state == "absent":
            text = f"{subject}: {record.reason}"
            mend = "publish the output of `oepy key show`, or stay anonymous (AUTH NULL)"
            found.append(Finding("own record", "warning", text, mend))
        elif record.state == "mismatch":
            mend = "publish `oepy key show`; peers refuse this host until then"
            found.append(Finding("own record", "bad", f"{subject}: {record.reason}", mend))
        else:
            found.append(Finding("own record", "bad", f"{subject}: {record.reason}", "mend the zone"))
    return found


def _guard() -> Iterator[Finding]:
    from oepy.trap.guard import guard_status

    if os.geteuid() != 0 or not Path("/proc/net/netfilter").exists():
        return
    try:
        on = guard_status()
    except OepyError as error:
        yield Finding("guard", "warning", error.what, error.mend)
        return
    if on:
        text = "private and block prefixes are blocked, for no daemon runs"
        yield Finding("guard", "warning", text, "start `oepy run`, or lift it with `oepy guard remove`")
