"""Which examples one call shows: carried in the call's own runnable config, so that calls side by side do not mix."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.example_selectors import BaseExampleSelector
from langchain_core.messages import BaseMessage
from langchain_core.prompts.message import BaseMessagePromptTemplate
from langchain_core.runnables.config import var_child_runnable_config
from pydantic import ConfigDict

from proxyprompt.errors import BackendError

__all__ = ["MASK_KEY", "Mask", "MaskLostError", "MaskedSelector", "MaskedTurns", "current_mask"]

MASK_KEY = "proxyprompt_mask"
"""Key in ``config["configurable"]``."""


class MaskLostError(BackendError):
    """A call reached the few-shot template without its mask, so that it would have shown other examples than measured."""


@dataclass
class Mask:
    """The examples that one call shows.

    Parameters
    ----------
    kept : tuple of str
        Ids, in the order of the prompt.

    Attributes
    ----------
    uses : int
        How often the template has read it.
    """

    kept: tuple[str, ...]
    uses: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def use(self) -> tuple[str, ...]:
        """Ids to show; counts."""
        with self._lock:
            self.uses += 1
        return self.kept


def current_mask() -> Mask:
    """The mask of the call that is under way.

    Raises
    ------
    MaskLostError
        If the call has none: never shows everything instead.
    """
    config = var_child_runnable_config.get()
    mask = (config or {}).get("configurable", {}).get(MASK_KEY)
    if not isinstance(mask, Mask):
        raise MaskLostError(
            "A call lost its mask on the way to the few-shot template: the chain runs a step without LangChain's context,"
            " for example in a thread pool of its own.",
            hint="Start threads with contextvars.copy_context().run, use chain.batch, or pass the inner chain.",
        )
    return mask


class MaskedSelector(BaseExampleSelector):
    """Shows the examples of the call's mask.

    Parameters
    ----------
    pool : Pool
        Knows all examples (``show(kept, inputs)``, ``ashow``).
    """

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    def add_example(self, example: dict[str, str]) -> Any:
        """Not while a prompt is being measured."""
        raise BackendError("Examples cannot be added to a prompt that is being measured.")

    def select_examples(self, input_variables: dict[str, str]) -> list[dict[str, Any]]:
        """Examples of the mask."""
        shown: list[dict[str, Any]] = self.pool.show(current_mask().use(), input_variables)
        return shown

    async def aselect_examples(self, input_variables: dict[str, str]) -> list[dict[str, Any]]:
        """Examples of the mask."""
        shown: list[dict[str, Any]] = await self.pool.ashow(current_mask().use(), input_variables)
        return shown


class MaskedTurns(BaseMessagePromptTemplate):
    """Fixed turns of a chat prompt, of which only those of the call's mask are shown."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    turns: dict[str, list[BaseMessage]]

    @property
    def input_variables(self) -> list[str]:
        """None: the turns are fixed."""
        return []

    def format_messages(self, **kwargs: Any) -> list[BaseMessage]:
        """Turns of the mask."""
        return [turn for i in current_mask().use() for turn in self.turns[i]]

    def pretty_repr(self, html: bool = False) -> str:
        """For LangChain's printing."""
        return f"<{len(self.turns)} demonstrations>"


def same_ids(kept: Sequence[str], ids: Sequence[str]) -> bool:
    """Whether ``kept`` names only known ids, each once."""
    return len(set(kept)) == len(kept) and set(kept) <= set(ids)
