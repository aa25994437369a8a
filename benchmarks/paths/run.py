"""The whole path on three public data sets, with each of the two embedded models as the target and the other as its proxy.

    python benchmarks/paths/run.py --data FOLDER [--work FOLDER] [--only SET]

Screen, attribute, clean, compress, certify, bill: six runs of the configuration a user would write, through the ledger.
Rows come from ``FOLDER/<set>/train.jsonl.gz`` (demonstrations) and ``test.jsonl.gz`` (queries), rows with ``input``,
``label`` and ``choices``; none of them is stored here. Some labels are made wrong by a seed and one demonstration is
a near-copy of another, so that there is something to find; the price is an assumption and named as one. A stopped
run goes on from the ledger in ``--work`` (default ``ledger`` beside this file). Writes ``results.json`` and ``results.md``
beside this file about the runs that are done.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from proxyprompt import Ledger, build_artifact, load_config, optimize_prompt, write_outputs

HERE = Path(__file__).parent
MODELS = ("embedded:gemma-3-270m", "embedded:smollm2-135m")
N, WRONG = 12, 3
SIZES = {"explain": 16, "select": 32, "sealed": 80}
SETS: dict[str, dict[str, Any]] = {
    "sst2": {"instruction": "Is the opinion about the film negative or positive?", "longest": 70},
    "trec": {"instruction": "What kind of answer does the question ask for?", "longest": 60},
    "openbookqa": {"instruction": "Complete or answer.", "longest": 130, "choices": True},
}
PRICE = {
    "input_per_million": 2.5,
    "output_per_million": 10.0,
    "cached_input_per_million": 0.25,
    "batch_discount": 0.5,
    "source": "assumed for this benchmark, no provider's",
    "date": "2026-11",
}
CACHING = {"minimum_tokens": 1024, "increment_tokens": 128}


def rows(folder: Path, file: str, longest: int) -> list[dict[str, Any]]:
    """Short rows of a set, the choices counted as text too where they differ by row."""
    with gzip.open(folder / file, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    shared = len({tuple(r["choices"]) for r in found}) == 1
    length = lambda r: len(r["input"]) + (0 if shared else sum(map(len, r["choices"])))  # noqa: E731
    return [r for r in found if length(r) <= longest and "\n" not in r["input"]]


def balanced(source: list[dict[str, Any]], n: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """``n`` rows with the label's place among the choices as even as it comes, in random order."""
    order = [source[int(i)] for i in rng.permutation(len(source))]
    places = [r["choices"].index(r["label"]) for r in order]
    piles = [[r for r, p in zip(order, places, strict=True) if p == own] for own in sorted(set(places))]
    picked = [pile[k] for k in range(len(order)) for pile in piles if k < len(pile)][:n]
    return [picked[int(i)] for i in rng.permutation(len(picked))]


def corrupted(shown: list[dict[str, Any]], rng: np.random.Generator, *, choices: bool) -> list[str]:
    """Make the labels of ``WRONG`` rows wrong, all to one label where labels are shared; copy one row. Ids of the wrong."""
    sink = shown[0]["choices"][int(rng.integers(len(shown[0]["choices"])))]
    last = len(shown) - 1
    may = [i for i, r in enumerate(shown) if i != last and (choices or r["label"] != sink)]
    picked = sorted(int(i) for i in rng.choice(may, WRONG, replace=False))
    right = next(i for i in range(last) if i not in picked)
    shown[last] = shown[right] | {"input": shown[right]["input"].rstrip(" .?!") + " ..."}
    for i in picked:
        others = [c for c in shown[i]["choices"] if c != shown[i]["label"]]
        shown[i] = shown[i] | {"label": others[int(rng.integers(len(others)))] if choices else sink}
    return [f"d{i}" for i in picked]


def write_case(name: str, data: Path, folder: Path, target: int) -> list[str]:
    """Files and configuration of one run; ids of the demonstrations whose label was made wrong."""
    about = SETS[name]
    rng = np.random.default_rng([3, list(SETS).index(name)])
    shown = balanced(rows(data / name, "train.jsonl.gz", about["longest"]), N, rng)
    wrong = corrupted(shown, rng, choices=bool(about.get("choices")))
    # Each target has sealed queries of its own: what one run has looked at would not be fresh for the other.
    sizes = SIZES | {"sealed": 2 * SIZES["sealed"]}
    pool = balanced(rows(data / name, "test.jsonl.gz", about["longest"]), sum(sizes.values()), rng)
    folder.mkdir(parents=True, exist_ok=True)
    parts, at = {}, 0
    for split, n in sizes.items():
        parts[split] = pool[at : at + n]
        at += n
    parts["sealed"] = parts["sealed"][target::2]
    for split, part in {"demonstrations": shown, **parts}.items():
        lines = (
            json.dumps(
                {
                    "id": f"d{i}" if split == "demonstrations" else f"{split}-{i}",
                    "input": r["input"],
                    "label": r["label"],
                }
                | ({"choices": r["choices"]} if about.get("choices") else {})
            )
            for i, r in enumerate(part)
        )
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = {"kind": "choice"} if about.get("choices") else {"kind": "label", "labels": shown[0]["choices"]}
    sections = {
        "prompt": {
            "instruction": about["instruction"],
            "demonstration_template": "Text: {input}\nAnswer: {output}",
            "demonstrations": "demonstrations.jsonl",
        },
        "queries": {split: f"{split}.jsonl" for split in SIZES},
        "task": task,
        "target": {"model": MODELS[target]},
        "screening": {"fit_coalitions": 40, "judge_coalitions": 10},
        "attribution": {"proxy_coalitions": 56, "oracle_queries": SIZES["explain"]},
        "clean": {"max_suspects": 6},
        "compress": {"max_evaluations": 6},
        "price": PRICE,
        "caching": CACHING,
        "report": {"text": "all"},
    }
    lines = [f'title = "{name}"', 'output = "out"', ""]
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items()), ""]
    lines += ["[[proxies]]", f'model = "{MODELS[1 - target]}"', ""]
    (folder / "config.toml").write_text("\n".join(lines), encoding="utf-8")
    return wrong


def one_run(name: str, data: Path, folder: Path, target: int, ledger: Ledger) -> dict[str, Any]:
    """One run, and the figures worth keeping."""
    began, work = time.monotonic(), time.process_time()
    wrong = write_case(name, data, folder, target)
    config = load_config(folder / "config.toml")
    result = optimize_prompt(
        config.prompt, config.task, config.splits, target=config.target, proxies=config.proxies,
        settings=config.settings, ledger=ledger, title=config.title, notes=config.notes,
    )  # fmt: skip
    artifact = build_artifact(result, report_text=config.report_text)
    config.output.mkdir(parents=True, exist_ok=True)
    write_outputs(artifact, config.output)
    summary = artifact.summary
    harmful = [d["id"] for d in summary["demonstrations"] if d["verdict"] == "harmful"]
    calls = {r: sum(s["calls"] for s in result.spent if s["role"] == r) for r in ("target", "proxy")}
    relabeled = [] if result.relabeling is None else [f"d{p.unit}" for p in result.relabeling.proposals]
    return {
        "set": name,
        "target": MODELS[target],
        "proxy": MODELS[1 - target],
        "seconds": round(time.monotonic() - began),
        "processor_seconds": round(time.process_time() - work),
        "seconds_by_stage": {k: round(v, 1) for k, v in result.seconds.items()},
        "verdict": summary["verdict"],
        "screening": [
            {k: p[k] for k in ("name", "decision", "n_used", "mean_agreement_proxy", "mean_agreement_oracle")}
            | {k: p[k] for k in ("mean_q_proxy", "mean_q_oracle", "agreement", "rank_correlation")}
            for p in (summary["screening"] or {"proxies": []})["proxies"]
        ],
        "explained_by": summary["explained_by"],
        "made_wrong": wrong,
        "near_copy": f"d{N - 1}",
        "suspected": [i for r in (summary["cleaning"] or {"rounds": []})["rounds"] for i in r["flagged"]],
        "harmful": harmful,
        "relabel_proposed": relabeled,
        "removed": artifact.removed,
        "zero_shot_on_select": summary["zero_shot"],
        "before": summary["before"],
        "after": summary["after"],
        "curve": summary["curve"]["points"],
        "choice": summary["curve"]["choice"],
        "certificate": {k: v for k, v in (summary["certificate"] or {}).items() if k != "sealed_digest"},
        "calls": calls,
        "tokens_saved_share": summary["cost"]["saved_share"],
        "break_even_calls": summary["cost"]["break_even_calls"],
        "money": summary["cost"]["money"],
    }


def main() -> None:
    """Run what is asked and write about all that is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=HERE / "ledger")
    parser.add_argument("--only", choices=tuple(SETS), action="append")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    done = []
    with Ledger(given.work / "ledger.db") as ledger:
        for name in given.only or SETS:
            for target, model in enumerate(MODELS):
                folder = given.work / f"{name}-{model.rsplit(':', 1)[1]}"
                done.append(one_run(name, given.data, folder, target, ledger))
                print(f"{name}, {model}: {done[-1]['verdict']['headline']}", file=sys.stderr, flush=True)
                write(done)
    print(markdown(json.loads((HERE / "results.json").read_text(encoding="utf-8"))))


def write(done: list[dict[str, Any]]) -> None:
    """Both files; figures and ids only."""
    body = {
        "command": "python benchmarks/paths/run.py --data FOLDER",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{processor()}, {len(os.sched_getaffinity(0))} cores shared with other work,"
        f" {os.environ.get('OMP_NUM_THREADS', 'all')} thread",
        "versions": {
            n: metadata.version(n) for n in ("proxyprompt-core", "torch", "transformers", "numpy", "scipy")
        },
        "n_demonstrations": N,
        "sizes": SIZES,
        "price": PRICE,
        "caching": CACHING,
        "runs": done,
    }
    (HERE / "results.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    (HERE / "results.md").write_text(markdown(body), encoding="utf-8")


def processor() -> str:
    """Its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def markdown(body: dict[str, Any]) -> str:
    """A page that a person reads."""
    sizes = body["sizes"]
    lines = [
        "# The whole path on three data sets",
        "",
        f"`{body['command']}`, {body['date']}; {body['hardware']}; "
        + ", ".join(f"{k} {v}" for k, v in body["versions"].items())
        + f". {body['n_demonstrations']} demonstrations, {WRONG} of them with a label made wrong (never told to the"
        f" program) and one near-copy; {sizes['explain']} queries explain, {sizes['select']} choose, {sizes['sealed']}"
        " others certify.",
        "",
        "| set | target (proxy) | screen | demonstrations | prompt tokens | sealed accuracy | certified | harmful: of the"
        " wrong + others | target calls | processor s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in body["runs"]:
        found = set(r["harmful"]) & set(r["made_wrong"])
        screens = "; ".join(f"{p['decision']} after {p['n_used']}" for p in r["screening"]) or "none"
        names = [m.rsplit(":", 1)[1] for m in (r["target"], r["proxy"])]
        before, after = r["before"], r["after"]
        sure = (r["certificate"] or {}).get("decision", "nothing proposed").replace("_", " ")
        lines.append(
            f"| {r['set']} | {names[0]} ({names[1]}) | {screens} | {before['n_demonstrations']} →"
            f" {after['n_demonstrations']} | {before['tokens']} → {after['tokens']} |"
            f" {before['performance']['value']:.1%} → {after['performance']['value']:.1%} | {sure} |"
            f" {len(found)} + {len(r['harmful']) - len(found)} | {r['calls']['target']} | {r['processor_seconds']} |"
        )
    lines += ["", "What each run says:", ""]
    for r in body["runs"]:
        lines += [
            f"- **{r['set']}, {r['target']}**: {r['verdict']['headline']}. "
            + " ".join(r["verdict"]["sentences"])
        ]
        if r["certificate"]:
            lines += [f"  - {r['certificate']['power_statement']}", f"  - {r['certificate']['text']}"]
        money = r["money"]
        if money:
            for s in money["scenarios"]:
                breaks = s["break_even_calls"]
                lines += [
                    f"  - Money, {s['name']} ({money['source']}): {1000 * s['before']:.3f} → {1000 * s['after']:.3f}"
                    f" {money['currency']} per thousand calls; the run cost {money['run_cost']:.2f}"
                    + (
                        f", paid back after {breaks:,} calls."
                        if breaks is not None
                        else " and is never paid back."
                    )
                ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
