"""Where the sentences and words of a text begin and end, and the text that is left when some are taken out.

Spans are character offsets, so that nothing but the text itself decides what stands between two segments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

__all__ = ["Segments", "Span", "sentence_spans", "word_spans"]

Span: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Segments:
    """A text and the segments of it that may be left out.

    Parameters
    ----------
    text : str
    spans : tuple of (int, int)
        In order, not empty, without overlap.
    """

    text: str
    spans: tuple[Span, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The segments."""
        return tuple(self.text[begin:end] for begin, end in self.spans)

    def joined(self, kept: Sequence[bool]) -> str:
        """What is left when each segment takes along the gap before it.

        The first segment that stays takes the text before the first segment of all, whichever it is; the text behind
        the last segment stays as long as anything does. So gaps are never doubled, nothing dangles, the whole is the
        original text, and nothing kept is the empty text.

        Examples
        --------
        >>> Segments("One. Two. Three.\\n", sentence_spans("One. Two. Three.\\n")).joined([False, True, True])
        'Two. Three.\\n'
        """
        out: list[str] = []
        before = 0
        for keep, (begin, end) in zip(kept, self.spans, strict=True):
            if keep:
                gap = self.text[before:begin] if out else self.text[: self.spans[0][0]]
                out.append(gap + self.text[begin:end])
            before = end
        return "".join([*out, self.text[before:]]) if out else ""

    def replaced(self, kept: Sequence[bool], mask: str) -> str:
        """The text with ``mask`` in place of every segment that is not kept; all gaps stay.

        Examples
        --------
        >>> Segments("so, so good", word_spans("so, so good", "lime")).replaced([True, False, True], "X")
        'so, X good'
        """
        out: list[str] = []
        before = 0
        for keep, (begin, end) in zip(kept, self.spans, strict=True):
            out += [self.text[before:begin], self.text[begin:end] if keep else mask]
            before = end
        return "".join([*out, self.text[before:]])


_WORDS = {"whitespace": re.compile(r"\S+"), "lime": re.compile(r"\w+")}


def word_spans(text: str, split: str) -> tuple[Span, ...]:
    """Spans of the words: between white space, or (``"lime"``) runs of letters, digits and underscores."""
    return tuple(match.span() for match in _WORDS[split].finditer(text))


_CLOSERS = "\"'”’»)\\]}*_"
# Each alternative begins where nothing of its own stands before it, so that no run of characters is read twice.
_BREAK = re.compile(
    r"(?P<line>(?:\r\n|[\n\r\u2028\u2029])\s*)"
    rf"|(?<![.!?…])(?P<mark>[.!?…]++)(?P<closers>[{_CLOSERS}]*+)(?=\s)"
    rf"|[。！？]+[{_CLOSERS}」』）]*"
)
_BLANK_LINE = re.compile(r"(?:\r\n|[\n\r\u2028\u2029])[^\S\n\r]*(?:\r\n|[\n\r\u2028\u2029])")
_ENUMERATOR = re.compile(r"\s*\(?(?:\d{1,3}|[ivxIVX]{1,5})")
_SOMETHING = re.compile(r"\S")
_REACH = 24
"""Characters looked at before a full stop; the longest abbreviation or list number is shorter."""
_GOES_ON = {
    "al", "cf", "dr", "e.g", "eq", "esp", "fig", "figs", "gen", "i.e", "mr", "mrs", "ms", "prof", "rev", "sec", "st", "vs",
}  # fmt: skip
_MAY_END = {
    "a.m", "approx", "apr", "aug", "co", "corp", "dec", "dept", "est", "etc", "feb", "inc", "jan", "jr", "ltd", "max",
    "min", "no", "nov", "nr", "oct", "p.m", "ph.d", "pp", "sept", "sr", "u.k", "u.n", "u.s", "vol",
}  # fmt: skip


def sentence_spans(text: str) -> tuple[Span, ...]:
    r"""Spans of the sentences of a text, without the white space around them; all else belongs to one.

    A sentence ends at a full stop, question or exclamation mark before white space, at a blank line, and at a line
    break unless the next line goes on in lower case (so list items are sentences and hard-wrapped lines are not);
    at a Chinese or Japanese full stop anywhere. A full stop ends none in a number, after a single letter, after a
    list's number, or after an abbreviation that goes on (``e.g.``); nor, if lower case or a digit follows, after one that
    may end a sentence (``etc.``), an ellipsis or a closing quote. The abbreviations are English.

    Examples
    --------
    >>> text = "Dr. Lee pays $3.50, e.g. on Monday. Yes!\n- Bills\n- Refunds etc. go here"
    >>> [text[a:b] for a, b in sentence_spans(text)]
    ['Dr. Lee pays $3.50, e.g. on Monday.', 'Yes!', '- Bills', '- Refunds etc. go here']
    """
    cuts = [0, *(match.end() for match in _BREAK.finditer(text) if _ends_sentence(text, match)), len(text)]
    stripped = (_strip(text, begin, end) for begin, end in pairwise(cuts))
    return tuple((begin, end) for begin, end in stripped if begin < end)


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    if match["line"] is None and match["mark"] is None:
        return True
    behind = _SOMETHING.search(text, match.end())
    following = behind.group() if behind else ""
    if match["line"] is not None:
        return not following.islower() or _BLANK_LINE.search(match["line"]) is not None
    goes_on = following.islower() or following.isdigit()
    if match["closers"] or (match["mark"] != "." and set(match["mark"]) <= set(".…")):
        return not goes_on
    return match["mark"] != "." or _full_stop_ends(text, match.start(), goes_on)


def _full_stop_ends(text: str, stop: int, goes_on: bool) -> bool:
    before = text[max(0, stop - _REACH) : stop]
    last = re.split(r"\s", before)[-1].lower().lstrip("([{\"'“‘«*_")
    if (len(last) == 1 and last.isalpha()) or last in _GOES_ON:
        return False
    if last in _MAY_END:
        return not goes_on
    lines = re.split(r"[\n\r]", before)
    begins_line = len(lines) > 1 or stop <= _REACH
    return not (begins_line and _ENUMERATOR.fullmatch(lines[-1]))


def _strip(text: str, begin: int, end: int) -> Span:
    part = text[begin:end]
    return begin + len(part) - len(part.lstrip()), end - (len(part) - len(part.rstrip()))
