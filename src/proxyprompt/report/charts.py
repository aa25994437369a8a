"""The charts of the report, each a function from checked summary values to SVG markup."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from . import _text as t
from ._view import performance_format
from .marks import filling
from .svg import COLOURS, Box, Canvas, Labels, Scale, linear_ticks, log_ticks, path, text_width

__all__ = ["attribution_chart", "curve_chart", "evidence_chart"]

_Row = Mapping[str, Any]
_MAX_PATH_POINTS = 400


def curve_chart(view: _Row, width: float, name: str) -> str:
    """Performance against demonstrations kept, with its interval band, the line to hold and the choice.

    Returns
    -------
    str
        Markup; empty if no point has a value.
    """
    keys = ("n_kept", "value", "low", "high")
    points = sorted(
        (p for p in view["curve"]["points"] if all(p[k] is not None for k in keys)), key=lambda p: p["n_kept"]
    )
    if not points:
        return ""
    show = performance_format(view["performance_name"])
    line = view["curve"]["tau_line"]
    heights = [p[k] for p in points for k in ("low", "high", "value")] + ([] if line is None else [line])
    low, high = min(heights), max(heights)
    pad = 0.08 * (high - low) or 0.05
    floor, ceiling = low - pad, high + pad
    if low >= 0 and high <= 1:
        floor, ceiling = max(floor, 0.0), min(ceiling, 1.0)
    ticks = linear_ticks(floor, ceiling, 7)
    whole = show is t.percent and all(abs(100 * v - round(100 * v)) < 1e-6 for v in ticks)
    names = [t.percent(v, 0) if whole else show(v) for v in ticks]
    left = max(text_width(n, 12) for n in names) + 14
    height = 300.0 if width > 500 else 270.0
    x = Scale(0, max(p["n_kept"] for p in points) or 1, left + 6, width - 22)
    y = Scale(floor, ceiling, height - 52, 18)
    canvas = Canvas(
        width,
        height,
        name=name,
        title=f"{view['performance_name']} against demonstrations kept",
        description="; ".join(f"{t.count(p['n_kept'])} kept: {show(p['value'])}" for p in points),
    )
    canvas.y_axis(y, ticks, names, left, width - 12)
    if len(points) > 1:
        edge = [(x(p["n_kept"]), y(p["high"])) for p in points]
        edge += [(x(p["n_kept"]), y(p["low"])) for p in reversed(points)]
        fill = {"class": "f-band", "fill": COLOURS["band"], "opacity": "0.7"}
        canvas.add("path", None, fill, d=path(edge, close=True))
    else:
        only = x(points[0]["n_kept"])
        canvas.line(only, y(points[0]["low"]), only, y(points[0]["high"]), "useful")
    if line is not None:
        canvas.line(left, y(line), width - 12, y(line), "harmful", dash="6 4", width=1.5)
    centres = [(x(p["n_kept"]), y(p["value"])) for p in points]
    canvas.stroke(path(centres), "useful", 2)
    for p, (cx, cy) in zip(points, centres, strict=True):
        dot = canvas.dot(cx, cy, 3, "useful")
        ET.SubElement(dot, "title").text = f"{t.count(p['n_kept'])} kept: {show(p['value'])}"
    n_ticks = 8 if width > 500 else 5
    canvas.x_axis(x, linear_ticks(0, x.high, n_ticks, whole=True), height - 48, "demonstrations kept")
    _curve_labels(canvas, view, points, centres, x, y)
    return canvas.render()


def _curve_labels(
    canvas: Canvas,
    view: _Row,
    points: Sequence[_Row],
    centres: Sequence[tuple[float, float]],
    x: Scale,
    y: Scale,
) -> None:
    show = performance_format(view["performance_name"])
    line = view["curve"]["tau_line"]
    frame = Box(x.start, 6, canvas.width - 4, y.start - 2)
    obstacles = [Box(cx - 5, cy - 5, cx + 5, cy + 5) for cx, cy in centres]
    for (x1, y1), (x2, y2) in pairwise(centres):
        steps = max(int((x2 - x1) / 12), 1)
        for i in range(steps):
            mx, my = x1 + (x2 - x1) * (i + 0.5) / steps, y1 + (y2 - y1) * (i + 0.5) / steps
            obstacles.append(Box(mx - 7, my - 3, mx + 7, my + 3))
    if line is not None:
        obstacles.append(Box(x.start, y(line) - 2, canvas.width, y(line) + 2))
    labels = Labels(frame, obstacles)
    marks = [(p, c) for p, c in zip(points, centres, strict=True) if p["chosen"] or p["full"]]
    for p, (cx, cy) in sorted(marks, key=lambda m: not m[0]["chosen"]):
        words = "chosen" if p["chosen"] else "full prompt"
        if p["chosen"] and p["full"]:
            words = "full prompt, kept"
        label = f"{words}: {t.count(p['n_kept'])}, {show(p['value'])}"
        colour = "good" if p["chosen"] else "ink"
        canvas.dot(cx, cy, 6.5, colour, halo=True)
        spots = [
            (cx + dx, cy + dy, a)
            for dy in (-14, 24, -32, 42, -50, 60)
            for dx, a in ((0, "middle"), (8, "end"), (-8, "start"))
        ]
        spot = labels.place(label, 13, spots)
        if spot is not None:
            canvas.text(spot[0], spot[1], label, anchor=spot[2], size=13, classes=f"{colour} strong halo")
    if line is not None:
        tau = (view["certificate"] or {"tau": None})["tau"]
        at_line = view["curve"]["line_text"] or (
            "line to hold" if tau is None else f"{t.fixed(tau, 2)} \u00d7 full prompt"
        )
        at_line += f": {show(line)}"
        right = canvas.width - 14
        spot = labels.place(
            at_line,
            12,
            [(px, y(line) + dy, a) for dy in (16, -6) for px, a in ((x.start + 4, "start"), (right, "end"))],
        )
        if spot is not None:
            canvas.text(spot[0], spot[1], at_line, anchor=spot[2], classes="harmful halo")


def attribution_chart(view: _Row, width: float, name: str) -> str:
    """All demonstrations in order of attribution, as columns with error bars; removed ones are crossed.

    Returns
    -------
    str
        Markup; empty if no demonstration has an attribution.
    """
    rows = sorted(
        (d for d in view["demonstrations"] if d["attribution"] is not None), key=lambda d: d["attribution"]
    )
    if not rows:
        return ""
    spans = [(d["attribution"], d["standard_error"] or 0.0) for d in rows]
    low, high = min(0.0, *(v - e for v, e in spans)), max(0.0, *(v + e for v, e in spans))
    # Attributions that differ by rounding alone are drawn as zeros, not blown up to fill the chart.
    pad = 0.05 * (high - low) if high - low > 1e-9 else 1.0
    ticks = linear_ticks(low - pad, high + pad, 6)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 2
    names = [t.signed(v, digits) for v in ticks]
    left = max(text_width(n, 12) for n in names) + 14
    step = (width - 12 - left) / len(rows)
    size = 11.0 if step >= 13 else 9.0
    ids = [t.clip(t.one_line(d["id"]), 12) for d in rows] if step >= 10 else []
    y = Scale(low - pad, high + pad, 226, 10)
    canvas = Canvas(
        width,
        254 + max((text_width(i, size) for i in ids), default=34),
        name=name,
        title="Attribution of every demonstration, lowest first",
        description=f"{t.plural(len(rows), 'demonstration')}, from {t.signed(low)} to {t.signed(high)}. "
        "Solid columns were measured on the target, hatched ones estimated with a proxy.",
    )
    canvas.y_axis(y, ticks, names, left, width - 12)
    _columns(canvas, rows, y, left, step)
    canvas.line(left, y(0), width - 12, y(0), "muted")
    for i, label in enumerate(ids):
        x = left + (i + 0.5) * step + 0.35 * size
        canvas.text(x, 250, label, anchor="end", size=size, transform=f"rotate(-90 {x:.1f} 250)")
    if not ids:
        ranks = Scale(1, len(rows), left + step / 2, width - 12 - step / 2)
        for rank in linear_ticks(1, len(rows), 6, whole=True):
            canvas.text(ranks(rank), 262, t.count(rank), anchor="middle")
        canvas.text((left + width - 12) / 2, 280, "rank, lowest attribution first", anchor="middle")
    return canvas.render()


def _columns(canvas: Canvas, rows: Sequence[_Row], y: Scale, left: float, step: float) -> None:
    bar, r = min(step * 0.72, 44.0), min(3.5, step * 0.3)
    whiskers, crosses = [], []
    for i, d in enumerate(rows):
        x, value, error = left + (i + 0.5) * step, d["attribution"], d["standard_error"] or 0.0
        column = canvas.add(
            "rect",
            None,
            filling(d["verdict"], d["source"]),
            x=x - bar / 2,
            y=min(y(value), y(0)),
            width=bar,
            height=max(abs(y(value) - y(0)), 1.0),
        )
        tip = ET.SubElement(column, "title")
        tip.text = f"{t.clip(d['id'], 40)}: {d['credit']}, {d['source']}, {d['verdict']}"
        whiskers.append(path([(x, y(value - error)), (x, y(value + error))]))
        if not d["kept"]:
            crosses.append(path([(x - r, 240 - r), (x + r, 240 + r)]))
            crosses.append(path([(x - r, 240 + r), (x + r, 240 - r)]))
    canvas.stroke("".join(whiskers), "ink", 1.2 if step > 6 else 0.6)
    if crosses:
        canvas.stroke("".join(crosses), "ink", 1.4 if step > 6 else 0.8)


def evidence_chart(proxy: _Row, name: str) -> str:
    """How the evidence for and against a proxy model grew, against the thresholds that decide."""
    points = [(p[0], p[1]) for p in proxy["path"] or () if len(p) == 2 and None not in p]
    if len(points) < 2:
        return ""
    stride = math.ceil(len(points) / _MAX_PATH_POINTS)
    points = points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
    bars = [
        (w, proxy[k])
        for w, k in (("accepted above", "threshold"), ("rejected below", "lower_threshold"))
        if proxy[k] is not None
    ]
    values = [v for _, v in points] + [v for _, v in bars]
    low, high = min(values), max(values)
    what = proxy["path_name"] or "evidence"
    # An e-value multiplies up pair by pair, so equal evidence is an equal step on a log scale only.
    log = low > 0 and (high / low >= 50 or "e-value" in what.lower())
    if log:
        low, high = low / 1.6, high * 1.6
    else:
        pad = 0.1 * (high - low) or 1.0
        low, high = low - pad, high + pad
    ticks = log_ticks(low, high, 5) if log else linear_ticks(low, high, 4)
    names = [
        t.fixed(v, 0 if v >= 1 else 3) if log else t.fixed(v, 0 if abs(v) >= 10 or v == int(v) else 2)
        for v in ticks
    ]
    left = max(text_width(n, 12) for n in names) + 14
    width, height = 400.0, 246.0
    x = Scale(min(0.0, points[0][0]), max(n for n, _ in points), left, width - 16)
    y = Scale(low, high, height - 48, 28, log)
    canvas = Canvas(
        width,
        height,
        name=name,
        title=f"{what} over query pairs",
        description=f"Starts at {t.fixed(points[0][1])}, ends at {t.fixed(points[-1][1])} after "
        f"{t.count(points[-1][0])} pairs.",
    )
    canvas.y_axis(y, ticks, names, left, width - 10)
    canvas.text(0, 12, t.clip(what, 48) + (" (log scale)" if log else ""))
    spots = [Box(x(n) - 4, y(v) - 4, x(n) + 4, y(v) + 4) for n, v in points]
    spots += [Box(left, y(v) - 1, width, y(v) + 1) for _, v in bars]
    labels = Labels(Box(left, 18, width - 4, height - 50), spots)
    for words, value in bars:
        colour = "good" if words.startswith("accepted") else "harmful"
        canvas.line(left, y(value), width - 10, y(value), colour, dash="6 4", width=1.5)
    canvas.stroke(path((x(n), y(v)) for n, v in points), "useful", 2)
    canvas.dot(x(points[-1][0]), y(points[-1][1]), 4, "useful")
    for words, value in bars:
        label = f"{words} {t.fixed(value, 2) if abs(value) < 10 else t.fixed(value, 0)}"
        spot = labels.place(
            label,
            12,
            [
                (px, y(value) + dy, a)
                for dy in (-6, 16)
                for px, a in ((left + 6, "start"), (width - 12, "end"))
            ],
        )
        if spot is not None:
            canvas.text(
                spot[0],
                spot[1],
                label,
                anchor=spot[2],
                classes=("good" if words.startswith("acc") else "harmful") + " halo",
            )
    canvas.x_axis(x, linear_ticks(x.low, x.high, 5, whole=True), height - 44, "query pairs used")
    return canvas.render()
