"""Zone files from inventories of any size: the short way writes what the long way writes, memory has a bound, and a
run that fails leaves nothing behind."""

from __future__ import annotations

import csv
import io
import itertools
import signal
import subprocess
import sys
import time

import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.zone
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oepy.bench.zone import write_inventory
from oepy.dns import zonefile
from oepy.dns.inventory import Inventory
from oepy.dns.zonefile import generate
from oepy.errors import ConfigError
from oepy.keys import HostKey, encode, public_pem

COLUMNS = ("name", "addresses", "keys", "gateway", "precedence", "records", "zones", "name_servers")
ZONES = (
    "example 2.0.192.in-addr.arpa 64/26.3.0.192.in-addr.arpa 3.0.192.in-addr.arpa 51.198.in-addr.arpa "
    "sub.example 8.b.d.0.1.0.0.2.ip6.arpa f.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa"
)
SERVERS = "ns1.example 192.0.2.53; ns2.sub.example 192.0.2.54"
RSA = f"2 {encode(HostKey.generate('rsa-2048').public)}"
EC = f"3 {encode(HostKey.generate('ecdsa-p256').public)}"
ED = f"4 {encode(HostKey.generate('ed25519').public)}"
LOOSE = ED[:-2] + ED[-2].translate(str.maketrans("AEIMQUYcgkosw048", "BFJNRVZdhlptx159")) + "="

names = st.one_of(
    st.from_regex(r"[a-zA-Z0-9_-]{1,9}(\.sub)?\.(example|EXAMPLE|Sub.example)\.?", fullmatch=True),
    st.sampled_from(
        ["example", "sub.example", "ns1.example", "ns2.sub.example", "a.b.c.example", "far.elsewhere", "a"]
    ),
    st.sampled_from(
        ["", "a..example", "*.example", "a\\.b.example", "x" * 64 + ".example", "ü.example", "a$.example"]
    ),
    st.integers(240, 254)
    .map(lambda size: ("a." * 130)[: size - 8] + "z.example")
    .map(lambda n: n.replace("..", ".")),
)
addresses = st.one_of(
    st.sampled_from(
        ["192.0.2.{}", "192.0.3.{}", "198.51.100.{}", "198.51.{}.7", "203.0.113.{}", "192.0.2.0{}"]
    ).flatmap(lambda form: st.integers(0, 260).map(form.format)),
    st.sampled_from(
        ["2001:db8::{:x}", "2001:DB8:f::{:x}", "2001:db8:0:{:x}::1", "2001:db9::{:x}", "::ffff:1.2.3.{}"]
    ).flatmap(lambda form: st.integers(0, 260).map(form.format)),
    st.sampled_from(["::", "::1.2.3.4", "fe80::1%eth0", "nonsense", "1.2.3", "2001:db8:1:0:1:0:0:1"]),
)
address_cells = st.one_of(
    addresses,
    st.tuples(st.lists(addresses, max_size=3), st.sampled_from([" ", ";", ", "])).map(
        lambda p: p[1].join(p[0])
    ),
)
rows = st.tuples(
    names,
    address_cells,
    st.sampled_from(["", ED, EC, RSA, f"{ED};{RSA}", "file.pub", "none.pub", LOOSE, "4 AAAA", f"{ED} ;"]),
    st.sampled_from(
        ["", "", "self", "SELF", "none", "192.0.2.1", "2001:db8::1", "::ffff:1.2.3.4", "gw.Example", "a..b"]
    ),
    st.sampled_from(["", "", "0", "255", "256", "07", "x", " "]),
    st.sampled_from(["", "", "ipseckey", "IPSECKEY", "ipseckey txt", "txt", "TXT;ipseckey", " ", "mx"]),
)


def table(hosts) -> str:
    """A CSV whose first row has the zones."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(COLUMNS)
    writer.writerow(["first.example", "192.0.2.9", ED, "", "", "", ZONES, SERVERS])
    writer.writerows([*host, "", ""] for host in hosts)
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scale")
    (path / "file.pub").write_text(public_pem(HostKey.generate("ed448").public))
    return path


numbers = itertools.count()


def outcome(folder, text: str, **options):
    """The bytes of each file, the counts and the warnings; or the mistakes."""
    (folder / "hosts.csv").write_text(text, encoding="utf-8", newline="")
    out = folder / f"out{next(numbers)}"
    try:
        made = generate(Inventory(folder / "hosts.csv"), out, 7, **options)
    except ConfigError as error:
        assert list(out.iterdir()) == []
        return error.problems
    return [path.read_bytes() for path in made.files], made.hosts, made.records, made.warnings


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows, max_size=3))
def test_the_short_way_writes_the_same_bytes_as_the_long_way(folder, hosts):
    """Whatever a row holds: the same files, or the same mistakes in the same order."""
    text = table(hosts)
    assert outcome(folder, text) == outcome(folder, text, plain=False)


ADDRESSES = st.one_of(
    st.integers(0, 2**16 - 1).map(lambda n: f"198.51.{n >> 8}.{n & 255}"),
    st.integers(0, 255).map(lambda n: f"192.0.3.{n}"),  # a quarter of them by RFC 2317
    st.ip_addresses(v=6, network="2001:db8::/32").map(str),
    st.ip_addresses(v=6, network="2001:db8::f000:0:0:0/68").map(str),  # the one zone, beside the other
)
KEYS = [
    ("", ""),
    (ED, ""),
    (EC, "ipseckey"),
    (RSA, ""),
    (RSA, "ipseckey txt"),
    (f"{ED};{RSA}", "txt;ipseckey"),
    (RSA, "txt"),
]
good_rows = st.builds(
    lambda name, addresses, key, gateway, precedence: (
        name,
        " ".join(addresses),
        key[0],
        gateway,
        str(precedence),
        key[1],
    ),
    st.from_regex(r"[a-z0-9_-]{1,9}(\.sub)?\.example", fullmatch=True),
    st.lists(ADDRESSES, max_size=2, unique=True),
    st.sampled_from(KEYS),
    st.sampled_from(["", "self", "none", "192.0.2.1", "2001:db8::1", "gw.example"]),
    st.integers(0, 255),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(good_rows, min_size=1, max_size=4))
def test_good_rows_are_the_same_both_ways(folder, hosts):
    """Every kind of record and gateway, networks with one zone and with several."""
    made = outcome(folder, table(hosts))
    assert isinstance(made, tuple), made
    assert made == outcome(folder, table(hosts), plain=False)


def test_the_short_way_takes_the_usual_rows(folder, monkeypatch):
    """None of them goes the long way: else the tests above would compare it with itself."""
    hosts = [
        (f"h{n}.example", f"198.51.100.{n} 192.0.3.{n} 2001:db8::{n:x}", key, gateway, "", records)
        for n, ((key, records), gateway) in enumerate(itertools.product(KEYS, ["", "none", "gw.example"]), 1)
    ]
    (folder / "hosts.csv").write_text(table(hosts), newline="")
    monkeypatch.setattr(Inventory, "host", None)  # the long way is closed
    assert generate(Inventory(folder / "hosts.csv"), folder / "short", 7).hosts == len(hosts) + 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(good_rows, min_size=1, max_size=4))
def test_every_line_is_what_dnspython_would_write(folder, hosts):
    """Each rdata, read by dnspython and rendered by it, is the text that stands in the file."""
    made = outcome(folder, table(hosts))
    assert isinstance(made, tuple)
    for content in made[0]:
        for line in content.decode("ascii").splitlines()[2:]:
            _owner, _class, kind, text = line.split(" ", 3)
            rdata = dns.rdata.from_text(dns.rdataclass.IN, kind, text, dns.name.root, relativize=False)
            rendered = rdata.to_text() if kind != "IPSECKEY" else rdata.to_text(chunksize=0)
            assert text.split() == rendered.split() or kind == "SOA"


def test_any_order_and_a_full_buffer_lose_nothing(folder, monkeypatch):
    """Rows that jump between zones, written in many small pieces, give the same bytes as in one."""
    hosts = [
        (f"h{n}.example", f"198.51.{n * 7 % 256}.{n % 256} 192.0.2.{n}", ED, "", "", "") for n in range(100)
    ]
    whole = outcome(folder, table(hosts))
    monkeypatch.setattr(zonefile, "BUFFERED", 100)
    monkeypatch.setattr(zonefile, "BUFFERED_OF_ZONE", 0)
    assert outcome(folder, table(hosts)) == whole
    assert isinstance(whole, tuple)
    assert whole[1] == 101


def test_an_interrupted_run_leaves_the_old_files(folder):
    """Ctrl-C between two hosts: no temporary file, and the zone of the last run untouched."""
    hosts = [(f"h{n}.example", f"198.51.{n >> 8}.{n & 255}", ED, "", "", "") for n in range(3000)]
    (folder / "hosts.csv").write_text(table(hosts[:10]))
    out = folder / "interrupted"
    generate(Inventory(folder / "hosts.csv"), out, 7)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (folder / "hosts.csv").write_text(table(hosts))

    def interrupt(position: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(Inventory(folder / "hosts.csv"), out, 8, interrupt)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_ended_leaves_nothing(tmp_path, number):
    """By Ctrl-C or by `kill`, while a zone file is half-made."""
    write_inventory(tmp_path / "hosts.csv", 200_000, ipv6=False, shuffled=False)
    out = tmp_path / "out"
    # A shell that starts tests beside itself has them ignore SIGINT
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from oepy.cli import main; "
    )
    code += f"main(['zone', 'generate', '{tmp_path}/hosts.csv', '-o', '{out}'])"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (out.exists() and list(out.glob(".db.*"))):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(20) != 0
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ('a.example,192.0.2.1,"4 A\n', "line 3: no CSV"),
        ("a.example,192.0.2.1,,,,,other.example,\n", "line 3: zones differs"),
        ("a.example,192.0.2.1,,,,,,,\n", "line 3: more cells"),
        ("b.elsewhere,203.0.113.1\n", "line 3: b.elsewhere. and its addresses are outside"),
    ],
)
def test_mistakes_of_a_table_have_their_line(folder, rows, word):
    """What only a CSV can do wrong."""
    found = outcome(folder, table([]).replace("\r\n", "\n") + rows)
    assert isinstance(found, list)
    assert any(problem.startswith(word) for problem in found)


def test_a_million_mistakes_are_a_thousand(folder):
    """The list of mistakes has a bound."""
    found = outcome(folder, table([("a..b", "", "", "", "", "")] * 1500))
    assert isinstance(found, list)
    assert len(found) == 1000
