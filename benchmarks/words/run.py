"""Do two small models agree on which words of a sentence decide its sentiment? The word-level experiment of [PE] 4.

    python benchmarks/words/run.py --data FOLDER [--ledger FOLDER]

FOLDER holds ``sst2/test.jsonl.gz`` with the rows ``{"id", "input", "label"}`` of the Stanford Sentiment Treebank; none of
them is in this repository, and the results hold figures only. Each model is target once and proxy once. About 136,000
tokens, some ten minutes on one thread. Writes ``results/words.json`` and ``results/words.md``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from proxyprompt import (
    Demonstration,
    FewShotPrompt,
    KernelSHAP,
    LabelTask,
    Ledger,
    Query,
    QueryExplanation,
    QueryWords,
    explain_queries,
    open_model,
)
from proxyprompt.attribution import LIME, Explainer
from proxyprompt.fidelity import score_fidelity
from proxyprompt.metering import Meter

HERE = Path(__file__).parent
MODELS = ("embedded:gemma-3-270m", "embedded:smollm2-135m")
WORDS = range(8, 15)
BUDGET, JUDGE, TOP = 100, 40, 3
SEED = 20
# Written for this benchmark; half of them per label.
SHOWN = [
    ("a warm and funny story told with real charm", "positive"),
    ("dull from the first scene to the last", "negative"),
    ("the acting is superb and the music a delight", "positive"),
    ("a lazy , tired script that goes nowhere", "negative"),
    ("i left the cinema smiling", "positive"),
    ("two hours of my life that i want back", "negative"),
]
PROMPT = FewShotPrompt(
    tuple(Demonstration(f"d{i}", {"input": text}, label) for i, (text, label) in enumerate(SHOWN)),
    "Is the sentence from a film review positive or negative? The sentence may be empty.",
    "Sentence: {input}\nSentiment: {output}",
)
TASK = LabelTask(("negative", "positive"))


class Setting:
    """A technique, how words are taken out, and on how many of the queries."""

    def __init__(self, name: str, explainer: Explainer, removal: str, share: float) -> None:
        self.name, self.explainer, self.removal, self.share = name, explainer, removal, share

    def units(self, queries: Sequence[Query]) -> list[QueryWords]:
        used = queries[: round(self.share * len(queries))]
        return [QueryWords(PROMPT, query, split="lime", removal=self.removal) for query in used]


# A mask is four tokens where a deleted word is none, so masking is measured on half of the queries.
SETTINGS = (
    Setting("LIME, words deleted", LIME(), "delete", 1.0),
    Setting("KernelSHAP, words deleted", KernelSHAP(), "delete", 1.0),
    Setting("LIME, words masked", LIME(), "mask", 0.5),
)


def read_queries(folder: Path, n: int) -> list[Query]:
    """As many of each label, alternating, in a random order; sentences of ``WORDS`` words."""
    with gzip.open(folder / "sst2" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    order = np.random.default_rng(SEED).permutation(len(rows))
    by_label: dict[str, list[Query]] = {label: [] for label in TASK.labels or ()}
    for i in order:
        query = Query(rows[i]["id"], {"input": rows[i]["input"]}, rows[i]["label"])
        if QueryWords(PROMPT, query, split="lime").n_units in WORDS:
            by_label[query.reference].append(query)
    return [query for pair in zip(*by_label.values(), strict=False) for query in pair][:n]


def explain(queries: list[Query], folder: Path) -> dict[tuple[str, str], tuple[QueryExplanation, ...]]:
    """Every model in every setting, on equal coalitions."""
    found = {}
    with Ledger(folder / "ledger.db") as ledger:
        for model in MODELS:
            meter = Meter(
                open_model(model, options={"threads": 1}), ledger, role="proxy", run="benchmark-words"
            )
            for number, setting in enumerate(SETTINGS):
                print(f"{model}: {setting.name}", flush=True)
                rng = np.random.default_rng([SEED, number])
                found[model, setting.name] = explain_queries(
                    setting.units(queries),
                    TASK,
                    meter,
                    explainer=setting.explainer,
                    budget=BUDGET,
                    judge=JUDGE,
                    rng=rng,
                )
    return found


def credits(explanation: QueryExplanation) -> np.ndarray:
    """Credit of each word for the label ``positive``, shape (n_words,)."""
    return explanation.by_label["positive"].mean


def rank_correlation(one: QueryExplanation, other: QueryExplanation) -> float:
    """Spearman; NaN where a model's answers never change."""
    a, b = credits(one), credits(other)
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def top_mass(of: QueryExplanation, chosen_by: QueryExplanation) -> float:
    """Share of the absolute credit of ``of`` on the ``TOP`` words that ``chosen_by`` puts first."""
    mass, top = np.abs(credits(of)), np.argsort(-np.abs(credits(chosen_by)))[:TOP]
    return float(mass[top].sum() / mass.sum()) if mass.sum() > 0 else float("nan")


def constant(target: QueryExplanation) -> float:
    """Fidelity of always naming the target's label for the whole sentence: what a surrogate has to beat."""
    predictions = target.values.predictions[:, 0]
    return float((predictions[target.design.n_coalitions :] == predictions[target.design.full_row]).mean())


def side_agreement(target: QueryExplanation, fitted: QueryExplanation) -> float:
    """Share of held-out coalitions that the surrogate puts on the target's side of the midpoint, each of its own ends.

    Unlike the label, it does not see at which level of probability a model works.
    """
    m, theirs = target.design.n_coalitions, target.answers[:, [1]]
    ends = theirs[target.design.empty_row], theirs[target.design.full_row]
    result = score_fidelity(
        fitted.design, fitted.answers[:m, [1]], fitted.held_out, theirs[m:],
        judged_base=ends[0], judged_full=ends[1], explainer=fitted.explainer,
    )  # fmt: skip
    return float(result.side_agreement[0])


def share_positive(explanation: QueryExplanation) -> float:
    """How often the model says ``positive`` on held-out coalitions."""
    return float((explanation.values.predictions[explanation.design.n_coalitions :, 0] == 1).mean())


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean over queries and its standard error; missing ones are counted."""
    seen = np.array([v for v in values if not np.isnan(v)])
    return {
        "mean": round(float(seen.mean()), 3),
        "se": round(float(seen.std(ddof=1) / np.sqrt(len(seen))), 3),
        "n": len(seen),
    }


def pair(targets: Sequence[QueryExplanation], proxies: Sequence[QueryExplanation]) -> dict[str, Any]:
    """What a proxy's explanations are worth for a target; both in one setting."""
    both = list(zip(targets, proxies, strict=True))
    agreeing = [(t, p) for t, p in both if t.predicted == p.predicted]

    def over(pairs: list[Any], f: Callable[[Any, Any], float]) -> dict[str, Any]:
        return summary([f(t, p) for t, p in pairs])

    same_top = [float(np.argmax(np.abs(credits(t))) == np.argmax(np.abs(credits(p)))) for t, p in both]
    return {
        "n_queries": len(both),
        "n_same_label": len(agreeing),
        "q_oracle": over(both, lambda t, p: t.fidelity_to(t)),
        "q_proxy": over(both, lambda t, p: p.fidelity_to(t)),
        "q_constant": over(both, lambda t, p: constant(t)),
        "q_oracle_same_label": over(agreeing, lambda t, p: t.fidelity_to(t)),
        "q_proxy_same_label": over(agreeing, lambda t, p: p.fidelity_to(t)),
        "q_constant_same_label": over(agreeing, lambda t, p: constant(t)),
        "side_oracle": over(both, lambda t, p: side_agreement(t, t)),
        "side_proxy": over(both, side_agreement),
        "share_positive_target": summary([share_positive(t) for t, _ in both]),
        "share_positive_proxy": summary([share_positive(p) for _, p in both]),
        "rank_correlation": over(both, rank_correlation),
        "rank_correlation_same_label": over(agreeing, rank_correlation),
        "same_first_word": summary(same_top),
        "top_mass_own": over(both, lambda t, p: top_mass(t, t)),
        "top_mass_proxy": over(both, top_mass),
        "top_mass_chance": over(both, lambda t, p: TOP / len(t.units)),
    }


def within(one: Sequence[QueryExplanation], other: Sequence[QueryExplanation]) -> dict[str, Any]:
    """Two settings of one model on the queries that both have."""
    return summary([rank_correlation(a, b) for a, b in zip(one, other, strict=False)])


def hardware() -> str:
    """Processor, as the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name}, {os.cpu_count()} processors, one thread used"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/test.jsonl.gz")
    parser.add_argument(
        "--ledger", type=Path, default=HERE / "ledger", help="what was asked once is not asked again"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--queries", type=int, default=20)
    args = parser.parse_args()
    queries = read_queries(args.data, args.queries)
    found = explain(queries, args.ledger)
    lime, shap, masked = (setting.name for setting in SETTINGS)
    body = {
        "command": "python benchmarks/words/run.py --data FOLDER",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": {
            n: metadata.version(n) for n in ("proxyprompt-core", "torch", "transformers", "numpy", "scipy")
        },
        "n_queries": len(queries),
        "words_per_sentence": round(float(np.mean([len(e.units) for e in found[MODELS[0], lime]])), 1),
        "budget": BUDGET,
        "judge": JUDGE,
        "top": TOP,
        "accuracy": {
            m: round(float(np.mean([e.predicted == e.query.reference for e in found[m, lime]])), 3)
            for m in MODELS
        },
        "pairs": [
            {"target": t, "proxy": p, "setting": s.name, **pair(found[t, s.name], found[p, s.name])}
            for s in SETTINGS
            for t, p in (MODELS, MODELS[::-1])
        ],
        "within": {
            m: {
                "LIME and KernelSHAP, words deleted": within(found[m, lime], found[m, shap]),
                "LIME, words deleted and masked": within(found[m, lime], found[m, masked]),
            }
            for m in MODELS
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "words.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    (args.out / "words.md").write_text(markdown(body), encoding="utf-8")
    print(markdown(body))


def markdown(body: dict[str, Any]) -> str:
    """A page that a person reads."""

    def cell(row: dict[str, Any], name: str) -> str:
        return f"{row[name]['mean']:.2f} ± {row[name]['se']:.2f}"

    def name(model: str) -> str:
        return model.split(":")[1]

    versions = ", ".join(f"{k} {v}" for k, v in body["versions"].items())
    accuracy = ", ".join(f"{name(m)} {a:.2f}" for m, a in body["accuracy"].items())
    lines = [
        "# Words of SST-2 sentences, two small models",
        "",
        f"`{body['command']}`, {body['date']}; {body['hardware']}; fp32; {versions}."
        f" {body['n_queries']} sentences of the test split, {body['words_per_sentence']} words each"
        " on average, half of either label; masked: the first half of them."
        f" At most {body['budget']} coalitions fitted, {body['judge']} held out per sentence."
        f" Accuracy on the whole sentences: {accuracy}. Means over sentences ± standard error.",
        "",
        "## Fidelity to the target on held-out coalitions (labels)",
        "",
        "q_oracle: surrogate of the target; q_proxy: of the proxy; constant: always the target's label for the"
        " whole sentence. Right of the bar: only sentences on which both models give the same label.",
        "",
        "| technique | target | proxy | q_oracle | q_proxy | constant | same label | q_oracle | q_proxy | constant |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in body["pairs"]:
        cells = [cell(row, n) for n in ("q_oracle", "q_proxy", "q_constant")]
        cells.append(f"{row['n_same_label']} of {row['n_queries']}")
        cells += [
            cell(row, n) for n in ("q_oracle_same_label", "q_proxy_same_label", "q_constant_same_label")
        ]
        lines.append(
            f"| {row['setting']} | {name(row['target'])} | {name(row['proxy'])} | " + " | ".join(cells) + " |"
        )
    lines += [
        "",
        "## Fidelity without the level, and the level",
        "",
        "Side: share of held-out coalitions on the same side of the midpoint between the empty and the whole sentence, each"
        " model's own. Says positive: share of held-out coalitions on which a model's label is `positive`.",
        "",
        "| technique | target | side, surrogate of target | of proxy | target says positive | proxy says positive |",
        "|---|---|---|---|---|---|",
    ]
    for row in body["pairs"]:
        names = ("side_oracle", "side_proxy", "share_positive_target", "share_positive_proxy")
        cells = [cell(row, n) for n in names]
        lines.append(f"| {row['setting']} | {name(row['target'])} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"## Do the attributions agree? (top: {body['top']} words)",
        "",
        "Rank correlation: Spearman over the words of a sentence, credit for `positive`. Mass: share of the target's"
        " absolute credit on the proxy's top words, on its own top words, and by chance.",
        "",
        "| technique | target | rank correlation | where labels agree | same first word | mass: proxy's | own | chance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in body["pairs"]:
        names = (
            "rank_correlation",
            "rank_correlation_same_label",
            "same_first_word",
            "top_mass_proxy",
            "top_mass_own",
        )
        cells = [cell(row, n) for n in names] + [f"{row['top_mass_chance']['mean']:.2f}"]
        lines.append(f"| {row['setting']} | {name(row['target'])} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## The same model, explained in two ways (rank correlation)",
        "",
        "| model | settings | correlation |",
        "|---|---|---|",
    ]
    for model, rows in body["within"].items():
        lines += [f"| {name(model)} | {what} | {cell(rows, what)} |" for what in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
