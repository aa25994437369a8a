"""What ``proxyprompt queries`` does: proxies propose the sentence or word that decides a query, the target measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ._run import Silent
from .attribution import LeaveOneOut
from .config import RunConfig
from .data import write_private
from .errors import InputError
from .ledger import Ledger
from .pipeline import prepare_run
from .prompt import Query
from .report import render_queries_html, render_queries_markdown
from .units import QuerySentences, QueryUnits, QueryWords
from .verifying import VerifiedQueries, verify_queries

__all__ = ["verify_from_config", "write_queries"]

_SPLIT = {"sentences": QuerySentences, "words": QueryWords}


def verify_from_config(
    config: RunConfig,
    queries: Sequence[Query],
    ledger: Ledger,
    *,
    units: Literal["sentences", "words"] = "sentences",
    learn: int = 0,
    top: int = 2,
) -> VerifiedQueries:
    """:func:`~proxyprompt.verify_queries` with the models, prompt, limits and seed of a run's configuration.

    Raises
    ------
    InputError
        Without a proxy, or when no query has two units.
    BudgetExceededError
        The next calls would pass the limits of ``[budget]``, which the run of the configuration shares.
    """
    if not config.proxies:
        raise InputError("proxies: the configuration names none; nobody proposes.", hint="Add [[proxies]].")
    settings = replace(config.settings, verify="off", screening_method="betting")
    run, _, _ = prepare_run(
        config.prompt, config.task, config.splits, config.target, config.proxies, settings, ledger, Silent()
    )
    config.task.validate(config.prompt.demonstrations, queries)
    parts: list[QueryUnits] = [_SPLIT[units](config.prompt, query) for query in queries]
    several = [own for own in parts if own.n_units > 1]
    if not several:
        raise InputError(
            f"units={units!r}: no query has two of them, so none could be chosen.", hint="Try --units words."
        )
    return verify_queries(
        several,
        config.task,
        run.target,
        list(run.proxies.values()),
        explainer=LeaveOneOut(),
        budget=2 + max(own.n_units for own in several),
        rng=run.rng(25),
        learn=learn,
        top=top,
        stage="queries",
    )


def write_queries(found: VerifiedQueries, folder: Path) -> dict[str, Path]:
    """The result as a page and as Markdown, private to their owner."""
    data = found.to_dict()
    paths = {"html": folder / "queries.html", "markdown": folder / "queries.md"}
    write_private(paths["html"], render_queries_html(data))
    write_private(paths["markdown"], render_queries_markdown(data))
    return paths
