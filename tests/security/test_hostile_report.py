"""A thousand payloads in every field of a summary, read by a real browser, a Markdown parser and a terminal.

The browser runs with scripts on and the page's content policy off, every panel is opened and every element is sent the
events that handlers wait for, so that only the escaping protects the page. A page may hold exactly the elements of a
page with harmless words, ask no one for anything, and open no dialog.
"""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from proxyprompt.report import _text as t
from proxyprompt.report import print_terminal, render_html, render_markdown

from .chromium import Browser, browser
from .payloads import LOAD, PAYLOADS, RUN

Summary = dict[str, Any]
_FIXTURE = Path(__file__).parents[1] / "unit" / "report_summary.json"
# Words out of closed lists; the reader of summaries refuses others.
_CLOSED = {
    "certified", "not_certified", "unchanged", "target", "proxy", "measured", "estimated", "harmful", "redundant", "useful",
    "unclear", "accepted", "rejected", "undecided", "not_tested", "e-value", "p-value",
    "settled", "measured_all", "limit",
}  # fmt: skip
# Opens every panel, sends every element the events that handlers wait for, and tells what the document holds.
_PROBE = """
const probe = (page) => {
  for (const d of page.querySelectorAll('details')) d.open = true;
  const seen = [...page.querySelectorAll('*')];
  for (const e of seen)
    for (const name of ['mouseover', 'click', 'focus', 'toggle', 'error', 'load', 'begin'])
      e.dispatchEvent(new Event(name));
  const live = ['href', 'src', 'srcdoc', 'action', 'style', 'xlink:href', 'data', 'background', 'poster'];
  return [seen.map(e => e.localName).join(' '),
          seen.filter(e => e.getAttributeNames().some(n => n.startsWith('on') || live.includes(n))).length];
};
"""
_PAGE = f"(() => {{ {_PROBE} return probe(document); }})()"
_FRAMES = f"(() => {{ {_PROBE} return [...document.querySelectorAll('iframe')].map(f => probe(f.contentDocument)); }})()"
_GROUP = 24  # reports that are opened at once, each in a frame of its own


def _replaced(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {k: _replaced(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, text) for v in value]
    return text if isinstance(value, str) and value not in _CLOSED else value


@cache
def _short() -> Summary:
    s: Summary = json.loads(_FIXTURE.read_text(encoding="utf-8"))
    by_verdict = {d["verdict"]: d for d in s["demonstrations"]}
    s["demonstrations"] = list(by_verdict.values())[:3]
    s["curve"]["points"] = s["curve"]["points"][:2]
    s["certificate"]["sequence"] = s["certificate"]["sequence"][:1]
    s["cost"]["stages"] = s["cost"]["stages"][:1]
    s["limits"] = s["limits"][:1]
    n_units, few = len(s["verification"]["unit_ids"]), (0, 1, 2, 13)  # two that were measured
    for name, value in s["verification"].items():
        if isinstance(value, list) and len(value) == n_units:
            s["verification"][name] = [value[i] for i in few]
    for proxy in s["screening"]["proxies"]:
        proxy["path"] = (proxy["path"] or [])[:3]
    return s


def hostile(text: str) -> Summary:
    """``text`` in every string that is not out of a closed list, and as a key where keys are free."""
    s: Summary = _replaced(copy.deepcopy(_short()), text)
    s["screening"]["proxies"][0]["paper_rule"]["decision"] = text
    s["settings"] = {text: text, "nested": {text: [text, {text: 1}]}}
    s["versions"] = {text: text}
    s["cost"]["money"]["currency"] = text
    return s


def harmless(text: str) -> str:
    """Words of the same length and the same lines, so that the page folds and clips alike."""
    return re.sub(r"\S", "x", t.visible(text))


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append(tag)


def _expected(text: str) -> str:
    return " ".join(_Tags(render_html(hostile(harmless(text)))).found)


def test_there_are_a_thousand_different_payloads() -> None:
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 1000
    assert sum(RUN in p for p in PAYLOADS) > 300
    assert sum(LOAD in p for p in PAYLOADS) > 100


def test_the_browser_would_notice(tmp_path: Path) -> None:
    """Without escaping, the same instruments report dialogs, requests and elements."""
    page = tmp_path / "open.html"
    page.write_text(
        f"<p>{'</p><p>'.join(PAYLOADS[:40])}".encode("utf-8", "replace").decode(), encoding="utf-8"
    )
    with browser() as chromium:
        chromium.open(page)
        chromium.run(_PAGE)
        assert chromium.dialogs
        assert chromium.requests
        policy = tmp_path / "policy.html"
        policy.write_text(
            "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\"><script>alert(2)</script>"
        )
        chromium.dialogs.clear()
        chromium.open(policy)
        assert chromium.dialogs == ["2"], "the content policy is off, so that it cannot hide a leak"


def _frames(reports: Sequence[str]) -> str:
    # Without layout a page loads several times as fast; scripts, handlers and requests do not wait for it.
    frames = (f'<iframe style="display:none" srcdoc="{escape(report)}"></iframe>' for report in reports)
    return "<!doctype html>" + "".join(frames)


def test_no_payload_runs_loads_or_makes_an_element_in_a_real_browser(tmp_path: Path) -> None:
    page, wrong, shapes = tmp_path / "report.html", [], dict[tuple[bool, ...], str]()

    def check(chromium: Browser, texts: Sequence[str], found: Sequence[tuple[str, int]]) -> None:
        assert len(found) == len(texts)
        for text, (elements, live) in zip(texts, found, strict=True):
            folds = (len(t.visible(text)) > 150, "\n" in t.visible(text), bool(text.strip()))
            if folds not in shapes:
                shapes[folds] = _expected(text)
            # Shapes are kept for speed; a page that differs is compared with its own.
            if live or (elements != shapes[folds] and elements != _expected(text)):
                wrong.append((text[:80], live))
        if chromium.dialogs or chromium.requests:
            wrong.append((str(texts), len(chromium.dialogs) + len(chromium.requests)))

    with browser() as chromium:
        for start in range(0, len(PAYLOADS), _GROUP):
            texts = PAYLOADS[start : start + _GROUP]
            reports = [render_html(hostile(text)) for text in texts]
            page.write_text(_frames(reports), encoding="utf-8")
            chromium.open(page)
            check(chromium, texts, chromium.run(_FRAMES))
            # One of them as a page of its own, with layout.
            page.write_text(reports[start // _GROUP % len(reports)], encoding="utf-8")
            chromium.open(page)
            check(chromium, [texts[start // _GROUP % len(reports)]], [chromium.run(_PAGE)])
    assert wrong == []


def _kinds(tokens: Sequence[Any]) -> list[str]:
    kinds = []
    for token in tokens:
        kinds.append(token.type)
        kinds += [c.type for c in token.children or () if c.type not in ("text", "text_special", "softbreak")]
    return kinds


def test_no_payload_becomes_markdown_or_html_in_the_markdown_report(tmp_path: Path) -> None:
    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    pages: list[str] = []
    plain = _kinds(parser.parse(render_markdown(hostile("word"))))
    assert {"table_open", "heading_open"} < set(plain)
    assert not {
        "html_inline",
        "html_block",
        "link_open",
        "image",
        "code_inline",
        "fence",
        "code_block",
    } & set(plain)
    for text in PAYLOADS:
        tokens = parser.parse(render_markdown(hostile(text)))
        same = _kinds(tokens) == plain
        assert same or _kinds(tokens) == _kinds(parser.parse(render_markdown(hostile(harmless(text))))), text
        pages.append(parser.renderer.render(tokens, parser.options, {}))
    allowed = {"html", "head", "body", "h1", "h2", "h3", "p", "strong", "ul", "li"}
    allowed |= {"table", "thead", "tbody", "tr", "th", "td"}
    page = tmp_path / "markdown.html"
    with browser() as chromium:
        for start in range(0, len(pages), 200):
            page.write_text("".join(pages[start : start + 200]), encoding="utf-8")
            chromium.open(page)
            elements, _ = chromium.run(_PAGE)
            assert set(elements.split()) <= allowed
        assert (chromium.dialogs, chromium.requests) == ([], [])


def test_no_payload_reaches_the_terminal_as_a_command() -> None:
    for text in PAYLOADS:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        print_terminal(
            hostile(text), Console(file=stream, width=100, force_terminal=False, color_system=None)
        )
        stream.flush()
        printed = raw.getvalue().decode()
        assert not [c for c in printed if not c.isprintable() and c not in "\n\u00a0\u3000"], text
        if 0 < len(text) < 40 and t.visible(text) == text and len(text.split()) == 1 and text == text.strip():
            assert text in printed, text


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_there_is_no_spreadsheet_to_inject_into(start: str) -> None:
    """No table of values is written as CSV: a cell that starts a formula has no way into a spreadsheet."""
    source = Path(__file__).parents[2] / "src" / "proxyprompt"
    written = [
        p.name
        for p in source.rglob("*.py")
        if re.search(r"csv\.(?:Dict)?[Ww]riter|\.to_csv\(", p.read_text())
    ]
    assert written == []
