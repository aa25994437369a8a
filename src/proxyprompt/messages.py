"""Five lines for plain calls of a chat API: messages in, fewer messages and an artifact out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._demonstration_turns import find_demonstrations
from .artifact import Artifact
from .backends.base import Backend
from .data import Splits, load_queries, split_queries
from .errors import DataError, InputError
from .ledger import Ledger
from .models import open_model
from .pipeline import Result, optimize_prompt
from .prompt import FewShotPrompt
from .settings import Settings
from .summary import build_artifact
from .task import LabelTask, Task

__all__ = ["PrunedMessages", "prune_messages"]


@dataclass(frozen=True)
class PrunedMessages:
    """What :func:`prune_messages` found.

    Attributes
    ----------
    messages : list of mapping
        The caller's own turns without the demonstrations that were removed, in the order that was certified. All of
        them if nothing was certified.
    artifact : Artifact
        For :func:`proxyprompt.wrap_openai`, :func:`proxyprompt.write_outputs` and later.
    result : Result
    """

    messages: list[Mapping[str, Any]]
    artifact: Artifact
    result: Result


def prune_messages(
    messages: Sequence[Mapping[str, Any]],
    queries: Splits | str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Iterable[tuple[str, str]],
    *,
    target: Backend | str,
    rng: np.random.Generator,
    labels: Sequence[str] | None = None,
    task: Task | None = None,
    proxies: Sequence[Backend | str] = (),
    demonstrations: Sequence[int] | None = None,
    user_template: str = "{input}",
    settings: Settings | None = None,
    ledger: Ledger | str | os.PathLike[str] = "proxyprompt-out/ledger.db",
    title: str = "Few-shot messages",
) -> PrunedMessages:
    """Optimize the few-shot prompt inside the messages of a chat call.

    Parameters
    ----------
    messages : sequence of mapping
        As for :meth:`proxyprompt.FewShotPrompt.from_messages`, which also says what ``demonstrations`` and
        ``user_template`` are; the last turn is an example of a query.
    queries : Splits, path, rows, or pairs
        Labelled queries: a file, rows ``{"input", "label"}``, or pairs (user text, right answer). Texts are what fills
        ``user_template``; by default whole user turns.
    target : Backend or str
        The deployed model, or its name: ``"openai:MODEL"``. It must take chat turns.
    rng : numpy.random.Generator
        Draws the splits.
    labels, task
        Exactly one: the labels to choose from, or a task such as :class:`proxyprompt.TextTask`.
    proxies : sequence of Backend or str
    settings, ledger, title
        As for :func:`proxyprompt.optimize_prompt`, which does the work and whose errors are raised.

    Returns
    -------
    PrunedMessages

    Raises
    ------
    InputError, DataError
        Demonstrations that are not recognised, queries that cannot be read; nothing was sent.
    """
    if (labels is None) == (task is None):
        raise InputError(
            "labels and task: exactly one of them is needed.",
            hint="Give labels=(...), or task=TextTask(...).",
        )
    chosen = task if task is not None else LabelTask(tuple(labels or ()))
    prompt = FewShotPrompt.from_messages(messages, demonstrations=demonstrations, user_template=user_template)
    result = optimize_prompt(
        prompt,
        chosen,
        _splits(queries, prompt, rng),
        target=_opened(target),
        proxies=[_opened(p) for p in proxies],
        settings=settings,
        ledger=ledger if isinstance(ledger, Ledger) else os.fspath(ledger),
        title=title,
    )
    starts = find_demonstrations(messages, demonstrations).positions
    order = {d.id: start for d, start in zip(prompt.demonstrations, starts, strict=True)}
    kept = [messages[order[d.id] + k] for d in result.prompt.demonstrations for k in (0, 1)]
    shown = [*messages[: starts[0]], *kept, *messages[starts[-1] + 2 :]]
    return PrunedMessages(shown, build_artifact(result), result)


def _opened(model: Backend | str) -> Backend:
    return open_model(model) if isinstance(model, str) else model


def _splits(queries: Any, prompt: FewShotPrompt, rng: np.random.Generator) -> Splits:
    if isinstance(queries, Splits):
        return queries
    if isinstance(queries, str | os.PathLike):
        return split_queries(load_queries(queries), rng=rng)
    rows = list(queries)
    for i, row in enumerate(rows):
        if isinstance(row, Mapping):
            continue
        if not (isinstance(row, tuple | list) and len(row) == 2 and all(isinstance(v, str) for v in row)):
            raise DataError(
                f"queries[{i}]: got {row!r:.80}; a row or a pair (user text, right answer) is needed."
            )
        if len(prompt.query_fields) != 1:
            raise DataError(
                f"queries[{i}]: a pair cannot fill the {len(prompt.query_fields)} slots of user_template.",
                hint="Give rows with a value for each slot.",
            )
        rows[i] = {"id": f"query-{i + 1}", "inputs": {prompt.query_fields[0]: row[0]}, "label": row[1]}
    return split_queries(load_queries(rows), rng=rng)
