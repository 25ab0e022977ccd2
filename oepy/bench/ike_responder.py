"""The responder of `oepy bench ike`: `oepy run` without the defence against floods, which delays what a benchmark
does: many handshakes at once from one network. (charon has `dos_protection = no` for it.)

    python -m oepy.bench.ike_responder CONFIG [--trace]

With --trace, SIGUSR1 prints what tracemalloc counts, in bytes.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import tracemalloc
from dataclasses import replace

from oepy import config
from oepy.daemon.runtime import Daemon
from oepy.ike.settings import IkeSettings

_NO_LIMIT = 1_000_000


class _Responder(Daemon):
    def _ike_settings(self) -> IkeSettings:
        return replace(
            super()._ike_settings(),
            cookie_threshold=_NO_LIMIT,
            max_half_open=_NO_LIMIT,
            max_half_open_per_prefix=_NO_LIMIT,
        )


def _print_traced() -> None:
    gc.collect()
    print(tracemalloc.get_traced_memory()[0], flush=True)


async def _serve(path: str, traces: bool) -> None:
    daemon = _Responder(config.load(path), path, lambda event: None)
    try:
        await daemon.start()
        if traces:
            tracemalloc.start()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _print_traced)
        await daemon.run_until_stopped()
    finally:
        await daemon.stop()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], "--trace" in sys.argv[2:]))
