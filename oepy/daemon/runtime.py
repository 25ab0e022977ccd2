"""The daemon: makes the rooms, wires them, and takes them down again."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import cryptography.hazmat.backends.openssl.backend  # noqa: F401 - else the first handshake loads it (7 ms)

import oepy.ike.duplicates  # noqa: F401 - the same
from oepy import config as configuration
from oepy.config import Config
from oepy.connections.model import ConnectionSet
from oepy.control.server import ControlServer
from oepy.daemon.addresses import own_addresses
from oepy.daemon.api import ControlApi
from oepy.daemon.book import Changes
from oepy.daemon.core import Core, Surroundings, engine_settings
from oepy.daemon.datapaths import NoHostAddresses, open_datapath, userland_confuses, userland_lacks
from oepy.daemon.fetching import Fetching
from oepy.daemon.forecast import validator as configured_validator
from oepy.daemon.journal import Event, Journal
from oepy.daemon.manual import ManualKeying, open_backend
from oepy.daemon.traps import choose_trap, open_trap
from oepy.datapath.routes import TUNNEL_MTU
from oepy.dns.build import make_anchor_keeper, make_key_source
from oepy.dns.relay import Relay
from oepy.dns.validator import Validator
from oepy.engine import messages as engine_messages
from oepy.errors import ConfigError, OepyError, UsageError
from oepy.ike.events import Datagram
from oepy.ike.settings import IkeSettings
from oepy.included import Memory
from oepy.interfaces import ConfiguredRule, TrapPolicy
from oepy.keylog import KeyLog
from oepy.keys import HostKey, fingerprint
from oepy.manual.model import ManualSet
from oepy.model import MARK_OWN, IpAddress, PeerIdentity
from oepy.policy import PolicyTable
from oepy.udp import UdpSocket, open_ike_sockets

STOP_SECONDS = 1.5
OWN_RECORD_SECONDS = 3.0
READS_PER_WAKEUP = 64
GC_THRESHOLD = 20_000
KEEP_BLOCKED_HINT = "lift it with `oepy guard remove`"


_FIXED = (
    *("identity", "key", "resolvers", "tls_cert_bundle", "trust_anchors", "negative_trust_anchors"),
    *("auto_trust_anchors", "sha1"),
    *("datapath", "trap", "device", "socket", "key_log", "relay", "trusted_names"),
)


class _Rules(NamedTuple):
    """For the trap, as last asked for."""

    by_hand: tuple[ConfiguredRule, ...] = ()
    of_connections: tuple[ConfiguredRule, ...] = ()
    all: tuple[ConfiguredRule, ...] = ()


class Daemon(Core):
    """`start`, then `run_until_stopped`, then `stop`."""

    def __init__(
        self,
        config: Config,
        config_path: str | None,
        log: Callable[[Event], None],
        files: Memory | None = None,
    ) -> None:
        self.config = config
        self._config_path = config_path
        self._files = files or Memory()
        self.started = time.monotonic()
        super().__init__(
            PolicyTable(config.rules, config.default_group),
            Journal(time.time, log),
            insecure_keys=config.insecure_keys,
            block=config.after_failed_ike_blocks,
            by_certificate=config.certified_peers,
        )
        self._stop = asyncio.Event()
        self._manual_lock = asyncio.Lock()
        self.reloads = 0
        self.ready = False
        self._lock: IO[str] | None = None
        self._trapping = False
        self._rules = _Rules()
        self._control: ControlServer | None = None
        self._relay: Relay | None = None
        self._fetching = Fetching()

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Raises OepyError with the mend when something is missing; what was made is removed by `stop`."""
        self._take_lock()
        self.host_key = _load_or_make_key(self.config.key, self.journal)
        self.key_log = KeyLog(self.config.key_log) if self.config.key_log else None
        if self.key_log is not None:
            self.journal.add(
                "key-log-on",
                alert=True,
                reason=f"secrets of every tunnel are written to {self.config.key_log}; "
                "remove debug.key_log from the configuration when done",
            )
        self.sockets = open_ike_sockets()
        self.trap_name, self.trap_reason = await asyncio.to_thread(
            choose_trap, self.config.trap, self.config.datapath
        )
        self.chosen = chosen = await asyncio.to_thread(
            open_datapath, self.config, self.sockets, self.on_ike, bare=self.trap_name == "acquire"
        )
        validator = configured_validator(self.config)
        self.wire(
            Surroundings(
                keys=make_key_source(validator, self.config.trusted_names),
                trap=open_trap(self.trap_name),
                datapath=chosen.datapath,
                send=self._send_datagram,
                monotonic=time.monotonic,
                host_key=self.host_key,
                identity=self.config.identity,
                ike_settings=self._ike_settings(),
                key_log=self.key_log,
                host=chosen.host,
                leases=self.config.key.parent / "leases",
                fetch=self._fetching,
            )
        )
        await self.datapath.start(self.on_datapath_event)
        self.manual = ManualKeying(open_backend(chosen.name, self.datapath, time.monotonic))
        self._check_manual(self.config.manual)
        await self.manual.start(self.config.manual)
        read_here = self.sockets.ike if chosen.reads_nat_t else self._all_sockets()
        for sock in read_here:
            asyncio.get_running_loop().add_reader(sock.fileno(), self._ike_readable, sock)
        self._control = ControlServer(ControlApi(self), self.config.socket)
        await self._control.start()
        if self.config.relay is not None:
            bundle = str(self.config.tls_cert_bundle) if self.config.tls_cert_bundle else None
            self._relay = Relay(
                *self.config.relay, self.config.resolvers, MARK_OWN, self.on_name, tls_bundle=bundle
            )
            await self._relay.start()
        self._check_connections(self.connections.book.changes(self.config.connections))
        await self._host_addresses_off()
        self.connections.load(self.config.connections, connection_keys(self.config.connections))
        self.trap.start(self._trap_policy(self.config), self.on_trapped)
        self._trapping = True
        self.journal.add(
            "started",
            datapath=chosen.name,
            mode=chosen.mode,
            reason=chosen.reason,
            key=fingerprint(self.host_key.public),
        )
        self._keep_anchors(validator)
        _collect_seldom()
        self.spawn(self._learn_own_records())
        self.spawn(self.watch_traffic())
        self.spawn(self.connections.whereabouts.watch_names())
        self.spawn(self.connections.watch_certificates())
        self.spawn(self.connections.vips.watch())
        self.spawn(self.connections.paths.watch())

    def relay_view(self) -> dict[str, object] | None:
        """The DNS relay at a glance, None where there is none."""
        if self._relay is None or self.config.relay is None:
            return None
        address, port = self.config.relay
        return {
            "listens": f"{address}@{port}",
            "addresses_known": len(self.names),
            "counts": dict(self._relay.counters),
        }

    def _keep_anchors(self, validator: Validator) -> None:
        """RFC 5011, where it is configured."""
        path = self.config.auto_trust_anchors
        if path is None:
            return

        def report(zone: str, reason: str, alert: bool) -> None:
            self.journal.add("trust-anchors", subject=zone, reason=reason, alert=alert)

        self.spawn(make_anchor_keeper(validator, path, self.config.trust_anchors, report).run())

    def _take_lock(self) -> None:
        path = self.config.socket.with_suffix(".lock")
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = path.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise OepyError(
                f"another oepy holds {path}", "stop it first, or give this one another control.socket"
            ) from None
        self._lock = lock

    def _ike_settings(self) -> IkeSettings:
        return IkeSettings(
            identity=PeerIdentity.parse(self.config.identity) if self.config.identity else None,
            force_encap=self.chosen.encap_only,
            # A capture that somebody wants to read would not be readable: tshark does not know AGGFRAG
            aggregation=self.chosen.aggregates and self.config.key_log is None,
            key_log=self.config.key_log is not None,
        )

    def _trap_policy(self, config: Config) -> TrapPolicy:
        return TrapPolicy(
            rules=config.rules,
            default=config.default_group,
            resolvers=tuple(resolver.address for resolver in config.resolvers),
            tunnel_device=self.chosen.device,
            kernel_ipsec=self.chosen.kernel_ipsec,
            clamp_mtu=TUNNEL_MTU if self.chosen.kernel_ipsec else 0,  # the userland datapath does it itself
            configured=self._configured_rules(),
        )

    def _configured_rules(self) -> tuple[ConfiguredRule, ...]:
        """The same objects for the same rules, as the trap wants them."""
        by_hand, of_connections = self.manual.rules(), self.connections.traffic.rules()
        known = self._rules
        if by_hand != known.by_hand or of_connections is not known.of_connections:
            by_hand = known.by_hand if by_hand == known.by_hand else by_hand
            self._rules = _Rules(by_hand, of_connections, (*by_hand, *of_connections))
        return self._rules.all

    def reload_trap(self) -> None:
        """The rules of connections are others."""
        if not self._trapping:
            return
        try:
            self.trap.reload(self._trap_policy(self.config))
        except OepyError as error:
            self.journal.add("trap-failed", alert=True, reason=str(error))

    def _check_connections(self, changes: Changes) -> None:
        """What this host's datapath and trap cannot do for those that are new. Raises UsageError."""
        problems = []
        fresh = changes.connections.fresh
        children = [(connection.label(child), child) for connection in fresh for child in connection.children]
        if fresh and self.trap_name == "none" and self.chosen.name == "tun":
            problems.append("connections need the trap in userland: remove `trap: none`")
        if self.chosen.name == "tun" and any(child.marks.outward is not None for _, child in children):
            problems += userland_confuses(changes.configured, self.config.device)
        if isinstance(self.chosen.host, NoHostAddresses) and self.chosen.name != "none":
            problems += [
                f"{connection.name}: vips need the tunnel's device, which this datapath has not"
                for connection in fresh
                if connection.vips
            ]
        for label, child in children:
            if child.trap and self.trap_name != "nfqueue":
                problems.append(
                    f"{label}: start_action trap needs the trap nfqueue, and this host has {self.trap_name}"
                )
            if child.by_interface and self.chosen.name != "xfrm":
                problems.append(
                    f"{label}: if_id is the kernel's, and this host has the datapath {self.chosen.name}"
                )
            if self.chosen.name == "tun":
                problems += [f"{label}: {text}" for text in userland_lacks(child)]
        if problems:
            raise UsageError("connections: " + "; ".join(problems[:20]))

    def _check_manual(self, manual: ManualSet) -> None:
        """Raises UsageError."""
        if manual.policies and self.config.trap == "none" and self.chosen.name == "tun":
            raise UsageError("manual policies need the trap in userland", "remove `trap: none`")

    async def change_manual(self, operation: str, entry: object) -> tuple[ManualSet, ManualSet]:
        """One command: what was in effect, and what is now. Raises OepyError; then nothing has changed."""
        async with self._manual_lock:
            before = self.manual.effective
            after = self.manual.after(operation, entry)
            self._check_manual(after)
            await self._take_manual(after)
            self.journal.add("manual-changed", reason=operation)
            return before, after

    async def _take_manual(self, after: ManualSet, configured: ManualSet | None = None) -> None:
        """SAs first: what is marked before it has one would be dropped."""
        before = self.manual.effective
        await self.manual.take(after, configured)
        try:
            self.trap.reload(self._trap_policy(self.config))
        except OepyError:
            await self.manual.take(before)
            raise
        self.feed(engine_messages.Reloaded())  # opportunistic tunnels to these destinations end

    async def _reload_manual(self, config: Config) -> None:
        async with self._manual_lock:
            try:
                after = self.manual.after_reload(config.manual)
                if self.manual.has(after, config.manual):
                    return
                await self._take_manual(after, config.manual)
            except OepyError as error:
                self.journal.add("reload-refused", alert=True, reason=f"{config.source}: manual: {error}")
                return
        self.journal.add("manual-changed", reason=config.source)

    async def _learn_own_records(self) -> None:
        subjects: list[IpAddress | str] = (
            [self.config.identity] if self.config.identity else sorted(own_addresses(), key=str)
        )
        asked = [asyncio.ensure_future(self.own.get(subject)) for subject in subjects]
        if asked:
            await asyncio.wait(asked, timeout=OWN_RECORD_SECONDS)
        self.ready = True
        _notify_systemd("READY=1")

    async def run_until_stopped(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        await self._stop.wait()

    async def stop(self) -> None:
        """Deletes to everyone; then rules, routes and devices go. `private` stays blocked by the guard."""
        _notify_systemd("STOPPING=1")
        await self.unwire(STOP_SECONDS)
        if hasattr(self, "trap"):
            guard = any(rule.group.fails_closed for rule in self.config.rules)
            guard = guard or self.config.default_group.fails_closed
            guard = guard or any(rule.required for rule in self._configured_rules())
            self.trap.stop(guard=guard)
            if guard:
                self.journal.add(
                    "guard", reason=f"private and block prefixes stay blocked; {KEEP_BLOCKED_HINT}"
                )
        await self._host_addresses_off()
        if hasattr(self, "datapath"):
            try:
                # The guard of the kernel's own trap knows nothing of manual policies
                await self.manual.stop(keep_shut=self.trap_name == "acquire")
            except OepyError as error:
                self.journal.add("manual-left", alert=True, reason=str(error))
            await self.datapath.stop()
        if hasattr(self, "sockets"):
            for sock in self._all_sockets():
                asyncio.get_running_loop().remove_reader(sock.fileno())
            self.sockets.close()
        if self._relay is not None:
            await self._relay.stop()
        await self._fetching.close()
        if self._control is not None:
            await self._control.stop()
        if self._lock is not None:
            self._lock.close()
            self.config.socket.with_suffix(".lock").unlink(missing_ok=True)

    async def _host_addresses_off(self) -> None:
        """What peers gave us, of this run or of one that crashed."""
        try:
            if hasattr(self, "chosen"):
                await self.chosen.host.apply((), {})
        except OepyError as error:
            self.journal.add("address-failed", alert=True, reason=str(error))

    def reload(self) -> list[str]:
        """SIGHUP, and `connection load`. A configuration with mistakes changes nothing; returns the mistakes."""
        try:
            config = configuration.load(self._config_path, self._files)
            self._check_reload(config)
            self._check_manual(config.manual)
            host_key = HostKey.load(config.key)
            self.manual.after_reload(config.manual)
            changes = self.connections.book.changes(config.connections)
            self._check_connections(changes)
            keys = connection_keys(config.connections)
        except ConfigError as error:
            return self._refuse_reload([f"{error.source}: {problem}" for problem in error.problems])
        except OepyError as error:
            return self._refuse_reload([f"{self.config.source}: {error}"])
        try:
            # First: what the kernel refuses must not be what the engine goes by
            self.trap.reload(self._trap_policy(config))
        except OepyError as error:
            return self._refuse_reload([str(error)])
        self.config = config
        self._use_key(host_key)
        self.policy = PolicyTable(config.rules, config.default_group)
        self.engine.settings = engine_settings(
            *(self.policy, config.insecure_keys, config.after_failed_ike_blocks),
            *(self.settled_elsewhere, self.is_own, config.certified_peers),
        )
        self.connections.apply(changes, keys)
        self.feed(engine_messages.Reloaded())
        self.spawn(self._reload_manual(config))
        self.reloads += 1
        self.journal.add("reloaded", reason=config.source)
        return []

    def _refuse_reload(self, problems: list[str]) -> list[str]:
        for problem in problems:
            self.journal.add("reload-refused", alert=True, reason=problem)
        return problems

    def _use_key(self, host_key: HostKey) -> None:
        """Another key in the same file: a roll-over."""
        if host_key.public == self.host_key.public:
            return
        self.host_key = host_key
        self.negotiator.use_key(host_key)
        self.own.use_key(host_key.public)
        self.bystanders.use_key(host_key.public)
        self.journal.add("host-key-changed", reason=fingerprint(host_key.public))

    def _check_reload(self, config: Config) -> None:
        """What a running daemon cannot change."""
        changed = [name for name in _FIXED if getattr(config, name) != getattr(self.config, name)]
        if changed:
            problems = [f"{name} changed: restart the daemon for it" for name in changed]
            raise ConfigError(config.source, problems)

    def _all_sockets(self) -> tuple[UdpSocket, ...]:
        return (*self.sockets.ike, *self.sockets.nat_t)

    def _ike_readable(self, sock: UdpSocket) -> None:
        for _ in range(READS_PER_WAKEUP):
            datagram = self.sockets.receive(sock)
            if datagram is None:
                return
            self.on_ike(datagram.data, datagram.local, datagram.remote)

    def _send_datagram(self, datagram: Datagram) -> None:
        if datagram.keepalive:
            self.sockets.keepalive(datagram.local, datagram.remote)
        else:
            self.sockets.send(datagram.data, datagram.local, datagram.remote)


def _collect_seldom() -> None:
    """What is there at the start stays, and handshakes make no cycles: to look for garbage after every 700 objects,
    among thousands of sessions, costs some percent of all work."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)


def connection_keys(wanted: ConnectionSet) -> dict[str, HostKey]:
    """The private keys that local sides name, by file. Raises OepyError."""
    names = {connection.local.key for connection in wanted.connections if connection.local.key}
    return {name: HostKey.load(name) for name in sorted(names)}


def _load_or_make_key(path: Path, journal: Journal) -> HostKey:
    if path.exists():
        return HostKey.load(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = HostKey.generate("ed25519")
    key.save(path)
    journal.add("key-made", reason=f"a new host key in {path}; publish it with `oepy key show`")
    return key


def _notify_systemd(state: str) -> None:
    """sd_notify(3): one datagram to the socket that systemd names, if it does."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name:
        return
    address = "\0" + name[1:] if name.startswith("@") else name
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), address)


def _log_line(event: Event, verbose: bool) -> None:
    if not (verbose or event.get("alert") or event["event"] in ("started", "stopping", "guard", "key-made")):
        return
    fields = " ".join(f"{k}={v}" for k, v in event.items() if k not in ("number", "time", "event", "alert"))
    print(
        f"oepy: {'ALERT ' if event.get('alert') else ''}{event['event']} {fields}",
        file=sys.stderr,
        flush=True,
    )


def run_daemon(config: Config, config_path: str | None, files: Memory, verbose: bool) -> None:
    """`oepy run` until a signal. `files`: with what `config` was read. Raises OepyError when it cannot start;
    everything made is removed then."""

    async def main() -> None:
        daemon = Daemon(config, config_path, lambda event: _log_line(event, verbose), files)
        try:
            await daemon.start()
            await daemon.run_until_stopped()
        finally:
            await daemon.stop()

    asyncio.run(main())
