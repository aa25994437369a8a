"""From what a model answered to a value for each label: log-probabilities of tokens, stated probabilities, texts.

The rules are in the Notes of :class:`~proxyprompt.backends.openai.OpenAIBackend`. Nothing here opens a connection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .base import Usage

# The oldest scripts without spaces between words begin here; a "word boundary" means nothing beyond it.
_FIRST_UNSPACED = "\u2e80"

Values = tuple[tuple[float | None, ...], tuple[bool, ...]]


class UnreadableAnswerError(Exception):
    """The server answered, and ``usage`` was paid, but not in a readable form; becomes ``result.error``.

    ``uncertain`` is 1 where the answer does not say what it cost.
    """

    def __init__(self, message: str, usage: Usage | None = None, uncertain: int = 0) -> None:
        super().__init__(message)
        self.usage = usage
        self.uncertain = uncertain


class SharedBeginningError(UnreadableAnswerError):
    """Labels that may have won begin with the same tokens, and the answer ends before they differ."""


@dataclass(frozen=True, slots=True)
class ListedToken:
    """One entry of a list of top tokens; ``logprob`` is ``None`` where the server sent no usable number."""

    raw: bytes
    logprob: float | None


@dataclass(frozen=True, slots=True)
class Position:
    """One position of an answer: what is listed there, and the token that was chosen (``None``: not known)."""

    listed: tuple[ListedToken, ...]
    chosen: bytes | None = None


Place = tuple[int, bytes]
"""A token listed at a position."""


@dataclass
class _Found:
    """What is known of one label, by place: spellings listed to the end, and beginnings whose rest is not known.

    ``through`` are the places on the way to what was found; ``floor`` bounds a label that is not listed at all.
    """

    whole: dict[Place, float | None] = field(default_factory=dict)
    begun: dict[Place, float | None] = field(default_factory=dict)
    through: list[Place] = field(default_factory=list)
    floor: float | None = None


def read_labels(path: Sequence[Position], candidates: Sequence[str], *, greedy: bool = True) -> Values:
    """Log-probability of each label, and whether it is only an upper bound.

    Parameters
    ----------
    path : sequence of Position
        The positions of one answer, from the first; those after the first are used for labels of several tokens.
    candidates : sequence of str
    greedy : bool
        Whether the chosen tokens are the likeliest ones (temperature 0). A drawn token may be listed although it is
        less likely than others that are not, so it bounds nothing.

    Raises
    ------
    SharedBeginningError
        If labels that may have won cannot be told apart.
    UnreadableAnswerError
        If there is no usable number for a label.
    """
    if not path or not any(token.logprob is not None for token in path[0].listed):
        raise UnreadableAnswerError("the server listed no usable log-probability")
    if all(position.chosen is not None and not position.chosen.strip() for position in path):
        raise SharedBeginningError("the answer begins with white space only")
    cores = [candidate.strip().encode("utf-8", "surrogatepass") for candidate in candidates]
    found = [_find(path, core, greedy) for core in cores]
    values: list[float] = []
    for candidate, one in zip(candidates, found, strict=True):
        bound = _logsumexp(list((one.whole or one.begun).values()) or [one.floor])
        if bound is None:
            raise UnreadableAnswerError(f"the server sent no usable log-probability for {candidate!r}")
        values.append(bound)
    # A place that a label ends at, or may go on from, and another label may go on from, tells neither of them apart.
    open_ends = [place for one in found if not one.whole for place in one.begun]
    ends = open_ends + [place for one in found for place in one.whole]
    shared = [
        all(place in open_ends for place in one.whole)
        if one.whole
        else bool(one.begun) and all(ends.count(place) > 1 for place in one.begun)
        for one in found
    ]
    values = _without_longer(values, found)
    whole = [bool(one.whole) and not contested for one, contested in zip(found, shared, strict=True)]
    best = max((value for value, sure in zip(values, whole, strict=True) if sure), default=-math.inf)
    # That is harmless only where none of them can win.
    lost = [
        candidate
        for candidate, value, contested in zip(candidates, values, shared, strict=True)
        if contested and value > best
    ]
    if lost:
        raise SharedBeginningError(
            f"labels {', '.join(map(repr, lost))} begin with the same token and cannot be told apart by what "
            "the server listed; use labels that differ in their first token"
        )
    return tuple(values), tuple(not sure for sure in whole)


def _without_longer(values: Sequence[float], found: Sequence[_Found]) -> list[float]:
    """Take the mass of longer labels (``10``) out of a label that they begin with (``1``)."""
    cleared = list(values)
    for k, one in enumerate(found):
        longer = [
            values[other]
            for other, its in enumerate(found)
            if its.whole and any(place in its.through for place in one.whole)
        ]
        if longer:
            left = math.exp(values[k]) - math.fsum(map(math.exp, longer))
            cleared[k] = math.log(max(left, math.exp(values[k]) * 1e-6))
    return cleared


def _find(path: Sequence[Position], core: bytes, greedy: bool) -> _Found:
    """Follow one label along the chosen tokens; elsewhere only its next beginning is known."""
    found, rest, before, started = _Found(), core, 0.0, False
    for depth, position in enumerate(path):
        mass = _mass(position.listed, strip=not started)
        chosen = position.chosen
        if chosen is not None and not started:
            chosen = chosen.strip()
        last = depth + 1 == len(path)
        blank = chosen == b"" and not started  # white space before the label: read on behind it
        for token, value in mass.items():
            # The end of a label may carry the white space that follows it.
            if token and (token == rest or (started and token.rstrip() == rest)):
                found.whole[depth, token] = _plus(before, value)
        if found.whole and not (blank and not last):
            return found
        begun = [token for token in mass if token and rest.startswith(token) and token != rest]
        goes_on = not last and ((blank and b"" in mass) or chosen in begun)
        for token in begun:
            if not (goes_on and token == chosen):
                found.begun[depth, token] = _plus(before, mass[token])
        if not goes_on or chosen is None:
            floor = _floor(mass, None if greedy else chosen)
            if floor is not None:
                found.floor = before + floor
            return found
        step = mass.get(chosen)
        if step is None:
            found.whole = {(depth, chosen): None}
            return found
        found.through.append((depth, chosen))
        before += step
        if chosen:
            rest, started = rest[len(chosen) :], True
    return found


def _floor(mass: Mapping[bytes, float | None], drawn: bytes | None) -> float | None:
    """Upper bound of what is not listed; ``drawn`` may be listed out of turn."""
    usable = {token: value for token, value in mass.items() if value is not None}
    value = usable.pop(drawn, None) if drawn is not None else None
    if usable:
        return min(usable.values())
    return None if value is None else math.log(max(-math.expm1(value), 1e-12))


def _plus(before: float, value: float | None) -> float | None:
    return None if value is None else before + value


def _mass(listed: Sequence[ListedToken], *, strip: bool) -> dict[bytes, float | None]:
    grouped: dict[bytes, list[float | None]] = {}
    for token in listed:
        grouped.setdefault(token.raw.strip() if strip else token.raw, []).append(token.logprob)
    return {core: _logsumexp(values) for core, values in grouped.items()}


def _logsumexp(values: Sequence[float | None]) -> float | None:
    """``log(sum(exp(v)))``, at most 0; ``None`` as soon as one value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    top = max(known)
    return min(top + math.log(math.fsum(math.exp(value - top) for value in known)), 0.0)


def positions_needed(path: Sequence[Position], candidates: Sequence[str]) -> int:
    """How many tokens of this answer decide between the labels; 1 if its first token does."""
    cores = [candidate.strip().encode("utf-8", "surrogatepass") for candidate in candidates]
    spelled = b""
    for count, position in enumerate(path, 1):
        if position.chosen is None:
            return 1
        spelled = (spelled + position.chosen).lstrip()
        left = [core for core in cores if core.startswith(spelled) and core != spelled.rstrip()]
        if spelled and not left:
            return count
    return max(len(path), 1)


def read_texts(texts: Sequence[str | None], candidates: Sequence[str]) -> tuple[Values, int]:
    """Count labels in texts: the logarithm of each label's share of all texts, ``None`` for a label not seen.

    Returns
    -------
    values : (logprobs, censored)
        All censored: a share says nothing about the label's log-probability in one answer.
    samples : int
        Number of texts.

    Raises
    ------
    UnreadableAnswerError
        If no text begins with a label.
    """
    counts = [0] * len(candidates)
    for text in texts:
        chosen = match_label(text or "", candidates)
        if chosen is not None:
            counts[chosen] += 1
    if not any(counts):
        first = (texts[0] or "") if texts else ""
        raise UnreadableAnswerError(
            f"unparsable answer {first[:80]!r}: it does not begin with one of the labels"
        )
    logs = tuple(math.log(count / len(texts)) if count else None for count in counts)
    return (logs, (True,) * len(candidates)), len(texts)


def read_decision(stated: Mapping[str, object], candidates: Sequence[str]) -> Values:
    """Log-probabilities from stated probabilities, as fine as they were rounded.

    Where all are whole hundredths, 0 becomes the upper bound ``log(0.005)``, ``censored``, and 1 becomes
    ``log(0.995)``: more is not known. Unrounded zeros become the bound ``log(1e-6)``.
    """
    numbers: list[float] = []
    for candidate in candidates:
        value = stated.get(candidate.strip())
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UnreadableAnswerError(f"the decision states no probability for {candidate!r}")
        numbers.append(float(value))
    rounded = all(abs(100 * value - round(100 * value)) < 1e-9 for value in numbers)
    least = 0.005 if rounded else 1e-6
    logs = tuple(math.log(min(max(value, least), 1 - least)) for value in numbers)
    return logs, tuple(value < least for value in numbers)


def match_label(text: str, candidates: Sequence[str]) -> int | None:
    """Index of the label that ``text`` begins with; the longest wins, same case before any case."""
    answer = text.strip()
    for fold in (str, str.casefold):
        folded = fold(answer)
        hits = [
            (len(label), index)
            for index, label in enumerate(fold(candidate.strip()) for candidate in candidates)
            if folded.startswith(label) and not _inside_word(folded, len(label))
        ]
        longest = [index for length, index in hits if length == max(hits)[0]]
        if longest:
            return longest[0] if len(longest) == 1 else None
    return None


def _inside_word(text: str, end: int) -> bool:
    """Whether position ``end`` splits a word or a number, as in "no" at the start of "not sure"."""
    around = text[end - 1 : end + 1]
    return len(around) == 2 and around.isalnum() and max(around) < _FIRST_UNSPACED


def label_tokens(candidates: Sequence[str]) -> int:
    """Enough tokens to spell any of the labels, since a token is at least one byte; at most 64."""
    return min(
        64, max(8, 2 + max(len(candidate.encode("utf-8", "surrogatepass")) for candidate in candidates))
    )
