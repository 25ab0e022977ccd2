"""The file of automatic trust anchors: trusted keys as zone-file lines, all else in comments.

So any program that reads trust anchors may read it, and sees the trusted keys only.
"""

from __future__ import annotations

import calendar
import contextlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import dns.exception
import dns.name
import dns.rdata

from oepy.dns.anchors import MAX_ANCHOR_FILE
from oepy.dns.autoanchors import MAX_TRACKED, KeyState, TrackedKey, TrustPoint
from oepy.dns.signatures import REVOKE, Dnskey
from oepy.errors import ConfigError

HEAD = "; Trust anchors that `oepy run` keeps up to date (RFC 5011). Delete it to begin anew with others.\n"
_POINT = re.compile(r";zone (\S+) checked (\d{14}) due (\d{14})")
_KEY = re.compile(
    r"(;?)(\S+) IN DNSKEY (\d{1,5}) 3 (\d{1,3}) ([A-Za-z0-9+/=]+) ;([A-Z]+) since (\d{14})(?: until (\d{14}))?"
)
_MEND = "restore it from a backup, or delete it to begin anew from dns.trust_anchors"


def read_points(path: Path) -> tuple[TrustPoint, ...]:
    """Empty where there is no file yet. Raises ConfigError with the line."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_ANCHOR_FILE + 1)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    if len(data) > MAX_ANCHOR_FILE:
        raise ConfigError(str(path), [f"is larger than {MAX_ANCHOR_FILE} bytes; {_MEND}"])
    return parse_points(data.decode("utf-8", "replace"), str(path))


def parse_points(text: str, source: str) -> tuple[TrustPoint, ...]:
    """Raises ConfigError with the line."""
    points: dict[dns.name.Name, TrustPoint] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("; "):
            continue
        try:
            _take(line, points)
        except (ValueError, OverflowError, dns.exception.DNSException) as error:
            raise ConfigError(source, [f"line {number}: {error or 'is none of oepy'}; {_MEND}"]) from None
    return tuple(points.values())


def _take(line: str, points: dict[dns.name.Name, TrustPoint]) -> None:
    if found := _POINT.fullmatch(line):
        zone = dns.name.from_text(found[1])
        if zone in points:
            raise ValueError(f"the zone {zone} stands twice")
        points[zone] = TrustPoint(zone, (), _seconds(found[2]), _seconds(found[3]))
        return
    found = _KEY.fullmatch(line)
    if not found:
        raise ValueError("is no line of this file")
    zone, state = dns.name.from_text(found[2]), KeyState(found[6])
    if zone not in points:
        raise ValueError(f"a key of {zone} stands before its zone")
    if bool(found[1]) is state.is_trusted:
        raise ValueError(f"a key in state {state.value} is {'' if found[1] else 'not '}commented out")
    rdata = dns.rdata.from_text("IN", "DNSKEY", f"{found[3]} 3 {found[4]} {found[5]}")
    if not isinstance(rdata, Dnskey) or int(rdata.flags) & REVOKE:
        raise ValueError("the key has the flag REVOKE")
    point = points[zone]
    if len(point.keys) >= MAX_TRACKED or any(each.is_same(rdata) for each in point.keys):
        raise ValueError("the key stands twice, or the zone has too many")
    key = TrackedKey(rdata, state, _seconds(found[7]), _seconds(found[8]) if found[8] else 0)
    points[zone] = TrustPoint(zone, (*point.keys, key), point.checked, point.due)


def format_points(points: Iterable[TrustPoint]) -> str:
    """What `parse_points` reads."""
    lines = [HEAD]
    for point in points:
        lines.append(f";zone {point.zone} checked {_text(point.checked)} due {_text(point.due)}\n")
        for each in point.keys:
            mark = "" if each.state.is_trusted else ";"
            end = f" until {_text(each.until)}" if each.until else ""
            numbers = f"{int(each.key.flags)} 3 {int(each.key.algorithm)}"
            data = each.key.to_text().split(" ", 3)[3].replace(" ", "")
            state = f";{each.state.value} since {_text(each.since)}{end}"
            lines.append(f"{mark}{point.zone} IN DNSKEY {numbers} {data} {state}\n")
    return "".join(lines)


def write_points(path: Path, points: Iterable[TrustPoint]) -> None:
    """All or nothing, also when power fails. Raises OSError."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), 0o644)
            stream.write(format_points(points))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _text(seconds: int) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))


def _seconds(text: str) -> int:
    seconds = calendar.timegm(time.strptime(text, "%Y%m%d%H%M%S"))
    if seconds < 0:
        raise ValueError(f"{text} is before 1970")
    return seconds
