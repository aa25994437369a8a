"""Results to a Markdown table and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

AXES = ("demonstrations", "coalitions", "queries")


def _share(part: float) -> str:
    return "all" if part > 0.999 else f"{part:.1%}"


def write_table(results: dict[str, Any], file: Path) -> None:
    """One row per case, then one per contender at the centre."""
    centre_size = list(results["centre"])
    lines = [
        "Seconds are for the whole case on one thread; *timed* is the share of the tokens (engine) or of the",
        "prompts' tokens (the others) that was run; the rest is scaled by tokens. Naive batches read all labels from one",
        "row; captum, shap as called here and ContextCite give one label only.",
        "",
        "| model | demonstrations / coalitions / queries | naive tokens | distinct = computed | engine s (timed) "
        "| naive s (timed) | wall × | CPU × |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in results["models"]:
        for line in model["lines"]:
            engine, naive = line["engine"], line["naive"]
            lines.append(
                f"| {model['model']} | {' / '.join(map(str, line['size']))} | {naive['tokens']:,} "
                f"| {engine['distinct_tokens']:,} | {engine['wall']:.1f} ({_share(engine['share_computed'])}) "
                f"| {naive['wall']:.0f} ({_share(naive['share'])}) | {naive['wall'] / engine['wall']:.1f} "
                f"| {naive['cpu'] / engine['cpu']:.1f} |"
            )
    one = results.get("random")
    if one:
        engine, naive = one["engine"], one["naive"]
        lines.append(
            f"| {one['model']} | {' / '.join(map(str, one['size']))} | {naive['tokens']:,} "
            f"| {engine['distinct_tokens']:,} | {engine['wall']:.1f} ({_share(engine['share_computed'])}) "
            f"| {naive['wall']:.0f} ({_share(naive['share'])}) | {naive['wall'] / engine['wall']:.1f} "
            f"| {naive['cpu'] / engine['cpu']:.1f} |"
        )
    lines += ["", f"At the centre, {' / '.join(map(str, centre_size))}:", ""]
    lines += [
        "| model | contender | batch | seconds (timed) | slower than the engine by |",
        "|---|---|---|---|---|",
    ]
    for model in results["models"]:
        (centre,) = (line for line in model["lines"] if list(line["size"]) == centre_size)
        ours = centre["engine"]["wall"]
        lines.append(
            f"| {model['model']} | engine | | {ours:.1f} ({_share(centre['engine']['share_computed'])}) | 1 |"
        )
        for row in [{"name": "naive transformers batches", **centre["naive"]}, *model["peers"]]:
            if "error" in row:
                lines.append(
                    f"| {model['model']} | {row['name']} | {row['batch']} | did not run: {row['error']} | |"
                )
            else:
                lines.append(
                    f"| {model['model']} | {row['name']} | {row['batch']} | {row['wall']:.0f} "
                    f"({_share(row['share'])}) | {row['wall'] / ours:.1f} |"
                )
    lines += _details(results)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _details(results: dict[str, Any]) -> list[str]:
    """What was measured besides time: arithmetic, threads, exactness, number types, the masked mode, memory."""
    size = " / ".join(map(str, results["centre"]))
    found = ["", "Arithmetic, threads and number types:", ""]
    found += [
        "| model | tokens/s | GFLOP/s (of products of the same shapes) | 2 threads: s, wall × to naive "
        "| max difference to naive (prompts) | bf16 engine: speed, max and mean off | int8: speed, max and mean off |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in results["models"]:
        (centre,) = (line for line in model["lines"] if list(line["size"]) == list(results["centre"]))
        rate, two, types = model["arithmetic"], model["two_threads"], model["number_types"]
        half, int8 = types["bfloat16"], types["int8"]
        found.append(
            f"| {model['model']} | {centre['engine']['tokens_per_second']:.0f} | {rate['engine_gflops']:.0f} of "
            f"{rate['gemm_gflops']:.0f} ({rate['share_of_gemm']:.0%}) | {two['engine_wall']:.0f}, {two['ratio']:.1f} "
            f"| {model['max_difference_to_naive']:.1e} ({model['prompts_compared']}) "
            f"| {half['speed']:.1f} ×, {half['max']:.2f}, {half['mean']:.3f} "
            f"| {int8['speed']:.1f} ×, {int8['max']:.2f}, {int8['mean']:.2f} |"
        )
    one = results.get("random")
    if one:
        rate = one["arithmetic"]
        found.append(
            f"| {one['model']} | {one['engine']['tokens_per_second']:.0f} | {rate['engine_gflops']:.0f} of "
            f"{rate['gemm_gflops']:.0f} ({rate['share_of_gemm']:.0%}) | | {one['max_difference_to_naive']:.1e} (1) | | |"
        )
    found += ["", f"Approximate mode (`approximate=True`) against the exact engine, {size}:", ""]
    found += [
        "| model | queries compared | correlation of values; of their means | max and mean difference, nats "
        "| with all kept | rank correlation of KernelSHAP attributions | tokens/s, exact tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in results["models"]:
        one = model["approximate"]
        found.append(
            f"| {model['model']} | {one['queries_compared']} | {one['correlation_of_values']:.2f}; "
            f"{one['correlation_of_mean_values']:.2f} | {one['max_difference']:.1f}, {one['mean_difference']:.2f} "
            f"| {one['difference_with_all_kept']:.0e} | {one['rank_correlation_of_attributions']:.2f} "
            f"| {one['tokens_per_second']:.0f}, {one['tokens_per_second_exact']:.0f} |"
        )
    found += ["", "| model | case | masked tokens | exact tokens | fewer by |", "|---|---|---|---|---|"]
    for model in results["models"]:
        for case, (masked, exact) in model["approximate"]["tokens_masked_and_exact"].items():
            found.append(f"| {model['model']} | {case} | {masked:,} | {exact:,} | {exact / masked:.1f} |")
    if "memory" in results:
        found += [
            "",
            f"Peak memory of a fresh process, SmolLM2, {size} with other numbers of coalitions:",
            "",
        ]
        found += ["| coalitions | MiB after loading and a small batch | MiB at most |", "|---|---|---|"]
        found += [
            f"| {m['coalitions']} | {m['loaded_mib']:.0f} | {m['peak_mib']:.0f} |" for m in results["memory"]
        ]
    return found


def write_figures(results: dict[str, Any], folder: Path) -> None:
    """Seconds along each axis, engine against naive, one panel per axis."""
    plt.rcParams["svg.hashsalt"] = "engine"
    centre = results["centre"]
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.4), sharey=True)
    for at, (axis, panel) in enumerate(zip(AXES, panels, strict=True)):
        for number, model in enumerate(results["models"]):
            rows = [
                line
                for line in model["lines"]
                if all(line["size"][other] == centre[other] for other in range(3) if other != at)
            ]
            rows.sort(key=lambda line: line["size"][at])
            x = [line["size"][at] for line in rows]
            for who, style in (("naive", "--"), ("engine", "-")):
                panel.plot(
                    x,
                    [line[who]["wall"] for line in rows],
                    style,
                    marker="o",
                    markersize=3,
                    color=f"C{number}",
                    label=f"{model['model']}, {who}",
                )
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(x, [str(value) for value in x])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds, one thread")
    panels[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "growth.svg", metadata={"Date": None})
    plt.close(figure)
