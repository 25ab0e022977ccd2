"""`python -m tests.fuzz.run TARGET SECONDS`: one target under atheris, beginning with its corpus. New inputs
go to a directory of their own (printed); a finding is written there as `crash-…`. Needs `pip install atheris`.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["oepy"]):
    from tests.fuzz.harnesses import HARNESSES

MAX_LENGTH = 2048


def main() -> None:
    target, seconds = sys.argv[1], int(sys.argv[2])
    fresh = pathlib.Path(tempfile.mkdtemp(prefix=f"oepy-fuzz-{target}-"))
    print(f"new inputs and findings of {target}: {fresh}", flush=True)
    corpus = pathlib.Path(__file__).parent / "corpus" / target
    options = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        f"-max_len={MAX_LENGTH}",
        f"-artifact_prefix={fresh}/",
        "-print_final_stats=1",
        str(fresh),
        str(corpus),
    ]
    atheris.Setup(options, HARNESSES[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
