"""results/screening.md from what was measured."""

from __future__ import annotations

import numpy as np


def _table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _f(value, digits=3):
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _power(entry):
    return " / ".join(f"{entry['power'][m]:.2f}" for m in ("0.02", "0.04", "0.06", "0.08"))


def markdown(r):
    parts = ["# Screening on recorded models, measured"]
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    parts.append(f"`{r['command']}`, {r['date']}, {r['hardware']}; {versions}; {r['seconds']} s.")
    worst = max(r["reference_differences"].values())
    parts.append(
        f"Reference numbers that came with the recordings: largest difference {worst:.1e} (they are rounded to six"
        f" digits). Vectorised rules against the library's, run by run: {r['rule_mismatches']} mismatches."
    )
    for tau, found in r["simulation"].items():
        rows = [
            [
                e["rule"],
                e["n_max"],
                e["nominal"],
                f"{_f(e['worst_lime_like'])} / {_f(e['worst'])}",
                _power(e),
                _f(min(e["power_by_law"]["0.06"].values()), 2),
                _f(e["pairs_to_decision_at_06"], 0),
            ]
            for e in found.values()
        ]
        parts.append(
            f"## (a) Error and power of every rule, tau = {tau}\n\nFalse acceptance when the mean of d is 0, at any look up"
            f" to N: worst of the two LIME-like laws / worst of all eight ({r['null_runs']:,} runs a law, standard error"
            f" at most {np.sqrt(0.05 * 0.95 / r['null_runs']):.3f}). Power: mean over the seven laws on the study's"
            " scales, at means .02 / .04 / .06 / .08; then the worst of all eight."
        )
        header = [
            "rule",
            "N",
            "nominal",
            "false acceptance",
            "power",
            "worst law at .06",
            "pairs to decision, .06",
        ]
        parts.append(_table(header, rows))
    for name, of_law in r["limits"].items():
        rows = [
            [
                law,
                *(_f(e[k], 2) for k in ("sd", "skewness")),
                *(_f(e[k]) for k in ("ours", "earlier", "study", "limit")),
            ]
            for law, e in of_law.items()
        ]
        rows.append(
            [
                "mean",
                "",
                "",
                *(
                    _f(np.mean([e[k] for e in of_law.values()]))
                    for k in ("ours", "earlier", "study", "limit")
                ),
            ]
        )
        if name == "laws":
            seven = list(of_law.values())[:-1]
            rows.append(
                ["mean of the first seven", "", ""]
                + [_f(np.mean([e[k] for e in seven])) for k in ("ours", "earlier", "study", "limit")]
            )
            title = "Power at .06, law by law (tau .9, N = 100, delta .05)"
            what = (
                "The limit is the best that bets can do for a law that is known in advance (dynamic programming); every"
                " valid test of a bounded mean, whose mean may drift with the past, is such a bet."
            )
        else:
            title = "The same on the nine laws on which the constants of our bets were chosen"
            what = "They share no pair of models and measure with the laws above."
        header = ["law", "sd", "skewness", "default bets", "our earlier bets", "the study's bets", "limit"]
        parts.append(f"### {title}\n\n{what}\n\n" + _table(header, rows))
    rows = [
        [
            name,
            f"{e['good']} of {e['pairs']}",
            *(
                _f(e[k])
                for k in ("precision", "recall", "f1", "false_acceptance_of_bad_pairs", "worst_bad_pair")
            ),
        ]
        for name, e in r["table3"].items()
    ]
    parts.append(
        "## (b) Precision, recall and F1 over pairs of models (Table 3 of [PE])\n\nA pair is good when its mean d over all"
        " agreeing prompts is above 0. 400 screens a pair, up to 100 pairs of prompts for betting, 50 for the paper's rule."
        " The paper reports precision 94 to 100 %, recall 76 to 97 %, F1 84 to 98 %."
    )
    header = [
        "what, rule",
        "good pairs",
        "precision",
        "recall",
        "F1",
        "bad pair accepted, mean",
        "worst bad pair",
    ]
    parts.append(_table(header, rows))
    parts.append(
        "## (c) The proxy proposes, the target verifies (BoolQ, log-odds)\n\nTop-1 found at a share of the oracle's calls;"
        " means over 14 pairs of models, and over the three targets for the ensemble of cheap proxies."
    )
    for name, e in r["verification"].items():
        rows = [
            [p, f"{v[0]:.3f} @ {v[1]:.2f}", "{:.3f} @ {:.2f}".format(*e["ensemble of cheap proxies"][p])]
            for p, v in e["one proxy"].items()
        ]
        learnt = e["one proxy, learnt probe"]
        rows.append(
            [
                "agree: learnt probe, then top-2, else all",
                f"{learnt['top1']:.3f} @ {learnt['cost']:.2f}",
                "",
            ]
        )
        parts.append(f"### {name}\n\n" + _table(["policy", "one proxy", "ensemble"], rows))
        parts.append(
            f"The probe's threshold was learnt on {e['learnt on']} (wanted precision .90): it settles"
            f" {learnt['settled']:.0%} of the prompts after one measurement, {_f(learnt['precision'])} of them rightly; for"
            f" {learnt['no_threshold']} of 14 pairs no threshold could be shown to be precise."
        )
    parts.append(
        "### Until the next estimate is not worth a call (`calibrate_stopping`)\n\nUnits are measured one by one in the"
        " proxy's order until the largest measured effect is large beside the next estimate. How large was learnt, at the"
        " library's defaults (precision .9, level .1), on prompts that are not among those reported. Means over 14 pairs"
        " (one proxy) or 3 targets (ensemble) with 95 % intervals that draw prompts. To beat: .93 at .36 (the study)."
    )
    rows = [
        [
            key,
            *(
                "{:.3f} ({:.3f} to {:.3f}) @ {:.2f} ({:.2f} to {:.2f})".format(
                    *e[key]["top1"], *e[key]["cost"]
                )
                for e in r["stopping"].values()
            ),
        ]
        for key in next(iter(r["stopping"].values()))
    ]
    parts.append(_table(["learnt on, reported on; disagreement", *r["stopping"]], rows))
    rows = []
    for role in ("system", "context", "query"):
        multipliers = [v[1] for v in r["variance"]["task level"][role].values()]
        several = [v[1] for v in r["variance"]["several"][role].values()]
        rows.append(
            [
                role,
                f"{np.median(multipliers):.2f} ({min(multipliers):.2f} to {max(multipliers):.2f})",
                f"{np.mean(several):.2f} ({min(several):.2f} to {max(several):.2f})",
            ]
        )
    parts.append(
        "## (d) Variance reduction\n\nMultiplier 1 / (1 - rho2) of a part's mean effect on BoolQ (log-odds): median"
        " and range over pairs with one proxy; mean and range over targets with all four or five (ridge, five folds)."
    )
    parts.append(_table(["part", "one proxy", "all proxies"], rows))
    rows = [
        [target, name, _f(v[0], 2), _f(1 / (1 - v[0]), 2), _f(v[1], 2)]
        for target, e in r["variance"]["within prompts"].items()
        for name, v in e["scores"].items()
    ]
    parts.append("Within prompts (content segments), single cheap proxies and their ensembles:")
    parts.append(_table(["target", "attributions of", "rho2", "multiplier", "top-1"], rows))
    rows = [
        [
            pair,
            *(_f(r["variance"]["task level"][role][pair][0], 2) for role in ("system", "context", "query")),
        ]
        for pair in r["variance"]["task level"]["context"]
    ]
    parts.append("rho2 of every pair, by part:")
    parts.append(_table(["pair", "system", "context", "query"], rows))
    return "\n\n".join(parts) + "\n"
