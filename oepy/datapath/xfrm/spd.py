"""Which of several SAs a policy serves: bookkeeping without IO.

The kernel has one policy for a selector, but several pairs of SAs may have it at once: in a rekey the old and
the new one, after a simultaneous start two that are alike. Each of them claims the policy. The newest claim is
in the kernel; when its pair goes, the one before it is again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from oepy.errors import MisuseError
from oepy.xfrm import requests
from oepy.xfrm.requests import Request
from oepy.xfrm.values import Policy, PolicyId


class Claims:
    """Owners are SPIs. What is returned is to be sent to the kernel; with it the kernel is as we are."""

    def __init__(self) -> None:
        self._claims: dict[PolicyId, dict[int, Policy]] = {}
        self._of_owner: dict[int, dict[PolicyId, None]] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def claim(self, owner: int, policies: Iterable[Policy]) -> list[Request]:
        """The owner's claims become the newest; those that it has already are replaced."""
        changes = []
        for policy in policies:
            claims = self._claims.setdefault(policy.id, {})
            before = _first(claims)
            claims.pop(owner, None)
            claims[owner] = policy
            self._of_owner.setdefault(owner, {})[policy.id] = None
            after = _first(claims)
            if before is None:
                changes.append(requests.new_policy(policy))  # one of somebody else's is not replaced
            elif after is not None and after != before:
                changes.append(requests.update_policy(after))
        return changes

    def release(self, owner: int) -> list[Request]:
        """All claims of the owner. First what is shut, then what is led elsewhere."""
        deletions, changes = [], []
        for name in self._of_owner.pop(owner, {}):
            claims = self._claims[name]
            before = _first(claims)
            del claims[owner]
            after = _first(claims)
            if after is None:
                del self._claims[name]
                deletions.append(requests.delete_policy(name))
            elif after != before:
                changes.append(requests.update_policy(after))
        return deletions + changes


def _first(claims: dict[int, Policy]) -> Policy | None:
    """That of the lowest priority, and of these the newest."""
    return min(reversed(claims.values()), key=lambda policy: policy.priority, default=None)


class Reqids:
    """One reqid for all pairs that may use the same policies, so that in a rekey the policies of the old pair let
    in what comes by the new one, and nobody else's."""

    def __init__(self, numbers: range) -> None:
        self._numbers = numbers
        self._next = 0
        self._taken: dict[Hashable, int] = {}
        self._keys: dict[int, Hashable] = {}
        self._uses: dict[int, int] = {}

    def take(self, key: Hashable) -> int:
        """Raises MisuseError where all are in use."""
        reqid = self._taken.get(key)
        if reqid is None:
            reqid = self._taken[key] = self._free()
            self._keys[reqid] = key
        self._uses[reqid] = self._uses.get(reqid, 0) + 1
        return reqid

    def rename(self, old: Hashable, new: Hashable) -> None:
        """The peer of `old` is known by `new` from now on, unless that has a reqid of its own."""
        if old in self._taken and new not in self._taken:
            reqid = self._taken[new] = self._taken.pop(old)
            self._keys[reqid] = new

    def give_back(self, reqid: int) -> None:
        self._uses[reqid] -= 1
        if not self._uses[reqid]:
            del self._uses[reqid]
            del self._taken[self._keys.pop(reqid)]

    def _free(self) -> int:
        for _ in self._numbers:
            reqid = self._numbers[self._next % len(self._numbers)]
            self._next += 1
            if reqid not in self._uses:
                return reqid
        raise MisuseError("all reqids are in use")
