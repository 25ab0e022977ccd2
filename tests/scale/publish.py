"""A large inventory published to a real BIND by updates, killed half-way and resumed.

    python -m tests.scale.publish --hosts 1000000 [--signed]

Prints one JSON object, and exits with 1 where anything is missing, surplus, or changed that was not oepy's. Needs
root (a network namespace of its own) and BIND. The reverse zones hold PTR records before, and at some names records
that oepy did not make.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import dns.message
import dns.name
import dns.query
import dns.rdatatype

from oepy.lab.nameserver import in_namespace

SERVER = "127.0.0.1"
FIRST = int(IPv4Address("10.0.0.0"))
ZONE_HOSTS = 65_536
TTL = 3600
FOREIGN_EVERY = 1000  # each so many-th name also has records of others
START_SECONDS = 300.0
SIGNING_SECONDS = 300.0
CLASSES = {"IPSECKEY": 45, "TXT": 16, "PTR": 12}


def zone_of(number: int) -> str:
    return f"{number // ZONE_HOSTS}.10.in-addr.arpa"


def label(number: int) -> str:
    return f"{number & 0xFF}.{number >> 8 & 0xFF}"


def key_of(number: int) -> bytes:
    """An Ed25519-like key: any 32 bytes will do, each host has others."""
    return hashlib.sha256(b"host %d" % number).digest()


class Primary:
    """A BIND in a namespace of its own, with one TSIG key that may change key records."""

    def __init__(self, directory: Path, hosts: int, *, signed: bool) -> None:
        self.directory, self.hosts, self.signed = directory, hosts, signed
        self.namespace = f"oescale-{os.getpid()}-{secrets.token_hex(3)}"
        self.tsig = directory / "tsig.key"
        self.zones = sorted(
            {zone_of(number) for number in range(0, hosts, ZONE_HOSTS)}, key=lambda z: int(z.split(".")[0])
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        subprocess.run(["ip", "netns", "add", self.namespace], check=True)
        process = None
        try:
            subprocess.run(["ip", "-n", self.namespace, "link", "set", "lo", "up"], check=True)
            self._write()
            named = self.directory / "named"
            shutil.copy2(shutil.which("named", path="/usr/sbin:/usr/local/sbin") or "named", named)
            command = ["ip", "netns", "exec", self.namespace, str(named), "-f", "-n", "1"]
            process = subprocess.Popen([*command, "-c", str(self.directory / "named.conf")])
            self._await(process)
            yield
        finally:
            if process is not None:
                process.terminate()
                process.wait(60)
            subprocess.run(["ip", "netns", "del", self.namespace], check=True)

    def _write(self) -> None:
        secret = base64.b64encode(os.urandom(32)).decode()
        self.tsig.write_text(f'key "oepy-update" {{ algorithm hmac-sha256; secret "{secret}"; }};\n')
        self.tsig.chmod(0o600)
        signing = "dnssec-policy default; inline-signing no; " if self.signed else ""
        stanzas = []
        for zone in self.zones:
            self._write_zone(zone)
            stanzas.append(
                f'zone "{zone}" {{ type primary; file "db.{zone}"; {signing}'
                "update-policy { grant oepy-update. zonesub IPSECKEY TXT; }; };"
            )
        (self.directory / "named.conf").write_text(
            f'options {{ directory "{self.directory}"; pid-file none; session-keyfile none;\n'
            f"  listen-on {{ {SERVER}; }}; listen-on-v6 {{ none; }}; recursion no; notify no;\n"
            "  empty-zones-enable no; };\n"
            "controls { };\nlogging { category default { null; }; category update { null; }; };\n"
            f'include "{self.tsig}";\n' + "\n".join(stanzas) + "\n"
        )

    def _write_zone(self, zone: str) -> None:
        first = int(zone.split(".", maxsplit=1)[0]) * ZONE_HOSTS
        with (self.directory / f"db.{zone}").open("w") as stream:
            stream.write(
                f"$ORIGIN {zone}.\n$TTL {TTL}\n@ SOA ns.example. root.example. 1 3600 600 86400 300\n"
            )
            stream.write("@ NS ns.example.\n")
            for number in range(first, min(first + ZONE_HOSTS, self.hosts)):
                stream.write(f"{label(number)} PTR h{number}.fleet.example.\n")
                if number % FOREIGN_EVERY == 7:
                    stream.write(f'{label(number)} TXT "left alone"\n')

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        for zone in self.zones:
            while not self.has(dns.name.from_text(zone), "SOA"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("named did not start")
                time.sleep(0.2)

    def has(self, owner: dns.name.Name, kind: str) -> bool:
        def ask() -> bool:
            with contextlib.suppress(OSError, EOFError, dns.exception.DNSException):
                reply = dns.query.udp(dns.message.make_query(owner, kind, flags=0), SERVER, timeout=2)
                return any(rrset.rdtype == dns.rdatatype.from_text(kind) for rrset in reply.answer)
            return False

        return in_namespace(self.namespace, ask)

    def content(self) -> dict[str, dict[str, set[str]]]:
        """Owners of each type, with a digest of their data, by transfer."""
        found: dict[str, dict[str, set[str]]] = {}
        for zone in self.zones:
            command = ["ip", "netns", "exec", self.namespace, "dig", "+noall", "+answer", "+onesoa"]
            command += [f"@{SERVER}", zone, "AXFR"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    words = line.split(None, 4)
                    if len(words) == 5 and words[3] in CLASSES:
                        at = found.setdefault(words[3], {}).setdefault(words[0], set())
                        at.add(f"{words[1]} {''.join(words[4].split())}")
        return found

    def oepy(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, sys.executable, "-m", "oepy", "dns", *words]


def write_inventory(path: Path, hosts: int, zones: list[str]) -> None:
    with path.open("w") as stream:
        stream.write("name,addresses,keys,zones,ttl\n")
        for number in range(hosts):
            key = base64.b64encode(key_of(number)).decode()
            more = f",{' '.join(zones)},{TTL}" if number == 0 else ",,"
            stream.write(f"h{number}.fleet.example,{IPv4Address(FIRST + number)},4 {key}{more}\n")


def wrong_in(before: dict[str, Any], after: dict[str, Any], hosts: int) -> list[str]:
    problems = []
    for kind in ("PTR", "TXT"):
        if before.get(kind) != after.get(kind):
            problems.append(f"{kind} records changed")
    keys = after.get("IPSECKEY", {})
    if len(keys) != hosts:
        problems.append(f"{len(keys)} names have keys, not {hosts}")
    for number in range(hosts):
        key = base64.b64encode(key_of(number)).decode()
        wanted = {f"{TTL} 1014{IPv4Address(FIRST + number)}{key}"}  # 10 1 4: precedence, IPv4, EdDSA
        if keys.get(f"{label(number)}.{zone_of(number)}.") != wanted:
            problems.append(f"h{number} has {keys.get(f'{label(number)}.{zone_of(number)}.')}, not {wanted}")
            break
    return problems


def run(hosts: int, directory: Path, *, signed: bool) -> dict[str, Any]:
    primary = Primary(directory, hosts, signed=signed)
    inventory = directory / "fleet.csv"
    write_inventory(inventory, hosts, primary.zones)
    words = ["publish", str(inventory), "--tsig-file", str(primary.tsig), "--server", SERVER, "--json"]
    result: dict[str, Any] = {"hosts": hosts, "zones": len(primary.zones), "signed": signed}
    with primary.running():
        before = primary.content()
        half = dns.name.from_text(f"{label(hosts // 2)}.{zone_of(hosts // 2)}")
        begun = time.monotonic()
        first = subprocess.Popen(primary.oepy(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while first.poll() is None and not primary.has(half, "IPSECKEY"):
            time.sleep(0.5)
        first.send_signal(signal.SIGKILL)
        result["killed"] = first.wait() == -signal.SIGKILL
        result["first_seconds"] = round(time.monotonic() - begun, 1)
        begun, cpu = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        second = subprocess.run(primary.oepy(*words), capture_output=True, text=True, check=False)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        result["resumed_seconds"] = round(time.monotonic() - begun, 1)
        result["resumed_cpu"] = round(used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime, 1)
        result["peak_bytes"] = used.ru_maxrss * 1024
        if second.returncode:
            result["problems"] = [f"publish ends with {second.returncode}: {second.stderr[-500:]}"]
            return result
        told = json.loads(second.stdout)
        result["resumed"] = {name: told[name] for name in ("names", "unchanged", "changed", "batches")}
        problems = wrong_in(before, primary.content(), hosts)
        deadline = time.monotonic() + SIGNING_SECONDS
        while (
            problems and signed and time.monotonic() < deadline
        ):  # a signed zone shows updates when they are signed
            time.sleep(5)
            problems = wrong_in(before, primary.content(), hosts)
        result["problems"] = problems
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=1_000_000)
    parser.add_argument("--signed", action="store_true", help="BIND signs the zones (dnssec-policy default)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = run(arguments.hosts, Path(directory), signed=arguments.signed)
    print(json.dumps(result, indent=2))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
