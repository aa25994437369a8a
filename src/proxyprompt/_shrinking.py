"""Stages of a run that shrink the prompt: the path, the choice, its order, and the certificate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ._query_use import earlier_looks, query_key
from ._screening_pairs import averaged
from .attribution.base import Attribution, Design
from .data import Splits
from .errors import InputError
from .ledger import Ledger
from .metering import Meter
from .optimize.certificate import Certificate, Reordered, certify
from .optimize.compress import Compression, EvaluateTarget, compress
from .optimize.order import EvaluateOrder, OrderSearch, candidate_orders, try_orders
from .optimize.path import first_within, surrogate_path
from .optimize.power import power_statement
from .optimize.requirement import Requirement
from .optimize.surrogate import Surrogate, additive_surrogate, choose_surrogate, corrected_surrogate
from .optimize.swap import Swap, try_swaps
from .prompt import FewShotPrompt, Query
from .settings import Settings
from .task import LabelTask, Task
from .value_function import Values

__all__ = ["Explained", "Shrinking", "certify_shrinking", "plan", "requirement", "shrink"]


class Running(Protocol):
    """What these stages need of a run."""

    prompt: FewShotPrompt
    task: Task
    splits: Splits
    target: Meter
    settings: Settings
    notes: list[str]
    asked: set[str]

    @property
    def protected(self) -> tuple[int, ...]:
        """Units that must stay."""
        ...

    def rng(self, purpose: int) -> np.random.Generator:
        """A generator of its own for each purpose."""
        ...

    def evaluate(
        self,
        meter: Meter,
        queries: Sequence[Query],
        stage: str,
        rows: NDArray[np.bool_],
        prompt: FewShotPrompt | None = None,
    ) -> Values:
        """Values of coalitions of the run's prompt, or of another."""
        ...


@dataclass(frozen=True)
class Explained:
    """The explanation, as far as compression needs it.

    Attributes
    ----------
    attribution : Attribution
    design : Design or None
        Coalitions behind it; without them (or the values) pairs are not tried.
    utility : float (n_coalitions, n_queries) or None
    proxies : tuple of Meter
        The accepted proxies that explained, if any did.
    queries : sequence of Query
        Those that explained.
    target_tokens : callable
        Coalitions that the target has answered on one query, bool (m, n_units), and its prompt tokens, int (m,), 0
        where not known.
    proposal : Attribution or None
        What the proxies estimated, where the target verified it; ``design`` and ``utility`` are then the proxies'.
    slope : float
        Target's units per unit of the proposal.
    """

    attribution: Attribution
    design: Design | None
    utility: NDArray[np.float64] | None
    proxies: tuple[Meter, ...]
    queries: Sequence[Query]
    target_tokens: Callable[[], tuple[NDArray[np.bool_], NDArray[np.int64]]]
    proposal: Attribution | None = None
    slope: float = 0.0


@dataclass(frozen=True)
class Shrinking:
    """How the choice came about, beside the measured path.

    Attributes
    ----------
    surrogate : Surrogate
    swaps : tuple of Swap
    orders : OrderSearch or None
        ``None`` when no order was tried.
    unit_tokens : float (n_units,) or None
        Prompt tokens that each demonstration takes, where that was needed.
    cap_text : str
        What became of the caps on the selection split; empty without caps.
    labels : tuple of str or None
        Labels of which each keeps a demonstration; ``None``: that was not asked, or there are no fixed labels.
    """

    surrogate: Surrogate
    swaps: tuple[Swap, ...] = ()
    orders: OrderSearch | None = None
    unit_tokens: NDArray[np.float64] | None = None
    cap_text: str = ""
    labels: tuple[str, ...] | None = None


def requirement(settings: Settings) -> Requirement:
    """What the smaller prompt must hold."""
    if settings.margin is not None:
        return Requirement(margin=settings.margin)
    return Requirement(tau=settings.tau)


def certificate_method(settings: Settings, task: Task) -> str:
    """The exact test for right-or-wrong scores, bets for others, unless one is named.

    Raises
    ------
    InputError
        When the exact test is asked for with other scores.
    """
    if settings.certificate_method == "auto":
        return "exact" if task.right_or_wrong else "betting"
    if settings.certificate_method == "exact" and not task.right_or_wrong:
        raise InputError(
            "certificate_method: 'exact' takes scores of 0 and 1 only, and this task's metric gives others.",
            hint="Use 'betting' or 'auto'.",
        )
    return settings.certificate_method


def plan(settings: Settings, task: Task, n_sealed: int) -> str:
    """What the certificate can show, before anything is asked."""
    return power_statement(
        n_sealed,
        requirement=requirement(settings),
        level=settings.level,
        method=certificate_method(settings, task),
    )


def shrink(run: Running, explained: Explained, start: NDArray[np.bool_]) -> tuple[Compression, Shrinking]:
    """Path, search, swaps and order, for a prompt that is already cleaned.

    Parameters
    ----------
    run : Running
    explained : Explained
    start : bool (n_units,)
        The cleaned prompt.
    """
    s = run.settings
    labels = _labels(run)
    gone = sorted(
        set(labels or ()) - {label for label, here in zip(labels or (), start, strict=False) if here}
    )
    if gone:
        run.notes.append(f"Cleaning removed the only demonstration of: {', '.join(gone)}.")
    surrogate = _surrogate(run, explained)
    tokens = _unit_tokens(run, explained) if s.per == "token" or s.max_tokens is not None else None
    weights = tokens if s.per == "token" else None
    path = surrogate_path(surrogate.predict, start, protected=run.protected, labels=labels, tokens=weights)
    evaluate = on_split(run, "select", "compress")
    cap = _cap(run, path, tokens)
    found = compress(
        path,
        evaluate,
        requirement=requirement(s),
        rng=run.rng(16),
        max_evaluations=s.max_evaluations,
        level=s.search_level,
        cap=cap,
    )
    found, swaps = try_swaps(
        found,
        surrogate.predict,
        evaluate,
        start,
        smallest_gain=surrogate.pairwise_error or 0.0,
        protected=run.protected,
        labels=labels,
        tokens=weights,
    )
    orders = _orders(run, explained, found) if s.orders else None
    return found, Shrinking(
        surrogate,
        swaps,
        orders,
        tokens,
        _cap_text(run, path, cap, found),
        None if labels is None else tuple(dict.fromkeys(labels)),
    )


def certify_shrinking(
    run: Running, found: Compression, shrinking: Shrinking, ledger: Ledger, key: str
) -> Certificate:
    """The certificate of what :func:`shrink` proposes; refuses queries that this run has asked before."""
    s, sealed = run.settings, run.splits["sealed"]
    order = None if shrinking.orders is None else shrinking.orders.order
    return certify(
        [point.kept for point in found.candidates],
        on_split(run, "sealed", "certify"),
        n_units=run.prompt.n_units,
        requirement=found.requirement,
        level=s.level,
        sealed=[query_key(q) for q in sealed],
        seen=frozenset(run.asked),
        query_digest=run.splits.digest("sealed"),
        method=certificate_method(s, run.task),
        block=s.certificate_block,
        reordered=None if order is None else Reordered(order, in_order(run, run.target, sealed, "certify")),
        cleaned_bar=found.cleaned_is_better,
        full_score=round(found.full.performance, 2),
        earlier_looks=earlier_looks(ledger, key, run.prompt, sealed),
    )


def on_split(run: Running, split: str, stage: str) -> EvaluateTarget:
    """The target on a split, or on some of its queries."""
    queries = run.splits[split]

    def evaluate(rows: NDArray[np.bool_], which: NDArray[np.int64] | None = None) -> Values:
        return run.evaluate(run.target, _some(queries, which), stage, rows)

    return evaluate


def in_order(run: Running, meter: Meter, queries: Sequence[Query], stage: str) -> EvaluateOrder:
    """A model on the prompt with given demonstrations in a given order."""
    ids = [d.id for d in run.prompt.demonstrations]

    def evaluate(order: tuple[int, ...], which: NDArray[np.int64] | None = None) -> Values:
        prompt = run.prompt.reorder([ids[i] for i in order])
        whole = np.ones((1, len(order)), dtype=np.bool_)
        return run.evaluate(meter, _some(queries, which), stage, whole, prompt)

    return evaluate


def _mean_of(models: Sequence[EvaluateOrder]) -> EvaluateOrder:
    """Several proxies as one: the mean of what they predict."""

    def evaluate(order: tuple[int, ...], which: NDArray[np.int64] | None = None) -> Values:
        return averaged([model(order, which) for model in models])

    return evaluate


def _some(queries: Sequence[Query], which: NDArray[np.int64] | None) -> Sequence[Query]:
    return queries if which is None else [queries[i] for i in which]


def _labels(run: Running) -> list[str] | None:
    if not run.settings.keep_labels or not isinstance(run.task, LabelTask) or run.task.labels is None:
        return None
    return [d.output for d in run.prompt.demonstrations]


def _surrogate(run: Running, explained: Explained) -> Surrogate:
    if explained.proposal is not None:
        theirs = replace(explained, attribution=explained.proposal, proposal=None)
        return corrected_surrogate(
            _surrogate(run, theirs), explained.proposal, explained.attribution, slope=explained.slope
        )
    if run.settings.interactions == "off":
        return additive_surrogate(explained.attribution, "pairs were not asked for")
    if explained.design is None or explained.utility is None:
        return additive_surrogate(explained.attribution, "the values of the coalitions are not at hand")
    return choose_surrogate(explained.attribution, explained.design, explained.utility, rng=run.rng(17))


def _unit_tokens(run: Running, explained: Explained) -> NDArray[np.float64]:
    """Prompt tokens that each demonstration takes on the target, fitted to the counts that came with its answers.

    Raises
    ------
    InputError
        When the target reports no token counts.
    """
    coalitions, tokens = explained.target_tokens()
    known = tokens > 0
    x = np.column_stack([np.ones(int(known.sum())), coalitions[known]])
    if np.linalg.matrix_rank(x) <= run.prompt.n_units:
        what = (
            f"the token counts that {run.target.backend.name} reported do not say how long each demonstration is"
            if known.any()
            else f"{run.target.backend.name} reports no token counts"
        )
        raise InputError(
            f"per={run.settings.per!r}, max_tokens={run.settings.max_tokens}: {what}.",
            hint="Use per = 'demonstration' and max_demonstrations"
            + ("; with verify, verify = 'all'." if known.any() else "."),
        )
    fitted = np.linalg.lstsq(x, tokens[known].astype(np.float64), rcond=None)[0][1:]
    counts: NDArray[np.float64] = np.maximum(fitted, 1.0)
    return counts


def _cap(run: Running, path: NDArray[np.bool_], tokens: NDArray[np.float64] | None) -> int | None:
    s = run.settings
    if s.max_demonstrations is None and s.max_tokens is None:
        return None
    lengths = None
    if tokens is not None and s.max_tokens is not None:
        whole = np.ones((1, path.shape[1]), dtype=np.bool_)
        full = run.evaluate(run.target, run.splits["select"], "compress", whole).prompt_tokens
        lengths = float(full[full > 0].mean()) - (~path).astype(np.float64) @ tokens
    return first_within(
        path, max_demonstrations=s.max_demonstrations, max_tokens=s.max_tokens, tokens=lengths
    )


def caps(settings: Settings) -> str:
    """The user's caps in words; empty without."""
    parts = [] if settings.max_demonstrations is None else [f"{settings.max_demonstrations} demonstrations"]
    parts += [] if settings.max_tokens is None else [f"{settings.max_tokens} tokens"]
    return " and ".join(parts)


def _cap_text(run: Running, path: NDArray[np.bool_], cap: int | None, found: Compression) -> str:
    wanted = caps(run.settings)
    if not wanted:
        return ""
    if cap is None or found.cap is None:
        return (
            f"The cap of {wanted} cannot be met: the {int(path[-1].sum())} demonstrations that must stay (keep,"
            " keep_labels) are more than it allows."
        )
    if found.chosen.n_kept <= found.cap.n_kept:
        return ""
    return (
        f"The cap of {wanted} costs more than is allowed: with {found.cap.n_kept} demonstrations the target reached"
        f" {found.cap.performance:.1%} on the selection split, {-100 * found.cap.difference:.1f} points below the line of"
        f" {found.line:.1%}. The smallest prompt that held the line has {found.chosen.n_kept}."
    )


def _orders(run: Running, explained: Explained, found: Compression) -> OrderSearch | None:
    select = run.splits["select"]
    orders = candidate_orders(
        found.chosen.kept, explained.attribution.mean, run.settings.orders, rng=run.rng(18)
    )
    on_proxies = [in_order(run, proxy, explained.queries, "compress") for proxy in explained.proxies]
    return try_orders(
        orders,
        in_order(run, run.target, select, "compress"),
        len(select),
        on_proxy=_mean_of(on_proxies) if on_proxies else None,
        rng=run.rng(19),
    )
