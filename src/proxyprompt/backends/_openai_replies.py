"""The files that a provider's batch brings: a line for each request, in any order, perhaps twice, perhaps none.

Nothing here opens a connection.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_PASSING = frozenset({408, 409, 429, 500, 502, 503, 504, 529})


@dataclass(frozen=True)
class Refusal:
    """A line without a usable answer: the status, ``None`` if it tells none, and the reason."""

    status: int | None
    reason: str

    @property
    def passes(self) -> bool:
        """Whether there is no answer for a reason that passes: expired, overloaded."""
        return self.status is None or self.status in _PASSING

    @property
    def billed(self) -> bool:
        """Whether the request was answered, and so paid, in a form that cannot be read."""
        return self.status == 200


@dataclass
class Replies:
    """What the files of one batch hold, by the name of the line.

    Attributes
    ----------
    answers : dict of str to mapping
        Bodies of answers. A second line of the same name takes nothing away from the first.
    refusals : dict of str to Refusal
        Of lines without an answer.
    torn : bool
        Whether there are lines that cannot be read, so that what is missing may have been answered.
    """

    answers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    torn: bool = False

    def answers_of(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        """The answers to the lines of one request."""
        return [self.answers[name] for name in names if name in self.answers]

    def refusal_of(self, names: Sequence[str]) -> Refusal | None:
        """The first refusal among the lines of one request."""
        return next((self.refusals[name] for name in names if name in self.refusals), None)

    def unaccounted(self, names: Sequence[str], *, complete: bool) -> int:
        """How many lines of one request brought nothing and may have been billed all the same.

        ``complete``: whether the batch says that it went through, so that each line has been worked off.
        """
        silent = sum(name not in self.answers and name not in self.refusals for name in names)
        unreadable = sum(name in self.refusals and self.refusals[name].billed for name in names)
        return unreadable + (silent if complete or self.torn else 0)


def read_replies(files: Iterable[bytes]) -> Replies:
    """Read the output file and the error file of a batch."""
    replies = Replies()
    for content in files:
        for line in content.splitlines():
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            name = entry.get("custom_id") if isinstance(entry, dict) else None
            if isinstance(name, str):
                _sort_in(replies, name, entry)
            else:
                replies.torn = True
    for name in replies.answers:
        replies.refusals.pop(name, None)
    return replies


def _sort_in(replies: Replies, name: str, entry: Mapping[str, Any]) -> None:
    response, error = entry.get("response"), entry.get("error")
    response = response if isinstance(response, dict) else {}
    body, status = response.get("body"), _status(response.get("status_code"))
    if status is None and isinstance(body, dict) and "choices" in body:
        status = 200  # some providers give the body alone
    if status == 200 and isinstance(body, dict):
        replies.answers.setdefault(name, body)
        return
    if isinstance(body, dict) and body.get("error"):
        error = body["error"]
    message = error.get("message") if isinstance(error, dict) else error
    said = message if isinstance(message, str) and message else "the batch gave no answer to it"
    replies.refusals.setdefault(name, Refusal(status, (f"HTTP {status}: " if status else "") + said))


def _status(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:9])
    return value if isinstance(value, int) and not isinstance(value, bool) else None
