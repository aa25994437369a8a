"""The prefix-sharing engine beside naive batches and three peers, on the same model and the same queries.

    python benchmarks/engine/run.py            # about 15 minutes on two cores
    python benchmarks/engine/run.py --brief    # the same cases on smaller shares; about 8 minutes
    python benchmarks/engine/run.py --quick    # a minute, to see that it runs; writes to a temporary folder

What is timed on a share of its work is listed in README.md and marked in the results.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from contenders import PEERS, Parts, Plain, silence
from figures import write_figures, write_table
from scipy.stats import spearmanr

from proxyprompt import Demonstration, FewShotPrompt, KernelSHAP, Query
from proxyprompt.attribution import Design
from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.embedded import embedded, embedded_model_path
from proxyprompt.backends.transformers import TransformersBackend
from proxyprompt.coalitions import shapley_kernel_coalitions

HERE = Path(__file__).parent
MODELS = ("smollm2-135m", "gemma-3-270m")
AXES = ("demonstrations", "coalitions", "queries")
BLOCK = 256


@dataclass(frozen=True)
class Case:
    """A prompt, its coalitions (bool, shape (m, n)) and queries."""

    prompt: FewShotPrompt
    coalitions: np.ndarray
    weights: np.ndarray
    queries: tuple[Query, ...]
    candidates: tuple[str, ...]

    @property
    def n_pairs(self) -> int:
        return len(self.coalitions) * len(self.queries)

    def requests(self, *, masked: bool = False, queries: int | None = None) -> list[ScoreRequest]:
        asked = self.queries[:queries]
        if masked:
            whole = [self.prompt.render(None, query) for query in asked]
            masks = [self.prompt.unit_mask(row) for row in self.coalitions.tolist()]
            return [ScoreRequest(text, self.candidates, mask) for mask in masks for text in whole]
        return [
            ScoreRequest(self.prompt.render(row, query), self.candidates)
            for row in self.coalitions.tolist()
            for query in asked
        ]


def make_case(n_units: int, n_coalitions: int, n_queries: int) -> Case:
    """Messages of the built-in example; the first 64 in a fixed random order are demonstrations."""
    folder = files("proxyprompt") / "demo_data"
    rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    order = np.random.default_rng(0).permutation(len(rows))
    taken = [rows[index] for index in order]
    prompt = FewShotPrompt(
        tuple(Demonstration(row["id"], {"input": row["input"]}, row["label"]) for row in taken[:n_units]),
        instruction=settings["instruction"],
        demonstration_template=settings["demonstration_template"],
        separator=settings["separator"],
    )
    coalitions, weights = shapley_kernel_coalitions(n_units, n_coalitions, rng=np.random.default_rng(1))
    queries = tuple(
        Query(row["id"], {"input": row["input"]}, row["label"]) for row in taken[64 : 64 + n_queries]
    )
    return Case(
        prompt, coalitions, weights, queries, tuple(prompt.candidate(label) for label in settings["labels"])
    )


class Clock:
    """Wall and processor seconds of a block."""

    def __enter__(self) -> Clock:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def run_engine(
    backend: Any, requests: Sequence[ScoreRequest], budget: int | None
) -> tuple[dict[str, Any], Any]:
    """Score a whole batch, or its first ``budget`` tokens; values are NaN where not reached."""
    plan = backend.plan(requests[:1])
    _ = backend.shares_prefixes
    values = np.full((len(requests), len(requests[0].candidates)), np.nan)
    tokens: list[int] = []
    n_rows = 0
    with Clock() as preparing:
        blocks = backend.score(requests, on_tokens=tokens.append)
    with Clock() as computing:
        for block in blocks:
            for index, result in block:
                values[index] = result.logprobs
            n_rows += len(block)
            if budget is not None and sum(tokens) >= budget:
                break
    blocks.close()
    plan = backend.plan(requests)
    done = sum(tokens)
    scale = plan.distinct_tokens / done
    return {
        "distinct_tokens": plan.distinct_tokens,
        "naive_tokens_per_label": plan.naive_tokens,
        "computed_tokens": done,
        "share_computed": done / plan.distinct_tokens,
        "rows_read": n_rows,
        "prepare_wall": preparing.wall,
        "compute_wall": computing.wall,
        "tokens_per_second": done / computing.wall,
        "wall": preparing.wall + computing.wall * scale,
        "cpu": preparing.cpu + computing.cpu * scale,
    }, values


def run_naive(
    plain: Plain, case: Case, n_sample: int, batch: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Time a random sample of (coalition, query) pairs and scale to the tokens of all of them."""
    chosen = rng.choice(case.n_pairs, size=min(n_sample, case.n_pairs), replace=False)
    coalitions = case.coalitions.tolist()
    every = plain.count(case.requests())
    before, padded = plain.tokens, plain.padded
    with Clock() as clock:
        prompts = [
            case.prompt.render(coalitions[i], case.queries[j])
            for i, j in zip(*np.divmod(chosen, len(case.queries)), strict=True)
        ]
        values = plain.logprobs(prompts, batch)
    tokens = plain.tokens - before
    scale = every / tokens
    return {
        "pairs_timed": len(chosen),
        "share": 1 / scale,
        "batch": batch,
        "tokens": every,
        "padding": (plain.padded - padded) / tokens,
        "tokens_per_second": tokens / clock.wall,
        "wall": clock.wall * scale,
        "cpu": clock.cpu * scale,
        "chosen": chosen,
        "values": values,
    }


def run_peers(plain: Plain, case: Case, n_samples: int) -> list[dict[str, Any]]:
    """Time each peer on one query and scale to all pairs by the tokens it read."""
    parts = Parts(case.prompt, case.queries[0])
    every = plain.count(case.requests())
    found: list[dict[str, Any]] = []
    for name, (module, function, batches) in PEERS.items():
        best: dict[str, Any] | None = None
        try:
            with silence():  # one of them tries to download something when it is imported
                import_module(module)
        except ImportError as error:
            found.append({"name": name, "batch": 0, "error": f"not installed ({error})"})
            continue
        for batch in batches:
            before, tokens = plain.rows, plain.tokens
            try:
                with silence(), Clock() as clock:
                    function(plain, parts, 0, n_samples, batch)
            except Exception as error:  # a peer that cannot run is a result, not an end
                found.append(
                    {"name": name, "batch": batch, "error": f"{type(error).__name__}: {error}"[:200]}
                )
                continue
            # Peers draw their own coalitions; scaling by tokens puts them on ours.
            scale = every / (plain.tokens - tokens)
            row = {"name": name, "batch": batch, "pairs_timed": plain.rows - before, "share": 1 / scale}
            row |= {"wall": clock.wall * scale, "cpu": clock.cpu * scale}
            best = row if best is None or row["wall"] < best["wall"] else best
        if best is not None:
            found.append(best)
    return found


def measure_gemm(model: Any, rows: int = BLOCK) -> dict[str, float]:
    """Rate of the matrix products of all layers, ``rows`` tokens at a time, in FLOP/s."""
    shapes: dict[tuple[int, int], int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            shapes[layer.in_features, layer.out_features] = (
                shapes.get((layer.in_features, layer.out_features), 0) + 1
            )
    seconds = flops = 0.0
    for (n_in, n_out), count in shapes.items():
        # Distinct weights per call, as in a model: one reused matrix would sit in the cache.
        weights = [torch.randn(n_out, n_in) for _ in range(min(count, 8))]
        x = torch.randn(rows, n_in)
        best = float("inf")
        for _ in range(4):
            begun = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(x, weight)
            best = min(best, (time.perf_counter() - begun) / len(weights))
        seconds += best * count
        flops += 2.0 * rows * n_in * n_out * count
    return {"flops_per_second": flops / seconds, "flops_per_token": flops / rows}


def arithmetic(model: Any, engine: dict[str, Any], gemm: dict[str, float]) -> dict[str, float]:
    """FLOP/s of the engine in layers' and head's products, as a share of the measured products' rate."""
    config = model.config.get_text_config(decoder=True)
    flops = engine["computed_tokens"] * gemm["flops_per_token"]
    flops += 2.0 * engine["rows_read"] * config.hidden_size * config.vocab_size
    rate = flops / engine["compute_wall"]
    return {
        "engine_gflops": rate / 1e9,
        "gemm_gflops": gemm["flops_per_second"] / 1e9,
        "share_of_gemm": rate / gemm["flops_per_second"],
    }


def utility(values: np.ndarray, case: Case, n_queries: int) -> np.ndarray:
    """Log-probability of the reference among the labels, shape (n_coalitions, n_queries); nats."""
    normal = values - np.logaddexp.reduce(values, axis=1, keepdims=True)
    shaped = normal.reshape(len(case.coalitions), n_queries, -1)
    labels = [case.candidates.index(case.prompt.candidate(q.reference)) for q in case.queries[:n_queries]]
    return shaped[:, np.arange(n_queries), labels]


def compare_attributions(case: Case, exact: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How far values of (coalitions, queries) and the KernelSHAP attributions made from them agree."""
    design = Design(case.coalitions, case.weights, False)
    ours, theirs = (KernelSHAP().fit(design, values).mean for values in (exact, other))
    full = case.coalitions.all(axis=1)
    return {
        "correlation_of_values": float(np.corrcoef(exact.ravel(), other.ravel())[0, 1]),
        "correlation_of_mean_values": float(np.corrcoef(exact.mean(1), other.mean(1))[0, 1]),
        "max_difference": float(np.abs(exact - other).max()),
        "mean_difference": float(np.abs(exact - other).mean()),
        "difference_with_all_kept": float(np.abs(exact - other)[full].max()),
        "rank_correlation_of_attributions": float(spearmanr(ours, theirs)[0]),
    }


def bench_model(name: str, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    backend = embedded(name, threads=1)
    folder = embedded_model_path(name)
    case = make_case(*sizes.centre)
    plain = Plain(folder, case.candidates)
    gemms = [measure_gemm(plain.model)]
    for batch in (1, 8):
        run_naive(plain, case, 4, batch, rng)
    tried = {batch: run_naive(plain, case, sizes.pairs, batch, np.random.default_rng(3)) for batch in (1, 8)}
    batch = min(tried, key=lambda size: tried[size]["wall"])
    say(f"{name}: naive batch of {batch}")

    lines = {}
    for axis, values in zip(AXES, sizes.axes, strict=True):
        for value in values:
            key = tuple((dict(zip(AXES, sizes.centre, strict=True)) | {axis: value}).values())
            if key == sizes.centre:
                continue
            here = make_case(*key)
            engine, _ = run_engine(backend, here.requests(), sizes.tokens)
            naive = run_naive(plain, here, sizes.pairs, batch, rng)
            lines[key] = {"size": key, "engine": engine, "naive": _public(naive)}
            say(f"{name} {key}: {naive['wall'] / engine['wall']:.1f} x")

    n_queries = sizes.centre_queries[name]
    engine, values = run_engine(backend, case.requests(queries=n_queries), None)
    gemms.append(measure_gemm(plain.model))
    gemm = max(gemms, key=lambda one: one["flops_per_second"])
    rates = arithmetic(plain.model, engine, gemm)
    say(f"{name} centre, {n_queries} queries: {engine['wall']:.0f} s, {rates}")
    if n_queries < sizes.centre[2]:
        plan = backend.plan(case.requests())
        scale = plan.distinct_tokens / engine["distinct_tokens"]
        engine |= {"distinct_tokens": plan.distinct_tokens, "naive_tokens_per_label": plan.naive_tokens}
        engine |= {"wall": engine["wall"] * scale, "cpu": engine["cpu"] * scale, "share_computed": 1 / scale}
    naive = tried[batch]
    coalition, query = np.divmod(naive["chosen"], sizes.centre[2])
    both = query < n_queries
    off = np.abs(values[coalition[both] * n_queries + query[both]] - naive["values"][both])
    lines[sizes.centre] = {"size": sizes.centre, "engine": engine, "naive": _public(naive)}
    peers = run_peers(plain, case, sizes.peer_samples)
    say(
        f"{name} centre: naive {naive['wall'] / engine['wall']:.1f} x; "
        + ", ".join(
            f"{p['name']} {p['wall'] / engine['wall']:.1f} x" if "wall" in p else f"{p['name']}: {p['error']}"
            for p in peers
        )
    )

    found = {
        "model": name,
        "lines": [lines[key] for key in sorted(lines)],
        "peers": peers,
        "max_difference_to_naive": float(off.max(initial=0.0)),
        "prompts_compared": int(both.sum()),
        "arithmetic": rates,
        "approximate": bench_approximate(name, case, values, n_queries, engine, sizes),
        "number_types": bench_number_types(name, case, plain, sizes),
        "two_threads": bench_two_threads(name, case, plain, batch, sizes),
    }
    say(f"{name}: {found['approximate']} {found['number_types']} {found['two_threads']}")
    return found


def bench_approximate(
    name: str, case: Case, exact: np.ndarray, n_exact: int, engine: dict[str, Any], sizes: Sizes
) -> dict[str, Any]:
    """Speed and agreement at the centre, and what the mode would compute for longer prompts."""
    backend = embedded(name, threads=1, approximate=True)
    n_queries = min(sizes.masked_queries, n_exact)
    measured, values = run_engine(backend, case.requests(masked=True, queries=n_queries), None)
    exact = exact.reshape(len(case.coalitions), n_exact, -1)[:, :n_queries].reshape(values.shape)
    agreement = compare_attributions(case, utility(exact, case, n_queries), utility(values, case, n_queries))
    tokens = {}
    plain = embedded(name, threads=1)
    for key in (sizes.centre, *sizes.long):
        here = make_case(*key)
        exactly = plain.plan(here.requests()).distinct_tokens
        tokens["/".join(map(str, key))] = [backend.plan(here.requests(masked=True)).distinct_tokens, exactly]
    return {
        "queries_compared": n_queries,
        "tokens_per_second": measured["tokens_per_second"],
        "tokens_per_second_exact": engine["tokens_per_second"],
        "tokens_masked_and_exact": tokens,
        **agreement,
    }


def bench_number_types(name: str, case: Case, plain: Plain, sizes: Sizes) -> dict[str, Any]:
    """bf16 in the engine and dynamic int8 in the plain model, against float32 of the same path."""
    few = case.requests(queries=2)[: 2 * sizes.few_coalitions]
    exact, reference = run_engine(embedded(name, threads=1), few, None)
    half, halved = run_engine(embedded(name, threads=1, dtype="bfloat16"), few, None)
    prompts = [str(request.prompt) for request in few][: sizes.pairs]
    with Clock() as full:
        float32 = plain.logprobs(prompts, 1)
    with silence():
        quantized = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(plain.model), {torch.nn.Linear}, dtype=torch.qint8
        )
    with Clock() as small, silence():
        int8 = plain.logprobs(prompts, 1, quantized)
    return {
        "bfloat16": _deviation(reference, halved, exact["compute_wall"] / half["compute_wall"]),
        "int8": _deviation(float32, int8, full.wall / small.wall),
    }


def _deviation(exact: np.ndarray, other: np.ndarray, speed: float) -> dict[str, float]:
    off = np.abs(exact - other)
    return {"speed": speed, "max": float(off.max()), "mean": float(off.mean()), "prompts": len(exact)}


def bench_two_threads(name: str, case: Case, plain: Plain, batch: int, sizes: Sizes) -> dict[str, float]:
    torch.set_num_threads(2)
    try:
        engine, _ = run_engine(embedded(name, threads=2), case.requests(), 2 * sizes.tokens)
        naive = run_naive(plain, case, sizes.pairs, batch, np.random.default_rng(3))
    finally:
        torch.set_num_threads(1)
    return {
        "engine_wall": engine["wall"],
        "naive_wall": naive["wall"],
        "ratio": naive["wall"] / engine["wall"],
    }


def bench_random_model(sizes: Sizes) -> dict[str, Any]:
    """A Qwen2 of about 0.5 B parameters with random weights: the same work at another shape."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    source = embedded_model_path(MODELS[0])
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    case = make_case(*sizes.random)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        backend = TransformersBackend(folder, threads=1, name="random Qwen2 0.5B")
        plain = Plain(Path(folder), case.candidates)
        engine, values = run_engine(backend, case.requests(), sizes.tokens)
        gemm = measure_gemm(plain.model)
        naive = run_naive(plain, case, max(4, sizes.pairs // 3), 1, np.random.default_rng(4))
        prompt = str(case.requests()[int(np.flatnonzero(~np.isnan(values[:, 0]))[0])].prompt)
        exact = plain.logprobs([prompt], 1)[0]
    off = float(np.abs(values[~np.isnan(values[:, 0])][0] - exact).max())
    return {
        "model": "random-weight Qwen2, 0.49 B parameters",
        "size": sizes.random,
        "engine": engine,
        "naive": _public(naive),
        "ratio": naive["wall"] / engine["wall"],
        "arithmetic": arithmetic(plain.model, engine, gemm),
        "max_difference_to_naive": off,
    }


def bench_memory(sizes: Sizes) -> list[dict[str, float]]:
    """Peak memory of a fresh process per number of coalitions; each prepares its batch whole."""
    found = []
    for n_coalitions in sizes.axes[1]:
        size = [str(sizes.centre[0]), str(n_coalitions), str(sizes.centre[2])]
        command = [sys.executable, __file__, "--memory-of", *size, "--tokens", str(sizes.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return found


def peak_mib() -> float:
    """Peak of this process; Linux's ru_maxrss would begin at the peak of the process that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (line,) = (row for row in status.read_text().splitlines() if row.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def memory_of(size: Sequence[int], tokens: int) -> None:
    """Print the peak after loading and one small batch, and after the batch of ``size``."""
    backend = embedded(MODELS[0], threads=1)
    run_engine(backend, make_case(size[0], 2, 1).requests(), None)
    loaded = peak_mib()
    run_engine(backend, make_case(*size).requests(), tokens)
    peak = peak_mib()
    print(json.dumps({"coalitions": size[1], "loaded_mib": loaded, "peak_mib": peak}))


def _public(naive: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in naive.items() if key not in ("chosen", "values")}


@dataclass(frozen=True)
class Sizes:
    """Cases, and how much of them is computed; ``tokens`` and ``pairs`` per case away from the centre."""

    centre: tuple[int, int, int]
    axes: tuple[tuple[int, ...], ...]
    long: tuple[tuple[int, int, int], ...]
    random: tuple[int, int, int]
    tokens: int
    pairs: int
    peer_samples: int
    centre_queries: dict[str, int]
    masked_queries: int
    few_coalitions: int


FULL = Sizes(
    centre=(16, 128, 20),
    axes=((8, 16, 32, 64), (32, 128, 512), (1, 20, 100)),
    long=((64, 128, 1), (64, 128, 20)),
    random=(16, 64, 4),
    tokens=2000,
    pairs=12,
    peer_samples=16,
    centre_queries={"smollm2-135m": 20, "gemma-3-270m": 4},
    masked_queries=4,
    few_coalitions=12,
)
BRIEF = replace(
    FULL,
    tokens=1000,
    pairs=6,
    peer_samples=8,
    centre_queries={"smollm2-135m": 8, "gemma-3-270m": 2},
    masked_queries=2,
    few_coalitions=6,
)
QUICK = Sizes(
    centre=(5, 18, 2),
    axes=((5, 6), (18, 20), (2, 3)),
    long=((8, 8, 1),),
    random=(3, 4, 1),
    tokens=200,
    pairs=3,
    peer_samples=4,
    centre_queries={"smollm2-135m": 2, "gemma-3-270m": 1},
    masked_queries=1,
    few_coalitions=2,
)


def describe_machine() -> dict[str, Any]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        processor = lines[0] if lines else processor
    packages = ("torch", "transformers", "numpy", "captum", "shap", "context-cite")
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "processor": processor,
        "cores": os.cpu_count(),
        **{package: of(package) for package in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shares; results go to a temporary folder")
    parser.add_argument("--brief", action="store_true", help="the same cases on smaller shares")
    parser.add_argument("--out", type=Path, help="where results go (default: results/ beside this file)")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument(
        "--again",
        action="store_true",
        help="measure --models anew and keep the rest of the results there are",
    )
    parser.add_argument("--memory-of", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        memory_of(arguments.memory_of, arguments.tokens)
        return
    sizes = QUICK if arguments.quick else BRIEF if arguments.brief else FULL
    out = arguments.out or (Path(tempfile.mkdtemp()) if arguments.quick else HERE / "results")
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begun:5.0f} s] {text}", flush=True)

    results: dict[str, Any] = {"machine": describe_machine(), "sizes": asdict(sizes), "centre": sizes.centre}
    kept = json.loads((out / "results.json").read_text(encoding="utf-8")) if arguments.again else {}
    if kept and kept["machine"] != results["machine"]:
        parser.error(f"--again: the results in {out} are of another machine, day or version; run everything.")
    results["models"] = [m for m in kept.get("models", ()) if m["model"] not in arguments.models]
    spent = kept.get("seconds", 0)

    def save() -> None:
        results["models"].sort(key=lambda model: MODELS.index(model["model"]))
        results["seconds"] = spent + round(time.perf_counter() - begun)
        (out / "results.json").write_text(
            json.dumps(results, indent=1, default=_plain) + "\n", encoding="utf-8"
        )

    for name in arguments.models:
        results["models"].append(bench_model(name, sizes, say))
        save()
    results["memory"] = kept.get("memory") or bench_memory(sizes)
    say(f"memory {results['memory']}")
    results["random"] = kept.get("random") or bench_random_model(sizes)
    say(f"random {results['random']['ratio']:.1f} x, {results['random']['arithmetic']}")
    save()
    write_table(results, out / "table.md")
    write_figures(results, out)
    say(f"written to {out}")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else list(value)


if __name__ == "__main__":
    main()
