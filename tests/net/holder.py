"""A trap as a process: `python -m tests.net.holder JSON`, with `default`, `rules`, `answer`, `lifetime`,
and with `pair` a datapath with that SA.

Says `ready` when it stands, `asked GROUP DESTINATION` for each question, `done` for each command on stdin:
`stop`, `guard` (stop and leave the guard), `restart`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from ipaddress import ip_network

from oepy.datapath import TunDatapath
from oepy.datapath.tun.control import decode_pair
from oepy.interfaces import PolicyRule, TrapPolicy
from oepy.model import Flow, PolicyGroup, Verdict
from oepy.trap import NfqueueTrap
from oepy.udp import open_ike_sockets


async def main() -> None:
    chosen = json.loads(sys.argv[1])
    rules = tuple(PolicyRule(PolicyGroup(group), ip_network(text)) for group, text in chosen.get("rules", []))
    policy = TrapPolicy(rules, PolicyGroup(chosen.get("default", "private-or-clear")), ())
    answer = Verdict(chosen["answer"]) if "answer" in chosen else None
    trap = NfqueueTrap()

    def on_trapped(group: PolicyGroup, flow: Flow) -> None:
        print("asked", group.value, flow.destination, flush=True)
        if answer is not None:
            trap.decide(group, flow.destination, answer, chosen.get("lifetime", 60))

    if "pair" in chosen:
        datapath = TunDatapath(open_ike_sockets().nat_t, lambda *_: None)
        await datapath.start(lambda _: None)
        await datapath.install(decode_pair(chosen["pair"]))
    trap.start(policy, on_trapped)
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while command := await loop.run_in_executor(None, sys.stdin.readline):
        word = command.strip()
        if word in ("stop", "guard"):
            trap.stop(guard=word == "guard")
        elif word == "restart":
            trap.start(policy, on_trapped)
        print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
