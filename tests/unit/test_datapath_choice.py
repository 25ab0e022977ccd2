"""Which datapath a host gets, by what its kernel was found to do, and what the trap makes of it."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_network

import pytest

from oepy.daemon.datapaths import choose
from oepy.datapath.xfrm import probe as module
from oepy.datapath.xfrm.probe import Abilities, Trial
from oepy.errors import OepyError
from oepy.interfaces import ConfiguredRule, TrapPolicy, Way
from oepy.model import PolicyGroup, Verdict
from oepy.trap.islands import ACCEPT, DROP, Chains, Line, past_device, running_lines, shut_lines
from oepy.trap.rules import Ruleset

GOOD, BAD = Trial("it"), Trial("it", OepyError("no such thing", "modprobe it"))
POLICY = TrapPolicy((), PolicyGroup.PRIVATE_OR_CLEAR, ())


def found(monkeypatch: pytest.MonkeyPatch, esp: Trial, interface: Trial) -> None:
    monkeypatch.setattr(module, "probe", lambda: Abilities((GOOD, esp), interface))


@pytest.mark.parametrize(
    ("wanted", "esp", "interface", "name", "mode"),
    [
        ("auto", GOOD, GOOD, "xfrm", "interface"),
        ("auto", GOOD, BAD, "xfrm", "mark"),
        ("auto", BAD, GOOD, "tun", ""),
        ("xfrm", GOOD, GOOD, "xfrm", "interface"),
        ("xfrm", GOOD, BAD, "xfrm", "mark"),
        ("tun", GOOD, GOOD, "tun", ""),
        ("none", BAD, BAD, "none", ""),
    ],
)
def test_the_choice(
    monkeypatch: pytest.MonkeyPatch, wanted: str, esp: Trial, interface: Trial, name: str, mode: str
) -> None:
    """The kernel's where both families' ESP works; by the mark without interfaces; with a reason."""
    found(monkeypatch, esp, interface)
    assert choose(wanted)[:2] == (name, mode)
    assert choose(wanted)[2]


def test_what_cannot_be_had_is_an_error_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datapath: xfrm` does not fall back to anything."""
    found(monkeypatch, BAD, GOOD)
    with pytest.raises(OepyError, match="modprobe it"):
        choose("xfrm")


def test_the_trap_knows_what_is_protected() -> None:
    """A marked packet leaves by the device, or by one of userland's for marks of connections; with the kernel's
    IPsec by an SA, too. Without a device the mark of decrypted packets is that IPsec has seen them. Without either
    nothing marked leaves."""
    lines = {
        (device, kernel): Ruleset(
            dataclasses.replace(POLICY, tunnel_device=device, kernel_ipsec=kernel)
        ).replacing(Ruleset(POLICY))
        for device in ("oe0", None)
        for kernel in (False, True)
    }
    marked = "meta mark & 0x30000000 == 0x10000000 "
    assert f'{marked}oifname != "oe0" oifname != "oe0.m*" drop' in lines["oe0", False]
    assert f'{marked}oifname != "oe0" rt ipsec missing drop' in lines["oe0", True]
    assert f"{marked}rt ipsec missing drop" in lines[None, True]
    assert f"{marked}drop" in lines[None, False]
    assert 'iifname "oe0" ' in lines["oe0", True]
    assert "meta ipsec exists " in lines[None, True]


def test_the_kernels_transport_mode_goes_past_the_device() -> None:
    """Over the device the packet would come to it again. Its mark without an SA goes nowhere; back it comes with
    the kernel's word alone. Without a device, or with ESP in userland, transport mode is like the rest."""
    both = ip_network("198.18.0.1/32"), ip_network("198.18.0.2/32")
    rules = tuple(
        ConfiguredRule(way, *ends, verdict, required=True, number=7, transport=True)
        for way, ends, verdict in ((Way.OUT, both, Verdict.PRIVATE), (Way.IN, both[::-1], Verdict.BLOCK))
    )

    chains = Chains("tunnel", "kernel", "decrypted", "ask", "sort")

    def lines(device: str | None, kernel: bool) -> list[list[Line]]:
        policy = dataclasses.replace(POLICY, tunnel_device=device, kernel_ipsec=kernel, configured=rules)
        return [running_lines(rule, chains, by_kernel=past_device(policy, rule)) for rule in rules]

    out, inward = rules
    assert lines("oe0", True) == [
        [Line(out, "kernel", joined=True), Line(out, "ask")],
        [Line(inward, "decrypted", joined=True, decrypted=True), Line(inward, DROP)],
    ]
    past = dataclasses.replace(POLICY, tunnel_device="oe0", kernel_ipsec=True)
    assert "meta mark & 0x30000000 == 0x30000000 rt ipsec missing drop" in Ruleset(past).loading()
    assert shut_lines(inward, chains, bracket=False, by_kernel=True) == [
        Line(inward, ACCEPT, decrypted=True),
        Line(inward, DROP),
    ]
    for other in (lines(None, True), lines("oe0", False)):
        assert other == [
            [Line(out, "tunnel", joined=True), Line(out, "ask")],
            [Line(inward, DROP)],
        ]


def test_tcp_is_told_what_fits_into_the_tunnel() -> None:
    """Both ways, in both families, where the datapath does not do it itself."""
    clamped = dataclasses.replace(POLICY, kernel_ipsec=True, clamp_mtu=1390)
    text = Ruleset(clamped).replacing(Ruleset(POLICY))
    for way in ("oifname", "iifname"):
        for family, mss in (("ipv4", 1350), ("ipv6", 1330)):
            syn = "tcp flags & syn == syn tcp option maxseg size set"
            assert f'{way} "oe0" meta nfproto {family} {syn} {mss}' in text
    assert "maxseg" not in Ruleset(POLICY).replacing(Ruleset(POLICY))
