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
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
