"""First packets: caught, held, and let go with a verdict."""

from oepy.trap.guard import guard_status, remove_guard
from oepy.trap.nfqueue import NfqueueTrap

__all__ = ["NfqueueTrap", "guard_status", "remove_guard"]
