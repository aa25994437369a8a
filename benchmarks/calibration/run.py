"""What a proxy's values are worth for the target's attributions of demonstrations: rho2, and the error it saves.

    python benchmarks/calibration/run.py --data FOLDER [--ledger FOLDER] [--seconds N]

Both embedded models as each other's target. Prompts of 12 demonstrations: one of the demo's own messages, the others
drawn from public sets in ``FOLDER/<set>/train.jsonl.gz`` and ``test.jsonl.gz`` (rows with ``input`` and ``label``). All
values are computed for both models; then the target is "asked" for a random part of them, many times, and the calibrated
attributions are compared with those of all values. Stops after ``--seconds`` and goes on where it was when
started again: answers are in the ledger. Writes ``results/results.json`` and ``results/results.md``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from scipy.stats import spearmanr

from proxyprompt import (
    Demonstration,
    FewShotPrompt,
    LabelTask,
    Ledger,
    PromptValueFunction,
    Query,
    WeightedBanzhaf,
    open_model,
)
from proxyprompt.attribution.calibrated import calibrate, choose_measured
from proxyprompt.demo import demo_config
from proxyprompt.metering import Meter

HERE = Path(__file__).parent
MODELS = ("gemma-3-270m", "smollm2-135m")
N_UNITS, N_COALITIONS, N_QUERIES, LONGEST = 12, 120, 6, 70
MEASURED = (36, 60)
REPEATS = 100
INSTRUCTIONS = {
    "trec": "What kind of answer does the question ask for?",
    "sst2": "Is the opinion about the film negative or positive?",
    "subj": "Is the sentence subjective or objective?",
    "cr": "Is the opinion about the product negative or positive?",
    "mpqa": "Is the phrase negative or positive?",
    "cola": "Is the sentence acceptable English?",
}


@dataclass(frozen=True)
class Case:
    """One prompt with its queries."""

    name: str
    prompt: FewShotPrompt
    task: LabelTask
    queries: list[Query]


def demo_case() -> Case:
    """The built-in example's first demonstrations and queries."""
    config = demo_config(HERE / "ledger")
    prompt = config.prompt.subset([i < N_UNITS for i in range(config.prompt.n_units)])
    return Case("demo", prompt, config.task, list(config.splits["explain"])[:N_QUERIES])


def set_case(name: str, folder: Path) -> Case:
    """Short rows of a public set, labels as evenly as they come."""

    def rows(file: str) -> list[dict[str, Any]]:
        with gzip.open(folder / name / file, "rt", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        return [r for r in found if len(str(r["input"])) <= LONGEST and "\n" not in str(r["input"])]

    rng = np.random.default_rng(11)
    train, test = rows("train.jsonl.gz"), rows("test.jsonl.gz")
    labels = sorted({str(r["label"]) for r in train})

    def balanced(source: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
        order = [source[int(i)] for i in rng.permutation(len(source))]
        by_label = {label: [r for r in order if str(r["label"]) == label] for label in labels}
        taken = [r for turn in zip(*(by_label[label][:n] for label in labels), strict=False) for r in turn]
        return taken[:n]

    demonstrations = balanced(train, N_UNITS)
    rng.shuffle(demonstrations)  # type: ignore[arg-type]
    prompt = FewShotPrompt(
        tuple(
            Demonstration(f"d{k}", {"input": str(r["input"])}, str(r["label"]))
            for k, r in enumerate(demonstrations)
        ),
        instruction=INSTRUCTIONS[name],
    )
    queries = [
        Query(f"q{k}", {"input": str(r["input"])}, str(r["label"]))
        for k, r in enumerate(balanced(test, N_QUERIES))
    ]
    return Case(name, prompt, LabelTask(tuple(labels)), queries)


def compare(target: np.ndarray, proxy: np.ndarray, design: Any, explainer: WeightedBanzhaf) -> dict[str, Any]:
    """Figures of one proxy for one target, values of shape (n_coalitions, n_queries)."""
    whole, other = explainer.fit(design, target), explainer.fit(design, proxy)
    seen = design.weights > 0
    left = (target - whole.predict(design.coalitions)).mean(axis=1)[seen]
    right = (proxy - other.predict(design.coalitions)).mean(axis=1)[seen]
    found: dict[str, Any] = {
        "rank_correlation": float(spearmanr(whole.mean, other.mean).statistic),
        "rho2_values": float(np.corrcoef(target.mean(axis=1)[seen], proxy.mean(axis=1)[seen])[0, 1] ** 2),
        "rho2_residuals": float(np.corrcoef(left, right)[0, 1] ** 2),
        "sign_of_residuals": float(np.sign(np.corrcoef(left, right)[0, 1])),
    }
    for n in MEASURED:
        rng = np.random.default_rng(5)
        alone, calibrated, rho2, lam = [], [], [], []
        for _ in range(REPEATS):
            rows = choose_measured(explainer, design, n, rng=rng)
            got = calibrate(explainer, design, proxy, rows, target[rows], rng=rng)
            alone.append(((got.oracle.mean - whole.mean) ** 2).mean())
            calibrated.append(((got.attribution.mean - whole.mean) ** 2).mean())
            rho2.append(got.rho2)
            lam.append(got.lam[0])
        ratio = np.mean(calibrated) / np.mean(alone)
        spread = np.std(np.array(calibrated) - ratio * np.array(alone), ddof=1) / np.sqrt(REPEATS)
        found[str(n)] = {
            "mse_ratio": float(ratio),
            "mse_ratio_se": float(spread / np.mean(alone)),
            "rho2": float(np.mean(rho2)),
            "multiplier": float(1 / (1 - min(np.mean(rho2), 0.999))),
            "lam": float(np.mean(lam)),
            "share_of_oracle": n / design.n_coalitions,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the public sets; without it, the demo only")
    parser.add_argument("--ledger", type=Path, default=HERE / "ledger")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    arguments = parser.parse_args()
    begun = time.monotonic()
    cases = [demo_case()]
    if arguments.data is not None:
        cases += [set_case(name, arguments.data) for name in INSTRUCTIONS]
    explainer = WeightedBanzhaf(0.8)
    rows = []
    arguments.ledger.mkdir(parents=True, exist_ok=True)
    with Ledger(arguments.ledger / "calibration.db") as ledger:
        backends = {name: open_model(f"embedded:{name}") for name in MODELS}
        for case in cases:
            design = explainer.design(N_UNITS, N_COALITIONS, rng=np.random.default_rng(1))
            values = {}
            for name in MODELS:
                if time.monotonic() - begun > arguments.seconds:
                    sys.exit(f"stopped after {arguments.seconds:.0f} s at {case.name}; start again to go on")
                meter = Meter(backends[name], ledger, role="proxy", run=f"calibration-{case.name}")
                evaluate = PromptValueFunction(case.prompt, case.task, case.queries, meter)
                values[name] = evaluate(design.coalitions)
                print(f"[{time.monotonic() - begun:5.0f} s] {case.name} {name}", flush=True)
            for target, proxy in (MODELS, MODELS[::-1]):
                rows.append(
                    {"set": case.name, "target": target, "proxy": proxy}
                    | compare(values[target], values[proxy], design, explainer)
                )
    write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """Figures only; no text of any row."""
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    made = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/calibration/run.py --data FOLDER",
        "processor": platform.processor() or platform.machine(),
        **{p: metadata.version(p) for p in ("proxyprompt-core", "torch", "transformers", "numpy", "scipy")},
    }
    (out / "results.json").write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n", "utf-8")
    lines = [
        "# What a proxy is worth for the target's attributions of demonstrations",
        "",
        ", ".join(f"{k} {v}" for k, v in made.items()) + ".",
        "",
        f"{N_UNITS} demonstrations, {N_COALITIONS} coalitions (weighted Banzhaf, keep 0.8), {N_QUERIES} queries,"
        f" {REPEATS} draws of the measured coalitions. rho² of values: over coalitions, of the mean over queries. rho² of"
        " residuals: the same of what the additive fit leaves, which is what calibration can use. MSE ratio: mean squared"
        " error of the calibrated attribution to the target's own from all coalitions, over that of the target alone"
        " with the same calls, ± one standard error; below 1 the proxy helped.",
        "",
        "| set | target ← proxy | rank correlation | rho² of values | rho² of residuals"
        + "".join(f" | {n} of {N_COALITIONS} measured: lambda, rho² found, MSE ratio" for n in MEASURED)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(MEASURED),
    ]
    for row in rows:
        cells = [
            row["set"],
            f"{row['target']} ← {row['proxy']}",
            f"{row['rank_correlation']:.2f}",
            f"{row['rho2_values']:.2f}",
            f"{row['rho2_residuals']:.2f}{' (negative)' if row['sign_of_residuals'] < 0 else ''}",
        ]
        for n in MEASURED:
            one = row[str(n)]
            cells.append(
                f"{one['lam']:.2f}, {one['rho2']:.2f}, {one['mse_ratio']:.2f} ± {one['mse_ratio_se']:.2f}"
            )
        lines.append("| " + " | ".join(cells) + " |")
    (out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
