"""One conversion: which kind of file it is, and the reader for it."""

from __future__ import annotations

from oepy.convert import openbsd, setkey
from oepy.convert.drafts import Conversion, Findings, Place, Refused

KINDS = ("setkey", "ipsec.conf")


def detect(text: str) -> str | None:
    """Which of KINDS a text is, by the first word of its statements; None where it looks like neither."""
    votes = dict.fromkeys(KINDS, 0)
    for line in text.splitlines()[:10_000]:
        words = line.split("#", 1)[0].split(None, 2)
        if not words:
            continue
        word = words[0].rstrip(";")
        if word in setkey.COMMANDS:
            votes["setkey"] += 1
        elif word in openbsd.RULES or word == "include" or (len(words) > 1 and words[1].startswith("=")):
            votes["ipsec.conf"] += 1
    first, second = sorted(KINDS, key=lambda kind: -votes[kind])
    return first if votes[first] > votes[second] else None


def convert(
    sources: list[tuple[str, str]], kind: str | None, files: openbsd.Files, *, allow_weak: bool = False
) -> Conversion:
    """All `sources` (path, text), one after the other as if they were one file. `kind` of KINDS, or None to find
    out. Everything that cannot be expressed stands in `problems` of the result."""
    found = Findings()
    flows = openbsd.Reader(found, files)
    for path, text in sources:
        chosen = kind or detect(text)
        try:
            if chosen == "setkey":
                setkey.read_setkey(text, path, found)
            elif chosen == "ipsec.conf":
                flows.read(text, path)
            else:
                found.problem(
                    Place(path, 1), "looks neither like setkey nor like ipsec.conf; say which by --from"
                )
        except Refused as error:
            found.problem(Place(path, 1), str(error))
    try:
        flows.settle()
    except Refused as error:
        found.problem(Place(sources[0][0], 1), str(error))
    setkey.settle_modes(found)
    return found.finish(allow_weak=allow_weak)
