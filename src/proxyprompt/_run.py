"""What the stages of a run share: prompt, splits, models, settings, and whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ._query_use import query_key
from .attribution.base import Design, Explainer
from .data import Splits
from .ledger import Totals
from .metering import Meter
from .prices import Price
from .prompt import FewShotPrompt, Query
from .settings import Settings
from .task import Task
from .value_function import PromptValueFunction, Values, evaluate_together

__all__ = ["Observer", "Run", "Silent", "recorded_money"]


class Observer(Protocol):
    """Is told what happens; the command line draws bars with it."""

    def stage(self, name: str, text: str) -> None:
        """A stage begins."""
        ...

    def progress(self, done: int, total: int) -> None:
        """Calls of the current batch, answered from the ledger or by the model."""
        ...

    def tokens(self, n: int) -> None:
        """A local model has computed so many more tokens."""
        ...

    def note(self, text: str) -> None:
        """Something worth telling a person."""
        ...


class Silent:
    """Says nothing."""

    def stage(self, name: str, text: str) -> None: ...
    def progress(self, done: int, total: int) -> None: ...
    def tokens(self, n: int) -> None: ...
    def note(self, text: str) -> None: ...


def recorded_money(total: Totals) -> dict[str, Any]:
    """What the ledger priced when the calls were made, and what it did not; see :func:`~proxyprompt.money.bill_run`.

    Calls that were recorded as free count as not priced: a price that is given for a local model says what it would cost.
    """
    parts = {currency: part for currency, part in total.by_currency.items() if part.money.get(currency)}
    if not parts:
        return {}
    recorded = {
        currency: {
            "calls": part.done + part.failed + part.unknown,
            "unknown": part.unknown,
            "money": str(part.money[currency]),
        }
        for currency, part in parts.items()
    }
    rest = [part for currency, part in total.by_currency.items() if currency not in parts]
    names = ("prompt_tokens", "completion_tokens", "cached_tokens", "unknown")
    unpriced = {"calls": sum(part.done for part in rest)}
    unpriced |= {name: sum(getattr(part, name) for part in rest) for name in names}
    return {"recorded": recorded, "unpriced": unpriced if rest else None}


@dataclass
class Run:
    """What the stages share."""

    prompt: FewShotPrompt
    task: Task
    splits: Splits
    target: Meter
    proxies: dict[str, Meter]
    settings: Settings
    explainer: Explainer
    watch: Observer
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wide: Design | None = None
    target_price: Price | None = None
    most_screened: int | None = None
    asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._keys = {q.id: query_key(q) for queries in self.splits.values() for q in queries}

    def rng(self, purpose: int) -> np.random.Generator:
        """A generator of its own for each purpose, so that no stage shifts another's draws."""
        return np.random.default_rng([self.settings.seed, purpose])

    def evaluate(
        self,
        meter: Meter,
        queries: Sequence[Query],
        stage: str,
        rows: NDArray[np.bool_],
        prompt: FewShotPrompt | None = None,
        repeat: int = 0,
    ) -> Values:
        """Values of coalitions of the prompt, or of another; remembers which queries stages before the last have asked."""
        if stage != "certify":
            self.asked.update(self._keys[q.id] for q in queries if q.id in self._keys)
        return PromptValueFunction(
            prompt or self.prompt, self.task, queries, meter, stage, self.watch.progress, repeat
        ).evaluate(rows)

    def evaluate_each(
        self, meter: Meter, queries: Sequence[Query], stage: str, rows: Sequence[NDArray[np.bool_]]
    ) -> list[Values]:
        """Values of coalitions of the prompt that each query has for itself, in one batch."""
        self.asked.update(self._keys[q.id] for q in queries if q.id in self._keys)
        return evaluate_together(
            [
                PromptValueFunction(self.prompt, self.task, (q,), meter, stage, self.watch.progress)
                for q in queries
            ],
            rows,
        )

    def on_target(self, split: str, stage: str) -> Callable[[NDArray[np.bool_]], Values]:
        return lambda rows: self.evaluate(self.target, self.splits[split], stage, rows)

    @property
    def protected(self) -> tuple[int, ...]:
        keep = set(self.settings.keep)
        return tuple(i for i, d in enumerate(self.prompt.demonstrations) if d.id in keep)
