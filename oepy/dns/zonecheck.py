"""Checks the key records of a zone file: would oepy use them?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import dns.exception
import dns.name
import dns.rdatatype
import dns.rdtypes.ANY.TXT
import dns.zone

from oepy.dns.records import is_oe_text, is_old_oe_text, parse_ipseckey, parse_oe_text
from oepy.errors import ConfigError, ParseError

_KINDS = (dns.rdatatype.IPSECKEY, dns.rdatatype.TXT)


@dataclass(frozen=True, slots=True)
class Checked:
    """`good` counts usable key records, `problems` names each that is not usable."""

    good: int
    problems: tuple[str, ...]


def check_file(path: Path) -> Checked:
    """Raises ConfigError where the file is no zone file at all (naming the first line that is not)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    try:
        origin = _origin(path, text)
        zone = dns.zone.from_text(text, origin, relativize=False, check_origin=False, filename=path.name)
    except (dns.exception.DNSException, ValueError) as error:
        raise ConfigError(str(path), [f"no zone file: {error}"]) from None
    good, problems = 0, []
    for rdtype in _KINDS:
        for owner, _ttl, rdata in zone.iterate_rdatas(rdtype):
            try:
                good += _is_key(rdata)
            except ParseError as error:
                problems.append(f"{owner} {dns.rdatatype.to_text(rdtype)}: {error}")
    return Checked(good, tuple(problems))


def _origin(path: Path, text: str) -> dns.name.Name:
    """`db.ZONE` names its zone, unless the file says so itself."""
    match = re.search(r"^\$ORIGIN\s+(\S+)", text, re.MULTILINE | re.IGNORECASE)
    name = match[1] if match else path.name.removeprefix("db.")
    try:
        return dns.name.from_text(name, dns.name.root)
    except (dns.exception.DNSException, ValueError):
        return dns.name.root


def _is_key(rdata: object) -> bool:
    """Raises ParseError for a record of ours that is not usable."""
    if isinstance(rdata, dns.rdtypes.ANY.TXT.TXT):
        joined = b"".join(rdata.strings)
        if is_old_oe_text(joined):
            raise ParseError("X-IPsec-Gateway is an old form; write X-IPsec-Server")
        if not is_oe_text(joined):
            return False
        parse_oe_text(rdata.strings)
        return True
    wire = rdata.to_wire()  # type: ignore[attr-defined]
    parse_ipseckey(wire).public_key()
    return True
