"""Manual keys on the userland datapath: two daemons with `manual:` alone, judged by a capture on the wire."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oepy.lab.capture import Capture
from oepy.lab.probe import ping
from tests.fakes import manual
from tests.net.daemon_host import Host, kinds, ready
from tests.net.harness import A4, A6, B4, B6, Wired, udp, wired

pytestmark = pytest.mark.root

PAIR4 = ((A4, B4), (B4, A4))


@pytest.fixture(scope="module")
def net() -> Iterator[Wired]:
    with wired() as made:
        yield made


@pytest.fixture(scope="module")
def daemons(net: Wired, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    directory = tmp_path_factory.mktemp("manual")
    made = Host(net.a, directory / "a"), Host(net.b, directory / "b")
    try:
        yield made
    finally:
        for host in made:
            host.stop()
    for namespace in (net.a, net.b):
        left = namespace.run("sh", "-c", "ip rule; ip -6 rule; ip link; nft list tables").stdout
        assert not {"17733", "oe0", "table"} & set(left.replace(":", " ").split())


@pytest.fixture
def hosts(daemons: tuple[Host, Host]) -> tuple[Host, Host]:
    """Both run, and nothing is left of the test before, neither configured nor by hand."""
    for host in daemons:
        if host.process is None or host.process.poll() is not None:
            host.begin({})
            continue
        host.reload({})
        for what in ("sa", "policy"):
            assert host.oepy(what, "flush").returncode == 0
    ready(*daemons)
    return daemons


def test_two_hosts_with_manual_keys_talk_in_esp(net: Wired, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Nothing but `manual:` is configured; pings and their answers are ESP on the wire, from the first packet, and
    `sas`, `policies` and `explain` show why."""
    a, b = hosts
    a.reload(manual.section(A4, B4))
    b.reload(manual.section(B4, A4))
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c.pcap", incoming_only=True) as capture:
        assert None not in ping(net.a, B4, count=3)
        assert None not in ping(net.b, A4, count=2)
        capture.flush()
        assert kinds(capture) == {"esp"}
        assert len([packet for packet in capture.packets() if packet.kind == "esp"]) == 10
    (sa,) = a.json("sas")
    assert (sa["authenticated"], sa["connection"], sa["packets_out"], sa["packets_in"]) == (
        *("manual", "manual"),
        *(5, 5),
    )
    story = a.json("explain", B4)
    assert (story["disposition"], story["group"], story["sa"]["spi_in"]) == ("private", "manual", "00001002")
    assert [row["direction"] for row in a.json("policies") if row["group"] == "manual"] == ["in", "out"]
    assert [row["packets"] for row in a.json("sa", "list")] == [5, 5]
    secrets = [manual.key(seed)[2:] for seed in (0x1001, 0x1002, 0x1008, 0x1009)]
    for shown in (a.log(), a.oepy("sa", "list", "--json").stdout, a.oepy("events", "--json").stdout):
        assert not any(secret in shown for secret in secrets)


def test_other_traffic_stays_clear_and_ipv6_goes_inside(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """IPv6 traffic in a tunnel over IPv4 is private; IPv4 between the same hosts, of no policy, is clear."""
    a, b = hosts
    a.reload({"sas": manual.sas(A4, B4), "policies": manual.policies(A4, B4, near=A6, far=B6)})
    b.reload({"sas": manual.sas(A4, B4), "policies": manual.policies(B4, A4, near=B6, far=A6)})
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c.pcap", incoming_only=True) as capture:
        assert None not in ping(net.a, B6, count=3)
        capture.flush()
        assert kinds(capture) == {"esp"}
        assert None not in ping(net.a, B4, count=3)
        capture.flush()
        assert kinds(capture) == {"esp", "clear"}


def test_another_key_lets_nothing_pass(net: Wired, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """With one wrong key nothing arrives, and nothing is in the clear: what is wrong is counted."""
    a, b = hosts
    a.reload(manual.section(A4, B4))
    b.reload(manual.section(B4, A4, integrity_key=manual.key(1)))
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c.pcap", incoming_only=True) as capture:
        assert ping(net.a, B4, count=3, timeout=0.3) == [None] * 3
        capture.flush()
        assert kinds(capture) == {"esp"}
    assert b.json("sas")[0]["integrity_failures"] == 3


def test_clear_traffic_of_a_required_policy_is_dropped(net: Wired, hosts: tuple[Host, Host]) -> None:
    """b demands the SA; a has no daemon and sends in the clear: b's policy drops it, unless its level is use."""
    a, b = hosts
    a.stop()
    b.reload(manual.section(B4, A4))
    assert ping(net.a, B4, count=2, timeout=0.3) == [None] * 2
    use = manual.policies(B4, A4, template={"level": "use"})
    b.reload({"sas": manual.sas(A4, B4), "policies": use})
    b.oepy("sa", "flush")
    assert None not in ping(net.a, B4, count=2)


def test_block_and_bypass(net: Wired, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Both come before the tunnel's policy where they are more specific."""
    a, b = hosts
    icmp_clear = [
        {"direction": way, "src": src, "dst": dst, "protocol": "icmp", "action": "bypass"}
        for way, (src, dst) in zip(("out", "in"), PAIR4, strict=True)
    ]
    section = manual.section(A4, B4)
    section["policies"] += icmp_clear
    a.reload(section)
    section = manual.section(B4, A4)
    section["policies"] += [{**item, "src": item["dst"], "dst": item["src"]} for item in icmp_clear]
    b.reload(section)
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c.pcap", incoming_only=True) as capture:
        assert None not in ping(net.a, B4, count=2)
        capture.flush()
        assert kinds(capture) == {"clear"}
        done = a.oepy("policy", "delete", "out", A4, B4, "--protocol", "icmp")
        assert done.returncode == 0, done.stderr
        done = a.oepy("policy", "add", "out", A4, B4, "--protocol", "icmp", "--action", "block")
        assert done.returncode == 0, done.stderr
        before = len(capture.packets())
        assert ping(net.a, B4, count=2, timeout=0.3) == [None] * 2
        capture.flush()
        assert [packet.kind for packet in capture.packets()[before:] if packet.source == A4] == []


def test_a_reload_touches_only_what_changed(net: Wired, hosts: tuple[Host, Host]) -> None:
    """The SA that stays keeps its counters; mistakes change nothing; what goes away is clear again."""
    a, b = hosts
    section = manual.section(A4, B4)
    a.reload(section)
    b.reload(manual.section(B4, A4))
    assert None not in ping(net.a, B4, count=3)
    more = {"direction": "out", "src": A4, "dst": "192.0.2.0/24", "action": "block"}
    a.reload({**section, "policies": [*section["policies"], more]})
    assert a.json("sas")[0]["packets_out"] == 3
    assert len(a.json("policy", "list")) == 3
    a.reload({**section, "sas": section["sas"][:1]})
    assert "reload-refused" in a.events()
    assert len(a.json("policy", "list")) == 3
    assert None not in ping(net.a, B4, count=3)
    assert a.json("sas")[0]["packets_out"] == 6
    a.reload({})
    b.reload({})
    assert a.json("sas") == []
    assert None not in ping(net.a, B4, count=1)


def test_no_packet_slips_through_while_rules_change(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """A sender that never stops, and ten changes of other policies: all that reaches the wire is ESP."""
    a, b = hosts
    a.reload(manual.section(A4, B4))
    b.reload(manual.section(B4, A4))
    stop = threading.Event()
    sent = 0
    sock = udp(net.a, B4, 9)

    def send() -> None:
        nonlocal sent
        while not stop.is_set():
            with contextlib.suppress(OSError):
                sock.send(bytes(32))
                sent += 1
            time.sleep(0.0002)

    sender = threading.Thread(target=send)
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c.pcap", incoming_only=True) as capture:
        sender.start()
        for number in range(5):
            words = ["out", A4, f"192.0.2.{number}", "--protocol", "tcp"]
            assert a.oepy("policy", "add", *words, "--action", "block").returncode == 0
            assert a.oepy("policy", "delete", *words).returncode == 0
        stop.set()
        sender.join()
        capture.flush()
        assert sent > 1000
        assert kinds(capture) == {"esp"}
    sock.close()


def test_the_daemons_commands(net: Wired, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """`oepy sa` and `oepy policy` through the daemon: keys from files and stdin, mistakes with their mend and exit
    status, flush of what is by hand."""
    a, b = hosts
    b.reload(manual.section(B4, A4))
    for number, (src, dst) in enumerate(sorted(PAIR4), 0x1001):
        (tmp_path / f"{number}.enc").write_text(manual.key(number) + "\n")
        (tmp_path / f"{number}.enc").chmod(0o600)
        done = a.oepy(
            *["sa", "add", src, dst, "esp", hex(number), "--encap", "4500,4500"],
            *["--encryption", "aes256", "--encryption-key-file", str(tmp_path / f"{number}.enc")],
            *["--integrity", "sha256", "--integrity-key", "-", "--json"],
            stdin=manual.key(number + 7) + "\n",
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["by"] == "daemon"
    for way, (src, dst) in zip(("out", "in"), PAIR4, strict=True):
        done = a.oepy("policy", "add", way, src, dst, "--template", f"esp/tunnel/{src}-{dst}/require")
        assert done.returncode == 0, done.stderr
    assert None not in ping(net.a, B4, count=3)
    again = a.oepy(
        *["sa", "add", A4, B4, "esp", "0x1001", "--encap", "4500,4500", "--encryption", "null"],
        *["--integrity", "sha256", "--integrity-key", manual.key(1)],
    )
    assert (again.returncode, "SPI" in again.stderr) == (2, True)
    in_the_kernel = a.oepy(
        *["sa", "add", A4, B4, "ah", "0x2001", "--integrity", "sha256", "--integrity-key", manual.key(1)]
    )
    assert (in_the_kernel.returncode, "AH is in the kernel only" in in_the_kernel.stderr) == (2, True)
    assert a.oepy("sa", "delete", B4, "esp", "0x9999").returncode == 1
    assert a.oepy("sa", "flush").returncode == 0
    assert ping(net.a, B4, count=1, timeout=0.3) == [None]
    assert a.oepy("policy", "flush").returncode == 0
    assert a.json("policy", "list") == []


def test_required_traffic_stays_shut_when_the_daemon_dies(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """SIGKILL, a new start, and a clean stop: no packet of a required policy in the clear at any time."""
    a, b = hosts
    a.reload(manual.section(A4, B4))
    b.reload(manual.section(B4, A4))
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c.pcap", incoming_only=True) as capture:
        assert None not in ping(net.a, B4, count=2)
        a.kill()
        assert ping(net.a, B4, count=3, timeout=0.2) == [None] * 3
        a.start(manual.section(A4, B4))
        assert None not in ping(net.a, B4, count=2)
        assert a.process is not None
        a.process.terminate()
        a.process.wait(15)
        assert ping(net.a, B4, count=3, timeout=0.2) == [None] * 3
        capture.flush()
        assert "clear" not in kinds(capture)


def test_transport_mode(net: Wired, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Transport mode between the hosts, in both families, and AES-CTR where it is asked for."""
    a, b = hosts
    ctr = {"encryption": "aes256ctr", "encryption_key": manual.key(5, 36), "allow_weak": True}
    transport = {"mode": "transport"}
    for host, near4, far4, near6, far6 in ((a, A4, B4, A6, B6), (b, B4, A4, B6, A6)):
        six = [
            {**sa, "spi": hex(0x2000 + index)}
            for index, sa in enumerate(manual.sas(A6, B6, mode="transport", **ctr))
        ]
        host.reload(
            {
                "sas": [*manual.sas(A4, B4, mode="transport"), *six],
                "policies": [
                    *manual.policies(near4, far4, template=transport),
                    *manual.policies(near6, far6, template=transport),
                ],
            }
        )
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c.pcap", incoming_only=True) as capture:
        assert None not in ping(net.a, B4, count=3)
        assert None not in ping(net.b, A6, count=3)
        capture.flush()
        assert kinds(capture) == {"esp"}
    assert {sa["mode"] for sa in a.json("sas")} == {"transport"}
