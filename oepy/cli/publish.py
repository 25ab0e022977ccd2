"""`oepy dns publish`, `withdraw` and `verify`: key records in live zones (RFC 2136)."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oepy.errors import OepyError, UsageError

if TYPE_CHECKING:
    import dns.name

    from oepy.dns.primary import Server
    from oepy.dns.publish import Change
    from oepy.dns.publishing import Finder, Published, Task, Verified

DEFAULT_TTL = 3600


def _subject_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--resolver-port", type=click.IntRange(1, 65535), default=53, show_default=True),
        click.option(
            "--resolver", "resolvers", multiple=True, metavar="ADDR", help="Resolver that finds zones."
        ),
        click.option(
            "--port", type=click.IntRange(1, 65535), default=53, show_default=True, help="Of --server."
        ),
        click.option("--ttl", type=click.IntRange(0, 2**31 - 1), help="TTL where the inventory gives none."),
        click.option("--zone", "zones", multiple=True, help="Zone, besides those of the inventory."),
        click.option("--name", metavar="NAME", help="This host's name (default: identity.id, if it is one)."),
        click.option(
            "--address",
            "addresses",
            multiple=True,
            metavar="ADDR",
            help="This host's address (default: identity.id, if it is one, else its public addresses).",
        ),
    ):
        command = option(command)
    return click.argument("inventory", required=False, type=click.Path(path_type=Path))(command)


def _update_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--dry-run", is_flag=True, help="Send nothing; print the difference."),
        click.option("--server", metavar="ADDR", help="The primary server (default: SOA's MNAME)."),
        click.option(
            "--tsig-file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="TSIG key in BIND's form, as tsig-keygen writes it, mode 0600.",
        ),
    ):
        command = option(command)
    return _subject_options(command)


@click.command()
@_update_options
@click.option("--replace", is_flag=True, help="Remove key records that oepy did not make.")
@click.pass_context
def publish(ctx: click.Context, /, *, replace: bool, **options: Any) -> None:
    """Bring the key records of this host, or of INVENTORY, into their zones by signed updates.

    Only the difference is sent; run it again to go on after an interruption. Names with somebody else's key
    records are left alone and listed. Exit status: 0 where everything is there now, else 1.

    \b
    oepy dns publish --tsig-file /etc/oepy/tsig.key
    oepy dns publish fleet.csv --tsig-file tsig.key --server 192.0.2.53 --dry-run
    """
    _change(ctx.obj, withdraw=False, replace=replace, **options)


@click.command()
@_update_options
@click.pass_context
def withdraw(ctx: click.Context, /, **options: Any) -> None:
    """Remove the key records of this host, or of INVENTORY, and nothing else.

    \b
    oepy dns withdraw --tsig-file /etc/oepy/tsig.key
    """
    _change(ctx.obj, withdraw=True, replace=False, **options)


@click.command()
@_subject_options
@click.option("--server", "servers", multiple=True, metavar="ADDR", help="A server besides the zones' NS.")
@click.option("--trust-anchor", "trust_anchors", multiple=True, metavar="FILE", help="DS or DNSKEY records.")
@click.option("--no-validator", is_flag=True, help="Ask the authoritative servers only.")
@click.option("--withdrawn", is_flag=True, help="The records should be gone.")
@click.option("--since", metavar="YYYYMMDDHHMMSS", help="When the last change was made (UTC; default: now).")
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    *,
    servers: tuple[str, ...],
    trust_anchors: tuple[str, ...],
    no_validator: bool,
    withdrawn: bool,
    since: str | None,
    port: int,
    as_json: bool,
    **subject: Any,
) -> None:
    """Ask every authoritative server and the validator for the key records of this host, or of INVENTORY.

    Exit status: 0 where all of them have exactly what they should, else 1.

    \b
    oepy dns verify
    oepy dns verify fleet.csv --server 192.0.2.53
    """
    from oepy.cli.dns import _address, _validator
    from oepy.dns.build import parse_time
    from oepy.dns.primary import Server
    from oepy.dns.publishing import Verifier
    from oepy.model import MARK_OWN

    changed = parse_time(since) if since else int(time.time())

    async def run() -> Verified:
        finder = _finder(ctx.obj, subject)
        task, _ = await _task(ctx.obj, finder, **subject)

        async def servers_of(zone: dns.name.Name) -> AsyncIterator[tuple[str, Server]]:
            for text in servers:
                server = Server(_address(text), port, None, MARK_OWN)
                yield str(server), server
            async for labelled in finder.authorities_of(zone):
                yield labelled

        validator = None
        if not no_validator:
            validator = _validator(
                ctx.obj, subject["resolvers"], subject["resolver_port"], trust_anchors, None
            )
        return await Verifier(servers_of, validator).run(task.chunks(withdraw=withdrawn))

    result = asyncio.run(run())
    _print_verified(result, changed, as_json=as_json)
    if not result.all_right:
        sys.exit(1)


# ---- what is to be published -----------------------------------------------------------------------------


def _finder(config_path: str | None, subject: dict[str, Any]) -> Finder:
    from oepy.cli.dns import _resolvers, _tls_bundle
    from oepy.dns.build import default_resolvers
    from oepy.dns.publishing import Finder
    from oepy.dns.transport import StubTransport
    from oepy.model import MARK_OWN

    resolvers = _resolvers(config_path, subject["resolvers"], subject["resolver_port"])
    bundle = _tls_bundle(config_path, None)
    return Finder(StubTransport(resolvers or default_resolvers(), MARK_OWN, tls_bundle=bundle), MARK_OWN)


async def _task(
    config_path: str | None,
    finder: Finder,
    *,
    inventory: Path | None,
    zones: tuple[str, ...],
    ttl: int | None,
    name: str | None,
    addresses: tuple[str, ...],
    **_rest: Any,
) -> tuple[Task, int]:
    """The task and its number of hosts. Raises UsageError or ConfigError."""
    from oepy.dns.inventory import Inventory
    from oepy.dns.publishing import task_of

    if inventory is None:
        return await _own_task(config_path, finder, zones, ttl, name, addresses), 1
    if name or addresses:
        raise UsageError("--name and --address are of this host, an inventory has its own", "leave them out")

    def source() -> Inventory:
        made = Inventory(inventory)
        made.preset(zones, (), ttl)
        return made

    return task_of(source)


async def _own_task(
    config_path: str | None,
    finder: Finder,
    zones: tuple[str, ...],
    ttl: int | None,
    name: str | None,
    addresses: tuple[str, ...],
) -> Task:
    """This host: its name and addresses, and its key with those of a roll-over."""
    import dns.name

    from oepy.cli.dns import _owner
    from oepy.configfile import peek
    from oepy.dns.inventory import Host
    from oepy.dns.publishing import Task
    from oepy.dns.zonemap import ZoneMap, reverse_name
    from oepy.keyring import KeyRing

    identity = str(peek(config_path, "identity", "id") or "")
    ring = KeyRing(Path(str(peek(config_path, "identity", "key") or "/var/lib/oepy/host.key")))
    own = _own_addresses(identity, addresses)
    if name is None and identity and "@" not in identity and not _is_address(identity):
        name = identity
    if not own and name is None:
        raise UsageError("this host has neither a name nor a public address", "give --name or --address")
    owner = _owner(name) if name else dns.name.from_text("host.invalid.")
    places = [reverse_name(address) for address in own] + ([owner] if name else [])
    found = [_owner(text) for text in zones]
    if not found:
        for place in places:
            zone = await finder.zone_of(place)
            if zone not in found:
                found.append(zone)
    keys = ring.published()
    records = ("ipseckey", "txt") if keys[0].algorithm == 2 else ("ipseckey",)
    host = Host(0, owner, own, keys, records=records)
    return Task(lambda: iter([host]), ZoneMap(found), DEFAULT_TTL if ttl is None else ttl, ring.known())


def _own_addresses(identity: str, given: tuple[str, ...]) -> tuple[Any, ...]:
    from ipaddress import ip_address

    from oepy.cli.dns import _address
    from oepy.daemon.addresses import own_addresses

    if given:
        return tuple(_address(text) for text in given)
    if _is_address(identity):
        return (ip_address(identity),)
    return tuple(sorted((a for a in own_addresses() if a.is_global), key=str))


def _is_address(text: str) -> bool:
    from ipaddress import ip_address

    try:
        ip_address(text)
    except ValueError:
        return False
    return True


# ---- publish and withdraw --------------------------------------------------------------------------------


def _change(
    config_path: str | None,
    *,
    withdraw: bool,
    replace: bool,
    tsig_file: Path | None,
    server: str | None,
    port: int,
    dry_run: bool,
    as_json: bool,
    **subject: Any,
) -> None:
    from oepy.cli.dns import _address
    from oepy.dns.primary import Server
    from oepy.dns.publishing import Publisher
    from oepy.dns.tsig import load_tsig
    from oepy.model import MARK_OWN

    if tsig_file is None and not dry_run:
        raise UsageError("no TSIG key", "give --tsig-file FILE (`tsig-keygen NAME` makes one), or --dry-run")
    key = load_tsig(tsig_file) if tsig_file else None
    lines: list[str] = []

    def show(change: Change) -> None:
        if not dry_run:
            return
        for line in change.lines():
            if as_json:
                lines.append(line)
            else:
                click.echo(line)

    async def run() -> Published:
        finder = _finder(config_path, subject)
        task, total = await _task(config_path, finder, **subject)

        async def connect(zone: dns.name.Name) -> Server:
            if server is not None:
                return Server(_address(server), port, key, MARK_OWN)
            addresses = await finder.addresses_of(await finder.primary_of(zone))
            return Server(addresses[0], port, key, MARK_OWN)

        publisher = Publisher(connect, replace=replace, dry_run=dry_run, show=show)
        with click.progressbar(
            length=total, label="hosts", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as bar:

            def counted() -> Any:
                from oepy.dns.publishing import CHUNK_HOSTS

                for chunk in task.chunks(withdraw=withdraw):
                    yield chunk
                    bar.update(min(CHUNK_HOSTS, total - bar.pos))

            try:
                return await publisher.run(counted())
            except OepyError as error:
                done = publisher.done
                raise OepyError(
                    f"{error} ({done.changed} of the names changed so far)", "run it again to go on"
                ) from None

    result = asyncio.run(run())
    _print_published(result, dry_run=dry_run, as_json=as_json, lines=lines)
    if result.conflict_count:
        sys.exit(1)


def _print_published(result: Published, *, dry_run: bool, as_json: bool, lines: list[str]) -> None:
    by = time.time() + result.cache_seconds if result.changed and not dry_run else None
    if as_json:
        record = {
            "dry_run": dry_run,
            "names": result.names,
            "unchanged": result.unchanged,
            "changed": result.changed,
            "records_added": result.added,
            "records_removed": result.removed,
            "batches": result.batches,
            "conflicts": [
                {"owner": str(one.owner), "reason": one.reason, "mend": one.mend} for one in result.conflicts
            ],
            "conflict_count": result.conflict_count,
            "servers": result.servers,
            "caches_by": _utc(by) if by else None,
        }
        click.echo(json.dumps(record | ({"difference": lines} if dry_run else {}), indent=2))
        return
    for one in result.conflicts:
        click.echo(f"oepy: {one}", err=True)
    if result.conflict_count > len(result.conflicts):
        click.echo(f"oepy: … {result.conflict_count - len(result.conflicts)} more names left alone", err=True)
    verb = "would change" if dry_run else "changed"
    click.echo(
        f"{result.names} names: {result.changed} {verb} (+{result.added} -{result.removed} records), "
        f"{result.unchanged} as they should be, {result.conflict_count} left alone"
    )
    if by:
        click.echo(f"all caches will have it by {_utc(by)}, once every server has: `oepy dns verify`")


def _print_verified(result: Verified, changed: int, *, as_json: bool) -> None:
    by = changed + result.cache_seconds
    views = list(result.views.values())
    if as_json:
        record = {
            "all_right": result.all_right,
            "names": result.names,
            "caches_by": _utc(by) if result.all_right else None,
            "servers": [
                {
                    "zone": view.zone,
                    "server": view.server,
                    "serial": view.serial,
                    "right": view.right,
                    "missing": view.missing,
                    "different": view.different,
                    "error": view.error,
                    "note": view.note,
                    "details": view.details,
                }
                for view in views
            ],
        }
        click.echo(json.dumps(record, indent=2))
        return
    for view in views:
        serial = f" serial {view.serial}" if view.serial is not None else ""
        counts = f"{view.right} right, {view.missing} missing, {view.different} different"
        click.echo(f"{view.zone} {view.server}{serial}: {view.error or view.note or counts}")
        for detail in view.details:
            click.echo(f"  {detail}")
    if result.all_right:
        click.echo(f"all {result.names} names are right; all caches will have them by {_utc(by)}")
    elif not result.names:
        click.echo("there is nothing to look for: no host has a key in a listed zone")
    else:
        click.echo("not everything is right: `oepy dns publish`, or wait until the servers have caught up")


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
