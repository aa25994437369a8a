"""The built-in demonstration: support-ticket routing with near-copies and mislabelled demonstrations.

Target Gemma 3 270M, proxy SmolLM2 135M, both from their pip packages, on this machine's CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from .backends.base import Backend
from .config import RunConfig, config_from_mapping
from .ledger import CallRole, Ledger
from .metering import Meter
from .pipeline import Observer
from .prompt import FewShotPrompt
from .value_function import PromptValueFunction

__all__ = ["DemoBackdrop", "backdrop", "corrected_prompt", "demo_config"]

TARGET = "embedded:gemma-3-270m"
PROXY = "embedded:smollm2-135m"


@dataclass(frozen=True)
class DemoBackdrop:
    """Accuracy of one model without demonstrations, with the prompt as shipped, and with its labels mended."""

    model: str
    zero_shot: float
    shipped: float
    corrected: float
    n_queries: int


def demo_config(output: Path, *, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Configuration of the demo; ``overrides`` replaces whole sections."""
    with as_file(files("proxyprompt") / "demo_data") as folder:
        meta = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
        raw: dict[str, Any] = {
            "title": "Support-ticket routing (demo)",
            "tau": 0.9,
            "confidence": 0.95,
            "prompt": {
                "demonstrations": "demonstrations.jsonl",
                **{
                    k: v
                    for k, v in meta.items()
                    if k in ("instruction", "demonstration_template", "separator")
                },
            },
            # Sized for a few minutes on two cores; all the queries are shipped.
            "queries": {"file": "queries.jsonl", "sizes": {"explain": 32, "select": 60}},
            "screening": {"block": 32, "fit_coalitions": 60, "judge_coalitions": 12},
            # No more than the screen has bought: a second batch would read every prompt once more for a few queries.
            "attribution": {"proxy_coalitions": 72, "oracle_queries": 24},
            "compress": {"max_evaluations": 10},
            "task": {"kind": "label", "labels": meta["labels"]},
            "target": {"model": TARGET},
            "proxies": [{"model": PROXY}],
            "report": {"text": "all"},
        }
        raw.update(overrides or {})
        return config_from_mapping(raw, folder=folder, where="demo", output=output)


def corrected_prompt(prompt: FewShotPrompt) -> FewShotPrompt:
    """The demo's prompt with the labels that were made wrong on purpose put right."""
    rows = (
        (files("proxyprompt") / "demo_data" / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    )
    right = {}
    for row in map(json.loads, filter(None, rows)):
        note = row.get("note", "")
        if note.startswith("mislabelled (should be "):
            right[row["id"]] = note[len("mislabelled (should be ") :].rstrip(")")
    return replace(
        prompt,
        demonstrations=tuple(replace(d, output=right.get(d.id, d.output)) for d in prompt.demonstrations),
    )


def backdrop(config: RunConfig, ledger: Ledger, observer: Observer) -> tuple[DemoBackdrop, ...]:
    """What the mislabelled demonstrations do to each model, on the select queries."""
    queries = config.splits["select"]
    ends = np.array([[False], [True]]).repeat(config.prompt.n_units, axis=1)
    out = []
    backends: list[tuple[CallRole, Backend]] = [("target", config.target)]
    backends += [("proxy", proxy) for proxy in config.proxies]
    for role, backend in backends:
        meter = Meter(backend, ledger, role=role, run="demo-backdrop", on_tokens=observer.tokens)

        def accuracy(prompt: FewShotPrompt, rows: Any, meter: Meter = meter) -> Any:
            function = PromptValueFunction(prompt, config.task, queries, meter, "backdrop", observer.progress)
            return np.nanmean(function.evaluate(rows).performance, axis=1)

        zero, shipped = accuracy(config.prompt, ends)
        (corrected,) = accuracy(corrected_prompt(config.prompt), ends[1:])
        out.append(DemoBackdrop(backend.name, float(zero), float(shipped), float(corrected), len(queries)))
    return tuple(out)
