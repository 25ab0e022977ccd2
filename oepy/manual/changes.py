"""One change of what is keyed by hand, from the set before to the set after. Nothing is half done: a change with a
mistake raises, and leaves the set as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from oepy.errors import OepyError, UsageError
from oepy.manual.checks import overlaps, reused_spis, without_sa
from oepy.manual.model import MAX_POLICIES, MAX_SAS, ManualPolicy, ManualSa, ManualSet
from oepy.manual.reading import KeyFiles, Problem, read_policy, read_sa, read_sa_key, read_selector

OPERATIONS = ("sa-add", "sa-delete", "sa-flush", "policy-add", "policy-delete", "policy-flush")


def changed(manual: ManualSet, operation: str, entry: object, key_files: KeyFiles) -> ManualSet:
    """`entry` is a mapping as in the configuration; of a deletion its key alone, of a flush nothing. Raises
    UsageError for mistakes (all of them in one), OepyError where what is to be deleted is not there."""
    change = _CHANGES.get(operation)
    if change is None:
        raise UsageError(f"no operation {operation[:40]!r}", f"one of {', '.join(OPERATIONS)}")
    return change(manual, entry, key_files)


def _add_sa(manual: ManualSet, entry: object, key_files: KeyFiles) -> ManualSet:
    sa = read_entry(lambda problems: read_sa(entry, (), problems, key_files))
    if len(manual.sas) >= MAX_SAS:
        raise UsageError(f"there are {MAX_SAS} manual SAs", "delete some before")
    if reused_spis(enumerate((*manual.sas, sa))):
        raise UsageError(f"there is an {sa} already", "take another SPI, or delete that SA before")
    return dataclasses.replace(manual, sas=(*manual.sas, sa))


def _delete_sa(manual: ManualSet, entry: object, _: KeyFiles) -> ManualSet:
    dst, protocol, spi = read_entry(lambda problems: read_sa_key(entry, (), problems))
    left = tuple(sa for sa in manual.sas if sa.key != (dst, protocol, spi))
    if len(left) == len(manual.sas):
        raise OepyError(
            f"no manual {protocol} SA {spi:#x} to {dst}",
            "`oepy sa list` shows them; those of IKE are not touched",
        )
    return dataclasses.replace(manual, sas=left)


def _add_policy(manual: ManualSet, entry: object, _: KeyFiles) -> ManualSet:
    policy: ManualPolicy = read_entry(lambda problems: read_policy(entry, (), problems))
    if len(manual.policies) >= MAX_POLICIES:
        raise UsageError(f"there are {MAX_POLICIES} manual policies", "delete some before")
    policies = (*manual.policies, policy)
    before = {problem.text for problem in overlaps(list(enumerate(manual.policies)))}
    problems = [item for item in overlaps(list(enumerate(policies))) if item.text not in before]
    problems += without_sa([(len(manual.policies), policy)], manual.sas)
    if problems:
        raise UsageError("; ".join(_named(item.text, policies) for item in problems))
    return dataclasses.replace(manual, policies=policies)


def _named(text: str, policies: tuple[ManualPolicy, ...]) -> str:
    """Numbers of policies mean nothing to who gives a command."""
    for index, policy in enumerate(policies):
        if f"policies[{index}]" in text:
            named = "the new policy" if index == len(policies) - 1 else f"the policy {policy.direction}"
            return text.replace(f"policies[{index}]", named)
    return text


def _delete_policy(manual: ManualSet, entry: object, _: KeyFiles) -> ManualSet:
    direction, selector = read_entry(lambda problems: read_selector(entry, (), problems))
    left = tuple(policy for policy in manual.policies if policy.key != (direction, selector))
    if len(left) == len(manual.policies):
        raise OepyError(f"no manual policy {direction} {selector}", "`oepy policy list` shows them")
    return dataclasses.replace(manual, policies=left)


def _flush_sas(manual: ManualSet, _entry: object, _: KeyFiles) -> ManualSet:
    return dataclasses.replace(manual, sas=())


def _flush_policies(manual: ManualSet, _entry: object, _: KeyFiles) -> ManualSet:
    return dataclasses.replace(manual, policies=())


_CHANGES: dict[str, Callable[[ManualSet, object, KeyFiles], ManualSet]] = {
    "sa-add": _add_sa,
    "sa-delete": _delete_sa,
    "sa-flush": _flush_sas,
    "policy-add": _add_policy,
    "policy-delete": _delete_policy,
    "policy-flush": _flush_policies,
}


def read_entry(read: Callable[[list[Problem]], Any]) -> Any:
    """What `read` makes, or UsageError with all the problems that it has found."""
    problems: list[Problem] = []
    value = read(problems)
    if value is None or problems:
        texts = [
            f"{'.'.join(map(str, item.path))}: {item.text}" if item.path else item.text for item in problems
        ]
        raise UsageError("; ".join(texts) or "no entry")
    return value


def merged(manual: ManualSet, old: ManualSet, new: ManualSet) -> ManualSet:
    """After a reload: what the configuration had before (`old`) gives way to what it has now (`new`); what commands
    have added stays. Raises UsageError where a command's entry is in the way of a new one."""
    sas = _merge(manual.sas, old.sas, new.sas)
    policies = _merge(manual.policies, old.policies, new.policies)
    after = ManualSet(tuple(sas), tuple(policies))
    problems = [*reused_spis(enumerate(after.sas)), *overlaps(list(enumerate(after.policies)))]
    if problems:
        text = "; ".join(problem.text for problem in problems[:5])
        raise UsageError(
            f"manual: entries that commands have added are in the way: {text}",
            "flush them with `oepy sa flush`",
        )
    return after


def _merge(
    effective: Iterable[ManualSa | ManualPolicy],
    old: Iterable[ManualSa | ManualPolicy],
    new: Iterable[ManualSa | ManualPolicy],
) -> list[Any]:
    configured = {item.key for item in old}
    wanted = {item.key: item for item in new}
    kept = [item for item in effective if item.key not in configured and wanted.get(item.key) != item]
    return [*wanted.values(), *kept]
