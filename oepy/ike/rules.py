"""Which payload may appear in which exchange: the one table (RFC 7296 §1.2–1.4 and appendix C).

Of each payload: least, most. What is not in the table is counted by nobody and skipped, as the RFC wants of
payloads that make no sense in an exchange but are known (§2.5); a violation of least or most is
INVALID_SYNTAX. IKE_SA_INIT travels in the clear, everything else inside of SK or SKF.
"""

from __future__ import annotations

from oepy.ike.header import Exchange
from oepy.ike.header import PayloadType as P
from oepy.ike.notify import FIRST_STATUS, NotifyType, ProtocolError
from oepy.ike.payloads import Chain, Notify

MAX_NOTIFIES = 24
MAX_CERTS = 16
MAX_CERTREQS = 8
_MANY = (0, MAX_NOTIFIES)

Rule = dict[P, tuple[int, int]]

_INIT: Rule = {P.SA: (1, 1), P.KE: (1, 1), P.NONCE: (1, 1), P.NOTIFY: _MANY, P.VENDOR: _MANY}
_KEY_EXCHANGE: Rule = {P.KE: (1, 1), P.NOTIFY: _MANY, P.VENDOR: _MANY}
_ERROR: Rule = {P.NOTIFY: (1, MAX_NOTIFIES), P.VENDOR: _MANY}

RULES: dict[tuple[int, bool], Rule] = {  # (exchange, is it a response)
    (Exchange.IKE_SA_INIT, False): _INIT,
    (Exchange.IKE_SA_INIT, True): _INIT | {P.CERTREQ: (0, MAX_CERTREQS)},
    (Exchange.IKE_AUTH, False): {
        P.IDI: (1, 1),
        P.IDR: (0, 1),
        P.AUTH: (1, 1),  # without it the peer wants EAP, which nobody here speaks
        P.SA: (0, 1),
        P.TSI: (0, 1),
        P.TSR: (0, 1),
        P.CERT: (0, MAX_CERTS),
        P.CERTREQ: (0, MAX_CERTREQS),
        P.CP: (0, 1),
        P.NOTIFY: _MANY,
    },
    (Exchange.IKE_AUTH, True): {
        P.IDR: (1, 1),
        P.AUTH: (1, 1),
        P.SA: (0, 1),
        P.TSI: (0, 1),
        P.TSR: (0, 1),
        P.CERT: (0, MAX_CERTS),
        P.CP: (0, 1),
        P.NOTIFY: _MANY,
    },
    (Exchange.CREATE_CHILD_SA, False): {
        P.SA: (1, 1),
        P.NONCE: (1, 1),
        P.KE: (0, 1),
        P.TSI: (0, 1),
        P.TSR: (0, 1),
        P.NOTIFY: _MANY,
    },
    (Exchange.CREATE_CHILD_SA, True): {
        P.SA: (1, 1),
        P.NONCE: (1, 1),
        P.KE: (0, 1),
        P.TSI: (0, 1),
        P.TSR: (0, 1),
        P.NOTIFY: _MANY,
    },
    (Exchange.IKE_INTERMEDIATE, False): _KEY_EXCHANGE,
    (Exchange.IKE_INTERMEDIATE, True): _KEY_EXCHANGE,
    (Exchange.IKE_FOLLOWUP_KE, False): _KEY_EXCHANGE,
    (Exchange.IKE_FOLLOWUP_KE, True): _KEY_EXCHANGE,
    (Exchange.INFORMATIONAL, False): {P.NOTIFY: _MANY, P.DELETE: (0, 8), P.CP: (0, 1)},
    (Exchange.INFORMATIONAL, True): {P.NOTIFY: _MANY, P.DELETE: (0, 8), P.CP: (0, 1)},
}

_ERRORS_IN_PLACE_OF_SA = {  # notifies that make a response complete without the payloads of the table
    NotifyType.COOKIE,
}


def first_error(chain: Chain) -> Notify | None:
    """The first notify of an error type, or COOKIE, which stands in for the whole IKE_SA_INIT response."""
    for item in chain.parsed.get(P.NOTIFY, ()):
        assert isinstance(item, Notify)
        if item.type < FIRST_STATUS or item.type in _ERRORS_IN_PLACE_OF_SA:
            return item
    return None


def check(exchange: int, response: bool, chain: Chain) -> None:
    """Raises ProtocolError(INVALID_SYNTAX) where the payloads do not fit the exchange."""
    rule = RULES.get((exchange, response))
    if rule is None:
        raise ProtocolError(f"exchange type {exchange} is unknown")
    if response and exchange != Exchange.INFORMATIONAL and not chain.counts.get(P.SA):
        if exchange == Exchange.IKE_AUTH and chain.counts.get(P.AUTH):
            pass  # authenticated, the child alone was refused
        elif first_error(chain) is not None:
            rule = _ERROR
    for kind, (least, most) in rule.items():
        count = chain.counts.get(kind, 0)
        if not least <= count <= most:
            raise ProtocolError(f"{count} {kind.name} payloads in exchange {exchange}")
