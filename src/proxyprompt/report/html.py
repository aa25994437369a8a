"""One self-contained page: no script, no request, a content policy that allows its own style sheet only."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from proxyprompt._require import require

from . import _text as t
from . import charts, marks, verified
from ._schema import VERDICTS
from ._view import build

__all__ = ["render_html"]

_PREVIEW = 150  # characters of a demonstration that are shown before one opens it
_ROWS_OPEN = 12  # rows of a group that are shown before one opens the rest
_TEXT_BUDGET = 240_000  # characters of demonstration text in a page; shared out, so that it stays mailable


def render_html(summary: Mapping[str, Any]) -> str:
    """Render a summary as one HTML page.

    Parameters
    ----------
    summary : mapping
        JSON-safe summary of a run, schema 1.

    Returns
    -------
    str
        A complete page. It holds no script, loads nothing, and shows every demonstration's text as text.

    Raises
    ------
    MissingDependencyError
        If jinja2 is not installed.
    ArtifactError, InputError
        If the summary has another version or a value of the wrong kind.

    Notes
    -----
    Strings are made visible when the summary is read and escaped by the template (autoescape) or by the
    standard library's XML writer (charts). The only markup that is trusted is our own style sheet and charts.
    """
    view = build(summary)
    markup = require("markupsafe", "report").Markup
    style = _resource("report.css")
    template = _template()
    page: str = template.render(
        v=view,
        style=markup(style),
        style_hash=_hash(style),
        drawings={k: markup(v) for k, v in _drawings(view).items()},
        legend=[
            (verdict, source, markup(marks.swatch(f"sw-{i}", verdict, source)))
            for i, (verdict, source) in enumerate(_legend(view))
        ],
        verified_legend=[
            (markup(drawing), words)
            for drawing, words in (
                verified.verification_legend(view["verified"], view["verification"])
                if view["verified"]
                else ()
            )
        ],
        preview=_PREVIEW,
        rows_open=_ROWS_OPEN,
        text_limit=max(300, min(6000, _TEXT_BUDGET // max(len(view["demonstrations"]), 1))),
    )
    return page.lstrip()


def page_parts(name: str) -> tuple[Any, Any, str, str]:
    """A template, the type of trusted markup, and the style sheet with its hash, for another page in the same look."""
    style = _resource("report.css")
    return _template(name), require("markupsafe", "report").Markup, style, _hash(style)


@cache
def _template(name: str = "report.html.j2") -> Any:
    # Compiling takes five times as long as rendering.
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=t.count,
        fixed=t.fixed,
        signed=t.signed,
        share=t.share,
        plural=t.plural,
        one_line=t.one_line,
        clip=t.clip,
    )
    return environment.get_template(name)


def _drawings(view: dict[str, Any]) -> dict[str, str]:
    drawings = {"patterns": marks.patterns()}
    # Text in a drawing scales with it, so small screens get a narrower drawing instead of a shrunken one.
    for suffix, width in (("wide", 920.0), ("narrow", 380.0)):
        drawings[f"curve-{suffix}"] = charts.curve_chart(view, width, f"curve-{suffix}")
        drawings[f"verified-{suffix}"] = verified.verification_chart(
            view["verified"], view["verification"], width, f"verified-{suffix}"
        )
        drawings[f"attribution-{suffix}"] = charts.attribution_chart(view, width, f"attribution-{suffix}")
    for i, row in enumerate(view["verified"]):
        row["mark"] = f"verified-mark-{i}"
        drawings[row["mark"]] = verified.mark(row["mark"], row["source"], named=row["named"])
    spans = [(abs(d["attribution"] or 0.0), d["standard_error"] or 0.0) for d in view["demonstrations"]]
    reach = 1.02 * max((v + e for v, e in spans), default=1.0) or 1.0
    for i, d in enumerate(d for group in view["groups"] for d in group["rows"]):
        d["bar"] = f"bar-{i}"
        drawings[f"bar-{i}"] = marks.attribution_bar(d, reach, f"bar-{i}")
    bounds = [
        p["performance"][k]
        for p in view["prompts"]
        for k in ("low", "high")
        if p["performance"][k] is not None
    ]
    low, high = min(bounds, default=0.0), max(bounds, default=1.0)
    for i, prompt in enumerate(view["prompts"]):
        prompt["bar"] = f"interval-{i}"
        marked = prompt["name"].startswith("Smaller")
        drawings[f"interval-{i}"] = marks.interval_bar(
            prompt["performance"], low, high, f"interval-{i}", marked=marked
        )
    for i, proxy in enumerate(view["proxies"]):
        proxy["chart"] = f"evidence-{i}"
        drawings[f"evidence-{i}"] = charts.evidence_chart(proxy, f"evidence-{i}")
    return drawings


def _legend(view: dict[str, Any]) -> list[tuple[str, str]]:
    present = {(d["verdict"], d["source"]) for d in view["demonstrations"]}
    return [(v, s) for v in VERDICTS for s in ("measured", "estimated") if (v, s) in present]


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _hash(style: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
