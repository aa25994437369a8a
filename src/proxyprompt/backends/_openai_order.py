"""In which order to send, so that the provider's prompt cache is filled once and then used.

Prompts that share a long beginning (all queries of one coalition) are sent one after the other, and the first of them
alone: until its answer is back the cache has nothing for the others.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence

from .base import Rendered

SHARED = 3_000
"""Characters from which on a shared beginning is worth waiting for: about 1,024 tokens, the least that is cached."""

_SAME = 0.7
"""Share of a prompt that another one must begin with to count as the same beginning: the demonstrations, not the query."""


def flat(prompt: Rendered) -> str:
    """A prompt as one text, such that prompts share beginnings as their tokens do."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{turn.role}\x00{turn.name or ''}\x00{turn.content}\x01" for turn in prompt)


class Order:
    """Hands out the indices of a batch, those with a common beginning together.

    Parameters
    ----------
    prompts : sequence of str or tuple of Message
    least : int
        Characters that prompts must share to form a group; the others are groups of one.
    """

    def __init__(self, prompts: Sequence[Rendered], *, least: int = SHARED) -> None:
        texts = [flat(prompt) for prompt in prompts]
        self._keys: dict[int, str] = {}
        self._waiting: deque[deque[int]] = deque()
        for group, shared in _groups(texts, least):
            self._waiting.append(deque(group))
            if len(group) > 1:
                key = "pp-" + hashlib.sha256(shared.encode("utf-8", "surrogatepass")).hexdigest()[:32]
                self._keys.update(dict.fromkeys(group, key))
        self._ready: deque[int] = deque()
        self._led: dict[int, deque[int]] = {}

    def __bool__(self) -> bool:
        """Whether anything is left to hand out, now or later."""
        return bool(self._ready or self._waiting or any(self._led.values()))

    def cache_key(self, index: int) -> str | None:
        """A name for the beginning that a request shares with others; ``None`` if it shares none."""
        return self._keys.get(index)

    def peek(self) -> int | None:
        """The index that :meth:`take` would give."""
        if self._ready:
            return self._ready[0]
        return self._waiting[0][0] if self._waiting else None

    def take(self) -> int | None:
        """The next index to send; ``None`` while all that is left waits for the first of its group."""
        if self._ready:
            return self._ready.popleft()
        if not self._waiting:
            return None
        group = self._waiting.popleft()
        leader = group.popleft()
        if group:
            self._led[leader] = group
        return leader

    def done(self, index: int) -> None:
        """A request was answered, or given up: those that waited for it may go."""
        self._ready.extend(self._led.pop(index, ()))


def _groups(texts: Sequence[str], least: int) -> list[tuple[list[int], str]]:
    """Indices by common beginning, and the beginning; in the order of their first member, as the caller's may matter."""
    groups: list[tuple[list[int], str]] = []
    for index in sorted(range(len(texts)), key=lambda index: (texts[index], index)):
        text = texts[index]
        if groups and len(groups[-1][1]) >= least and text.startswith(groups[-1][1]):
            groups[-1][0].append(index)
        else:
            groups.append(([index], text[: max(least, int(_SAME * len(text)))]))
    return sorted(groups, key=lambda group: min(group[0]))
