"""The anti-replay window (RFC 4303 §3.4.3, as RFC 6479 lays it out) and extended sequence numbers
(RFC 4303 appendix A)."""

from __future__ import annotations

MAX_WINDOW = 4096
_BLOCK = 64


class ReplayWindow:
    """Which of the last `size` sequence numbers were seen. `top` is the highest one, 0 before any.

    `check` first, `update` only when the packet's integrity is proven. A size of 0 is no anti-replay at all, for
    manual keys, whose sender begins anew after each restart (RFC 4303 §3.4.3).
    """

    __slots__ = ("_blocks", "_count", "size", "top")

    def __init__(self, size: int) -> None:
        if not 0 <= size <= MAX_WINDOW:
            raise ValueError(f"a replay window of {size} packets is not within 0..{MAX_WINDOW}")
        self.size = size
        self.top = 0
        # One block more than the window needs: moving on clears whole blocks, never single bits
        self._count = -(-size // _BLOCK) + 1
        self._blocks = [0] * self._count

    def check(self, sequence: int) -> bool:
        """Whether this number is new: above the window, or within and not seen. 0 is never sent."""
        if sequence > self.top:
            return True
        if not self.size:
            return True
        if sequence <= 0 or sequence + self.size <= self.top:
            return False
        return not self._blocks[sequence // _BLOCK % self._count] >> (sequence % _BLOCK) & 1

    def update(self, sequence: int) -> None:
        """Mark as seen, and move the window where the number is above it."""
        if not self.size:
            return
        block = sequence // _BLOCK
        if sequence > self.top:
            behind = self.top // _BLOCK
            for number in range(max(behind, block - self._count) + 1, block + 1):
                self._blocks[number % self._count] = 0
            self.top = sequence
        self._blocks[block % self._count] |= 1 << (sequence % _BLOCK)


def infer_sequence(low: int, top: int, window: int) -> int | None:
    """The 64-bit sequence number of a packet that carries its `low` 32 bits, given the highest number
    authenticated so far and the window's size (RFC 4303 §A2.2). None where it would lie below 0."""
    top_high, top_low = top >> 32, top & 0xFFFFFFFF
    bottom = top_low - window + 1
    if bottom >= 0:  # case A: the window lies within one subspace
        high = top_high if low >= bottom else top_high + 1
    else:  # case B: it spans two
        high = top_high - 1 if low >= bottom & 0xFFFFFFFF else top_high
    if not 0 <= high <= 0xFFFFFFFF:
        return None
    return high << 32 | low
