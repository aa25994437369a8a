"""What a screen hands back: its plan, the evidence on each candidate, the verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._screening_noise import TargetNoise
from .attribution.base import Design
from .sequential import SequentialDecision

__all__ = ["Evidence", "ProxyScreening", "Screening", "ScreeningPlan", "rule_to_dict"]


@dataclass(frozen=True)
class ScreeningPlan:
    """What a screen can find, said before it asks anything.

    Attributes
    ----------
    on : {"attribution", "fidelity"}
    level : float
        Error of each candidate's rule.
    max_pairs : int
        Pairs that are possible.
    earliest : int or None
        Pairs after which a proxy as good as the target itself is accepted; 2 for the paper's rule. ``None``: there are
        too few queries for that.
    detectable : float
        Mean difference ``q_proxy - tau * q_oracle`` that is found in about 80 of 100 cases if the differences scatter by
        0.15: that of a test of the same level after all pairs, and at least what the largest safe bet needs.
    chance : float
        What agreement of attributions reaches by chance, and is taken off; 0 for fidelity.
    text : str
    n_screened : int
        Candidates that are screened, the first of those given; fewer than all, or none, where queries are few.
    """

    on: str
    level: float
    max_pairs: int
    earliest: int | None
    detectable: float
    chance: float
    text: str
    n_screened: int


@dataclass(frozen=True)
class Evidence:
    """One kind of evidence about one candidate.

    Attributes
    ----------
    on : {"attribution", "fidelity"}
    query_ids : tuple of str
        Agreeing queries in the order they were used.
    q_proxy, q_oracle : tuple of float
        Per query, in [0, 1]: how the surrogate fitted on the proxy / on the target does on the target's held-out values.
    chance : float
        What of it is chance; the rule is about the rest.
    rule : SequentialDecision or None
        What the sequential rule says; ``None`` where no number of these pairs could decide.
    """

    on: str
    query_ids: tuple[str, ...]
    q_proxy: tuple[float, ...]
    q_oracle: tuple[float, ...]
    chance: float
    rule: SequentialDecision | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "on": self.on,
            "query_ids": list(self.query_ids),
            "q_proxy": list(self.q_proxy),
            "q_oracle": list(self.q_oracle),
            "chance": self.chance,
            "rule": rule_to_dict(self.rule) if self.rule else None,
        }


@dataclass(frozen=True)
class ProxyScreening:
    """Evidence about one proxy model, or about an ensemble of several.

    Attributes
    ----------
    name : str
    members : tuple of str
        The proxies behind it: itself, or those of the ensemble.
    decision : {"accepted", "rejected", "undecided"}
        Undecided is never accepted.
    rule : SequentialDecision
        The deciding rule with its evidence path.
    other_rule : SequentialDecision or None
        What the other method says: of the paper's, on the fidelities.
    decided_by, beside : Evidence
        The kind of evidence that decides, and the other one. The verdict of ``beside.rule`` is for information; no
        error is shared out to it.
    n_seen, n_agree : int
        Queries drawn, and those among them on which both models predict the same on the full prompt.
    target_pairs : int
        Pairs of a prompt and a query that the target was asked for this candidate; candidates share them, so that
        together they cost less than their sum (:attr:`Screening.target_pairs`).
    rank_correlation : float or None
        Spearman correlation of the two models' mean attributions on the queries used.
    top_mass : float or None
        Share of the target's mean attribution mass in this candidate's largest quarter of the units, relative to the
        share in its own largest quarter. Both are of attributions with sampling noise, for information only.
    own_rank_correlation, own_top_mass : float or None
        What the target reaches by these two measures with another run of itself, by the noise of its repeated answers; a
        proxy that reaches as much agrees as far as can be seen. ``None`` where nothing was asked again.
    n_tied : int
        Agreeing queries on which the target's held-out values vary no more than its noise. They are pairs like the others.
    ceiling : float or None
        Agreement of attributions that a perfect explanation could reach with held-out values this noisy, mean over the
        agreeing queries; 1 without noise, ``None`` where nothing was asked again.
    """

    name: str
    members: tuple[str, ...]
    decision: str
    rule: SequentialDecision
    other_rule: SequentialDecision | None
    decided_by: Evidence
    beside: Evidence
    n_seen: int
    n_agree: int
    target_pairs: int
    rank_correlation: float | None
    top_mass: float | None
    own_rank_correlation: float | None = None
    own_top_mass: float | None = None
    n_tied: int = 0
    ceiling: float | None = None

    @property
    def query_ids(self) -> tuple[str, ...]:
        """Queries of the deciding evidence, in the order used."""
        return self.decided_by.query_ids

    @property
    def q_proxy(self) -> tuple[float, ...]:
        """``q_proxy`` of the deciding evidence."""
        return self.decided_by.q_proxy

    @property
    def q_oracle(self) -> tuple[float, ...]:
        """``q_oracle`` of the deciding evidence."""
        return self.decided_by.q_oracle

    @property
    def evidence(self) -> dict[str, Evidence]:
        """Both kinds, by name."""
        return {e.on: e for e in (self.decided_by, self.beside)}

    @property
    def agreement_rate(self) -> float:
        """Share of drawn queries on which the two models predict the same; NaN if none was drawn."""
        return self.n_agree / self.n_seen if self.n_seen else float("nan")


@dataclass(frozen=True)
class Screening:
    """Result for all candidates: the proxies in the order they were given, then their ensemble.

    Attributes
    ----------
    proxies : tuple of ProxyScreening
    method, on, tau, delta, max_pairs
        As asked; ``delta`` is before division by the number of candidates.
    design : Design
        Coalitions the surrogates were fitted on; row ``design.full_row`` is the full prompt.
    judge_coalitions : bool (n_judge, n_units)
        Held-out coalitions.
    plan : ScreeningPlan
    queries_bought : tuple of str
        Ids of the queries whose target outputs are in the buffer.
    target_pairs : int
        Pairs of a prompt and a query that the target was asked for, repeats included: what the screen cost.
    noise : TargetNoise or None
        How far the target's answers vary from call to call; ``None`` where nothing was asked again.
    """

    proxies: tuple[ProxyScreening, ...]
    method: str
    on: str
    tau: float
    delta: float
    max_pairs: int
    design: Design
    plan: ScreeningPlan
    judge_coalitions: NDArray[np.bool_] = field(repr=False)
    queries_bought: tuple[str, ...] = ()
    target_pairs: int = 0
    noise: TargetNoise | None = None

    @property
    def smallest_n(self) -> int | None:
        """Pairs before which nothing is accepted unless it does better than the target itself; ``None``: never."""
        return self.plan.earliest

    @property
    def accepted(self) -> tuple[str, ...]:
        """Names of the accepted candidates, in order: with the proxies given cheapest first, the cheapest is first."""
        return tuple(p.name for p in self.proxies if p.decision == "accepted")

    def __getitem__(self, name: str) -> ProxyScreening:
        """The candidate of this name."""
        return next(p for p in self.proxies if p.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe evidence."""
        return {
            "method": self.method,
            "on": self.on,
            "tau": self.tau,
            "delta": self.delta,
            "max_pairs": self.max_pairs,
            "smallest_n": self.smallest_n,
            "power": self.plan.text,
            "chance": self.plan.chance,
            "fit_coalitions": self.design.n_coalitions,
            "judge_coalitions": len(self.judge_coalitions),
            "queries_bought": list(self.queries_bought),
            "target_pairs": self.target_pairs,
            "noise": self.noise.to_dict() if self.noise is not None else None,
            "proxies": [
                {
                    "name": p.name,
                    "members": list(p.members),
                    "decision": p.decision,
                    "n_used": p.rule.n_used,
                    "n_seen": p.n_seen,
                    "n_agree": p.n_agree,
                    "target_pairs": p.target_pairs,
                    "query_ids": list(p.query_ids),
                    "q_proxy": list(p.q_proxy),
                    "q_oracle": list(p.q_oracle),
                    "rank_correlation": p.rank_correlation,
                    "top_mass": p.top_mass,
                    "own_rank_correlation": p.own_rank_correlation,
                    "own_top_mass": p.own_top_mass,
                    "n_tied": p.n_tied,
                    "ceiling": p.ceiling,
                    "rule": rule_to_dict(p.rule),
                    "other_rule": rule_to_dict(p.other_rule) if p.other_rule else None,
                    "beside": p.beside.to_dict(),
                }
                for p in self.proxies
            ],
        }


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
