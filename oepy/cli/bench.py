"""`oepy bench`: the benchmarks. Each makes its own namespaces and prints ratios of one and the same run."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from oepy.cli.output import json_option, milliseconds, print_json
from oepy.errors import OepyError


@click.group()
def bench() -> None:
    """Benchmarks, each beside a named peer or the physical floor in the same run. They need root."""


def need_root() -> None:
    if os.geteuid() != 0:
        raise OepyError("benchmarks make network namespaces and need root", "run them as root")


def progress(done: int, total: int) -> None:
    """A line that moves, on a terminal only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done} of {total}" + ("\n" if done == total else ""))
        sys.stderr.flush()


_TITLES = {
    "cold": "cold DNS (from the root)",
    "chain": "zone keys known",
    "warm": "warm DNS",
}


@bench.command("first-packet")
@click.option("--destinations", default=60, show_default=True, type=click.IntRange(1, 500))
@click.option("--ipv6", is_flag=True, help="Over IPv6.")
@click.option(
    "--libreswan", is_flag=True, help="Beside libreswan; needs kernel ESP (see scripts/second-kernel)."
)
@click.option("--rounds", default=10, show_default=True, help="With --libreswan: destinations one by one.")
@click.option("--together", default=100, show_default=True, help="With --libreswan: destinations at once.")
@click.option(
    "--key", "key_type", default="rsa-3072", show_default=True, help="With --libreswan: oepy's keys."
)
@click.option(
    "--datapath",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "xfrm", "tun"]),
    help="oepy's.",
)
@json_option
def first_packet(
    destinations: int,
    ipv6: bool,
    libreswan: bool,
    rounds: int,
    together: int,
    key_type: str,
    datapath: str,
    as_json: bool,
) -> None:
    """First packet to first reply over cold destinations, with the shares of DNS and IKE.

    Each destination is an address of its own with its own key record: lookup, IKE, SA pair. Beside it, in the
    same run: a ping through a tunnel that is there, and one in the clear. With --libreswan instead: the same
    measured of libreswan's opportunistic encryption, in the same topology, DNS and run.
    """
    need_root()
    if libreswan:
        _beside_libreswan(rounds, together, key_type, datapath, as_json)
        return
    from oepy.bench import first_packet as benchmark

    result = benchmark.run(destinations, 6 if ipv6 else 4, lambda done: progress(done, destinations))
    rows = benchmark.summary(result)
    if as_json:
        print_json(rows)
        return
    click.secho(
        f"{'':26}{'p50':>10}{'p99':>10}{'dns':>10}{'ike':>10}{'rest':>10}{'questions':>11}  lost", bold=True
    )
    for kind, title in _TITLES.items():
        row = rows[kind]
        figures = [row["p50"], row["p99"], row["dns_p50"], row["ike_p50"], row["rest_p50"]]
        cells = "".join(f"{milliseconds(value):>10}" for value in figures)
        click.echo(f"{title:26}{cells}{row['questions']:>11.1f}  {row['lost']} of {row['destinations']}")
    for kind, title in (("tunnel", "through the tunnel"), ("clear", "in the clear")):
        row = rows[kind]
        click.echo(f"{title:26}{milliseconds(row['p50']):>10}{milliseconds(row['p99']):>10}")
    if any(rows[kind]["lost"] for kind in _TITLES):
        raise OepyError("first packets were lost", "see `oepy lab run`, and the daemon's events")


def _beside_libreswan(rounds: int, together: int, key_type: str, datapath: str, as_json: bool) -> None:
    from oepy.bench import beside_libreswan as benchmark

    rows = benchmark.summary(benchmark.run(rounds, together, key_type, datapath, progress))
    if as_json:
        print_json(rows)
        return
    click.secho(f"{'':18}{'':12}{'median':>10}{'worst':>10}{'sent':>7}{'lost':>6}  failed", bold=True)
    for name, row in rows.items():
        for system in benchmark.SYSTEMS:
            found = row[system]
            click.echo(
                f"{name:18}{system:12}{milliseconds(found['median']):>10}{milliseconds(found['worst']):>10}"
                f"{found['sent'] or '-':>7}{found['lost'] if found['sent'] else '-':>6}"
                f"  {found['failed']} of {found['destinations']}"
            )
        if row["ratio"]:
            click.echo(f"{'':18}{'ratio':12}{row['ratio']:>10.2f}")


@bench.command()
@click.option("--seconds", default=4.0, show_default=True, help="Measured time for each of the two sizes.")
@click.option("--entries", default=100_000, show_default=True, help="Decided destinations of the large run.")
@json_option
@click.pass_context
def trap(ctx: click.Context, seconds: float, entries: int, as_json: bool) -> None:
    """First packets trapped, decided and released a second, with few and with many entries already there.

    Exit status 1 where the rate with many is more than 20 % below the rate with few.
    """
    need_root()
    from oepy.bench.trap import render, run

    result = run(seconds=seconds, entries=entries)
    click.echo(render(result, as_json=as_json))
    ctx.exit(0 if result.flat else 1)


@bench.command()
@click.option("--turns", default=20, show_default=True, help="Blocks of 100 pairs for each size.")
@json_option
@click.pass_context
def sa(ctx: click.Context, turns: int, as_json: bool) -> None:
    """SA pairs installed a second and memory a pair, with 10, 1,000 and 10,000 there, kernel and userland.

    Exit status 1 where a datapath's slowest rate is more than 20 % below its fastest. The kernel's datapath is
    measured where the kernel has ESP (see scripts/second-kernel).
    """
    need_root()
    from oepy.bench.sa import run

    result = run(turns, progress)
    if as_json:
        print_json(result.as_dict())
        ctx.exit(0 if result.flat else 1)
    click.secho(
        f"{'':8}{'pairs':>8}{'installed/s':>13}{'removed/s':>11}{'in process':>12}{'in kernel':>11}",
        bold=True,
    )
    for row in result.rows:
        memory = [
            f"{value:,.0f} B" if value is not None else "-" for value in (row.process_bytes, row.kernel_bytes)
        ]
        click.echo(
            f"{row.datapath:8}{row.size:>8,}{row.rate:>13,.0f}{row.removed:>11,.0f}{memory[0]:>12}{memory[1]:>11}"
        )
    for name in result.datapaths:
        click.echo(f"{name}: slowest by fastest {result.ratio(name):.2f}")
    ctx.exit(0 if result.flat else 1)


_MEASURES = ("tcp", "udp64", "udp512", "udp1300", "sas1", "sas100", "sas1000")
_ESP_TITLES = {
    "tcp": "one TCP stream",
    **{f"udp{size}": f"UDP, {size} bytes" for size in (64, 512, 1300)},
    **{f"sas{count}": f"UDP, 1300 bytes, {count:,} SAs" for count in (1, 100, 1000)},
}


@bench.command()
@click.option("--seconds", default=2.0, show_default=True, help="Length of one turn.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 50), help="Turns of each.")
@click.option("--measure", "measures", multiple=True, type=click.Choice(_MEASURES), help="Only these.")
@json_option
def esp(seconds: float, rounds: int, measures: tuple[str, ...], as_json: bool) -> None:
    """Userland ESP beside strongSwan's kernel-libipsec and, where installed, wireguard-go.

    In turns over veth between namespaces; medians of what the receiver got. For numbers of SAs the ratio is to one.
    """
    need_root()
    from oepy.bench.esp import GOALS, SA_COST, run

    result = run(seconds=seconds, rounds=rounds, measures=measures or _MEASURES, progress=progress)
    data = result.data()
    if as_json:
        print_json(data)
        return
    for name in result.missing:
        click.secho(f"NOT MEASURED: {name} is not installed", fg="yellow", bold=True)
    heads = ("Mbit/s", "ratio", "packets/s", "Mbit/CPU-s", "ratio")
    for measure in dict.fromkeys(row["measure"] for row in data["rows"]):
        click.secho(f"{_ESP_TITLES[measure]:34}" + "".join(f"{head:>12}" for head in heads), bold=True)
        for row in data["rows"]:
            if row["measure"] == measure:
                click.echo(_esp_line(row, GOALS.get(measure, {}).get(row["tunnel"]), SA_COST))


def _esp_line(row: dict[str, Any], goal: float | None, sa_cost: float) -> str:
    if row["measure"].startswith("sas") and row["measure"] != "sas1":
        goal = 1 - sa_cost
    rate, cpu = ("" if row[name] is None else f"{row[name]:.2f}" for name in ("rate_ratio", "cpu_ratio"))
    packets = f"{row['packets_per_second']:,.0f}" if row["packets_per_second"] else ""
    said = f"  goal {goal:.1f}" if goal is not None else ""
    return (
        f"  {row['tunnel']:32}{row['mbit_per_second']:12,.0f}{rate:>12}{packets:>12}"
        f"{row['mbit_per_cpu_second']:12,.0f}{cpu:>12}{said}"
    )


@bench.command("dns")
@click.option(
    "--turns", default=3, show_default=True, type=click.IntRange(1, 20), help="Blocks of 200 lookups."
)
@click.option(
    "--cold", default=20, show_default=True, type=click.IntRange(1, 500), help="Zones not seen before."
)
@json_option
def dns_lookups(turns: int, cold: int, as_json: bool) -> None:
    """Validated lookups beside libunbound, and their CPU beside the bare signature checks. Needs no root.

    RSA-2048, P-256 and Ed25519 zones; one by one and 100 at once with the zone's keys known, and in zones not seen
    before.
    """
    from dataclasses import asdict

    from oepy.bench.dns import render, run

    rows = run(turns, cold)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        click.echo(render(rows))


@bench.command()
@click.option("--hosts", default=1_000_000, show_default=True, type=click.IntRange(1_000, 10_000_000))
@click.option("--rounds", default=1, show_default=True, type=click.IntRange(1, 100))
@click.option("--ipv6", is_flag=True, help="IPv6 addresses.")
@click.option("--shuffled", is_flag=True, help="An inventory that jumps between zones.")
@json_option
def zone(*, hosts: int, rounds: int, ipv6: bool, shuffled: bool, as_json: bool) -> None:
    """Zone files from 10,000, 100,000, ... hosts: hosts a second and memory, beside BIND reading the files.

    Every host has its own address and its own Ed25519 key. Needs no root; a million hosts need 600 MB of disk
    in the directory for temporary files.
    """
    from oepy.bench import zone as benchmark

    result = benchmark.run(hosts, rounds, ipv6=ipv6, shuffled=shuffled, on_progress=progress)
    if as_json:
        print_json(result.as_dict())
        return
    click.secho(
        f"{'hosts':>10}{'zones':>7}{'hosts/s':>10}{'time':>9}{'CPU':>9}{'memory':>9}"
        f"{'BIND time':>11}{'BIND CPU':>10}{'CPU ratio':>11}",
        bold=True,
    )
    for row in result.rows:
        click.echo(
            f"{row.hosts:>10,}{row.zones:>7}{row.rate:>10,.0f}{row.seconds:>7.2f} s{row.cpu:>7.2f} s"
            f"{row.peak / 1e6:>6.0f} MB{row.bind_seconds:>9.2f} s{row.bind_cpu:>8.2f} s{row.ratio:>11.2f}"
        )
    highest = max(row.peak for row in result.rows)
    is_held = result.flat and highest <= benchmark.MEMORY_GOAL
    click.echo(f"memory: {'flat within 20%' if result.flat else 'NOT flat'}, at most {highest / 1e6:.0f} MB")
    if not is_held:
        raise OepyError(
            f"the goal is at most {benchmark.MEMORY_GOAL / 1e6:.0f} MB, flat from 10,000 hosts on"
        )


@bench.command()
@click.option("--connections", default=10_000, show_default=True, type=click.IntRange(10, 20_000))
@json_option
def peers(connections: int, as_json: bool) -> None:
    """What 10, 1,000, ... configured connections cost: to add them, the start, memory, and one connection more."""
    from oepy.bench import peers as benchmark

    need_root()
    sizes = [size for size in benchmark.SIZES if size < connections] + [connections]
    result = benchmark.run(sizes, progress).as_dict()
    if as_json:
        print_json(result)
        return
    heads = {
        "connections": 12,
        "added": 10,
        "each": 12,
        "start": 10,
        "one more": 12,
        "its CPU": 12,
        "floor": 12,
        "memory": 10,
    }
    click.secho("".join(head.rjust(width) for head, width in heads.items()), bold=True)
    for row in result["rows"]:
        click.echo(
            f"{row['connections']:>12,}{row['all_at_once']:>8.2f} s"
            f"{milliseconds(row['milliseconds_each'] / 1000):>12}"
            f"{row['start']:>8.2f} s{milliseconds(row['add']):>12}"
            f"{milliseconds(row['add_cpu']):>12}{milliseconds(row['floor']):>12}"
            f"{row['memory'] / 1e6:>7.0f} MB"
        )
    click.echo(
        f"a connection: {result['bytes_a_connection'] / 1000:.1f} kB, "
        f"{result['milliseconds_a_connection_at_start']:.2f} ms at the start"
    )


_AUTHS = ("psk", "ed25519", "p256", "rsa-3072")


@bench.command("ike")
@click.option("--auth", "auths", multiple=True, type=click.Choice(_AUTHS), help="Only these.")
@click.option("--kem/--no-kem", default=None, help="Only with, or only without, ML-KEM-768.")
@click.option("--at-once", multiple=True, type=click.IntRange(1, 1000), help="Concurrency; 1, 10 and 100.")
@click.option(
    "--handshakes", default=200, show_default=True, type=click.IntRange(1, 5000), help="Of one block."
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50), help="Blocks of each.")
@click.option(
    "--memory",
    "memory_sas",
    default=5000,
    show_default=True,
    type=click.IntRange(0, 50_000),
    help="SAs up at the same time; 0: no measurement of memory.",
)
@json_option
def ike_handshakes(
    *,
    auths: tuple[str, ...],
    kem: bool | None,
    at_once: tuple[int, ...],
    handshakes: int,
    rounds: int,
    memory_sas: int,
    as_json: bool,
) -> None:
    """IKEv2 handshakes: rate, time and CPU of both sides, beside charon and the bare cryptography.

    One initiator against oepy's daemon (datapath: none) and strongSwan's charon in turns, a child SA with each
    handshake. Then the memory of an established IKE SA with its child.
    """
    from oepy.bench import ike as benchmark

    need_root()
    kems = (False, True) if kem is None else (kem,)
    result = benchmark.run(
        auths or _AUTHS, kems, at_once or benchmark.AT_ONCE, handshakes, rounds, memory_sas, progress
    )
    if as_json:
        print_json(result.as_dict())
        return
    if result.missing:
        click.secho(f"NOT MEASURED: charon ({result.missing} is not installed)", fg="yellow", bold=True)
    click.secho(
        f"{'':27}{'at once':>8}{'a second':>10}{'p50':>10}{'p99':>10}{'CPU: initiator':>16}{'responder':>11}"
        f"{'by floor':>10}{'by charon':>11}",
        bold=True,
    )
    for row in result.rows:
        name = row.auth + (" + ML-KEM" if row.kem else "")
        ratio = result.by_charon(row)
        click.echo(
            f"{name:19}{row.responder:8}{row.at_once:>8}{row.rate:>10,.0f}"
            f"{milliseconds(row.p50):>10}{milliseconds(row.p99):>10}"
            f"{1000 * row.initiator_cpu:>13.2f} ms{1000 * row.responder_cpu:>8.2f} ms"
            f"{row.responder_cpu / result.floor(row).responder:>10.1f}"
            f"{'-' if ratio is None else f'{ratio:.2f}':>11}"
        )
    for floor in result.floors:
        name = floor.auth + (" + ML-KEM" if floor.kem else "")
        click.echo(
            f"{name:19}{'floor':8}{'':38}{1000 * floor.initiator:>13.2f} ms{1000 * floor.responder:>8.2f} ms"
        )
    if any(row.kem for row in result.rows):
        click.echo("charon has no ML-KEM before strongSwan 6.0: it takes no part in those rows")
    for memory in result.memory:
        kind, size = ("resident", memory.resident) if memory.traced is None else ("traced", memory.traced)
        click.echo(
            f"memory of an IKE SA with its child, {memory.sas:>6,} there: {memory.responder:7}"
            f"{(size or 0) / 1000:>6.1f} kB {kind}"
        )
