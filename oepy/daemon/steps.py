"""Steps that must happen in order, although some of them wait: install the SA, then let packets go, then
answer the peer. A step that doesn't wait, with none waiting before it, happens at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

Step = Callable[[], Awaitable[None] | None]


class Steps:
    """One queue for all. `on_error` gets what a step raises; the queue goes on."""

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._waiting: deque[Step] = deque()
        self._task: asyncio.Task[None] | None = None
        self._on_error = on_error

    def __len__(self) -> int:
        return len(self._waiting)

    def do(self, step: Step) -> None:
        if self._task is not None:
            self._waiting.append(step)
            return
        self._run(step)

    def _run(self, step: Step) -> None:
        try:
            rest = step()
        except Exception as error:  # noqa: BLE001 - handed on, never swallowed
            self._on_error(error)
            return
        if rest is not None:
            self._task = asyncio.ensure_future(self._drain(rest))

    async def _drain(self, first: Awaitable[None]) -> None:
        rest: Awaitable[None] | None = first
        while rest is not None or self._waiting:
            try:
                if rest is not None:
                    await rest
                rest = self._waiting.popleft()() if self._waiting else None
            except Exception as error:  # noqa: BLE001 - handed on, never swallowed
                rest = None
                self._on_error(error)
        self._task = None

    async def idle(self) -> None:
        """Return when nothing waits any more."""
        while self._task is not None:
            await asyncio.shield(self._task)
