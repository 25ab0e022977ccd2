"""Which names led this host to an address: learned from the host's own DNS answers, bounded, forgotten in time."""

from __future__ import annotations

from oepy.model import IpAddress

MAX_ADDRESSES = 65_536
MAX_NAMES = 8  # of one address; the newest stay
MIN_LIFE = 600.0  # seconds: programs go on with an address long after its TTL
MAX_LIFE = 86_400.0


class LearnedNames:
    """Names by address, the least recently learned address going first. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._names: dict[IpAddress, dict[str, float]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def learn(self, address: IpAddress, name: str, ttl: float, now: float) -> None:
        names = self._names.pop(address, {})
        names.pop(name, None)
        names[name] = now + min(max(ttl, MIN_LIFE), MAX_LIFE)
        if len(names) > MAX_NAMES:
            del names[next(iter(names))]
        self._names[address] = names
        if len(self._names) > MAX_ADDRESSES:
            del self._names[next(iter(self._names))]

    def of(self, address: IpAddress, now: float) -> tuple[str, ...]:
        """The newest first."""
        names = self._names.get(address)
        if names is None:
            return ()
        for name in [name for name, until in names.items() if until <= now]:
            del names[name]
        if not names:
            del self._names[address]
        return tuple(reversed(names))
