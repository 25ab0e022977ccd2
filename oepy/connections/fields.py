"""The fields of a section, each taken once, and the values that they have. Nothing is raised to the caller: what is
wrong becomes a `Problem` with its path and its mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from oepy.connections.model import ANY, Action, IdPattern, Place, Selector
from oepy.errors import OepyError
from oepy.model import FOREIGN_BITS, MARK_MASK, Mark, PeerIdentity
from oepy.policy import PROTOCOL_NUMBERS, parse_prefix

Path = tuple[str | int, ...]
T = TypeVar("T")
MAX_LIST = 64
MAX_TEXT = 4096
_DURATION = re.compile(r"(\d{1,9})([smhd]?)\Z")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_SECONDS = 10 * 365 * 86400
_ALL_BITS = 0xFFFFFFFF
_PORTED = (6, 17, 33, 132, 136)


@dataclass(frozen=True, slots=True)
class Problem:
    """`path` begins with the section's name."""

    path: Path
    text: str


class Refused(Exception):
    """One value is wrong; the text says how to mend it."""


class Fields:
    """The fields of one mapping, each taken once; what is wrong is remembered."""

    def __init__(self, value: object, path: Path, problems: list[Problem]) -> None:
        self.path, self._problems = path, problems
        self.left: dict[str, Any] = {}
        self.right = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        self._known: list[str] = []
        if self.right:
            assert isinstance(value, dict)
            self.left = dict(value)
        elif value is not None:
            self.wrong("a mapping is expected, such as `{auth: psk}`")

    def wrong(self, text: str, *below: str | int) -> None:
        self._problems.append(Problem((*self.path, *below), text))

    def take(self, name: str, default: T, convert: Callable[[Any], T]) -> T:
        self._known.append(name)
        value = self.left.pop(name, None)
        if value is None:
            return default
        try:
            return convert(value)
        except (Refused, ValueError, OepyError) as error:
            self.wrong(str(error), name)
            return default

    def take_list(self, name: str, default: tuple[T, ...], convert: Callable[[Any], T]) -> tuple[T, ...]:
        self._known.append(name)
        value = self.left.pop(name, None)
        if value is None:
            return default
        items = value if isinstance(value, list) else [value]
        if len(items) > MAX_LIST:
            self.wrong(f"{len(items)} entries; at most {MAX_LIST}", name)
            return default
        found = []
        for index, item in enumerate(items):
            try:
                found.append(convert(item))
            except (Refused, ValueError, OepyError) as error:
                self.wrong(str(error), name, index)
        return tuple(found)

    def take_raw(self, name: str) -> object:
        self._known.append(name)
        return self.left.pop(name, None)

    def finish(self, not_yet: dict[str, str] | None = None) -> None:
        for name in self.left:
            if not_yet and name in not_yet:
                mend = not_yet[name] or "remove it"
                self.wrong(f"this version does not have {name}: {mend}", name)
                continue
            close = difflib.get_close_matches(name, self._known, 1)
            mend = f"did you mean {close[0]!r}?" if close else f"known here are {', '.join(self._known)}"
            self.wrong(f"unknown key; {mend}", name[:64])


# ---- values ------------------------------------------------------------------------------------------------


def text_of(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > MAX_TEXT:
        raise Refused(f"{str(value)[:60]!r} is no text")
    return str(value).strip()


def duration(value: object) -> float:
    """Seconds of `3600`, `60m`, `1h`, `2d`."""
    found = _DURATION.match(text_of(value).lower())
    seconds = int(found[1]) * _UNITS[found[2]] if found else -1
    if not found or seconds > _MAX_SECONDS:
        raise Refused(f"{str(value)[:60]!r} is no time; write it like 3600, 60m, 1h or 2d")
    return float(seconds)


def number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise Refused(f"{str(value)[:60]!r} is no number from 0 on")
    return value


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise Refused(f"{str(value)[:60]!r}: write yes or no")
    return value


def one_of(*words: str) -> Callable[[object], str]:
    def convert(value: object) -> str:
        text = (
            {True: "yes", False: "no"}.get(value, "") if isinstance(value, bool) else text_of(value).lower()
        )
        if text not in words:
            raise Refused(f"{text[:60]!r}: one of {', '.join(words)}")
        return text

    return convert


def selector(value: object) -> Selector:
    """`10.1.0.0/16`, `dynamic`, and either with `[tcp/80]`, `[udp]`, `[/53]`, as in swanctl.conf."""
    text = text_of(value)
    head, bracket, rest = text.partition("[")
    head = head.strip()
    protocol = port = 0
    if bracket:
        if not rest.endswith("]"):
            raise Refused(f"{text[:80]!r}: the bracket is not closed; write it like 10.1.0.0/16[tcp/80]")
        name, _, ending = rest[:-1].strip().lower().partition("/")
        protocol = protocol_number(name)
        if ending not in ("", "any"):
            if not ending.isdigit() or not 0 < int(ending) < 65536:
                raise Refused(f"{ending[:20]!r}: one port from 1 to 65535, or none for all")
            port = int(ending)
            if protocol not in _PORTED:
                raise Refused(f"{text[:80]!r}: a port needs a protocol that has ports, like [tcp/{port}]")
    if head == "dynamic":
        return Selector(None, protocol, port)
    # Its ValueError is told like a refusal
    return Selector(parse_prefix(head, "10.1.0.0/16, 2001:db8::/32 or dynamic"), protocol, port)


def protocol_number(name: str) -> int:
    if name in ("", "any"):
        return 0
    if name in PROTOCOL_NUMBERS:
        return PROTOCOL_NUMBERS[name]
    if name.isdigit() and 0 < int(name) < 256:
        return int(name)
    raise Refused(f"{name[:20]!r} is no protocol; known are {', '.join(PROTOCOL_NUMBERS)}, or its number")


def mark(value: object, same: Mark | None = None) -> Mark:
    """`42`, `0x2a/0xff`, as in swanctl.conf; `%same` is the value of `same`. Without oepy's own bits, which packets
    have beside it."""
    text = text_of(value)
    head, slash, rest = text.partition("/")
    if head in ("%unique", "%unique-dir"):
        raise Refused(
            f"{head}: a mark of each SA's own is not in this version; write a number for each child"
        )
    if head == "%same" and same is None:
        raise Refused("%same is the value of mark_in or mark_out, which is not there")
    try:
        found = same.value if same is not None and head == "%same" else int(head, 0)
        mask = int(rest, 0) if slash else _ALL_BITS
    except ValueError:
        raise Refused(f"{text[:40]!r}: a mark is a number, or number/mask: 42, 0x2a/0xff") from None
    if not 0 <= found <= _ALL_BITS or not 0 <= mask <= _ALL_BITS:
        raise Refused(f"{text[:40]!r}: a mark and its mask have 32 bits")
    if found & mask & MARK_MASK:
        raise Refused(f"{text[:40]!r}: the bits {MARK_MASK:#x} of the mark are oepy's own; take others")
    mask &= FOREIGN_BITS
    if not mask:
        raise Refused(f"{text[:40]!r}: no bit is left of the mask; the bits {MARK_MASK:#x} are oepy's own")
    return Mark(found & mask, mask)


def place(value: object) -> Place:
    text = text_of(value)
    try:
        return Place.of(text)
    except ValueError:
        raise Refused(
            f"{text[:80]!r}: write an address, a prefix, a name or {ANY}; no ranges, and no bits beyond a prefix"
        ) from None


def identity(value: object) -> PeerIdentity:
    text = text_of(value)
    if "=" in text and "*" not in text:
        return PeerIdentity.parse(text)
    if not text or "*" in text or text == ANY or not text.isascii():
        raise Refused(
            f"{text[:80]!r}: one identity: a name, an address, an e-mail address, or C=CH, O=Acme, CN=gw"
        )
    return PeerIdentity.parse(text)


def pattern(value: object) -> IdPattern:
    text = text_of(value)
    if "=" in text:
        PeerIdentity.parse(text)  # its ValueError is told like a refusal
        return IdPattern(text)
    text = text.rstrip(".").lower()
    bad = not text or not text.isascii() or any(letter in text for letter in "?[]")
    if bad or text.count("*") > 1 or ("*" in text and text[0] != "*" and text[-1] != "*"):
        raise Refused(
            f"{text[:80]!r}: a name, an address, an e-mail address, one with * at an end (*.example), "
            f"C=CH, O=Acme, CN=*, or {ANY}"
        )
    return IdPattern(ANY if text == "*" else text)


def command(value: object) -> tuple[str, ...]:
    words = tuple(value) if isinstance(value, list) else (value,)
    if not words or len(words) > MAX_LIST or not all(isinstance(w, str) and "\0" not in w for w in words):
        raise Refused("a list: the program with its path, then its arguments; no shell is run")
    if not words[0].startswith("/"):
        raise Refused(f"{words[0][:80]!r}: the program needs its whole path; no shell is run")
    return words


def start_action(value: object) -> frozenset[str]:
    words = frozenset(text_of(value).lower().replace("|", " ").split())
    if not words or not words <= {"none", "trap", "start"} or ("none" in words and len(words) > 1):
        raise Refused(f"{str(value)[:60]!r}: none, trap, start, or trap|start")
    return words


def action(**older: str) -> Callable[[object], Action]:
    """The older names of swanctl.conf mean the same."""

    def convert(value: object) -> Action:
        word = text_of(value).lower()
        word = older.get(word, word)
        if word not in ("none", "trap", "start"):
            raise Refused(f"{word[:60]!r}: none, trap or start")
        return Action(word)

    return convert
