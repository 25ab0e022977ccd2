"""Which trap works here: by trying, not by version."""

from __future__ import annotations

import contextlib

from oepy.errors import OepyError
from oepy.trap import kernel
from oepy.trap.rules import COMMENT

_TABLE = "oepy_probe"
_QUEUE = 17732
# What the trap's own ruleset needs of the kernel; no hook leads here
_RULES = f"""table inet {_TABLE} {{
  comment "{COMMENT}"
  set s {{ type ipv4_addr; flags timeout; }}
  chain c {{
    fib daddr type local accept
    ct direction reply meta mark set 1 accept
    ip daddr @s accept
  }}
}}
"""


def packet_queue() -> OepyError | None:
    """Why packets cannot be queued to us in this network namespace; None where they can. Nothing is left."""
    try:
        changer = kernel.Tables()
    except OepyError as error:
        return error
    try:
        kernel.load(f"table inet {_TABLE}\ndelete table inet {_TABLE}\n{_RULES}")
        changer.insert_queue_rules(_TABLE, [("c", _QUEUE, True)])
        kernel.QueueSocket([_QUEUE], 1).close()
    except OepyError as error:
        return error
    finally:
        with contextlib.suppress(OepyError):
            kernel.load(f"table inet {_TABLE}\ndelete table inet {_TABLE}\n")
        changer.close()
    return None
