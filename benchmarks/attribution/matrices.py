"""All coalitions of two 10-demonstration prompts, answered by both embedded models: real games with known Shapley values.

    python benchmarks/attribution/matrices.py [--ledger FOLDER]

The prompts are draws from the demonstrations of the built-in demo (``proxyprompt/demo_data``), the queries come from
its "explain" split, and the value is the log-probability of the reference label in nats, as in
a run. Writes ``results/matrices.npz``: for each model and prompt an array ``(1024, n_queries)``, row ``k`` keeping unit
``i`` when bit ``i`` of ``k`` is set, beside the ids of what was asked. ``variance.py`` reads it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from proxyprompt import Ledger, PromptValueFunction, open_model
from proxyprompt.coalitions import enumerate_coalitions
from proxyprompt.demo import demo_config
from proxyprompt.metering import Meter

HERE = Path(__file__).parent
MODELS = ("embedded:gemma-3-270m", "embedded:smollm2-135m")
N_UNITS, N_QUERIES = 10, (3, 1)  # queries of each prompt; a prompt and query cost minutes


def main() -> None:
    """Ask and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ledger", type=Path, default=HERE / "ledger")
    folder = parser.parse_args().ledger
    config = demo_config(Path("unused"), overrides={"queries": {"file": "queries.jsonl"}})
    everything, rng = enumerate_coalitions(N_UNITS), np.random.default_rng(2026)
    ids = [d.id for d in config.prompt.demonstrations]
    arrays: dict[str, np.ndarray] = {}
    target = HERE / "results" / "matrices.npz"
    target.parent.mkdir(exist_ok=True)
    with Ledger(folder / "ledger.db") as ledger:
        for number, n_queries in enumerate(N_QUERIES):
            prompt = config.prompt.keep(sorted(rng.choice(ids, size=N_UNITS, replace=False).tolist()))
            pool = config.splits["explain"]
            queries = [pool[i] for i in rng.choice(len(pool), size=n_queries, replace=False)]
            arrays[f"prompt{number}_demonstrations"] = np.array([d.id for d in prompt.demonstrations])
            arrays[f"prompt{number}_queries"] = np.array([q.id for q in queries])
            for model in MODELS:
                begun = time.perf_counter()
                meter = Meter(open_model(model), ledger, role="proxy", run="benchmark-matrices")
                values = PromptValueFunction(prompt, config.task, queries, meter, "attribute")(everything)
                if np.isnan(values).any():
                    raise SystemExit(f"{model}, prompt {number}: values are missing")
                arrays[f"prompt{number}_{model.split(':')[1]}"] = values
                np.savez_compressed(target, **arrays)
                print(f"{model}, prompt {number}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
