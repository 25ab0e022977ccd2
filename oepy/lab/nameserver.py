"""The lab's DNS: a signed tree of its own, from the root down, on a real BIND in a network namespace.

The hosts and zones stand in `zones/lab.yaml`, the server's configuration around them in
`zones/named.conf.in`. Keys of zones are made before the start, so that each parent holds its child's DS from
the beginning; signing is left to BIND's dnssec-policy. Two zones are unsigned (a proven insecure delegation),
two have a DS of some other key (bogus), and the IPv6 tree proves absence by NSEC3, the rest by NSEC.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import dns.dnssec
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdata
import dns.rdatatype
import dns.rdtypes.ANY.DNSKEY
import yaml

from oepy.dns.inventory import Inventory
from oepy.dns.tsig import parse_tsig
from oepy.dns.zonefile import file_name, generate
from oepy.errors import OepyError
from oepy.keys import encode
from oepy.lab.namespaces import join_namespace
from oepy.model import PublicKey

T = TypeVar("T")

RESOLVER_IPV4 = IPv4Address("198.18.0.53")
RESOLVER_IPV6 = IPv6Address("2001:2::53")
UNSIGNED_ZONES = frozenset({"1.18.198.in-addr.arpa.", "1.0.0.0.0.0.0.0.2.0.0.0.1.0.0.2.ip6.arpa."})
BROKEN_ZONES = frozenset({"2.18.198.in-addr.arpa.", "2.0.0.0.0.0.0.0.2.0.0.0.1.0.0.2.ip6.arpa."})
NSEC3_ZONES = frozenset(
    {"0.0.0.0.2.0.0.0.1.0.0.2.ip6.arpa.", "2.0.0.0.0.0.0.0.2.0.0.0.1.0.0.2.ip6.arpa.", "example."}
)
_INSTALLED_ZONES = Path(__file__).resolve().parent / "zones"
_ZONES_DIRECTORY = (
    _INSTALLED_ZONES if _INSTALLED_ZONES.is_dir() else Path(__file__).resolve().parents[2] / "zones"
)
_START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ExtraHost:
    """A host beyond those of `zones/lab.yaml`; its addresses should lie in 198.18.0.0/15 and 2001:2::/48."""

    name: str
    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    key: PublicKey | None


class LabDns:
    """One name server with the whole tree. Use as a context manager, or `start` and `stop`.

    `keys` gives the published key by the host's first label ("alpha"); a host without one gets no key record.
    `gateway` is that of the key records: "self" or, as libreswan wants it, "none".
    `update_key` is a TSIG key in BIND's form that may change key records in every signed zone.
    `resource_records` are lines of master-file form by zone, added as they are (tests want odd ones).
    """

    def __init__(
        self,
        directory: Path,
        namespace: str,
        keys: Mapping[str, PublicKey],
        *,
        extra_hosts: Sequence[ExtraHost] = (),
        resource_records: Mapping[str, Sequence[str]] | None = None,
        gateway: str = "self",
        update_key: str = "",
        zones_directory: Path = _ZONES_DIRECTORY,
    ) -> None:
        self.directory = directory.resolve()
        self.namespace = namespace
        self.trust_anchor = self.directory / "anchor.key"
        self.log = self.directory / "named.log"
        self._keys = keys
        self._extra_hosts = extra_hosts
        self._resource_records = resource_records or {}
        self._gateway = gateway
        self._update_key = update_key
        self._templates = zones_directory
        self._process: subprocess.Popen[bytes] | None = None
        self._inventory: Inventory | None = None

    def __enter__(self) -> LabDns:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, seconds: float = _START_SECONDS) -> None:
        """Build the tree, start named, and return when every zone is signed and the resolver answers.

        The namespace must have `lo` up and the two resolver addresses. Raises OepyError with the end of
        named's log where it is not ready in time.
        """
        self.build()
        named = self._copy_of_named()
        command = ["ip", "netns", "exec", self.namespace, str(named)]
        command += ["-f", "-n", "1", "-c", str(self.directory / "named.conf")]
        with (self.directory / "named.err").open("wb") as errors:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        try:
            in_namespace(self.namespace, lambda: self._wait_ready(time.monotonic() + seconds))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End named (by its process id) and wait for it. Harmless when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)

    # ---- files -------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Write inventory, zones, keys, trust anchor and configuration; starts nothing."""
        (self.directory / "keys").mkdir(parents=True, exist_ok=True)
        shutil.copy(self._templates / "policies.conf", self.directory / "policies.conf")
        inventory = self._inventory = self._write_inventory()
        generate(inventory, self.directory, serial=1)
        apex_keys = {zone: self._zone_key(zone) for zone in inventory.zones if self._is_signed(zone)}
        for zone, key in apex_keys.items():
            self._publish_ds(inventory.zones, zone, key)
        for zone_text, lines in self._resource_records.items():
            self._append(dns.name.from_text(zone_text), lines)
        root_key = apex_keys[dns.name.root]
        self.trust_anchor.write_text(f". 300 IN DNSKEY {root_key}\n")
        hints = f". 3600 IN NS ns.oe.example.\nns.oe.example. 3600 IN A {RESOLVER_IPV4}\n"
        (self.directory / "root.hints").write_text(hints)
        self._write_configuration(inventory.zones, root_key)

    @staticmethod
    def _is_signed(zone: dns.name.Name) -> bool:
        return str(zone) not in UNSIGNED_ZONES

    def _write_inventory(self) -> Inventory:
        try:
            document = yaml.safe_load((self._templates / "lab.yaml").read_text())
        except FileNotFoundError:
            raise OepyError(
                f"{self._templates / 'lab.yaml'} does not exist", "run the lab from a clone of the repository"
            ) from None
        for host in document["hosts"]:
            key = self._keys.get(host["name"].partition(".")[0])
            if key is not None:
                host["keys"] = [f"{int(key.algorithm)} {encode(key)}"]
                host["gateway"] = self._gateway
        extra = [_inventory_entry(host) for host in self._extra_hosts]
        document["hosts"] += [
            {**entry, "gateway": self._gateway} if "keys" in entry else entry for entry in extra
        ]
        path = self.directory / "inventory.yaml"
        path.write_text(yaml.dump(document, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
        return Inventory(path)

    def _zone_key(self, zone: dns.name.Name) -> dns.rdtypes.ANY.DNSKEY.DNSKEY:
        """The zone's one key. It comes from the policy that signs the zone: any other would be replaced."""
        command = ["dnssec-keygen", "-q", "-K", str(self.directory / "keys"), "-k", _policy(zone)]
        command += ["-l", str(self.directory / "policies.conf"), str(zone)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise OepyError(f"dnssec-keygen failed for {zone}: {result.stderr.strip()}")
        path = self.directory / "keys" / f"{result.stdout.strip()}.key"
        line = next(text for text in path.read_text().splitlines() if not text.startswith(";"))
        rdata = dns.rdata.from_text("IN", "DNSKEY", line.split("DNSKEY", 1)[1])
        assert isinstance(rdata, dns.rdtypes.ANY.DNSKEY.DNSKEY)
        return rdata

    def _publish_ds(
        self, zones: Sequence[dns.name.Name], zone: dns.name.Name, key: dns.rdtypes.ANY.DNSKEY.DNSKEY
    ) -> None:
        if zone == dns.name.root:
            return
        digest = dns.dnssec.make_ds(zone, key, "SHA256")
        if str(zone) in BROKEN_ZONES:
            wrong = bytes(byte ^ 0xFF for byte in digest.digest)
            parent_line = f"{digest.key_tag} {digest.algorithm} {digest.digest_type} {wrong.hex()}"
        else:
            parent_line = str(digest)
        candidates = (other for other in zones if other != zone and zone.is_subdomain(other))
        parent = max(candidates, key=lambda other: len(other.labels))
        self._append(parent, [f"{zone} IN DS {parent_line}"])

    def _append(self, zone: dns.name.Name, lines: Sequence[str]) -> None:
        with (self.directory / file_name(zone)).open("a", encoding="ascii") as stream:
            stream.writelines(line + "\n" for line in lines)

    def _write_configuration(
        self, zones: Sequence[dns.name.Name], root_key: dns.rdtypes.ANY.DNSKEY.DNSKEY
    ) -> None:
        stanzas = []
        for zone in zones:
            signing = f"dnssec-policy {_policy(zone)}; inline-signing yes; " if self._is_signed(zone) else ""
            if signing and self._update_key:
                updater = parse_tsig(self._update_key, "the lab's update key").name
                signing += f"update-policy {{ grant {updater} zonesub IPSECKEY TXT; }}; "
            stanzas.append(
                f'zone "{zone}" {{ type primary; file "{file_name(zone)}"; check-names ignore; {signing}}};'
            )
        flags, protocol, algorithm, key = str(root_key).split(maxsplit=3)
        anchor = f'. static-key {flags} {protocol} {algorithm} "{key.replace(" ", "")}";'
        text = (self._templates / "named.conf.in").read_text()
        for name, value in {
            "DIRECTORY": str(self.directory),
            "IPV4": str(RESOLVER_IPV4),
            "IPV6": str(RESOLVER_IPV6),
            "TRUST_ANCHORS": anchor,
            "UPDATE_KEY": self._update_key,
            "ZONES": "\n\t".join(stanzas),
        }.items():
            text = text.replace(f"@{name}@", value)
        (self.directory / "named.conf").write_text(text)

    def _copy_of_named(self) -> Path:
        """AppArmor confines /usr/sbin/named by its path to /etc/bind: a copy may read our directory."""
        found = shutil.which("named", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        if found is None:
            raise OepyError("BIND's named is not installed", "apt-get install bind9")
        target = self.directory / "named"
        if not target.exists():
            shutil.copy2(found, target)
        return target

    # ---- readiness ---------------------------------------------------------------------------------------

    def _wait_ready(self, deadline: float) -> None:
        assert self._inventory is not None
        open_questions = [(name, zone) for zone in self._inventory.zones for name in self._probes(zone)]
        while open_questions:
            name, zone = open_questions[-1]
            if self._is_ready(name, signed=self._is_signed(zone)):
                open_questions.pop()
                continue
            self._check_alive()
            if time.monotonic() > deadline:
                raise OepyError(f"the lab's name server is not ready: {zone} is not served; {self._tail()}")
            time.sleep(0.02)

    def _probes(self, zone: dns.name.Name) -> list[dns.name.Name]:
        """Names that are answered with signatures and denials only when the whole zone is signed."""
        return [
            zone,
            dns.name.Name((b"zz-absent", *zone.labels)),
            dns.name.Name((b"00-absent", *zone.labels)),
        ]

    def _is_ready(self, name: dns.name.Name, *, signed: bool) -> bool:
        query = dns.message.make_query(name, "SOA", want_dnssec=True, flags=0)
        try:
            answer = dns.query.tcp(query, str(RESOLVER_IPV4), timeout=2)
        except (OSError, dns.exception.DNSException, EOFError):
            return False
        if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            return False
        kinds = {
            (rrset.rdtype, getattr(rrset[0], "type_covered", None))
            for rrset in answer.answer + answer.authority
        }
        if not signed:
            return bool(kinds)
        proof = {dns.rdatatype.SOA} if answer.rcode() == dns.rcode.NOERROR else set()
        proofs = proof or {dns.rdatatype.NSEC, dns.rdatatype.NSEC3}
        return any((dns.rdatatype.RRSIG, covered) in kinds for covered in proofs)

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            raise OepyError(f"the lab's name server ended at once: {self._tail()}")

    def _tail(self) -> str:
        text = ""
        for path in (self.directory / "named.err", self.log):
            with contextlib.suppress(FileNotFoundError):
                text += path.read_text(errors="replace")[-1500:]
        return " | ".join(text.splitlines()[-8:])


def _policy(zone: dns.name.Name) -> str:
    return "lab-nsec3" if str(zone) in NSEC3_ZONES else "lab-nsec"


def _inventory_entry(host: ExtraHost) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": host.name,
        "addresses": [str(address) for address in (host.ipv4, host.ipv6) if address is not None],
    }
    if host.key is not None:
        entry["keys"] = [f"{int(host.key.algorithm)} {encode(host.key)}"]
    return entry


def in_namespace(namespace: str, function: Callable[[], T]) -> T:
    """Run `function` in a thread that has entered the network namespace; the caller stays where it is.

    Sockets made there stay in the namespace, whoever uses them later. Raises what `function` raises, and
    OSError where the namespace cannot be entered.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def enter_and_run() -> None:
        try:
            enter_namespace(namespace)
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
            errors.append(error)

    thread = threading.Thread(target=enter_and_run, name=f"netns-{namespace}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def enter_namespace(namespace: str) -> None:
    """Move the calling thread into a named network namespace. Raises OSError."""
    descriptor = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        join_namespace(descriptor)
    finally:
        os.close(descriptor)
