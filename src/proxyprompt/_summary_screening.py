"""The screen's part of the summary: every proxy with its evidence, its decision and what it cost."""

from __future__ import annotations

from decimal import Decimal
from math import log
from typing import Any

import numpy as np

from ._cost_reduction import stage_cost
from .pipeline import Result
from .screening import Evidence
from .sequential import SequentialDecision

__all__ = ["screening_of"]

_PATH_NAMES = {"betting": "log of the wealth (nats)", "paper": "mean difference"}


def screening_of(result: Result) -> dict[str, Any] | None:
    """Rule, sizes, money and proxies of the screen; ``None`` if nothing was screened."""
    s = result.screening
    if s is None:
        return None
    spent, currency = _money(result)
    proxies = []
    for p in s.proxies:
        used = p.rule.n_used
        reasons, labels = (_means(p.evidence[kind], used) for kind in ("attribution", "fidelity"))
        path, upper, lower = _path(p.rule)
        proxies.append(
            {
                "name": p.name,
                "decision": p.decision if p.rule.n_used else "not_tested",
                "n_used": used,
                "mean_q_proxy": labels[0],
                "mean_q_oracle": labels[1],
                "decided_by": s.on,
                "mean_agreement_proxy": reasons[0],
                "mean_agreement_oracle": reasons[1],
                "beside": p.beside.rule and f"{p.beside.rule.decision} after {p.beside.rule.n_used} pairs",
                "agreement": p.agreement_rate if p.n_seen else None,
                "members": list(p.members),
                "n_seen": p.n_seen,
                "target_pairs": p.target_pairs,
                "money": float(spent * p.target_pairs / s.target_pairs) if spent and s.target_pairs else None,
                "currency": currency,
                "rank_correlation": p.rank_correlation,
                "own_rank_correlation": p.own_rank_correlation,
                "top_mass": p.top_mass,
                "own_top_mass": p.own_top_mass,
                "n_tied": p.n_tied,
                "ceiling": p.ceiling,
                "path": path or None,
                "threshold": upper,
                "lower_threshold": lower,
                "path_name": _PATH_NAMES[s.method],
                "paper_rule": _other(p.other_rule) if s.method == "betting" else None,
                "note": p.rule.note,
            }
        )
    rule = (
        "betting e-process, valid at every look (Waudby-Smith and Ramdas)"
        if s.method == "betting"
        else "sequential t interval as printed in the paper (Algorithm 1)"
    )
    what = "attributions agree with" if s.on == "attribution" else "explanations predict"
    return {
        "rule": rule,
        "tau": s.tau,
        "delta": s.delta,
        "queries": len(s.queries_bought),
        "units": s.design.n_units,
        "fit_coalitions": s.design.n_coalitions,
        "judge_coalitions": len(s.judge_coalitions),
        "power": s.plan.text,
        "noise": None if s.noise is None else s.noise.text,
        "target_pairs": s.target_pairs,
        "money": spent and float(spent),
        "currency": currency,
        "text": (
            f"A proxy may explain if its {what} the target at least {s.tau:.0%} as well as the target's"
            f" own do; a proxy that does not is accepted with probability at most {s.delta:g}."
            if s.method == "betting"
            else f"A proxy may explain if its explanations predict the target at least {s.tau:.0%} as well as the target's"
            " own do. The paper's rule looks after every pair; its real error is above its nominal one."
        ),
        "proxies": proxies,
    }


def _money(result: Result) -> tuple[Decimal | None, str | None]:
    """What the screen bought of the target, by the ledger; ``None`` without a price or when it bought nothing."""
    cost = stage_cost(result.spent, result.pricing, ("screen",), "target")
    return cost.money or None, cost.currency


def _means(evidence: Evidence, used: int) -> tuple[float | None, float | None]:
    """Mean of the proxy's and of the target's own scores over the pairs that were used."""
    pairs = evidence.q_proxy[:used], evidence.q_oracle[:used]
    return (float(np.mean(pairs[0])), float(np.mean(pairs[1]))) if pairs[0] else (None, None)


def _path(rule: SequentialDecision) -> tuple[list[list[float]], float, float | None]:
    """Evidence by number of pairs, with the line at which it accepts and the one at which it rejects."""
    if rule.method == "betting":
        bar = -log(rule.settings["delta"])
        # Both bets on one axis: evidence against the proxy points down.
        rows = [[row[0], row[1] if row[1] >= row[2] else -row[2]] for row in rule.path]
        return rows, bar, -bar
    return [[row[0], (row[1] + row[2]) / 2] for row in rule.path if np.isfinite(row[1])], 0.0, None


def _other(rule: Any) -> dict[str, Any] | None:
    if rule is None:
        return None
    return {"decision": rule.decision, "n_used": rule.n_used, "note": rule.note}
