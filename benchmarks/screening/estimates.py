"""Where single units decide, and where target values are estimated: verification, ensembles, variance reduction."""

from __future__ import annotations

import numpy as np
from replayed import CHEAP, PROXIES, SHORT, TARGETS, effects, log_odds, pairs, predicted

from proxyprompt.attribution.verified import calibrate_probe, calibrate_stopping, verify

_POLICIES = {
    "verify top-2 always": lambda guess, same: (True, 2),
    "verify top-3 always": lambda guess, same: (True, 3),
    "agree: verify top-2, else all": lambda guess, same: (same, 2),
    "agree: verify top-3, else all": lambda guess, same: (same, 3),
    **{
        f"verify all above 1/{share} of the strongest, at least 4 if they disagree": lambda guess, same, s=share: (
            True,
            max(_close(guess, s), 1 if same else 4),
        )
        for share in (2, 3, 4)
    },
}
"""Whether the proxy's order is followed, and how many units of it are measured."""


def _close(guess, share):
    """Units whose estimate is at least this part of the largest."""
    return int((np.abs(guess) * share >= np.abs(guess).max()).sum())


def _complete(cases, target, proxies):
    """(proxies' effects, target's, agree with the first) of the prompts that are complete for all of them."""
    found = []
    for case in cases:
        theirs = effects(case, target)
        mine = [effects(case, p) for p in proxies]
        if len(theirs) > 1 and np.isfinite(theirs).all() and all(np.isfinite(m).all() for m in mine):
            same = np.mean([predicted(case, p) == predicted(case, target) for p in proxies]) > 0.5
            found.append((mine, theirs, bool(same)))
    return found


def _usable(case, target, proxies):
    theirs = effects(case, target)
    return len(theirs) > 1 and all(
        np.isfinite(v).all() for v in (theirs, *(effects(case, p) for p in proxies))
    )


def _mean(mine, sizes):
    """Ensemble: effects divided by each model's root mean square over all prompts, averaged."""
    return np.mean([m / size for m, size in zip(mine, sizes, strict=True)], axis=0)


def _sizes(rows):
    return [
        np.sqrt(np.mean(np.concatenate(of_model) ** 2))
        for of_model in zip(*(m for m, *_ in rows), strict=True)
    ]


def _tally(rows):
    """Top-1 found and share of the oracle's calls, by policy."""
    found = {name: [] for name in ("proxy alone", "paper: agree, proxy, else all", *_POLICIES)}
    for guess, theirs, same in rows:
        best, size = int(np.abs(theirs).argmax()), len(theirs)
        alone = int(np.abs(guess).argmax()) == best
        found["proxy alone"].append((alone, 0.0))
        found["paper: agree, proxy, else all"].append(
            (alone if same else True, 1 / (1 + size) if same else 1.0)
        )
        for name, policy in _POLICIES.items():
            agree, top = policy(guess, same)
            seen = verify(guess, lambda units, t=theirs: t[list(units)], agree=agree, top=top)
            found[name].append((seen.best == best, seen.oracle_share))
    return {
        name: [float(np.mean([hit for hit, _ in v])), float(np.mean([cost for _, cost in v]))]
        for name, v in found.items()
    }


def _probed(teach, use):
    """Prompts that were measured in full teach the threshold; others are decided with it."""
    agreeing = [(int(np.abs(guess).argmax()), theirs) for guess, theirs, same in teach if same]
    probe = calibrate_probe(
        [abs(t[f]) for f, t in agreeing],
        [int(np.abs(t).argmax()) == f for f, t in agreeing],
        precision=0.9,
        level=0.1,
    )
    hits, costs, accepted = [], [], []
    for guess, theirs, same in use:
        seen = verify(guess, lambda units, t=theirs: t[list(units)], agree=same, top=2, probe=probe)
        hits.append(seen.best == int(np.abs(theirs).argmax()))
        costs.append(seen.oracle_share)
        if seen.outcome == "probe_accepted":
            accepted.append(hits[-1])
    return {
        "top1": float(np.mean(hits)),
        "cost": float(np.mean(costs)),
        "precision": float(np.mean(accepted)) if accepted else None,
        "settled": len(accepted) / len(use),
        "no_threshold": int(np.isinf(probe.threshold)),
    }


def _stopped(teach, use, follow):
    """Top-1 found and share of the oracle's calls of each prompt, by a stopping rule that other prompts taught.

    Precision .9 at level .1 are the library's defaults. ``follow``: models that disagree are treated alike; else
    everything is measured there, and agreeing prompts teach.
    """
    taught = [(guess, theirs) for guess, theirs, same in teach if same or follow]
    rule = calibrate_stopping(*zip(*taught, strict=True))
    return [
        (seen.best == int(np.abs(theirs).argmax()), seen.oracle_share)
        for guess, theirs, same in use
        for seen in [verify(guess, lambda units, t=theirs: t[list(units)], agree=same or follow, stop=rule)]
    ]


def _intervals(by_pair, names):
    """Means over pairs of models, with 95 % intervals that draw prompts (shared by the pairs) with replacement."""
    rng = np.random.default_rng(11)
    prompts = sorted({name for of_pair in names for name in of_pair})
    draws = []
    for _ in range(1000):
        times = dict(
            zip(prompts, rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts))), strict=True)
        )
        means = []
        for rows, of_pair in zip(by_pair, names, strict=True):
            weights = np.array([times[name] for name in of_pair], dtype=float)
            if weights.sum():
                means.append(weights @ np.array(rows, dtype=float) / weights.sum())
        draws.append(np.mean(means, axis=0))
    mean = np.mean([np.mean(np.array(rows, dtype=float), axis=0) for rows in by_pair], axis=0)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return {"top1": [mean[0], low[0], high[0]], "cost": [mean[1], low[1], high[1]]}


def stopping(by_bench):
    """(c) Verification until the next estimate is not worth a call; the rule is learnt on other prompts."""
    groups = {
        name: [("one proxy", [p], t) for t, p in pairs()]
        if name == "one proxy"
        else [("ensemble", [p for p in CHEAP if p != t], t) for t in TARGETS]
        for name in ("one proxy", "ensemble of cheap proxies")
    }
    found = {}
    for name, models in groups.items():
        results = {}
        for _, proxies, target in models:
            every = _complete(by_bench["boolq"], target, proxies)
            sizes = _sizes(every)
            rows = [(_mean(m, sizes), t, same) for m, t, same in every]
            case = [k for k, c in enumerate(by_bench["boolq"]) if _usable(c, target, proxies)]
            long = [k for k, (_, t, _) in enumerate(rows) if len(t) >= 8]
            short = [k for k, (_, t, _) in enumerate(rows) if len(t) < 8]
            order = np.random.default_rng([7, len(rows)]).permutation(len(rows)).tolist()
            half, rest = order[: len(order) // 2], order[len(order) // 2 :]
            tried = {
                "learnt on shorter prompts, eight segments or more": (short, long),
                "learnt on half of the prompts, all of the other half": (half, rest),
                "learnt on half of the prompts, eight segments or more of the other half": (
                    half,
                    [k for k in rest if k in set(long)],
                ),
            }
            for what, (teach, use) in tried.items():
                for follow in (True, False):
                    how = "all in the proxy's order" if follow else "all measured where they disagree"
                    key = f"{what}; {how}"
                    seen = _stopped([rows[k] for k in teach], [rows[k] for k in use], follow)
                    results.setdefault(key, ([], []))
                    results[key][0].append(seen)
                    results[key][1].append([case[k] for k in use])
        found[name] = {key: _intervals(*value) for key, value in results.items()}
    return found


def _together(probes):
    """Means over pairs of models; the precision over those that settled anything."""
    found = {key: float(np.mean([p[key] for p in probes])) for key in ("top1", "cost", "settled")}
    precise = [p["precision"] for p in probes if p["precision"] is not None]
    found["precision"] = float(np.mean(precise)) if precise else None
    found["no_threshold"] = sum(p["no_threshold"] for p in probes)
    return found


def verification(by_bench):
    """(c) Means over pairs of models, on BoolQ log-odds, of all prompts and of those of eight segments or more."""
    found = {}
    for name, least in (("all prompts", 2), ("eight segments or more", 8)):
        tallies, probes = [], []
        for k, (target, proxy) in enumerate(pairs()):
            every = [(m[0], t, s) for m, t, s in _complete(by_bench["boolq"], target, [proxy])]
            rows = [row for row in every if len(row[1]) >= least]
            tallies.append(_tally(rows))
            if least > 2:
                probes.append(_probed([row for row in every if len(row[1]) < least], rows))
            else:
                order = np.random.default_rng(k).permutation(len(every))
                half = len(every) // 2
                probes.append(_probed([every[i] for i in order[:half]], [every[i] for i in order[half:]]))
        several = []
        for target in TARGETS:
            proxies = [p for p in CHEAP if p != target]
            every = _complete(by_bench["boolq"], target, proxies)
            sizes = _sizes(every)
            rows = [(_mean(m, sizes), t, s) for m, t, s in every if len(t) >= least]
            several.append(_tally(rows))
        found[name] = {
            "one proxy": {p: np.mean([t[p] for t in tallies], axis=0).tolist() for p in tallies[0]},
            "one proxy, learnt probe": _together(probes),
            "learnt on": "the shorter prompts" if least > 2 else "the other half of the prompts",
            "ensemble of cheap proxies": {
                p: np.mean([t[p] for t in several], axis=0).tolist() for p in several[0]
            },
        }
    return found


def _pooled(cases, target, proxies, role):
    """Effects of all segments of a role: (n, n_proxies) and (n,), with the prompt each belongs to."""
    x, y, of = [], [], []
    for n, case in enumerate(cases):
        where = [k for k, r in enumerate(case.roles) if r == role]
        for k in where:
            row = [log_odds(case.scores(p)) - log_odds(case.scores(p, k)) for p in (*proxies, target)]
            if np.isfinite(row).all():
                x.append(row[:-1])
                y.append(row[-1])
                of.append(n)
    return np.array(x), np.array(y), np.array(of)


def _cross_validated(x, y, of, ridge=1.0):
    """Share of the variance that a ridge on the proxies explains of prompts it was not fitted on."""
    fold, predicted_y = of % 5, np.zeros(len(y))
    for k in range(5):
        fit = fold != k
        center, scale = x[fit].mean(axis=0), x[fit].std(axis=0)
        z = (x - center) / scale
        gram = z[fit].T @ z[fit] + ridge * np.eye(x.shape[1])
        beta = np.linalg.solve(gram, z[fit].T @ (y[fit] - y[fit].mean()))
        predicted_y[~fit] = y[fit].mean() + z[~fit] @ beta
    return float(1 - ((y - predicted_y) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def _within(rows):
    """Squared correlation within prompts, pooled: both centred on their prompt, prompts of three segments or more."""
    rows = [(g - g.mean(), t - t.mean()) for g, t in rows if len(t) >= 3]
    a, b = np.concatenate([g for g, _ in rows]), np.concatenate([t for _, t in rows])
    return float((a @ b) ** 2 / ((a @ a) * (b @ b)))


def variance(by_bench):
    """(d) What proxies explain of the target's attributions: over a dataset by role, and within prompts."""
    cases = by_bench["boolq"]
    found = {"task level": {}, "several": {}, "within prompts": {}}
    for role in ("system", "context", "query"):
        single = {}
        for target, proxy in pairs():
            x, y, _ = _pooled(cases, target, [proxy], role)
            rho2 = float(np.corrcoef(x[:, 0], y)[0, 1] ** 2)
            single[f"{SHORT[proxy]} for {SHORT[target]}"] = [rho2, 1 / (1 - rho2)]
        found["task level"][role] = single
        several = {}
        for target in TARGETS:
            x, y, of = _pooled(cases, target, [p for p in PROXIES if p != target], role)
            r2 = _cross_validated(x, y, of)
            several[SHORT[target]] = [r2, 1 / (1 - r2)]
        found["several"][role] = several
    for target in TARGETS:
        proxies = [p for p in CHEAP if p != target]
        rows = _complete(cases, target, proxies)
        right = {}
        scores = {SHORT[p]: [(m[k], t) for m, t, _ in rows] for k, p in enumerate(proxies)}
        sizes = _sizes(rows)
        scores["mean, each over its model's size (ensemble)"] = [(_mean(m, sizes), t) for m, t, _ in rows]
        scores["mean, each over its size in the prompt"] = [
            (np.mean([v / max(np.sqrt((v**2).mean()), 1e-9) for v in m], axis=0), t) for m, t, _ in rows
        ]
        scores["mean of z-scores about the prompt's mean"] = [
            (np.mean([(v - v.mean()) / max(v.std(), 1e-9) for v in m], axis=0), t) for m, t, _ in rows
        ]
        scores["plain mean"] = [(np.mean(m, axis=0), t) for m, t, _ in rows]
        for name, listed in scores.items():
            top = np.mean([np.abs(g).argmax() == np.abs(t).argmax() for g, t in listed])
            right[name] = [_within(listed), float(top)]
        found["within prompts"][SHORT[target]] = {"prompts": len(rows), "scores": right}
    return found
