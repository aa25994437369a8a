"""Text with slots, split once, and who speaks in a chat prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .backends.base import Role
from .errors import DataError, InputError

__all__ = ["FIELD", "ChatForm", "Template", "one_of"]

FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")
"""A slot, a doubled brace or a lone one."""


@dataclass(frozen=True)
class Template:
    """Literal text with ``{field}`` slots; ``{{`` and ``}}`` stand for single braces.

    Parameters
    ----------
    text : str

    Raises
    ------
    InputError
        On a lone brace, or a slot that is not an identifier (``{a.b}``, ``{0}``, ``{x!r}``).
    """

    text: str
    parts: tuple[tuple[str, str | None], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts: list[tuple[str, str | None]] = []
        literal, last = "", 0
        for match in FIELD.finditer(self.text):
            literal += self.text[last : match.start()]
            last = match.end()
            if match.group() in ("{{", "}}"):
                literal += match.group()[0]
            elif match.group(1) is None:
                raise InputError(
                    f"template: a lone {match.group()!r} at character {match.start()} of {self.text!r};"
                    " a slot is {name}.",
                    hint="Write {{ or }} for a brace that is meant as text.",
                )
            else:
                parts.append((literal, match.group(1)))
                literal = ""
        parts.append((literal + self.text[last:], None))
        object.__setattr__(self, "parts", tuple(parts))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the slots, in order."""
        return tuple(name for _, name in self.parts if name is not None)

    def render(self, values: Mapping[str, str], *, what: str = "value") -> str:
        """Put ``values`` into the slots, once."""
        out: list[str] = []
        for literal, name in self.parts:
            out.append(literal)
            if name is not None:
                if name not in values:
                    raise DataError(
                        f"{what}: the template needs a field {name!r}, which is missing;"
                        f" given: {', '.join(sorted(values)) or 'nothing'}."
                    )
                out.append(values[name])
        return "".join(out)


@dataclass(frozen=True)
class ChatForm:
    """Who speaks in a chat prompt, for the forms that differ from ``system``, ``user``, ``assistant``.

    Parameters
    ----------
    instruction_role : {"system", "developer"}
    user, assistant : (role, name or None)
        The two turns of a demonstration. OpenAI's guides also write them as system turns that are named
        ``example_user`` and ``example_assistant``.
    """

    instruction_role: Role = "system"
    user: tuple[Role, str | None] = ("user", None)
    assistant: tuple[Role, str | None] = ("assistant", None)

    def __post_init__(self) -> None:
        one_of("chat_form.instruction_role", self.instruction_role, ("system", "developer"))
        for what, speaker in (("user", self.user), ("assistant", self.assistant)):
            ok = len(speaker) == 2 and isinstance(speaker[1], str | None)
            if not ok or speaker[0] not in ("system", "developer", what):
                raise InputError(
                    f"chat_form.{what}: got {speaker!r}; a role ({what}, system or developer) and a name or None."
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; :meth:`from_dict` is its inverse."""
        return {
            "instruction_role": self.instruction_role,
            "user": list(self.user),
            "assistant": list(self.assistant),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChatForm:
        """Read what :meth:`to_dict` wrote; what is absent keeps its default."""
        unknown = sorted(set(data) - {"instruction_role", "user", "assistant"})
        if unknown:
            raise DataError(f"prompt: chat_form has unknown fields {unknown}.")
        speakers = {k: data[k] for k in ("user", "assistant") if k in data}
        if not all(isinstance(v, list | tuple) for v in speakers.values()):
            raise DataError(f"prompt: chat_form: {dict(data)!r}; a speaker is a list of role and name.")
        role = data.get("instruction_role", "system")
        return cls(role, **{k: tuple(v) for k, v in speakers.items()})


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is none of the allowed ones."""
    if value not in allowed:
        raise InputError(f"{name}: got {value!r}; allowed: {', '.join(allowed)}.")
