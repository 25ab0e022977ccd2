"""`oepy dns`: validated lookups and peers' keys."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oepy.errors import UsageError

if TYPE_CHECKING:
    from dns.rdata import Rdata

    from oepy.dns.validator import Outcome, Validator
    from oepy.model import IpAddress, KeyAnswer
    from oepy.resolvers import Resolver


def _resolver_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--at", metavar="YYYYMMDDHHMMSS", help="Check signatures as of this time (UTC)."),
        click.option(
            "--trust-anchor",
            "trust_anchors",
            multiple=True,
            metavar="FILE",
            help="DS or DNSKEY records to trust (default: the configuration's, else the IANA root).",
        ),
        click.option(
            "--tls-cert-bundle",
            "tls_bundle",
            metavar="FILE",
            help="Certificates that sign those of resolvers (default: the configuration's, else the system's).",
        ),
        click.option("--port", type=click.IntRange(1, 65535), default=53, show_default=True),
        click.option(
            "--resolver",
            "resolvers",
            multiple=True,
            metavar="ADDR[@PORT][#NAME]",
            help="Recursive resolver to ask (default: the configuration's, else /etc/resolv.conf). With a name, or "
            "#pin-sha256=BASE64, over TLS.",
        ),
    ):
        command = option(command)
    return command


@click.group("dns")
def dns() -> None:
    """Validated lookups, and the keys that peers publish."""


@dns.command()
@click.argument("name")
@click.argument("type", metavar="TYPE")
@_resolver_options
@click.pass_context
def lookup(
    ctx: click.Context,
    *,
    name: str,
    type: str,
    resolvers: tuple[str, ...],
    port: int,
    tls_bundle: str | None,
    trust_anchors: tuple[str, ...],
    at: str | None,
    as_json: bool,
) -> None:
    """One DNSSEC-validated lookup. An address as NAME means its reverse name.

    Exit status: 0 where the answer is secure, 1 where it is not, or where there is none.

    \b
    oepy dns lookup www.example.org AAAA
    oepy dns lookup 192.0.2.10 IPSECKEY --resolver 127.0.0.1 --trust-anchor anchors.key
    oepy dns lookup www.example.org A --resolver 192.0.2.53@853#dns.example
    oepy dns lookup example.org DNSKEY --at 20260101000000 --json
    """
    owner, rdtype = _owner(name), _type(type)

    async def run() -> Outcome:
        validator = _validator(ctx.obj, resolvers, port, trust_anchors, at, tls_bundle)
        return await validator.lookup(owner, rdtype)

    outcome = asyncio.run(run())
    record = _outcome_record(outcome)
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        _print_outcome(record)
    if outcome.status.value != "secure" or not outcome.rdatas:
        sys.exit(1)


@dns.command()
@click.argument("subject", metavar="ADDRESS|NAME")
@_resolver_options
@click.pass_context
def peer(
    ctx: click.Context,
    *,
    subject: str,
    resolvers: tuple[str, ...],
    port: int,
    tls_bundle: str | None,
    trust_anchors: tuple[str, ...],
    at: str | None,
    as_json: bool,
) -> None:
    """The keys and gateways that oepy would use for a peer, in the order in which it would try them.

    Exit status: 0 where there are secure keys, else 1.

    \b
    oepy dns peer 192.0.2.10
    oepy dns peer beta.example.org --json
    """
    from oepy.dns.build import make_key_source

    async def run() -> KeyAnswer:
        validator = _validator(ctx.obj, resolvers, port, trust_anchors, at, tls_bundle)
        return await make_key_source(validator).peer_keys(subject)

    _owner(subject)  # a name that is none is wrong usage, not an absent peer
    answer = asyncio.run(run())
    record = _peer_record(answer)
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        _print_peer(record)
    if record["status"] != "secure":
        sys.exit(1)


@dns.command()
@_resolver_options
@click.pass_context
def anchors(
    ctx: click.Context,
    *,
    resolvers: tuple[str, ...],
    port: int,
    tls_bundle: str | None,
    trust_anchors: tuple[str, ...],
    at: str | None,
    as_json: bool,
) -> None:
    """The trust anchors, and whether their zones still use these keys.

    Exit status: 0 where each anchored zone uses at least one of its anchors, else 1.

    \b
    oepy dns anchors
    oepy dns anchors --trust-anchor anchors.key --json
    """
    from dataclasses import asdict

    from oepy.dns.anchorcheck import AnchorState, check_anchors, untrusted

    async def run() -> list[AnchorState]:
        return await check_anchors(_validator(ctx.obj, resolvers, port, trust_anchors, at, tls_bundle))

    automatic = None if trust_anchors else _auto_anchors(ctx.obj)
    states = asyncio.run(run()) + (untrusted(automatic) if automatic else [])
    if as_json:
        click.echo(json.dumps([asdict(state) for state in states], indent=2))
    else:
        for state in states:
            key = f"{state.kind} {state.key_tag} algorithm {state.algorithm}  " if state.kind else ""
            why = f" ({state.reason})" if state.reason else ""
            click.echo(f"{state.zone}  {key}{state.state}{why}")
    wanted = {state.zone for state in states if state.state != "negative"}
    sys.exit(0 if wanted == {state.zone for state in states if state.state == "in use"} else 1)


# ---- options ---------------------------------------------------------------------------------------------


def _validator(
    config_path: str | None,
    resolvers: tuple[str, ...],
    port: int,
    trust_anchors: tuple[str, ...],
    at: str | None,
    tls_bundle: str | None = None,
) -> Validator:
    from oepy.configfile import peek
    from oepy.dns.build import make_validator, parse_time
    from oepy.model import MARK_OWN

    return make_validator(
        _resolvers(config_path, resolvers, port),
        tls_bundle=_tls_bundle(config_path, tls_bundle),
        trust_anchors=trust_anchors or _configured(config_path, "trust_anchors"),
        negative_trust_anchors=_configured(config_path, "negative_trust_anchors"),
        auto_trust_anchors=None if trust_anchors else _auto_anchors(config_path),
        sha1=bool(peek(config_path, "dns", "sha1")),
        mark=MARK_OWN,  # a running daemon must not trap the questions of its own administrator
        at=parse_time(at) if at else None,
    )


def _configured(path: str | None, key: str) -> list[str]:
    """A list of the `dns` section, where there is a configuration file."""
    from oepy.configfile import peek

    value = peek(path, "dns", key)
    return [str(item) for item in value] if isinstance(value, list) else []


def _resolvers(config_path: str | None, texts: tuple[str, ...], port: int) -> list[Resolver]:
    """Those named, else the configuration's, else none. Raises UsageError."""
    from oepy.resolvers import parse_resolver

    try:
        return [parse_resolver(text, port) for text in texts or _configured(config_path, "resolvers")]
    except ValueError as error:
        raise UsageError(f"resolver {error}") from None


def _auto_anchors(config_path: str | None) -> Path | None:
    from oepy.configfile import peek

    value = peek(config_path, "dns", "auto_trust_anchors")
    return Path(str(value)) if value else None


def _tls_bundle(config_path: str | None, path: str | None) -> str | None:
    from oepy.configfile import peek

    value = path or peek(config_path, "dns", "tls_cert_bundle")
    return str(value) if value else None


def _address(text: str) -> IpAddress:
    try:
        return ip_address(text)
    except ValueError:
        raise UsageError(f"{text!r} is no IP address") from None


def _owner(text: str) -> Any:
    import dns.exception
    import dns.name

    from oepy.dns.zonemap import reverse_name

    try:
        return reverse_name(ip_address(text))
    except ValueError:
        pass
    try:
        return dns.name.from_text(text, dns.name.root)
    except (dns.exception.DNSException, ValueError):
        raise UsageError(f"{text!r} is no domain name") from None


def _type(text: str) -> int:
    import dns.exception
    import dns.rdatatype

    try:
        rdtype = dns.rdatatype.from_text(text)
    except (dns.exception.DNSException, ValueError):
        raise UsageError(f"{text!r} is no record type") from None
    if dns.rdatatype.is_metatype(rdtype) or rdtype in (dns.rdatatype.RRSIG, dns.rdatatype.NSEC3):
        raise UsageError(f"{text.upper()} is no type that can be looked up with validation")
    return int(rdtype)


# ---- output ----------------------------------------------------------------------------------------------


def _outcome_record(outcome: Outcome) -> dict[str, Any]:
    import dns.rdatatype

    return {
        "name": str(outcome.question.name),
        "type": dns.rdatatype.to_text(dns.rdatatype.RdataType.make(outcome.question.type)),
        "status": outcome.status.value,
        "reason": outcome.reason,
        "stripped": outcome.stripped,
        "rcode": outcome.rcode,
        "answers": [_presentation(rdata) for rdata in outcome.rdatas],
        "canonical_name": str(outcome.canonical_name),
        "ttl": outcome.ttl,
        "chain": [
            {
                "zone": entry.zone,
                "algorithm": entry.algorithm,
                "key_tags": list(entry.key_tags),
                "status": entry.status,
            }
            for entry in outcome.chain
        ],
        "questions": outcome.questions,
    }


def _presentation(rdata: Rdata) -> str:
    """Presentation form; an unreadable record in RFC 3597's form."""
    import dns.rdatatype

    from oepy.dns.records import parse_ipseckey
    from oepy.errors import ParseError

    if rdata.rdtype == dns.rdatatype.IPSECKEY:
        try:
            return parse_ipseckey(rdata.to_wire() or b"").to_text()
        except ParseError:
            return rdata.to_text()
    return rdata.to_text()


def _print_outcome(record: dict[str, Any]) -> None:
    for answer in record["answers"]:
        click.echo(f"{record['canonical_name']}\t{record['ttl']}\tIN\t{record['type']}\t{answer}")
    click.echo(f"; {record['name']} {record['type']}: {record['status']}, {record['rcode']}")
    if record["reason"]:
        click.echo(f"; because {record['reason']}")
    for entry in record["chain"]:
        tags = ", ".join(map(str, entry["key_tags"]))
        keys = f" {entry['algorithm']}, key {tags}" if tags else ""
        click.echo(f"; {entry['zone']}: {entry['status']}{keys}")


def _peer_record(answer: KeyAnswer) -> dict[str, Any]:
    from oepy.keys import describe, encode
    from oepy.model import Insecure, Secure

    keys = answer.keys if isinstance(answer, Secure | Insecure) else ()
    return {
        "subject": answer.subject,
        "owner": answer.owner,
        "status": type(answer).__name__.lower(),
        "reason": answer.reason,
        "ttl": answer.ttl,
        "keys": [
            {
                "algorithm": int(key.key.algorithm),
                "key_type": describe(key.key),
                "public_key": encode(key.key),
                "gateway": key.gateway_text,
                "gateway_type": int(key.gateway_type),
                "gateway_addresses": [str(address) for address in key.gateways],
                "precedence": key.precedence,
                "record": key.record,
                "owner": key.owner,
                "ttl": key.ttl,
            }
            for key in keys
        ],
        "notes": list(answer.notes),
        "elapsed_ms": round(answer.elapsed * 1000, 3),
        "questions": answer.questions,
    }


def _print_peer(record: dict[str, Any]) -> None:
    columns = ("precedence", "gateway", "key_type", "record", "owner", "ttl", "public_key")
    rows = [[str(key[column]) for column in columns] for key in record["keys"]]
    if rows and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        for row in rows:
            click.echo("\t".join(row))
    click.echo(
        f"{record['subject']}: {record['status']}" + (f", {record['reason']}" * bool(record["reason"]))
    )
    for note in record["notes"]:
        click.echo(f"note: {note}")


def _add_publishing() -> None:
    from oepy.cli.publish import publish, verify, withdraw

    for command in (publish, withdraw, verify):
        dns.add_command(command)


_add_publishing()
