"""From the body of a request to the same body without the demonstrations that an artifact removed.

Knows the bodies of ``/chat/completions``, ``/responses`` and ``/completions`` and no SDK. A request is edited only
if it begins with the artifact's whole original prompt; everything behind that is somebody else's and stays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .artifact import Artifact
from .errors import ArtifactError, InputError
from .prompt import FewShotPrompt, Query, Template

__all__ = ["Instruction", "RequestEdit", "RequestPruner"]

Instruction = Literal["same", "any"]
Status = Literal["pruned", "already_pruned", "mismatch"]

_LEADING = ("system", "developer")
_EXAMPLE_NAMES = ("example_user", "example_assistant")
# Keys that a turn may have and still be nothing but its role, name and text.
_TURN_KEYS = {"role", "content", "name", "type", "id", "status"}
_PART_TYPES = ("text", "input_text", "output_text")
_FIELD = {"/chat/completions": "messages", "/responses": "input", "/completions": "prompt"}


@dataclass(frozen=True)
class RequestEdit:
    """What happened to one request.

    Attributes
    ----------
    status : {"pruned", "already_pruned", "mismatch"}
        Edited; held the smaller prompt already (or nothing was to be removed); not the artifact's prompt, and
        left as it is.
    removed : tuple of str
        Ids of the demonstrations that were taken out of this request.
    saved_characters : int
        Characters of text that were taken out.
    saved_tokens : float or None
        Prompt tokens of the target that the cut saves in a call: the difference of the means that the artifact
        measured. ``None`` if it holds no token counts.
    reason : str
        Why it is a mismatch, else empty. Names ids and positions, never text.
    """

    status: Status
    removed: tuple[str, ...] = ()
    saved_characters: int = 0
    saved_tokens: float | None = None
    reason: str = ""


class _MismatchError(Exception):
    """Carries the reason."""


@dataclass(frozen=True)
class _Turn:
    """A turn that is nothing but a role, a name and a text."""

    role: str
    name: str | None
    text: str

    @property
    def leads(self) -> bool:
        return self.role in _LEADING and self.name not in _EXAMPLE_NAMES

    @property
    def digest(self) -> str:
        data = json.dumps([self.role, self.name, self.text], ensure_ascii=True)
        return hashlib.sha256(data.encode()).hexdigest()


class RequestPruner:
    """Edits requests for one artifact.

    Parameters
    ----------
    artifact : Artifact
    instruction : {"same", "any"}
        Whether the instruction must be the artifact's.

    Raises
    ------
    ArtifactError
        If the artifact removes something without a certificate for what is left.
    """

    def __init__(self, artifact: Artifact, instruction: Instruction = "same") -> None:
        if instruction not in ("same", "any"):
            raise InputError(f"instruction: got {instruction!r}; allowed: 'same', 'any'.")
        self.artifact = artifact
        self._any = instruction == "any"
        full, small = artifact.original, artifact.prompt
        ids = [d.id for d in full.demonstrations]
        self._order = [ids.index(i) for i in artifact.kept]
        self._changes = self._order != list(range(len(ids)))
        if self._changes and not artifact.certified:
            raise ArtifactError(
                "The artifact removes or moves demonstrations, and its certificate does not hold for what is left.",
                hint="Use its prompt directly if you want it nonetheless.",
            )
        self._ids, self._instruction, self._chat = ids, full.instruction, full.style == "chat"
        self._removed = artifact.removed
        self._saved_tokens = _saved_tokens(artifact.summary) if self._changes else 0.0
        if self._chat:
            self._pairs = _pair_digests(full)
            return
        self._full_text, self._small_text = _text_before_query(full), _text_before_query(small)
        form = full.demonstration_template if full.query_template is None else full.query_template
        self._query_start = Template(form).parts[0][0]

    def edit(self, path: str, body: object, extra: object = None) -> tuple[Any, RequestEdit] | None:
        """The body to send and what was done; ``None`` for an endpoint that takes no prompt.

        Parameters
        ----------
        path : str
            ``/chat/completions``, ``/responses`` or ``/completions``.
        body : object
            The JSON body; never changed.
        extra : object
            What the client merges over the body before it sends it (``extra_body``).
        """
        field = _FIELD.get(path)
        if field is None:
            return None
        try:
            return self._edited(path, field, body, extra)
        except _MismatchError as why:
            return body, RequestEdit("mismatch", reason=str(why))

    def _edited(self, path: str, field: str, body: object, extra: object) -> tuple[Any, RequestEdit]:
        if not isinstance(body, Mapping):
            raise _MismatchError("the body is not a JSON object")
        if isinstance(extra, Mapping) and extra.keys() & {field, "instructions", "previous_response_id"}:
            raise _MismatchError(f"extra_body replaces the {field}")
        for key in ("previous_response_id", "conversation", "prompt") if path == "/responses" else ():
            if body.get(key) is not None:
                raise _MismatchError(f"{key} puts turns before the {field} that are not in the request")
        value: Any = body.get(field)
        new: Any
        if self._chat:
            new, saved = self._edited_turns(value, body.get("instructions"), field)
        elif path == "/completions" and isinstance(value, list):
            if not value or not all(isinstance(text, str) for text in value):
                raise _MismatchError("the prompt is not text")
            found = [self._edited_text(text) for text in value]
            new, saved = [text for text, _ in found], sum(n for _, n in found)
        elif isinstance(value, str):
            if body.get("instructions"):
                self._check_instruction([str(body["instructions"])])
            new, saved = self._edited_text(value)
        else:
            new, saved = self._edited_message(value, body.get("instructions"), field)
        if new == value:
            return body, RequestEdit("already_pruned")
        edit = RequestEdit("pruned", self._removed, saved, self._saved_tokens)
        return {**body, field: new}, edit

    # --- chat turns -----------------------------------------------------------------------------------

    def _edited_turns(self, value: Any, instructions: Any, field: str) -> tuple[list[Any], int]:
        items, turns = _turns(value, field)
        start = next((i for i, t in enumerate(turns) if t is None or not t.leads), len(turns))
        leading = [t.text for t in turns[:start] if t is not None]
        n, small = len(self._ids), [self._pairs[i] for i in self._order]
        if _digests(turns, start, n) == self._pairs:
            end = start + 2 * n
            kept = [items[start + 2 * i + k] for i in self._order for k in (0, 1)]
        elif _digests(turns, start, len(small)) == small and not self._known(turns, start + 2 * len(small)):
            end, kept = start + 2 * len(small), items[start : start + 2 * len(small)]
        else:
            raise _MismatchError(self._difference(turns, start, field))
        self._check_instruction([*([str(instructions)] if instructions else []), *leading])
        rest = turns[end:]
        named = next((i for i, t in enumerate(rest, end) if t and t.name in _EXAMPLE_NAMES), None)
        if named is not None:
            raise _MismatchError(
                f"{field}[{named}] is one more demonstration, which the artifact does not know"
            )
        if not any(t is None or t.role == "user" for t in rest):
            raise _MismatchError("no query follows the demonstrations")
        gone = set(range(n)) - set(self._order) if end == start + 2 * n else set()
        saved = sum(len(t.text) for i in gone for k in (0, 1) if (t := turns[start + 2 * i + k]) is not None)
        return [*items[:start], *kept, *items[end:]], saved

    def _known(self, turns: Sequence[_Turn | None], start: int) -> list[tuple[int, int]]:
        """(demonstration, position) of every known pair at or after ``start``."""
        found = []
        for i in range(start, len(turns) - 1):
            pair = _digests(turns, i, 1)
            found += [(self._pairs.index(p), i) for p in pair or () if p in self._pairs]
        return found

    def _difference(self, turns: Sequence[_Turn | None], start: int, field: str) -> str:
        known = self._known(turns, 0)
        if not known:
            return f"none of the artifact's {len(self._ids)} demonstrations is in the request"
        missing = [
            i
            for k, i in enumerate(self._ids)
            if self._pairs.count(self._pairs[k]) > _count(known, self._pairs, k)
        ]
        if missing:
            names = ", ".join(map(repr, missing[:3])) + (" and others" if len(missing) > 3 else "")
            return f"demonstrations of the artifact are missing or changed: {names}"
        taken = {i + k for _, i in known for k in (0, 1)}
        loose = next((i for i in range(start, max(taken)) if i not in taken), None)
        if loose is not None:
            return f"{field}[{loose}] stands before or between the demonstrations, and the artifact does not know it"
        return "the demonstrations are in another order, or more of them than in the artifact"

    def _check_instruction(self, found: list[str]) -> None:
        if not self._any and found != ([self._instruction] if self._chat and self._instruction else []):
            raise _MismatchError("the instruction is not the artifact's")

    # --- text -----------------------------------------------------------------------------------------

    def _edited_message(self, value: Any, instructions: Any, field: str) -> tuple[list[Any], int]:
        """A text prompt as the only user message."""
        items, turns = _turns(value, field)
        at = next((i for i, t in enumerate(turns) if t is None or not t.leads), len(turns))
        turn = turns[at] if at == len(turns) - 1 else None
        if turn is None or turn.role != "user":
            raise _MismatchError("the artifact's prompt is one text, and the request is not one user message")
        new, saved = self._edited_text(turn.text)
        leading = [t.text for t in turns[:at] if t is not None]
        self._check_instruction([*([str(instructions)] if instructions else []), *leading])
        if new == turn.text:
            return items, 0
        content = items[at]["content"]
        content = new if isinstance(content, str) else [{**content[0], "text": new}]
        return [*items[:at], {**items[at], "content": content}], saved

    def _edited_text(self, text: str) -> tuple[str, int]:
        if text.startswith(self._full_text) and len(text) > len(self._full_text):
            return self._small_text + text[len(self._full_text) :], len(self._full_text) - len(
                self._small_text
            )
        rest = text.removeprefix(self._small_text)
        # The smaller prompt may be a beginning of the full one, so what follows must be one query.
        start = self._query_start
        if text.startswith(self._small_text) and rest.startswith(start) and rest.count(start) == 1 and start:
            return text, 0
        raise _MismatchError("the text does not begin with the artifact's whole prompt")


def _turns(value: Any, field: str) -> tuple[list[Any], list[_Turn | None]]:
    if not isinstance(value, list):
        raise _MismatchError(f"the {field} is not a list of turns")
    return value, [_turn(item) for item in value]


def _turn(item: Any) -> _Turn | None:
    """``None`` for what is more than a role, a name and a text: tool calls, images, cache marks."""
    if not isinstance(item, Mapping) or item.get("type", "message") != "message":
        return None
    role, name, content = item.get("role"), item.get("name"), item.get("content")
    if any(value is not None for key, value in item.items() if key not in _TURN_KEYS):
        return None
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping):
        part = content[0]
        more = [k for k, v in part.items() if k not in ("type", "text") and v not in (None, [], ())]
        content = part.get("text") if part.get("type") in _PART_TYPES and not more else None
    if not isinstance(role, str) or not isinstance(name, str | None) or not isinstance(content, str):
        return None
    return _Turn(role, name, content)


def _digests(turns: Sequence[_Turn | None], start: int, n_pairs: int) -> list[tuple[str, str]] | None:
    block = turns[start : start + 2 * n_pairs]
    if len(block) < 2 * n_pairs or any(t is None for t in block):
        return None
    digests = [t.digest for t in block if t is not None]
    return list(zip(digests[::2], digests[1::2], strict=True))


def _count(known: Sequence[tuple[int, int]], pairs: Sequence[tuple[str, str]], k: int) -> int:
    return sum(pairs[i] == pairs[k] for i, _ in known)


def _blank(prompt: FewShotPrompt) -> Query:
    return Query("", dict.fromkeys(prompt.query_fields, ""), "")


def _pair_digests(prompt: FewShotPrompt) -> list[tuple[str, str]]:
    rendered = prompt.render(None, _blank(prompt))
    assert not isinstance(rendered, str)
    turns: list[_Turn | None] = [_Turn(m.role, m.name, m.content) for m in rendered]
    found = _digests(turns, 1 if prompt.instruction else 0, prompt.n_units)
    assert found is not None
    return found


def _text_before_query(prompt: FewShotPrompt) -> str:
    parts = [*([prompt.instruction] if prompt.instruction else []), *(u.text for u in prompt.units)]
    return "".join(part + prompt.separator for part in parts)


def _saved_tokens(summary: Mapping[str, Any]) -> float | None:
    counts = []
    for name in ("before", "after"):
        count = (summary.get(name) or {}).get("tokens")
        if not isinstance(count, int | float) or isinstance(count, bool):
            return None
        counts.append(float(count))
    return counts[0] - counts[1]
