"""What does stopping when a decision is settled save, and how often is it wrong?

    python benchmarks/stopping/run.py

Closed-form games of 12 units, and all coalitions of real prompts of 10 demonstrations where
``benchmarks/attribution/results/matrices.npz`` is there (three queries each, log-probability of the reference label in
nats). In every game the attributions of all coalitions are known, so each call can be checked. Writes
``results.json`` and ``results.md``.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from proxyprompt import KernelSHAP, WeightedBanzhaf
from proxyprompt.attribution import (
    Below,
    BottomK,
    Decision,
    Explainer,
    FullRanking,
    SettledAttribution,
    TopK,
    attribute_until_settled,
)
from proxyprompt.testing import AirportGame, UnanimityGame

HERE = Path(__file__).parent
MATRICES = HERE.parent / "attribution" / "results" / "matrices.npz"
RUNS = 40
Values = Callable[[np.ndarray], np.ndarray]


def closed_form() -> Iterator[tuple[str, int, int, Values]]:
    """Name, units, budget, value function."""
    n = 12
    rng = np.random.default_rng(1)
    pairs = [(tuple(rng.choice(n, 2, replace=False)), 0.1 * rng.normal()) for _ in range(2 * n)]
    triples = [(tuple(rng.choice(n, 3, replace=False)), 0.3 * rng.normal()) for _ in range(3 * n)]
    planted = [((unit,), 1.0 if unit < 3 else 0.0) for unit in range(n)]
    spread = [((unit,), float(pay)) for unit, pay in enumerate(np.linspace(-1, 1, n))]
    yield "three planted units, weak triples", n, 1000, UnanimityGame(n, [*planted, *pairs, *triples[:12]])
    yield "evenly spread units, triples", n, 1000, UnanimityGame(n, [*spread, *triples])
    yield "largest of the units' values", n, 1000, AirportGame(np.arange(1.0, n + 1))
    yield "equal units in triples", n, 1000, UnanimityGame(
        n, [((i, (i + 1) % n, (i + 2) % n), 1.0) for i in range(n)]
    )  # fmt: skip


def measured() -> Iterator[tuple[str, int, int, Values]]:
    """The real prompts; nothing when they have not been measured."""
    if not MATRICES.exists():
        return
    with np.load(MATRICES) as stored:
        arrays = {name: stored[name] for name in stored.files if stored[name].dtype.kind == "f"}
    for name, values in sorted(arrays.items()):
        n = int(np.log2(len(values)))
        powers = 1 << np.arange(n)

        def look_up(rows: np.ndarray, values: np.ndarray = values, powers: np.ndarray = powers) -> np.ndarray:
            return values[rows @ powers]

        yield name.replace("_", ", "), n, 512, look_up


def wrong_calls(result: SettledAttribution, truth: np.ndarray) -> bool:
    """Whether any comparison called settled, at any look, contradicts ``truth`` by more than the tie."""
    decision = result.decision
    edge = np.append(truth, decision.threshold)
    for look in result.looks:
        # Ranks in the order of the answer reproduce the comparisons that it rests on.
        stand_in = np.full(len(truth), 0.0)
        if isinstance(decision, Below):
            stand_in = np.full(len(truth), decision.threshold + 1)
            stand_in[list(look.answer)] = decision.threshold - 1
        elif isinstance(decision, TopK):
            stand_in[list(look.answer)] = np.arange(len(look.answer), 0, -1)
        else:
            stand_in[list(look.answer)] = np.arange(len(look.answer)) - len(look.answer)
        for above, below in zip(*decision.comparisons(stand_in), strict=True):
            pair = tuple(int(unit) for unit in (above, below) if unit < len(truth))
            if pair not in look.undecided and edge[above] - edge[below] < -decision.tie - 1e-9:
                return True
    return False


def right_answer(answer: tuple[int, ...], decision: Decision, truth: np.ndarray) -> bool:
    """Whether the answer errs nowhere by more than the tie, and by more than rounding."""
    tie = decision.tie + 1e-9
    if isinstance(decision, Below):
        away = np.where(np.isin(np.arange(len(truth)), answer), truth, -truth)
        return bool((away <= decision.threshold + tie).all())
    if isinstance(decision, FullRanking):
        ordered = truth[list(answer)]
        return bool((np.maximum.accumulate(ordered) - ordered <= tie).all())
    outside = np.delete(truth, list(answer))
    if isinstance(decision, TopK):
        return bool(outside.max() - truth[list(answer)].min() <= tie)
    return bool(truth[list(answer)].max() - outside.min() <= tie)


def measure(name: str, n: int, budget: int, function: Values, explainer: Explainer) -> list[dict[str, Any]]:
    """One row a decision."""
    truth = explainer.attribute(function, n, budget=2**n, rng=np.random.default_rng(0)).mean
    tie = float(round(0.1 * truth.std(), 6))
    rows = []
    decisions = (TopK(3), TopK(3, tie=tie), BottomK(3, tie=tie), Below(tie=tie), FullRanking(tie=tie))
    for decision in decisions:
        rng = np.random.default_rng(5)
        found = [
            attribute_until_settled(explainer, function, n, decision=decision, budget=budget, rng=rng)
            for _ in range(RUNS)
        ]
        fixed = [explainer.attribute(function, n, budget=budget, rng=rng).mean for _ in range(RUNS)]
        settled = [r for r in found if r.settled]
        rows.append(
            {
                "game": name,
                "technique": explainer.method,
                "decision": type(decision).__name__ + (f"({decision.k})" if hasattr(decision, "k") else ""),
                "tie": decision.tie,
                "budget": budget,
                "settled": round(len(settled) / RUNS, 3),
                "mean_share_spent": round(float(np.mean([r.share_spent for r in found])), 3),
                "mean_share_spent_when_settled": (
                    round(float(np.mean([r.share_spent for r in settled])), 3) if settled else None
                ),
                "any_wrong_call": round(float(np.mean([wrong_calls(r, truth) for r in found])), 3),
                "right_answer": round(
                    float(np.mean([right_answer(r.answer, decision, truth) for r in found])), 3
                ),
                "right_answer_of_the_whole_budget": round(
                    float(
                        np.mean(
                            [right_answer(tuple(decision.answer(m).tolist()), decision, truth) for m in fixed]
                        )
                    ),
                    3,
                ),
            }
        )
    return rows


def main() -> None:
    """Measure and write."""
    rows: list[dict[str, Any]] = []
    for name, n, budget, function in [*closed_form(), *measured()]:
        for explainer in (WeightedBanzhaf(), KernelSHAP()):
            rows += measure(name, n, budget, function, explainer)
            print(name, explainer.method, flush=True)
    body = {
        "command": "python benchmarks/stopping/run.py",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("proxyprompt-core", "numpy", "scipy")},
        },
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "runs": RUNS,
        "confidence": 0.95,
        "real_prompts": MATRICES.exists(),
        "rows": rows,
    }
    (HERE / "results.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    (HERE / "results.md").write_text(markdown(body), encoding="utf-8")


def markdown(body: dict[str, Any]) -> str:
    """A page that a person reads."""
    versions = ", ".join(f"{k} {v}" for k, v in body["versions"].items())
    rows = body["rows"]
    share = np.mean([row["mean_share_spent"] for row in rows])
    wrong = np.mean([row["any_wrong_call"] for row in rows])
    lines = [
        "# Stopping when a decision is settled",
        "",
        f"`{body['command']}`, {body['date']}; {versions}; {body['hardware']}. {body['runs']} runs a row at 95 %"
        " confidence over all looks and comparisons.",
        "",
        "*Wrong*: share of runs in which some comparison called settled, at some look, contradicts the attributions of all"
        " coalitions by more than the tie. *Right*: share of runs whose final answer, settled or not, errs nowhere by"
        " more than the tie; beside it that of the technique's own design with the whole budget. Ties"
        " above 0 are a tenth of the standard deviation of the true attributions.",
        "",
        f"Over all rows {share:.0%} of the budget was spent, and {wrong:.1%} of runs held a wrong call.",
    ]
    if not body["real_prompts"]:
        lines += [
            "",
            "The real prompts were not measured yet; `benchmarks/attribution/matrices.py` does that.",
        ]
    lines += [
        "",
        "| game | technique | decision | tie | settled | budget spent | wrong | right | right with the whole budget |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['game']} | {r['technique']} | {r['decision']} | {r['tie']:.3g} | {r['settled']:.0%} |"
        f" {r['mean_share_spent']:.0%} of {r['budget']} | {r['any_wrong_call']:.0%} | {r['right_answer']:.0%} |"
        f" {r['right_answer_of_the_whole_budget']:.0%} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
