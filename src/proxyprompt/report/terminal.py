"""The report in a terminal: the verdict, the figures, what to remove, and where the evidence stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxyprompt._require import require

from . import _text as t
from ._view import build

__all__ = ["print_terminal"]

_TONES = {"good": "green", "warn": "yellow", "calm": "blue"}
_COLOURS = {"harmful": "red", "redundant": "yellow", "useful": "blue", "unclear": "bright_black"}
_ROWS = 12  # rows of a group before the rest is only counted
_TEXT = 70  # characters of a demonstration


def print_terminal(summary: Mapping[str, Any], console: Any = None) -> None:
    """Print a summary with rich.

    Parameters
    ----------
    summary : mapping
        JSON-safe summary of a run, schema 1.
    console : rich.console.Console, optional
        Where to print; the standard output by default.

    Raises
    ------
    MissingDependencyError
        If rich is not installed.
    ArtifactError, InputError
        If the summary has another version or a value of the wrong kind.

    Notes
    -----
    Every string is printed as a ``Text`` object, never as rich markup, and control characters are shown as
    code points. Characters that the console's encoding lacks are shown as escapes.
    """
    view = build(summary)
    printer = _Printer(console if console is not None else require("rich.console", "report").Console())
    tone = _TONES[view["status"]["tone"]]
    printer.line()
    printer.line(
        (f" {view['status']['label']} ", f"bold reverse {tone}"), (f" {view['verdict']['headline']}", "bold")
    )
    printer.line((f"{view['title']}; target model {view['target']['name']}; {view['when']}", "bright_black"))
    printer.line()
    figures = [
        [f["label"], f"{f['before']} \u2192 {f['after']}" if f["before"] else f["after"], f["note"]]
        for f in view["figures"]
    ]
    printer.table(["", "", ""], figures, styles=["", f"bold {tone}", "bright_black"])
    for sentence in [*view["verdict"]["sentences"], *view["certificate_sentences"]]:
        printer.line(sentence)
    _removals(view, printer)
    if view["verified"]:
        rows = [
            [r["place"], t.clip(r["id"], 30), r["estimate"], r["measured"], r["expected"], r["verdict"]]
            for r in view["verified"][:_ROWS]
        ]
        printer.heading("What the proxy proposed and the target measured")
        printer.line(view["verification"]["text"])
        printer.table(
            ["", "Id", "Proxy's estimate", "Measured on the target", "Not measured", "Result"], rows
        )
        if len(view["verified"]) > _ROWS:
            printer.line((f"and {len(view['verified']) - _ROWS} more", "bright_black"))
    if view["relabels"]:
        rows = [[r[k] for k in ("id", "label", "answer", "probability")] for r in view["relabels"]]
        printer.heading("Labels that the target contradicts")
        printer.table(["Id", "Label", "The target answers", "Probability"], rows)
    if view["proxies"]:
        rows = [[p["name"], p["label"], p["note"]] for p in view["proxies"]]
        printer.heading("May the proxy stand in?")
        printer.table(["Proxy", "Decision", "Why"], rows)
    printer.line(view["explained"])
    printer.heading("Cost")
    for sentence in view["money_sentences"]:
        printer.line(sentence)
    if view["money_rows"]:
        keys = ("name", "before", "after", "saved", "pays")
        printer.table(
            ["Per call", "Full prompt", "Smaller prompt", "1,000 calls save", "Run paid after"],
            [[row[key] for key in keys] for row in view["money_rows"]],
        )
    for sentence in [*view["money_notes"], view["crr_sentence"]]:
        printer.line(*([sentence] if sentence else []))
    if view["limits"]:
        printer.heading("Limits")
        for sentence in view["limits"]:
            printer.line(f"- {sentence}")


def _removals(view: dict[str, Any], printer: _Printer) -> None:
    proposal = view["verdict"]["status"] == "not_certified"
    removed = [g for g in view["groups"] if not g["kept"]]
    printer.heading(
        "Proposed for removal" if proposal and removed else "Removed" if removed else "Nothing was removed"
    )
    for group in removed:
        rows = [
            [
                t.clip(d["id"], 30),
                "text not shown" if d["input"] is None else t.clip(t.one_line(d["input"]), _TEXT),
                t.clip(t.one_line(d["output"] or ""), 30),
                f"{d['credit']} {d['source']}",
                d["reason"],
            ]
            for d in group["rows"][:_ROWS]
        ]
        printer.line((group["title"], f"bold {_COLOURS[group['verdict']]}"), f" ({len(group['rows'])})")
        printer.table(["Id", "Text", "Answer", "Attribution", "Why"], rows)
        if len(group["rows"]) > _ROWS:
            printer.line((f"and {len(group['rows']) - _ROWS} more", "bright_black"))
    kept = [f"{len(g['rows'])} {g['verdict']}" for g in view["groups"] if g["kept"]]
    if kept:
        printer.line((f"Kept: {', '.join(kept)}.", "bright_black"))


class _Printer:
    """Turns plain strings into rich objects, so that nothing is parsed as markup on the way."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._text = require("rich.text", "report").Text
        self._table = require("rich.table", "report").Table
        self._encoding = str(getattr(console, "encoding", "utf-8"))

    def line(self, *parts: str | tuple[str, str]) -> None:
        """One paragraph of plain or styled parts."""
        text = self._text()
        for part in parts:
            words, style = (part, "") if isinstance(part, str) else part
            text.append(self._fit(words), style=style)
        self._console.print(text, soft_wrap=False)

    def heading(self, words: str) -> None:
        """A title with a blank line before it."""
        self.line()
        self.line((words, "bold underline"))

    def table(self, header: list[str], rows: list[list[str]], styles: list[str] | None = None) -> None:
        """A table without borders."""
        table = self._table(
            box=None,
            show_header=any(header),
            pad_edge=False,
            padding=(0, 2, 0, 0),
            header_style="bright_black",
        )
        for i, name in enumerate(header):
            table.add_column(self._text(self._fit(name)), style=styles[i] if styles else "", overflow="fold")
        for row in rows:
            table.add_row(*(self._text(self._fit(cell)) for cell in row))
        self._console.print(table)
        self.line()

    def _fit(self, words: str) -> str:
        words = words.replace("\n", " ").replace("\t", " ")
        return words.encode(self._encoding, "backslashreplace").decode(self._encoding)
