"""How often a false certificate is given, on recorded answers of closed and open models.

    python benchmarks/certificate/run.py REPLAY_FOLDER

``REPLAY_FOLDER/scores.jsonl.gz``: label log-probabilities of recorded models on whole prompts and with one segment left
out. Whole and shortened prompt are right or wrong on every case; ``tau`` is the *true* ratio of the two accuracies, so
that the shortened prompt is exactly on the boundary of what may not be certified. Sealed splits are drawn from the cases
with replacement, and the certificate's exact test is asked each time: the share of certificates must not pass its level.
Just below the boundary (tau a little lower) the same draws show its power. Writes ``results.json`` and ``results.md``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import time
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from proxyprompt._trinomial import critical_score, score

HERE = Path(__file__).parent
LEVEL, DRAWS, SIZES = 0.05, 300, (60, 120)
EASIER = 0.9
CELLS = ((1, 1), (1, 0), (0, 1), (0, 0))
GOLD = {"1.0": "option 1", "2.0": "option 2"}


def read(folder: Path, bench: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """Right (1) or wrong (0): for each model, columns whole, first user segment left out, last one left out."""
    with gzip.open(folder / "scores.jsonl.gz", "rt", encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    cases = [c for c in cases if c["bench"] == bench]
    columns: dict[str, list[list[float]]] = {}
    for case in cases:
        gold = case["labels"].index(GOLD.get(str(case["gold"]), str(case["gold"]).lower()))
        for name, one in case["models"].items():
            if len(one["loo"]) < case["n_seg"]:
                continue  # only the instruction was left out of this model's prompts
            rows = [one["orig"], one["loo"][case["n_sys"]], one["loo"][case["n_seg"] - 1]]
            columns.setdefault(name, []).append([float(answer(r) == gold) for r in rows])
    full = max(map(len, columns.values()))
    return sorted(n for n in columns if len(columns[n]) == full), {
        n: np.array(rows) for n, rows in columns.items()
    }


def answer(logprobs: list[float | None]) -> int:
    """The likeliest label; one that was not listed is not it."""
    return int(np.argmax([-np.inf if x is None else x for x in logprobs]))


@cache
def critical(used: int, tau: float) -> float:
    """Score from which on the p-value is at most the level: quicker than a p-value for every outcome."""
    return critical_score(used, 1 - tau, tau, LEVEL) if used else float("inf")


def certified(wins: int, losses: int, used: int, tau: float) -> bool:
    """What the certificate decides on these counts; see ``non_inferiority``."""
    edge = critical(used, tau)
    reached = score(np.array([wins]), np.array([losses]), used, 1 - tau, tau)[0] if used else 0.0
    return bool(reached >= edge - 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    begun = time.monotonic()
    folder = parser.parse_args().folder
    rows: list[dict[str, Any]] = []
    for bench in ("boolq", "winogrande"):
        names, right = read(folder, bench)
        for name in names:
            for part, place in (("first", 1), ("last", 2)):
                whole, short = right[name][:, 0], right[name][:, place]
                ratio = float(short.mean() / whole.mean())
                if not 0.4 < ratio < 1:
                    continue
                rng = np.random.default_rng(0)
                row = {"bench": bench, "model": name, "left_out": part, "cases": len(whole), "ratio": ratio}
                # Both right, whole alone, short alone, none: the law that tests/statistical draws from.
                row["counts"] = [int(((whole == a) & (short == b)).sum()) for a, b in CELLS]
                for n in SIZES:
                    false = true = 0
                    for _ in range(DRAWS):
                        drawn = rng.integers(len(whole), size=n)
                        a, b = whole[drawn], short[drawn]
                        counts = int((b > a).sum()), int((b < a).sum()), int(((a > 0) | (b > 0)).sum())
                        false += certified(*counts, round(ratio, 12))
                        true += certified(*counts, round(EASIER * ratio, 12))
                    row[str(n)] = {"false": false / DRAWS, "power": true / DRAWS}
                rows.append(row)
                print(row, flush=True)
    write(rows, round(time.monotonic() - begun))


def write(rows: list[dict[str, Any]], seconds: int) -> None:
    made = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/certificate/run.py REPLAY_FOLDER",
        "seconds": seconds,
        "processor": platform.processor() or platform.machine(),
        **{p: metadata.version(p) for p in ("proxyprompt-core", "numpy", "scipy")},
    }
    (HERE / "results.json").write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n", "utf-8")
    lines = [
        "# False certificates on recorded models",
        "",
        ", ".join(f"{k} {v}" for k, v in made.items()) + ".",
        "",
        f"Level {LEVEL}, {DRAWS} sealed splits a row, drawn with replacement. *False*: share of certificates when tau is"
        f" the true ratio (must not pass {LEVEL} by more than chance: s.e. {np.sqrt(LEVEL * (1 - LEVEL) / DRAWS):.3f})."
        f" *Power*: with tau at {EASIER:.0%} of the true ratio.",
        "",
        "| bench | model | left out | true ratio |"
        + "".join(f" {n} queries: false | power |" for n in SIZES),
        "|---|---|---|---|" + "---|---|" * len(SIZES),
    ]
    for r in rows:
        cells = [r["bench"], r["model"], f"{r['left_out']} segment", f"{r['ratio']:.3f}"]
        for n in SIZES:
            cells += [f"{r[str(n)]['false']:.3f}", f"{r[str(n)]['power']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    means = [f"{np.mean([r[str(n)]['false'] for r in rows]):.3f}" for n in SIZES]
    worst = [f"{max(r[str(n)]['false'] for r in rows):.3f}" for n in SIZES]
    lines += [
        "",
        f"False certificates over all rows, for {SIZES[0]} and {SIZES[1]} queries: mean {means[0]} and {means[1]},"
        f" largest {worst[0]} and {worst[1]}.",
    ]
    (HERE / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
