"""Run the demo twice on an empty output folder, and write down what it found and what it cost.

    python benchmarks/demo/run.py [--out FOLDER]

Writes ``results.json`` and ``results.md`` beside this file. The second run must buy nothing. Seconds are those of one
run on a shared machine: read them as an order of magnitude, and the processor's seconds as what the work takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def once(out: Path) -> tuple[dict[str, Any], str, float, float]:
    """Run the demo as a user would; its JSON, its notes, its seconds and the processor's."""
    command = [
        sys.executable,
        "-c",
        "from proxyprompt.cli import main; main()",
        "demo",
        "--json",
        "--out",
        str(out),
    ]
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout), done.stderr, seconds, worked


def processor() -> str:
    """Name of the processor and number of usable cores."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")),
            name,
        )
    threads = os.environ.get("OMP_NUM_THREADS")
    return (
        f"{name or 'unknown'}, {len(os.sched_getaffinity(0))} cores"
        + (f", {threads} thread" if threads else "")
        + f", load {os.getloadavg()[2]:.1f}"
    )


def result(
    first: dict[str, Any],
    second: dict[str, Any],
    notes: str,
    seconds: tuple[float, float],
    worked: tuple[float, float],
) -> dict[str, Any]:
    """The figures worth keeping."""
    summary = first["summary"]
    screened = summary["screening"]["proxies"] if summary["screening"] else []
    return {
        "command": "python benchmarks/demo/run.py",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": processor(),
        "versions": first["versions"],
        "seconds_first_run": round(seconds[0], 1),
        "seconds_second_run": round(seconds[1], 1),
        "processor_seconds": [round(x, 1) for x in worked],
        "target_calls_bought": [
            sum(r["bought_now"] for r in body["spent"] if r["role"] == "target") for body in (first, second)
        ],
        "backdrop": [line.strip() for line in notes.splitlines() if "accuracy" in line],
        "verdict": summary["verdict"],
        "explained_by": summary["explained_by"],
        "screening": [
            {
                k: p[k]
                for k in (
                    "name",
                    "decision",
                    "n_used",
                    "mean_q_proxy",
                    "mean_q_oracle",
                    "agreement",
                    "rank_correlation",
                )
            }
            | {"paper_rule": p["paper_rule"] and {k: p["paper_rule"][k] for k in ("decision", "n_used")}}
            for p in screened
        ],
        "before": summary["before"],
        "after": summary["after"],
        "zero_shot_on_select": summary["zero_shot"],
        "harmful_confirmed": [d["id"] for d in summary["demonstrations"] if d["verdict"] == "harmful"],
        "removed": first["removed"],
        "certificate": {
            k: v for k, v in (summary["certificate"] or {}).items() if k not in ("sealed_digest",)
        },
        "curve": summary["curve"],
        "cost": {k: v for k, v in summary["cost"].items() if k != "stages"},
        "mislabelled_on_purpose": mislabelled(),
    }


def mislabelled() -> list[str]:
    """Ids that the demo's data marks as mislabelled; the tool never sees the mark."""
    from importlib.resources import files

    rows = (
        (files("proxyprompt") / "demo_data" / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return [r["id"] for r in map(json.loads, filter(None, rows)) if r["note"].startswith("mislabelled")]


def markdown(r: dict[str, Any]) -> str:
    """A page that a person reads."""
    percent = lambda p: f"{p['value']:.1%} [{p['low']:.1%}, {p['high']:.1%}]"  # noqa: E731
    found, planted = set(r["harmful_confirmed"]), set(r["mislabelled_on_purpose"])
    lines = [
        "# The demo, measured",
        "",
        f"`{r['command']}`, {r['date']}, {r['hardware']}; "
        + ", ".join(f"{k} {v}" for k, v in sorted(r["versions"].items()))
        + ".",
        "",
        f"- First run {r['seconds_first_run']:.0f} s ({r['processor_seconds'][0]:.0f} s of processor), second run"
        f" {r['seconds_second_run']:.0f} s ({r['processor_seconds'][1]:.0f} s), weights converted before; target calls"
        f" bought: {r['target_calls_bought'][0]}, then {r['target_calls_bought'][1]}.",
        *(f"- {line}" for line in r["backdrop"]),
        f"- Verdict: {r['verdict']['headline']}.",
        f"- Sealed queries: {percent(r['before']['performance'])} with {r['before']['n_demonstrations']} demonstrations"
        f" ({r['before']['tokens']} tokens), {percent(r['after']['performance'])} with {r['after']['n_demonstrations']}"
        f" ({r['after']['tokens']} tokens).",
        f"- Confirmed harmful: {len(found)}, of which {len(found & planted)} are among the {len(planted)} mislabelled on"
        " purpose.",
        f"- Mislabelled demonstrations that left the prompt: {len(set(r['removed']) & planted)} of {len(planted)}.",
        f"- Explained by {r['explained_by']['name']}: {r['explained_by']['why']}",
    ]
    for p in r["screening"]:
        rank = "n/a" if p["rank_correlation"] is None else f"{p['rank_correlation']:.2f}"
        lines.append(
            f"- Screen of {p['name']}: {p['decision']} after {p['n_used']} pairs; fidelity {p['mean_q_proxy']:.3f}"
            f" against the oracle's {p['mean_q_oracle']:.3f}; same prediction on {p['agreement']:.0%} of the queries; rank"
            f" correlation of attributions {rank}; the paper's rule on the same pairs: {p['paper_rule']['decision']} after"
            f" {p['paper_rule']['n_used']}."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run twice and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "demo-out")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    first, notes, *a = once(out)
    second, _, *b = once(out)
    figures = result(first, second, notes, (a[0], b[0]), (a[1], b[1]))
    (HERE / "results.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (HERE / "results.md").write_text(markdown(figures), encoding="utf-8")
    print(markdown(figures))


if __name__ == "__main__":
    main()
