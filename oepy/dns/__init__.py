"""The DNS room: which keys does a peer publish, and are they secure?

`build.make_validator` and `build.make_key_source` put it together; `peers.DnsKeySource` is what the daemon
holds (`interfaces.KeySource`). Below it, each with one job: `validator` (one lookup), `chain` (the zones'
keys), `denial` (NSEC, NSEC3), `signatures` (one RRset), `limits` (what a lookup may cost), `anchors`,
`message` (wire form), `cache`, `records` (IPSECKEY and TXT). Only `transport` has sockets, only `build` has
clocks. `inventory`, `zonefile` and `zonecheck` make and check zone files.
"""
