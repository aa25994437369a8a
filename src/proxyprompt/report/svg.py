"""Drawing primitives for the charts: scales, ticks, label placement and a small SVG tree.

The tree is serialised by the standard library, so every text and attribute is escaped in one place. Colours
are given twice: as presentation attributes, which hold anywhere, and as classes, which let the page's style
sheet answer to a dark screen. No element carries a ``style`` attribute, which the page's policy would block.
"""

from __future__ import annotations

import math
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import _text as t

__all__ = ["COLOURS", "Box", "Canvas", "Labels", "Scale", "linear_ticks", "log_ticks", "path", "text_width"]

# Distinguishable with red-green blindness by lightness as well as hue; mirrored in report.css.
COLOURS = {
    "harmful": "#b8442c",
    "redundant": "#d9a03f",
    "useful": "#2a6f97",
    "unclear": "#8d95a1",
    "ink": "#1d2733",
    "muted": "#5d6876",
    "grid": "#e3e7ec",
    "band": "#cfe0ec",
    "paper": "#ffffff",
    "good": "#1f7a5c",
}


def text_width(text: str, size: float) -> float:
    """Width of ``text`` in the page's font, in the same unit as ``size``; errs on the wide side."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return size * (0.58 * (len(text) - wide) + 1.05 * wide)


@dataclass(frozen=True)
class Scale:
    """Map ``low..high`` onto ``start..end`` pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(v, 1e-300)) for v in (value, low, high))
        if high == low:
            return (self.start + self.end) / 2
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def linear_ticks(low: float, high: float, n: int, *, whole: bool = False) -> list[float]:
    """About ``n`` round numbers (1, 2 or 5 times a power of ten) in ``[low, high]``.

    Examples
    --------
    >>> linear_ticks(0, 28, 6, whole=True)
    [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]
    """
    if not high - low > 1e-9 * max(abs(high), abs(low), 1e-200):
        return [low]
    raw = (high - low) / max(n, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float, n: int = 6) -> list[float]:
    """Powers of ten in ``[low, high]``, at most about ``n`` of them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / n))
    return [10.0**i for i in range(first, last + 1, stride)]


def path(points: Iterable[tuple[float, float]], *, close: bool = False) -> str:
    """Path data through ``points``."""
    data = "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
    return f"M{data}{'Z' if close else ''}"


@dataclass(frozen=True)
class Box:
    """A rectangle that labels keep clear of."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, frame: Box) -> float:
        """Area that lies outside ``frame``."""
        return (self.right - self.left) * (self.bottom - self.top) - self.overlap(frame)


class Labels:
    """Places text labels where they neither overlap each other nor leave the frame.

    Parameters
    ----------
    frame : Box
        Where labels may lie.
    obstacles : sequence of Box
        Marks that labels avoid if they can; another label is avoided ten times harder.
    """

    def __init__(self, frame: Box, obstacles: Sequence[Box] = ()) -> None:
        self._frame = frame
        self._obstacles = list(obstacles)
        self._placed: list[Box] = []

    def place(
        self, text: str, size: float, candidates: Sequence[tuple[float, float, str]]
    ) -> tuple[float, float, str] | None:
        """Choose the best of ``candidates`` (x, baseline, anchor); None if every one hits another label."""
        best, best_cost = None, math.inf
        for x, y, anchor in candidates:
            width = text_width(text, size)
            left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
            box = Box(left - 2, y - size, left + width + 2, y + 0.3 * size)
            if any(box.overlap(other) > 0 for other in self._placed):
                continue
            cost = 10 * box.outside(self._frame) + sum(box.overlap(o) for o in self._obstacles)
            if cost < best_cost:
                best, best_cost = ((x, y, anchor), box), cost
        if best is None:
            return None
        self._placed.append(best[1])
        return best[0]


class Canvas:
    """One SVG drawing with a title and a description for readers who do not see it.

    Parameters
    ----------
    width, height : float
        Size of the view box, in CSS pixels at natural size.
    name : str
        Unique in the page; prefixes the ids.
    title, description : str
        What the drawing is, and what it shows in words.
    classes : str, optional
        Classes of the root.
    """

    def __init__(
        self, width: float, height: float, *, name: str, title: str, description: str, classes: str = "chart"
    ) -> None:
        self.width, self.height = width, height
        self.root = ET.Element(
            "svg",
            {
                "viewBox": f"0 0 {_number(width)} {_number(height)}",
                "class": classes,
                "role": "img",
                "aria-labelledby": f"{name}-title {name}-desc",
                "font-family": "system-ui, sans-serif",
            },
        )
        self.add("title", title, id=f"{name}-title")
        self.add("desc", description, id=f"{name}-desc")

    def add(
        self,
        tag: str,
        text: str | None = None,
        more: Mapping[str, str] | None = None,
        /,
        **attributes: str | float,
    ) -> ET.Element:
        """Append an element; underscores in attribute names become hyphens, ``class_`` becomes ``class``."""
        element = ET.SubElement(self.root, tag)
        for name, value in {**attributes, **(more or {})}.items():
            element.set(
                name.rstrip("_").replace("_", "-"), value if isinstance(value, str) else _number(value)
            )
        element.text = text
        return element

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        size: float = 12,
        classes: str = "muted",
        transform: str = "",
    ) -> None:
        """Append a text; the first class names its colour."""
        fixed = {"class": f"t-{classes}", "text-anchor": anchor, "fill": COLOURS[classes.split()[0]]}
        if transform:
            fixed["transform"] = transform
        self.add("text", text, fixed, x=x, y=y, font_size=size)

    def line(
        self,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        colour: str = "grid",
        *,
        width: float = 1,
        dash: str = "",
    ) -> None:
        """Append a straight line in a named colour."""
        fixed = {"class": f"s-{colour}", "stroke": COLOURS[colour]}
        if dash:
            fixed["stroke-dasharray"] = dash
        self.add("line", None, fixed, x1=x1, y1=y1, x2=x2, y2=y2, stroke_width=width)

    def stroke(self, data: str, colour: str, width: float) -> None:
        """Append a path that is drawn as a line in a named colour."""
        fixed = {"class": f"s-{colour}", "stroke": COLOURS[colour], "fill": "none"}
        self.add("path", None, fixed, d=data, stroke_width=width)

    def dot(self, x: float, y: float, radius: float, colour: str, *, halo: bool = False) -> ET.Element:
        """Append a disc in a named colour, with a rim in the paper's colour if ``halo``."""
        fixed = {"class": f"f-{colour}", "fill": COLOURS[colour]}
        if halo:
            fixed.update({"class": f"f-{colour} s-paper", "stroke": COLOURS["paper"], "stroke-width": "2"})
        return self.add("circle", None, fixed, cx=x, cy=y, r=radius)

    def x_axis(self, scale: Scale, ticks: Sequence[float], y: float, title: str) -> None:
        """Tick labels under ``y`` (those that would touch are left out) and the axis title."""
        right = -math.inf
        for tick in ticks:
            x, label = scale(tick), t.count(tick)
            half = text_width(label, 12) / 2
            if x - half > right + 6:
                self.text(x, y + 18, label, anchor="middle")
                self.line(x, y, x, y + 4, "muted")
                right = x + half
        self.line(scale.start, y, scale.end, y, "muted")
        self.text((scale.start + scale.end) / 2, y + 37, title, anchor="middle")

    def y_axis(
        self, scale: Scale, ticks: Sequence[float], labels: Sequence[str], left: float, right: float
    ) -> None:
        """Grid lines with their labels at the left."""
        for tick, label in zip(ticks, labels, strict=True):
            y = scale(tick)
            self.line(left, y, right, y, "grid")
            self.text(left - 8, y + 4, label, anchor="end")

    def render(self) -> str:
        """The drawing as markup, fit to stand inside an HTML page."""
        return ET.tostring(self.root, encoding="unicode", short_empty_elements=True)


def _number(value: float) -> str:
    text = f"{value:.1f}"
    return "0" if text in ("-0.0", "0.0") else text.removesuffix(".0")
