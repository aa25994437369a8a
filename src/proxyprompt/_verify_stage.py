"""The stage in which the target measures what proxies proposed: coalitions, calls, and the words for what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ._explaining import Explanation, oracle_queries
from ._oracle_size import verify_within
from ._run import Run
from .attribution.verified_units import UnitVerification, toggle_bases, verified_attribution, verify_units
from .errors import InconclusiveError
from .prompt import Query
from .screening import Screening

__all__ = ["target_token_counts", "verification_bases", "verification_text", "verify_proposal"]


def verification_bases(run: Run, n_queries: int) -> tuple[NDArray[np.bool_], str]:
    """The coalition of each query in which demonstrations are toggled, bool (n_queries, n_units), and the estimand."""
    return toggle_bases(run.explainer, run.prompt.n_units, n_queries, rng=run.rng(23))


def verify_proposal(
    run: Run, proposal: Explanation, screening: Screening | None, *, trusted: bool
) -> Explanation:
    """Let the target measure demonstrations in the proposed order until the rest cannot change the decision.

    Parameters
    ----------
    run : Run
    proposal : Explanation
        By proxies, accepted or not.
    screening : Screening or None
    trusted : bool
        Whether a screen accepted them.

    Raises
    ------
    InconclusiveError
        Too many of the target's answers missing.
    """
    s, target = run.settings, run.target
    bought = list(screening.queries_bought) if screening is not None else []
    queries = oracle_queries(run.splits["explain"], bought, s.oracle_queries)
    name = target.backend.name
    run.watch.stage("verify", f"{name} measures what {proposal.model} proposes, on {len(queries)} queries")
    whole = run.evaluate(target, queries, "verify", np.ones((1, run.prompt.n_units), dtype=np.bool_))
    answered = np.flatnonzero(~np.isnan(whole.utility[0]))
    if len(answered) < max(2, 0.8 * len(queries)):
        raise InconclusiveError(
            f"verification: {name} answered the full prompt for {len(answered)} of {len(queries)} queries; two, and 80 %,"
            " are needed.",
            hint="Run again, which asks only for what is missing, or give more explain queries.",
        )
    calls, cut = verify_within(run, queries)
    if cut:
        run.watch.note(cut)
    asking = _Toggling(run, [queries[i] for i in answered])
    found = verify_units(
        proposal.attribution.mean,
        asking,
        rng=run.rng(24),
        n_rows=len(asking.queries),
        decision=s.verify if s.verify != "off" else "all",
        top=s.verify_top,
        level=s.verify_level,
        calls=calls,
        trusted=trusted,
        estimated_error=proposal.attribution.standard_error,
    )
    run.watch.note(verification_text(found, name))
    why = proposal.why.removesuffix("; the target confirms and certifies.").removesuffix(".")
    return replace(
        proposal,
        attribution=verified_attribution(proposal.attribution, found, whole.utility[0, answered]),
        why=" ".join(filter(None, (f"{why}. {verification_text(found, name)}", cut))),
        query_ids=tuple(q.id for q in asking.queries) if found.order else proposal.query_ids,
        verification=found,
        proposal=proposal,
        estimand=asking.estimand,
    )


def target_token_counts(run: Run, explanation: Explanation) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Coalitions that the target answered here, bool (m, n_units), and prompt tokens, each as if of the first query."""
    found = explanation.verification
    n = run.prompt.n_units
    if found is None or not found.order:
        return np.zeros((0, n), dtype=np.bool_), np.zeros(0, dtype=np.int64)
    by_id = {q.id: q for q in run.splits["explain"]}
    queries = [by_id[i] for i in explanation.query_ids]
    bases, _ = verification_bases(run, len(queries))
    rows = []
    for base in bases:
        own = np.repeat(base[None, :], len(found.order), axis=0)
        own[np.arange(len(found.order)), list(found.order)] ^= True
        rows.append(np.vstack([np.ones((1, n), dtype=np.bool_), base[None, :], own]))
    counts = np.array([v.prompt_tokens[:, 0] for v in run.evaluate_each(run.target, queries, "verify", rows)])
    known = (counts > 0).all(axis=1)
    # What a query's own text takes is the same in each of its prompts.
    counts = counts[known] - counts[known][:, :1] + (counts[known][0, 0] if known.any() else 0)
    return np.vstack(rows)[np.repeat(known, len(rows[0]))], counts.ravel()


class _Toggling:
    """Effects of demonstrations on the target, each query in a coalition of its own."""

    def __init__(self, run: Run, queries: Sequence[Query]) -> None:
        self.run, self.queries = run, queries
        self.bases, self.estimand = verification_bases(run, len(queries))
        self._values: NDArray[np.float64] | None = None

    def __call__(self, units: tuple[int, ...]) -> NDArray[np.float64]:
        """Float (n_queries, len(units)); the coalitions themselves are asked with the first units."""
        which = list(units)
        rows = []
        for base in self.bases:
            own = np.repeat(base[None, :], len(which), axis=0)
            own[np.arange(len(which)), which] ^= True
            rows.append(own if self._values is not None else np.vstack([base[None, :], own]))
        found = self.run.evaluate_each(self.run.target, self.queries, "verify", rows)
        values = np.array([v.utility[:, 0] for v in found])
        if self._values is None:
            self._values, values = values[:, 0], values[:, 1:]
        # Put in or taken out: either way the effect is the value with the unit less that without it.
        there = np.where(self.bases[:, which], 1.0, -1.0)
        effects: NDArray[np.float64] = there * (self._values[:, None] - values)
        return effects


def verification_text(found: UnitVerification, target: str) -> str:
    """What was measured, why it ended, and what is left open."""
    n, done = len(found.estimated), len(found.order)
    text = f"{target} measured {done} of {n} demonstrations itself ({found.target_calls} of {found.oracle_calls} calls)"
    if found.outcome == "measured_all":
        text += "." if found.decision == "all" else "; nothing less would have settled it."
    elif found.outcome == "settled":
        question = "harmful" if found.decision == "harmful" else f"among the {found.top} most useful"
        text += (
            f" and stopped: of the other {n - done}, by what the measured ones show, {found.chance_left:.2g} are expected"
            f" to be {question} by more than {found.margin:.3g} (limit {found.level:g}). Their values stay estimates."
        )
    else:
        text += (
            f", as many as verify_calls or the budget allows; the other {n - done} are estimates and undecided:"
            f" {found.chance_left:.2g} of them could change the answer."
        )
    if found.undecided:
        text += f" {len(found.undecided)} of the measured are undecided."
    return text
