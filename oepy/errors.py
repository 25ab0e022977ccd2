"""The exception families.

`OepyError` is what a command shows to its user in one line: it carries what is wrong and the mend.
`RemoteError` is the misbehaviour of a peer, a resolver or a packet: counted, never a crash.
`MisuseError` is a mistake of our own code: it is meant to surface.
"""

from __future__ import annotations


class OepyError(Exception):
    """Something the user must know: `what` happened, and the `mend`."""

    exit_status = 1

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what if not mend else f"{what}: {mend}")
        self.what = what
        self.mend = mend


class UsageError(OepyError):
    """Wrong usage or configuration (exit status 2)."""

    exit_status = 2


class ConfigError(UsageError):
    """All mistakes of a configuration file at once, each with line, path and mend."""

    def __init__(self, source: str, problems: list[str]) -> None:
        super().__init__(f"{source}: " + "; ".join(problems))
        self.source = source
        self.problems = problems


class DaemonUnreachable(OepyError):
    """The control socket does not answer (exit status 3)."""

    exit_status = 3


class KeyFormatError(OepyError):
    """A key file or a key in DNS form that cannot be used; the text says why."""


class RemoteError(Exception):
    """A peer, a resolver or a packet broke its protocol."""


class ParseError(RemoteError):
    """Bytes from outside do not have the form that the RFC demands."""


class MisuseError(Exception):
    """Our own code called something in a state where that makes no sense."""
