"""Handshakes of IKEv2 (IKE_SA_INIT, IKE_AUTH with a child SA): how many a second, how long each takes, and what the
initiator and the responder spend on it.

    [initiator: 198.19.0.0/16 on lo] ─ eth0, 198.18.0.0/24 ─ [oepy: the daemon, `datapath: none`]
                                     └ eth1, 198.18.1.0/24 ─ [charon: children by kernel-libipsec]

One initiator, the IKE room of oepy on sockets, plays many peers. It works off blocks of handshakes against both
responders in turns; what came up is deleted between the blocks, and not counted.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oepy.bench import ike_floor
from oepy.bench.ike_initiator import (
    ESP_PROPOSAL,
    INITIATOR,
    INNER_NETWORK,
    OUTER_NETWORK,
    RESPONDER,
    Block,
    Setup,
)
from oepy.bench.processes import await_daemon, cpu_seconds, resident_bytes
from oepy.control.client import ControlClient
from oepy.errors import OepyError
from oepy.keys import HostKey, public_pem
from oepy.lab import charon
from oepy.lab.namespaces import Lab, Namespace

KEY_KINDS = {"psk": "", "ed25519": "ed25519", "p256": "ecdsa-p256", "rsa-3072": "rsa-3072"}
AT_ONCE = (1, 10, 100)
FEW, MANY = 10, 5_000
WARM_UP = 20
MEMORY_GOAL = 20_000  # bytes of an established IKE SA with its child
_SYSTEMS = {"oepy": "198.18.0.2", "charon": "198.18.1.2"}
_PROPOSAL = "aes256gcm16-prfsha256-x25519"
_KEM = "-ke1_mlkem768"
_MEMORY_AUTH = "ed25519"

_CHARON = charon.Options(
    # OpenSSL for all that it can: the fastest that charon has
    "random nonce openssl kdf pem pkcs1 pkcs8 pubkey vici kernel-libipsec kernel-netlink socket-default",
    "  dos_protection = no\n  install_routes = no",
    "    kernel-libipsec { load = 20 }",
    logs=False,
)
_SWANCTL = """
connections {{
  bench {{
    version = 2
    local_addrs = {address}
    remote_addrs = {outer}
    proposals = {proposal}
    encap = yes
    unique = never
    local {{ auth = {auth}
      id = {own_id}
      {own} }}
    remote {{ auth = {auth}
      id = {peer_id}
      {peer} }}
    children {{ net {{
      local_ts = {address}/32
      remote_ts = {inner}
      esp_proposals = {esp} }} }}
  }}
}}
secrets {{ ike-bench {{ secret = {secret} }} }}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """Times in seconds; CPU of each side in seconds a handshake, medians of the rounds."""

    auth: str
    kem: bool
    at_once: int
    responder: str
    rate: float
    p50: float
    p99: float
    initiator_cpu: float
    responder_cpu: float
    retransmits: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of an established IKE SA with its child at the responder: `resident` by proc(5), or, for oepy alone,
    `traced` by tracemalloc."""

    responder: str
    sas: int
    resident: float | None
    traced: float | None


@dataclass(frozen=True, slots=True)
class Result:
    rows: tuple[Row, ...]
    floors: tuple[ike_floor.Floor, ...]
    memory: tuple[Memory, ...]
    missing: str  # what of charon is not installed

    def floor(self, row: Row) -> ike_floor.Floor:
        return next(floor for floor in self.floors if (floor.auth, floor.kem) == (row.auth, row.kem))

    def by_charon(self, row: Row) -> float | None:
        """oepy's CPU as responder by charon's; None for charon's own row, and where there is none beside it."""
        same = [
            other.responder_cpu
            for other in self.rows
            if other.responder == "charon"
            and (other.auth, other.kem, other.at_once) == (row.auth, row.kem, row.at_once)
        ]
        return row.responder_cpu / same[0] if same and row.responder != "charon" else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "floor": [asdict(floor) for floor in self.floors],
            "memory": [asdict(row) for row in self.memory],
            "missing": self.missing,
        }


def run(
    auths: Sequence[str],
    kems: Sequence[bool],
    at_once: Sequence[int],
    handshakes: int,
    rounds: int,
    memory_sas: int,
    on_progress: Callable[[int, int], None],
) -> Result:
    """`handshakes` in each of so many `rounds`; `memory_sas` 0: memory is not measured. Raises OepyError."""
    missing = charon.is_missing()
    total = len(auths) * len(kems) * (len(at_once) * rounds + 1) + (3 if memory_sas else 0)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    rows: list[Row] = []
    floors: list[ike_floor.Floor] = []
    memory: list[Memory] = []
    with Lab() as lab, tempfile.TemporaryDirectory() as directory:
        ground = _Ground(lab, Path(directory), with_charon=not missing)
        for auth in auths:
            key = HostKey.generate(KEY_KINDS[auth]) if KEY_KINDS[auth] else None
            for kem in kems:
                floors.append(ike_floor.measure(auth, kem, key))
                step()
                rows += _measure(ground, auth, kem, at_once, handshakes, rounds, step)
        if memory_sas:
            memory = _memory(ground, memory_sas, step)
    return Result(tuple(rows), tuple(floors), tuple(memory), missing)


class _Ground:
    """The namespaces, and what runs in them for one way to authenticate."""

    def __init__(self, lab: Lab, directory: Path, *, with_charon: bool) -> None:
        self.systems = tuple(name for name in _SYSTEMS if name == "oepy" or with_charon)
        self._directory = directory
        self._count = 0
        self._initiator = lab.namespace("initiator")
        self._initiator.address("lo", OUTER_NETWORK)  # all of the network is local then
        self._namespaces: dict[str, Namespace] = {}
        for number, name in enumerate(self.systems):
            namespace = self._namespaces[name] = lab.namespace(name)
            lab.veth(self._initiator, namespace, f"eth{number}", "eth0")
            self._initiator.address(f"eth{number}", f"198.18.{number}.1/24")
            namespace.address("eth0", f"{_SYSTEMS[name]}/24")
            namespace.ip("route", "add", OUTER_NETWORK, "via", f"198.18.{number}.1")

    @contextlib.contextmanager
    def running(self, auth: str, kem: bool, *, trace: bool = False) -> Iterator[_Running]:
        """charon has no ML-KEM before 6.0, so it takes no part in it."""
        self._count += 1
        place = self._directory / str(self._count)
        place.mkdir()
        kind = KEY_KINDS[auth]
        keys = {name: HostKey.generate(kind) if kind else None for name in ("initiator", "responder")}
        secret = secrets.token_hex(16)
        proposal = _PROPOSAL + (_KEM if kem else "")
        ours, theirs = keys["initiator"], keys["responder"]
        with contextlib.ExitStack() as stack:
            processes = {}
            for name in self.systems:
                if name == "charon":
                    if kem:
                        continue
                    daemon = charon.charon(self._namespaces[name].name, place / name, _CHARON)
                    process = stack.enter_context(daemon)
                    process.load(*_charon_configuration(theirs, ours, secret))
                    processes[name] = process.pid
                else:
                    daemon_process = _start_oepy(
                        self._namespaces[name], place / name, proposal, theirs, ours, secret, trace=trace
                    )
                    stack.callback(_end, daemon_process)
                    processes[name] = daemon_process.pid
                    if trace:
                        traced = daemon_process
            setup = Setup(
                proposal,
                secret,
                ours.to_pem().decode() if ours else "",
                public_pem(theirs.public) if theirs else "",
            )
            initiator = self._initiator.popen(
                *[sys.executable, "-m", "oepy.bench.ike_initiator"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.callback(_end, initiator)
            yield _Running(initiator, setup, processes, traced if trace else None)


class _Running:
    """The initiator's and the responders' processes."""

    def __init__(
        self,
        initiator: subprocess.Popen[str],
        setup: Setup,
        responders: dict[str, int],
        traced: subprocess.Popen[str] | None,
    ) -> None:
        self._initiator = initiator
        self._traced = traced
        self.responders = responders
        self._write(setup.line())

    def _write(self, line: str) -> None:
        assert self._initiator.stdin is not None
        self._initiator.stdin.write(line + "\n")
        self._initiator.stdin.flush()

    def _ask(self, **job: object) -> dict[str, Any]:
        self._write(json.dumps(job))
        assert self._initiator.stdout is not None
        line = self._initiator.stdout.readline()
        if not line:
            raise OepyError("the initiator of the benchmark ended", "its messages are above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise OepyError(f"bench ike: {answer['error']}")
        return answer

    def handshakes(self, system: str, count: int, at_once: int) -> tuple[Block, float]:
        """The block, and the responder's CPU time for it."""
        before = cpu_seconds(self.responders[system])
        answer = self._ask(run=count, at_once=at_once, responder=_SYSTEMS[system])
        return Block(**answer), cpu_seconds(self.responders[system]) - before

    def clear(self) -> None:
        self._ask(clear=True)

    def traced_bytes(self) -> int:
        assert self._traced is not None
        assert self._traced.stdout is not None
        self._traced.send_signal(signal.SIGUSR1)
        return int(self._traced.stdout.readline())


def _end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait(60)


def _measure(
    ground: _Ground,
    auth: str,
    kem: bool,
    at_once: Sequence[int],
    handshakes: int,
    rounds: int,
    step: Callable[[], None],
) -> list[Row]:
    rows = []
    with ground.running(auth, kem) as running:
        for system in running.responders:
            running.handshakes(system, WARM_UP, WARM_UP)
        running.clear()
        for number in at_once:
            found: dict[str, list[tuple[Block, float]]] = {system: [] for system in running.responders}
            for _ in range(rounds):
                for system, blocks in found.items():
                    blocks.append(running.handshakes(system, handshakes, number))
                    running.clear()
                step()
            rows += [_row(auth, kem, number, system, blocks) for system, blocks in found.items()]
    return rows


def _row(auth: str, kem: bool, at_once: int, system: str, blocks: list[tuple[Block, float]]) -> Row:
    times = sorted(seconds for block, _ in blocks for seconds in block.times)
    return Row(
        auth,
        kem,
        at_once,
        system,
        rate=statistics.median(len(block.times) / block.wall for block, _ in blocks),
        p50=times[len(times) // 2],
        p99=times[min(len(times) * 99 // 100, len(times) - 1)],
        initiator_cpu=statistics.median(block.cpu / len(block.times) for block, _ in blocks),
        responder_cpu=statistics.median(cpu / len(block.times) for block, cpu in blocks),
        retransmits=sum(block.retransmits for block, _ in blocks),
    )


def _memory(ground: _Ground, many: int, step: Callable[[], None]) -> list[Memory]:
    """What the first handshakes load and cache is there before the counting begins."""
    found = []
    with ground.running(_MEMORY_AUTH, False) as running:
        for system, pid in running.responders.items():
            running.handshakes(system, WARM_UP, 1)
            running.clear()
            before = resident_bytes(pid)
            running.handshakes(system, many, 10)
            found.append(Memory(system, many, (resident_bytes(pid) - before) / many, None))
            if system != "charon":  # the last one, and to delete thousands takes kernel-libipsec minutes
                running.clear()
            step()
    with ground.running(_MEMORY_AUTH, False, trace=True) as running:
        running.handshakes("oepy", WARM_UP, 1)
        running.clear()
        running.handshakes("oepy", WARM_UP, 1)
        running.clear()
        before = running.traced_bytes()
        there = 0
        for wanted in (FEW, many):
            running.handshakes("oepy", wanted - there, 1)
            there = wanted
            found.append(Memory("oepy", wanted, None, (running.traced_bytes() - before) / wanted))
        step()
    return found


# ---- configurations ----------------------------------------------------------------------------------------


def _charon_configuration(
    own: HostKey | None, peer: HostKey | None, secret: str
) -> tuple[str, dict[str, bytes]]:
    files = {}
    if own is not None and peer is not None:
        files = {
            "private/own.pem": own.to_pem(),
            "pubkey/own.pem": public_pem(own.public).encode(),
            "pubkey/peer.pem": public_pem(peer.public).encode(),
        }
    text = _SWANCTL.format(
        address=_SYSTEMS["charon"],
        outer=OUTER_NETWORK,
        inner=INNER_NETWORK,
        proposal=_PROPOSAL,
        esp=ESP_PROPOSAL,
        peer_id=INITIATOR,
        own_id=RESPONDER,
        auth="pubkey" if own else "psk",
        own="pubkeys = own.pem" if own else "",
        peer="pubkeys = peer.pem" if own else "",
        secret=secret,
    )
    return text, files


def _start_oepy(
    namespace: Namespace,
    place: Path,
    proposal: str,
    own: HostKey | None,
    peer: HostKey | None,
    secret: str,
    *,
    trace: bool,
) -> subprocess.Popen[str]:
    place.mkdir()
    auth = "pubkey" if own else "psk"
    local: dict[str, object] = {"auth": auth, "id": RESPONDER}
    remote: dict[str, object] = {"auth": auth, "id": INITIATOR}
    if own is not None and peer is not None:
        own.save(place / "own.key")
        (place / "peer.pem").write_text(public_pem(peer.public))
        local["key"], remote["pubkeys"] = str(place / "own.key"), [str(place / "peer.pem")]
    (place / "psk").touch(mode=0o600)
    (place / "psk").write_text(secret)
    address = _SYSTEMS["oepy"]
    child = {
        "local_ts": [f"{address}/32"],
        "remote_ts": [INNER_NETWORK],
        "esp_proposals": [ESP_PROPOSAL],
    }
    configuration = {
        "identity": {"key": str(place / "host.key")},
        "dns": {"resolvers": [address]},
        "control": {"socket": str(place / "oepy.sock")},
        "datapath": "none",
        "trap": "none",
        "policy": {"default": "clear"},
        "secrets": [{"type": "ike", "secret_file": str(place / "psk")}],
        "connections": {
            "bench": {
                "local_addrs": [address],
                "remote_addrs": [OUTER_NETWORK],
                "proposals": [proposal],
                "encap": True,
                "dpd_delay": 0,
                "local": local,
                "remote": remote,
                "children": {"net": child},
            }
        },
    }
    path = place / "oepy.yaml"
    path.write_text(json.dumps(configuration))  # JSON is YAML
    with (place / "log").open("wb") as log:
        process = namespace.popen(
            *[sys.executable, "-m", "oepy.bench.ike_responder", str(path), *(["--trace"] if trace else [])],
            stdout=subprocess.PIPE if trace else log,
            stderr=log,
        )
    try:
        await_daemon(ControlClient(place / "oepy.sock"), process, place / "log")
    except OepyError:
        _end(process)
        raise
    return process
