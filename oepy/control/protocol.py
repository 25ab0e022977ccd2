"""What travels over the control socket: HTTP over a Unix socket, JSON bodies. One table of the paths.

Everything under /v1 answers JSON; errors are `{"error": text, "mend": text}` with status 4xx or 5xx.
"""

from __future__ import annotations

STATUS = "/v1/status"
PEERS = "/v1/peers"
SAS = "/v1/sas"
POLICIES = "/v1/policies"
EVENTS = "/v1/events"  # ?follow=1 streams one JSON object a line
EXPLAIN = "/v1/explain"  # ?destination=ADDRESS
INITIATE = "/v1/initiate"  # POST {"destination": ADDRESS}
TERMINATE = "/v1/terminate"
REKEY = "/v1/rekey"  # POST {"destination": ADDRESS, "ike": true}
FLUSH = "/v1/flush"  # POST {"destination": ADDRESS or null, "dns": "all", ADDRESS or null}
MANUAL = "/v1/manual"  # GET ?all=1; POST {"operation": "sa-add", "entry": {…}}: keys travel in it
CONNECTIONS = "/v1/connections"  # GET; POST {"operation": "up", "name": "office/net", "timeout": 15}
MAX_BODY = 64 * 1024
