"""Which rule finds the mislabelled demonstrations of a prompt, at what price, and what does the target gain?

    python benchmarks/cleaning/run.py [--data FOLDER] [--ledger FOLDER] [--seconds N]

Prompts of 16 demonstrations, some labels of which are made wrong by a seed (the corrupted ones are the answer key; no
rule sees them), and the embedded Gemma 3 270M as the target, which explains itself. Prompts are drawn from the demo's
own messages and, with ``--data``, from public sets: ``FOLDER/<set>/train.jsonl.gz`` and ``test.jsonl.gz``, rows with
``input`` and ``label``. Stops after ``--seconds`` and goes on where it was when started again: answers are in the
ledger. Writes ``results.json`` and ``results.md`` about the prompts that are done.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from proxyprompt.attribution import Attribution
from proxyprompt.demo import corrected_prompt, demo_config
from proxyprompt.metering import Meter
from proxyprompt.optimize.clean import clean
from proxyprompt.optimize.reexplain import Reexplainer
from proxyprompt.optimize.relabel import own_queries, propose_relabels, zero_shot_doubts
from proxyprompt.value_function import Values

HERE = Path(__file__).parent
MODEL = "embedded:gemma-3-270m"
N, COALITIONS = 16, 48
SIZES = {"explain": 12, "select": 32, "test": 48}
LONGEST = 90  # characters of a row, so that a prompt stays short
RULES = {
    "one round": {"rounds": 1, "prior": False},
    "rounds": {"rounds": 3, "prior": False},
    "one round + zero-shot prior": {"rounds": 1, "prior": True},
    "rounds + zero-shot prior": {"rounds": 3, "prior": True},
}
OTHERS = ("zero-shot disagreement", "all negative [PE]", "answer key")
INSTRUCTIONS = {
    "trec": "What kind of answer does the question ask for?",
    "sst2": "Is the opinion about the film negative or positive?",
    "subj": "Is the sentence subjective or objective?",
    "ag_news": "Which section does the news item belong to?",
}


@dataclass(frozen=True)
class Case:
    """One prompt with wrong labels."""

    name: str
    prompt: FewShotPrompt
    task: LabelTask
    queries: dict[str, list[Query]]
    wrong: NDArray[np.bool_]
    rng_seed: int


@dataclass
class Counted:
    """The target on one case; counts what is asked, whether or not the ledger knows the answer."""

    case: Case
    meter: Meter
    stop: Callable[[int, int], None]
    calls: int = 0

    def __call__(self, queries: Sequence[Query], rows: NDArray[np.bool_]) -> Values:
        self.calls += len(queries) * len(rows)
        function = PromptValueFunction(
            self.case.prompt, self.case.task, queries, self.meter, "clean", self.stop
        )
        return function.evaluate(rows)


class OutOfTime(Exception):
    """The seconds given are used up."""


def cases(data: Path | None) -> list[Case]:
    """Every prompt of the benchmark."""
    out = []
    for name, seed, n_wrong, way in CASES:
        if name == "demo":
            out.append(demo_case(seed, n_wrong, way))
        elif data is not None:
            out.append(public_case(data / name, name, seed, n_wrong, way))
    return out


CASES = (
    ("demo", 0, 4, "one-sided"),
    ("sst2", 0, 5, "random"),
    ("demo", 1, 6, "one-sided"),
    ("trec", 0, 6, "one-sided"),
)


def demo_case(seed: int, n_wrong: int, way: str) -> Case:
    """Sixteen of the demo's distinct messages, four of each label, with new wrong labels."""
    config = demo_config(Path("unused"), overrides={"queries": {"file": "queries.jsonl"}})
    right = corrected_prompt(config.prompt)
    copies = {"d11", "d15", "d18", "d21"}
    rng = np.random.default_rng([seed, 1])
    pool = [d for d in right.demonstrations if d.id not in copies]
    labels = config.task.labels
    queries = {
        name: balanced(list(config.splits[split]), SIZES[name], labels, lambda q: q.reference, rng)
        for name, split in (("explain", "explain"), ("select", "select"), ("test", "sealed"))
    }
    demonstrations = balanced(pool, N, labels, lambda d: d.output, rng)
    return corrupt(
        f"demo, {n_wrong} {way}", replace(right, demonstrations=tuple(demonstrations)), config.task, queries,
        n_wrong, way, seed,
    )  # fmt: skip


def public_case(folder: Path, name: str, seed: int, n_wrong: int, way: str) -> Case:
    """Sixteen short rows of a public training set; queries from its other rows and its test set."""

    def rows(file: str) -> list[dict[str, Any]]:
        with gzip.open(folder / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
            return [r for r in map(json.loads, lines) if len(r["input"]) <= LONGEST]

    train, test = rows("train"), rows("test")
    labels = tuple(dict.fromkeys(sorted(r["label"] for r in train)))
    rng = np.random.default_rng([seed, 2])
    shown = balanced(train, N, labels, lambda r: r["label"], rng)
    ids = {r["id"] for r in shown}
    other = [r for r in train if r["id"] not in ids]
    asked = balanced(
        other, SIZES["explain"] + SIZES["select"], labels, lambda r: r["label"], rng, shuffle=True
    )
    split = {
        "explain": asked[: SIZES["explain"]],
        "select": asked[SIZES["explain"] :],
        "test": balanced(test, SIZES["test"], labels, lambda r: r["label"], rng),
    }
    prompt = FewShotPrompt(
        tuple(Demonstration(r["id"], {"input": r["input"]}, r["label"]) for r in shown),
        INSTRUCTIONS[name],
        "Text: {input}\nLabel: {output}",
    )
    queries = {
        k: [Query(f"{k}:{r['id']}", {"input": r["input"]}, r["label"]) for r in v] for k, v in split.items()
    }
    return corrupt(f"{name}, {n_wrong} {way}", prompt, LabelTask(labels), queries, n_wrong, way, seed)


def balanced(
    rows: list[Any],
    n: int,
    labels: Sequence[str] | None,
    label: Callable[[Any], str],
    rng: np.random.Generator,
    *,
    shuffle: bool = True,
) -> list[Any]:
    """``n`` rows with labels as even as they come, in random order."""
    rows = [rows[int(i)] for i in rng.permutation(len(rows))]
    piles = [[r for r in rows if label(r) == own] for own in labels or ()]
    picked = [pile[k] for k in range(len(rows)) for pile in piles if k < len(pile)][:n]
    return [picked[int(i)] for i in rng.permutation(len(picked))] if shuffle else picked


def corrupt(
    name: str,
    prompt: FewShotPrompt,
    task: LabelTask,
    queries: dict[str, list[Query]],
    n: int,
    way: str,
    seed: int,
) -> Case:
    """Make ``n`` labels wrong: all to one label, or each to a random other one."""
    rng = np.random.default_rng([seed, n, 3])
    labels = list(task.labels or ())
    sink = labels[int(rng.integers(len(labels)))]
    may = [i for i, d in enumerate(prompt.demonstrations) if way == "random" or d.output != sink]
    picked = {int(i) for i in rng.choice(may, n, replace=False)}
    shown = []
    for i, d in enumerate(prompt.demonstrations):
        others = [x for x in labels if x != d.output]
        new = sink if way == "one-sided" else others[int(rng.integers(len(others)))]
        shown.append(replace(d, output=new) if i in picked else d)
    wrong = np.array([i in picked for i in range(len(shown))])
    return Case(name, replace(prompt, demonstrations=tuple(shown)), task, queries, wrong, seed)


def explain(case: Case, ask: Counted) -> Attribution:
    """The target's attributions of the whole prompt."""
    technique = WeightedBanzhaf()
    design = technique.design(N, COALITIONS, rng=np.random.default_rng([case.rng_seed, 4]))
    return technique.fit(design, ask(case.queries["explain"], design.coalitions).utility)


def measure(case: Case, target: Callable[[], Counted]) -> dict[str, Any]:
    """Every rule on one case."""
    found: dict[str, dict[str, Any]] = {}
    for rule, how in RULES.items():
        ask = target()
        attribution = explain(case, ask)
        own = own_queries(case.prompt, case.task)
        assert own is not None
        result = clean(
            attribution,
            lambda rows, ask=ask: ask(case.queries["select"], rows),  # type: ignore[misc]
            doubted=zero_shot_doubts(own, ask) if how["prior"] else (),
            rounds=int(how["rounds"]),
            reexplain=Reexplainer(
                WeightedBanzhaf(),
                ask,
                case.queries["explain"],
                lambda n: min(COALITIONS, max(3 * n, WeightedBanzhaf.smallest_budget(n))),
                np.random.default_rng([case.rng_seed, 5]),
                calls=COALITIONS * SIZES["explain"] // 2,
            ),
        )
        found[rule] = {
            "kept": result.kept,
            "calls": ask.calls,
            "rounds": len(result.rounds),
            "suspected": len(result.flagged),
            "suspected_wrong": int(case.wrong[list(result.flagged)].sum()),
        }
    ask = target()
    own = own_queries(case.prompt, case.task)
    assert own is not None
    kept = np.ones(N, dtype=np.bool_)
    kept[list(zero_shot_doubts(own, ask))] = False
    found["zero-shot disagreement"] = {"kept": kept, "calls": ask.calls}
    ask = target()
    found["all negative [PE]"] = {"kept": explain(case, ask).mean >= 0, "calls": ask.calls}
    found["answer key"] = {"kept": ~case.wrong, "calls": 0}
    ask = target()
    labelled = [*case.queries["explain"], *case.queries["select"]]
    proposed = propose_relabels(
        case.prompt, case.task, labelled, found["rounds + zero-shot prior"]["kept"], ask,
        rng=np.random.default_rng([case.rng_seed, 6]),
    )  # fmt: skip
    units = [p.unit for p in proposed.proposals]
    ends = np.array([[False] * N, [True] * N])
    ask_test = target()
    accuracy = np.nanmean(ask_test(case.queries["test"], ends).performance, axis=1)
    for rule in found.values():
        rule["accuracy"] = float(
            np.nanmean(ask_test(case.queries["test"], rule["kept"][None, :]).performance)
        )
        rule["removed"] = int((~rule["kept"]).sum())
        rule["right"] = int((~rule["kept"] & case.wrong).sum())
        rule["kept"] = np.flatnonzero(rule["kept"]).tolist()
    return {
        "name": case.name,
        "n_wrong": int(case.wrong.sum()),
        "accuracy_zero_shot": float(accuracy[0]),
        "accuracy_full": float(accuracy[1]),
        "rules": found,
        "relabel": {
            "proposed": len(units),
            "right_unit": int(case.wrong[units].sum()),
            "contradicted": proposed.contradicted,
            "agreement_on_queries": proposed.agreement,
        },
    }


def totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each rule over all cases."""
    out = []
    for rule in (*RULES, *OTHERS):
        mine = [r["rules"][rule] for r in rows]
        removed, right = sum(m["removed"] for m in mine), sum(m["right"] for m in mine)
        wrong = sum(r["n_wrong"] for r in rows)
        gains = [m["accuracy"] - r["accuracy_full"] for m, r in zip(mine, rows, strict=True)]
        out.append(
            {
                "rule": rule,
                "removed": removed,
                "precision": right / removed if removed else None,
                "recall": right / wrong,
                "false_removals": removed - right,
                "accuracy": float(np.mean([m["accuracy"] for m in mine])),
                "gain": float(np.mean(gains)),
                "gain_standard_error": float(np.std(gains, ddof=1) / np.sqrt(len(gains)))
                if len(gains) > 1
                else 0.0,
                "worst_gain": float(min(gains)),
                "calls": float(np.mean([m["calls"] for m in mine])),
            }
        )
    return out


def main() -> None:
    """Measure what is missing, and write when all is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ledger", type=Path, default=HERE / "ledger")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    began = time.monotonic()

    def stop(done: int, total: int) -> None:
        if time.monotonic() - began > given.seconds:
            raise OutOfTime

    rows, seconds_file = [], given.ledger / "seconds.json"
    given.ledger.mkdir(parents=True, exist_ok=True)
    spent = json.loads(seconds_file.read_text()) if seconds_file.exists() else 0.0
    try:
        with Ledger(given.ledger / "ledger.db") as ledger:
            backend = open_model(MODEL)
            for case in cases(given.data):

                def target(case: Case = case) -> Counted:
                    return Counted(case, Meter(backend, ledger, role="target", run="cleaning"), stop)

                rows.append(measure(case, target))
                print(f"{case.name}: done", file=sys.stderr)
    except OutOfTime:
        print(f"{len(rows)} prompts done; run again to go on.", file=sys.stderr)
    seconds_file.write_text(json.dumps(spent + time.process_time()))
    if not rows:
        sys.exit(3)
    body = {
        "command": "python benchmarks/cleaning/run.py" + (" --data FOLDER" if given.data else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} thread",
        "processor_minutes": round((spent + time.process_time()) / 60, 1),
        "versions": {
            n: metadata.version(n) for n in ("proxyprompt-core", "torch", "transformers", "numpy", "scipy")
        },
        "target": MODEL,
        "n_demonstrations": N,
        "coalitions": COALITIONS,
        "sizes": SIZES,
        "totals": totals(rows),
        "cases": rows,
    }
    (HERE / "results.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    (HERE / "results.md").write_text(markdown(body), encoding="utf-8")
    if len(rows) < len(cases(given.data)):
        sys.exit(3)
    print(markdown(body))


def markdown(body: dict[str, Any]) -> str:
    """A page that a person reads."""
    versions = ", ".join(f"{k} {v}" for k, v in body["versions"].items())
    cases_, wrong = body["cases"], sum(c["n_wrong"] for c in body["cases"])
    lines = [
        "# Cleaning, by rule",
        "",
        f"`{body['command']}`, {body['date']}; {body['hardware']}, {body['processor_minutes']} processor minutes;"
        f" {versions}. Target {body['target']}, {len(cases_)} prompts of {body['n_demonstrations']} demonstrations,"
        f" {wrong} wrong labels in all; {body['sizes']['explain']} queries explain, {body['sizes']['select']} confirm,"
        f" {body['sizes']['test']} others test.",
        "",
        "| rule | removed | precision | recall | false removals | accuracy after | gain over the full prompt (points, SE)"
        " | worst prompt | target calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for t in body["totals"]:
        precision = "n/a" if t["precision"] is None else f"{t['precision']:.0%}"
        lines.append(
            f"| {t['rule']} | {t['removed']} | {precision} | {t['recall']:.0%} | {t['false_removals']} |"
            f" {t['accuracy']:.1%} | {100 * t['gain']:+.1f} ({100 * t['gain_standard_error']:.1f}) |"
            f" {100 * t['worst_gain']:+.1f} | {t['calls']:.0f} |"
        )
    rules = [t["rule"] for t in body["totals"]]
    lines += [
        "",
        "By prompt: wrong labels removed + others removed, accuracy after.",
        "",
        "| prompt | zero-shot | full | " + " | ".join(rules) + " | relabel proposals (of wrong ones) |",
        "|---|---|---|" + "---|" * (len(rules) + 1),
    ]
    for c in cases_:
        cells = [
            f"{m['right']}+{m['removed'] - m['right']}, {m['accuracy']:.0%}"
            for m in (c["rules"][rule] for rule in rules)
        ]
        r = c["relabel"]
        lines.append(
            f"| {c['name']} of {N} | {c['accuracy_zero_shot']:.0%} | {c['accuracy_full']:.0%} | "
            + " | ".join(cells)
            + f" | {r['proposed']} ({r['right_unit']}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
