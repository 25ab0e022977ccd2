"""`oepy convert`: what each grammar says becomes configuration that the reader accepts, or an error at its line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from oepy.cli import main
from oepy.config import load_manual
from oepy.convert.drafts import Conversion
from oepy.convert.render import render
from oepy.convert.run import convert, detect
from oepy.errors import OepyError
from oepy.manual.model import ManualPolicy, ManualSa
from oepy.model import Secret
from tests.fakes.manual import key

A, B = "192.0.2.1", "192.0.2.2"


class Files:
    """Included files and key files by name."""

    def __init__(self, **content: str) -> None:
        self.content = {name.replace("_", "."): text for name, text in content.items()}

    def include(self, name: str, file: str) -> tuple[str, bytes]:
        if name not in self.content:
            raise OepyError(f"cannot read {name}")
        return name, self.content[name].encode()

    def key(self, name: str, file: str) -> bytes:
        return self.include(name, file)[1]


def run(
    text: str, kind: str | None = None, *, allow_weak: bool = False, files: Files | None = None
) -> Conversion:
    return convert([("f", text)], kind, files or Files(), allow_weak=allow_weak)


def good(text: str, kind: str | None = None, **options: object) -> tuple[list[ManualSa], list[ManualPolicy]]:
    done = run(text, kind, **options)  # type: ignore[arg-type]
    assert done.problems == []
    return [sa for _, sa in done.sas], [policy for _, policy in done.policies]


def bad(text: str, kind: str | None = None, **options: object) -> list[str]:
    done = run(text, kind, **options)  # type: ignore[arg-type]
    assert done.problems
    return done.problems


# ---- setkey ------------------------------------------------------------------------------------------------

ADD = f"add {A} {B} esp 0x1001 -m tunnel -E aes-cbc {key(1)} -A hmac-sha2-256 {key(2)};\n"
BACK = f"add {B} {A} esp 4098 -m tunnel -E aes-cbc {key(3)} -A hmac-sha2-256 {key(4)};\n"
OUT = f"spdadd 10.1.0.0/16 10.2.0.0/16 any -P out ipsec esp/tunnel/{A}-{B}/require;\n"


def test_setkey_sas_and_policies() -> None:
    """Everything that an SA may have, a policy each way, and its forwarded twin."""
    text = (
        "#!/usr/sbin/setkey -f\nflush; spdflush; # all anew\n"
        f"add -4n {A} {B} esp 0x1001 -m tunnel -u 7 -r 4 -f seq-pad -ls 100 -lh 200 -bs 10 -bh 20\n"
        f'  -E aes-cbc "0123456789abcdef"\n  -A hmac-sha2-512 {key(5, 64)} ;\n'
        f"add {B} {A} esp 4098 -m tunnel -u 7 -E null -A hmac-sha384 {key(4, 48)};\n"
        f"spdadd 10.1.0.0/16[any] 10.2.0.0/16 [80] tcp -P out ipsec esp/tunnel/{A}-{B}/unique:7;\n"
        f"spdadd 10.2.0.0/16[80] 10.1.0.0/16 tcp -P in ipsec esp/tunnel/{B}-{A}/unique:7;\n"
    )
    (out, back), policies = good(text)
    assert (out.mode, out.reqid, out.replay_window, out.encryption, out.integrity) == (
        *("tunnel", 7, 32),
        *("aes128", "sha512"),
    )
    assert out.encryption_key == Secret(b"0123456789abcdef")
    limits = out.lifetime
    assert (limits.soft_seconds, limits.hard_seconds, limits.soft_bytes, limits.hard_bytes) == (
        100,
        200,
        10,
        20,
    )
    assert (back.spi, back.encryption, len(back.encryption_key)) == (4098, "null", 0)
    assert [str(policy) for policy in policies] == [
        "policy out tcp 10.1.0.0/16 to 10.2.0.0/16[80]",
        "policy in tcp 10.2.0.0/16[80] to 10.1.0.0/16",
        "policy fwd tcp 10.2.0.0/16[80] to 10.1.0.0/16",
    ]
    assert policies[0].templates[0].reqid == 7


def test_setkey_state_commands_act_on_what_stood_before() -> None:
    """delete, deleteall and flush take away; update of a policy replaces; nothing after `exit` counts."""
    sas, _ = good(ADD + BACK + f"delete {A} {B} esp 0x1001;\n")
    assert [sa.spi for sa in sas] == [4098]
    sas, _ = good(ADD + BACK + f"deleteall {B} {A} esp;\n")
    assert [sa.spi for sa in sas] == [0x1001]
    ah = f"add {A} {B} ah 0x3000 -m transport -A hmac-sha256 {key(9)};\n"
    sas, policies = good(ADD + ah + OUT + "flush ah;\n")
    assert ([sa.protocol for sa in sas], len(policies)) == (["esp"], 1)
    sas, policies = good(ADD + OUT + "spdflush;\n")
    assert (len(sas), policies) == (1, [])
    sas, policies = good(
        ADD + OUT + "spdupdate 10.1.0.0/16 10.2.0.0/16 any -P out discard;\nexit;\nnonsense;\n"
    )
    assert [policy.action for policy in policies] == ["block"]
    _, policies = good(ADD + "spdadd 10.2.0.0/16 10.1.0.0/16 any -P in none;\n" + OUT)
    assert [policy.direction for policy in policies] == ["in", "fwd", "out"]
    sas, policies = good(
        ADD + "spdadd 10.2.0.0/16 10.1.0.0/16 any -P in none;\nspddelete 10.2.0.0/16 10.1.0.0/16 any -P in;\n"
    )
    assert policies == []


def test_setkey_order_and_priorities() -> None:
    """Where policies have packets in common the first one decides, or the one of the higher priority."""
    first = "spdadd 10.1.1.0/24 10.2.0.0/16 any -P out none;\n"
    _, policies = good(ADD + first + OUT)
    assert policies[0].priority < policies[1].priority
    problems = bad(ADD + OUT + first)
    assert any("f:3: never gets a packet: line 2" in problem for problem in problems)
    _, policies = good(ADD + OUT + first.replace("-P out none", "-P out prio high - 5 none"))
    assert policies[1].priority < policies[0].priority


def test_setkey_modes_and_udp() -> None:
    """An SA without a mode is what its policies demand; esp-udp has its ports in brackets."""
    plain = ADD.replace("-m tunnel ", "")
    (sa,), _ = good(plain + OUT)
    assert sa.mode == "tunnel"
    (sa,), _ = good(plain.replace("-E", "-m any -E"))
    assert sa.mode == "transport"
    (sa,), _ = good(ADD.replace(f"add {A} {B} esp ", f"add {A}[4500] {B}[4501] esp-udp "))
    assert sa.encap is not None
    assert (sa.encap.source_port, sa.encap.destination_port) == (4500, 4501)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("dump esp;", "only asks"),
        (f"get {A} {B} esp 1;", "only asks"),
        ("frobnicate;", "no command of setkey"),
        ("add host.example 192.0.2.2 esp 0x1001 -E null -A hmac-sha1 0x00;", "names are not looked up"),
        (ADD.replace("esp", "ipcomp"), "ipcomp is not in oepy"),
        (ADD.replace("esp", "esp-old"), "esp-old is not in oepy"),
        (ADD.replace(" esp ", " tcp "), "tcp is not in oepy"),
        (ADD.replace("-m tunnel", "-f zero-pad"), "pads by RFC 4303"),
        (ADD.replace("-m tunnel", "-C deflate"), "compression"),
        (ADD.replace("-m tunnel", "-ctx 1 1 x"), "is not in oepy"),
        (ADD.replace("aes-cbc", "des-cbc"), "is not in oepy"),
        (ADD.replace("aes-cbc", "twofish-cbc"), "is not in oepy"),
        (ADD.replace("hmac-sha2-256", "keyed-md5"), "is not in oepy"),
        (ADD.replace(key(1), key(1, 15)), "128, 192, 256 bits, this one has 120"),
        (ADD.replace(key(2), key(2, 20)), "wants a key of 32 bytes"),
        (ADD.replace(key(2), "plain"), "neither 0x"),
        (ADD.replace("0x1001", "12"), "reserved"),
        (ADD.replace("0x1001", "many"), "is no number"),
        (ADD.replace(f"-A hmac-sha2-256 {key(2)}", ""), "ESP without integrity"),
        (ADD + ADD, "is there already"),
        (f"delete {A} {B} esp 0x1001;", "no line before has added"),
        ("spddelete 10.1.0.0/16 10.2.0.0/16 any -P out;", "no line before has added"),
        (ADD + OUT + OUT, "is there already"),
        (OUT, "no SA is esp tunnel"),
        (ADD + OUT.replace("require", "default"), "level default"),
        (ADD + OUT.replace("require", "unique"), "unique:REQID"),
        (ADD + OUT.replace("ipsec esp", "ipsec ipcomp"), "ipcomp is not in oepy"),
        (ADD + OUT.replace("ipsec", "entrust"), "is not in oepy"),
        (ADD + OUT.replace("-P out", "-P sideways"), "is not one of in, out, fwd"),
        (ADD + OUT.replace("any -P", "icmp6 128,0 -P"), "type or key"),
        (ADD + OUT.replace("10.1.0.0/16 ", "10.1.0.0/16[http] "), "names are not looked up"),
        (ADD + OUT.replace("-P out", "-P out prio sometimes"), "is not like"),
        ("spdadd tagged 10.0.0.0/8 10.0.0.0/8 any -P out none;", "tags"),
        (ADD[:-2], "no end"),
        ('add "x', "has no end"),
        ("add " + "x " * 300, "more than 256 words"),
        (ADD.replace(";", " extra;"), "is not in oepy"),
    ],
)
def test_setkey_what_cannot_be_said_is_an_error(line: str, part: str) -> None:
    """With the file and the line, and never with a key in it."""
    problems = bad("\n" + line, "setkey")
    assert any(part in problem for problem in problems), problems
    assert all(re.match(r"f:\d+: ", problem) for problem in problems)
    assert not any(key(seed)[4:30] in problem for seed in (1, 2) for problem in problems)


def test_all_errors_at_once_in_the_order_of_lines() -> None:
    """One run shows every mistake."""
    problems = bad(f"dump;\n{ADD}get;\n{OUT.replace('esp', 'ipcomp')}", "setkey")
    assert [problem.split(":")[1] for problem in problems] == ["1", "3", "4"]


def test_weak_algorithms_want_a_word() -> None:
    """3DES and SHA-1 are converted with --allow-weak only, and that is said."""
    text = f"add {A} {B} esp 0x1001 -m transport -E 3des-cbc {key(1, 24)} -A hmac-sha1 {key(2, 20)};"
    assert "allow_weak" in bad(text)[0]
    (sa,), _ = good(text, allow_weak=True)
    assert sa.allow_weak
    assert "f:1: weak" in run(text, allow_weak=True).notes[0]
    assert "sha256_96" in run(ADD).notes[0]


# ---- OpenBSD -----------------------------------------------------------------------------------------------

ESP = f"esp from {A} to {B} spi 0x1001:0x1002 authkey {key(1)}:{key(2)} enckey {key(3, 16)}:{key(4, 16)}\n"
FLOW = f"flow esp from 10.1.0.0/16 to 10.2.0.0/16 peer {B}\n"


def test_openbsd_rules_and_flows() -> None:
    """Both directions of an SA by one rule, with OpenBSD's defaults; a flow gives out, in and fwd."""
    (out, back), policies = good(ESP + FLOW)
    assert (out.src, out.dst, out.spi, out.mode, out.encryption, out.integrity) == (
        *(back.dst, back.src),
        *(0x1001, "tunnel", "aes128", "sha256"),
    )
    assert "0x" + back.integrity_key.reveal().hex() == key(2)
    assert [(policy.direction, policy.templates[0].level) for policy in policies] == [
        ("out", "require"),
        ("in", "use"),
        ("fwd", "use"),
    ]
    assert str(policies[1].templates[0]) == f"esp/tunnel/{B}-{A}/use"


def test_openbsd_macros_lists_and_continuations() -> None:
    """Macros may hold lists; lists give every combination; a backslash joins lines."""
    text = (
        f'gw = "{B}" # the far end\nnets = "{{ 10.2.0.0/16, 10.3.0.0/16 }}"\n'
        + ESP.replace(B, "$gw").replace(" authkey", " \\\n  authkey")
        + "flow out from { 10.1.0.0/16 192.168.0.0/24 } to $nets peer $gw\n"
        + "flow from any to 2001:db8::/32 type bypass\n"
        + "flow in proto tcp from 10.9.0.0/16 port 80 to any type deny\n"
    )
    _, policies = good(text)
    assert [str(p.selector) for p in policies[:4]] == [
        "10.1.0.0/16 to 10.2.0.0/16",
        "10.1.0.0/16 to 10.3.0.0/16",
        "192.168.0.0/24 to 10.2.0.0/16",
        "192.168.0.0/24 to 10.3.0.0/16",
    ]
    assert str(policies[4].selector) == "::/0 to 2001:db8::/32"
    assert (policies[-2].action, policies[-2].selector.sport) == ("block", 80)


def test_openbsd_any_is_of_both_families() -> None:
    """`any` to `any` is two flows each way; beside an address it has that address's family."""
    mixed = "flow out from { 10.0.0.0/8 2001:db8::/32 } to { 192.0.2.1 2001:db8:1::1 } type deny\n"
    assert len(good(mixed)[1]) == 2
    assert "two families" in bad("flow out from 10.0.0.0/8 to 2001:db8::1 type deny\n")[0]
    _, policies = good("flow out from any to any type deny\nflow out from any to 2001:db8::1 type bypass\n")
    assert [str(policy.selector) for policy in policies] == [
        "0.0.0.0/0 to 0.0.0.0/0",
        "::/0 to ::/0",
        "::/0 to 2001:db8::1/128",
    ]


def test_openbsd_includes_and_key_files() -> None:
    """Included rules stand in their own file; key files hold hexadecimal digits, one for each direction."""
    files = Files(sub_conf=FLOW, a_key=key(1)[2:] + "\n", b_key=key(2)[2:], loop_conf='include "loop.conf"')
    text = ESP.replace(f"{key(1)}:{key(2)}", 'file "a.key:b.key"') + 'include "sub.conf"\n'
    (out, _), policies = good(text, files=files)
    assert "0x" + out.integrity_key.reveal().hex() == key(1)
    assert len(policies) == 3
    assert "cannot read none" in bad(ESP + 'include "none"\n')[0]
    assert "16 deep" in bad('include "loop.conf"\n', files=files)[0]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ike esp from any to any\n", "no manual keying"),
        (f"tcpmd5 from {A} to {B} spi 0x1000 authkey 0x00\n", "tcpmd5 rules are not in oepy"),
        (f"ipcomp from {A} to {B}\n", "ipcomp rules are not in oepy"),
        ("set skip on lo\n", "begins no rule"),
        (ESP.replace("spi 0x1001:0x1002 ", ""), "spi is missing"),
        (ESP.replace(f":{key(4, 16)}", ""), "has 1 keys for 2 SPIs"),
        (ESP.replace(f"enckey {key(3, 16)}:{key(4, 16)}", ""), "enckey is missing"),
        (ESP.replace(" authkey", " enc blowfish authkey"), "is not in oepy"),
        (ESP.replace(" authkey", " auth hmac-md5 authkey"), "broken"),
        (ESP.replace(" authkey", " enc aes-128-gmac authkey"), "is not in oepy"),
        (ESP.replace(" authkey", " enc aes-256 authkey"), "256 bits, this one has 128"),
        (ESP.replace(f"from {A}", "from gw.example"), "not looked up"),
        (ESP.replace(f"from {A}", "from 10.0.0.0/8"), "single address"),
        (ESP.replace("0x1001:", "0x1:"), "reserved"),
        (ESP + ESP, "is used in f:1 already"),
        (ESP.replace("esp", "ah", 1), "AH does not encrypt"),
        (ESP + FLOW.replace(f"peer {B}", ""), "peer is missing"),
        (ESP + FLOW.replace(f"peer {B}", "peer 192.0.2.9"), "no esp rule gives"),
        (ESP + FLOW.replace("\n", " type acquire\n"), "asks IKE"),
        (ESP + FLOW.replace("\n", " srcid me\n"), "not known here"),
        (ESP + FLOW.replace("10.1.0.0/16 ", "10.1.0.0/16 (1.2.3.4) "), "before NAT"),
        (ESP + FLOW + FLOW, "the same flow stands in f:2"),
        ("flow from { 10.1.0.0/16 to any\n", "has no end"),
        ("flow from {} to any\n", "is empty"),
        ("flow from $nets to any\n", "macro $nets is not defined"),
        ('x = "a\n', "no end in its line"),
        ("flow = 1\n", "cannot be the name of a macro"),
    ],
)
def test_openbsd_what_cannot_be_said_is_an_error(text: str, part: str) -> None:
    """With the file and the line, and never with a key in it."""
    problems = bad(text, "ipsec.conf")
    assert any(part in problem for problem in problems), problems
    assert all(re.match(r"f:\d+: ", problem) for problem in problems)
    assert not any(key(seed)[4:30] in problem for seed in (1, 2, 3, 4) for problem in problems)


def test_macros_cannot_blow_up() -> None:
    """Macros in macros are bounded in depth and in what they come to."""
    lines = ['a0 = "x x x x x x x x"'] + [f'a{n} = "{f"$a{n - 1} " * 8}"' for n in range(1, 14)]
    assert "more than 500000 words" in bad("\n".join(lines) + "\nflow from $a13 to any\n", "ipsec.conf")[0]
    assert "deep in each other" in bad('a = "$a"\nflow from $a to any\n', "ipsec.conf")[0]


# ---- both --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"), [(ADD + OUT, "setkey"), (ESP + FLOW, "ipsec.conf"), ("x\ny\n", None)]
)
def test_the_kind_is_found_out(text: str, kind: str | None) -> None:
    """By the words that begin its lines; a file that looks like neither is an error."""
    assert detect(text) == kind
    if kind is None:
        assert "--from" in bad(text)[0]


@pytest.mark.parametrize("text", [ADD + BACK + OUT, ESP + FLOW])
@pytest.mark.parametrize("in_files", [True, False])
def test_the_output_is_configuration(text: str, in_files: bool, tmp_path: Path) -> None:
    """What is printed is read again as the very same SAs and policies, keys in files of mode 0600 or inside."""
    source = tmp_path / "source"
    source.write_text(text)
    keys = tmp_path / "keys"
    words = ["convert", str(source), *(["--keys-dir", str(keys)] if in_files else [])]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    result = tmp_path / "oepy.yaml"
    result.touch(mode=0o600)
    result.write_text(done.stdout)
    assert load_manual(result) == run(text).manual
    if in_files:
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in keys.iterdir())
        assert key(3)[2:] not in done.stdout
        again = CliRunner().invoke(main, words)
        assert (again.exit_code, "never overwritten" in again.stderr) == (2, True)


def test_the_command_refuses_as_a_whole(tmp_path: Path) -> None:
    """Mistakes go to stderr, nothing to stdout, exit status 2; JSON has no keys."""
    source = tmp_path / "source"
    source.write_text(ADD + "dump;\n")
    done = CliRunner().invoke(main, ["convert", str(source)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"{source}:2: " in done.stderr
    source.write_text(ADD)
    done = CliRunner().invoke(main, ["convert", str(source), "--json"])
    assert json.loads(done.stdout)["sas"][0]["encryption_key_bits"] == 256
    assert key(1)[2:] not in done.stdout
    assert CliRunner().invoke(main, ["convert", str(tmp_path / "none")]).exit_code == 2
    source.write_text("flush;\n")
    assert "nothing to convert" in CliRunner().invoke(main, ["convert", str(source)]).output


_SETKEY_WORDS = st.sampled_from(
    [
        *ADD.split(),
        *OUT.split(),
        ";",
        "flush",
        "spdflush",
        "spddelete",
        "delete",
        "[",
        "]",
        '"',
        "#",
        "\n",
        "-P",
        "in",
        "prio",
    ]
)
_OPENBSD_WORDS = st.sampled_from(
    [
        *ESP.split(),
        *FLOW.split(),
        "{",
        "}",
        ",",
        "=",
        "$a",
        "a",
        '"',
        "#",
        "\n",
        "\\\n",
        "include",
        "type",
        "in",
        "ah",
    ]
)


@given(st.lists(_SETKEY_WORDS | st.text(max_size=4), max_size=60).map(" ".join))
@settings(max_examples=300)
def test_any_setkey_text_converts_or_has_mistakes(text: str) -> None:
    """Never another exception; what converts can be rendered and read again."""
    check_whole(run(text, "setkey"))


@given(st.lists(_OPENBSD_WORDS | st.text(max_size=4), max_size=60).map(" ".join))
@settings(max_examples=300)
def test_any_openbsd_text_converts_or_has_mistakes(text: str) -> None:
    """Never another exception; what converts can be rendered and read again."""
    check_whole(run(text, "ipsec.conf"))


def check_whole(done: Conversion) -> None:
    import yaml

    from oepy.manual.checks import read_manual

    if not done.problems:
        section = yaml.load(render(done, "x", lambda *_: None), Loader=yaml.BaseLoader)["manual"]
        assert read_manual(section, lambda _: b"") == (done.manual, [])
