"""`oepy lab`: the lab that `make demo` uses."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oepy.errors import OepyError, UsageError

if TYPE_CHECKING:
    from oepy.lab.demo import Row
    from oepy.lab.network import LabHost

PID_FILE = Path("/run/oepy-lab.pid")
_HEADER = (
    f"{'from':6} {'to':9} {'IP':3} {'expected':8} {'seen':8} {'clear':>5} {'esp':>4} {'ike':>4} {'1st':4}"
    f"{'cold':>9} {'(dns':>8} {'ike)':>8} {'warm':>8}  explain"
)


@click.group()
def lab() -> None:
    """A small Internet of network namespaces on this machine: real BIND, real packets, no traces."""


def _need_root() -> None:
    if os.geteuid() != 0:
        raise OepyError("the lab makes network namespaces and needs root", "run it as root")
    missing = [tool for tool in ("ip", "nft", "curl", "named") if shutil.which(tool) is None]
    if missing:
        raise OepyError(f"not installed: {', '.join(missing)}", "`make demo` installs what the lab needs")


@lab.command()
@click.option("--report", "report_path", type=click.Path(path_type=Path), help="Write a JSON report.")
@click.option("--capture", "capture_path", type=click.Path(path_type=Path), help="Write the capture (pcap).")
@click.option(
    "--key-log",
    "key_log",
    type=click.Path(path_type=Path),
    help="Write the keys for tshark into this directory (for debugging; it makes the capture readable).",
)
@click.option(
    "--datapath",
    type=click.Choice(["auto", "xfrm", "tun"]),
    default="auto",
    show_default=True,
    help="Of all hosts: the kernel's ESP, or the userland one.",
)
@click.option(
    "--trap",
    type=click.Choice(["auto", "nfqueue", "acquire"]),
    default="auto",
    show_default=True,
    help="Of all hosts: the packet queue, or the kernel's own trap.",
)
@click.option("--private-seconds", default=30.0, show_default=True, help="Length of the leak test.")
@click.option(
    "--keep-logs", type=click.Path(path_type=Path), help="Copy the daemons' logs to this directory."
)
def run(
    report_path: Path | None,
    capture_path: Path | None,
    key_log: Path | None,
    datapath: str,
    trap: str,
    private_seconds: float,
    keep_logs: Path | None,
) -> None:
    """Fetch a page between every pair and judge it by a capture on the wire. Ends with 0 where all is as
    expected.

    \b
    Examples:
      oepy lab run
      oepy lab run --capture demo.pcap --key-log keys --report demo.json
    """
    _need_root()
    from oepy.lab import demo
    from oepy.lab.network import LabNetwork

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="oepy-lab-") as name:
        directory = Path(name)
        # BIND drops its privileges and must reach its files.
        directory.chmod(0o755)
        with LabNetwork(directory, key_log=key_log is not None, datapath=datapath, trap=trap) as network:
            try:
                _say("building the lab: eight hosts on one wire, BIND with a signed root of its own")
                network.build()
                pcap = directory / "wire.pcap"
                with network.capture(pcap) as capture:
                    network.start_daemons()
                    _say(f"ready after {time.monotonic() - started:.1f} s")
                    click.secho(_HEADER, bold=True)
                    rows, private = demo.run_demo(
                        network, capture, on_row=_print_row, say=_say, seconds=private_seconds
                    )
            finally:
                if keep_logs is not None:
                    _copy_logs(directory, keep_logs)
            result = demo.report(rows, private, time.monotonic() - started)
            if capture_path is not None:
                shutil.copyfile(pcap, capture_path)
            if key_log is not None:
                copy_key_logs(network.hosts, key_log)
            if report_path is not None:
                demo.save_report(report_path, result)
    _finish(rows, private.as_expected, result["as_expected"], time.monotonic() - started)


def _say(text: str) -> None:
    click.echo(text)
    sys.stdout.flush()


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.1f}ms"


def _print_row(row: Row) -> None:
    delivered = {True: "yes", False: "LOST", None: "-"}[row.first_packet_delivered]
    line = (
        f"{row.source:6} {row.destination:9} v{row.version}  {row.expected:8} {row.seen:8} "
        f"{row.clear_packets:5} {row.esp_packets:4} {row.ike_packets:4} {delivered:4}"
        f"{_ms(row.cold_seconds):>9} {_ms(row.dns_seconds):>8} {_ms(row.ike_seconds):>8} "
        f"{_ms(row.warm_seconds):>8}  {row.explain}"
    )
    click.secho(line, fg=None if row.as_expected else "red")
    for problem in row.problems:
        click.secho(f"       NOT AS EXPECTED: {problem}", fg="red", bold=True)
    sys.stdout.flush()


def _finish(rows: list[Row], private_ok: bool, all_ok: bool, seconds: float) -> None:
    good = sum(row.as_expected for row in rows)
    _say(
        f"\n{good} of {len(rows)} rows as expected; leak test {'passed' if private_ok else 'FAILED'}; "
        f"{seconds:.0f} s in all"
    )
    sys.exit(0 if all_ok else 1)


def _copy_logs(directory: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for log in [*directory.glob("*/daemon.log"), *directory.glob("ns/*.log")]:
        shutil.copyfile(log, target / f"{log.parent.name}-{log.name}")


def copy_key_logs(hosts: dict[str, LabHost], target: Path) -> None:
    """All hosts' key logs in one directory that tshark can take as its own (0600)."""
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    for host in hosts.values():
        source = host.key_log
        if source is None or not source.is_dir():
            continue
        for file in source.iterdir():
            descriptor = os.open(target / file.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "ab") as out:
                out.write(file.read_bytes())


@lab.command()
def up() -> None:
    """Build the lab, start its daemons, and hold it until Ctrl-C or `oepy lab down`."""
    _need_root()
    from oepy.lab.network import LabNetwork

    if _running_lab() is not None:
        raise UsageError("the lab is up already", "take it down with `oepy lab down`")
    with tempfile.TemporaryDirectory(prefix="oepy-lab-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with LabNetwork(directory) as network:
            network.build()
            network.start_daemons()
            PID_FILE.write_text(f"{os.getpid()}\n")
            try:
                for host in network.hosts.values():
                    _say(f"{host.plan.name:9} {host.plan.v4:12} {host.plan.v6:14} {host.namespace.name}")
                alpha = network.hosts["alpha"]
                _say("\ntry, in another terminal:")
                _say(f"  ip netns exec {alpha.namespace.name} ping 198.18.0.20")
                _say(f"  oepy -c {alpha.config_file} explain 198.18.0.20")
                signal.pause()
            except KeyboardInterrupt:
                _say("taking the lab down")
            finally:
                PID_FILE.unlink(missing_ok=True)


def _running_lab() -> int | None:
    try:
        pid = int(PID_FILE.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if b"lab" in command and b"up" in command else None


@lab.command()
def down() -> None:
    """Take down the lab that `oepy lab up` holds, and what a killed one left behind."""
    _need_root()
    from oepy.lab.namespaces import remove_stale

    pid = _running_lab()
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    removed = remove_stale()
    _say("the lab is down" + (f"; {len(removed)} left-over namespaces removed" if removed else ""))
