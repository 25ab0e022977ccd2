"""Inventory, zone files and anchors: what is accepted, what comes out, what is complained of."""

from __future__ import annotations

import subprocess

import dns.name
import dns.zone
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from oepy.cli import main
from oepy.dns.anchors import IANA_ROOT, TrustAnchors
from oepy.dns.inventory import Inventory
from oepy.dns.zonefile import file_name, generate
from oepy.dns.zonemap import classless_span, reverse_name
from oepy.errors import ConfigError
from oepy.keys import HostKey, encode, public_pem

RSA = HostKey.generate("rsa-2048").public
ED = HostKey.generate("ed25519").public

YAML = """\
ttl: 3600
zones: [2.0.192.in-addr.arpa, 64/26.2.0.192.in-addr.arpa, 8.b.d.0.1.0.0.2.ip6.arpa, example]
name_servers: [ns1.example]
hosts:
  - {name: ns1.example, addresses: [192.0.2.53]}
  - name: alpha.example
    addresses: [192.0.2.10, "2001:db8::10"]
    keys: [alpha.pub]
    gateway: self
    precedence: 10
    records: [ipseckey, txt]
  - {name: beta.example, addresses: [192.0.2.70], keys: [ed.pub], gateway: alpha.example, precedence: 5}
  - {name: gamma.example, addresses: [192.0.2.71], keys: [ed.pub], gateway: none}
  - {name: delta.example, addresses: [192.0.2.72], keys: [ed.pub], gateway: "2001:db8::10"}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "alpha.pub").write_text(public_pem(RSA))
    (tmp_path / "ed.pub").write_text(f"4 {encode(ED)}\n")
    return tmp_path


def make(folder, text: str, name: str = "hosts.yaml", serial: int = 7):
    (folder / name).write_text(text)
    return generate(Inventory(folder / name), folder / "out", serial)


def records(folder, zone: str) -> dict[tuple[str, str], list[str]]:
    """Read back by another zone-file reader."""
    origin = dns.name.from_text(zone)
    loaded = dns.zone.from_file(str(folder / "out" / file_name(origin)), origin, relativize=False)
    found: dict[tuple[str, str], list[str]] = {}
    for owner, _ttl, rdata in loaded.iterate_rdatas():
        found.setdefault((str(owner), rdata.rdtype.name), []).append(str(rdata))
    return found


def test_an_inventory_becomes_zone_files(folder):
    """Forward, in-addr.arpa and ip6.arpa; A, AAAA, PTR, IPSECKEY and TXT; RFC 2317; every gateway form."""
    result = make(folder, YAML)
    assert (result.hosts, result.warnings) == (5, ())
    forward = records(folder, "example")
    assert forward["alpha.example.", "A"] == ["192.0.2.10"]
    assert forward["alpha.example.", "AAAA"] == ["2001:db8::10"]
    assert forward["alpha.example.", "IPSECKEY"][0].startswith("10 0 2 . ")
    reverse = records(folder, "2.0.192.in-addr.arpa")
    assert reverse["10.2.0.192.in-addr.arpa.", "PTR"] == ["alpha.example."]
    assert reverse["10.2.0.192.in-addr.arpa.", "IPSECKEY"][0].startswith("10 1 2 192.0.2.10 ")
    assert reverse["10.2.0.192.in-addr.arpa.", "TXT"][0].startswith('"X-IPsec-Server(10)=192.0.2.10 " "')
    assert reverse["70.2.0.192.in-addr.arpa.", "CNAME"] == ["70.64/26.2.0.192.in-addr.arpa."]
    assert reverse["64/26.2.0.192.in-addr.arpa.", "NS"] == ["ns1.example."]
    classless = records(folder, "64/26.2.0.192.in-addr.arpa")
    keys = {n: classless[f"{n}.64/26.2.0.192.in-addr.arpa.", "IPSECKEY"][0] for n in (70, 71, 72)}
    assert keys[70].startswith("5 3 4 alpha.example. ")
    assert keys[71].startswith("10 0 4 . ")
    assert keys[72].startswith("10 2 4 2001:db8::10 ")
    six = records(folder, "8.b.d.0.1.0.0.2.ip6.arpa")
    assert any(
        kind == "IPSECKEY" and texts[0].startswith("10 2 2 2001:db8::10") for (_, kind), texts in six.items()
    )


def test_bind_accepts_every_zone(folder):
    """named-checkzone loads what was written."""
    result = make(folder, YAML)
    zones = [zone.to_text() for zone in Inventory(folder / "hosts.yaml").zones] or [
        "2.0.192.in-addr.arpa",
        "64/26.2.0.192.in-addr.arpa",
        "8.b.d.0.1.0.0.2.ip6.arpa",
        "example",
    ]
    assert len(zones) == len(result.files)
    for zone, path in zip(zones, result.files, strict=True):
        checked = subprocess.run(
            ["named-checkzone", "-k", "ignore", zone, str(path)], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout


def test_the_same_input_gives_the_same_bytes(folder):
    """Only the serial may differ."""
    first = [path.read_bytes() for path in make(folder, YAML).files]
    assert first == [path.read_bytes() for path in make(folder, YAML).files]
    assert first != [path.read_bytes() for path in make(folder, YAML, serial=8).files]


def test_csv_gives_what_yaml_gives(folder):
    """The same columns in CSV, with the zones in columns of the first row or on the command line."""
    expected = [path.read_bytes() for path in make(folder, YAML).files]
    text = (
        "name,addresses,keys,gateway,precedence,records,ttl,zones,name_servers\n"
        "ns1.example,192.0.2.53,,,,,3600,2.0.192.in-addr.arpa 64/26.2.0.192.in-addr.arpa "
        "8.b.d.0.1.0.0.2.ip6.arpa example,ns1.example\n"
        'alpha.example,"192.0.2.10, 2001:db8::10",alpha.pub,self,10,ipseckey txt,,,\n'
        "beta.example,192.0.2.70,ed.pub,alpha.example,5,,,,\n"
        "gamma.example,192.0.2.71,ed.pub,none,,,,,\n"
        f"delta.example,192.0.2.72,4 {encode(ED)},2001:db8::10,,,,,\n"
    )
    assert [path.read_bytes() for path in make(folder, text, "hosts.csv").files] == expected


def test_all_mistakes_are_listed_with_their_lines_and_nothing_is_written(folder):
    """Every mistake of the file at once, each with the line of its host."""
    text = YAML + (
        "  - {name: far.elsewhere, addresses: [203.0.113.1]}\n"
        "  - {name: bad..name, addresses: [192.0.2.20]}\n"
        "  - {name: a.example, addresses: [192.0.2.999]}\n"
        "  - {name: b.example, addresses: [192.0.2.21], keys: [missing.pub]}\n"
        "  - {name: c.example, addresses: [192.0.2.22], keys: [ed.pub], records: [txt]}\n"
        "  - {name: d.example, addresses: [192.0.2.23], precedence: 256, gateway: a..b, colour: red}\n"
        '  - {name: e.example, keys: ["3 AAAA"], records: [mx]}\n'
    )
    with pytest.raises(ConfigError) as caught:
        make(folder, text)
    problems = caught.value.problems
    for line, word in [
        (15, "outside of every listed zone"),
        (16, "domain name"),
        (17, "no IP address"),
        (18, "missing.pub"),
        (19, "RSA"),
        (20, "0..255"),
        (20, "gateway"),
        (20, "colour"),
        (21, "ECDSA"),
        (21, "mx"),
    ]:
        assert any(problem.startswith(f"line {line}:") and word in problem for problem in problems), (
            line,
            word,
        )
    assert not list((folder / "out").iterdir())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2", "YAML"),
        ("- a list", "no mapping"),
        ("zones: [example]\nname_servers: [ns1.example]\n", "hosts"),
        ("name_servers: [ns1.example]\nhosts: []\n", "no zones"),
        ("zones: [example]\nhosts: []\n", "no name servers"),
        ("zones: [example, EXAMPLE]\nname_servers: [n.x]\nhosts: []\nextra: 1\n", "extra"),
    ],
)
def test_a_hopeless_inventory_says_why(folder, text, reason):
    """Broken YAML and missing parts are told in words."""
    with pytest.raises(ConfigError) as caught:
        make(folder, text)
    assert any(reason in problem for problem in caught.value.problems)


def test_a_name_server_without_address_is_warned_of(folder):
    """BIND would refuse the zone: the warning says how to mend it."""
    result = make(folder, "zones: [example]\nname_servers: [ns1.example]\nhosts: [{name: a.example}]\n")
    assert "ns1.example" in result.warnings[0]
    with_address = "zones: [example]\nname_servers: [ns1.example 192.0.2.53]\nhosts: [{name: a.example}]\n"
    assert make(folder, with_address).warnings == ()
    assert records(folder, "example")["ns1.example.", "A"] == ["192.0.2.53"]


@pytest.mark.parametrize(
    ("label", "span"),
    [
        ("0/26", (0, 63)),
        ("64/26", (64, 127)),
        ("64-127", (64, 127)),
        ("64-26", (64, 127)),
        ("128/25", (128, 255)),
        ("7/32", (7, 7)),
        ("1/26", None),
        ("0/33", None),
        ("300/26", None),
        ("host", None),
    ],
)
def test_rfc2317_zone_names(label, span):
    """Both spellings in use; impossible ones are ordinary labels."""
    assert classless_span(dns.name.from_text(f"{label}.2.0.192.in-addr.arpa")) == span


@given(st.ip_addresses())
def test_reverse_names(address):
    """The same as the standard library's, for any address."""
    assert reverse_name(address) == dns.name.from_text(address.reverse_pointer)


def test_zone_commands(folder):
    """`zone generate` and `zone check` with their exit statuses."""
    (folder / "hosts.yaml").write_text(YAML)
    runner = CliRunner()
    out = str(folder / "out")
    made = runner.invoke(main, ["zone", "generate", str(folder / "hosts.yaml"), "-o", out, "--json"])
    assert made.exit_code == 0, made.output
    checked = runner.invoke(main, ["zone", "check", f"{out}/db.2.0.192.in-addr.arpa"])
    assert (checked.exit_code, "2 usable" in checked.output) == (0, True)
    with open(f"{out}/db.example", "a") as stream:
        stream.write("bad IN IPSECKEY 10 0 4 . AAAA\n")
    checked = runner.invoke(main, ["zone", "check", f"{out}/db.example"])
    assert (checked.exit_code, "bad.example." in checked.output) == (1, True)
    missing = runner.invoke(main, ["zone", "generate", str(folder / "none.yaml"), "-o", out])
    assert missing.exit_code == 2


def test_key_commands(folder):
    """`key generate` and `key show` in every format."""
    runner = CliRunner()
    path = str(folder / "keys" / "host.key")
    assert runner.invoke(main, ["key", "generate", "--type", "rsa-2048", path]).exit_code == 0
    again = runner.invoke(main, ["key", "generate", path])
    assert again.exit_code == 1
    shown = runner.invoke(main, ["key", "show", "--owner", "192.0.2.10", path])
    assert shown.output.startswith("10.2.0.192.in-addr.arpa. IN IPSECKEY 10 1 2 192.0.2.10 ")
    text = runner.invoke(main, ["key", "show", "--format", "txt", "--owner", "192.0.2.10", path])
    assert '"X-IPsec-Server(10)=192.0.2.10 "' in text.output
    pem = runner.invoke(main, ["key", "show", "--format", "pem", path])
    assert pem.output.startswith("-----BEGIN PUBLIC KEY-----")
    assert '"fingerprint"' in runner.invoke(main, ["key", "show", "--json", path]).output


# ---- anchors ---------------------------------------------------------------------------------------------

KEY_38696 = (
    "AwEAAa96jeuknZlaeSrvyAJj6ZHv28hhOKkx3rLGXVaC6rXTsDc449/cidltpkyGwCJNnOAlFNKF2jBosZBU5eeHspaQWOmOElZsjICMQMC3"
    "aeHbGiShvZsx4wMYSjH8e7Vrhbu6irwCzVBApESjbUdpWWmEnhathWu1jo+siFUiRAAxm9qyJNg/wOZqqzL/dL/q8PkcRU5oUKEpUge71M3e"
    "j2/7CPqpdVwuMoTvoB+ZOT4YeGyxMvHmbrxlFzGOHOijtzN+u1TQNatX2XBuzZNQ1K+s2CXkPIZo7s6JgZyvaBevYtxPvYLw4z9mR7K2vaF1"
    "8UYH9Z9GNUUeayffKC73PYc="
)


@pytest.mark.parametrize(
    "text",
    [
        f". IN DNSKEY 257 3 8 {KEY_38696} ; keytag 38696\n",
        f". 172800 DNSKEY 257 3 8 (\n {KEY_38696[:100]}\n {KEY_38696[100:]} )\n",
        f'trust-anchors {{\n # c\n . initial-key 257 3 8 "{KEY_38696[:60]}\n  {KEY_38696[60:]}";\n}};\n',
        IANA_ROOT.strip().splitlines()[1],
        'trust-anchors { . static-ds 38696 8 2 "'
        '683D2D0ACB8C9B712A1948B27F741219298D0A450D612C483AF444A4C0FB2B16"; };',
    ],
)
def test_anchor_files_of_every_form(text, tmp_path):
    """Zone-file lines as unbound and Debian write them, and BIND's blocks, name the same root key."""
    path = tmp_path / "root.key"
    path.write_text(text)
    anchor = TrustAnchors.load([path]).closest(dns.name.from_text("www.example."))
    assert anchor is not None
    assert anchor.text == "38696"


def test_anchor_files_without_anchor_are_refused(tmp_path):
    """An empty or wrong file must not silently mean "trust the IANA root"."""
    for text in ("", "; nothing\n", "www.example. IN A 192.0.2.1\n", ". IN DS 1 8 1 " + "00" * 20, "{{{"):
        (tmp_path / "x").write_text(text)
        with pytest.raises(ConfigError):
            TrustAnchors.load([tmp_path / "x"])
    with pytest.raises(ConfigError):
        TrustAnchors.load([tmp_path / "missing"])
    assert TrustAnchors.load([]).at(dns.name.root) is not None
