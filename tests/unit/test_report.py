"""The report says what the summary says, and nothing in a summary can become markup."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from proxyprompt.errors import ArtifactError, InputError
from proxyprompt.report import _text as t
from proxyprompt.report import print_terminal, render_html, render_markdown
from proxyprompt.report._schema import read
from proxyprompt.report.markdown import escape
from proxyprompt.report.svg import Box, Canvas, Labels, Scale, linear_ticks, log_ticks

Summary = dict[str, Any]
_FIXTURE = Path(__file__).with_name("report_summary.json")
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def _summary() -> Summary:
    loaded: Summary = json.loads(_FIXTURE.read_text(encoding="utf-8"))
    return loaded


def _not_certified() -> Summary:
    s = _summary()
    s["verdict"] = {
        "status": "not_certified",
        "headline": "Not certified: 13 of 28 demonstrations look removable, but this is not shown",
        "sentences": ["The original prompt stays in place."],
    }
    s["certificate"].update(decision="not_certified", lower_bound=-0.0124, difference=0.0211)
    s["certificate"]["evidence"] = {"name": "p-value", "value": 0.21}
    for step in s["certificate"]["sequence"]:
        step.update(passed=False, tested=step is s["certificate"]["sequence"][0], lower_bound=-0.0124)
    return s


def _unchanged() -> Summary:
    s = _summary()
    s["verdict"] = {
        "status": "unchanged",
        "headline": "Every demonstration earns its tokens",
        "sentences": [],
    }
    for d in s["demonstrations"]:
        d.update(kept=True, verdict="useful", attribution=abs(d["attribution"]) + 0.05, confirmation=None)
    s["after"] = copy.deepcopy(s["before"])
    s["certificate"] = s["cleaning"] = None
    s["cost"].update(saved_tokens_per_call=0, saved_share=0.0, break_even_calls=None, money=None)
    return s


def _refused() -> Summary:
    s = _summary()
    s["explained_by"] = {
        "role": "target",
        "name": "Qwen2.5-1.5B-Instruct",
        "why": "No proxy passed the screen.",
    }
    for d in s["demonstrations"]:
        d["source"] = "measured"
    for p in s["screening"]["proxies"]:
        p.update(decision="rejected", threshold=0.0, lower_threshold=-3.0, path_name="log evidence")
        p["path"] = [[n, -0.1 * n] for n in range(1, 31)]
    s["screening"]["proxies"][1].update(decision="not_tested", path=None, mean_q_proxy=None, n_used=0)
    return s


def _one() -> Summary:
    s = _summary()
    s["demonstrations"] = s["demonstrations"][:1]
    s["curve"]["points"] = s["curve"]["points"][-1:]
    s["curve"]["points"][0].update(n_kept=1, chosen=True, full=True)
    return s


def _many() -> Summary:
    s = _summary()
    s["demonstrations"] = [
        {**s["demonstrations"][i % 28], "id": f"ticket-{i:04d}", "position": i + 1} for i in range(200)
    ]
    s["demonstrations"][3]["input"] = "A very long ticket. " * 5000
    return s


def _bare() -> Summary:
    s = _summary()
    for key in ("zero_shot", "certificate", "cleaning", "screening"):
        del s[key]
    for d in s["demonstrations"]:
        for key in ("input", "output", "confirmation", "tokens"):
            del d[key]
    for prompt in ("before", "after"):
        del s[prompt]["tokens"]
    for point in s["curve"]["points"]:
        del point["tokens"]
    for stage in s["cost"]["stages"]:
        del stage["seconds"]
    for key in ("saved_tokens_per_call", "saved_share", "break_even_calls", "money", "crr"):
        del s["cost"][key]
    return s


def _redacted() -> Summary:
    s = _summary()
    for d in s["demonstrations"]:
        d["input"] = d["output"] = None
    return s


def _no_numbers() -> Summary:
    """Every number is null, except the version."""
    s = _replace(
        _summary(),
        lambda value: None if isinstance(value, (int, float)) and not isinstance(value, bool) else value,
    )
    s["schema"] = 1
    return s


def _empty() -> Summary:
    s = _bare()
    s.update(demonstrations=[], limits=[], settings={}, versions={})
    s["curve"]["points"] = []
    s["cost"]["stages"] = []
    s["verdict"]["sentences"] = []
    return s


def _other_metric() -> Summary:
    s = _summary()
    s["performance_name"] = "token F1"
    s["certificate"].update(tau=None, margin=0.02)
    return s


VARIANTS: dict[str, Callable[[], Summary]] = {
    "certified": _summary,
    "not_certified": _not_certified,
    "unchanged": _unchanged,
    "refused": _refused,
    "one": _one,
    "many": _many,
    "bare": _bare,
    "redacted": _redacted,
    "no_numbers": _no_numbers,
    "empty": _empty,
    "other_metric": _other_metric,
}

_HEADINGS = ("# ", "## ", "### ")  # ours; a payload's own number sign is escaped

PAYLOADS = [
    "<script>alert(1)</script>", "</style><script>alert(1)</script>", "</title><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>", "\"><img src=x onerror=alert(1)>", "' onmouseover='alert(1)",
    "\" onmouseover=\"alert(1)", "<svg onload=alert(1)>", "<svg><script>alert(1)</script></svg>",
    "</svg><script>alert(1)</script>", "</text></svg><img src=x onerror=alert(1)>", "</desc></svg><b>x",
    "<iframe src=javascript:alert(1)>", "<iframe srcdoc='<script>alert(1)</script>'>", "<object data=x>",
    "<embed src=x>", "<link rel=stylesheet href=//evil.example/x.css>", "<base href=//evil.example/>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>", "<a href=javascript:alert(1)>x</a>",
    "<form action=//evil.example><input></form>", "<details open ontoggle=alert(1)>",
    "<body onload=alert(1)>", "<math><mi xlink:href=javascript:alert(1)>",
    "<video><source onerror=alert(1)>", "<audio src=x onerror=alert(1)>", "<marquee onstart=alert(1)>",
    "<!-- <script>alert(1)</script> -->", "--><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>", "]]><script>alert(1)</script>", "<?xml version='1.0'?>",
    "<!doctype html>", "&lt;script&gt;alert(1)&lt;/script&gt;", "&#60;script&#62;",
    "&quot; onload=alert(1)", "{{ 7*7 }}", "{% raw %}", "{{ ''.__class__.__mro__ }}", "{# comment #}",
    "${7*7}", "#{7*7}", "<%= 7*7 %>", "%3Cscript%3E", "\\u003cscript\\u003e", "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>", "[x](javascript:alert(1))",
    "![x](https://evil.example/p.png)", "[x]: https://evil.example", "<https://evil.example>",
    "https://evil.example/a?b=c", "HTTP://EVIL.EXAMPLE", "www.evil.example", "someone@evil.example",
    "@everyone", "a | b | c", "| --- | --- |", "```\ncode", "# heading", "- item", "+ item", "1. item",
    "1) item", "> quote", "===", "---", "* * *", "**bold** _it_ ~~no~~", "$x^2$", "\\[x\\](y)", "\\",
    "line\n\n<script>alert(1)</script>\n\n", "a\n| b |\n", "[bold red]rich[/bold red]", "[/]",
    "[link=https://evil.example]x[/link]", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07",
    "\x1b]8;;https://evil.example\x1b\\x\x1b]8;;\x1b\\", "\x9b31m", "a\rb", "a\x08b", "\x00",
    "\u202etxt.exe", "\u2066x\u2069", "a\u200bb", "a\u200db", "\ufeffx", "\u2028x", "\u2029x",
    "\U000e0041\U000e0042", "\u061cx", "\ud800", "\udfff x", "\ue000", "\ufff9x\ufffb", "\u00ad", "\u034f",
    "\u3164", "\ufe01", "\U000e0101", "a" * 5000, "\u6f22" * 400, "", " ",
]  # fmt: skip


def _replace(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {k: _replace(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [_replace(v, change) for v in value]
    return change(value)


_CLOSED = {
    "certified", "not_certified", "unchanged", "target", "proxy", "measured", "estimated", "harmful",
    "redundant", "useful", "unclear", "accepted", "rejected", "undecided", "not_tested", "e-value",
    "p-value", "settled", "measured_all", "limit",
}  # fmt: skip


def _hostile(payload: str) -> Summary:
    """``payload`` in every string that is not out of a closed list, and as a key where keys are free."""
    s: Summary = _replace(_summary(), lambda v: payload if isinstance(v, str) and v not in _CLOSED else v)
    s["screening"]["proxies"][0]["paper_rule"]["decision"] = (
        payload  # free text that reads like a closed word
    )
    s["demonstrations"] = s["demonstrations"][:6]
    s["verification"]["unit_ids"] = s["verification"]["unit_ids"][:6]  # its other lists are longer then
    s["settings"] = {payload: payload, "nested": {payload: [payload, {payload: 1}]}}
    s["versions"] = {payload: payload}
    s["cost"]["money"]["currency"] = payload
    s["certificate"]["sequence"] = s["certificate"]["sequence"][:1]
    return s


class _Page(HTMLParser):
    """Collects tags, attributes and text, and insists that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.words: list[str] = []
        self.style = ""
        self.feed(page)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({k for k, _ in attrs}) == len(attrs), f"attribute twice on {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.stack, f"<{tag}/> outside a drawing"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "style":
            self.style += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _shape(page: _Page) -> Iterator[str]:
    return (tag for tag, _ in page.tags)


_ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section", "article",
    "div", "p", "h1", "h2", "h3", "h4", "span", "b", "br", "dl", "dt", "dd", "table", "thead", "tbody",
    "tr", "th", "td", "ul", "ol", "li", "details", "summary", "code", "svg", "desc", "defs", "pattern",
    "rect", "line", "path", "circle", "text",
}  # fmt: skip


def _assert_inert(html: str) -> _Page:
    page = _Page(html)
    assert set(_shape(page)) <= _ALLOWED
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in {"href", "src", "srcdoc", "action", "style", "xlink:href", "ping", "poster"}, (
                tag,
                name,
            )
            assert "url(" not in (value or "") or re.fullmatch(r"url\(#hatch-[a-z]+\)", value or ""), (
                tag,
                name,
            )
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert "//" not in page.style
    html.encode("utf-8")
    assert not [c for c in html if not c.isprintable() and c not in "\n\t\u00a0\u3000"]
    return page


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_renders_as_a_closed_inert_page(name: str) -> None:
    summary = VARIANTS[name]()
    untouched = copy.deepcopy(summary)
    html = render_html(summary)
    assert summary == untouched
    page = _assert_inert(html)
    assert html.startswith("<!doctype html>")
    assert len(html.encode()) < 500_000
    assert summary["verdict"]["headline"] in page.text
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text.split()
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_renders_as_text(name: str) -> None:
    markdown = render_markdown(VARIANTS[name]())
    _assert_plain_tables(markdown)
    printed = _terminal(VARIANTS[name]())
    assert " ".join(VARIANTS[name]()["verdict"]["headline"].split())[:40] in " ".join(printed.split())


def _assert_plain_tables(markdown: str) -> None:
    for block in markdown.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, block


def test_same_summary_gives_the_same_bytes() -> None:
    assert render_html(_summary()) == render_html(_summary())
    assert render_markdown(_summary()) == render_markdown(_summary())


def test_content_policy_allows_exactly_our_style() -> None:
    page = _Page(render_html(_summary()))
    policies = [
        a["content"]
        for tag, a in page.tags
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policies == [
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    assert sum(tag == "style" for tag in _shape(page)) == 1


def _frame(page: _Page) -> list[str]:
    """The page's elements, less those that depend on how long a text is."""
    return [tag for tag in _shape(page) if tag not in {"details", "summary", "p", "span"}]


@cache
def _harmless(folded: bool) -> list[str]:
    return _frame(_Page(render_html(_hostile("word\n" * 40 if folded else "word"))))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_every_field_stays_text(payload: str) -> None:
    page = _assert_inert(render_html(_hostile(payload)))
    harmless = _harmless(len(payload) > 150 or "\n" in t.visible(payload))
    if payload.strip():
        assert _frame(page) == harmless
        assert " ".join(t.visible(payload).split())[:60] in page.text


@cache
def _n_headings() -> int:
    return sum(line.startswith(_HEADINGS) for line in render_markdown(_hostile("word")).splitlines())


@pytest.mark.parametrize("payload", PAYLOADS)
def test_markdown_keeps_a_payload_as_text(payload: str) -> None:
    markdown = render_markdown(_hostile(payload))
    markdown.encode("utf-8")
    assert "<" not in markdown
    assert "://" not in markdown
    assert "@" not in markdown
    assert not re.search(r"(?<!\\)(?:\\\\)*[\[\]`]", markdown)
    assert not re.search(r"(?i)\bwww\.", markdown)
    assert not [c for c in markdown if not c.isprintable() and c not in "\n\u00a0\u3000"]
    _assert_plain_tables(markdown)
    starts = [
        line
        for line in markdown.splitlines()
        if re.match(r"#+ |[+*>] |\d+[.)] |={3}|-{3}|    ", line) and not line.startswith(_HEADINGS)
    ]
    assert starts == []
    assert sum(line.startswith(_HEADINGS) for line in markdown.splitlines()) == _n_headings()


def _terminal(summary: Summary, *, encoding: str = "utf-8", width: int = 100) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="")
    print_terminal(summary, Console(file=stream, width=width, force_terminal=False, color_system=None))
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_terminal_shows_no_control_characters(payload: str) -> None:
    printed = _terminal(_hostile(payload))
    assert not [c for c in printed if not c.isprintable() and c not in "\n\u00a0\u3000"]
    if payload.strip() and "\n" not in payload and len(payload) < 60:
        assert t.visible(payload) in printed


def test_terminal_never_parses_markup_and_survives_ascii() -> None:
    assert "[bold red]rich[/bold red]" in _terminal(_hostile("[bold red]rich[/bold red]"))
    assert "28 \\u2192 15" in _terminal(_summary(), encoding="ascii")


def test_default_console_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    print_terminal(_summary())
    assert "Certified" in capsys.readouterr().out


def test_certificate_in_plain_words() -> None:
    text = _Page(render_html(_summary())).text
    assert "On 180 queries that no earlier step had seen, the full prompt reached 89.4 %" in text
    assert "and the smaller one 91.1 %." in text
    assert "At 95 % confidence the smaller prompt keeps at least 90 % of the accuracy of the full one" in text
    assert "lower bound +6.1 points" in text
    assert "e-value of 413, where 20 is needed" in text
    assert "(margin" not in text


def test_a_margin_is_stated_in_points_and_a_kept_prompt_is_not_called_smaller() -> None:
    s = _summary()
    s["certificate"].update(tau=None, margin=0.02)
    assert "the smaller prompt loses at most 2.0 points of accuracy" in _Page(render_html(s)).text
    s = {**_unchanged(), "certificate": _not_certified()["certificate"]}
    text = _Page(render_html(s)).text
    assert (
        "the full prompt reached 89.4 %. It could not be shown at 95 % confidence that a smaller prompt"
        in text
    )


def test_not_certified_is_said_plainly_and_in_the_warning_colour() -> None:
    html = render_html(_not_certified())
    text = _Page(html).text
    assert '<header class="warn">' in html
    assert '<span class="badge warn">Not certified</span>' in html
    assert "It could not be shown at 95 % confidence that the smaller prompt keeps at least 90 %" in text
    assert "p = 0.210, where at most 0.05 is needed" in text
    assert "Proposed for removal" in text
    assert "Demonstrations (proposal)" in text
    assert "Removed" not in text
    assert "**Not certified.**" in render_markdown(_not_certified())


def test_unpriced_is_never_zero_dollars() -> None:
    for text in (render_html(_bare()), render_markdown(_bare()), _terminal(_bare())):
        assert "Unpriced" in text
        assert "$" not in text


def test_money_and_break_even_are_stated_when_prices_are_known() -> None:
    text = _Page(render_html(_summary())).text
    assert "the run cost $11.41; 1,000 calls save $0.80, at $2.50 per million input tokens" in text
    assert "14,353 calls" in text


def test_a_prompt_that_grew_is_not_called_a_saving() -> None:
    s = _summary()
    s["cost"].update(saved_tokens_per_call=-40, saved_share=-0.04, break_even_calls=None)
    assert "uses 40 more tokens per call" in render_html(s)


def test_removed_come_first_by_verdict_and_worst_first() -> None:
    text = _Page(render_html(_summary())).text
    titles = [
        "Harmful on these queries",
        "Redundant 10",
        "Kept 15",
        "Useful 10",
        "Unclear 4",
        "Harmful on these queries, kept all the same",
    ]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert text.index("\u22120.340") < text.index("\u22120.270") < text.index("\u22120.190")


def test_measured_and_estimated_never_look_alike() -> None:
    page = _Page(render_html(_summary()))
    fills = {a["fill"] for tag, a in page.tags if tag == "rect" and a.get("class", "").startswith("s-")}  # type: ignore[union-attr]
    assert fills == {f"url(#hatch-{v})" for v in ("redundant", "useful", "unclear")}
    solid = [a for tag, a in page.tags if tag == "rect" and a.get("class") == "f-harmful" and "height" in a]
    assert len(solid) > 4
    only_measured = _Page(render_html(_refused()))
    assert not [a for _, a in only_measured.tags if "url(" in (a.get("fill") or "")]


def test_what_was_verified_is_shown_filled_and_the_rest_hollow_dashed_and_in_words() -> None:
    page = _Page(render_html(_summary()))
    found = _summary()["verification"]
    measured = [i for i, v in enumerate(found["measured"]) if v is not None]
    circles = [a for tag, a in page.tags if tag == "circle" and (a.get("class") or "").startswith("mark-")]
    filled = [a for a in circles if (a.get("class") or "").startswith("mark-measured")]
    hollow = [a for a in circles if (a.get("class") or "").startswith("mark-estimated")]
    assert len(filled) == 3 * len(measured) + len({i in found["named"] for i in measured})
    assert len(hollow) == 3 * (len(found["unit_ids"]) - len(measured)) + 1
    assert {a["fill"] for a in hollow} == {"#ffffff"}
    assert not {a["fill"] for a in filled} & {"#ffffff"}
    dashes = [a for tag, a in page.tags if tag == "line" and a.get("stroke-dasharray") == "2 3"]
    assert len(dashes) == 2 * (len(found["unit_ids"]) - len(measured))
    assert page.text.count("not measured ; expected") == len(found["unit_ids"]) - len(measured)
    assert (
        f"Attributions of {len(measured)} of 28 demonstrations were measured on the target model" in page.text
    )
    markdown = render_markdown(_summary())
    assert markdown.count("| not measured; expected ") == len(found["unit_ids"]) - len(measured)


def test_a_verification_that_measured_nothing_or_has_gaps_is_shown() -> None:
    s = _summary()
    n = len(s["verification"]["unit_ids"])
    s["verification"].update(
        order=[2.5, -1, 99, None, 0, 0],
        named=[77],
        measured=[None] * n,
        expected=[],
        chance=[1.0],
        outcome="limit",
    )
    page = _Page(render_html(s))
    assert "mark-measured" not in render_html(s)
    assert "nothing to expect it by" in page.text
    render_markdown(s)


def test_curve_marks_the_choice_the_full_prompt_and_the_line() -> None:
    text = _Page(render_html(_summary())).text
    for words in ("chosen: 15, 91.7 %", "full prompt: 28, 89.2 %", "0.90 \u00d7 full prompt: 80.2 %"):
        assert text.count(words) == 2  # the wide and the narrow drawing
    assert "full prompt, kept: 1" in _Page(render_html(_one())).text


def test_screening_shows_the_rule_the_paper_and_what_happened_next() -> None:
    text = _Page(render_html({**_summary(), "verification": None})).text
    assert "The paper's rule would have said: accepted after 19 pairs." in text
    assert (
        "What happened next: Attributions were estimated with the proxy model SmolLM2-135M-Instruct." in text
    )
    assert "accepted above 40" in text
    refused = _Page(render_html(_refused())).text
    assert "rejected below \u22123.00" in refused
    assert "No proxy passed the screen." in refused
    assert "not tested" in refused


def test_long_text_is_clipped_and_says_by_how_much() -> None:
    html = render_html(_many())
    assert re.search(r"98,\d{3} more characters</p>|98,\d{3} more characters not shown", html)
    assert "ticket-0199" in html


def test_redacted_texts_are_said_to_be_missing() -> None:
    assert _Page(render_html(_redacted())).text.count("text not shown") == 28
    assert "kettle" not in render_html(_redacted()) + render_markdown(_redacted()) + _terminal(_redacted())


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        (("schema",), 2, ArtifactError, r"summary\['schema'\] is 2; this version renders schema 1"),
        (
            ("verdict", "status"),
            "great",
            InputError,
            r"summary\.verdict\.status is 'great'; it must be one of certified",
        ),
        (("title",), 3, InputError, r"summary\.title is 3; it must be a string"),
        (
            ("after", "n_demonstrations"),
            "<b>",
            InputError,
            r"summary\.after\.n_demonstrations is '<b>'; it must be a number",
        ),
        (
            ("demonstrations", 2, "kept"),
            1,
            InputError,
            r"summary\.demonstrations\[2\]\.kept is 1; it must be true or false",
        ),
        (("demonstrations", 0, "verdict"), "x y", InputError, r"verdict is 'x y'; it must be one of harmful"),
        (("limits",), "none", InputError, r"summary\.limits is 'none'; it must be a list"),
        (("cost",), [], InputError, r"summary\.cost is \[\]; it must be an object"),
        (("settings",), {"a": {1, 2}}, InputError, r"summary\.settings is \{1, 2\}; it must be JSON"),
    ],
)
def test_a_wrong_value_is_named(
    path: tuple[str | int, ...], value: Any, error: type[Exception], message: str
) -> None:
    s: Any = _summary()
    place = s
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    for render in (render_html, render_markdown, print_terminal):
        with pytest.raises(error, match=message):
            render(s)


def test_missing_required_keys_wrong_roots_and_deep_settings_are_refused() -> None:
    s = _summary()
    del s["verdict"]["headline"]
    with pytest.raises(InputError, match=r"summary\.verdict\.headline is missing"):
        render_html(s)
    with pytest.raises(InputError, match="must be a mapping"):
        render_html([])  # type: ignore[arg-type]
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    with pytest.raises(InputError, match="nested deeper than 32"):
        render_html({**_summary(), "settings": {"a": deep}})


def test_reading_drops_unknown_keys_and_numbers_that_are_none() -> None:
    s = _summary()
    s["surprise"] = "<b>"
    s["demonstrations"][0]["standard_error"] = float("nan")
    s["demonstrations"][1]["attribution"] = 10**400
    checked = read(s)
    assert "surprise" not in checked
    assert checked["demonstrations"][0]["standard_error"] is None
    assert checked["demonstrations"][1]["attribution"] is None
    assert "n/a" in render_html(s)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \u00e9 \u6f22 \U0001f600 \u2764\ufe0f", "plain \u00e9 \u6f22 \U0001f600 \u2764\ufe0f"),
        ("a\r\nb\tc\u00a0d", "a\nb\tc\u00a0d"),
        ("a\u200bb", "a[U+200B]b"),
        ("\x1b[0m", "[U+001B][0m"),
        ("\U000e0041", "[U+E0041]"),
        ("\ud83d", "[U+D83D]"),
        ("\u202e\u2066\ufeff\u2028\x7f\x85", "[U+202E][U+2066][U+FEFF][U+2028][U+007F][U+0085]"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert t.visible(text) == shown
    assert t.visible(shown) == shown


def test_numbers_as_read_by_people() -> None:
    assert [t.count(None), t.count(1234567), t.count(-40)] == ["n/a", "1,234,567", "\u221240"]
    assert [t.signed(0.0), t.signed(-0.0001), t.signed(0.2), t.signed(-0.2)] == [
        "0.000",
        "0.000",
        "+0.200",
        "\u22120.200",
    ]
    assert [t.percent(0.905), t.share(0.333), t.share(0.004), t.share(1), t.share(0.999)] == [
        "90.5\u00a0%", "33\u00a0%", "0.4\u00a0%", "100\u00a0%", "99.9\u00a0%",
    ]  # fmt: skip
    amounts = [(0.8, "USD"), (0.0042, "EUR"), (0, "USD"), (1e-7, "USD"), (-3, "CHF")]
    assert [t.money(value, currency) for value, currency in amounts] == [
        "$0.80", "\u20ac0.0042", "$0.00", "$1.0e-07", "\u22123.00\u00a0CHF",
    ]  # fmt: skip
    assert [t.p_value(0.0001), t.p_value(0.05), t.p_value(None)] == ["p < 0.001", "p = 0.050", "p n/a"]
    assert [t.fixed(0.00001), t.fixed(412.6, 1), t.fixed(2.5e7)] == ["1.0e-05", "413", "2.5e+07"]
    assert t.interval("86.0\u00a0%", "94.0\u00a0%") == "86.0 to 94.0\u00a0%"


def test_markdown_escape_leaves_ordinary_words_alone() -> None:
    assert escape("13 removed (46 %), -0.2 + 3.5 = 3.3!") == "13 removed (46 %), -0.2 + 3.5 = 3.3!"
    assert escape("- a") == "&#45; a"
    assert escape("12. a") == "&#49;2. a"
    assert escape("==") == "&#61;="


def test_ticks_scales_and_drawings() -> None:
    assert linear_ticks(0.51, 0.97, 5) == [0.6, 0.7, 0.8, 0.9]
    assert linear_ticks(0, 3, 8, whole=True) == [0, 1, 2, 3]
    assert linear_ticks(2, 2, 5) == [2]
    assert log_ticks(0.3, 4000) == [1, 10, 100, 1000]
    assert Scale(0, 10, 100, 200)(5) == 150
    assert Scale(1, 100, 0, 2, log=True)(10) == pytest.approx(1)
    assert Scale(3, 3, 0, 10)(3) == 5
    canvas = Canvas(10, 10, name="n", title="<t>", description='"d"')
    canvas.text(1, -0.01, "a&b", classes="ink strong")
    assert "&lt;t&gt;" in canvas.render()
    assert "a&amp;b" in canvas.render()
    assert 'y="0"' in canvas.render()


def test_labels_never_overlap() -> None:
    labels = Labels(Box(0, 0, 300, 100))
    spots = [(150.0, y, "middle") for y in (20.0, 24.0, 60.0)]
    first, second = labels.place("chosen: 12", 12, spots), labels.place("full: 13", 12, spots)
    assert first == spots[0]
    assert second == spots[2]
    assert labels.place("no room left", 12, spots[:2]) is None
