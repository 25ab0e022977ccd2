"""What `zone check` finds in a file and in validated answers: each kind of fault, and nothing in a good zone."""

from __future__ import annotations

import json

import dns.name
import dns.rdatatype
import pytest
from click.testing import CliRunner

from oepy.cli import main
from oepy.dns.inventory import Inventory
from oepy.dns.zonecheck import check_zone, read_file
from oepy.dns.zonefile import generate
from oepy.dns.zonelive import check_live
from oepy.errors import ConfigError
from oepy.keys import HostKey, encode
from tests.fakes.signed_tree import SignedTree, name

ED = f"4 {encode(HostKey.generate('ed25519').public)}"
OTHER = encode(HostKey.generate("ed25519").public)
YAML = f"""\
zones: [example, 2.0.192.in-addr.arpa, 64/26.2.0.192.in-addr.arpa, sub.example]
name_servers: [ns1.example 192.0.2.53]
hosts:
  - {{name: alpha.example, addresses: [192.0.2.10], keys: ["{ED}"]}}
  - {{name: beta.example, addresses: [192.0.2.70], keys: ["{ED}"], gateway: alpha.example}}
  - {{name: gamma.sub.example, addresses: [192.0.2.11], keys: ["{ED}"], gateway: 192.0.2.10}}
"""
ZONES = ["db.example", "db.2.0.192.in-addr.arpa", "db.64-26.2.0.192.in-addr.arpa", "db.sub.example"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hosts.yaml").write_text(YAML)
    generate(Inventory(tmp_path / "hosts.yaml"), tmp_path, 7)
    return tmp_path


def inventory(folder) -> Inventory:
    return Inventory(folder / "hosts.yaml")


@pytest.mark.parametrize("file", ZONES)
def test_what_was_generated_has_no_fault(folder, file):
    """Every zone file of an inventory against that inventory."""
    checked = check_zone(read_file(folder / file), inventory(folder))
    assert (checked.problems, checked.kinds) == ([], {})


@pytest.mark.parametrize(
    ("replace", "by", "kind", "word"),
    [
        ("alpha IN A 192.0.2.10\n", "", "missing", "alpha.example. A: is missing"),
        (
            "alpha IN A 192.0.2.10\n",
            "",
            "gateway",
            "gateway alpha.example. lies in this zone and has no address",
        ),
        (
            "alpha IN A 192.0.2.10",
            "alpha IN A 192.0.2.99",
            "wrong",
            "is 192.0.2.99, the inventory says 192.0.2.10",
        ),
        (ED[2:], OTHER, "wrong", "the inventory says 10 0 4 ."),
        (
            "@ IN SOA",
            f"x IN IPSECKEY 10 0 4 . {OTHER}\n@ IN SOA",
            "surplus",
            "x.example. IPSECKEY: is not in the inventory",
        ),
        ("@ IN SOA", f"x IN IPSECKEY 10 1 4 127.0.0.1 {OTHER}\n@ IN SOA", "gateway", "no other host reaches"),
        ("@ IN SOA", f"x IN IPSECKEY 10 3 4 . {OTHER}\n@ IN SOA", "gateway", "root"),
        ("@ IN SOA", "x IN IPSECKEY 10 0 4 . AAAA\n@ IN SOA", "unusable", "x.example. IPSECKEY: EdDSA key"),
        ("@ IN SOA", "x IN IPSECKEY 10 0 9 . AAAA\n@ IN SOA", "unusable", "unknown key algorithm 9"),
        ("@ IN SOA", 'x IN TXT "X-IPsec-Gateway(1)=192.0.2.1 AAAA"\n@ IN SOA', "unusable", "old form"),
        (
            "@ IN SOA",
            f"x.sub IN IPSECKEY 10 0 4 . {OTHER}\n@ IN SOA",
            "delegation",
            "below the delegation of sub.example.",
        ),
        ("ns1 IN A 192.0.2.53\n", "", "delegation", "ns1.example. has no address here"),
        ("@ IN NS ns1.example.\n", "", "delegation", "example. NS: is missing"),
        (
            "sub IN NS ns1.example.",
            "sub IN NS ns9.example.net.",
            "wrong",
            "sub.example. NS: is ns9.example.net.",
        ),
    ],
    ids=lambda text: text.replace(OTHER, "OTHER").replace(ED[2:], "ED"),  # the same in every process
)
def test_each_fault_of_a_zone_is_found(folder, replace, by, kind, word):
    """A good zone with one thing changed."""
    path = folder / "db.example"
    text = path.read_text()
    assert replace in text
    path.write_text("$ORIGIN example.\n" + text.replace(replace, by, 1))
    checked = check_zone(read_file(path), inventory(folder))
    assert checked.kinds.get(kind)
    assert any(word in problem for problem in checked.problems), checked.problems


def test_others_records_are_no_fault(folder):
    """A zone may hold more than the inventory knows, as long as it is no key."""
    with (folder / "db.example").open("a") as stream:
        stream.write('www IN A 192.0.2.80\nalpha IN TXT "v=spf1 -all"\n@ IN MX 10 www\n')
    assert check_zone(read_file(folder / "db.example"), inventory(folder)).kinds == {}


def test_an_inventory_without_the_zone_is_refused(folder):
    """To compare with nothing would list every record as surplus."""
    (folder / "db.net").write_text(
        (folder / "db.example").read_text().replace("$ORIGIN example.", "$ORIGIN net.")
    )
    records = read_file(folder / "db.net")
    with pytest.raises(ConfigError, match="none of its zones"):
        check_zone(records, inventory(folder))


def test_the_command_tells_with_its_exit_status(folder):
    """0, 1 and 2; the JSON form counts by kind."""
    runner = CliRunner()
    arguments = [
        "zone",
        "check",
        str(folder / "db.example"),
        "--inventory",
        str(folder / "hosts.yaml"),
        "--json",
    ]
    good = runner.invoke(main, arguments)
    assert (good.exit_code, json.loads(good.output)["counts"]) == (0, {})
    path = folder / "db.example"
    path.write_text(path.read_text().replace("alpha IN A 192.0.2.10", "alpha IN A 192.0.2.99"))
    bad = runner.invoke(main, arguments)
    assert (bad.exit_code, json.loads(bad.output)["counts"]) == (1, {"wrong": 1})
    assert runner.invoke(main, ["zone", "check", "a..b"]).exit_code == 2


# ---- live ------------------------------------------------------------------------------------------------


def live(folder, *, signed: bool = True, leave_out: str = "") -> SignedTree:
    """The zone `example` of the inventory, behind a signed root."""
    tree = SignedTree()
    zone = tree.add("example.", signed=signed)
    zone.records.pop((name("example."), int(dns.rdatatype.NS)))
    for owner, rdatas in read_file(folder / "db.example").sets.values():
        for rdata in rdatas:
            if rdata.rdtype != dns.rdatatype.SOA and "sub" not in str(owner) and str(owner) != leave_out:
                zone.add_rdata(str(owner), rdata)
    return tree


def without_sub(folder) -> Inventory:
    lines = [line for line in YAML.splitlines() if "gamma" not in line]
    (folder / "live.yaml").write_text("\n".join(lines).replace(", sub.example]", "]"))
    return Inventory(folder / "live.yaml")


async def test_a_signed_zone_that_is_as_the_inventory_says(folder):
    """Every record by the validator: nothing wrong."""
    checked = await check_live(live(folder).validator(), dns.name.from_text("example."), without_sub(folder))
    assert (checked.problems, checked.good) == ([], 2)


async def test_a_host_that_is_not_published(folder):
    """Address and key are missing, each named."""
    tree = live(folder, leave_out="beta.example.")
    checked = await check_live(tree.validator(), dns.name.from_text("example."), without_sub(folder))
    assert checked.kinds == {"missing": 2}
    assert all(problem.startswith("beta.example.") for problem in checked.problems)


async def test_an_unsigned_zone_is_told_once(folder):
    """oepy ignores its keys by default: one complaint for the zone, none for each record."""
    tree = live(folder, signed=False)
    checked = await check_live(tree.validator(), dns.name.from_text("example."), without_sub(folder))
    assert checked.kinds == {"insecure": 1}


async def test_a_zone_that_is_not_there(folder):
    """The parent's proven denial, in words."""
    checked = await check_live(live(folder).validator(), dns.name.from_text("nothing."))
    assert checked.problems == ["nothing. SOA: there is no such zone"]
