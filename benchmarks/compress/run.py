"""Compression on simulated targets: what the sequential search saves, and what pairs are good for.

    python benchmarks/compress/run.py

Writes ``results.json`` and ``results.md`` beside this file; about a minute on one core, no model, no network. The targets
are closed forms: what a prompt is truly worth is known, so a choice can be judged by the truth and not by the queries
that made it.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxyprompt.attribution import WeightedBanzhaf
from proxyprompt.optimize.compress import compress
from proxyprompt.optimize.path import nested_path, surrogate_path
from proxyprompt.optimize.requirement import Requirement
from proxyprompt.optimize.surrogate import additive_surrogate, choose_surrogate
from proxyprompt.value_function import Values

HERE = Path(__file__).parent
Rows = NDArray[np.bool_]
Worth = Callable[[Rows], NDArray[np.float64]]
N = 24


class Target:
    """Right or wrong on a query by a logistic law of the prompt's worth; the queries differ in difficulty.

    The same query under two prompts is answered alike but for a share of noise of its own, as with real models.
    """

    def __init__(self, worth: Worth, rng: np.random.Generator, n_queries: int) -> None:
        self.worth, self.rng = worth, rng
        self.difficulty = rng.logistic(0, 0.8, n_queries)
        self.paid: set[tuple[bytes, int]] = set()
        self.tokens = 0
        self.known: dict[bytes, NDArray[np.float64]] = {}

    def log_odds(self, rows: Rows) -> NDArray[np.float64]:
        out = []
        for row, worth in zip(rows, self.worth(rows), strict=True):
            key = np.packbits(row).tobytes()
            if key not in self.known:
                self.known[key] = self.rng.normal(0, 0.5, len(self.difficulty))
            out.append(worth + self.difficulty + self.known[key])
        return np.array(out)

    def evaluate(self, rows: Rows, queries: NDArray[np.int64] | None = None) -> Values:
        which = np.arange(len(self.difficulty)) if queries is None else queries
        log_odds = self.log_odds(rows)[:, which]
        for row in rows:
            new = {(np.packbits(row).tobytes(), int(q)) for q in which} - self.paid
            self.paid |= new
            self.tokens += len(new) * int(20 + 12 * row.sum())
        right = (log_odds > 0).astype(float)
        return Values(
            coalitions=rows,
            utility=-np.log1p(np.exp(-log_odds)),
            performance=right,
            predictions=right.astype(np.int64),
            probabilities=None,
            prompt_tokens=np.repeat((20 + 12 * rows.sum(axis=1))[:, None], right.shape[1], axis=1),
            scale="log-probability",
        )


def truth(worth: Worth, rows: Rows) -> NDArray[np.float64]:
    """Accuracy over all queries there could be."""
    draws = np.random.default_rng(99)
    other = draws.logistic(0, 0.8, 4000) + draws.normal(0, 0.5, 4000)
    return (worth(rows)[:, None] + other > 0).mean(axis=1)


def additive(rng: np.random.Generator) -> Worth:
    """Every demonstration counts by itself: a few much, most a little, some harm."""
    weights = rng.permutation(np.r_[rng.uniform(0.3, 0.6, 6), rng.uniform(-0.05, 0.12, N - 6)])
    return lambda rows: -0.6 + rows @ weights


def copies(rng: np.random.Generator) -> Worth:
    """Eight near-copies of eight others: one of two is worth nothing while the other is there."""
    order = rng.permutation(N)
    first, second, alone = order[:8], order[8:16], order[16:]
    worth = rng.uniform(0.25, 0.6, 8)
    weights = rng.uniform(0.0, 0.15, 8)
    return lambda rows: -0.8 + (rows[:, first] | rows[:, second]) @ worth + rows[:, alone] @ weights


def late(rng: np.random.Generator) -> Worth:
    """The first few give nearly everything; the curve is flat and then falls."""
    weights = rng.permutation(np.r_[rng.uniform(0.5, 1.0, 4), rng.uniform(0.0, 0.06, N - 4)])
    return lambda rows: -1.2 + 2.6 * np.tanh(0.8 * (rows @ weights))


def full_scoring(path: Rows, target: Target, tau: float, most: int) -> Rows:
    """The rule that was replaced: an even grid, then halving, every point on every query."""
    last = len(path) - 1
    grid = sorted({round(float(x)) for x in np.linspace(0, last, min(last + 1, max(2, (2 * most) // 3)))})
    whole = np.ones((1, N), dtype=np.bool_)
    values = target.evaluate(np.vstack([whole, path[grid]])).performance
    reference = max(values[:2], key=lambda row: row.mean())
    found = {s: float((values[1 + k] - tau * reference).mean()) for k, s in enumerate(grid)}
    while len(found) < min(most, last + 1):
        best = max((s for s, d in found.items() if d >= 0), default=min(found))
        below = min((s for s in found if s > best), default=None)
        if below is None or below - best < 2:
            break
        step = (best + below) // 2
        found[step] = float((target.evaluate(path[[step]]).performance[0] - tau * reference).mean())
    best = max((s for s, d in found.items() if d >= 0), default=min(found))
    return path[best]


def explained(target: Target, n_coalitions: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Attribution, design and utilities of so many coalitions on 40 other queries."""
    design = WeightedBanzhaf().design(N, n_coalitions, rng=rng)
    values = target.evaluate(design.coalitions).utility
    return WeightedBanzhaf().fit(design, values), design, values


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard error of each figure."""
    out = {}
    for key in rows[0]:
        x = np.array([row[key] for row in rows])
        out[key] = round(float(x.mean()), 4)
        out[f"{key}_se"] = round(float(x.std(ddof=1) / np.sqrt(len(x))), 4)
    return out


def search(repeats: int, n_queries: int) -> list[dict[str, Any]]:
    """Both searches along the same path, on the same answers."""
    table = []
    for name, family in (("additive", additive), ("copies", copies), ("late", late)):
        for level in (None, 0.0, 0.1, 0.2):
            rows = []
            for r in range(repeats):
                rng = np.random.default_rng([r, 1])
                worth = family(rng)
                attribution, _, _ = explained(Target(worth, rng, 40), 96, rng)
                path = nested_path(attribution.mean, np.ones(N, dtype=np.bool_))
                target = Target(worth, np.random.default_rng([r, 2]), n_queries)
                if level is None:
                    kept = full_scoring(path, target, 0.9, 12)
                else:
                    found = compress(
                        path, target.evaluate, requirement=Requirement(tau=0.9), level=level,
                        rng=np.random.default_rng([r, 3]),
                    )  # fmt: skip
                    kept = found.chosen.kept
                both = truth(worth, np.vstack([np.ones(N, dtype=np.bool_), kept]))
                rows.append(
                    {
                        "calls": float(len(target.paid)),
                        "tokens": float(target.tokens),
                        "kept": float(kept.sum()),
                        "retained": float(both[1] / both[0]),
                        "holds": float(both[1] >= 0.9 * both[0]),
                    }
                )
            label = "full scoring" if level is None else f"sequential, level {level:g}"
            table.append({"targets": name, "search": label, "queries": n_queries, **summary(rows)})
    return table


def pairs(repeats: int) -> list[dict[str, Any]]:
    """Smallest prompt of the path that truly holds 0.9, by the surrogate that made the path."""
    table = []
    for name, family in (("copies", copies), ("additive", additive)):
        for n_coalitions in (74, 146, 290):
            rows = []
            for r in range(repeats):
                rng = np.random.default_rng([r, 5])
                worth = family(rng)
                attribution, design, values = explained(Target(worth, rng, 40), n_coalitions, rng)
                chosen = choose_surrogate(attribution, design, values, rng=rng)
                line = 0.9 * truth(worth, np.ones((1, N), dtype=np.bool_))[0]
                row: dict[str, float] = {"pairs_used": float(chosen.kind == "pairwise")}
                for label, surrogate in (
                    ("additive", additive_surrogate(attribution, "")),
                    ("chosen", chosen),
                ):
                    path = surrogate_path(surrogate.predict, np.ones(N, dtype=np.bool_))
                    holds = truth(worth, path) >= line
                    row[f"kept_{label}"] = float(path[np.flatnonzero(holds)[-1]].sum())
                rows.append(row)
            table.append({"targets": name, "coalitions": n_coalitions, **summary(rows)})
    return table


def table(rows: list[dict[str, Any]], names: list[str], columns: dict[str, str]) -> list[str]:
    """A table in Markdown, figures with their standard errors."""
    lines = [
        "| " + " | ".join([*names, *columns.values()]) + " |",
        "|" + " --- |" * (len(names) + len(columns)),
    ]
    for row in rows:
        cells = [str(row[n]) for n in names]
        for key in columns:
            digits = 0 if row[key] >= 100 else 2 if key in ("retained", "holds", "pairs_used") else 1
            cells.append(f"{row[key]:.{digits}f} \u00b1 {row[f'{key}_se']:.{max(digits, 0)}f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(found: dict[str, Any]) -> str:
    """A page that a person reads."""
    return "\n".join(
        [
            "# Compression on simulated targets",
            "",
            ", ".join(f"{k} {v}" for k, v in found["made"].items()) + f"; {found['seconds']} s.",
            "",
            f"{found['repeats']['search']} targets a row for the search,"
            f" {found['repeats']['pairs']} for the pairs; {N} demonstrations, tau = 0.9; mean \u00b1 standard error.",
            "",
            "## The search",
            "",
            "Both go along the same path on the same answers. *Full scoring* is the rule that was replaced: an even grid,"
            " then halving, every point on every query of the selection split. Calls and tokens are distinct ones.",
            "*Retained* is the true accuracy of the choice as a share of the full prompt's, *holds* how often that is 0.9"
            " or more: the choice is a point estimate on few queries in either case, and the certificate comes after it.",
            "",
            *table(
                found["search"],
                ["targets", "queries", "search"],
                {
                    "calls": "calls",
                    "tokens": "tokens",
                    "kept": "kept",
                    "retained": "retained",
                    "holds": "holds",
                },
            ),
            "",
            "## Pairs",
            "",
            "Demonstrations in the smallest prompt of the path that truly holds 0.9 of the full prompt's accuracy, on a"
            " path by attribution and on the path of the surrogate that cross-validation chose; the same coalitions (each"
            " demonstration kept with chance 0.8) on 40 queries.",
            "",
            *table(
                found["pairs"],
                ["targets", "coalitions"],
                {
                    "pairs_used": "pairs used",
                    "kept_additive": "kept, by attribution",
                    "kept_chosen": "kept, chosen",
                },
            ),
            "",
        ]
    )


def main() -> None:
    """Run and write both files."""
    start = time.monotonic()
    repeats = {"search": 60, "pairs": 24}
    found = {
        "repeats": repeats,
        "search": [row for n in (60, 120) for row in search(repeats["search"], n)],
        "pairs": pairs(repeats["pairs"]),
    }
    found["seconds"] = round(time.monotonic() - start)
    found["made"] = {
        "command": "python benchmarks/compress/run.py",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} thread",
        **{n: metadata.version(n) for n in ("proxyprompt-core", "numpy", "scipy")},
    }
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (HERE / "results.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found), f"{found['seconds']} s")


if __name__ == "__main__":
    main()
