"""An exchange in progress: a generator that yields a `Send` or a Question and is resumed with what came."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from oepy.ike.events import FailureKind, Question
from oepy.ike.header import Exchange
from oepy.ike.notify import NotifyType, notify_name
from oepy.ike.payloads import Payload

if TYPE_CHECKING:
    from oepy.ike.session import Session


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request of ours and wait for its response (a Message)."""

    exchange: Exchange
    payloads: list[Payload]


Want = Send | Question
T = TypeVar("T")
Steps = Generator[Want, Any, T]
"""A part of an exchange of ours, with a result."""
Questions = Generator[Question, Any, T]
"""A part of either's exchange that only asks, with a result."""
OwnSteps = Generator[Want, Any, None]
"""Our exchange: resumed with a Message for a Send, with the answer's value for a Question."""
PeerSteps = Generator[Question, Any, list[Payload]]
"""The peer's exchange: its result is the response."""


class Flow:
    """`request_id` is the message ID of the peer's request, None for an exchange of ours."""

    __slots__ = ("asked_at", "first_datagram", "generator", "path", "request_id", "session", "token", "what")

    def __init__(
        self,
        session: Session,
        generator: OwnSteps | PeerSteps,
        what: str,
        request_id: int | None = None,
        first_datagram: bytes = b"",
    ) -> None:
        self.session = session
        self.generator = generator
        self.what = what
        self.request_id = request_id
        self.first_datagram = first_datagram  # digest of the request, for the window
        self.path = session.arrived  # our end and the peer's, by which the request came
        self.token = 0
        self.asked_at = 0.0


class HandshakeFailed(Exception):
    """Ends the session; raised inside of a flow. `answer` goes to the peer as the response, if it is the
    peer's exchange, else (for AUTH) in an INFORMATIONAL of its own."""

    def __init__(
        self, kind: FailureKind, text: str, notify: int = 0, answer: NotifyType | None = None
    ) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text
        self.notify = notify_name(notify) if notify else ""
        self.answer = answer


class ChildRefused(Exception):
    """A child SA comes to nothing, the IKE SA stays; `notify` tells the peer."""

    def __init__(self, notify: NotifyType, text: str, data: bytes = b"") -> None:
        super().__init__(text)
        self.notify = notify
        self.text = text
        self.data = data
