"""Mean squared error of the Shapley values against the budget, beside shap, shapiq and captum.

    python benchmarks/attribution/variance.py [--games NAME ...] [--repetitions 20] [--ours]

Every estimator gets the same number of model evaluations, counted in the game itself: a row that an estimator asks
for twice costs it twice. Peers explain one query at a time; ours all queries of a game together, as in a
run (only the real matrices have more than one). A result is stored per game, so games can be measured one by one.
Writes ``results/variance.json``, ``variance.md`` and, where matplotlib is installed, ``variance.svg``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from games import families
from scipy.special import stdtrit

from peers import CountedGame, TooSmall, missing_packages, peers
from proxyprompt.attribution import KernelSHAP, PermutationShapley
from proxyprompt.attribution.surrogate_shap import SurrogateSHAP
from proxyprompt.errors import InputError

RESULTS = Path(__file__).parent / "results"
OURS = {
    "SurrogateSHAP": SurrogateSHAP(),
    "KernelSHAP": KernelSHAP(),
    "PermutationShapley": PermutationShapley(),
}
BUDGETS = {10: (26, 40, 64, 128, 256), 24: (54, 96, 192)}
MORE = {"unanimity mix": (512,), "sparse": (512,)}  # 512 is the least that SPEX runs with
SLOW = {"shapiq SPEX": 1, "shapiq ProxySPEX": 2}  # repetitions: seconds to half a minute each
SLOW_GAMES = ("sparse", "gemma-3-270m, prompt 0")
EXACT = 1e-12  # of the mean square of the Shapley values: rounding


def budgets(name: str, n_units: int) -> tuple[int, ...]:
    """Budgets at which a game is measured."""
    return BUDGETS[n_units] + MORE.get(name, ())


def measure(name: str, repetitions: int, *, only_ours: bool = False) -> dict[str, Any]:
    """Squared errors, (estimator, budget) -> one mean over units and queries per repetition."""
    n, family = families()[name]
    everyone = {w: e for w, e in {**OURS, **peers()}.items() if w not in SLOW or name in SLOW_GAMES}
    if only_ours:
        everyone = dict(OURS)
    games = [family(r) for r in range(repetitions)]
    scale = float(np.mean([np.mean(g.shapley_values**2) for g in games]))
    cells: dict[str, dict[str, Any]] = {}
    for budget in budgets(name, n):
        for who, estimator in everyone.items():
            errors, spent, covered = [], 0, []
            begun = time.perf_counter()
            for r, game in enumerate(games[: SLOW.get(who, repetitions)]):
                truth = game.shapley_values
                try:
                    if who in OURS:
                        rng = np.random.default_rng([5, r])
                        answer = OURS[who].attribute(game, n, budget=budget, rng=rng)
                        values, rows = answer.values, answer.n_coalitions
                        gap = np.abs(answer.mean - truth.mean(axis=0))
                        covered.append(
                            np.mean(
                                gap
                                <= stdtrit(min(answer.df_coalitions, 1e9), 0.975) * answer.se_coalitions
                                + 1e-6 * np.sqrt(scale)
                            )
                        )
                    else:
                        counted = [CountedGame(game, q) for q in range(len(truth))]
                        values = np.array([estimator(g, n, budget, 1000 + r) for g in counted])
                        rows = max(g.evaluations for g in counted)
                except (TooSmall, InputError):
                    break
                if rows > budget:
                    raise SystemExit(f"{who} used {rows} evaluations of {budget}")
                spent = max(spent, rows)
                errors.append(float(np.mean((values - truth) ** 2)))
            if errors:
                cells.setdefault(who, {})[str(budget)] = {
                    "errors": errors,
                    "evaluations": spent,
                    "seconds": round((time.perf_counter() - begun) / len(errors), 4),
                } | ({"coverage": round(float(np.mean(covered)), 3)} if covered else {})
    return {"n_units": n, "mean_square": scale, "cells": cells}


def compare(game: dict[str, Any], budget: str, ours: str = "SurrogateSHAP") -> dict[str, Any] | None:
    """Ours and the best peer at one budget, with a 95 % bootstrap interval of the ratio over repetitions."""
    cells, floor = game["cells"], EXACT * game["mean_square"]
    errors = {
        who: np.maximum(by_budget[budget]["errors"], floor)
        for who, by_budget in cells.items()
        if budget in by_budget
    }
    rivals = {who: e for who, e in errors.items() if who not in OURS}
    if ours not in errors or not rivals:
        return None
    best = min(rivals, key=lambda who: float(rivals[who].mean()))
    mine, theirs = errors[ours], rivals[best]
    rng = np.random.default_rng(0)
    draws = [rng.choice(mine, len(mine)).mean() / rng.choice(theirs, len(theirs)).mean() for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "ours": float(mine.mean()),
        "kernel_shap": float(errors["KernelSHAP"].mean()) if "KernelSHAP" in errors else None,
        "peer": best,
        "peer_error": float(theirs.mean()),
        "ratio": float(mine.mean() / theirs.mean()),
        "interval": [float(low), float(high)],
        "coverage": cells[ours][budget].get("coverage"),
        "exact": bool(mine.mean() <= 1.01 * floor),
        "peer_exact": bool(theirs.mean() <= 1.01 * floor),
    }


def markdown(body: dict[str, Any]) -> str:
    """A page that a person reads."""
    rows = [
        (name, b, compare(game, b))
        for name, game in body["games"].items()
        for b in map(str, budgets(name, game["n_units"]))
    ]
    rows = [row for row in rows if row[2] is not None]
    lost = [row for row in rows if row[2]["interval"][0] > 1]
    behind = [row for row in rows if row[2]["ratio"] > 1 and row not in lost]
    lines = [
        "# Error of Shapley values at equal budgets",
        "",
        f"`{body['command']}`, {body['date']}; " + ", ".join(f"{k} {v}" for k, v in body["versions"].items()) + ".",
        f"Not installed: {', '.join(body['missing']) or 'nothing'}. {body['repetitions']} repetitions"
        f" (SPEX 1, ProxySPEX 2, which take seconds to half a minute each, on {', '.join(SLOW_GAMES)}).",
        "",
        f"SurrogateSHAP against the best of {body['n_peers']} peer estimators, chosen anew in every cell with hindsight:"
        f" ratio below 1 in {sum(r['ratio'] < 1 for *_, r in rows)} of {len(rows)} cells, both exact in"
        f" {sum(r['exact'] and r['peer_exact'] for *_, r in rows)}, above 1 within the interval in"
        f" {len([row for row in behind if not row[2]['exact']])}, clearly above 1 in {len(lost)}.",
        "",
        "MSE: mean over units, queries and repetitions. Ratio: ours / best peer, with a 95 % bootstrap interval over"
        ' repetitions. "exact": below 1e-12 of the mean square of the Shapley values, counted as equal. Coverage: how'
        " often the two-sided 95 % interval of `se_coalitions`, Student's t with `df_coalitions`, holds the truth.",
        "",
        "| game | budget | SurrogateSHAP | KernelSHAP (ours) | best peer | its MSE | ratio | coverage |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, budget, r in rows:
        ratio = (
            "both exact"
            if r["exact"] and r["peer_exact"]
            else f"{r['ratio']:.2g} ({r['interval'][0]:.2g} to {r['interval'][1]:.2g})"
        )
        mine = "exact" if r["exact"] else f"{r['ours']:.2g}"
        theirs = "exact" if r["peer_exact"] else f"{r['peer_error']:.2g}"
        kernel = "" if r["kernel_shap"] is None else f"{r['kernel_shap']:.2g}"
        lines.append(
            f"| {name} | {budget} | {mine} | {kernel} | {r['peer']} | {theirs} | {ratio} | {r['coverage']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(body: dict[str, Any]) -> None:
    """Curves of every game: ours, and the best two peers at each budget's end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    games = body["games"]
    columns = 4
    figure, axes = plt.subplots(
        -(-len(games) // columns), columns, figsize=(15, 3.1 * -(-len(games) // columns))
    )
    for axis in axes.flat[len(games) :]:
        axis.set_visible(False)
    for axis, (name, game) in zip(axes.flat, games.items(), strict=False):
        floor = EXACT * game["mean_square"]
        for who, cells in game["cells"].items():
            x = [int(b) for b in cells]
            y = [max(float(np.mean(c["errors"])), floor) for c in cells.values()]
            style = {"SurrogateSHAP": ("C3", 2.2, 3), "KernelSHAP": ("C0", 1.6, 2)}.get(who, ("0.75", 0.8, 1))
            axis.plot(x, y, color=style[0], linewidth=style[1], zorder=style[2])
        axis.set_title(name, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.tick_params(labelsize=7)
    figure.suptitle(
        "MSE of Shapley values against evaluations: SurrogateSHAP red, KernelSHAP (ours) blue, others grey"
    )
    figure.tight_layout()
    figure.savefig(RESULTS / "variance.svg", metadata={"Date": None})


def main() -> None:
    """Measure the games asked for, keep the others, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", nargs="*", default=None)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument(
        "--render", action="store_true", help="measure nothing; write the page and the plot again"
    )
    parser.add_argument(
        "--ours", action="store_true", help="measure ours again; keep the peers' stored errors"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # peers warn about each other's versions
    target = RESULTS / "variance.json"
    RESULTS.mkdir(exist_ok=True)
    body: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {"games": {}}
    for name in [] if options.render else (options.games or list(families())):
        begun = time.perf_counter()
        found = measure(name, options.repetitions, only_ours=options.ours)
        if options.ours:
            found["cells"] = {**body["games"][name]["cells"], **found["cells"]}
        body["games"][name] = found
        body["games"] = {k: body["games"][k] for k in families() if k in body["games"]}
        installed = [p for p in ("shap", "shapiq", "captum", "lightgbm") if p not in missing_packages()]
        body |= {
            "command": "python benchmarks/attribution/variance.py",
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {p: metadata.version(p) for p in ("proxyprompt-core", "numpy", "scipy", *installed)},
            "missing": missing_packages(),
            "repetitions": options.repetitions,
            "n_peers": len(peers()),
        }
        target.write_text(json.dumps(body) + "\n", encoding="utf-8")
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    page = markdown(body)
    (RESULTS / "variance.md").write_text(page, encoding="utf-8")
    print(page)
    try:
        plot(body)
    except ImportError:
        print("matplotlib is not installed: no plot")


if __name__ == "__main__":
    main()
