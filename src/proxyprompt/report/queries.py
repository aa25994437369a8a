"""Which unit decides each query: a page and a table that keep what was measured apart from what proxies estimated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxyprompt.errors import InputError

from . import _text as t
from .html import page_parts
from .markdown import escape
from .svg import COLOURS, Canvas, Scale
from .verified import mark

__all__ = ["render_queries_html", "render_queries_markdown"]

_OUTCOMES = {
    "probe_accepted": "one guided probe was enough",
    "settled": "the next unit was not worth a call",
    "verified": "the strongest suggestions were measured",
    "measured_all": "every unit was measured",
    "abstained": "target and proxies disagree: nothing was measured",
    "below_floor": "no measured effect is above the noise",
}
_UNITS = 400  # characters of a unit


def render_queries_html(found: Mapping[str, Any], *, title: str = "Which unit decides each query") -> str:
    """One self-contained page of :meth:`proxyprompt.verifying.VerifiedQueries.to_dict`.

    Parameters
    ----------
    found : mapping
    title : str

    Returns
    -------
    str
        No script, no request; every text is shown as text. Bars and marks are filled where the target measured, hollow
        where only proxies estimated; each column has its own scale.

    Raises
    ------
    InputError
        If it is something else.
    MissingDependencyError
        If jinja2 is not installed.
    """
    view = _view(found)
    for k, query in enumerate(view["queries"]):
        reach = {
            key: max((abs(u[key]) for u in query["units"] if u[key] is not None), default=1.0) or 1.0
            for key in ("estimated", "measured")
        }
        for i, unit in enumerate(query["units"]):
            source = "estimated" if unit["measured"] is None else "measured"
            unit["drawings"] = {"mark": mark(f"m-{k}-{i}", source, named=unit["best"])} | {
                key: _bar(unit[key], reach[key], key, f"{key[0]}-{k}-{i}", named=unit["best"])
                for key in ("estimated", "measured")
            }
    legend = [
        (mark("legend-0", "measured", named=True), "measured on the target, the largest effect"),
        (mark("legend-1", "measured"), "measured on the target"),
        (mark("legend-2", "estimated"), "not measured: proxies estimated it"),
    ]
    template, markup, style, digest = page_parts("queries.html.j2")
    page: str = template.render(
        v=view,
        title=t.visible(title),
        markup=markup,
        style=markup(style),
        style_hash=digest,
        legend=[(markup(drawing), words) for drawing, words in legend],
    )
    return page.lstrip()


def render_queries_markdown(found: Mapping[str, Any]) -> str:
    """The same as GitHub-flavoured Markdown: a table a query; what was not measured says so.

    Raises
    ------
    InputError
        If it is something else.
    """
    view = _view(found)
    parts = [view["summary"]]
    for query in view["queries"]:
        head = ["Order", "Unit", "Proxies' estimate", "Measured on the target", ""]
        rows = [
            [u["place"], u["text"], u["estimated_text"], u["measured_text"], "decides" if u["best"] else ""]
            for u in query["units"]
        ]
        lines = ["| " + " | ".join(escape(c) for c in row) + " |" for row in [head, *rows]]
        lines.insert(1, "|" + " --- |" * len(head))
        parts += [f"## {escape(query['id'])}", escape(query["said"]), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _view(found: Mapping[str, Any]) -> dict[str, Any]:
    try:
        queries = [_query(q) for q in found["queries"]]
        calls, oracle = int(found["target_calls"]), int(found["oracle_calls"])
        rule, floor = found["rule"], float(found["floor"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"found: not the result of verify_queries ({error!r}).", hint="Pass VerifiedQueries.to_dict()."
        ) from error
    summary = (
        f"{t.plural(len(queries), 'query', 'queries')}; {t.count(calls)} target calls, of {t.count(oracle)} that measuring"
        f" every unit takes. Effects up to {t.fixed(floor)} are noise."
    )
    if rule is not None:
        taught = t.plural(rule["n_calibration"], "fully measured query", "fully measured queries")
        summary += (
            f" {taught} could not teach when to stop, so every unit was measured."
            if rule["ratio"] is None
            else f" When to stop was learnt from {taught}: at least {t.share(rule['precision'])} of the queries have their"
            f" largest unit among the measured ones, with {t.share(1 - rule['level'])} confidence."
        )
    return {"queries": queries, "summary": summary}


def _query(q: Mapping[str, Any]) -> dict[str, Any]:
    order = {unit: place for place, unit in enumerate(q["order"], 1)}
    units = []
    for i, (unit, estimated, measured) in enumerate(
        zip(q["units"], q["estimated"], q["measured"], strict=True)
    ):
        units.append(
            {
                "text": t.clip(t.one_line(t.visible(str(unit["text"]))), _UNITS),
                "estimated": float(estimated),
                "measured": None if measured is None else float(measured),
                "estimated_text": t.signed(float(estimated)),
                "measured_text": "not measured" if measured is None else t.signed(float(measured)),
                "place": str(order[i]) if i in order else "\u2013",
                "best": i == q["best"],
            }
        )
    predicted = "" if q["predicted"] is None else f"The target answers {t.visible(str(q['predicted']))}. "
    agree = "The proxies agree" if q["agree"] else "The proxies predict otherwise"
    taught = " (measured in full to learn when to stop)" if q["taught"] else ""
    said = f"{predicted}{agree}; {_OUTCOMES[q['outcome']]}{taught}."
    return {"id": t.visible(str(q["query"])), "said": said, "units": units}


def _bar(value: float | None, reach: float, source: str, name: str, *, named: bool) -> str:
    if value is None:
        return ""
    canvas = Canvas(110, 14, name=name, title=source, description=t.signed(value), classes="bar")
    scale = Scale(-reach, reach, 2, 108)
    colour = "muted" if source == "estimated" else "harmful" if named else "useful"
    hollow = {"class": f"f-paper s-{colour}", "fill": COLOURS["paper"], "stroke": COLOURS[colour]}
    look = hollow if source == "estimated" else {"class": f"f-{colour}", "fill": COLOURS[colour]}
    left, width = min(scale(value), scale(0)), max(abs(scale(value) - scale(0)), 1.0)
    canvas.add("rect", None, look, x=left, y=3, width=width, height=8)
    canvas.line(scale(0), 0, scale(0), 14, "muted")
    return canvas.render()
