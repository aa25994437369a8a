"""May a proxy model stand in for the target? Task-level screening [PE 3.1, Algorithm 1] and its valid form.

For each query on which target ``f`` and proxy ``f'`` predict the same on the full prompt, a surrogate is
fitted on ``f`` and one on ``f'`` over the same coalitions, and both are judged on other coalitions against
``f`` (fidelity, [PE 4.2]). The differences ``d_i = q_proxy(x_i) - tau * q_oracle(x_i)`` go to a sequential
rule. Target outputs sit in one buffer that all proxies share, so no target call is made twice.

Two rules:

``"betting"`` (default)
    The one-sided betting e-process, valid at every look, ``delta / M`` for ``M`` proxies.
``"paper"``
    Algorithm 1 as printed: a t interval after every pair. Its error is far above nominal (see
    :func:`proxyprompt.sequential.paired_t_rule`); it is offered for comparison and says so.

Whatever rule decides, the evidence shows what the other would have said on the same data.

References
----------
[PE] Liu, Yu, Yan, Zhang. Revitalizing Black-Box Interpretability. arXiv 2505.12509.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .attribution.base import Design, Explainer
from .errors import InputError
from .fidelity import label_fidelity, score_fidelity
from .prompt import Query
from .sequential import (
    SequentialDecision,
    betting_rule,
    earliest_acceptance,
    paired_t_rule,
    smallest_possible_acceptance,
)
from .value_function import Values

__all__ = ["ProxyScreening", "Screening", "agreement", "screen"]

Method: TypeAlias = Literal["betting", "paper"]
Evaluate: TypeAlias = Callable[[Sequence[Query], NDArray[np.bool_]], Values]
"""Ask one model for a matrix of coalitions on some queries."""

SAME_SCORE = 0.5


@dataclass(frozen=True)
class ProxyScreening:
    """Evidence about one proxy model.

    Attributes
    ----------
    name : str
    decision : {"accepted", "rejected", "undecided"}
        Undecided is never accepted.
    rule : SequentialDecision
        The deciding rule with its evidence path.
    other_rule : SequentialDecision
        What the other method says on the same differences.
    query_ids : tuple of str
        Agreeing queries in the order they were used.
    q_proxy, q_oracle : tuple of float
        Fidelity to the target of the surrogate fitted on the proxy / on the target, per query, in [0, 1].
    n_seen, n_agree : int
        Queries drawn, and those among them on which both models predict the same on the full prompt.
    rank_correlation : float or None
        Spearman correlation of the two models' mean attributions on the queries used: agreement of *reasons*,
        which fidelity does not see. Evidence only; it decides nothing here.
    """

    name: str
    decision: str
    rule: SequentialDecision
    other_rule: SequentialDecision | None
    query_ids: tuple[str, ...]
    q_proxy: tuple[float, ...]
    q_oracle: tuple[float, ...]
    n_seen: int
    n_agree: int
    rank_correlation: float | None

    @property
    def agreement_rate(self) -> float:
        """Share of drawn queries on which the two models predict the same; NaN if none was drawn."""
        return self.n_agree / self.n_seen if self.n_seen else float("nan")


@dataclass(frozen=True)
class Screening:
    """Result for all candidate proxies, in the order they were given.

    Attributes
    ----------
    proxies : tuple of ProxyScreening
    method, tau, delta, max_pairs
        As asked; ``delta`` is before division by the number of candidates.
    design : Design
        Coalitions the surrogates were fitted on; row ``design.full_row`` is the full prompt.
    judge_coalitions : bool (n_judge, n_units)
        Held-out coalitions.
    queries_bought : tuple of str
        Ids of the queries whose target outputs are in the buffer.
    """

    proxies: tuple[ProxyScreening, ...]
    method: str
    tau: float
    delta: float
    max_pairs: int
    design: Design
    judge_coalitions: NDArray[np.bool_] = field(repr=False)
    queries_bought: tuple[str, ...] = ()
    smallest_n: int = 0

    @property
    def accepted(self) -> tuple[str, ...]:
        """Names of the accepted proxies."""
        return tuple(p.name for p in self.proxies if p.decision == "accepted")

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe evidence."""
        return {
            "method": self.method,
            "tau": self.tau,
            "delta": self.delta,
            "max_pairs": self.max_pairs,
            "smallest_n": self.smallest_n,
            "fit_coalitions": self.design.n_coalitions,
            "judge_coalitions": len(self.judge_coalitions),
            "queries_bought": list(self.queries_bought),
            "proxies": [
                {
                    "name": p.name,
                    "decision": p.decision,
                    "n_used": p.rule.n_used,
                    "n_seen": p.n_seen,
                    "n_agree": p.n_agree,
                    "query_ids": list(p.query_ids),
                    "q_proxy": list(p.q_proxy),
                    "q_oracle": list(p.q_oracle),
                    "rank_correlation": p.rank_correlation,
                    "rule": rule_to_dict(p.rule),
                    "other_rule": rule_to_dict(p.other_rule) if p.other_rule else None,
                }
                for p in self.proxies
            ],
        }


@dataclass
class _Candidate:
    """What is known of one proxy so far."""

    name: str
    evaluate: Evaluate
    ids: list[str] = field(default_factory=list)
    q_proxy: list[float] = field(default_factory=list)
    q_oracle: list[float] = field(default_factory=list)
    utility: list[NDArray[np.float64]] = field(default_factory=list)
    target_utility: list[NDArray[np.float64]] = field(default_factory=list)
    n_seen: int = 0
    n_agree: int = 0
    decision: SequentialDecision | None = None

    @property
    def open(self) -> bool:
        """Whether more pairs can still change the answer."""
        return self.decision is None or self.decision.reason == "out_of_data"


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
        The same for each candidate.
    queries : sequence of Query
        Drawn without replacement in random order; rejected when target and proxy disagree on the full prompt.
    explainer : Explainer
        Technique ``t`` whose surrogates are compared.
    design, judge_coalitions
        Where surrogates are fitted and judged; no row in common.
    rng : numpy.random.Generator
        Order of the queries.
    method : {"betting", "paper"}
    tau : float
        Wanted share of the oracle's fidelity, in (0, 1].
    delta : float
        Error level; ``delta / n_proxies`` per proxy for ``"betting"``, as printed for ``"paper"``.
    max_pairs : int
        At most so many pairs per proxy (``N``).
    block : int
        Queries asked at once; the rule still looks after every pair. Larger blocks share more work on a
        local target, smaller ones save calls on a remote one.

    Returns
    -------
    Screening

    Raises
    ------
    InputError
        If the settings could not accept even a perfect proxy, or nothing is given to screen.
    """
    _check(proxies, queries, method, tau, delta, block)
    n_max = min(max_pairs, len(queries))
    level = delta / len(proxies) if method == "betting" else delta
    smallest = earliest_acceptance(tau=tau, delta=level, max_pairs=n_max) if method == "betting" else 2
    if smallest is None:
        raise InputError(
            f"screening: with tau={tau:g} and delta={level:g} not even a perfect proxy would be accepted within the"
            f" {n_max} pairs that are possible; no rule at all can accept one before"
            f" {smallest_possible_acceptance(tau, 1.0, level)}.",
            hint="Give more queries to explain, lower tau, or raise delta.",
        )
    candidates = [_Candidate(name, evaluate) for name, evaluate in proxies.items()]
    judges = _Judges(explainer, design, np.asarray(judge_coalitions, dtype=np.bool_))
    full = np.ones((1, design.n_units), dtype=np.bool_)
    bought: list[str] = []
    order = [queries[int(i)] for i in rng.permutation(len(queries))]
    for start in range(0, len(order), block):
        active = [c for c in candidates if c.open and len(c.q_proxy) < n_max]
        if not active:
            break
        part = order[start : start + block]
        target_full = target(part, full)
        agree = {c.name: agreement(target_full, c.evaluate(part, full))[0] for c in active}
        wanted = [j for j in range(len(part)) if any(agree[c.name][j] for c in active)]
        rows = [part[j] for j in wanted]
        if rows:
            bought += [q.id for q in rows]
            on_target = target(rows, judges.all_rows)
            for c in active:
                mine = [k for k, j in enumerate(wanted) if agree[c.name][j]]
                _add_pairs(c, judges, on_target, [rows[k] for k in mine], mine)
        for c in active:
            c.n_seen += len(part)
            c.n_agree += int(sum(agree[c.name]))
            c.decision = _decide(method, c, tau=tau, level=level, n_max=n_max)
    return Screening(
        proxies=tuple(_evidence(c, judges, method, tau=tau, level=level, n_max=n_max) for c in candidates),
        method=method,
        tau=tau,
        delta=delta,
        max_pairs=n_max,
        design=design,
        judge_coalitions=judges.held_out,
        queries_bought=tuple(bought),
        smallest_n=smallest,
    )


def agreement(first: Values, second: Values) -> NDArray[np.bool_]:
    """Instance-level screening [PE 3.1]: do two models predict the same? Shape ``(n_coalitions, n_queries)``.

    Labels: the predicted label is equal. Generated text: the scores differ by less than one half, which for
    exact match means both right or both wrong. A missing value never agrees.
    """
    if first.scale == "score" or second.scale == "score":
        with np.errstate(invalid="ignore"):
            return np.asarray(np.abs(first.performance - second.performance) < SAME_SCORE, dtype=np.bool_)
    return np.asarray((first.predictions == second.predictions) & (first.predictions >= 0), dtype=np.bool_)


@dataclass(frozen=True)
class _Judges:
    """Fits surrogates on the design and judges them on the held-out coalitions."""

    explainer: Explainer
    design: Design
    held_out: NDArray[np.bool_]

    @property
    def all_rows(self) -> NDArray[np.bool_]:
        return np.vstack([self.design.coalitions, self.held_out])

    def fidelity(self, fitted_on: Values, judged_on: Values) -> NDArray[np.float64]:
        """Fidelity per query of the surrogate of one model to the other, on the held-out rows."""
        m = self.design.n_coalitions
        if fitted_on.probabilities is None:
            return score_fidelity(
                self.design,
                fitted_on.utility[:m],
                self.held_out,
                judged_on.utility[m:],
                judged_base=judged_on.utility[self.design.empty_row],
                judged_full=judged_on.utility[self.design.full_row],
                explainer=self.explainer,
            ).side_agreement
        return label_fidelity(
            self.design,
            fitted_on.probabilities[:m],
            self.held_out,
            judged_on.predictions[m:],
            explainer=self.explainer,
        )


def _add_pairs(
    c: _Candidate, judges: _Judges, on_target: Values, queries: list[Query], columns: list[int]
) -> None:
    if not queries:
        return
    mine = _columns(on_target, columns)
    on_proxy = c.evaluate(queries, judges.all_rows)
    q_oracle, q_proxy = judges.fidelity(mine, mine), judges.fidelity(on_proxy, mine)
    m = judges.design.n_coalitions
    for k, query in enumerate(queries):
        if np.isnan(q_oracle[k]) or np.isnan(q_proxy[k]):
            continue
        c.ids.append(query.id)
        c.q_oracle.append(float(q_oracle[k]))
        c.q_proxy.append(float(q_proxy[k]))
        c.utility.append(on_proxy.utility[:m, k])
        c.target_utility.append(mine.utility[:m, k])


def _columns(values: Values, columns: list[int]) -> Values:
    return Values(
        coalitions=values.coalitions,
        utility=values.utility[:, columns],
        performance=values.performance[:, columns],
        predictions=values.predictions[:, columns],
        probabilities=None if values.probabilities is None else values.probabilities[:, columns],
        prompt_tokens=values.prompt_tokens[:, columns],
        scale=values.scale,
    )


def _differences(c: _Candidate, tau: float) -> NDArray[np.float64]:
    return np.asarray(c.q_proxy) - tau * np.asarray(c.q_oracle)


def _decide(method: str, c: _Candidate, *, tau: float, level: float, n_max: int) -> SequentialDecision:
    d = _differences(c, tau)[:n_max]
    if method == "paper":
        return paired_t_rule(d, delta=level, max_pairs=n_max)
    return betting_rule(d, tau=tau, delta=level, max_pairs=n_max)


def _evidence(
    c: _Candidate, judges: _Judges, method: str, *, tau: float, level: float, n_max: int
) -> ProxyScreening:
    rule = c.decision if c.decision is not None else _decide(method, c, tau=tau, level=level, n_max=n_max)
    # The comparison uses the settings each rule is known by: 99 % for the paper's, ours at the level asked.
    other: SequentialDecision | None
    if method == "betting":
        other = _decide("paper", c, tau=tau, level=0.01, n_max=n_max)
    elif tau < 1 and earliest_acceptance(tau=tau, delta=0.05, max_pairs=n_max) is not None:
        other = _decide("betting", c, tau=tau, level=0.05, n_max=n_max)
    else:
        other = None
    return ProxyScreening(
        name=c.name,
        decision=rule.decision,
        rule=rule,
        other_rule=other,
        query_ids=tuple(c.ids),
        q_proxy=tuple(c.q_proxy),
        q_oracle=tuple(c.q_oracle),
        n_seen=c.n_seen,
        n_agree=c.n_agree,
        rank_correlation=_rank_correlation(c, judges),
    )


def _rank_correlation(c: _Candidate, judges: _Judges) -> float | None:
    if len(c.ids) < 2 or judges.design.n_units < 3:
        return None
    from scipy.stats import spearmanr

    of_target = judges.explainer.fit(judges.design, np.stack(c.target_utility, axis=1)).mean
    of_proxy = judges.explainer.fit(judges.design, np.stack(c.utility, axis=1)).mean
    if np.ptp(of_target) == 0 or np.ptp(of_proxy) == 0:
        return None
    return float(spearmanr(of_target, of_proxy).statistic)


def rule_to_dict(rule: SequentialDecision) -> dict[str, Any]:
    """JSON-safe form of a sequential decision."""
    return {
        "method": rule.method,
        "decision": rule.decision,
        "n_used": rule.n_used,
        "path": [[float(x) for x in row] for row in rule.path],
        "settings": dict(rule.settings),
        "note": rule.note,
    }


def _check(
    proxies: Mapping[str, Evaluate],
    queries: Sequence[Query],
    method: str,
    tau: float,
    delta: float,
    block: int,
) -> None:
    if not proxies:
        raise InputError("proxies: none given; at least one is needed to screen.")
    if not queries:
        raise InputError("queries: none given; screening draws its pairs from them.")
    if method not in ("betting", "paper"):
        raise InputError(f"method: got {method!r}; allowed: betting, paper.")
    if not 0.0 < tau <= 1.0:
        raise InputError(f"tau: got {tau!r}; it lies in (0, 1].")
    if not 0.0 < delta < 1.0:
        raise InputError(f"delta: got {delta!r}; it lies in (0, 1).")
    if block < 1:
        raise InputError(f"block: got {block!r}; at least 1.")
