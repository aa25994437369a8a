"""What proxies proposed and the target measured: rows, drawing and marks that keep the two apart."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from . import _text as t
from .svg import COLOURS, Box, Canvas, Labels, Scale, linear_ticks, text_width

__all__ = ["mark", "verification_chart", "verification_legend", "verification_rows"]

_Row = Mapping[str, Any]
_QUESTIONS = {"harmful": "harmful", "top": "most useful", "all": "harmful"}


def verification_rows(found: _Row | None) -> list[dict[str, Any]]:
    """A row a unit: measured ones in the order they were measured, then the others, the most likely to matter first.

    Lists that are too short, and numbers that name no unit, leave gaps.
    """
    if found is None:
        return []
    n = len(found["unit_ids"])
    order = list(dict.fromkeys(_indices(found["order"], n)))
    named, audits = set(_indices(found["named"], n)), set(_indices(found["audits"], n))
    undecided = set(_indices(found["undecided"], n))
    rest = [i for i in range(n) if i not in set(order)]
    rest.sort(key=lambda i: -(_at(found["chance"], i) or 0.0))
    rows = []
    for place, i in enumerate([*order, *rest], 1):
        measured = i in set(order) and _at(found["measured"], i) is not None
        key = "measured" if measured else "expected"
        value, error = _at(found[key], i), _at(found[f"{key}_error"], i)
        shown = _pair(value, error)
        verdict = _QUESTIONS[found["decision"]] if i in named else "undecided" if i in undecided else ""
        if not measured:
            verdict = f"chance to change the answer {t.share(_at(found['chance'], i))}"
        rows.append(
            {
                "unit": i,
                "id": found["unit_ids"][i],
                "place": t.count(place) if measured else "\u2013",
                "source": "measured" if measured else "estimated",
                "estimate": _pair(_at(found["estimated"], i), _at(found["estimated_error"], i)),
                "measured": shown if measured else "not measured",
                "expected": ""
                if measured
                else f"expected {shown}"
                if value is not None
                else "nothing to expect it by",
                "verdict": ", ".join(
                    filter(None, (verdict, "drawn at random" if i in audits and measured else ""))
                ),
                "named": i in named,
                "x": _at(found["estimated"], i),
                "y": value,
                "error": error or 0.0,
            }
        )
    return rows


def mark(name: str, source: str, *, named: bool = False) -> str:
    """Filled for a measurement, hollow for what was not measured."""
    what = "measured on the target" if source == "measured" else "not measured: estimated"
    canvas = Canvas(14, 14, name=name, title=what, description=what, classes="swatch")
    _dot(canvas, 7, 7, 4.5, source, named)
    return canvas.render()


def verification_legend(rows: Sequence[_Row], found: _Row) -> list[tuple[str, str]]:
    """Marks and their meaning, of those that occur."""
    kinds = [
        ("measured", True, f"measured on the target, {_QUESTIONS[found['decision']]}"),
        ("measured", False, "measured on the target"),
        ("estimated", False, "not measured: what its estimate lets expect"),
    ]
    present = {(r["source"], r["named"]) for r in rows}
    return [
        (mark(f"verified-{k}", source, named=named), words)
        for k, (source, named, words) in enumerate(kinds)
        if (source, named) in present
    ]


def verification_chart(rows: Sequence[_Row], found: _Row | None, width: float, name: str) -> str:
    """The target's effect against the proxies' estimate; measured units filled, the others hollow and dashed.

    Returns
    -------
    str
        Markup; empty if no unit has both numbers.
    """
    points = [r for r in rows if r["x"] is not None and r["y"] is not None]
    if found is None or not points:
        return ""
    x, x_ticks, x_names = _axis([r["x"] for r in points], 5 if width < 500 else 8)
    y, y_ticks, y_names = _axis([r["y"] + s * r["error"] for r in points for s in (-1, 0, 1)], 6)
    height = 330.0 if width > 500 else 310.0
    left = max(text_width(w, 12) for w in y_names) + 14
    across = Scale(*x, left + 10, width - 22)
    up = Scale(*y, height - 56, 28)
    n = sum(r["source"] == "measured" for r in points)
    canvas = Canvas(
        width,
        height,
        name=name,
        title="Effects on the target against the proxies' estimates",
        description=f"{t.plural(n, 'demonstration')} measured on the target (filled marks), {t.count(len(points) - n)} not"
        " measured (hollow marks, at what their estimate lets expect).",
    )
    canvas.text(0, 12, "effect on the target")
    canvas.y_axis(up, y_ticks, y_names, left, width - 12)
    if y[0] < 0 < y[1]:
        canvas.line(left, up(0), width - 12, up(0), "muted")
    right = -math.inf
    for tick, words in zip(x_ticks, x_names, strict=True):
        half = text_width(words, 12) / 2
        if across(tick) - half > right + 6:
            canvas.line(across(tick), height - 52, across(tick), height - 48, "muted")
            canvas.text(across(tick), height - 34, words, anchor="middle")
            right = across(tick) + half
    canvas.line(left, height - 52, width - 12, height - 52, "muted")
    canvas.text(
        (left + width - 12) / 2, height - 12, "the proxies' estimate, in their own scale", anchor="middle"
    )
    _marks(canvas, points, across, up)
    return canvas.render()


def _marks(canvas: Canvas, points: Sequence[_Row], across: Scale, up: Scale) -> None:
    for r in sorted(points, key=lambda r: (r["source"] == "measured", r["named"])):
        cx, cy = across(r["x"]), up(r["y"])
        colour = _colour(r["source"], r["named"])
        dash = "" if r["source"] == "measured" else "2 3"
        canvas.line(cx, up(r["y"] - r["error"]), cx, up(r["y"] + r["error"]), colour, dash=dash, width=1.3)
        dot = _dot(canvas, cx, cy, 5, r["source"], r["named"])
        said = r["measured"] if r["source"] == "measured" else f"not measured, {r['expected']}"
        ET.SubElement(
            dot, "title"
        ).text = f"{t.clip(t.one_line(r['id']), 40)}: estimate {r['estimate']}; {said}"
    spots = [Box(across(r["x"]) - 6, up(r["y"]) - 6, across(r["x"]) + 6, up(r["y"]) + 6) for r in points]
    labels = Labels(Box(across.start - 10, 16, canvas.width - 4, canvas.height - 56), spots)
    for r in points:
        if not r["named"]:
            continue
        label, cx, cy = t.clip(t.one_line(r["id"]), 16), across(r["x"]), up(r["y"])
        around = [(cx + 9, cy + 4, "start"), (cx - 9, cy + 4, "end")]
        around += [(cx, cy - 10, "middle"), (cx, cy + 18, "middle")]
        spot = labels.place(label, 12, around)
        if spot is not None:
            canvas.text(spot[0], spot[1], label, anchor=spot[2], classes="ink halo")


def _dot(canvas: Canvas, cx: float, cy: float, radius: float, source: str, named: bool) -> ET.Element:
    colour = _colour(source, named)
    if source == "measured":
        look = {"class": f"mark-measured f-{colour}", "fill": COLOURS[colour]}
    else:
        look = {
            "class": f"mark-estimated f-paper s-{colour}",
            "fill": COLOURS["paper"],
            "stroke": COLOURS[colour],
            "stroke-width": "1.8",
        }
    return canvas.add("circle", None, look, cx=cx, cy=cy, r=radius)


def _colour(source: str, named: bool) -> str:
    return "muted" if source != "measured" else "harmful" if named else "useful"


def _axis(values: Sequence[float], n: int) -> tuple[tuple[float, float], list[float], list[str]]:
    low, high = min(values), max(values)
    pad = 0.07 * (high - low) if high - low > 1e-9 else 1.0
    low, high = low - pad, high + pad
    ticks = linear_ticks(low, high, n)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 2
    return (low, high), ticks, [t.signed(v, digits) for v in ticks]


def _pair(value: float | None, error: float | None) -> str:
    if value is None:
        return t.NOT_AVAILABLE
    return t.signed(value) if error is None else f"{t.signed(value)} \u00b1 {t.fixed(error)}"


def _at(values: Sequence[Any], i: int) -> float | None:
    return values[i] if i < len(values) else None


def _indices(values: Sequence[Any], n: int) -> list[int]:
    return [int(v) for v in values if v is not None and v == int(v) and 0 <= v < n]
