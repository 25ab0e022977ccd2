"""`oepy zone`: zone files with key records."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oepy.errors import UsageError

if TYPE_CHECKING:
    from dns.name import Name

    from oepy.dns.zonecheck import Checked


@click.group()
def zone() -> None:
    """Zone files with key records: make them from an inventory, check them."""


@zone.command()
@click.argument("inventory", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "directory",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the files db.ZONE.",
)
@click.option("--zone", "zones", multiple=True, help="Zone to write, besides those of the inventory.")
@click.option("--name-server", "servers", multiple=True, help="Name server, besides the inventory's.")
@click.option("--ttl", type=click.IntRange(0, 2**31 - 1), help="TTL where the inventory gives none.")
@click.option("--serial", type=click.IntRange(0, 2**32 - 1), help="SOA serial (default: the time).")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def generate(
    *,
    inventory: Path,
    directory: Path,
    zones: tuple[str, ...],
    servers: tuple[str, ...],
    ttl: int | None,
    serial: int | None,
    as_json: bool,
) -> None:
    """Write one zone file for each zone of INVENTORY (YAML, or CSV with the same column names).

    \b
    oepy zone generate hosts.yaml -o /etc/bind/oepy
    oepy zone generate fleet.csv -o out --zone 2.0.192.in-addr.arpa --name-server ns1.example
    """
    import time

    from oepy.dns.inventory import Inventory
    from oepy.dns.zonefile import generate as generate_zones

    source = Inventory(inventory)
    source.preset(zones, servers, ttl)
    number = serial if serial is not None else int(time.time())
    with _tidy_termination(), _progress(inventory) as progress:
        result = generate_zones(source, directory, number, progress)
    for warning in result.warnings:
        click.echo(f"oepy: {inventory}: {warning}", err=True)
    if as_json:
        record = {
            "files": [str(path) for path in result.files],
            "hosts": result.hosts,
            "records": result.records,
            "warnings": list(result.warnings),
        }
        click.echo(json.dumps(record, indent=2))
    else:
        click.echo(f"{result.hosts} hosts, {result.records} records in {len(result.files)} files:")
        for path in result.files:
            click.echo(str(path))


@contextlib.contextmanager
def _tidy_termination() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that no half-made file stays."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(inventory: Path) -> Iterator[Callable[[int], None]]:
    """Hears of the bytes read; a bar with the time left, on a terminal only."""
    if not sys.stderr.isatty() or not inventory.is_file():
        yield lambda position: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("hosts"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("hosts", total=inventory.stat().st_size)
        yield lambda position: bar.update(task, completed=position)


@zone.command()
@click.argument("subject", metavar="FILE|ZONE")
@click.option("--inventory", type=click.Path(path_type=Path), help="What the zone must hold.")
@click.option("--server", metavar="ADDR", help="Take the zone from this server by transfer (AXFR).")
@click.option("--port", type=click.IntRange(1, 65535), default=53, show_default=True, help="Of --server.")
@click.option(
    "--tsig-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="TSIG key for the transfer in BIND's form, as tsig-keygen writes it, mode 0600.",
)
@click.option(
    "--resolver", "resolvers", multiple=True, metavar="ADDR", help="For a live zone; as in `dns lookup`."
)
@click.option("--resolver-port", type=click.IntRange(1, 65535), default=53, show_default=True)
@click.option("--trust-anchor", "trust_anchors", multiple=True, metavar="FILE", help="As in `dns lookup`.")
@click.option("--at", metavar="YYYYMMDDHHMMSS", help="Check signatures as of this time (UTC).")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def check(
    ctx: click.Context,
    *,
    subject: str,
    inventory: Path | None,
    server: str | None,
    port: int,
    tsig_file: Path | None,
    resolvers: tuple[str, ...],
    resolver_port: int,
    trust_anchors: tuple[str, ...],
    at: str | None,
    as_json: bool,
) -> None:
    """Check a zone: would oepy use its key records, and are they what the inventory says?

    Of a FILE, or of a ZONE by transfer from --server, or of a live ZONE by validated lookups of what the
    inventory names. Exit status: 0 where all is well, 1 where something is wrong.

    \b
    oepy zone check out/db.2.0.192.in-addr.arpa --inventory hosts.yaml
    oepy zone check 2.0.192.in-addr.arpa --server 192.0.2.53 --tsig-file transfer.key
    oepy zone check 2.0.192.in-addr.arpa --inventory hosts.yaml
    """
    from oepy.dns.inventory import Inventory
    from oepy.dns.zonecheck import check_zone, read_file, transfer

    wanted = Inventory(inventory) if inventory is not None else None
    if server is None and Path(subject).is_file():
        source = "file"
        checked = check_zone(read_file(Path(subject)), wanted)
    elif server is not None:
        from oepy.cli.dns import _address
        from oepy.dns.tsig import load_tsig

        source = "transfer"
        key = load_tsig(tsig_file) if tsig_file is not None else None
        checked = check_zone(transfer(_zone_name(subject), _address(server), port, key), wanted)
    else:
        from oepy.cli.dns import _validator
        from oepy.dns.zonelive import check_live

        source, origin = "live", _zone_name(subject)

        async def run() -> Checked:
            return await check_live(
                _validator(ctx.obj, resolvers, resolver_port, trust_anchors, at), origin, wanted
            )

        checked = asyncio.run(run())
    _print_checked(checked, subject, source, as_json)
    if checked.kinds:
        sys.exit(1)


def _zone_name(text: str) -> Name:
    import dns.exception
    import dns.name

    try:
        return dns.name.from_text(text, dns.name.root)
    except (dns.exception.DNSException, ValueError):
        raise UsageError(f"{text!r} is neither a file nor the name of a zone") from None


def _print_checked(checked: Checked, subject: str, source: str, as_json: bool) -> None:
    if as_json:
        record = {
            "zone": str(checked.zone),
            "source": source,
            "good": checked.good,
            "counts": checked.kinds,
            "problems": checked.problems,
        }
        click.echo(json.dumps(record, indent=2))
        return
    for problem in checked.problems:
        click.echo(problem)
    total = sum(checked.kinds.values())
    if total > len(checked.problems):
        click.echo(f"… and {total - len(checked.problems)} more")
    counts = ", ".join(f"{count} {kind}" for kind, count in checked.kinds.items())
    click.echo(
        f"{subject}: {checked.good} usable key records, {total} problems" + f" ({counts})" * bool(counts)
    )
