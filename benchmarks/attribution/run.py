"""Which technique finds the mislabelled demonstrations of the demo's prompt, at a budget a user would pay?

    python benchmarks/attribution/run.py [--ledger FOLDER]

Both embedded models, 24 queries, utility = log-probability of the reference label. The tool never sees which
demonstrations are mislabelled; here they are the answer key. One prompt and one draw of coalitions: enough to
choose a default by, not to publish as a general result. Writes ``results.json`` and ``results.md``.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from proxyprompt import KernelSHAP, LeaveOneOut, Ledger, PromptValueFunction, WeightedBanzhaf, open_model
from proxyprompt.attribution import Attribution, Explainer
from proxyprompt.demo import demo_config
from proxyprompt.metering import Meter

HERE = Path(__file__).parent
MODELS = ("embedded:gemma-3-270m", "embedded:smollm2-135m")
TECHNIQUES: dict[str, tuple[Explainer, int]] = {
    "leave-one-out": (LeaveOneOut(), 26),
    "weighted Banzhaf, keep 0.8": (WeightedBanzhaf(0.8), 74),
    "Banzhaf (keep 0.5)": (WeightedBanzhaf(0.5), 74),
    "KernelSHAP, 4 n": (KernelSHAP(), 96),
}


def answer_key() -> np.ndarray:
    """Which demonstrations are mislabelled, bool (n_units,)."""
    rows = (
        (files("proxyprompt") / "demo_data" / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return np.array([json.loads(row)["note"].startswith("mislabelled") for row in rows if row])


def auc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Chance that a mislabelled demonstration scores below another one; 1 is perfect, one half is chance."""
    low, high = scores[wrong], scores[~wrong]
    return float((low[:, None] < high[None, :]).mean() + 0.5 * (low[:, None] == high[None, :]).mean())


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ledger", type=Path, default=HERE / "ledger")
    folder = parser.parse_args().ledger
    config = demo_config(Path("unused"), overrides={"queries": {"file": "queries.jsonl"}})
    queries, wrong = config.splits["explain"][:24], answer_key()
    found: dict[str, dict[str, Attribution]] = {}
    with Ledger(folder / "ledger.db") as ledger:
        for model in MODELS:
            meter = Meter(open_model(model), ledger, role="proxy", run="benchmark-attribution")
            function = PromptValueFunction(config.prompt, config.task, queries, meter, "attribute")
            for name, (explainer, budget) in TECHNIQUES.items():
                rng = np.random.default_rng(11)
                found.setdefault(name, {})[model] = explainer.attribute(
                    function, config.prompt.n_units, budget=budget, rng=rng
                )
    rows: list[dict[str, Any]] = []
    for name, by_model in found.items():
        means = [by_model[m].mean for m in MODELS]
        rows.append(
            {
                "technique": name,
                "coalitions": by_model[MODELS[0]].n_coalitions,
                "rank_correlation_between_models": round(float(spearmanr(*means).statistic), 3),
                **{
                    model: {
                        "auc_of_mislabelled": round(auc(a.mean, wrong), 3),
                        "ranks_of_mislabelled": np.argsort(np.argsort(a.mean))[wrong].tolist(),
                        "median_standard_error_coalitions": round(float(np.median(a.se_coalitions)), 4),
                        "median_standard_error_queries": round(float(np.median(a.se_queries)), 4),
                        "spread_of_means": round(float(a.mean.std()), 4),
                    }
                    for model, a in by_model.items()
                },
            }
        )
    body = {
        "command": "python benchmarks/attribution/run.py",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            n: metadata.version(n) for n in ("proxyprompt-core", "torch", "transformers", "numpy", "scipy")
        },
        "n_demonstrations": int(config.prompt.n_units),
        "n_mislabelled": int(wrong.sum()),
        "n_queries": len(queries),
        "rows": rows,
    }
    (HERE / "results.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    (HERE / "results.md").write_text(markdown(body), encoding="utf-8")
    print(markdown(body))


def markdown(body: dict[str, Any]) -> str:
    """A page that a person reads."""
    versions = ", ".join(f"{k} {v}" for k, v in body["versions"].items())
    lines = [
        "# Finding mislabelled demonstrations, by technique",
        "",
        f"`{body['command']}`, {body['date']}; {versions}; CPU, fp32. {body['n_demonstrations']} demonstrations,"
        f" {body['n_mislabelled']} mislabelled, {body['n_queries']} queries, one draw of coalitions.",
        "",
        "AUC: chance that a mislabelled demonstration gets a lower attribution than another one (0.5 is chance). Ranks:"
        " places of the mislabelled ones, 0 is lowest. SE: median standard error of the mean attribution from the choice of"
        " coalitions / from the choice of queries, in nats.",
        "",
        "| technique | coalitions | "
        + " | ".join(f"{m.split(':')[1]}: AUC | ranks | SE" for m in MODELS)
        + " | rank correlation of the two models |",
        "|---|---|" + "---|---|---|" * len(MODELS) + "---|",
    ]
    for row in body["rows"]:
        cells = []
        for m in MODELS:
            r = row[m]
            ranks = " ".join(map(str, sorted(r["ranks_of_mislabelled"])))
            errors = f"{r['median_standard_error_coalitions']:.3f} / {r['median_standard_error_queries']:.3f}"
            cells += [f"{r['auc_of_mislabelled']:.2f}", ranks, errors]
        lines.append(
            f"| {row['technique']} | {row['coalitions']} | " + " | ".join(cells)
            + f" | {row['rank_correlation_between_models']:.2f} |"
        )  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
