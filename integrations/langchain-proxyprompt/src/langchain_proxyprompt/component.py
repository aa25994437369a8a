"""A step for a chain: takes what a prompt rendered, and leaves out the demonstrations that an artifact removed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue
from langchain_core.runnables import Runnable, RunnableConfig

from proxyprompt import Artifact
from proxyprompt._pruned_requests import Instruction, RequestPruner
from proxyprompt.errors import InputError, PromptMismatchError, PromptMismatchWarning

__all__ = ["PruneDemonstrations"]

_ROLES = {"human": "user", "ai": "assistant", "system": "system"}


class PruneDemonstrations(Runnable[Any, Any]):
    """``prompt | PruneDemonstrations("artifact.json") | model``.

    Parameters
    ----------
    artifact : Artifact or path
        Certified, if it removes anything.
    on_mismatch : {"pass", "warn", "raise"}
        What to do with a prompt that is not the one that was measured. It is never changed.
    instruction : {"same", "any"}
        Whether the system message must be the measured one too.

    Notes
    -----
    Recognises demonstrations by the hash of their turns, all of them and in the measured order; nothing is
    dropped on a guess.
    Everything else in the prompt (ids, metadata, later turns) is handed on as the same objects.

    Raises
    ------
    ArtifactError
        If the artifact cannot be read, or removes demonstrations without a certificate.
    """

    def __init__(
        self,
        artifact: Artifact | str | Path,
        *,
        on_mismatch: Literal["pass", "warn", "raise"] = "pass",
        instruction: Instruction = "same",
    ) -> None:
        if on_mismatch not in ("pass", "warn", "raise"):
            raise InputError(f"on_mismatch: got {on_mismatch!r}; allowed: 'pass', 'warn', 'raise'.")
        self._on_mismatch = on_mismatch
        loaded = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
        self._pruner = RequestPruner(loaded, instruction)
        self.name = "PruneDemonstrations"

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Prune a prompt value, a list of messages, or a text."""
        return self._call_with_config(self._pruned, input, config, run_type="prompt")

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """The same; nothing is waited for."""
        return self.invoke(input, config, **kwargs)

    def _pruned(self, value: Any) -> Any:
        if isinstance(value, StringPromptValue):
            return StringPromptValue(text=self._text(value.text))
        if isinstance(value, PromptValue):
            return ChatPromptValue(messages=self._messages(value.to_messages()))
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list) and all(isinstance(m, BaseMessage) for m in value):
            return self._messages(value)
        raise InputError(
            f"input: got a {type(value).__name__}; a prompt value, a list of messages or a text is needed.",
            hint="Put this step right behind the prompt.",
        )

    def _text(self, text: str) -> str:
        new: str = self._edit("/completions", {"prompt": text})["prompt"]
        return new

    def _messages(self, messages: Sequence[BaseMessage]) -> list[BaseMessage]:
        turns = [_turn(message) for message in messages]
        by_turn = {id(turn): message for turn, message in zip(turns, messages, strict=True)}
        new = self._edit("/chat/completions", {"messages": turns})["messages"]
        return [by_turn[id(turn)] for turn in new]

    def _edit(self, path: str, body: dict[str, Any]) -> Any:
        done = self._pruner.edit(path, body)
        assert done is not None  # both paths take prompts
        new, edit = done
        if edit.status == "mismatch":
            text = f"The prompt is not the one that was measured, and is sent as it is: {edit.reason}."
            if self._on_mismatch == "raise":
                raise PromptMismatchError(text, hint="Measure this prompt, or use on_mismatch='pass'.")
            if self._on_mismatch == "warn":
                warnings.warn(text, PromptMismatchWarning, stacklevel=4)
        return new


def _turn(message: BaseMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": _ROLES.get(message.type, message.type), "content": message.content}
    if message.name is not None:
        turn["name"] = message.name
    if getattr(message, "tool_calls", None):
        turn["tool_calls"] = True  # more than text: such a turn is never a demonstration
    return turn
