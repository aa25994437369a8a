"""The report as Markdown for a pull request: the figures, the reasons and the evidence, without charts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import _text as t
from ._view import build, performance_format

__all__ = ["escape", "render_markdown"]

_TEXT = 200  # characters of a demonstration
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "|": "&#124;"}


def escape(text: str) -> str:
    r"""Make ``text`` inert in GitHub-flavoured Markdown: no markup, link, image, mention, cell border.

    Examples
    --------
    >>> escape("[a](b) <i>")
    '\\[a\\](b) &lt;i&gt;'
    """
    text = t.one_line(text)
    text = re.sub(r"[\\`*_\[\]#~$]", r"\\\g<0>", text)
    text = re.sub(r"[&<>@|]", lambda m: _ENTITIES[m.group()], text)
    # GitHub links bare addresses on its own; a colon or dot written as an entity is not seen as one.
    text = re.sub(r":(?=//)|(?i:(?<=mailto)):|(?i:(?<=xmpp)):", "&#58;", text)
    text = re.sub(r"(?i)\bwww\.", lambda m: m.group()[:-1] + "&#46;", text)
    # What would open a list, a rule or an underlined heading at the start of a paragraph.
    return re.sub(r"^(?:[-+](?=\s|$)|[-=](?=[-=\s]*$)|\d+(?=[.)](?:\s|$)))", _defuse_start, text)


def _defuse_start(match: re.Match[str]) -> str:
    start = match.group()
    return f"&#{ord(start[0])};{start[1:]}"


def render_markdown(summary: Mapping[str, Any]) -> str:
    """Render a summary as GitHub-flavoured Markdown.

    Parameters
    ----------
    summary : mapping
        JSON-safe summary of a run, schema 1.

    Returns
    -------
    str
        Text that ends with a line feed. User text is escaped; it can start no markup of its own.

    Raises
    ------
    ArtifactError, InputError
        If the summary has another version or a value of the wrong kind.
    """
    view = build(summary)
    parts = [
        f"# {escape(view['verdict']['headline'])}",
        f"**{view['status']['label']}.** {escape(view['title'])}; "
        f"target model {escape(view['target']['name'])}; {escape(view['when'])}.",
        _table(
            ["", "Result", "Note"],
            [
                [f["label"], f"{f['before']} \u2192 {f['after']}" if f["before"] else f["after"], f["note"]]
                for f in view["figures"]
            ],
        ),
        *(escape(s) for s in view["verdict"]["sentences"]),
        *_removals(view),
        *_evidence(view),
        *_screening(view),
        *_cost(view),
        "## Limits",
        "\n".join(f"- {escape(s)}" for s in view["limits"]) or "None stated.",
        f"ProxyPrompt {escape(view['version'])}",
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _removals(view: dict[str, Any]) -> list[str]:
    proposal = view["verdict"]["status"] == "not_certified"
    parts = [
        "## What to remove and why",
        escape(view["explained"]),
        f"Unit: {escape(view['attribution_unit'])}.",
    ]
    if not view["n_removed"]:
        parts.append("Nothing was removed.")
    for group in view["groups"]:
        state = "kept" if group["kept"] else ("proposed for removal" if proposal else "removed")
        parts.append(f"### {group['title']} ({state}, {len(group['rows'])})")
        parts.append(
            _table(
                ["Id", "Text", "Answer", "Attribution \u00b1 standard error", "Why"],
                [
                    [
                        t.clip(d["id"], 60),
                        "text not shown" if d["input"] is None else t.clip(t.one_line(d["input"]), _TEXT),
                        t.clip(t.one_line(d["output"] or ""), _TEXT),
                        f"{d['credit']}, {d['source']}",
                        f"{d['reason']} {d['checked']}",
                    ]
                    for d in group["rows"]
                ],
            )
        )
    return [*parts, *_verified(view), *_cleaning(view)]


def _verified(view: dict[str, Any]) -> list[str]:
    found = view["verification"]
    if found is None:
        return []
    n = t.plural(found["n_queries"], "query", "queries")
    return [
        "## What the proxy proposed and the target measured",
        escape(found["text"]),
        f"What is measured of a demonstration: {escape(found['estimand'])}, on {n}. The proxy's estimates are in its own"
        " scale.",
        _table(
            ["Order", "Id", "The proxy's estimate", "Measured on the target", "Not measured", "Result"],
            [
                [
                    r["place"],
                    t.clip(r["id"], 60),
                    r["estimate"],
                    r["measured"] if r["source"] == "measured" else "\u2013",
                    "" if r["source"] == "measured" else f"not measured; {r['expected']}",
                    r["verdict"],
                ]
                for r in view["verified"]
            ],
        ),
    ]


def _cleaning(view: dict[str, Any]) -> list[str]:
    found = view["cleaning"]
    if found is None:
        return []
    parts = ["## How the harmful ones were checked", escape(found["text"])]
    parts += [f"Round {k}: {escape(r['text'])}" for k, r in enumerate(found["rounds"], 1)]
    if found["relabel_text"] is not None:
        parts += ["### Labels that the target contradicts", escape(found["relabel_text"])]
    if view["relabels"]:
        header = ["Id", "Label", "The target answers", "Probability", "Evidence"]
        keys = ("id", "label", "answer", "probability", "evidence")
        parts.append(_table(header, [[t.clip(row[key], 60) for key in keys] for row in view["relabels"]]))
    return parts


def _evidence(view: dict[str, Any]) -> list[str]:
    name = view["performance_name"]
    show, unit = performance_format(name), view["sequence_unit"]
    parts = [
        "## Before and after",
        _table(
            ["Prompt", "Demonstrations", "Tokens", name, "95 % interval"],
            [[p["name"], p["n"], p["tokens"], p["value"], p["interval"]] for p in view["prompts"]],
        ),
    ]
    found = view["certificate"]
    if found is None:
        parts.append("No certificate: the figures above are estimates without a guarantee.")
    else:
        parts += [escape(" ".join(view["certificate_sentences"])), escape(found["power_statement"])]
        if view["sequence"]:
            parts.append(
                _table(
                    ["Kept", name, f"Above the line{unit}", view["sequence_bound"], "Result"],
                    [
                        [s["n_kept"], s["performance"], s["difference"], s["lower_bound"], s["outcome"]]
                        for s in view["sequence"]
                    ],
                )
            )
    curve = view["curve"]
    if curve["points"]:
        parts.append(
            f"{escape(name)} on the {escape(curve['split'])} split; to hold: {show(curve['tau_line'])}"
        )
        parts.append(
            _table(
                ["Kept", name, "95 % interval", "Queries", ""],
                [
                    [
                        t.count(p["n_kept"]),
                        show(p["value"]),
                        t.interval(show(p["low"]), show(p["high"])),
                        t.count(p["n"]),
                        " ".join(w for w, on in (("chosen", p["chosen"]), ("full prompt", p["full"])) if on),
                    ]
                    for p in curve["points"]
                ],
            )
        )
    parts += [escape(s) for s in curve["choice"] or ()]
    return parts


def _screening(view: dict[str, Any]) -> list[str]:
    if view["screening"] is None:
        return ["## May the proxy stand in?", "No proxy model was screened."]
    rows = []
    for p in view["proxies"]:
        facts = "; ".join(f"{k}: {v}" for k, v in p["facts"])
        paper = f" The paper's rule would have said: {p['paper']}" if p["paper"] else ""
        rows.append([p["name"], p["label"], facts, f"{p['note']}{paper}"])
    return [
        "## May the proxy stand in?",
        escape(" ".join(filter(None, (view["screening"][key] for key in ("text", "power", "noise"))))),
        _table(["Proxy", "Decision", "Evidence", "Note"], rows),
    ]


def _cost(view: dict[str, Any]) -> list[str]:
    rows = [
        [
            s["name"],
            s["role"],
            *(t.count(s[k]) for k in ("calls_bought", "calls_reused", "tokens_bought", "tokens_reused")),
        ]
        for s in view["cost"]["stages"]
    ]
    parts = [
        "## What it cost, what it saves",
        *(escape(s) for s in view["money_sentences"]),
    ]
    if view["money_rows"]:
        header = ["Per call", "Full prompt", "Smaller prompt", "1,000 calls save", "Run paid after"]
        keys = ("name", "before", "after", "saved", "pays")
        parts.append(_table(header, [[row[key] for key in keys] for row in view["money_rows"]]))
    parts += [escape(s) for s in view["money_notes"]] + [escape(view["crr_sentence"])]
    if view["crr_terms"]:
        parts.append(
            _table(
                ["Term of the ratio", "Calls", "Tokens", "Money"],
                [[r["name"], r["calls"], r["tokens"], r["money"]] for r in view["crr_terms"]],
            )
        )
    if rows:
        header = ["Stage", "Model", "Calls bought", "Calls reused", "Tokens bought", "Tokens reused"]
        parts.append(_table(header, rows))
    return parts


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(header), "|" + " --- |" * len(header), *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"
