"""Which turns of a chat request are demonstrations: by position, by mark, else by structure.

A conversation looks much like demonstrations, and cutting a conversation loses data. So structure counts only
where several independent signs agree, and everything short of that is an error that says what to give.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from .errors import InputError

__all__ = ["BAR", "Turns", "find_demonstrations", "structure_score"]

Role: TypeAlias = Literal["system", "developer", "user", "assistant"]  # that of backends, which are above

BAR = 0.8
_MARK = "pp-ex-"
_NAMES = ("example_user", "example_assistant")
_KEYS = {"role", "content", "name", "id"}
_LEADING = ("system", "developer")
_EXPLICIT = (
    "Say which turns are demonstrations: demonstrations=[positions of their user turns], or name the turns"
    " example_user and example_assistant."
)

# Words by which a speaker refers to what was said before, or talks to the other; a demonstration does neither.
_REFERS = re.compile(
    r"(?i)^\W*(?:and|also|but|so|then|ok|okay|yes|no|thanks?|thank you|great|cool|perfect|hi|hello|hey|sorry|wait"
    r"|actually|what about|how about|can you|could you|would you|please|why)\b"
    r"|\b(?:you said|you mentioned|you told|your (?:last|previous) (?:answer|reply)|(?:as|like) before|earlier"
    r"|previous(?:ly)?|the (?:first|second|last|other) one|thanks|thank you)\b"
    r"|\b(?:change|make|fix|explain|redo|shorten|translate|do|try|rewrite) (?:it|that|this)\b"
)
_TALKS = re.compile(
    r"(?i)^\W*(?:sure|of course|certainly|sorry|i(?:'|\u2019)m sorry|i am sorry|you(?:'|\u2019)re welcome|hello|hi"
    r"|great question|happy to|glad|no problem|here(?:'|\u2019)s|here is|here are)\b|\?\s*$"
)


@dataclass(frozen=True)
class Turns:
    """What was recognised. ``demonstrations`` are (id, position of the user turn, user text, answer)."""

    instruction: str
    instruction_role: Role
    user: tuple[Role, str | None]
    assistant: tuple[Role, str | None]
    demonstrations: tuple[tuple[str, int, str, str], ...]
    query: tuple[int, str]
    positions: tuple[int, ...]  # of the user turns; each answer is one further
    how: str


def find_demonstrations(
    messages: Sequence[Mapping[str, Any]], positions: Sequence[int] | None = None
) -> Turns:
    """Recognise the demonstrations of a request, or say why that is not possible."""
    _check(messages)
    first = 1 if messages[0]["role"] in _LEADING and messages[0].get("name") not in _NAMES else 0
    if first and not messages[0]["content"]:
        raise InputError("messages[0]: an empty instruction cannot be kept.", hint="Leave the turn out.")
    last = len(messages) - 1
    if messages[last]["role"] != "user" or messages[last].get("name") is not None:
        raise InputError(
            f"messages: the last turn must be a user turn without a name, which holds a query; got"
            f" {_shown(messages[last])}.",
            hint="Append one: {'role': 'user', 'content': ...}.",
        )
    starts, how = _starts(messages, first, last, positions)
    if starts != list(range(first, last, 2)):
        loose = sorted(set(range(first, last)) - {s + k for s in starts for k in (0, 1)})
        raise InputError(
            f"messages[{loose[0]}] is {_shown(messages[loose[0]])}: neither of a demonstration nor the query, and a"
            " few-shot prompt holds nothing else.",
            hint="Leave such turns out, or mark them as demonstrations too.",
        )
    return Turns(
        instruction=messages[0]["content"] if first else "",
        instruction_role=cast(Role, messages[0]["role"]) if first else "system",
        user=_speaker(messages, starts, 0),
        assistant=_speaker(messages, starts, 1),
        demonstrations=tuple(
            (_id(messages, s, k), s, messages[s]["content"], messages[s + 1]["content"])
            for k, s in enumerate(starts, 1)
        ),
        query=(last, messages[last]["content"]),
        positions=tuple(starts),
        how=how,
    )


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise InputError(f"messages: got {messages!r:.60}; a list of chat turns is needed.")
    for i, turn in enumerate(messages):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise InputError(f"messages[{i}]: got {turn!r:.60}; a mapping with role and content is needed.")
        if turn["role"] not in (*_LEADING, "user", "assistant"):
            raise InputError(
                f"messages[{i}] has the role {turn['role']!r}; a few-shot prompt is made of system, developer, user"
                " and assistant turns.",
                hint="Transcripts of tools cannot be pruned.",
            )
        more = sorted(str(k) for k in turn if k not in _KEYS and turn[k] is not None)
        if more or not isinstance(turn.get("content"), str):
            what = f"has {', '.join(more)}" if more else f"has content {turn.get('content')!r:.60}"
            raise InputError(
                f"messages[{i}] {what}; only a role, text content and a name can be kept byte for byte.",
                hint="Write content as one string. Tool calls cannot be demonstrations.",
            )
        name = turn.get("name")
        if name is not None and (
            not isinstance(name, str) or (turn["role"] in _LEADING and name not in _NAMES)
        ):
            raise InputError(f"messages[{i}]: name={name!r} cannot be kept here.", hint="Leave it out.")
        if turn["role"] in _LEADING and i > 0 and name is None:
            raise InputError(
                f"messages[{i}] is a second {turn['role']} turn; a few-shot prompt has one instruction, at its beginning.",
                hint="Join the instructions into one turn.",
            )


def _starts(
    messages: Sequence[Mapping[str, Any]], first: int, last: int, positions: Sequence[int] | None
) -> tuple[list[int], str]:
    """Positions of the user turns of demonstrations, and how they were found."""
    if positions is not None:
        return _given(messages, first, last, positions), "positions"
    body = range(first, last)
    marks: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "ids": lambda turn: str(turn.get("id") or "").startswith(_MARK),
        "names": lambda turn: turn.get("name") in _NAMES,
    }
    for how, marked in marks.items():
        found = [i for i in body if marked(messages[i])]
        if found:
            return _pairs(messages, found, how), how
    starts = list(range(first, last, 2))
    alternating = len(body) % 2 == 0 and all(
        messages[i]["role"] == ("user" if (i - first) % 2 == 0 else "assistant") for i in body
    )
    if not alternating or not starts:
        raise InputError(
            "messages: no demonstrations were recognised; pairs of a user and an assistant turn are needed between the"
            " instruction and the query.",
            hint=_EXPLICIT,
        )
    users = [messages[s]["content"] for s in starts]
    score, signs = structure_score(
        users, [messages[s + 1]["content"] for s in starts], messages[last]["content"]
    )
    if score < BAR:
        raise InputError(
            f"messages: the turns may be a conversation; as demonstrations they score {score:.2f}, and {BAR} is needed"
            f" ({signs}).",
            hint=_EXPLICIT,
        )
    return starts, "structure"


def _given(
    messages: Sequence[Mapping[str, Any]], first: int, last: int, positions: Sequence[int]
) -> list[int]:
    if any(isinstance(p, bool) or not isinstance(p, int) for p in positions):
        raise InputError(f"demonstrations: got {positions!r:.80}; positions in messages are whole numbers.")
    wrong = sorted(p for p in positions if not first <= p < last)
    if wrong or len(set(positions)) < len(positions) or not positions:
        raise InputError(
            f"demonstrations: got {list(positions)}; each position once, from {first} to {last - 1} (the last turn is"
            " the query).",
        )
    asks = sorted(p for p in positions if _part(messages[p]) == 0)
    answers = {p for p in positions if _part(messages[p]) == 1}
    if answers - {p + 1 for p in asks}:
        alone = min(answers - {p + 1 for p in asks})
        raise InputError(f"demonstrations: the answer at {alone} has no user turn before it in the list.")
    return _pairs(messages, [q for p in asks for q in (p, p + 1)], "positions")


def _part(turn: Mapping[str, Any]) -> int:
    """0 for what is asked, 1 for the answer; names count more than roles."""
    name = turn.get("name")
    return _NAMES.index(name) if name in _NAMES else int(turn["role"] == "assistant")


def _pairs(messages: Sequence[Mapping[str, Any]], found: Sequence[int], how: str) -> list[int]:
    starts = list(found[::2])
    if list(found) != [i for s in starts for i in (s, s + 1)] or any(
        _part(messages[i]) != k % 2 for k, i in enumerate(found)
    ):
        raise InputError(
            f"messages: the turns marked by {how} ({list(found)[:8]}) are not pairs of a user turn and the answer that"
            " follows it.",
            hint=_EXPLICIT,
        )
    return starts


def _speaker(
    messages: Sequence[Mapping[str, Any]], starts: Sequence[int], part: int
) -> tuple[Role, str | None]:
    speakers = {(messages[s + part]["role"], messages[s + part].get("name")) for s in starts}
    if len(speakers) > 1:
        raise InputError(
            f"messages: the {('user', 'assistant')[part]} turns of demonstrations have different roles or names:"
            f" {sorted(speakers, key=str)}; they must be alike.",
        )
    role, name = speakers.pop()
    return cast(Role, role), name


def _id(messages: Sequence[Mapping[str, Any]], start: int, k: int) -> str:
    own = messages[start].get("id")
    return own if isinstance(own, str) and own.startswith(_MARK) else f"demo-{k}"


def _shown(turn: Mapping[str, Any]) -> str:
    return f"a {turn['role']} turn" + (f" named {turn['name']!r}" if turn.get("name") else "")


def structure_score(users: Sequence[str], answers: Sequence[str], query: str) -> tuple[float, str]:
    """How much the turns look like demonstrations, 0 to 1, and the signs in words."""
    asked = [*users, query]
    frame = _frame(asked)
    alike, strong = _alike(answers)
    refers = sum(bool(_REFERS.search(u)) for u in asked)
    talks = sum(bool(_TALKS.search(a)) for a in answers)
    # Words that refer back may also stand in a shared frame ("Please classify: ..."); then they say nothing.
    if frame and refers == len(asked):
        refers = 0
    score = 0.25 + 0.35 * bool(frame) + 0.35 * bool(alike) + 0.25 * (strong and not frame)
    score -= 0.4 * min(1, refers) + 0.4 * min(1, talks)
    if len(users) < 2:
        score = min(score, 0.6)  # one pair repeats nothing
    signs = [
        f"user turns share {frame!r}" if frame else "user turns share no beginning or end",
        f"answers are alike: {alike}" if alike else "answers are not alike",
        *([f"{refers} user turns refer to earlier ones"] if refers else []),
        *([f"{talks} answers talk to the user"] if talks else []),
        *(["one pair only"] if len(users) < 2 else []),
    ]
    return min(max(score, 0.0), 1.0), "; ".join(signs)


def _frame(texts: Sequence[str]) -> str:
    """The longest label that all texts begin or end with: up to a colon, a line break or a bracket."""
    for shared in (_common_start(texts), _common_start([t[::-1] for t in texts])[::-1]):
        label = re.search(r"(?s)\w[^\n:>\]]{0,80}?[:>\]\n]", shared)
        if label:
            return label.group()
        if len(shared.split()) >= 3:
            return shared.strip()[:80]
    return ""


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all share
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _alike(answers: Sequence[str]) -> tuple[str, bool]:
    """What the answers have in common, and whether they repeat so much that this alone says a lot."""
    shapes: tuple[tuple[str, Callable[[str], Any]], ...] = (
        ("JSON with the same keys", _json_keys),
        ("numbers", lambda a: "number" if re.fullmatch(r"\s*[-+$\u20ac]?\d[\d.,:%/ -]*\s*", a) else None),
    )
    for what, shape in shapes:
        found = {shape(a) for a in answers}
        if len(found) == 1 and None not in found and len(answers) > 1:
            return what, False
    labels = {a.strip().lower() for a in answers}
    short = all(len(a) <= 40 and "\n" not in a.strip() and len(a.split()) <= 4 for a in answers)
    if short and len(labels) <= max(2, len(answers) // 2) and len(answers) >= 2:
        return f"{len(labels)} different short ones", len(answers) >= 6 and len(labels) <= len(answers) // 2
    if short and len(answers) >= 3 and not any(re.search(r"[.!?]\s*$", a) for a in answers):
        return "short phrases", False
    return "", False


def _json_keys(answer: str) -> Any:
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return tuple(sorted(value)) if isinstance(value, dict) else None
