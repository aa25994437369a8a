"""The certificate: paired non-inferiority on queries that no earlier step saw.

Candidates are nested and come in a fixed order, mildest first, so each is tested at the full level and the
first failure ends the sequence (Maurer, Hothorn and Lehmacher 1995); a candidate is asked of the target only
when those before it have passed. What is not certified is not shipped: the answer is the last candidate that
passed, or the original prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxyprompt.errors import InputError
from proxyprompt.sequential import NonInferiority, non_inferiority, smallest_certifiable_loss
from proxyprompt.value_function import Values

from .compress import interval

__all__ = ["CandidateTest", "Certificate", "Measured", "certify", "power_statement"]

EvaluateTarget: TypeAlias = Callable[[NDArray[np.bool_]], Values]
"""Ask the target model for coalitions of the whole prompt, on the sealed split."""


@dataclass(frozen=True)
class Measured:
    """Performance of one prompt on the sealed split, with its 95 % interval; ``tokens`` is the mean prompt length."""

    performance: float
    low: float
    high: float
    tokens: float


@dataclass(frozen=True)
class CandidateTest:
    """One candidate of the sequence.

    Attributes
    ----------
    kept : bool (n_units,)
    tested : bool
        False for candidates after the first failure; their numbers are NaN-free zeros and mean nothing.
    passed : bool
    difference : float
        Mean of ``candidate - tau * full``; above 0 is good enough on these queries.
    lower_bound : float
        One-sided lower confidence bound of that quantity.
    retained, retained_lower_bound : float or None
        Candidate's performance as a share of the bar's, measured and as a one-sided lower bound.
    bar : {"full", "cleaned"}
        What the numbers compare with: where the candidate must hold against both the full and the cleaned prompt,
        the comparison that was harder to pass.
    evidence_name, evidence : str, float
        ``"p-value"`` of the exact test, or ``"e-value"`` of the bets.
    n_discordant : int
        Queries on which the two prompts score differently.
    """

    kept: NDArray[np.bool_]
    n_kept: int
    tested: bool
    passed: bool
    performance: float
    low: float
    high: float
    tokens: float
    difference: float
    lower_bound: float
    evidence_name: str
    evidence: float
    n_discordant: int
    retained: float | None = None
    retained_lower_bound: float | None = None
    bar: str = "full"


@dataclass(frozen=True)
class Certificate:
    """What is proven about the shipped prompt.

    Attributes
    ----------
    decision : {"certified", "not_certified"}
    kept : bool (n_units,)
        The shipped prompt: the last candidate that passed, or everything.
    level : float
        Largest chance of certifying a prompt that loses more than ``tau`` allows.
    tau : float
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
    """

    decision: str
    kept: NDArray[np.bool_]
    level: float
    tau: float
    n: int
    full: Measured
    tests: tuple[CandidateTest, ...]
    power_statement: str
    sealed_digest: str
    cleaned_bar: bool = False

    @property
    def shipped(self) -> CandidateTest | None:
        """The candidate that is shipped, if one passed."""
        passed = [t for t in self.tests if t.passed]
        return passed[-1] if passed else None

    @property
    def text(self) -> str:
        """The claim in one sentence."""
        shipped = self.shipped
        if not self.tests:
            return "No smaller prompt was proposed, so there was nothing to certify."
        if shipped is None:
            return (
                f"On {self.n} sealed queries no candidate could be shown, at {1 - self.level:.0%} confidence, to keep"
                f" {self.tau:.0%} of the full prompt's performance."
            )
        also = " and of the cleaned prompt's" if self.cleaned_bar and shipped is not self.tests[0] else ""
        return (
            f"On {self.n} queries that no earlier step had seen, at {1 - self.level:.0%} confidence, the prompt with"
            f" {shipped.n_kept} demonstrations keeps at least {self.tau:.0%} of the full prompt's{also} performance."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "decision": self.decision,
            "kept": [int(i) for i in np.flatnonzero(self.kept)],
            "level": self.level,
            "tau": self.tau,
            "n": self.n,
            "full": asdict(self.full),
            "tests": [asdict(t) | {"kept": [int(i) for i in np.flatnonzero(t.kept)]} for t in self.tests],
            "power_statement": self.power_statement,
            "sealed_digest": self.sealed_digest,
            "cleaned_bar": self.cleaned_bar,
            "text": self.text,
        }


def certify(
    candidates: Sequence[NDArray[np.bool_]],
    evaluate: EvaluateTarget,
    *,
    n_units: int,
    tau: float,
    level: float,
    n_sealed: int,
    query_digest: str,
    full_score: float = 0.8,
    right_or_wrong: bool = True,
    cleaned_bar: bool = False,
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
    tau : float
        Share of the full prompt's performance to keep, in (0, 1].
    level : float
    n_sealed : int
        Size of the sealed split.
    query_digest : str
        SHA-256 of its queries, for the record.
    full_score : float
        Performance of the full prompt as known from other queries; used by the power statement only.
    right_or_wrong : bool
        Whether the metric gives 0 or 1 only (exact test) or any score in [0, 1] (betting). Said by the
        caller, because a sample that happens to hold only zeros and ones does not make a metric binary.
    cleaned_bar : bool
        The first candidate is the cleaned prompt and did better than the full one on other queries: later candidates
        must keep ``tau`` of its performance as well, so that compression cannot spend what cleaning gained.
        Both tests must pass, each at full level (an intersection-union test).

    Returns
    -------
    Certificate

    Raises
    ------
    InputError
        When the candidates are not nested.
    InconclusiveError
        When more than 5 % of the answers are missing; a missing answer counts against the candidate.
    """
    rows = [np.asarray(c, dtype=np.bool_) for c in candidates if not np.all(c)]
    for before, after in pairwise(rows):
        if (after & ~before).any():
            raise InputError(
                "candidates: one is not a subset of the one before; a fixed-sequence test needs nested candidates."
            )
    power = power_statement(n_sealed, tau=tau, level=level, full_score=round(full_score, 2))
    whole = np.ones(n_units, dtype=np.bool_)
    reference = evaluate(whole[None, :])
    reference.require_complete("certifying on the target")
    full = reference.performance[0]
    tests: list[CandidateTest] = []
    open_sequence = True
    cleaned: NDArray[np.float64] | None = None
    for kept in rows:
        if not open_sequence:
            tests.append(_untested(kept))
            continue
        values = evaluate(kept[None, :])
        bars = [("full", full)] + ([("cleaned", cleaned)] if cleaned is not None else [])
        results = [
            (
                name,
                bar,
                non_inferiority(
                    bar,
                    values.performance[0],
                    tau=tau,
                    level=level,
                    method="exact" if right_or_wrong else "betting",
                ),
            )
            for name, bar in bars
        ]
        name, bar, test = max(results, key=lambda r: r[2].p_value)
        tests.append(_tested(kept, values, bar, test, name))
        if cleaned_bar and cleaned is None:
            cleaned = values.performance[0]
        open_sequence = test.certified
    passed = [t for t in tests if t.passed]
    return Certificate(
        decision="certified" if passed or not rows else "not_certified",
        kept=passed[-1].kept if passed else whole,
        level=level,
        tau=tau,
        n=n_sealed,
        full=_measured(full, reference.prompt_tokens[0]),
        tests=tuple(tests),
        power_statement=power,
        sealed_digest=query_digest,
        cleaned_bar=cleaned_bar,
    )


@lru_cache(maxsize=64)
def power_statement(n: int, *, tau: float, level: float, full_score: float, discordance: float = 0.1) -> str:
    """Say, before anything is asked, what a certificate on ``n`` sealed queries can show."""
    score = min(max(full_score, 0.05), 0.95)
    share = min(discordance, 1.8 * min(score, 1 - score))

    def largest(n: int) -> str:
        plan = smallest_certifiable_loss(n, tau=tau, level=level, discordance=share, full_score=score)
        if plan.loss is None:
            return "cannot be relied on to certify anything"
        if plan.loss < 0:
            return f"certify with 80 % chance only a prompt that is at least {-plan.loss:.1%} better"
        return f"certify with 80 % chance a true loss of up to {plan.loss:.1%}"

    return (
        f"Planned before asking: with accuracy near {score:.0%}, {share:.0%} of the queries answered differently and"
        f" tau = {tau:g}, {n} sealed queries {largest(n)}; {2 * n} would {largest(2 * n)}."
    )


def _measured(performance: NDArray[np.float64], tokens: NDArray[np.int64]) -> Measured:
    low, high = interval(performance)
    known = tokens[tokens > 0]
    return Measured(float(np.nanmean(performance)), low, high, float(known.mean()) if len(known) else 0.0)


def _tested(
    kept: NDArray[np.bool_], values: Values, full: NDArray[np.float64], test: NonInferiority, bar: str
) -> CandidateTest:
    mine = values.performance[0]
    measured = _measured(mine, values.prompt_tokens[0])
    with np.errstate(invalid="ignore"):
        discordant = int((mine != full)[~np.isnan(mine) & ~np.isnan(full)].sum())
    return CandidateTest(
        kept=kept,
        n_kept=int(kept.sum()),
        tested=True,
        passed=test.certified,
        performance=measured.performance,
        low=measured.low,
        high=measured.high,
        tokens=measured.tokens,
        difference=test.estimate,
        lower_bound=test.lower_bound,
        evidence_name="p-value" if test.e_value is None else "e-value",
        evidence=test.p_value if test.e_value is None else test.e_value,
        n_discordant=discordant,
        retained=test.retained,
        retained_lower_bound=test.retained_lower_bound,
        bar=bar,
    )


def _untested(kept: NDArray[np.bool_]) -> CandidateTest:
    return CandidateTest(
        kept=kept,
        n_kept=int(kept.sum()),
        tested=False,
        passed=False,
        performance=0.0,
        low=0.0,
        high=0.0,
        tokens=0.0,
        difference=0.0,
        lower_bound=0.0,
        evidence_name="p-value",
        evidence=1.0,
        n_discordant=0,
    )
