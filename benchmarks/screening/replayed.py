"""The recorded models: values, attributions and differences of the screen, and the seven laws made from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri

from proxyprompt.agreement import rank_agreement, top_mass
from proxyprompt.backends.replay import LeaveOneOutCase

L8, L70, L33 = "llama3.1-8b-instruct", "llama3.1-70b-instruct", "llama3.3-70b-instruct"
MAVERICK, GEMINI = "llama4-maverick-17b-128e-instruct", "gemini-2-5-flash-lite-vertex"
GPT4O, GPT41 = "gpt-4o", "gpt-4-1"
TARGETS = (GPT4O, GPT41, GEMINI)
PROXIES = (L8, L70, L33, MAVERICK, GEMINI)
CHEAP = (L8, GEMINI, MAVERICK)
HARDEST = "top-2 mass in probabilities, BoolQ, Gemini for GPT-4o"
_NORMAL = ndtri((np.arange(2000) + 0.5) / 2000)
BENCHES = ("boolq", "anli_r1", "winogrande")
SHORT = {L8: "L3.1-8B", L70: "L3.1-70B", L33: "L3.3-70B", MAVERICK: "L4-Maverick", GEMINI: "Gemini-2.5-FL",
         GPT4O: "GPT-4o", GPT41: "GPT-4.1"}  # fmt: skip


def pairs():
    return [(target, proxy) for target in TARGETS for proxy in PROXIES if proxy != target]


def segments(case: LeaveOneOutCase) -> list[int]:
    """Content only: context and query."""
    return [i for i, role in enumerate(case.roles) if role != "system"]


def label(row: np.ndarray) -> int:
    return int(np.nan_to_num(row, nan=-99.0).argmax())


def predicted(case: LeaveOneOutCase, model: str) -> int:
    return label(case.scores(model))


def log_odds(row: np.ndarray) -> float:
    """Of the first label against the last; NaN if either is censored."""
    return float(row[0] - row[-1])


def probability(row: np.ndarray, of: int) -> float:
    """A censored label has probability 0; so have all where none was listed."""
    p = np.exp(np.nan_to_num(row, nan=-np.inf))
    return float(p[of] / p.sum()) if p.any() else 0.0


def effects(case: LeaveOneOutCase, model: str, of: int | None = None) -> np.ndarray:
    """Leave-one-out attributions of the content segments: log-odds, or the probability of label ``of``."""

    def value(row: np.ndarray) -> float:
        return log_odds(row) if of is None else probability(row, of)

    return np.array([value(case.scores(model)) - value(case.scores(model, k)) for k in segments(case)])


def label_fidelities(cases: Sequence[LeaveOneOutCase], target: str, proxy: str) -> np.ndarray:
    """Share of ablations with the same label, of each prompt on which the models agree; the oracle's is 1."""
    found = []
    for case in cases:
        if predicted(case, target) == predicted(case, proxy):
            same = [label(case.scores(target, k)) == label(case.scores(proxy, k)) for k in segments(case)]
            found.append(np.mean(same))
    return np.array(found)


def attributions(
    cases: Sequence[LeaveOneOutCase], target: str, proxy: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(proxy's, target's) on agreeing prompts of three content segments or more, on the probability of the label."""
    found = []
    for case in cases:
        of = predicted(case, target)
        if of == predicted(case, proxy) and len(segments(case)) >= 3:
            theirs = effects(case, target, of)
            if theirs.any():
                found.append((effects(case, proxy, of), theirs))
    return found


def top2_shares(cases: Sequence[LeaveOneOutCase], target: str, proxy: str) -> np.ndarray:
    """Target mass in the proxy's top 2 over that in the target's own."""
    return np.array(
        [
            float(top_mass(p[None], t[None], 2)[0] / top_mass(t[None], t[None], 2)[0])
            for p, t in attributions(cases, target, proxy)
        ]
    )


def top2_shares_log_odds(cases: Sequence[LeaveOneOutCase], target: str, proxy: str) -> np.ndarray:
    """The same in log-odds, of the prompts on which both labels are visible throughout."""
    found = []
    for case in cases:
        if predicted(case, target) == predicted(case, proxy) and len(segments(case)) >= 3:
            p, t = effects(case, proxy), effects(case, target)
            if np.isfinite(p).all() and np.isfinite(t).all() and t.any():
                found.append(float(top_mass(p[None], t[None], 2)[0] / top_mass(t[None], t[None], 2)[0]))
    return np.array(found)


def rank_correlations(cases: Sequence[LeaveOneOutCase], target: str, proxy: str) -> np.ndarray:
    return np.array(
        [float(rank_agreement(p[None], t[None])[0]) for p, t in attributions(cases, target, proxy)]
    )


def laws(by_bench: dict[str, list[LeaveOneOutCase]], tau: float) -> dict[str, np.ndarray]:
    """Seven laws of ``d`` on the scales of the study (BoolQ in log-odds, ANLI in probabilities), and an eighth.

    Five of recorded models, two LIME-like. The eighth, BoolQ's shares in probabilities, is the hardest kind there is among
    the recordings: a disaster in one prompt of twenty and next to nothing else.
    """
    return {
        "labels, BoolQ, L3.1-70B for GPT-4.1": label_fidelities(by_bench["boolq"], GPT41, L70) - tau,
        "labels, ANLI, Maverick for Gemini": label_fidelities(by_bench["anli_r1"], GEMINI, MAVERICK) - tau,
        "labels, WinoGrande, L3.3-70B for GPT-4o": label_fidelities(by_bench["winogrande"], GPT4O, L33) - tau,
        "top-2 mass, BoolQ, Gemini for GPT-4o": top2_shares_log_odds(by_bench["boolq"], GPT4O, GEMINI) - tau,
        "top-2 mass, ANLI, L3.1-8B for GPT-4o": top2_shares(by_bench["anli_r1"], GPT4O, L8) - tau,
        "LIME-like, sd .10 (SST)": np.clip(0.1 * _NORMAL, -tau, 1.0),
        "LIME-like, sd .20 (MMLU)": np.clip(0.2 * _NORMAL, -tau, 1.0),
        HARDEST: top2_shares(by_bench["boolq"], GPT4O, GEMINI) - tau,
    }


def other_laws(by_bench: dict[str, list[LeaveOneOutCase]], tau: float) -> dict[str, np.ndarray]:
    """The laws on which the bets were chosen: none of them is among :func:`laws`."""
    labels, shares = label_fidelities, top2_shares
    return {
        "top-2 mass, BoolQ, L3.3-70B for GPT-4o": shares(by_bench["boolq"], GPT4O, L33) - tau,
        "top-2 mass, BoolQ, L3.1-8B for Gemini": shares(by_bench["boolq"], GEMINI, L8) - tau,
        "top-2 mass, ANLI, L3.1-70B for GPT-4.1": shares(by_bench["anli_r1"], GPT41, L70) - tau,
        "top-2 mass, ANLI, Maverick for Gemini": shares(by_bench["anli_r1"], GEMINI, MAVERICK) - tau,
        "labels, WinoGrande, L3.1-8B for Gemini": labels(by_bench["winogrande"], GEMINI, L8) - tau,
        "labels, ANLI, L3.1-8B for Gemini": labels(by_bench["anli_r1"], GEMINI, L8) - tau,
        "labels, BoolQ, Maverick for GPT-4o": labels(by_bench["boolq"], GPT4O, MAVERICK) - tau,
        "normal, sd .15": np.clip(0.15 * _NORMAL, -tau, 1.0),
        "normal, sd .25": np.clip(0.25 * _NORMAL, -tau, 1.0),
    }


def tilted(support: np.ndarray, mean: float) -> np.ndarray:
    """Weights of the exponential tilt of a sample to another mean: same support, same atoms."""

    def weights(slope: float) -> np.ndarray:
        w = np.exp(slope * support - (slope * support).max())
        return w / w.sum()

    found: np.ndarray = weights(brentq(lambda slope: float(weights(slope) @ support) - mean, -2000, 2000))
    return found
