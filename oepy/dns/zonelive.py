"""Check of a zone as the world sees it: by the validator's answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import dns.name
import dns.rdatatype

from oepy.dns.inventory import Inventory
from oepy.dns.message import name_key
from oepy.dns.validator import Outcome, Validator
from oepy.dns.zonecheck import Checked, Expected, Records, check_keys
from oepy.model import Security

MAX_UNDERWAY = 32  # lookups at once
_ADDRESSES = (dns.rdatatype.A, dns.rdatatype.AAAA)


async def check_live(
    validator: Validator, zone: dns.name.Name, inventory: Inventory | None = None
) -> Checked:
    """The delegation; with an inventory also every record of it, and key records beside it at its names. A zone
    cannot be listed by questions, so without an inventory only the zone's own name is asked for keys. Raises
    ConfigError for mistakes of the inventory."""
    checked = Checked(zone)
    expected = Expected(inventory, zone) if inventory is not None else None
    soa = await validator.lookup(zone, dns.rdatatype.SOA)
    if not _judge(soa, zone, checked, set()):
        return checked
    if not soa.rdatas or soa.canonical_name != zone:
        checked.complain("delegation", zone, dns.rdatatype.SOA, "there is no such zone")
        return checked
    await _check_servers(validator, zone, checked)
    places = {(name_key(zone), int(rdtype)): zone for rdtype in (dns.rdatatype.IPSECKEY, dns.rdatatype.TXT)}
    for (key, rdtype), (owner, _rdatas) in (expected.records.sets if expected else {}).items():
        places[key, rdtype] = owner
        if rdtype != dns.rdatatype.CNAME:
            for kind in (dns.rdatatype.IPSECKEY, dns.rdatatype.TXT):
                places[key, int(kind)] = owner
    records = Records(zone)
    is_signed = soa.status is Security.SECURE  # else one complaint is enough
    slots = asyncio.Semaphore(MAX_UNDERWAY)

    async def look(owner: dns.name.Name, rdtype: int) -> None:
        async with slots:
            outcome = await validator.lookup(owner, rdtype)
        if _judge(outcome, owner, checked, set() if is_signed else {Security.INSECURE}):
            for rdata in outcome.rdatas:
                records.add(owner, rdata)

    for block in _blocks([(owner, place[1]) for place, owner in places.items()], 1000):
        await asyncio.gather(*(look(owner, rdtype) for owner, rdtype in block))
    check_keys(records, checked, is_whole=False)
    if expected is not None:
        expected.compare(records, checked)
    return checked


def _judge(outcome: Outcome, owner: dns.name.Name, checked: Checked, forgiven: set[Security]) -> bool:
    """Whether there is an answer to go on with; complains of one that oepy would not trust."""
    if outcome.status is not Security.SECURE and outcome.status not in forgiven:
        reason = f"is {outcome.status.value}" + f": {outcome.reason}" * bool(outcome.reason)
        checked.complain("insecure", owner, outcome.question.type, reason)
    return outcome.is_usable


async def _check_servers(validator: Validator, zone: dns.name.Name, checked: Checked) -> None:
    outcome = await validator.lookup(zone, dns.rdatatype.NS)
    if outcome.is_usable and not outcome.rdatas:
        checked.complain("delegation", zone, dns.rdatatype.NS, "there are no name servers")
    for rdata in outcome.rdatas:
        target = rdata.target  # type: ignore[attr-defined]
        answers = [await validator.lookup(target, rdtype) for rdtype in _ADDRESSES]
        if not any(answer.rdatas for answer in answers):
            checked.complain("delegation", zone, dns.rdatatype.NS, f"{target} has no address")


def _blocks(items: list[tuple[dns.name.Name, int]], size: int) -> Iterable[list[tuple[dns.name.Name, int]]]:
    return (items[at : at + size] for at in range(0, len(items), size))
