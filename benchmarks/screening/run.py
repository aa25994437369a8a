"""Screening and verification on recorded outputs of real models: python benchmarks/screening/run.py REPLAY_FOLDER

Arrays only; no model is called. Writes results/screening.json and results/screening.md.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import scipy
from estimates import stopping, variance, verification
from replayed import (
    BENCHES,
    HARDEST,
    effects,
    label_fidelities,
    laws,
    other_laws,
    pairs,
    predicted,
    rank_correlations,
    tilted,
    top2_shares,
)
from rules import best_possible, betting, earlier_bets, fixed_t, paired_t, study_bets
from scipy.stats import pearsonr, spearmanr

from proxyprompt import __version__
from proxyprompt.backends.replay import load_leave_one_out
from proxyprompt.sequential import betting_rule, paired_t_rule

HERE = Path(__file__).parent
RUNS = 1000
NULL_RUNS = 3000
MEANS = (0.02, 0.04, 0.06, 0.08)
LENGTHS = (50, 100, 200)
RULES = {
    "betting, aimed at N (default), delta .05": (betting, 0.05, 0.05),
    "betting, aimed at N, delta .01": (betting, 0.01, 0.01),
    "betting, our earlier bets, delta .05": (earlier_bets, 0.05, 0.05),
    "betting, the study's bets, delta .05": (study_bets, 0.05, 0.05),
    "paper: t after every pair, 99 %": (paired_t, 0.01, 0.005),
    "paper's rule from n = 30 on, 99 %": (lambda d, tau, delta: paired_t(d, tau, delta, 30), 0.01, 0.005),
    "one t test after N, .05 (not valid at a look)": (fixed_t, 0.05, 0.05),
}


def simulate(by_bench, tau, lengths=LENGTHS):
    """(a) False acceptance at mean 0 and power, by rule, law and N."""
    supports, found = laws(by_bench, tau), {}
    for n in lengths:
        draws = {
            mean: {
                law: np.random.default_rng([k, n, round(100 * mean)]).choice(
                    x, p=tilted(x, mean), size=(RUNS if mean else NULL_RUNS, n)
                )
                for k, (law, x) in enumerate(supports.items())
            }
            for mean in (0.0, *MEANS)
        }
        for rule, (decide, delta, nominal) in RULES.items():
            if delta == 0.01 and decide is betting and (tau, n) != (0.9, 100):
                continue
            error = {law: float((decide(d, tau, delta)[0] > 0).mean()) for law, d in draws[0.0].items()}
            rows = {mean: {law: decide(d, tau, delta) for law, d in draws[mean].items()} for mean in MEANS}
            power = {m: {law: float((a > 0).mean()) for law, (a, _) in r.items()} for m, r in rows.items()}
            found[f"{rule} | {n}"] = {
                "rule": rule,
                "n_max": n,
                "nominal": nominal,
                "false_acceptance": error,
                "worst": max(error.values()),
                "worst_lime_like": max(v for k, v in error.items() if k.startswith("LIME")),
                "power": {
                    str(m): float(np.mean([v for k, v in p.items() if k != HARDEST]))
                    for m, p in power.items()
                },
                "power_by_law": {str(m): p for m, p in power.items()},
                "pairs_to_decision_at_06": float(np.mean([s.mean() for _, s in rows[0.06].values()])),
                "pairs_to_decision_at_0": float(
                    np.mean([decide(d, tau, delta)[1].mean() for d in draws[0.0].values()])
                ),
            }
    return found


def limits(by_bench, tau=0.9, n=100):
    """Power at .06 of this rule, of the study's, and of the best bets for a law that is known; and on the other laws."""
    found = {}
    for name, supports in (("laws", laws(by_bench, tau)), ("other laws", other_laws(by_bench, tau))):
        found[name] = {}
        for k, (law, x) in enumerate(supports.items()):
            weights = tilted(x, 0.06)
            d = np.random.default_rng([99, k]).choice(x, p=weights, size=(RUNS, n))
            found[name][law] = {
                "ours": float((betting(d, tau, 0.05)[0] > 0).mean()),
                "earlier": float((earlier_bets(d, tau, 0.05)[0] > 0).mean()),
                "study": float((study_bets(d, tau, 0.05)[0] > 0).mean()),
                "limit": best_possible(x, weights, tau, 0.05, n),
                "sd": float(np.sqrt(weights @ (x - 0.06) ** 2)),
                "skewness": float(weights @ (x - 0.06) ** 3 / (weights @ (x - 0.06) ** 2) ** 1.5),
            }
    return found


def check(by_bench):
    """The vectorised rules against the library's own, run by run."""
    rng, wrong = np.random.default_rng(0), 0
    for support in laws(by_bench, 0.9).values():
        d = rng.choice(support, p=tilted(support, 0.03), size=(15, 100))
        for vectorised, own, delta in (
            (betting, lambda row: betting_rule(row, tau=0.9, delta=0.05, max_pairs=100), 0.05),
            (paired_t, lambda row: paired_t_rule(row, delta=0.01, max_pairs=100), 0.01),
        ):
            looks = vectorised(d, 0.9, delta)[0]
            wrong += sum(
                int(look) != (r.n_used if r.accepted else 0)
                for look, r in zip(looks, map(own, d), strict=True)
            )
    return wrong


def tables(by_bench):
    """(b) Precision, recall and F1 of the screen over pairs of models, as in Table 3 of [PE].

    The truth of a pair is whether its mean difference over all agreeing prompts is above 0; each run draws N of
    them with replacement.
    """
    measures = {"labels": label_fidelities, "top-2 mass": top2_shares, "rank agreement": rank_correlations}
    found = {}
    for name, measure in measures.items():
        for tau in (0.8, 0.9) if name != "rank agreement" else (0.8,):
            counts = {rule: np.zeros(4) for rule in ("betting", "paper")}
            wrong = {rule: [] for rule in counts}
            n_true = n_pairs = 0
            for bench in BENCHES:
                for k, (target, proxy) in enumerate(pairs()):
                    q = measure(by_bench[bench], target, proxy)
                    q = np.clip(q[~np.isnan(q)], 0.0, 1.0)
                    if len(q) < 40:
                        continue
                    d = q - tau
                    good = d.mean() > 0
                    n_true, n_pairs = n_true + good, n_pairs + 1
                    drawn = np.random.default_rng([k, len(d)]).choice(d, size=(400, 100))
                    for rule, decide, delta, n in (
                        ("betting", betting, 0.05, 100),
                        ("paper", paired_t, 0.01, 50),
                    ):
                        share = (decide(drawn[:, :n], tau, delta)[0] > 0).mean()
                        counts[rule] += [
                            good * share,
                            (not good) * share,
                            good * (1 - share),
                            (not good) * (1 - share),
                        ]
                        if not good:
                            wrong[rule].append(share)
            for rule, (tp, fp, fn, _) in counts.items():
                found[f"{name}, tau {tau}, {rule}"] = {
                    "pairs": int(n_pairs),
                    "good": int(n_true),
                    "precision": float(tp / (tp + fp)) if tp + fp > 0 else None,
                    "recall": float(tp / (tp + fn)) if tp + fn > 0 else None,
                    "f1": float(2 * tp / (2 * tp + fp + fn)) if tp > 0 else None,
                    "false_acceptance_of_bad_pairs": float(np.mean(wrong[rule])) if wrong[rule] else None,
                    "worst_bad_pair": float(np.max(wrong[rule])) if wrong[rule] else None,
                }
    return found


def against_expected(by_bench, path):
    """Largest difference from the reference numbers that came with the recordings."""
    largest = defaultdict(float)
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            cases, target, proxy = by_bench[row["bench"]], row["target"], row["proxy"]
            mine = {
                "n_prompts": len(cases),
                "pred_agree": np.mean([predicted(c, target) == predicted(c, proxy) for c in cases]),
            }
            both = [(effects(c, proxy), effects(c, target)) for c in cases]
            x, y = np.concatenate([p for p, _ in both]), np.concatenate([t for _, t in both])
            seen = ~(np.isnan(x) | np.isnan(y))
            mine["n_pairs_user"] = int(seen.sum())
            mine["pooled_spearman_user"] = spearmanr(x[seen], y[seen]).statistic
            mine["pooled_pearson_user"] = pearsonr(x[seen], y[seen]).statistic
            whole = [
                (p, t) for p, t in both if not np.isnan(p).any() and not np.isnan(t).any() and len(p) > 1
            ]
            mine["n_complete"] = len(whole)
            if whole and row["top1_abs_user"]:
                mine["top1_abs_user"] = np.mean([np.abs(p).argmax() == np.abs(t).argmax() for p, t in whole])
                within = [
                    spearmanr(p, t).statistic for p, t in whole if len(p) > 1 and np.ptp(p) and np.ptp(t)
                ]
                mine["within_spearman_user"] = np.mean(within)
            for key, value in mine.items():
                if row[key]:
                    largest[key] = max(largest[key], abs(float(value) - float(row[key])))
    return dict(largest)


def _kept(parts, by_bench, tau, n):
    """One simulation; kept in the folder ``parts``, if one is named, so that a stopped run goes on."""
    path = parts and parts / f"simulation-{tau}-{n}.json"
    if path and path.exists():
        return json.loads(path.read_text())
    found = simulate(by_bench, tau, (n,))
    if path:
        parts.mkdir(exist_ok=True)
        path.write_text(json.dumps(found))
        if os.environ.get("ONE_PART"):
            sys.exit(f"kept {path}")
    return found


def main():
    folder = Path(sys.argv[1])
    parts = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    started = time.perf_counter()
    cases = load_leave_one_out(folder / "scores.jsonl.gz")
    by_bench = {bench: [c for c in cases if c.bench == bench] for bench in BENCHES}
    result = {
        "command": "python benchmarks/screening/run.py REPLAY_FOLDER",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "proxyprompt-core": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, one thread used",
        "runs": RUNS,
        "null_runs": NULL_RUNS,
        "reference_differences": against_expected(by_bench, folder / "expected.csv"),
        "rule_mismatches": check(by_bench),
        "simulation": {
            str(tau): {k: v for n in lengths for k, v in _kept(parts, by_bench, tau, n).items()}
            for tau, lengths in ((0.9, LENGTHS), (0.8, (100,)))
        },
        "limits": limits(by_bench),
        "table3": tables(by_bench),
        "verification": verification(by_bench),
        "stopping": stopping(by_bench),
        "variance": variance(by_bench),
    }
    result["seconds"] = round(time.perf_counter() - started)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "screening.json").write_text(json.dumps(result, indent=1) + "\n")
    from text import markdown

    (HERE / "results" / "screening.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
