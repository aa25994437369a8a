"""Time and memory of every explanation technique on arrays of 200 units x 2,000 coalitions x 500 queries.

    OMP_NUM_THREADS=1 python benchmarks/attribution/arrays.py [--technique NAME]

Each technique runs in a fresh process: it draws its design, the values of a game with interactions and noise are made,
and the fit is timed. Memory is the peak resident set of that process (VmHWM) less what it was before the design, so
it includes the values themselves (8 MB). Writes ``results/arrays.json`` and ``results/arrays.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from proxyprompt.attribution import (
    LIME,
    Explainer,
    KernelSHAP,
    Lasso,
    LeaveOneOut,
    PermutationShapley,
    WeightedBanzhaf,
)
from proxyprompt.attribution.surrogate_shap import SurrogateSHAP

RESULTS = Path(__file__).parent / "results"
N_UNITS, N_COALITIONS, N_QUERIES = 200, 2000, 500
TECHNIQUES: dict[str, Explainer] = {
    "SurrogateSHAP": SurrogateSHAP(),
    "KernelSHAP": KernelSHAP(),
    "WeightedBanzhaf": WeightedBanzhaf(),
    "LIME": LIME(),
    "Lasso": Lasso(),
    "PermutationShapley": PermutationShapley(),
    "LeaveOneOut": LeaveOneOut(),
}
LIMIT_SECONDS, LIMIT_MB = 2.0, 400.0


def peak_mb() -> float:
    """Largest resident set so far."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(name: str) -> dict[str, object]:
    """Design and fit once, in this process."""
    explainer, before = TECHNIQUES[name], peak_mb()
    begun = time.perf_counter()
    design = explainer.design(N_UNITS, N_COALITIONS, rng=np.random.default_rng(0))
    drawn = time.perf_counter()
    rng = np.random.default_rng(1)
    effects = rng.normal(size=(N_UNITS, N_QUERIES))
    signs = 2.0 * design.coalitions - 1
    values = design.coalitions @ effects + 0.5 * signs[:, :1] * signs[:, 1:2] * signs[:, 2:3]
    values += 0.3 * rng.normal(size=values.shape)
    ready = time.perf_counter()
    ready_cpu = time.process_time()
    explainer.fit(design, values)
    return {
        "technique": name,
        "coalitions": design.n_coalitions,
        "design_seconds": round(drawn - begun, 3),
        "fit_seconds": round(time.perf_counter() - ready, 3),
        "fit_processor_seconds": round(time.process_time() - ready_cpu, 3),
        "megabytes": round(peak_mb() - before, 1),
        "megabytes_in_all": round(peak_mb(), 1),
    }


def main() -> None:
    """Run every technique in a process of its own and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--technique", choices=TECHNIQUES)
    only = parser.parse_args().technique
    if only:
        print(json.dumps(measure(only)))
        return
    rows = [
        json.loads(
            subprocess.run(
                [sys.executable, __file__, "--technique", name], check=True, capture_output=True
            ).stdout
        )
        for name in TECHNIQUES
    ]
    versions = {p: metadata.version(p) for p in ("proxyprompt-core", "numpy", "scipy")}
    body = {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "arrays.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# 200 units x 2,000 coalitions x 500 queries",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/attribution/arrays.py`, {body['date']}; "
        + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
        f"Limit: {LIMIT_SECONDS:.0f} s and {LIMIT_MB:.0f} MB for the fit on two cores. The last column judges by the"
        " processor time of one thread, which does not depend on what else the machine did, and by all the memory of a"
        " fresh process (in brackets; before them, what design, values and fit added). Wall seconds are those of a"
        " machine that may be busy.",
        "",
        "| technique | coalitions | design, s | fit, s | fit, processor s | MB | within |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        within = (
            "yes"
            if r["fit_processor_seconds"] <= LIMIT_SECONDS and r["megabytes_in_all"] <= LIMIT_MB
            else "no"
        )
        lines.append(
            f"| {r['technique']} | {r['coalitions']} | {r['design_seconds']:.2f} | {r['fit_seconds']:.2f} |"
            f" {r['fit_processor_seconds']:.2f} |"
            f" {r['megabytes']:.0f} ({r['megabytes_in_all']:.0f}) | {within} |"
        )
    (RESULTS / "arrays.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
