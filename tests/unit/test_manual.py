"""Manual SAs and policies: what is accepted, what is refused with which mend, and what becomes of it."""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oepy.config import load, load_manual, parse
from oepy.errors import ConfigError, OepyError, UsageError
from oepy.interfaces import Way
from oepy.manual.changes import changed, merged
from oepy.manual.checks import read_manual
from oepy.manual.model import NOTHING, ManualSet, Selector
from oepy.manual.pairing import configured_rules, pair_up
from oepy.manual.presenting import policy_mapping, sa_mapping, sa_view, template_from_text
from oepy.manual.reading import Problem
from oepy.model import Authenticated, TrafficSelector, Verdict
from tests.fakes import manual

A, B = "192.0.2.1", "192.0.2.2"
A6, B6 = "2001:db8::1", "2001:db8::2"


def no_files(name: str) -> bytes:
    raise OepyError(f"{name} does not exist")


def read(section: dict[str, Any]) -> ManualSet:
    found, problems = read_manual(section, no_files)
    assert problems == []
    return found


def refused(section: object) -> list[Problem]:
    return read_manual(section, no_files)[1]


def texts(section: object) -> str:
    return "\n".join(f"{'.'.join(map(str, item.path))}: {item.text}" for item in refused(section))


def test_a_whole_section() -> None:
    """Both directions of a tunnel; what is read and written again is the same."""
    section = manual.section(A, B)
    found = read(section)
    assert [sa.spi for sa in found.sas] == [0x1001, 0x1002]
    again = {
        "sas": [sa_mapping(sa) for sa in found.sas],
        "policies": [policy_mapping(policy) for policy in found.policies],
    }
    assert read(again) == found


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"spi": "255"}, "reserved"),
        ({"spi": "0x100000000"}, "not within"),
        ({"dst": B6}, "two families"),
        ({"src": "0.0.0.0"}, "names no host"),
        ({"src": "224.0.0.1"}, "multicast"),
        ({"protocol": "ipcomp"}, "none of esp, ah"),
        ({"mode": "beet"}, "none of tunnel, transport"),
        ({"encryption": "aes512"}, "known are aes128"),
        ({"encryption": "des"}, "broken"),
        ({"encryption": "3des", "encryption_key": manual.key(1, 24)}, "allow_weak"),
        ({"integrity": "md5"}, "broken"),
        ({"encryption": "aes256gcm16"}, "is an AEAD"),
        ({"encryption_key": manual.key(1, 16)}, "wants a key of 32 bytes (256 bits), this one has 16"),
        ({"encryption_key": manual.key(1, 16)}, "would fit aes128"),
        ({"encryption_key": "0x123"}, "even number"),
        ({"encryption_key": "secret"}, "0x and an even number"),
        ({"encryption_key": None}, "needs a key"),
        ({"encryption_key_file": "x"}, "keep one of both"),
        ({"encryption_key": None, "encryption_key_file": "x"}, "does not exist"),
        ({"integrity": None, "integrity_key": None}, "ESP needs encryption and integrity"),
        ({"aead": "aes256gcm16"}, "an AEAD does this, too"),
        ({"protocol": "ah", "encap": None}, "AH does not encrypt"),
        ({"esn": "true"}, "replay_window"),
        ({"esn": "maybe"}, "neither true nor false"),
        ({"replay_window": "5000"}, "not within 0 to 4096"),
        ({"reqid": "70000"}, "not within"),
        ({"lifetime": {"soft_bytes": 10, "hard_bytes": 5}}, "comes after"),
        ({"lifetime": {"years": 1}}, "unknown key"),
        ({"encap": {"sport": 0}}, "not within 1 to 65535"),
        ({"colour": "blue"}, "unknown key; known here are src"),
    ],
)
def test_mistakes_of_an_sa(changes: dict[str, Any], part: str) -> None:
    """Each is named with its field and how to mend it; a key is never in the text."""
    sa = {**manual.sa(A, B, 0x1001), **changes}
    found = texts({"sas": [{name: value for name, value in sa.items() if value is not None}]})
    assert part in found
    assert all(manual.key(seed)[4:40] not in found for seed in (1, 0x1001, 0x1008))


def test_static_keys_and_counters() -> None:
    """An AEAD with a key that outlives a restart repeats nonces (RFC 8221 §5): only where it is asked for."""
    sa = manual.sa(A, B, 0x1001, encryption=None, encryption_key=None, integrity=None, integrity_key=None)
    sa |= {"aead": "aes256gcm16", "aead_key": manual.key(1, 36)}
    assert "outlive a restart" in texts({"sas": [sa]})
    (found,) = read({"sas": [{**sa, "allow_weak": True}]}).sas
    assert (found.encryption, found.integrity) == ("aes256gcm16", "")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"src": "192.0.2.1/24"}, "write 192.0.2.0/24"),
        ({"src": "host.example"}, "is no prefix"),
        ({"dst": B6}, "two families"),
        ({"direction": "both"}, "none of in, out, fwd"),
        ({"sport": 80}, "a port needs a protocol"),
        ({"protocol": "icmp", "dport": 80}, "a port needs a protocol"),
        ({"protocol": "http"}, "is no protocol"),
        ({"action": "block"}, "uses no SA"),
        ({"template": None}, "is missing"),
        ({"templates": [{}] * 7, "template": None}, "1 to 6"),
        ({"template": {"protocol": "esp", "mode": "tunnel"}}, "needs both its ends"),
        ({"template": {"protocol": "esp", "mode": "tunnel", "src": A, "dst": B6}}, "two families"),
        (
            {"template": {"protocol": "esp", "mode": "tunnel", "src": A, "dst": B, "level": "unique"}},
            "none of require, use",
        ),
        ({"priority": 0}, "not within 1 to"),
    ],
)
def test_mistakes_of_a_policy(changes: dict[str, Any], part: str) -> None:
    """Each is named with its field and how to mend it."""
    policy = {
        key: value for key, value in {**manual.policies(A, B)[0], **changes}.items() if value is not None
    }
    assert part in texts({"sas": manual.sas(A, B), "policies": [policy]})


def test_mistakes_between_entries() -> None:
    """A reused SPI, the same policy twice, one that hides another, one without a plain order, one without SA."""
    twice = [*manual.sas(A, B), manual.sa("192.0.2.9", B, 0x1001)]
    assert "is the one of sas[0]" in texts({"sas": twice})
    other_way = [manual.sa(A, B, 0x1001), manual.sa(B, A, 0x1001)]
    assert refused({"sas": other_way}) == []

    def block(src: str, dst: str, **more: Any) -> dict[str, Any]:
        return {"direction": "out", "src": src, "dst": dst, "action": "block", **more}

    same = [block(A, B), block(A, B, priority=7)]
    assert "the same direction and selector as policies[0]" in texts({"policies": same})
    hidden = [block("192.0.2.0/24", "10.0.0.0/8", priority=5), block(A, "10.1.0.0/16", priority=9)]
    assert "policies.1.priority: never gets a packet" in texts({"policies": hidden})
    unclear = [block("192.0.2.0/24", "10.1.0.0/16"), block("192.0.0.0/16", "10.1.1.0/24")]
    assert "at the same priority" in texts({"policies": unclear})
    nested = [block("192.0.2.0/24", "10.0.0.0/8"), block(A, "10.1.0.0/16"), block(A, "10.2.0.0/16")]
    assert refused({"policies": nested}) == []
    assert "no SA is esp tunnel" in texts({"policies": manual.policies(A, B)})
    wrong_mode = {"sas": manual.sas(A, B, mode="transport"), "policies": manual.policies(A, B)}
    assert "between these ends there is esp SA" in texts(wrong_mode)


def test_transport_without_ends_takes_the_hosts_of_the_selector() -> None:
    """The SA must be between hosts of the selector, with the template's reqid."""
    transport = {"mode": "transport"}
    section = {
        "sas": manual.sas(A, B, mode="transport"),
        "policies": manual.policies(A, B, template=transport),
    }
    assert refused(section) == []
    section["policies"] = manual.policies(A, B, template={**transport, "reqid": 4})
    assert "with reqid 4" in texts(section)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 70000)
    | st.sampled_from([A, B, A6, "10.0.0.0/8", "esp", "ah", "tunnel", "aes256", manual.key(1), "out", "in"])
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "sas",
                    "policies",
                    "src",
                    "dst",
                    "protocol",
                    "spi",
                    "mode",
                    "encryption",
                    "template",
                    "level",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(_VALUES)
@settings(max_examples=300)
def test_anything_is_a_set_or_a_list_of_mistakes(value: object) -> None:
    """Wrong types in any place never raise."""
    found, problems = read_manual(value, no_files)
    assert isinstance(found, ManualSet)
    assert problems or value in (None, "") or isinstance(value, dict)


# ---- the configuration file --------------------------------------------------------------------------------


def test_keys_of_a_file_that_others_can_read_are_refused(tmp_path: Path) -> None:
    """Inline keys need a file of mode 0600; key files have to be of mode 0600 themselves."""
    file = tmp_path / "oepy.yaml"
    file.write_text(json.dumps({"dns": {"resolvers": [A]}, "manual": manual.section(A, B)}))
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load(file)
    file.chmod(0o600)
    assert len(load(file).manual.sas) == 2
    section = manual.section(A, B, encryption_key=None, encryption_key_file="k")
    file.write_text(json.dumps({"manual": section}))
    with pytest.raises(ConfigError, match="does not exist"):
        load_manual(file)
    for content in (
        bytes(range(32)),
        bytes(range(32)).hex().encode() + b"\n",
        b"0x" + bytes(range(32)).hex().encode(),
    ):
        (tmp_path / "k").write_bytes(content)
        (tmp_path / "k").chmod(0o644)
        with pytest.raises(ConfigError, match="can be read by others"):
            load_manual(file)
        (tmp_path / "k").chmod(0o600)
        assert load_manual(file).sas[0].encryption_key.reveal() == bytes(range(32))


def test_an_unquoted_key_keeps_its_zeros() -> None:
    """YAML reads 0x00… as a number; a key must not lose what stands before it."""
    key = "0x" + "00" * 31 + "07"
    text = (
        "dns: {resolvers: [192.0.2.53]}\nmanual:\n  sas:\n"
        f"  - {{src: {A}, dst: {B}, protocol: ah, spi: 0x100, mode: transport, integrity: sha256,\n"
        f"     integrity_key: {key}}}\n"
    )
    (sa,) = parse(text, "/nowhere/oepy.yaml").manual.sas
    assert sa.integrity_key.reveal() == bytes(31) + b"\7"


def test_mistakes_stand_with_their_line_beside_all_others() -> None:
    """One list for the whole file, in the order of its lines."""
    text = f"manual:\n  sas:\n  - {{src: {A}, spi: 4}}\ndatapath: fast\n"
    with pytest.raises(ConfigError) as caught:
        parse(text)
    lines = [problem.split(":")[0] for problem in caught.value.problems]
    assert lines == sorted(lines)
    assert {"line 3", "line 4"} == set(lines)
    assert any("manual.sas[0].spi: 4 is reserved" in problem for problem in caught.value.problems)


def test_what_userland_lacks_is_found_where_it_is_configured() -> None:
    """With `datapath: tun` the file itself is wrong, at the line of the SA; otherwise the start says it."""
    text = (
        f"dns: {{resolvers: [{A}]}}\nmanual:\n  sas:\n"
        f"  - {{src: {A}, dst: {B}, protocol: ah, spi: 256, mode: transport, integrity: sha256,\n"
        f"     integrity_key: {manual.key(1)}}}\n"
    )
    assert len(parse(text).manual.sas) == 1
    with pytest.raises(ConfigError, match=r"line 4: manual\.sas\[0\]: AH is in the kernel only"):
        parse(text + "datapath: tun\n")


# ---- pairs for userland ------------------------------------------------------------------------------------


def test_policies_and_sas_become_a_pair() -> None:
    """Selectors from the policies, endpoints and keys from the SAs, each in its direction."""
    made = pair_up(
        read({"sas": manual.sas(A, B), "policies": manual.policies(A, B, near=A6, far="2001:db8:1::/48")})
    )
    assert (made.problems, made.incomplete, made.waiting) == ([], [], {})
    (pair,) = made.pairs
    assert (pair.spi_out, pair.spi_in, pair.authenticated) == (0x1001, 0x1002, Authenticated.MANUAL)
    assert (str(pair.local), str(pair.remote)) == (f"{A}:4500", f"{B}:4500")
    assert "0x" + pair.keys_out.encryption.reveal().hex() == manual.key(0x1001)
    assert "0x" + pair.keys_in.integrity.reveal().hex() == manual.key(0x1002 + 7)
    assert pair.local_ts == (TrafficSelector.of(ip_address(A6)),)
    assert str(pair.remote_ts[0]) == "2001:db8:1::/48"
    assert pair.replay_window == 0


def test_what_userland_cannot_do_is_said() -> None:
    """AH, no encapsulation, kernel's algorithms, several templates, unlike directions, SAs shared askew."""

    def problems(section: dict[str, Any]) -> str:
        made = pair_up(read(section))
        return "\n".join(made.problems + made.incomplete)

    policies = manual.policies(A, B)
    assert "UDP only" in problems({"sas": manual.sas(A, B, encap=None), "policies": policies})
    ah = manual.sas(A, B, protocol="ah", encap=None, encryption=None, encryption_key=None)
    assert "AH is in the kernel only" in problems({"sas": ah})
    xcbc = manual.sas(A, B, integrity="aesxcbc", integrity_key=manual.key(1, 16))
    assert "aesxcbc is in the kernel only" in problems({"sas": xcbc, "policies": policies})
    unlike = [manual.sas(A, B)[0], manual.sas(A, B, replay_window=64)[1]]
    assert "differ in replay_window" in problems({"sas": unlike, "policies": policies})
    one_way = {"sas": manual.sas(A, B), "policies": policies[:1]}
    assert "needs an `in` policy" in problems(one_way)
    askew = [
        *manual.policies(A, B, near="10.1.0.0/24", far="10.2.0.0/24"),
        *manual.policies(A, B, near="10.1.1.0/24", far="10.2.1.0/24"),
    ]
    assert "give each its own reqid" in problems({"sas": manual.sas(A, B), "policies": askew})


def test_rules_for_the_trap() -> None:
    """In the order of priority; a policy without SA stays shut where it is required, and is clear where not."""
    section = manual.section(A, B)
    section["policies"] += [
        {"direction": "out", "src": A, "dst": B, "protocol": "udp", "dport": 53, "action": "bypass"},
        {"direction": "fwd", "src": "10.0.0.0/8", "dst": A, "action": "block"},
    ]
    found = read(section)
    rules = configured_rules(
        found, frozenset({Selector(*(found.policies[0].selector.src, found.policies[0].selector.dst))})
    )
    assert [(rule.way, rule.verdict, rule.required) for rule in rules] == [
        (Way.OUT, Verdict.CLEAR, False),
        (Way.OUT, Verdict.PRIVATE, True),
        (Way.IN, Verdict.BLOCK, True),
        (Way.FORWARD, Verdict.BLOCK, True),
    ]
    use = read({"sas": manual.sas(A, B), "policies": manual.policies(A, B, template={"level": "use"})})
    assert [rule.verdict for rule in configured_rules(use, frozenset())] == [Verdict.CLEAR] * 2
    assert {rule.verdict for rule in configured_rules(found, None)} == {Verdict.CLEAR, Verdict.BLOCK}


# ---- changes -----------------------------------------------------------------------------------------------


def test_changes_are_whole_or_nothing() -> None:
    """Adding, deleting and flushing; mistakes raise with the mend and leave all as it was."""
    now = NOTHING
    for entry in manual.sas(A, B):
        now = changed(now, "sa-add", entry, no_files)
    with pytest.raises(UsageError, match="take another SPI"):
        changed(now, "sa-add", manual.sas(A, B)[0], no_files)
    with pytest.raises(UsageError, match="no SA is"):
        changed(now, "policy-add", manual.policies(A, "192.0.2.77")[0], no_files)
    for policy in manual.policies(A, B):
        now = changed(now, "policy-add", policy, no_files)
    with pytest.raises(UsageError, match="same direction and selector"):
        changed(now, "policy-add", manual.policies(A, B)[0], no_files)
    with pytest.raises(OepyError, match="no manual esp SA") as caught:
        changed(now, "sa-delete", {"dst": B, "protocol": "esp", "spi": "0x9999"}, no_files)
    assert caught.value.exit_status == 1
    assert len(changed(now, "sa-delete", {"dst": B, "protocol": "esp", "spi": "4097"}, no_files).sas) == 1
    assert (
        changed(now, "policy-delete", {"direction": "in", "src": B, "dst": A}, no_files).policies
        == now.policies[:1]
    )
    assert changed(changed(now, "sa-flush", {}, no_files), "policy-flush", {}, no_files) == NOTHING
    with pytest.raises(UsageError, match="one of sa-add"):
        changed(now, "format-disk", {}, no_files)


def test_a_reload_keeps_what_commands_have_made() -> None:
    """Entries of the old configuration give way to the new one's; an added one in the way refuses the reload."""
    old = read({"sas": manual.sas(A, B)})
    with_command = changed(old, "sa-add", manual.sa(A, "192.0.2.9", 0x5000), no_files)
    new = read({"sas": [manual.sa(A, "192.0.2.8", 0x6000)]})
    assert {sa.spi for sa in merged(with_command, old, new).sas} == {0x5000, 0x6000}
    clash = read({"sas": [manual.sa(A, "192.0.2.9", 0x5000, replay_window=32)]})
    with pytest.raises(UsageError, match="in the way"):
        merged(with_command, old, clash)
    assert merged(with_command, old, read({"sas": [manual.sa(A, "192.0.2.9", 0x5000)]})).sas[0].spi == 0x5000


def test_views_hide_keys() -> None:
    """Lists show algorithm and key length alone; so does `repr`."""
    (sa, _) = read({"sas": manual.sas(A, B)}).sas
    shown = json.dumps(sa_view(sa)) + repr(sa)
    assert '"encryption_key_bits": 256' in shown
    assert manual.key(0x1001)[2:] not in shown


@pytest.mark.parametrize(
    "text", ["esp", "esp/tunnel/a/require", "esp/tunnel/a-b/default", "esp/transport//unique", "a/b/c-d/e"]
)
def test_template_texts_are_refused_with_the_form(text: str) -> None:
    """setkey's form, without what depends on a system's setting."""
    with pytest.raises(ValueError, match=r"write|like"):
        template_from_text(text)


_NETWORKS = st.sampled_from(
    ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.2.0.0/16", "10.1.2.3/32"]
)
_POLICIES = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(["out", "in"]),
        "src": _NETWORKS,
        "dst": _NETWORKS,
        "action": st.just("block"),
        "priority": st.integers(1, 3),
        "protocol": st.sampled_from(["tcp", "udp"]),
        "dport": st.sampled_from(["any", "80"]),
    }
)


@given(st.lists(_POLICIES, max_size=8))
@settings(max_examples=300)
def test_overlaps_are_those_that_comparing_all_with_all_finds(entries: list[dict[str, Any]]) -> None:
    """The sweep compares few of them, and misses none that is without a plain order."""
    policies = [read({"policies": [entry]}).policies[0] for entry in entries]
    expected: set[int] = set()
    for two, second in enumerate(policies):
        for one, first in enumerate(policies[:two]):
            if first.direction != second.direction or not first.selector.meets(second.selector):
                continue
            if first.selector == second.selector or first.priority == second.priority:
                expected.add(two)
            else:
                (_, front), (late, behind) = sorted(
                    ((one, first), (two, second)), key=lambda item: item[1].priority
                )
                if front.selector.covers(behind.selector):
                    expected.add(late)
    assert {problem.path[1] for problem in refused({"policies": entries})} == expected


def test_the_example_of_the_docs_is_a_configuration(tmp_path: Path) -> None:
    """The YAML in docs/manual-keying.md is accepted as it stands, in userland as well."""
    page = (Path(__file__).parents[2] / "docs" / "manual-keying.md").read_text()
    example = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "keys").mkdir()
    for name in ("ab.enc", "ab.auth", "ba.enc", "ba.auth"):
        (tmp_path / "keys" / name).touch(mode=0o600)
        (tmp_path / "keys" / name).write_text(manual.key(len(name)))
    file = tmp_path / "oepy.yaml"
    file.write_text(f"dns: {{resolvers: [{A}]}}\ndatapath: tun\n{example}")
    assert [len(load(file).manual.sas), len(load(file).manual.policies)] == [2, 3]
