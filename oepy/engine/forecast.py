"""What would become of a destination that nobody has talked to yet: the table read without an engine."""

from __future__ import annotations

from collections.abc import Callable

from oepy.engine import table
from oepy.engine.table import Cause
from oepy.model import Absent, Bogus, Insecure, IpAddress, KeyAnswer, PolicyGroup, Secure, Verdict

STATIC = {
    PolicyGroup.CLEAR: "always in the clear; offers of this peer are not answered",
    PolicyGroup.CLEAR_OR_PRIVATE: "in the clear, until the peer offers a tunnel",
    PolicyGroup.BLOCK: "dropped both ways",
}


def cause_of(answer: KeyAnswer) -> Cause:
    """Why this answer gives no tunnel. A secure answer reaches here only without a gateway to talk to."""
    if isinstance(answer, Bogus):
        return Cause.BOGUS
    if isinstance(answer, Insecure):
        return Cause.INSECURE
    if isinstance(answer, (Absent, Secure)):
        return Cause.ABSENT
    return Cause.UNREACHABLE


def forecast(
    group: PolicyGroup,
    answer: KeyAnswer,
    *,
    use_insecure_keys: bool,
    by_certificate: bool = False,
    is_own: Callable[[IpAddress], bool] = lambda _: False,
) -> str:
    """One sentence: what the first packet would meet. `by_certificate` as of `EngineSettings`, for this one."""
    usable = answer.keys if isinstance(answer, Secure) else ()
    if isinstance(answer, Insecure) and use_insecure_keys:
        usable = answer.keys
    reachable = [record for record in usable if record.gateways]  # not `@fqdn`: that one comes to us
    ours = any(is_own(gateway) for record in reachable for gateway in record.gateways)
    if reachable and not ours:
        gateways = ", ".join(str(address) for address in reachable[0].gateways)
        return f"the first packet is held while IKE is negotiated with {gateways}"
    cause = Cause.OURS if ours else cause_of(answer)
    outcome = table.outcome_for(group, cause, after_failed_ike_blocks=False)
    then = "goes on in the clear" if outcome.verdict is Verdict.CLEAR else "is blocked"
    detail = f" ({answer.reason})" if answer.reason else ""
    if by_certificate and not usable and isinstance(answer, (Absent, Insecure)):
        asked = f"the first packet is held for some seconds while {answer.subject} is asked for a certificate"
        return f"{asked}; without a good one it {then}: {cause.value}{detail}"
    return f"the first packet {then}: {cause.value}{detail}"
