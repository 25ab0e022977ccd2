"""`python -m tests.differential [WORD]`: all cases, or those with WORD in their title."""

from __future__ import annotations

import sys
import time
from collections import Counter

from tests.differential.cases import all_cases
from tests.differential.compare import run_case
from tests.differential.known import judge
from tests.differential.responder import Responder


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    begin = time.monotonic()
    counts: Counter[str] = Counter()
    lines, failures = [], []
    with Responder() as responder:
        for case in all_cases():
            if wanted not in case.title:
                continue
            result = run_case(case, responder)
            counts["cases"] += 1
            counts[result.status] += 1
            listed, wrong = judge(result)
            lines += listed
            failures += wrong
    print(f"{counts.pop('cases')} cases in {time.monotonic() - begin:.0f} s: oepy says", dict(counts))
    print(f"{len(lines)} listed differences:")
    print("\n".join(lines))
    print(f"{len(failures)} failures")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
