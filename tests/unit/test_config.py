"""Configuration: an empty file works, every mistake is found at once and says line, path and mend."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.config import load, parse, parse_rule
from oepy.configfile import system_resolvers
from oepy.errors import ConfigError
from oepy.keys import HostKey
from oepy.model import IpAddress, PolicyGroup
from oepy.policy import NO_PREFIXES, PrefixSet
from tests.fakes.certificates import DNS, IP, Holder, pem

RESOLVER = "dns: {resolvers: [192.0.2.53]}\n"


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return caught.value.problems


def test_an_empty_file_is_a_working_configuration() -> None:
    """Defaults: private-or-clear with everybody, clear after failed IKE, insecure keys ignored."""
    config = parse(RESOLVER)
    assert config.default_group is PolicyGroup.PRIVATE_OR_CLEAR
    assert not config.after_failed_ike_blocks
    assert not config.insecure_keys
    assert config.key_log is None


def test_all_mistakes_are_listed_with_their_lines() -> None:
    """One run shows every mistake, in the order of the file."""
    found = problems(
        "policy:\n"
        "  default: privte\n"
        "  groops: {}\n"
        "  groups:\n"
        "    private: [10.0.0.1/8]\n"
        "    clear: [192.0.2.0/24]\n"
        "    block: [192.0.2.0/24, tcp/70000]\n"
        "dns:\n"
        "  resolvers: [ns.example]\n"
        "  trust_anchors: [/does/not/exist]\n"
        "datapath: kernel\n"
    )
    assert [line.split(":")[0] for line in found] == [f"line {n}" for n in (2, 3, 5, 7, 7, 9, 10, 11)]
    text = "\n".join(found)
    for part in (
        "did you mean 'groups'",
        "write 10.0.0.0/8",
        "stands in clear too",
        "port must be",
        "no file",
    ):
        assert part in text


def test_negative_trust_anchors_are_names_of_zones() -> None:
    """Made absolute; what is no name is a mistake with its line."""
    config = parse(
        "dns: {resolvers: [192.0.2.53], negative_trust_anchors: [broken.example, 2.0.192.in-addr.arpa.]}"
    )
    assert config.negative_trust_anchors == ("broken.example.", "2.0.192.in-addr.arpa.")
    (problem,) = problems("dns:\n  negative_trust_anchors: [a..b]\n")
    assert problem.startswith("line 2")
    assert "no zone" in problem


@pytest.mark.parametrize("text", ["a: [b", "- x", "policy: {default: clear}\npolicy: {}", "'"])
def test_what_is_no_mapping_or_no_yaml_is_refused(text: str) -> None:
    """Broken YAML, lists and keys that stand twice each give a line."""
    assert all(problem.startswith("line ") for problem in problems(text))


@pytest.mark.parametrize(
    ("section", "mend"),
    [
        ("connections: {office: {version: 1}}", "IKEv1 is not in this version"),
        ("secrets: [{type: eap}]", "one of ike"),
        ("control: {dashboard: '127.0.0.1:1'}", "no dashboard"),
    ],
)
def test_what_this_version_lacks_is_said_and_not_ignored(section: str, mend: str) -> None:
    """A section that would have no effect is a mistake, not a silent nothing."""
    assert mend in problems(RESOLVER + section)[0]


def test_rules_of_a_group() -> None:
    """Prefixes, protocols with and without a port, and both families where no prefix stands."""
    both = parse_rule("udp/123", PolicyGroup.CLEAR)
    assert [(str(r.network), r.protocol, r.port) for r in both] == [("0.0.0.0/0", 17, 123), ("::/0", 17, 123)]
    (one,) = parse_rule("tcp/22 198.51.100.0/24", PolicyGroup.CLEAR)
    assert (one.network, one.protocol, one.port) == (ip_network("198.51.100.0/24"), 6, 22)
    (address,) = parse_rule("2001:db8::1", PolicyGroup.PRIVATE)
    assert address.network == ip_network("2001:db8::1/128")


def test_no_resolver_anywhere_is_a_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a resolver nothing can be looked up: that is said at the start."""
    monkeypatch.setattr("oepy.config.RESOLV_CONF", tmp_path / "none")
    monkeypatch.setattr("oepy.config.system_resolvers", lambda: ())
    assert "name at least one address" in problems("")[0]


def test_resolv_conf_is_read_like_the_libc_does(tmp_path: Path) -> None:
    """Three name servers at most; lines without an address are passed over."""
    file = tmp_path / "resolv.conf"
    file.write_text("search x\nnameserver 192.0.2.1\nnameserver bad\nnameserver ::1\n#nameserver 1.1.1.1\n")
    assert [str(address) for address in system_resolvers(file)] == ["192.0.2.1", "::1"]


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    """-c FILE with no such file is an error; only the default path may be missing."""
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "missing.yaml")


@given(st.text(max_size=200))
def test_any_text_is_either_a_configuration_or_a_list_of_mistakes(text: str) -> None:
    """No input makes the reader fail in another way."""
    try:
        parse(text)
    except ConfigError as error:
        assert error.problems


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70000) | st.text("abc./:", max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["policy", "groups", "dns", "resolvers", "private", "default", "trust_anchors", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["policy", "dns", "identity", "control", "datapath"]), _VALUES))
def test_any_structure_is_either_a_configuration_or_a_list_of_mistakes(data: object) -> None:
    """Wrong types in any place are mistakes with a line, never a crash."""
    import yaml

    try:
        parse(yaml.safe_dump(data))
    except ConfigError as error:
        assert all(problem.startswith("line ") for problem in error.problems)


# ---- certificates instead of keys in the DNS -----------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory with a host key, its certificate, that of another key, and the CA's."""
    root = Holder("Root")
    own = Holder("own", root, ca=False, alternatives=[DNS("alpha.example")])
    by_address = Holder("own", root, ca=False, alternatives=[IP(ip_address("192.0.2.10"))], key=own.key)
    HostKey(own.key).save(tmp_path / "host.key")
    for name, holder in {
        "own": own,
        "by_address": by_address,
        "other": Holder("other", root, ca=False, alternatives=[DNS("alpha.example")]),
        "ca": root,
    }.items():
        (tmp_path / f"{name}.pem").write_bytes(pem(holder))
    return tmp_path


def in_site(site: Path, certs: str = "", identity: str = "", certificates: str = "") -> str:
    own = f"identity: {{key: {site}/host.key, certs: [{certs}]{identity}}}\n" if certs else ""
    return f"{RESOLVER}{own}" + (f"policy: {{certificates: {certificates}}}\n" if certificates else "")


def test_who_is_asked_for_a_certificate_and_what_is_shown(site: Path) -> None:
    section = "{cacerts: [ca.pem], peers: [198.51.100.0/24, '2001:db8::/32']}"
    text = in_site(site, "own.pem", ", id: alpha.example", section)
    config = parse(text, str(site / "oepy.yaml"))
    for address, asked in (
        ("198.51.100.255", True),
        ("198.51.101.0", False),
        ("2001:db8:ffff::1", True),
        ("2001:db9::", False),
    ):
        assert (ip_address(address) in config.certified_peers) is asked
    vouching = config.connections.vouching
    assert vouching is not None
    assert vouching.remote.revocation == "ifuri"
    assert vouching.local.certs == (str(site / "own.pem"),)
    assert vouching not in config.connections.connections
    assert len(config.connections.certificates_of(vouching.remote.cacerts)) == 1
    assert parse(in_site(site, "by_address.pem"), str(site / "oepy.yaml")).certified_peers == NO_PREFIXES


@pytest.mark.parametrize(
    ("certs", "identity", "certificates", "place", "mend"),
    [
        ("other.pem", ", id: alpha.example", "", "identity.certs[0]", "another key than identity.key"),
        ("own.pem", "", "", "identity.certs[0]", "set identity.id to alpha.example"),
        ("own.pem", ", id: beta.example", "", "identity.certs[0]", "not for identity.id beta.example"),
        ("absent.pem", "", "", "identity.certs[0]", "absent.pem"),
        ("host.key", "", "", "identity.certs[0]", "host.key"),
        (
            "",
            "",
            "{cacerts: [absent.pem], peers: [192.0.2.0/24]}",
            "policy.certificates.cacerts[0]",
            "absent",
        ),
        (
            "",
            "",
            "{cacerts: [ca.pem], peers: [192.0.2.1/24]}",
            "policy.certificates.peers[0]",
            "192.0.2.0/24",
        ),
        ("", "", "{cacerts: [ca.pem], peers: []}", "policy.certificates.peers", "at least 1"),
        ("", "", "{peers: [192.0.2.0/24]}", "policy.certificates.cacerts", "required"),
        (
            *("", "", "{cacerts: [ca.pem], peers: [192.0.2.0/24], revocation: no}"),
            *("policy.certificates.revocation", "strict"),
        ),
    ],
)
def test_what_is_wrong_with_certificates_is_said(
    site: Path, certs: str, identity: str, certificates: str, place: str, mend: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(in_site(site, certs, identity, certificates), str(site / "oepy.yaml"))
    (problem,) = caught.value.problems
    assert problem.startswith("line 2: ")
    assert f"{place}: " in problem
    assert mend in problem


def test_a_certificate_without_its_key_is_refused(site: Path) -> None:
    (site / "host.key").unlink()
    with pytest.raises(ConfigError) as caught:
        parse(in_site(site, "own.pem", ", id: alpha.example"), str(site / "oepy.yaml"))
    assert "the certificate's key is not there" in str(caught.value.problems)


@given(
    st.lists(st.ip_addresses().flatmap(lambda a: st.integers(0, a.max_prefixlen).map(lambda n: (a, n)))),
    st.ip_addresses(),
)
def test_a_set_of_prefixes_holds_what_any_of_them_holds(
    pairs: list[tuple[IpAddress, int]], one: IpAddress
) -> None:
    networks = [ip_network((address, length), strict=False) for address, length in pairs]
    found = PrefixSet(networks)
    assert (one in found) == any(one in network for network in networks)
    assert all(network.network_address in found for network in networks)
