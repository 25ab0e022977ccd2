"""How commands print: JSON, or tables that use colour on a terminal only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from oepy.control.client import ControlClient

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

_COLOURS = {"private": "green", "clear": "yellow", "held": "cyan", "blocked": "red"}


def client(ctx: click.Context) -> ControlClient:
    """The client for the daemon of this configuration."""
    return ControlClient(socket_path(ctx.obj))


def socket_path(config_path: str | None) -> Path:
    """control.socket of the configuration."""
    from oepy.configfile import DEFAULT_SOCKET, peek

    return Path(str(peek(config_path, "control", "socket") or DEFAULT_SOCKET))


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """A table; `empty` is what stands there when there are no rows."""
    if not rows:
        click.echo(empty)
        return
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(title), *(len(row[index]) for row in texts)) for index, title in enumerate(columns)]
    click.secho(
        "  ".join(title.ljust(width) for title, width in zip(columns, widths, strict=True)), bold=True
    )
    for row in texts:
        cells = [
            click.style(text.ljust(width), fg=_COLOURS.get(text))
            for text, width in zip(row, widths, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.0f} s"
    if value < 3600:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.1f} ms"


def size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def coloured(word: str) -> str:
    return click.style(word, fg=_COLOURS.get(word), bold=True)
