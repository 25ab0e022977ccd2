"""IKE_FOLLOWUP_KE (RFC 9370 §2.2.4): the additional key exchanges of a rekeyed IKE SA.

Child SAs do without: the IKE SA that their keys come from has had them, and one that is rekeyed has them anew.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from oepy.errors import ParseError
from oepy.ike.algorithms import Chosen, ike_suite
from oepy.ike.flow import PeerSteps, Send, Steps
from oepy.ike.header import Exchange, PayloadType
from oepy.ike.intermediate import METHOD_IDS, read_share
from oepy.ike.key_exchange import generate, respond
from oepy.ike.notify import NotifyType, notify_name
from oepy.ike.payloads import Payload, build_ke, notify
from oepy.ike.rules import first_error
from oepy.ike.states import State

if TYPE_CHECKING:
    from oepy.ike.message import Message
    from oepy.ike.session import Session

LINK_SIZE = 16
MAX_LINK = 256
PATIENCE = 60.0  # seconds after which a rekey that was not carried on is forgotten


@dataclass(slots=True)
class Agreed:
    """A rekey of an IKE SA after CREATE_CHILD_SA: all that the new keys are made of."""

    chosen: Chosen
    spi: bytes  # ours
    shared: bytes = field(repr=False)
    nonces: tuple[bytes, bytes]
    additional: bytes = field(default=b"", repr=False)  # the secrets of IKE_FOLLOWUP_KE so far


@dataclass(slots=True)
class Followup:
    """A rekey of the peer's that is not complete: `link` names it in its next request."""

    made: Agreed
    link: bytes
    since: float
    done: int = 0
    decided: bool = False  # ours has given way to it: nothing else may come in between

    @property
    def until(self) -> float:
        return self.since + PATIENCE


def follow_up(session: Session, made: Agreed, answer: Message) -> Steps[str]:
    """Our part; what went wrong, "" for nothing. `answer`: to CREATE_CHILD_SA."""
    for method in ike_suite(made.chosen).additional:
        link = answer.notify(NotifyType.ADDITIONAL_KEY_EXCHANGE)
        if link is None or len(link.data) > MAX_LINK:
            return "the peer does not carry on with the agreed key exchanges"
        share = generate(method, session.context.random)
        payloads = [
            (PayloadType.KE, build_ke(METHOD_IDS[method], share.public)),
            notify(NotifyType.ADDITIONAL_KEY_EXCHANGE, link.data),
        ]
        answer = yield Send(Exchange.IKE_FOLLOWUP_KE, payloads)
        error = first_error(answer.chain)
        if error is not None:
            return f"the peer answers IKE_FOLLOWUP_KE with {notify_name(error.type)}"
        try:
            made.additional += share.shared_secret(read_share(answer, method))
        except ParseError as problem:
            return str(problem)
    return ""


def serve_followup(session: Session, message: Message) -> PeerSteps:
    yield from ()  # a generator like the others, which asks nothing
    from oepy.ike.ike_rekey import accept_successor, is_busy

    waiting = session.followup
    link = message.notify(NotifyType.ADDITIONAL_KEY_EXCHANGE)
    known = waiting is not None and link is not None and hmac.compare_digest(link.data, waiting.link)
    if waiting is None or not known or session.state is not State.ESTABLISHED:
        return [notify(NotifyType.STATE_NOT_FOUND)]
    session.followup = None
    if session.context.now > waiting.until:
        return [notify(NotifyType.STATE_NOT_FOUND)]
    if is_busy(session):
        return [notify(NotifyType.TEMPORARY_FAILURE)]
    methods = ike_suite(waiting.made.chosen).additional
    method = methods[waiting.done]
    public, shared = respond(method, read_share(message, method), session.context.random)
    waiting.made.additional += shared
    waiting.done += 1
    answer: list[Payload] = [(PayloadType.KE, build_ke(METHOD_IDS[method], public))]
    if waiting.done < len(methods):
        waiting.link = session.context.random(LINK_SIZE)
        session.followup = waiting
        answer.append(notify(NotifyType.ADDITIONAL_KEY_EXCHANGE, waiting.link))
    else:
        accept_successor(session, waiting.made)
    return answer
