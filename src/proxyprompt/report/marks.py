"""Small marks of the report: hatchings, legend swatches and the bars inside table rows."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

from . import _text as t
from ._schema import VERDICTS
from .svg import COLOURS, Canvas, Scale

__all__ = ["attribution_bar", "filling", "interval_bar", "patterns", "swatch"]

_Row = Mapping[str, Any]


def patterns() -> str:
    """Hatchings for estimated values; the page holds them once."""
    root = ET.Element("svg", {"width": "0", "height": "0", "class": "defs", "aria-hidden": "true"})
    definitions = ET.SubElement(root, "defs")
    for verdict in VERDICTS:
        pattern = ET.SubElement(
            definitions,
            "pattern",
            {
                "id": f"hatch-{verdict}",
                "width": "4",
                "height": "4",
                "patternUnits": "userSpaceOnUse",
                "patternTransform": "rotate(45)",
            },
        )
        ET.SubElement(
            pattern,
            "rect",
            {
                "width": "4",
                "height": "4",
                "class": f"f-{verdict}",
                "fill": COLOURS[verdict],
                "opacity": "0.22",
            },
        )
        ET.SubElement(
            pattern,
            "rect",
            {"width": "1.6", "height": "4", "class": f"f-{verdict}", "fill": COLOURS[verdict]},
        )
    return ET.tostring(root, encoding="unicode")


def filling(verdict: str, source: str) -> dict[str, str]:
    """Solid for what was measured on the target, hatched with an outline for what a proxy estimated."""
    if source == "measured":
        return {"class": f"f-{verdict}", "fill": COLOURS[verdict]}
    return {
        "class": f"s-{verdict}",
        "fill": f"url(#hatch-{verdict})",
        "stroke": COLOURS[verdict],
        "stroke-width": "0.8",
    }


def swatch(name: str, verdict: str, source: str) -> str:
    """Legend mark."""
    what = f"{verdict}, {source}"
    canvas = Canvas(14, 14, name=name, title=what, description=f"Colour of {what} values.", classes="swatch")
    canvas.add("rect", None, filling(verdict, source), x=1, y=1, width=12, height=12, rx=2)
    return canvas.render()


def attribution_bar(demonstration: _Row, reach: float, name: str) -> str:
    """One attribution as a bar from zero with a whisker of one standard error.

    ``reach`` is half the width of the scale that all rows share.
    """
    value, error = demonstration["attribution"], demonstration["standard_error"] or 0.0
    canvas = Canvas(
        150,
        18,
        name=name,
        title=f"Attribution of {t.clip(demonstration['id'], 40)}",
        description=f"{demonstration['credit']}, {demonstration['source']}",
        classes="bar",
    )
    scale = Scale(-reach, reach, 3, 147)
    zero = scale(0)
    if value is not None:
        x = scale(value)
        fill = filling(demonstration["verdict"], demonstration["source"])
        canvas.add("rect", None, fill, x=min(x, zero), y=4, width=max(abs(x - zero), 1), height=10)
        ends = [scale(max(-reach, min(reach, value + side * error))) for side in (-1, 1)]
        canvas.line(ends[0], 9, ends[1], 9, "ink", width=1.2)
    canvas.line(zero, 0, zero, 18, "muted")
    return canvas.render()


def interval_bar(performance: _Row, low: float, high: float, name: str, *, marked: bool = False) -> str:
    """A value with its interval as a dot on a line, ``low..high`` being the shared scale."""
    values = (performance["value"], performance["low"], performance["high"])
    canvas = Canvas(
        150, 18, name=name, title="Interval", description="Value with its 95 % interval.", classes="bar"
    )
    canvas.line(3, 9, 147, 9, "grid")
    if None not in values:
        scale = Scale(low, high, 6, 144)
        colour = "useful" if marked else "muted"
        canvas.line(scale(values[1]), 9, scale(values[2]), 9, colour, width=3)
        canvas.dot(scale(values[0]), 9, 4.5, colour)
    return canvas.render()
