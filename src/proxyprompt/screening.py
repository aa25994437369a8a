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

A target that answers the same prompt differently from call to call has noise in all of this. Both scores predict the same
held-out values, and the target's own surrogate was fitted on other calls than it is judged by: ``q_oracle`` is what the
target reaches *with itself*, noise included, and what a proxy must reach is a share of that. Noise in the held-out values
lowers both scores by one factor; noise in the values that the target's surrogate is fitted on lowers ``q_oracle`` alone,
and with it the bar. The hypothesis stays the same, that the mean of ``d`` over agreeing queries is at most 0, and so does
its error level. With ``repeats`` the whole prompts of a few queries are asked again, to say how much of this there is: the
noise floor, the most that any explanation could agree (``ceiling``), and what the target's attributions reach with another
run of itself. Queries on which the target's values vary no more than its noise are counted and stay pairs: counting them as
draws would be as valid, but a proxy without noise of its own can be right where the target's own surrogate is not, and is
then found less often (``tests/statistical/test_screening_error.py``).

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

import numpy as np
from numpy.typing import NDArray

from ._screening_noise import Again, TargetNoise, measure_noise, noise_queries
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
from ._screening_plan import Method, On, plan_screen
from ._screening_result import Evidence, ProxyScreening, Screening, ScreeningPlan
from .agreement import chance_agreement
from .attribution.base import Design, Explainer
from .errors import InputError
from .prompt import Query
from .sequential import SequentialDecision, betting_rule, earliest_acceptance, paired_t_rule

__all__ = [
    "Evidence",
    "ProxyScreening",
    "Screening",
    "ScreeningPlan",
    "TargetNoise",
    "agreement",
    "averaged",
    "plan_screen",
    "screen",
]


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
    again: Again | None = None,
    repeats: int = 0,
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
    again : callable, optional
        ``again(queries, coalitions, repeat) -> Values``: asks the target for the ``repeat``-th time; for ``repeats``.
    repeats : int
        Times that the whole prompts of (up to ten) queries are asked again to see the target's noise; 0 for a target
        that answers the same each time.

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
    _check(proxies, queries, block, again, repeats)
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
    decisions: dict[str, SequentialDecision] = {}
    bought: list[str] = []
    order = [queries[int(i)] for i in rng.permutation(len(queries))]
    noise, whole = None, set[str]()
    if again is not None and repeats and plan.n_screened:
        noise, whole = (
            measure_noise(again, order, design.n_units, repeats),
            {q.id for q in noise_queries(order)},
        )
    asked = len(whole) * (1 + repeats)
    judges = Judges(explainer, design, np.asarray(judge_coalitions, dtype=np.bool_), noise)
    screened = candidates[: plan.n_screened]
    for start in range(0, len(order), block):
        active = [c for c in screened if _open(c, decisions.get(c.name), plan)]
        if not active:
            break
        part = order[start : start + block]
        new = screen_block(part, target, proxies, active, judges, plan.on)
        bought += new
        # The full prompt of the design is the one already asked, and so are those that were repeated.
        asked += sum(q.id not in whole for q in part) + len(new) * (len(judges.all_rows) - 1)
        for c in active:
            decisions[c.name] = _decide(c, method, tau, plan)
    return Screening(
        proxies=tuple(
            _result(c, judges, method, tau, plan, rng) if c in screened else _untested(c, tau, plan)
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
        noise=noise,
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


def _result(
    c: Candidate, judges: Judges, method: str, tau: float, plan: ScreeningPlan, rng: np.random.Generator
) -> ProxyScreening:
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
    own_rank, own_mass = judges.own_agreement(c, rng)
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
        own_rank_correlation=own_rank,
        own_top_mass=own_mass,
        n_tied=c.n_tied,
        ceiling=float(np.nanmean(c.ceilings)) if np.isfinite(c.ceilings).any() else None,
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


def _check(
    proxies: Mapping[str, Evaluate], queries: Sequence[Query], block: int, again: Again | None, repeats: int
) -> None:
    if not proxies:
        raise InputError("proxies: none given; at least one is needed to screen.")
    if not queries:
        raise InputError("queries: none given; screening draws its pairs from them.")
    if block < 1:
        raise InputError(f"block: got {block!r}; at least 1.")
    if repeats < 0 or (repeats and again is None):
        raise InputError(
            f"repeats: got {repeats!r}; 0 or more, and again= to ask with.",
            hint="2 are usual for a remote target.",
        )
