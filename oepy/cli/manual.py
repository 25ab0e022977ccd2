"""`oepy sa` and `oepy policy`: manual keying, through the daemon where one runs, else straight in the kernel."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from oepy.cli.output import client, json_option, print_json, print_table
from oepy.control import protocol
from oepy.errors import DaemonUnreachable, UsageError

if TYPE_CHECKING:
    from oepy.datapath.xfrm.manual import ManualKernel

_KEY_HELP = "0x… (visible to others in `ps`!), or - for a line of stdin."
_WHERE = """A running daemon is asked to do it; without one it is done in the kernel (XFRM) itself."""


@contextlib.contextmanager
def _kernel() -> Iterator[ManualKernel]:
    from oepy.daemon.addresses import is_own
    from oepy.datapath.xfrm.manual import ManualKernel
    from oepy.xfrm.socket import XfrmSocket

    sock = XfrmSocket()
    try:
        yield ManualKernel(sock, is_own)
    finally:
        sock.close()


def _change(ctx: click.Context, operation: str, entry: dict[str, Any]) -> dict[str, Any]:
    """By the daemon, or here. Says which."""
    from oepy.manual.changes import changed

    try:
        answer: dict[str, Any] = client(ctx).post(protocol.MANUAL, {"operation": operation, "entry": entry})
        return answer
    except DaemonUnreachable as error:
        if error.mend.startswith("run this command as root"):
            raise
    with _kernel() as kernel:
        before = kernel.current()
        after = changed(before, operation, entry, _no_files)
        kernel.change(before, after)
    counts = {"sas": len(after.sas), "policies": len(after.policies)}
    return {"done": operation, "by": "kernel", **counts, "removed": _removed(before, after)}


def _removed(before: Any, after: Any) -> int:
    return max(len(before.sas) - len(after.sas), 0) + max(len(before.policies) - len(after.policies), 0)


def _no_files(name: str) -> bytes:
    raise UsageError(f"{name}: a key file is read before", "this is a mistake in oepy")


def _views(ctx: click.Context, kind: str, *, everybodys: bool) -> list[dict[str, Any]]:
    try:
        answer = client(ctx).get(protocol.MANUAL, all="1" if everybodys else "0")
    except DaemonUnreachable as error:
        if error.mend.startswith("run this command as root"):
            raise
        with _kernel() as kernel:
            look = kernel.sa_views if kind == "sas" else kernel.policy_views
            return look(everybodys=everybodys)
    listed: list[dict[str, Any]] = answer[kind]
    return listed


def _said(data: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(data)
    else:
        click.echo(f"{text} ({'the daemon' if data['by'] == 'daemon' else 'in the kernel, no daemon runs'})")


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, "", (), [], {}, False)}


# ---- sa ----------------------------------------------------------------------------------------------------


_all_option = click.option(
    "--all", "everybodys", is_flag=True, help="What else the kernel has, too: IKE's, other programs'."
)


@click.group()
def sa() -> None:
    """Security associations keyed by hand.

    Only those that were made by hand with oepy are ever listed, changed or removed: neither what IKE has negotiated
    nor what other programs have installed.

    \b
    Example, a host without any IKE daemon (the peer does the same, with src and dst exchanged):
      oepy sa add 192.0.2.1 192.0.2.2 esp 0x1001 --mode transport \\
          --encryption aes256 --encryption-key-file out.enc \\
          --integrity sha256 --integrity-key-file out.auth
      oepy sa add 192.0.2.2 192.0.2.1 esp 0x1002 --mode transport \\
          --encryption aes256 --encryption-key-file in.enc \\
          --integrity sha256 --integrity-key-file in.auth
      oepy policy add out 192.0.2.1 192.0.2.2 --template esp/transport//require
      oepy policy add in 192.0.2.2 192.0.2.1 --template esp/transport//require
    """


@sa.command("add")
@click.argument("src")
@click.argument("dst")
@click.argument("proto", type=click.Choice(["esp", "ah"]))
@click.argument("spi")
@click.option("--mode", type=click.Choice(["tunnel", "transport"]), default="tunnel", show_default=True)
@click.option("--encryption", metavar="NAME", help="Cipher of ESP: aes256, aes128, null …")
@click.option("--encryption-key", metavar="KEY", help=_KEY_HELP)
@click.option("--encryption-key-file", metavar="FILE", help="Hexadecimal or raw, mode 0600.")
@click.option("--integrity", metavar="NAME", help="HMAC of ESP or AH: sha256, sha384, sha512 …")
@click.option("--integrity-key", metavar="KEY", help=_KEY_HELP)
@click.option("--integrity-key-file", metavar="FILE", help="Hexadecimal or raw, mode 0600.")
@click.option(
    "--aead", metavar="NAME", help="Instead of both: aes256gcm16, chacha20poly1305 … (see --allow-weak)."
)
@click.option("--aead-key", metavar="KEY", help=_KEY_HELP)
@click.option("--aead-key-file", metavar="FILE", help="Key with the 4-byte salt at its end, mode 0600.")
@click.option("--reqid", metavar="N", help="Ties the SA to the policies with this number (1 to 65535).")
@click.option("--encap", metavar="SPORT,DPORT", help="ESP in UDP between these ports, 4500,4500 say.")
@click.option(
    "--replay-window", metavar="N", help="Packets; 0, the default, is no anti-replay (RFC 4303 §3.4.3)."
)
@click.option("--esn", is_flag=True, help="64-bit sequence numbers; needs a replay window.")
@click.option(
    "--lifetime",
    "limits",
    multiple=True,
    metavar="LIMIT=N",
    help="soft_seconds, hard_seconds, soft_bytes, hard_bytes, soft_packets or hard_packets; may be repeated.",
)
@click.option(
    "--allow-weak",
    is_flag=True,
    help="Take 3des or sha1; or an AEAD or counter mode, which needs a new key at each start (RFC 8221 §5).",
)
@json_option
@click.pass_context
def sa_add(
    ctx: click.Context,
    /,
    src: str,
    dst: str,
    proto: str,
    spi: str,
    mode: str,
    reqid: str | None,
    encap: str | None,
    replay_window: str | None,
    esn: bool,
    limits: tuple[str, ...],
    allow_weak: bool,
    as_json: bool,
    **algorithms: str | None,
) -> None:
    """Add the SA from SRC to DST with protocol PROTO (esp or ah) and SPI (256 or more; 0x… or decimal).

    One SA is one direction: two hosts need two, and both on both hosts. Keys are best given as files; on the
    command line everybody on this host sees them in `ps`.

    \b
    Examples:
      oepy sa add 192.0.2.1 192.0.2.2 esp 0x1001 --encryption aes256 --encryption-key-file e.key \\
          --integrity sha256 --integrity-key-file a.key
      openssl rand -hex 32 | sed 's/^/0x/' | oepy sa add 2001:db8::1 2001:db8::2 ah 0x2001 \\
          --mode transport --integrity sha256 --integrity-key -
    """
    from oepy.manual.changes import read_entry
    from oepy.manual.presenting import sa_mapping
    from oepy.manual.reading import read_sa

    entry = _given(
        src=src,
        dst=dst,
        protocol=proto,
        spi=spi,
        mode=mode,
        reqid=reqid,
        encap=_ports(encap),
        replay_window=replay_window,
        esn=esn,
        lifetime=dict(_limit(text) for text in limits),
        allow_weak=allow_weak,
        **algorithms,
    )
    for name in ("encryption_key", "integrity_key", "aead_key"):
        if entry.get(name) == "-":
            entry[name] = sys.stdin.readline(8192).strip()
    made = read_entry(lambda problems: read_sa(entry, (), problems, _key_file))
    data = _change(ctx, "sa-add", sa_mapping(made))
    _said(data, f"{made} is there", as_json=as_json)


def _key_file(name: str) -> bytes:
    from pathlib import Path

    from oepy.privatefile import read_private_file

    return read_private_file(Path(name), "put the key there in hexadecimal, mode 0600")


def _ports(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    sport, comma, dport = text.partition(",")
    if not comma:
        raise UsageError(f"{text!r} are no two ports", "write SPORT,DPORT such as 4500,4500")
    return {"sport": sport, "dport": dport}


def _limit(text: str) -> tuple[str, str]:
    name, equals, number = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} is no limit", "write one like hard_bytes=1000000000")
    return name, number


@sa.command("delete")
@click.argument("dst")
@click.argument("proto", type=click.Choice(["esp", "ah"]))
@click.argument("spi")
@json_option
@click.pass_context
def sa_delete(ctx: click.Context, dst: str, proto: str, spi: str, as_json: bool) -> None:
    """Remove the manual SA to DST with this protocol and SPI. Exit status 1 where there is none.

    Traffic of policies that demand it is dropped from then on.

    \b
    Example:
      oepy sa delete 192.0.2.2 esp 0x1001
    """
    data = _change(ctx, "sa-delete", {"dst": dst, "protocol": proto, "spi": spi})
    _said(data, f"{proto} SA {spi} to {dst} is removed", as_json=as_json)


@sa.command("flush")
@json_option
@click.pass_context
def sa_flush(ctx: click.Context, as_json: bool) -> None:
    """Remove all manual SAs; those of IKE and of other programs stay. Traffic of their policies is dropped then."""
    data = _change(ctx, "sa-flush", {})
    _said(data, f"{data['removed']} manual SAs are removed", as_json=as_json)


@sa.command("list")
@_all_option
@json_option
@click.pass_context
def sa_list(ctx: click.Context, everybodys: bool, as_json: bool) -> None:
    """Show the manual SAs with what they have carried; of keys only their length."""
    data = _views(ctx, "sas", everybodys=everybodys)
    if as_json:
        print_json(data)
        return
    print_table(
        ["src", "dst", "proto", "spi", "mode", "algorithm", "key bits", "reqid", "bytes", "packets", "state"],
        [
            [
                row.get("src"),
                row["dst"],
                row.get("protocol"),
                row.get("spi"),
                row.get("mode"),
                "-".join(row[name] for name in ("aead", "encryption", "integrity") if row.get(name)),
                "+".join(
                    str(row[name])
                    for name in ("aead_key_bits", "encryption_key_bits", "integrity_key_bits")
                    if row.get(name)
                ),
                row.get("reqid"),
                row.get("bytes"),
                row.get("packets"),
                row.get("state", "in the kernel"),
            ]
            for row in data
        ],
        "no manual SA",
    )


@sa.command("load")
@click.argument("file", required=False)
@json_option
@click.pass_context
def sa_load(ctx: click.Context, file: str | None, as_json: bool) -> None:
    """Make the kernel's manual SAs and policies those of the `manual:` section of FILE.

    For hosts where no daemon runs: at boot, say. FILE is the configuration by default, and may be what
    `oepy convert` has printed. What is there already and stays keeps its sequence numbers; a section with
    mistakes changes nothing.

    \b
    Example:
      oepy sa load /etc/oepy/oepy.yaml
    """
    from oepy.config import load_manual

    with contextlib.suppress(DaemonUnreachable):
        client(ctx).get(protocol.MANUAL)
        raise UsageError(
            "a daemon runs here", "put the section into its configuration and reload it (SIGHUP)"
        )
    wanted = load_manual(file or ctx.obj)
    with _kernel() as kernel:
        before = kernel.current()
        kernel.change(before, wanted)
    data = {
        "done": "load",
        "by": "kernel",
        "sas": len(wanted.sas),
        "policies": len(wanted.policies),
    }
    _said(data, f"{data['sas']} SAs and {data['policies']} policies are there", as_json=as_json)


# ---- policy ------------------------------------------------------------------------------------------------


@click.group()
def policy() -> None:
    """Policies made by hand: which traffic needs an SA, passes in the clear, or is dropped.

    \b
    Example, a tunnel between two networks (on the gateway 192.0.2.1):
      oepy policy add out 10.1.0.0/16 10.2.0.0/16 --template esp/tunnel/192.0.2.1-192.0.2.2/require
      oepy policy add in 10.2.0.0/16 10.1.0.0/16 --template esp/tunnel/192.0.2.2-192.0.2.1/require
      oepy policy add fwd 10.2.0.0/16 10.1.0.0/16 --template esp/tunnel/192.0.2.2-192.0.2.1/require
    """


_direction = click.argument("direction", type=click.Choice(["in", "out", "fwd"]))
_protocol = click.option(
    "--protocol", metavar="NAME", help="tcp, udp, icmp, ipv6-icmp, sctp, gre or a number."
)
_sport = click.option("--sport", metavar="PORT", help="Source port.")
_dport = click.option("--dport", metavar="PORT", help="Destination port.")


@policy.command("add")
@_direction
@click.argument("src")
@click.argument("dst")
@_protocol
@_sport
@_dport
@click.option(
    "--action",
    type=click.Choice(["ipsec", "bypass", "block"]),
    help="ipsec (default with a template), bypass: in the clear, block: dropped.",
)
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="PROTO/MODE/SRC-DST/LEVEL",
    help="The SA that is demanded, as in setkey: esp/tunnel/192.0.2.1-192.0.2.2/require, esp/transport//use, "
    "ah/transport//unique:7 (with reqid 7). More than one: applied in this order.",
)
@click.option(
    "--priority", metavar="N", help="1 to 65535, the lowest comes first. Default: the more specific first."
)
@json_option
@click.pass_context
def policy_add(
    ctx: click.Context,
    direction: str,
    src: str,
    dst: str,
    protocol: str | None,
    sport: str | None,
    dport: str | None,
    action: str | None,
    templates: tuple[str, ...],
    priority: str | None,
    as_json: bool,
) -> None:
    """Add the policy for packets from SRC to DST (addresses or prefixes) in DIRECTION: in (to this host), out, or
    fwd (forwarded, as they come in).

    \b
    Examples:
      oepy policy add out 192.0.2.1 192.0.2.2 --template esp/transport//require
      oepy policy add out 0.0.0.0/0 192.0.2.53 --protocol udp --dport 53 --action bypass
      oepy policy add in 198.51.100.0/24 192.0.2.1 --action block
    """
    from oepy.manual.presenting import template_from_text

    if not action and not templates:
        raise UsageError(
            "what is to be done with the packets?", "give --template, or --action bypass or block"
        )
    try:
        read = [template_from_text(text) for text in templates]
    except ValueError as error:
        raise UsageError(f"--template {error}") from None
    entry = _given(
        direction=direction,
        src=src,
        dst=dst,
        protocol=protocol,
        sport=sport,
        dport=dport,
        action=action or "ipsec",
        templates=read,
        priority=priority,
    )
    data = _change(ctx, "policy-add", entry)
    _said(data, f"policy {direction} {src} to {dst} is there", as_json=as_json)


@policy.command("delete")
@_direction
@click.argument("src")
@click.argument("dst")
@_protocol
@_sport
@_dport
@json_option
@click.pass_context
def policy_delete(
    ctx: click.Context,
    direction: str,
    src: str,
    dst: str,
    protocol: str | None,
    sport: str | None,
    dport: str | None,
    as_json: bool,
) -> None:
    """Remove the manual policy with this direction and selector. Exit status 1 where there is none.

    \b
    Example:
      oepy policy delete out 192.0.2.1 192.0.2.2
    """
    entry = _given(direction=direction, src=src, dst=dst, protocol=protocol, sport=sport, dport=dport)
    data = _change(ctx, "policy-delete", entry)
    _said(data, f"policy {direction} {src} to {dst} is removed", as_json=as_json)


@policy.command("flush")
@json_option
@click.pass_context
def policy_flush(ctx: click.Context, as_json: bool) -> None:
    """Remove all manual policies; those of IKE and of other programs stay."""
    data = _change(ctx, "policy-flush", {})
    _said(data, f"{data['removed']} manual policies are removed", as_json=as_json)


@policy.command("list")
@_all_option
@json_option
@click.pass_context
def policy_list(ctx: click.Context, everybodys: bool, as_json: bool) -> None:
    """Show the manual policies in the order in which they are looked at."""
    data = _views(ctx, "policies", everybodys=everybodys)
    if as_json:
        print_json(data)
        return
    print_table(
        ["direction", "src", "dst", "protocol", "sport", "dport", "action", "templates", "priority"],
        [
            [
                *(
                    row.get(name)
                    for name in ("direction", "src", "dst", "protocol", "sport", "dport", "action")
                ),
                [_template_text(item) for item in row.get("templates", ())] or None,
                row["priority"],
            ]
            for row in data
        ],
        "no manual policy",
    )


def _template_text(item: dict[str, Any]) -> str:
    ends = f"{item['src']}-{item['dst']}" if "src" in item else ""
    unique = f":{item['reqid']}" if "reqid" in item else ""
    return f"{item['protocol']}/{item['mode']}/{ends}/{item['level']}{unique}"
