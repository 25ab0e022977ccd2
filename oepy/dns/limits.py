"""What one lookup may cost (KeyTrap, CVE-2023-50387; NSEC3 exhaustion, CVE-2023-50868; alias chains).

Over a limit a lookup fails closed: it becomes bogus, never insecure, and nothing of it is cached.
"""

from __future__ import annotations

from dataclasses import dataclass

# A chain of ten zones needs some 25 checks; a lookup with aliases and gateways shares one budget.
MAX_SIGNATURE_CHECKS = 100
MAX_FAILED_CHECKS = 16  # legitimate: a key roll-over, colliding key tags
MAX_NSEC3_HASHES = 300
MAX_NSEC3_ITERATIONS = 50  # RFC 9276 §3.2: above, the zone's denials count as insecure
MAX_QUESTIONS = 80  # an unsigned ip6.arpa tree of 32 labels is walked label by label
MAX_EFFORT = 3000  # records in all replies together, long names counting as several; a deep walk needs 1300
KEY_EFFORT = 3  # of a DNSKEY record, beside that of reading it
MAX_ALIASES = 10
MAX_KEYS_PER_ZONE = 32  # DNSKEY records of one zone that are looked at
MAX_SIGNATURES_PER_SET = 16
MAX_DENIAL_RECORDS = 12


class LimitExceeded(Exception):
    """This lookup asked for more work than a legitimate one needs. The text says of what."""


@dataclass(slots=True)
class Budget:
    """What is left for one lookup. Every `spend_` raises LimitExceeded when nothing is."""

    signatures: int = MAX_SIGNATURE_CHECKS
    failures: int = MAX_FAILED_CHECKS
    hashes: int = MAX_NSEC3_HASHES
    questions: int = MAX_QUESTIONS
    effort: int = MAX_EFFORT

    def spend_signature(self) -> None:
        self.signatures -= 1
        if self.signatures < 0:
            raise LimitExceeded(f"more than {MAX_SIGNATURE_CHECKS} signature checks in one lookup")

    def spend_failure(self) -> None:
        self.failures -= 1
        if self.failures < 0:
            raise LimitExceeded(f"more than {MAX_FAILED_CHECKS} signatures that do not verify in one lookup")

    def spend_hash(self) -> None:
        self.hashes -= 1
        if self.hashes < 0:
            raise LimitExceeded(f"more than {MAX_NSEC3_HASHES} NSEC3 hashes in one lookup")

    def spend_question(self) -> None:
        self.questions -= 1
        if self.questions < 0:
            raise LimitExceeded(f"more than {MAX_QUESTIONS} questions in one lookup")

    def check_effort(self) -> None:
        """`effort` is taken away where replies arrive, which may be after nobody waits for them."""
        if self.effort < 0:
            raise LimitExceeded(f"replies with more than {MAX_EFFORT} records in one lookup")
