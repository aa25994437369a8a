"""One candidate on the sealed queries: its answers, block by block, and the test that decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxyprompt._noninferiority import betting_p_value
from proxyprompt.errors import InputError
from proxyprompt.sequential import NonInferiority, non_inferiority
from proxyprompt.value_function import Values

from .compress import interval
from .requirement import Requirement

__all__ = ["Answers", "AskSealed", "CandidateTest", "Measured", "decide", "measured_on", "untested"]

AskSealed: TypeAlias = Callable[[NDArray[np.int64] | None], Values]
"""Values of one prompt, shape (1, n), on the sealed queries with these indices; ``None``: on all."""


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
        How far the candidate is above the line that it has to hold; above 0 is good enough on these queries.
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
    n_asked : int
        Sealed queries asked; fewer than there are where the bets had decided before.
    order : tuple of int or None
        Units as they stand in the prompt; ``None``: the original order.
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
    n_asked: int = 0
    order: tuple[int, ...] | None = None


class Answers:
    """Scores of one prompt on the sealed queries, asked block by block in their order."""

    def __init__(self, ask: AskSealed, n: int, size: int) -> None:
        self._ask, self.size = ask, size
        self.n, self.asked = n, 0
        self.performance = np.full(n, np.nan)
        self.tokens = np.zeros(n, dtype=np.int64)
        self._missing: list[tuple[int, int, str]] = []

    def ask(self, upto: int) -> None:
        """Ask until so many are there."""
        while self.asked < upto:
            end = min(self.asked + self.size, self.n)
            everything = self.asked == 0 and end == self.n
            values: Values = self._ask(None if everything else np.arange(self.asked, end))
            if values.performance.shape != (1, end - self.asked):
                raise InputError(
                    f"evaluate: {values.performance.shape} answers for {end - self.asked} sealed queries.",
                    hint="sealed has one key for each query, in the order in which they are asked.",
                )
            values.require_complete("certifying on the target", share=0.05 * self.n / (end - self.asked))
            self.performance[self.asked : end] = values.performance[0]
            self.tokens[self.asked : end] = values.prompt_tokens[0]
            self.asked = end


def decide(
    kept: NDArray[np.bool_],
    order: tuple[int, ...] | None,
    answers: Answers,
    bars: dict[str, Answers],
    requirement: Requirement,
    level: float,
    method: str,
) -> CandidateTest:
    """One candidate against its bars: at one look, or block by block until it is decided."""
    n, end = answers.n, 0
    tau, margin = requirement.tau, requirement.margin

    def evidence(bar: Answers, hoped: int = 0) -> float:
        """p value of the bets on what is there, and on so many more queries if the candidate won them all."""
        return betting_p_value(
            np.r_[bar.performance[:end], np.zeros(hoped)],
            np.r_[answers.performance[:end], np.ones(hoped)],
            tau=tau,
            margin=margin,
            level=level,
            horizon=n,
        )

    while end < n:
        end = min(end + answers.size, n)
        for prompt in (answers, *bars.values()):
            prompt.ask(end)
        if end < n:
            passed = all(evidence(bar) <= level for bar in bars.values())
            hopeless = any(evidence(bar, n - end) > level for bar in bars.values())
            if passed or hopeless:
                break
    results = [
        (
            name,
            non_inferiority(
                bar.performance[:end],
                answers.performance[:end],
                tau=tau,
                margin=margin,
                level=level,
                method="exact" if method == "exact" else "betting",
                horizon=None if method == "exact" else n,
            ),
        )
        for name, bar in bars.items()
    ]
    name, test = max(results, key=lambda r: r[1].p_value)
    return _tested(kept, order, answers, bars[name], test, name, end)


def measured_on(performance: NDArray[np.float64], tokens: NDArray[np.int64]) -> Measured:
    low, high = interval(performance)
    known = tokens[tokens > 0]
    return Measured(float(np.nanmean(performance)), low, high, float(known.mean()) if len(known) else 0.0)


def _tested(
    kept: NDArray[np.bool_],
    order: tuple[int, ...] | None,
    answers: Answers,
    bar: Answers,
    test: NonInferiority,
    name: str,
    end: int,
) -> CandidateTest:
    mine, theirs = answers.performance[:end], bar.performance[:end]
    found = measured_on(mine, answers.tokens[:end])
    with np.errstate(invalid="ignore"):
        discordant = int((mine != theirs)[~np.isnan(mine) & ~np.isnan(theirs)].sum())
    return CandidateTest(
        kept=kept,
        n_kept=int(kept.sum()),
        tested=True,
        passed=test.certified,
        performance=found.performance,
        low=found.low,
        high=found.high,
        tokens=found.tokens,
        difference=test.estimate,
        lower_bound=test.lower_bound,
        evidence_name="p-value" if test.e_value is None else "e-value",
        evidence=test.p_value if test.e_value is None else test.e_value,
        n_discordant=discordant,
        retained=test.retained,
        retained_lower_bound=test.retained_lower_bound,
        bar=name,
        n_asked=end,
        order=order,
    )


def untested(kept: NDArray[np.bool_], order: tuple[int, ...] | None) -> CandidateTest:
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
        order=order,
    )
