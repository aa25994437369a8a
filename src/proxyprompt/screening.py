"""May a proxy model stand in for the target? Task-level screening [PE 3.1, Algorithm 1] and its valid form.

For each query on which target ``f`` and proxy ``f'`` predict the same on the full prompt, a surrogate is
fitted on ``f`` and one on ``f'`` over the same coalitions, and both are judged on other coalitions against
``f``. The differences ``d_i = q_proxy(x_i) - tau * q_oracle(x_i)`` go to a sequential rule. Target outputs sit
in one buffer that all proxies share, so no target call is made twice.

What ``q`` is:

``"attribution"`` (default)
    Agreement of attributions: the correlation, over held-out coalitions, of what the surrogate predicts with what the
    target's value is, less what chance gives (:mod:`proxyprompt.agreement`). It compares the reasons.
``"fidelity"``
    [PE 4.2]: the share of held-out coalitions on which the surrogate names the target's label. Where a label hardly
    ever changes, every surrogate that names it is faithful, whatever its reasons.

Both are always computed and reported; the setting says which one decides. Two rules:

``"betting"`` (default)
    The one-sided betting e-process, valid at every look, ``delta / M`` for ``M`` candidates.
``"paper"``
    Algorithm 1 as printed: fidelity, and a t interval after every pair. Its error is far above nominal (see
    :func:`proxyprompt.sequential.paired_t_rule`); it is offered for comparison and says so.

Whatever rule decides, the evidence shows what the other would have said on the same data.

References
----------
[PE] Liu, Yu, Yan, Zhang. Revitalizing Black-Box Interpretability. arXiv 2505.12509.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._screening_pairs import (
    KINDS,
    Candidate,
    Evaluate,
    Judges,
    agreement,
    averaged,
    candidates_of,
    screen_block,
)
from ._screening_result import Evidence, ProxyScreening, Screening, ScreeningPlan
from .agreement import chance_agreement
from .attribution.base import Design, Explainer
from .errors import InputError
from .prompt import Query
from .sequential import (
    SequentialDecision,
    betting_rule,
    earliest_acceptance,
    paired_t_rule,
    smallest_possible_acceptance,
)

__all__ = [
    "Evidence",
    "ProxyScreening",
    "Screening",
    "ScreeningPlan",
    "agreement",
    "averaged",
    "plan_screen",
    "screen",
]

Method: TypeAlias = Literal["betting", "paper"]
On: TypeAlias = Literal["attribution", "fidelity"]

_TYPICAL_SPREAD = 0.15
"""Standard deviation of differences that the power line speaks of; on recorded closed models .1 to .3."""


def plan_screen(
    n_queries: int,
    n_candidates: int = 1,
    *,
    method: Method = "betting",
    on: On | None = None,
    tau: float = 0.8,
    delta: float = 0.05,
    max_pairs: int = 100,
    n_judge: int = 24,
) -> ScreeningPlan:
    """What a screen of these settings can find; asks nothing.

    Parameters
    ----------
    n_queries, n_candidates : int
        An ensemble is a candidate too.
    method, on, tau, delta, max_pairs
        As for :func:`screen`.
    n_judge : int
        Held-out coalitions.

    Returns
    -------
    ScreeningPlan

    Raises
    ------
    InputError
        If the settings could not accept even a perfect proxy with any number of queries, or contradict each other.

    Notes
    -----
    Too few queries are no error: then as many candidates are screened, the first ones, as can share ``delta`` and still be
    accepted; none, if not even one can (``n_screened = 0``, ``earliest = None``). That is settled before any data are seen,
    so the chance that any candidate is wrongly accepted stays ``delta``.

    Examples
    --------
    >>> plan = plan_screen(200)
    >>> plan.earliest, round(plan.detectable, 2)
    (29, 0.05)
    >>> plan_screen(20, 3).n_screened, plan_screen(10).n_screened
    (2, 0)
    """
    decides = _check_rule(method, on, tau, delta)
    chance = chance_agreement(n_judge) if decides == "attribution" else 0.0

    def earliest_of(candidates: int, pairs: int) -> int | None:
        if method == "paper":
            return 2 if pairs >= 2 else None
        return earliest_acceptance(tau=tau, delta=delta / candidates, max_pairs=pairs, chance=chance)

    if earliest_of(n_candidates, max_pairs) is None:
        level = delta / n_candidates
        raise InputError(
            f"screening: with tau={tau:g} and delta={level:g} not even a perfect proxy would be accepted within"
            f" max_pairs={max_pairs}; no rule at all can accept one before"
            f" {smallest_possible_acceptance(tau, 1.0, level)}.",
            hint="Raise max_pairs or delta, or lower tau.",
        )
    n_max = min(max_pairs, n_queries)
    n_screened = next((m for m in range(n_candidates, 0, -1) if earliest_of(m, n_max) is not None), 0)
    level = delta / max(n_screened, 1) if method == "betting" else delta
    if not n_screened:
        needed = next(n for n in range(n_max + 1, max_pairs + 1) if earliest_of(1, n) is not None)
        text = (
            f"No proxy was screened: with {n_queries} queries to explain not even a perfect one could be accepted"
            f" (tau {tau:g}, delta {delta:g}); that takes {needed} or more. Nothing was asked for it."
        )
        return ScreeningPlan(decides, level, n_max, None, float("inf"), chance, text, 0)
    earliest = earliest_of(n_screened, n_max)
    normal = NormalDist()
    by_noise = (normal.inv_cdf(1 - level) + normal.inv_cdf(0.8)) * _TYPICAL_SPREAD / sqrt(n_max)
    by_range = tau * (level ** (-1 / n_max) - 1)
    # A tenth on top for what the bets lose before they know the spread.
    detectable = 1.1 * float(np.hypot(by_noise, by_range))
    what = (
        "attributions agree with the target"
        if decides == "attribution"
        else "explanations predict the target"
    )
    text = (
        f"The screen uses up to {n_max} queries. A proxy whose {what} on every query just as well as the target's own"
        f" is accepted after {earliest} of them."
    )
    if method == "betting":
        text += (
            f" One that is better than {tau:g} of the target's own by {detectable:.2f} on average is found in about four"
            f" screens of five (for differences that scatter by {_TYPICAL_SPREAD:g})."
        )
    if n_screened < n_candidates:
        text += (
            f" Only the first {n_screened} of {n_candidates} candidates {'is' if n_screened == 1 else 'are'} screened: with"
            f" {n_queries} queries to explain, none could be accepted if all of them shared delta."
        )
    return ScreeningPlan(decides, level, n_max, earliest, detectable, chance, text, n_screened)


def screen(
    target: Evaluate,
    proxies: Mapping[str, Evaluate],
    queries: Sequence[Query],
    *,
    explainer: Explainer,
    design: Design,
    judge_coalitions: NDArray[np.bool_],
    rng: np.random.Generator,
    method: Method = "betting",
    on: On | None = None,
    ensemble: bool = False,
    tau: float = 0.8,
    delta: float = 0.05,
    max_pairs: int = 100,
    block: int = 10,
) -> Screening:
    """Screen proxy models against the target, several at once [PE 3.1, Algorithm 1].

    Parameters
    ----------
    target : callable
        ``target(queries, coalitions) -> Values``: asks the target model.
    proxies : mapping of name to callable
        The same for each candidate, cheapest first.
    queries : sequence of Query
        Drawn without replacement in random order; rejected when target and proxy disagree on the full prompt.
    explainer : Explainer
        Technique ``t`` whose surrogates are compared.
    design, judge_coalitions
        Where surrogates are fitted and judged; no row in common.
    rng : numpy.random.Generator
        Order of the queries.
    method : {"betting", "paper"}
    on : {"attribution", "fidelity"}, optional
        Which evidence decides. Default: attributions; fidelity for the paper's method, which knows nothing else.
    ensemble : bool
        Screen the ensemble of all proxies as one more candidate: the mean of their standardised attributions
        (:mod:`proxyprompt.attribution.ensemble`), and the mean of their probabilities for what it predicts.
    tau : float
        Wanted share of what the target reaches with itself, in (0, 1].
    delta : float
        Error level; ``delta / n_candidates`` per candidate for ``"betting"``, as printed for ``"paper"``.
    max_pairs : int
        At most so many pairs per candidate (``N``).
    block : int
        Queries asked at once; the rule still looks after every pair. Larger blocks share more work on a
        local target, smaller ones save calls on a remote one.

    Returns
    -------
    Screening

    Raises
    ------
    InputError
        If the settings could not accept even a perfect proxy with any number of queries, or nothing is given to screen.

    Notes
    -----
    With too few queries some or all candidates stay undecided without a pair, and nothing is asked for them
    (:func:`plan_screen`); ``rule.note`` says why.

    A query on which the deciding evidence cannot be had (the target's held-out values do not vary, or too much is
    missing) makes no pair.
    """
    _check(proxies, queries, block)
    candidates = candidates_of(proxies, ensemble)
    plan = plan_screen(
        len(queries),
        len(candidates),
        method=method,
        on=on,
        tau=tau,
        delta=delta,
        max_pairs=max_pairs,
        n_judge=len(judge_coalitions),
    )
    judges = Judges(explainer, design, np.asarray(judge_coalitions, dtype=np.bool_))
    decisions: dict[str, SequentialDecision] = {}
    bought: list[str] = []
    asked = 0
    order = [queries[int(i)] for i in rng.permutation(len(queries))]
    screened = candidates[: plan.n_screened]
    for start in range(0, len(order), block):
        active = [c for c in screened if _open(c, decisions.get(c.name), plan)]
        if not active:
            break
        part = order[start : start + block]
        new = screen_block(part, target, proxies, active, judges, plan.on)
        bought += new
        # The full prompt of the design is the one already asked.
        asked += len(part) + len(new) * (len(judges.all_rows) - 1)
        for c in active:
            decisions[c.name] = _decide(c, method, tau, plan)
    return Screening(
        proxies=tuple(
            _result(c, judges, method, tau, plan) if c in screened else _untested(c, tau, plan)
            for c in candidates
        ),
        method=method,
        on=plan.on,
        tau=tau,
        delta=delta,
        max_pairs=plan.max_pairs,
        design=design,
        plan=plan,
        judge_coalitions=judges.held_out,
        queries_bought=tuple(bought),
        target_pairs=asked,
    )


def _open(c: Candidate, decision: SequentialDecision | None, plan: ScreeningPlan) -> bool:
    """Whether more pairs can still change the answer."""
    return (decision is None or decision.reason == "out_of_data") and len(c.ids) < plan.max_pairs


def _bets(
    c: Candidate, kind: str, tau: float, level: float, n_max: int, chance: float
) -> SequentialDecision | None:
    """The betting rule on one kind of evidence; ``None`` where it could not accept at all."""
    if tau >= 1 or earliest_acceptance(tau=tau, delta=level, max_pairs=n_max, chance=chance) is None:
        return None
    _, q_proxy, q_oracle = c.pairs(kind)
    d = (q_proxy - chance) - tau * (q_oracle - chance)
    return betting_rule(d[:n_max], tau=tau, delta=level, max_pairs=n_max, chance=chance)


def _paper(c: Candidate, tau: float, delta: float, n_max: int) -> SequentialDecision:
    _, q_proxy, q_oracle = c.pairs("fidelity")
    return paired_t_rule((q_proxy - tau * q_oracle)[:n_max], delta=delta, max_pairs=n_max)


def _decide(c: Candidate, method: str, tau: float, plan: ScreeningPlan) -> SequentialDecision:
    if method == "paper":
        return _paper(c, tau, plan.level, plan.max_pairs)
    rule = _bets(c, plan.on, tau, plan.level, plan.max_pairs, plan.chance)
    assert rule is not None, "the plan refuses such settings"
    return rule


def _result(c: Candidate, judges: Judges, method: str, tau: float, plan: ScreeningPlan) -> ProxyScreening:
    rule = _decide(c, method, tau, plan)
    # Each rule is compared at the settings it is known by: the paper's at 99 %, ours at 95 % or what was asked.
    level = plan.level if method == "betting" else 0.05
    kinds = {}
    for kind, chance in (("attribution", chance_agreement(len(judges.held_out))), ("fidelity", 0.0)):
        ids, q_proxy, q_oracle = c.pairs(kind)
        says = rule if kind == plan.on else _bets(c, kind, tau, level, plan.max_pairs, chance)
        kinds[kind] = Evidence(kind, ids, tuple(q_proxy.tolist()), tuple(q_oracle.tolist()), chance, says)
    other: SequentialDecision | None
    if method == "betting":
        other = _paper(c, tau, 0.01, plan.max_pairs)
    else:
        other = _bets(c, "fidelity", tau, level, plan.max_pairs, 0.0)
    rank, mass = judges.mean_agreement(c)
    return ProxyScreening(
        name=c.name,
        members=c.members,
        decision=rule.decision,
        rule=rule,
        other_rule=other,
        decided_by=kinds[plan.on],
        beside=kinds["fidelity" if plan.on == "attribution" else "attribution"],
        n_seen=c.n_seen,
        n_agree=c.n_agree,
        target_pairs=c.target_pairs,
        rank_correlation=rank,
        top_mass=mass,
    )


def _untested(c: Candidate, tau: float, plan: ScreeningPlan) -> ProxyScreening:
    """A candidate that so few queries could not have decided; it was asked nothing."""
    rule = SequentialDecision(
        decision="undecided",
        n_used=0,
        path=(),
        method="none",
        settings={"tau": tau, "delta": plan.level, "max_pairs": plan.max_pairs, "chance": plan.chance},
        note="Not screened, and not asked: too few queries"
        + (" for so many candidates." if plan.n_screened else "."),
        reason="out_of_data",
    )
    kinds = {
        kind: Evidence(kind, (), (), (), plan.chance if kind == plan.on else 0.0, None) for kind in KINDS
    }
    return ProxyScreening(
        name=c.name,
        members=c.members,
        decision=rule.decision,
        rule=rule,
        other_rule=None,
        decided_by=kinds[plan.on],
        beside=kinds["fidelity" if plan.on == "attribution" else "attribution"],
        n_seen=0,
        n_agree=0,
        target_pairs=0,
        rank_correlation=None,
        top_mass=None,
    )


def _check(proxies: Mapping[str, Evaluate], queries: Sequence[Query], block: int) -> None:
    if not proxies:
        raise InputError("proxies: none given; at least one is needed to screen.")
    if not queries:
        raise InputError("queries: none given; screening draws its pairs from them.")
    if block < 1:
        raise InputError(f"block: got {block!r}; at least 1.")


def _check_rule(method: str, on: str | None, tau: float, delta: float) -> str:
    """What decides."""
    if method not in ("betting", "paper"):
        raise InputError(f"method: got {method!r}; allowed: betting, paper.")
    if on not in (None, *KINDS):
        raise InputError(f"on: got {on!r}; allowed: {', '.join(KINDS)}.")
    if method == "paper" and on == "attribution":
        raise InputError(
            "method='paper' with on='attribution': Algorithm 1 compares fidelities.",
            hint="Leave on out, or use method='betting'.",
        )
    if not 0.0 < tau <= 1.0:
        raise InputError(f"tau: got {tau!r}; it lies in (0, 1].")
    if not 0.0 < delta < 1.0:
        raise InputError(f"delta: got {delta!r}; it lies in (0, 1).")
    return on or ("fidelity" if method == "paper" else "attribution")
