"""Manual SAs and policies from mappings: the `manual:` section of the configuration, and what the commands send.

Values may be text or already numbers and booleans, as YAML and JSON give them. Nothing is raised: every mistake is
a `Problem` with its path. The text of a problem never holds a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from oepy.errors import OepyError
from oepy.manual.algorithms import AEADS, CIPHERS, MACS, Algorithm, unknown
from oepy.manual.model import (
    MAX_POLICIES,
    MAX_PRIORITY,
    MAX_REPLAY_WINDOW,
    MAX_REQID,
    MAX_SAS,
    MAX_TEMPLATES,
    MIN_PRIORITY,
    MIN_SPI,
    NO_KEY,
    NO_LIFETIME,
    PROTOCOLS,
    WITH_PORTS,
    Encap,
    ManualPolicy,
    ManualSa,
    Selector,
    Template,
    default_priority,
)
from oepy.model import IpAddress, IpNetwork, Lifetime, Secret
from oepy.policy import parse_prefix

Path = tuple[str | int, ...]
KeyFiles = Callable[[str], bytes]  # the content of a private file by its name as written; raises OepyError
MAX_TEXT = 4096  # characters of one value
_HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")


@dataclass(frozen=True, slots=True)
class Problem:
    """`path` leads from the manual section to the value, such as ("sas", 0, "spi")."""

    path: Path
    text: str


class _Refused(Exception):
    """One value is wrong; the text says how to mend it."""


class _Fields:
    """The fields of one mapping, each taken once; what is wrong is remembered."""

    def __init__(self, value: object, path: Path, problems: list[Problem], known: str) -> None:
        self._path = path
        self._problems = problems
        self._values: Mapping[Any, Any] = {}
        names = known.split()
        if not isinstance(value, Mapping):
            self.wrong(f"is no mapping with {', '.join(names)}")
            return
        self._values = value
        for name in value:
            if name not in names:
                self.wrong(f"unknown key; known here are {', '.join(names)}", str(name)[:64])

    def wrong(self, text: str, name: str = "") -> None:
        self._problems.append(Problem((*self._path, name) if name else self._path, text))

    def has(self, name: str) -> bool:
        return self._values.get(name) not in (None, "")

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def take(
        self, name: str, read: Callable[[str], Any], default: Any = None, *, needed: bool = False
    ) -> Any:
        """The value read from its text, or `default` where it is missing or wrong."""
        if not self.has(name):
            if needed:
                self.wrong("is missing", name)
            return default
        value = self._values[name]
        if isinstance(value, (Mapping, list)) or len(str(value)) > MAX_TEXT:
            self.wrong("must be a single value", name)
            return default
        try:
            return read(str(value).strip())
        except _Refused as error:
            self.wrong(str(error), name)
            return default


def _one_of(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise _Refused(f"{text!r} is none of {', '.join(names)}")
        return text

    return read


def _number(first: int, last: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text, 0)
        except ValueError:
            raise _Refused(f"{text[:40]!r} is no number; write it like 4096 or 0x1000") from None
        if not first <= value <= last:
            raise _Refused(f"{value} is not within {first} to {last}")
        return value

    return read


def _spi(text: str) -> int:
    value = _number(0, 0xFFFFFFFF)(text)
    if value < MIN_SPI:
        raise _Refused(f"{value} is reserved (RFC 4303 §2.1); take one of {MIN_SPI} to 0xffffffff")
    return value


def _boolean(text: str) -> bool:
    words = {"true": True, "yes": True, "false": False, "no": False}
    if text.lower() not in words:
        raise _Refused(f"{text[:40]!r} is neither true nor false")
    return words[text.lower()]


def _address(text: str) -> IpAddress:
    try:
        address = ip_address(text)
    except ValueError:
        raise _Refused(f"{text[:80]!r} is no IP address; write it like 192.0.2.1 or 2001:db8::1") from None
    if address.is_unspecified or getattr(address, "scope_id", None):
        raise _Refused(f"{address} names no host; write an address without a zone")
    return address


def _prefix(text: str) -> IpNetwork:
    try:
        return parse_prefix(text, "192.0.2.0/24 or 2001:db8::/32")
    except ValueError as error:
        raise _Refused(str(error)) from None


def _protocol(text: str) -> int:
    if text == "any":
        return 0
    return PROTOCOLS[text] if text in PROTOCOLS else _protocol_number(text)


def _protocol_number(text: str) -> int:
    if not text.isdecimal() or not text.isascii() or not 0 <= int(text[:4]) <= 255:
        raise _Refused(f"{text[:40]!r} is no protocol; write any, {', '.join(PROTOCOLS)} or a number")
    return int(text)


def _port(text: str) -> int:
    return 0 if text == "any" else _number(1, 65535)(text)


# ---- keys --------------------------------------------------------------------------------------------------


def parse_hex_key(text: str) -> bytes:
    """A key as `0x…`. Raises ValueError, which does not name the key."""
    digits = text[2:] if text[:2].lower() == "0x" else ""
    if not digits or len(digits) % 2 or not _HEX_DIGITS.issuperset(digits.encode("utf-8", "replace")):
        raise ValueError("a key is written as 0x and an even number of hexadecimal digits")
    return bytes.fromhex(digits)


def _file_key(content: bytes, length: int) -> bytes:
    """The key in a file: hexadecimal with or without 0x and white space around, else the bytes themselves."""
    text = content.strip()
    if text[:2].lower() == b"0x":
        text = text[2:]
    if text and len(text) % 2 == 0 and _HEX_DIGITS.issuperset(text) and len(content) != length:
        return bytes.fromhex(text.decode("ascii"))
    return content


def _key(fields: _Fields, name: str, algorithm: Algorithm, key_files: KeyFiles) -> Secret:
    """The secret in `name` or in the file that `name`_file names."""
    in_file = f"{name}_file"
    if fields.has(name) and fields.has(in_file):
        fields.wrong(f"{name} stands here too; keep one of both", in_file)
        return NO_KEY
    if not fields.has(name) and not fields.has(in_file):
        if algorithm.key_length:
            fields.wrong(f"is missing (or {in_file}): {algorithm.name} needs a key", name)
        return NO_KEY
    where = name if fields.has(name) else in_file
    try:
        if where == name:
            key = parse_hex_key(str(fields.raw(name)).strip())
        else:
            key = _file_key(key_files(str(fields.raw(in_file))), algorithm.key_length)
    except (ValueError, OepyError) as error:
        fields.wrong(str(error), where)
        return NO_KEY
    if len(key) != algorithm.key_length:
        fields.wrong(_wrong_length(algorithm, len(key)), where)
    return Secret(key)


def _wrong_length(algorithm: Algorithm, length: int) -> str:
    salted = (
        " with its 4-byte salt at the end"
        if algorithm.key_length % 8 == 4 and "sha" not in algorithm.name
        else ""
    )
    text = (
        f"{algorithm.name} wants a key of {algorithm.key_length} bytes ({algorithm.key_length * 8} bits)"
        f"{salted}, this one has {length} bytes"
    )
    table = next((t for t in (CIPHERS, AEADS, MACS) if algorithm.name in t), {})
    fitting = [item.name for item in table.values() if item.key_length == length and length]
    return text + (f"; that would fit {', '.join(fitting)}" if fitting else "")


def _algorithm(
    fields: _Fields, name: str, table: dict[str, Algorithm], *, weak_allowed: bool
) -> Algorithm | None:
    text = fields.take(name, str)
    if text is None:
        return None
    found = table.get(text)
    if found is None:
        fields.wrong(unknown(name, text[:40], table), name)
    elif found.weak and not weak_allowed:
        fields.wrong(f"{found.name} {found.weak}", name)
    return found


# ---- SAs ---------------------------------------------------------------------------------------------------

_SA_KEYS = (
    "src dst protocol spi mode encryption encryption_key encryption_key_file integrity integrity_key "
    "integrity_key_file aead aead_key aead_key_file reqid encap replay_window esn lifetime allow_weak"
)
_LIFETIME_KEYS = "soft_seconds hard_seconds soft_bytes hard_bytes soft_packets hard_packets"
_MAX_LIMIT = (1 << 63) - 1


def read_sa(value: object, path: Path, problems: list[Problem], key_files: KeyFiles) -> ManualSa | None:
    """One SA; None where it has mistakes, which stand in `problems` then."""
    before = len(problems)
    fields = _Fields(value, path, problems, _SA_KEYS)
    if len(problems) > before and not isinstance(value, Mapping):
        return None
    src, dst = fields.take("src", _address, needed=True), fields.take("dst", _address, needed=True)
    if src and dst and src.version != dst.version:
        fields.wrong(
            f"{dst} and src {src} are of two families; the outer addresses of an SA are of one", "dst"
        )
    if src and src.is_multicast:
        fields.wrong(f"{src} is a multicast address; a sender has one of its own", "src")
    protocol = fields.take("protocol", _one_of("esp", "ah"), "esp", needed=True)
    spi = fields.take("spi", _spi, 0, needed=True)
    mode = fields.take("mode", _one_of("tunnel", "transport"), "tunnel", needed=True)
    allow_weak = fields.take("allow_weak", _boolean, default=False)
    names = _read_algorithms(fields, protocol, key_files, weak_allowed=allow_weak)
    window = fields.take("replay_window", _number(0, MAX_REPLAY_WINDOW), 0)
    esn = fields.take("esn", _boolean, default=False)
    if esn and not window:
        fields.wrong("extended sequence numbers need a replay_window, of 32 or more say", "esn")
    encap = _read_encap(fields, protocol)
    reqid = fields.take("reqid", _number(0, MAX_REQID), 0)
    lifetime = _read_lifetime(fields)
    if len(problems) > before:
        return None
    return ManualSa(src, dst, protocol, spi, mode, *names, reqid, encap, window, esn, lifetime, allow_weak)


def _read_algorithms(
    fields: _Fields, protocol: str, key_files: KeyFiles, *, weak_allowed: bool
) -> tuple[str, Secret, str, Secret]:
    none = NO_KEY
    if protocol == "ah":
        for name in ("encryption", "aead"):
            if fields.has(name):
                fields.wrong("AH does not encrypt; remove it, or take protocol esp", name)
        if not fields.has("integrity"):
            fields.wrong("is missing: AH needs one, such as sha256", "integrity")
    elif fields.has("aead"):
        for name in ("encryption", "integrity"):
            if fields.has(name):
                fields.wrong("an AEAD does this, too; keep aead, or encryption with integrity", name)
        aead = _algorithm(fields, "aead", AEADS, weak_allowed=weak_allowed)
        return (
            (aead.name, _key(fields, "aead_key", aead, key_files), "", none) if aead else ("", none, "", none)
        )
    else:
        for name in ("encryption", "integrity"):
            if not fields.has(name) and not (name == "integrity" and str(fields.raw("encryption")) in AEADS):
                fields.wrong("is missing: ESP needs encryption and integrity (or aead)", name)
    encryption = integrity = ""
    encryption_key = integrity_key = none
    if protocol == "esp":
        cipher = _algorithm(fields, "encryption", CIPHERS, weak_allowed=weak_allowed)
        if cipher:
            encryption, encryption_key = cipher.name, _key(fields, "encryption_key", cipher, key_files)
    mac = _algorithm(fields, "integrity", MACS, weak_allowed=weak_allowed)
    if mac:
        integrity, integrity_key = mac.name, _key(fields, "integrity_key", mac, key_files)
    return encryption, encryption_key, integrity, integrity_key


def _read_encap(fields: _Fields, protocol: str) -> Encap | None:
    if not fields.has("encap"):
        return None
    if protocol != "esp":
        fields.wrong("only ESP goes in UDP (RFC 3948 §1); remove it", "encap")
        return None
    inner = _Fields(fields.raw("encap"), (*fields._path, "encap"), fields._problems, "sport dport")
    return Encap(inner.take("sport", _number(1, 65535), 4500), inner.take("dport", _number(1, 65535), 4500))


def _read_lifetime(fields: _Fields) -> Lifetime:
    if not fields.has("lifetime"):
        return NO_LIFETIME
    inner = _Fields(fields.raw("lifetime"), (*fields._path, "lifetime"), fields._problems, _LIFETIME_KEYS)
    limits = {name: inner.take(name, _number(0, _MAX_LIMIT), 0) for name in _LIFETIME_KEYS.split()}
    for unit in ("seconds", "bytes", "packets"):
        soft, hard = limits[f"soft_{unit}"], limits[f"hard_{unit}"]
        if hard and soft > hard:
            inner.wrong(f"{soft} comes after hard_{unit} {hard}; it is the warning before", f"soft_{unit}")
    return Lifetime(**limits)


# ---- policies ----------------------------------------------------------------------------------------------

_POLICY_KEYS = "direction src dst protocol sport dport action template templates priority"
_TEMPLATE_KEYS = "protocol mode src dst level reqid spi"


def read_policy(value: object, path: Path, problems: list[Problem]) -> ManualPolicy | None:
    """One policy; None where it has mistakes, which stand in `problems` then."""
    before = len(problems)
    fields = _Fields(value, path, problems, _POLICY_KEYS)
    if len(problems) > before and not isinstance(value, Mapping):
        return None
    direction = fields.take("direction", _one_of("in", "out", "fwd"), needed=True)
    selector = _read_selector(fields)
    action = fields.take("action", _one_of("ipsec", "bypass", "block"), "ipsec")
    templates = _read_templates(fields, action, selector)
    priority = fields.take("priority", _number(MIN_PRIORITY, MAX_PRIORITY), 0)
    if len(problems) > before or selector is None:
        return None
    return ManualPolicy(direction, selector, action, templates, priority or default_priority(selector))


def read_selector(value: object, path: Path, problems: list[Problem]) -> tuple[str, Selector] | None:
    """Direction and selector alone: what names a policy that is to be deleted."""
    before = len(problems)
    fields = _Fields(value, path, problems, "direction src dst protocol sport dport")
    direction = fields.take("direction", _one_of("in", "out", "fwd"), needed=True)
    selector = _read_selector(fields)
    return (direction, selector) if len(problems) == before and selector else None


def read_sa_key(value: object, path: Path, problems: list[Problem]) -> tuple[IpAddress, str, int] | None:
    """Destination, protocol and SPI: what names an SA that is to be deleted."""
    before = len(problems)
    fields = _Fields(value, path, problems, "dst protocol spi")
    key = (
        fields.take("dst", _address, needed=True),
        fields.take("protocol", _one_of("esp", "ah"), needed=True),
        fields.take("spi", _spi, needed=True),
    )
    return key if len(problems) == before else None


def _read_selector(fields: _Fields) -> Selector | None:
    src, dst = fields.take("src", _prefix, needed=True), fields.take("dst", _prefix, needed=True)
    protocol = fields.take("protocol", _protocol, 0)
    sport, dport = fields.take("sport", _port, 0), fields.take("dport", _port, 0)
    if src is None or dst is None:
        return None
    if src.version != dst.version:
        fields.wrong(f"{dst} and src {src} are of two families; write one policy for each", "dst")
        return None
    for name, port in (("sport", sport), ("dport", dport)):
        if port and protocol not in WITH_PORTS:
            fields.wrong("a port needs a protocol that has them, such as tcp or udp", name)
    return Selector(src, dst, protocol, sport, dport)


def _read_templates(fields: _Fields, action: str, selector: Selector | None) -> tuple[Template, ...]:
    both = [name for name in ("template", "templates") if fields.has(name)]
    if action != "ipsec":
        for name in both:
            fields.wrong(f"action {action} uses no SA; remove it", name)
        return ()
    if len(both) != 1:
        text = (
            "keep one of template and templates"
            if both
            else "is missing: action ipsec names the SA it demands"
        )
        fields.wrong(text, "template")
        return ()
    value = fields.raw(both[0])
    if both == ["template"]:
        items: list[tuple[Path, object]] = [(("template",), value)]
    elif isinstance(value, list) and 0 < len(value) <= MAX_TEMPLATES:
        items = [(("templates", index), item) for index, item in enumerate(value)]
    else:
        fields.wrong(f"must be a list of 1 to {MAX_TEMPLATES} templates", "templates")
        return ()
    read = [_read_template(item, (*fields._path, *at), fields._problems, selector) for at, item in items]
    return tuple(item for item in read if item is not None)


def _read_template(
    value: object, path: Path, problems: list[Problem], selector: Selector | None
) -> Template | None:
    fields = _Fields(value, path, problems, _TEMPLATE_KEYS)
    if not isinstance(value, Mapping):
        return None
    protocol = fields.take("protocol", _one_of("esp", "ah"), "esp", needed=True)
    mode = fields.take("mode", _one_of("tunnel", "transport"), "tunnel", needed=True)
    src, dst = fields.take("src", _address), fields.take("dst", _address)
    if (src is None) != (dst is None) or (mode == "tunnel" and src is None):
        fields.wrong(f"a {mode} needs both its ends, src and dst", "dst" if src else "src")
    elif src is not None and dst is not None and src.version != dst.version:
        fields.wrong(f"{dst} and src {src} are of two families; an SA has one", "dst")
    elif mode == "transport" and dst is not None and selector is not None and dst.version != selector.version:
        fields.wrong(f"transport mode cannot carry {selector.dst} to {dst}: two families", "dst")
    level = fields.take("level", _one_of("require", "use"), "require")
    reqid, spi = fields.take("reqid", _number(0, MAX_REQID), 0), fields.take("spi", _spi, 0)
    return Template(protocol, mode, src, dst, level, reqid, spi)


def read_lists(
    value: object, problems: list[Problem], key_files: KeyFiles
) -> tuple[list[tuple[int, ManualSa]], list[tuple[int, ManualPolicy]]]:
    """The entries of a whole `manual:` section that are right in themselves, each with its place in its list."""
    fields = _Fields(value, (), problems, "sas policies")
    lists: dict[str, list[object]] = {}
    for name, most in (("sas", MAX_SAS), ("policies", MAX_POLICIES)):
        found = fields.raw(name) if fields.has(name) else []
        if not isinstance(found, list):
            fields.wrong("must be a list", name)
        elif len(found) > most:
            fields.wrong(f"{len(found)} entries are more than the {most} that oepy takes", name)
        lists[name] = found if isinstance(found, list) and len(found) <= most else []
    sas = [(i, read_sa(item, ("sas", i), problems, key_files)) for i, item in enumerate(lists["sas"])]
    policies = [(i, read_policy(item, ("policies", i), problems)) for i, item in enumerate(lists["policies"])]
    return [(i, sa) for i, sa in sas if sa is not None], [(i, p) for i, p in policies if p is not None]


def inline_keys(value: object) -> list[Path]:
    """Where in a `manual:` section keys stand themselves, and not in files."""
    sas = value.get("sas") if isinstance(value, Mapping) else None
    return [
        ("sas", index, name)
        for index, sa in enumerate(sas if isinstance(sas, list) else ())
        if isinstance(sa, Mapping)
        for name in ("encryption_key", "integrity_key", "aead_key")
        if sa.get(name)
    ]
