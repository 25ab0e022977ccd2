"""What goes into the manager of connections, and what comes out. All frozen; times are the caller's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from oepy.connections.model import Child, Connection
from oepy.exchange import Exchange
from oepy.model import AddressRange, Endpoint, Flow, IpAddress, SaPair

# ---- in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """`connections`: of which those that read the same keep their SAs. `touched`: to be made anew although they
    read the same (a secret or a key is another)."""

    connections: Exchange[Connection]
    touched: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Up:
    label: str


@dataclass(frozen=True, slots=True)
class Down:
    label: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A packet is held for the child of this number."""

    number: int
    flow: Flow


@dataclass(frozen=True, slots=True)
class Began:
    """An attempt has its session."""

    attempt: int
    session: int


@dataclass(frozen=True, slots=True)
class Established:
    """`identity` is empty for a peer that proves none. `again`: it has a session at the same place already, so it
    may be a reauthentication (RFC 7296 §2.8.3), whose old session the peer ends itself."""

    session: int
    connection: str
    identity: str
    initiator: bool
    again: bool = False


@dataclass(frozen=True, slots=True)
class ChildCame:
    session: int
    pair: SaPair
    initiator: bool
    replaces: int | None
    outbound: bool


@dataclass(frozen=True, slots=True)
class ChildUsable:
    spi_in: int


@dataclass(frozen=True, slots=True)
class ChildMoved:
    spi_in: int
    local: Endpoint
    remote: Endpoint
    encap: bool


@dataclass(frozen=True, slots=True)
class ChildWent:
    """`reason`: one of ike.events.DownReason, or `datapath`."""

    spi_in: int
    reason: str


@dataclass(frozen=True, slots=True)
class ChildRefused:
    """A further child of an established session."""

    label: str
    text: str
    permanent: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """`attempt` where it never came to a session, else `session`. `permanent`: the peer said no."""

    attempt: int
    session: int
    text: str
    permanent: bool
    superseded: bool = False


@dataclass(frozen=True, slots=True)
class Gone:
    session: int


@dataclass(frozen=True, slots=True)
class Use:
    """Packets of both directions by SPI."""

    packets: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Tick:
    """It is time."""


ManagerInput = (
    Load
    | Up
    | Down
    | Asked
    | Began
    | Established
    | ChildCame
    | ChildUsable
    | ChildMoved
    | ChildWent
    | ChildRefused
    | Failed
    | Gone
    | Use
    | Tick
)

# ---- out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Negotiate with the connection's peer, for this child first. Began or Failed follows."""

    attempt: int
    connection: Connection
    child: Child


@dataclass(frozen=True, slots=True)
class AddChild:
    """ChildCame or ChildRefused follows, or the session goes."""

    session: int
    connection: Connection
    child: Child


@dataclass(frozen=True, slots=True)
class Install:
    """`moves`: it is there already, and one of its ends is another now."""

    pair: SaPair
    outbound: bool
    moves: bool = False


@dataclass(frozen=True, slots=True)
class Remove:
    spi_in: int


@dataclass(frozen=True, slots=True)
class Join:
    """The addresses in `fresh` go into the tunnels of the child of this number from now on, those in `gone` no
    longer."""

    number: int
    gone: tuple[AddressRange, ...]
    fresh: tuple[AddressRange, ...]


@dataclass(frozen=True, slots=True)
class RefuseHeld:
    number: int


@dataclass(frozen=True, slots=True)
class Resettle:
    """The trap's rules of children of these numbers are others, or gone, and with them whose a destination is."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CloseChild:
    spi_in: int


@dataclass(frozen=True, slots=True)
class CloseSession:
    session: int


@dataclass(frozen=True, slots=True)
class ReadUse:
    spis: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunUpdown:
    command: tuple[str, ...]
    up: bool
    connection: Connection
    child: Child
    pair: SaPair
    session: int
    addresses: tuple[IpAddress, ...] = ()  # that the peer gave us, and its name servers
    dns: tuple[IpAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Tell:
    event: str
    fields: Mapping[str, object] = field(default_factory=dict)
    alert: bool = False


ManagerAction = (
    Begin
    | AddChild
    | Install
    | Remove
    | Join
    | RefuseHeld
    | Resettle
    | CloseChild
    | CloseSession
    | ReadUse
    | RunUpdown
    | Tell
)
