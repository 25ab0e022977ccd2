"""Reads long revocation lists in a process of its own: a list of 20 MB takes a second, and nobody may wait so long.

    the daemon ── size, issuer (DER), CRL ──▶ stdin   python -m oepy.daemon.crlreader   stdout ──▶ `Crl.pack()`

The process has nothing but the bytes and ends with them; it says on its standard error why a list is unusable.
"""

from __future__ import annotations

import asyncio
import resource
import sys

from oepy.x509.certificates import Certificate, from_der, to_der
from oepy.x509.crl import Crl, read_crl
from oepy.x509.revocation import Unusable

INLINE = 64 * 1024  # bytes; some 1,500 entries, 4 ms
SECONDS = 10.0
MEMORY = 1024 * 1024 * 1024  # bytes of address space


async def read_long_crl(data: bytes, issuer: Certificate, now: float) -> Crl:
    """As `read_crl`. Raises Unusable."""
    if len(data) <= INLINE:
        return read_crl(data, issuer, now)
    der = to_der(issuer)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "oepy.daemon.crlreader", repr(now)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin"},
    )
    try:
        async with asyncio.timeout(SECONDS):
            packed, said = await process.communicate(len(der).to_bytes(4, "big") + der + data)
    except TimeoutError:
        raise Unusable(f"it cannot be read within {SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0 or not packed:
        text = said.decode("utf-8", "replace").strip().splitlines()
        raise Unusable(text[-1][:300] if text else f"its reader ended with {process.returncode}")
    return Crl.unpack(packed, issuer)


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    data = sys.stdin.buffer.read()
    size = int.from_bytes(data[:4], "big")
    try:
        crl = read_crl(data[4 + size :], from_der(data[4 : 4 + size]), float(sys.argv[1]))
    except Unusable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.buffer.write(crl.pack())
    return 0


if __name__ == "__main__":
    sys.exit(main())
