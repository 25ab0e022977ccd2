"""A kernel's SAD and SPD in memory, behind the real codec."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Any

from oepy.netlink import Frame
from oepy.xfrm import pieces as p
from oepy.xfrm import values as v
from oepy.xfrm.requests import Request
from oepy.xfrm.socket import Refused, read


class MemoryKernel:
    """Implements `socket.Xfrm` over dictionaries. `refuse` names kinds of messages and after how many of them."""

    def __init__(self) -> None:
        self.sas: dict[Any, bytes] = {}
        self.policies: dict[Any, bytes] = {}
        self.history: list[int] = []
        self.refuse: dict[int, int] = {}

    def carry_out(self, changes: Sequence[Request]) -> list[Refused | None]:
        return [self._one(request) for request in changes]

    def _one(self, request: Request) -> Refused | None:
        self.history.append(request.kind)
        left = self.refuse.get(request.kind)
        if left is not None:
            self.refuse[request.kind] = left - 1
            if left <= 0:
                return Refused(request, errno.EINVAL)
        value = read(Frame(request.kind, 0, 0, request.body))
        number = 0
        match request.kind, value:
            case p.MSG_NEWSA, v.Sa():
                number = errno.EEXIST if value.id in self.sas else 0
                self.sas.setdefault(value.id, request.body)
            case p.MSG_DELSA, v.SaDeleted():
                number = 0 if self.sas.pop(value.id, None) else errno.ESRCH
            case p.MSG_NEWPOLICY, v.Policy():
                number = errno.EEXIST if value.id in self.policies else 0
                self.policies.setdefault(value.id, request.body)
            case p.MSG_UPDPOLICY, v.Policy():
                self.policies[value.id] = request.body
            case p.MSG_DELPOLICY, v.PolicyDeleted():
                number = 0 if self.policies.pop(value.id, None) else errno.ENOENT
            case _:
                raise AssertionError(request)
        return Refused(request, number) if number else None

    def ask(self, questions: Sequence[Request]) -> list[Frame | None]:
        raise AssertionError

    def dump(self, request: Request) -> Iterator[Frame]:
        kind, table = (
            (p.MSG_NEWSA, self.sas) if request.kind == p.MSG_GETSA else (p.MSG_NEWPOLICY, self.policies)
        )
        for body in list(table.values()):
            yield Frame(kind, 0, 0, body)

    def close(self) -> None:
        """Nothing is open."""
