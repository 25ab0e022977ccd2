"""`oepy sa` and `oepy policy` alone, without any daemon, against `ip xfrm` on the other end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from oepy.cli import main
from oepy.lab.capture import Capture
from oepy.lab.namespaces import Namespace
from oepy.lab.probe import ping
from tests.fakes.manual import key
from tests.net.harness import A4, A6, B4, B6, Wired, wired

pytestmark = [pytest.mark.kernel, pytest.mark.root]

ENC, AUTH = key(1), key(99)


@pytest.fixture(scope="module")
def wire() -> Iterator[Wired]:
    with wired() as made:
        yield made


@pytest.fixture
def net(wire: Wired) -> Iterator[Wired]:
    yield wire
    for namespace in (wire.a, wire.b):
        namespace.run("ip", "xfrm", "policy", "flush")
        namespace.run("ip", "xfrm", "state", "flush")


def oepy(namespace: Namespace, *words: str, status: int = 0) -> str:
    with namespace.entered():
        done = CliRunner().invoke(main, list(words))
    assert done.exit_code == status, done.output
    return done.output


def listed(namespace: Namespace, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(oepy(namespace, *words, "--json"))
    return found


@dataclass
class Suite:
    """One set of algorithms, in oepy's words and in those of `ip xfrm`."""

    ours: list[str]
    theirs: list[str]
    protocol: str = "esp"


CBC = Suite(
    ["--encryption", "aes256", "--encryption-key", ENC, "--integrity", "sha256", "--integrity-key", AUTH],
    ["auth-trunc", "hmac(sha256)", AUTH, "128", "enc", "cbc(aes)", ENC],
)
AH = Suite(
    ["--integrity", "sha512", "--integrity-key", key(3, 64)],
    ["auth-trunc", "hmac(sha512)", key(3, 64), "256"],
    "ah",
)
OTHERS = {
    "null": Suite(
        ["--encryption", "null", "--integrity", "sha384", "--integrity-key", key(5, 48)],
        ["auth-trunc", "hmac(sha384)", key(5, 48), "192", "enc", "ecb(cipher_null)", ""],
    ),
    "sha256_96": Suite(
        [
            "--encryption",
            "aes128",
            "--encryption-key",
            key(1, 16),
            "--integrity",
            "sha256_96",
            "--integrity-key",
            AUTH,
        ],
        ["auth-trunc", "hmac(sha256)", AUTH, "96", "enc", "cbc(aes)", key(1, 16)],
    ),
    "weak": Suite(
        [
            "--encryption",
            "3des",
            "--encryption-key",
            key(1, 24),
            "--allow-weak",
            "--integrity",
            "sha1",
            "--integrity-key",
            key(2, 20),
        ],
        ["auth-trunc", "hmac(sha1)", key(2, 20), "96", "enc", "cbc(des3_ede)", key(1, 24)],
    ),
    "xcbc-ctr": Suite(
        [
            "--encryption",
            "aes192ctr",
            "--encryption-key",
            key(1, 28),
            "--allow-weak",
            "--integrity",
            "aesxcbc",
            "--integrity-key",
            key(2, 16),
        ],
        ["auth-trunc", "xcbc(aes)", key(2, 16), "96", "enc", "rfc3686(ctr(aes))", key(1, 28)],
    ),
    "gcm": Suite(
        ["--aead", "aes256gcm16", "--aead-key", key(1, 36), "--allow-weak"],
        ["aead", "rfc4106(gcm(aes))", key(1, 36), "128"],
    ),
    "chacha": Suite(
        ["--aead", "chacha20poly1305", "--aead-key", key(1, 36), "--allow-weak"],
        ["aead", "rfc7539esp(chacha20,poly1305)", key(1, 36), "128"],
    ),
    "esn": Suite(
        [*CBC.ours, "--esn", "--replay-window", "128"],
        [*CBC.theirs, "flag", "esn", "replay-window", "128"],
    ),
}


def key_ours(namespace: Namespace, here: str, there: str, mode: str, suite: Suite) -> None:
    """Our end: two SAs and two policies by commands."""
    for (src, dst), spi in zip(((here, there), (there, here)), ("0x1001", "0x1002"), strict=True):
        oepy(namespace, "sa", "add", src, dst, suite.protocol, spi, "--mode", mode, *suite.ours)
    for direction, (src, dst) in (("out", (here, there)), ("in", (there, here))):
        ends = f"{src}-{dst}" if mode == "tunnel" else ""
        template = f"{suite.protocol}/{mode}/{ends}/require"
        oepy(namespace, "policy", "add", direction, src, dst, "--template", template)


def key_theirs(namespace: Namespace, here: str, there: str, mode: str, suite: Suite) -> None:
    """The other end by `ip xfrm`."""
    for (src, dst), spi in zip(((there, here), (here, there)), ("0x1001", "0x1002"), strict=True):
        state = ["src", src, "dst", dst, "proto", suite.protocol, "spi", spi, "reqid", "9", "mode", mode]
        namespace.run("ip", "xfrm", "state", "add", *state, *suite.theirs)
    for direction, (src, dst) in (("out", (here, there)), ("in", (there, here))):
        policy = ["src", src, "dst", dst, "dir", direction]
        template = ["tmpl", "src", src, "dst", dst, "proto", suite.protocol, "reqid", "9", "mode", mode]
        namespace.run("ip", "xfrm", "policy", "add", *policy, *template)


def protocols(capture: Capture) -> set[int]:
    capture.flush()
    return {packet.protocol for packet in capture.packets() if packet.kind not in ("nd", "multicast")}


@pytest.mark.parametrize(("here", "there"), [(A4, B4), (A6, B6)], ids=["v4", "v6"])
@pytest.mark.parametrize("mode", ["tunnel", "transport"])
@pytest.mark.parametrize("suite", [CBC, AH], ids=["esp", "ah"])
def test_against_ip_xfrm(net: Wired, tmp_path: Path, here: str, there: str, mode: str, suite: Suite) -> None:
    """ESP and AH, both modes and families: pings pass, and the wire carries that protocol alone."""
    key_ours(net.a, here, there, mode, suite)
    key_theirs(net.b, there, here, mode, suite)
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c", incoming_only=True) as capture:
        assert None not in ping(net.a, there, count=3, timeout=2.0)
        assert protocols(capture) == {50 if suite.protocol == "esp" else 51}
    sas = listed(net.a, "sa", "list")
    assert {(sa["mode"], sa["protocol"], sa["manual"]) for sa in sas} == {(mode, suite.protocol, True)}
    assert [sa["packets"] >= 3 for sa in sas] == [
        True,
        True,
    ]  # in IPv6 neighbour discovery is of the policy too
    assert all(bytes.fromhex(secret[2:]).hex() not in json.dumps(sas) for secret in (ENC, AUTH))


@pytest.mark.parametrize("name", OTHERS)
def test_every_algorithm_against_ip_xfrm(net: Wired, name: str) -> None:
    """Names, key lengths and ICV lengths are the kernel's."""
    key_ours(net.a, A4, B4, "transport", OTHERS[name])
    key_theirs(net.b, B4, A4, "transport", OTHERS[name])
    assert None not in ping(net.a, B4, count=2, timeout=2.0)


def test_only_our_own_entries_are_touched(net: Wired) -> None:
    """list, delete and flush pass over what `ip xfrm` has made; --all lists it."""
    net.a.run(
        *["ip", "xfrm", "state", "add", "src", A4, "dst", B4, "proto", "esp", "spi", "0x7777"],
        *["reqid", "9", "mode", "tunnel", *CBC.theirs],
    )
    net.a.run(
        "ip", "xfrm", "policy", "add", "src", A4, "dst", "192.0.2.0/24", "dir", "out", "action", "block"
    )
    key_ours(net.a, A4, B4, "tunnel", CBC)
    oepy(net.a, "sa", "delete", B4, "esp", "0x7777", status=1)
    oepy(net.a, "policy", "delete", "out", A4, "192.0.2.0/24", status=1)
    assert len(listed(net.a, "sa", "list")) == 2
    assert [sa["manual"] for sa in listed(net.a, "sa", "list", "--all")].count(False) == 1
    taken = oepy(net.a, "sa", "add", A4, B4, "esp", "0x7777", *CBC.ours, status=1)
    assert "there is one already" in taken
    oepy(net.a, "policy", "flush")
    oepy(net.a, "sa", "flush")
    assert listed(net.a, "sa", "list") == listed(net.a, "policy", "list") == []
    assert "0x00007777" in net.a.run("ip", "xfrm", "state").stdout
    assert "192.0.2.0/24" in net.a.run("ip", "xfrm", "policy").stdout


def test_block_bypass_and_a_removed_sa(net: Wired) -> None:
    """`block` drops, `bypass` passes before a tunnel's policy, and a policy whose SA is gone passes nothing."""
    oepy(net.a, "policy", "add", "out", A4, B4, "--action", "block")
    assert ping(net.a, B4, timeout=0.5) == [None]
    oepy(net.a, "policy", "delete", "out", A4, B4)
    key_ours(net.a, A4, B4, "tunnel", CBC)
    oepy(net.a, "policy", "add", "out", A4, B4, "--protocol", "icmp", "--action", "bypass")
    oepy(net.a, "policy", "add", "in", B4, A4, "--protocol", "icmp", "--action", "bypass")
    assert None not in ping(net.a, B4, timeout=1.0)
    for direction, ends in (("out", (A4, B4)), ("in", (B4, A4))):
        oepy(net.a, "policy", "delete", direction, *ends, "--protocol", "icmp")
    oepy(net.a, "sa", "delete", B4, "esp", "0x1001")
    assert ping(net.a, B4, timeout=0.5) == [None]


SETKEY = f"""
flush; spdflush;
add {A4} {B4} esp 0x1001 -m tunnel -r 4 -E aes-cbc {ENC} -A hmac-sha2-256 {AUTH};
add {B4} {A4} esp 0x1002 -m tunnel -r 4 -E aes-cbc {ENC} -A hmac-sha2-256 {AUTH};
add {A6} {B6} ah 0x2001 -u 7 -A hmac-sha2-512 {key(3, 64)};
add {B6} {A6} ah 0x2002 -u 7 -A hmac-sha2-512 {key(3, 64)};
"""
SETKEY_POLICIES = """
spdadd {A4}/32[any] {B4}/32[any] any -P {out} ipsec esp/tunnel/{A4}-{B4}/require;
spdadd {B4}/32[any] {A4}/32[any] any -P {back} ipsec esp/tunnel/{B4}-{A4}/require;
spdadd {A6} {B6} any -P {out} ipsec ah/transport//unique:7;
spdadd {B6} {A6} any -P {back} ipsec ah/transport//unique:7;
"""


def test_a_setkey_file_is_converted_and_loaded(net: Wired, tmp_path: Path) -> None:
    """Both ends load what `oepy convert` prints; loading it again changes nothing, sequence numbers included."""
    for namespace, ways in ((net.a, ("out", "in")), (net.b, ("in", "out"))):
        source = tmp_path / f"{namespace.label}.conf"
        policies = SETKEY_POLICIES.format(A4=A4, B4=B4, A6=A6, B6=B6, out=ways[0], back=ways[1])
        source.write_text(SETKEY + policies)
        done = CliRunner().invoke(
            main, ["convert", str(source), "--keys-dir", str(tmp_path / namespace.label)]
        )
        assert done.exit_code == 0, done.output
        loaded = tmp_path / f"{namespace.label}.yaml"
        loaded.write_text(done.stdout)
        oepy(namespace, "sa", "load", str(loaded))
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "c", incoming_only=True) as capture:
        assert None not in ping(net.a, B4, count=2, timeout=2.0)
        assert None not in ping(net.a, B6, count=2, timeout=2.0)
        assert protocols(capture) == {50, 51}
    before = net.a.run("ip", "-s", "xfrm", "state").stdout
    oepy(net.a, "sa", "load", str(tmp_path / "a.yaml"))
    assert net.a.run("ip", "-s", "xfrm", "state").stdout == before
    assert len(listed(net.a, "sa", "list")) == 4
