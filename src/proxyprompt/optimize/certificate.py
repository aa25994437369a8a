"""The certificate: paired non-inferiority on queries that no earlier step saw.

Candidates are nested and come in a fixed order, mildest first, so each is tested at the full level and the
first failure ends the sequence (Maurer, Hothorn and Lehmacher 1995); a candidate is asked of the target only
when those before it have passed. A last step may put the same demonstrations into another order. What is not certified
is not shipped: the answer is the last candidate that passed, or the original prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxyprompt.errors import InputError

from ._sealed import Answers, AskSealed, CandidateTest, Measured, decide, measured_on, untested
from .compress import EvaluateTarget
from .order import EvaluateOrder
from .power import power_statement
from .requirement import Requirement

__all__ = ["CandidateTest", "Certificate", "Measured", "Reordered", "certify", "power_statement"]


@dataclass(frozen=True)
class Reordered:
    """The demonstrations of the last candidate in another order.

    Attributes
    ----------
    order : tuple of int
        Units as they stand in the prompt.
    evaluate : callable
        Target values of prompts in a given order, on the sealed split.
    """

    order: tuple[int, ...]
    evaluate: EvaluateOrder


@dataclass(frozen=True)
class Certificate:
    """What is proven about the shipped prompt.

    Attributes
    ----------
    decision : {"certified", "not_certified"}
    kept : bool (n_units,)
        The shipped prompt: the last candidate that passed, or everything.
    level : float
        Largest chance of certifying a prompt that loses more than the requirement allows.
    requirement : Requirement
    method : {"exact", "betting"}
    n : int
        Sealed queries.
    full : Measured
    tests : tuple of CandidateTest
        In their fixed order; empty when nothing smaller was proposed.
    power_statement : str
        What so many sealed queries can show; known before they are asked.
    sealed_digest : str
        SHA-256 of the sealed queries.
    cleaned_bar : bool
        Whether candidates after the first also had to hold against the first, the cleaned prompt.
    earlier_looks : int
        Earlier runs, with other settings, that tested a prompt on some of these sealed queries.
    """

    decision: str
    kept: NDArray[np.bool_]
    level: float
    requirement: Requirement
    method: str
    n: int
    full: Measured
    tests: tuple[CandidateTest, ...]
    power_statement: str
    sealed_digest: str
    cleaned_bar: bool = False
    earlier_looks: int = 0

    @property
    def shipped(self) -> CandidateTest | None:
        """The candidate that is shipped, if one passed."""
        passed = [t for t in self.tests if t.passed]
        return passed[-1] if passed else None

    @property
    def order(self) -> tuple[int, ...]:
        """Units of the shipped prompt, in the order in which they stand in it."""
        shipped = self.shipped
        if shipped is not None and shipped.order is not None:
            return shipped.order
        return tuple(int(i) for i in np.flatnonzero(self.kept))

    @property
    def text(self) -> str:
        """The claim in one sentence, and what weakens it in another."""
        shipped = self.shipped
        if not self.tests:
            return "No smaller prompt was proposed, so there was nothing to certify."
        claim = self.requirement.claim("the full prompt's")
        confidence = f"{1 - self.level:.0%} confidence"
        if shipped is None:
            text = f"On {self.n} sealed queries it could be shown of no candidate, at {confidence}, that it {claim}."
        else:
            also = " and of the cleaned prompt's" if self.cleaned_bar and shipped is not self.tests[0] else ""
            placed = ", in their new order," if shipped.order is not None else ""
            claim = self.requirement.claim(f"the full prompt's{also}")
            asked = f"{self.n}" if shipped.n_asked == self.n else f"{shipped.n_asked} of {self.n}"
            text = (
                f"On {asked} queries that no earlier step had seen, at {confidence}, the prompt with"
                f" {shipped.n_kept} demonstrations{placed} {claim}."
            )
        if not self.earlier_looks:
            return text
        runs = "an earlier run" if self.earlier_looks == 1 else f"{self.earlier_looks} earlier runs"
        return text + (
            f" But {runs} with other settings had looked at these sealed queries; counting every look, the error level is"
            f" up to {min(1.0, (self.earlier_looks + 1) * self.level):.2g} and not {self.level:.2g}."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "decision": self.decision,
            "kept": [int(i) for i in np.flatnonzero(self.kept)],
            "order": list(self.order),
            "level": self.level,
            "tau": self.requirement.tau,
            "margin": self.requirement.margin,
            "method": self.method,
            "n": self.n,
            "full": asdict(self.full),
            "tests": [
                asdict(t)
                | {
                    "kept": [int(i) for i in np.flatnonzero(t.kept)],
                    "order": None if t.order is None else list(t.order),
                }
                for t in self.tests
            ],
            "power_statement": self.power_statement,
            "sealed_digest": self.sealed_digest,
            "cleaned_bar": self.cleaned_bar,
            "earlier_looks": self.earlier_looks,
            "text": self.text,
        }


def certify(
    candidates: Sequence[NDArray[np.bool_]],
    evaluate: EvaluateTarget,
    *,
    n_units: int,
    requirement: Requirement,
    level: float,
    sealed: Sequence[str],
    seen: Collection[str],
    query_digest: str,
    method: str = "exact",
    block: int | None = None,
    reordered: Reordered | None = None,
    cleaned_bar: bool = False,
    full_score: float | None = None,
    earlier_looks: int = 0,
) -> Certificate:
    """Test nested candidates against the full prompt, mildest first.

    Parameters
    ----------
    candidates : sequence of bool (n_units,)
        Each a subset of the one before; the order was fixed before any sealed query was asked. Full
        coalitions are skipped: they need no certificate.
    evaluate : callable
        Target values on the sealed split.
    n_units : int
    requirement : Requirement
    level : float
    sealed : sequence of str
        A key for each query of the sealed split, in its order; equal texts have equal keys.
    seen : collection of str
        Keys of all queries that any earlier step asked the target or a proxy, whatever for.
    query_digest : str
        SHA-256 of the sealed queries, for the record.
    method : {"exact", "betting"}
        ``"exact"`` takes scores of 0 and 1 only; it is valid for one look, so it asks all sealed queries at once.
        ``"betting"`` takes scores in [0, 1] and is valid at every look: queries are asked in blocks, and a candidate
        is left as soon as it is certified, or can no longer be. Said by the caller, because a sample that happens
        to hold only zeros and ones does not make a metric binary.
    block : int, optional
        Queries asked at once with ``"betting"``; by default a quarter of them, and at least ten.
    reordered : Reordered, optional
        Last step of the sequence: the demonstrations of the last candidate in another order.
    cleaned_bar : bool
        The first candidate is the cleaned prompt and did better than the full one on other queries: later candidates
        must hold the requirement against it as well, so that compression cannot spend what cleaning gained.
        Both tests must pass, each at full level (an intersection-union test).
    full_score : float, optional
        Performance of the full prompt as known from other queries; used by the power statement only.
    earlier_looks : int
        Earlier tests of related prompts on these sealed queries; stated with the claim.

    Returns
    -------
    Certificate

    Raises
    ------
    InputError
        When an earlier step saw a sealed query, the candidates are not nested, ``block`` is given with ``"exact"``, or
        a number of answers other than that of the sealed queries comes back.
    InconclusiveError
        When more than 5 % of the answers are missing; a missing answer counts against the candidate.
    """
    rows = [np.asarray(c, dtype=np.bool_) for c in candidates if not np.all(c)]
    whole = np.ones(n_units, dtype=np.bool_)
    _check(rows, whole, sealed, seen, method, block, reordered)
    power = power_statement(
        len(sealed), requirement=requirement, level=level, full_score=full_score, method=method
    )
    size = len(sealed) if method == "exact" else block or max(10, ceil(len(sealed) / 4))
    full = Answers(lambda queries: evaluate(whole[None, :], queries), len(sealed), size)
    steps: list[tuple[NDArray[np.bool_], Answers, tuple[int, ...] | None]] = [
        (kept, Answers(_asker(evaluate, kept), len(sealed), size), None) for kept in rows
    ]
    if reordered is not None:
        other = Answers(lambda queries: reordered.evaluate(reordered.order, queries), len(sealed), size)
        steps.append((rows[-1] if rows else whole, other, reordered.order))
    tests: list[CandidateTest] = []
    open_sequence = True
    for kept, answers, order in steps:
        if not open_sequence:
            tests.append(untested(kept, order))
            continue
        bars = {"full": full} | ({"cleaned": steps[0][1]} if cleaned_bar and tests else {})
        tests.append(decide(kept, order, answers, bars, requirement, level, method))
        open_sequence = tests[-1].passed
    if not steps:
        full.ask(len(sealed))
    passed = [t for t in tests if t.passed]
    return Certificate(
        decision="certified" if passed or not steps else "not_certified",
        kept=passed[-1].kept if passed else whole,
        level=level,
        requirement=requirement,
        method=method,
        n=len(sealed),
        full=measured_on(full.performance[: full.asked], full.tokens[: full.asked]),
        tests=tuple(tests),
        power_statement=power,
        sealed_digest=query_digest,
        cleaned_bar=cleaned_bar,
        earlier_looks=earlier_looks,
    )


def _asker(evaluate: EvaluateTarget, kept: NDArray[np.bool_]) -> AskSealed:
    return lambda queries: evaluate(kept[None, :], queries)


def _check(
    rows: Sequence[NDArray[np.bool_]],
    whole: NDArray[np.bool_],
    sealed: Sequence[str],
    seen: Collection[str],
    method: str,
    block: int | None,
    reordered: Reordered | None,
) -> None:
    known = [key for key in sealed if key in set(seen)]
    if known:
        raise InputError(
            f"sealed: {len(known)} of {len(sealed)} queries were asked by an earlier step (first: {known[0]!r});"
            " they cannot certify.",
            hint="Certify on queries that served no other purpose.",
        )
    if method not in ("exact", "betting"):
        raise InputError(f"method: got {method!r}; allowed: exact, betting.")
    if block is not None and (method == "exact" or block < 1):
        raise InputError(
            f"block={block} with method={method!r}: the exact test is valid for one look, at all sealed queries.",
            hint="Use 'betting' to look after every block.",
        )
    for before, after in pairwise(rows):
        if (after & ~before).any():
            raise InputError(
                "candidates: one is not a subset of the one before; a fixed-sequence test needs nested candidates."
            )
    last = rows[-1] if rows else whole
    if reordered is not None and set(reordered.order) != set(np.flatnonzero(last).tolist()):
        raise InputError("reordered: it does not hold exactly the demonstrations of the last candidate.")
