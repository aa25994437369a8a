"""How much the target is asked to explain itself within what is left of a budget, and what later stages will take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import ceil

import numpy as np

from ._run import Run
from .attribution import KernelSHAP, WeightedBanzhaf
from .attribution.base import Design
from .attribution.extending import nested_designs
from .backends.base import Usage
from .coalitions import FloatArray
from .errors import BudgetExceededError
from .metering import Meter
from .money import call_cost
from .optimize.relabel import own_queries
from .prompt import Query
from .task import TextTask
from .value_function import PromptValueFunction

__all__ = [
    "MEASURED",
    "Room",
    "coalitions_within",
    "fit_oracle",
    "later_calls",
    "proxies_fit",
    "room_left",
    "screen_within",
    "verify_within",
]

SUSPECT = 0.15
"""Share of demonstrations that become suspects: a guess, for expected numbers only."""
KEPT = 0.6
"""Share of the demonstrations in a prompt of a later stage: another."""
MEASURED = 0.7
"""Share of the demonstrations that verification measures: another."""
VERIFY_QUERIES = 30
"""Queries on which it measures, where no number is given."""

_LEAST_QUERIES = 10
_NOISE_CALLS = 30  # what repeats of whole prompts take, with their first answers
_BEFORE: dict[str, tuple[str, ...]] = {
    "screen": (),
    "attribute": ("screen",),
    "verify": ("screen", "attribute"),
}
_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)


@dataclass(frozen=True)
class Room:
    """What one limit leaves for the target's own attributions, counted in its calls.

    Attributes
    ----------
    name : str
        The setting, with its value.
    calls : float
        Calls of the stage that fit, those that it has made already included; below 0 if nothing is left.
    each : float
        What a call takes of the limit.
    unit : str
    """

    name: str
    calls: float
    each: float
    unit: str


def later_calls(run: Run) -> dict[str, float]:
    """Target calls that cleaning, compression and certificate are expected to take; ``estimate`` says the same."""
    s, n = run.settings, run.prompt.n_units
    explain, select, sealed = (len(run.splits[name]) for name in ("explain", "select", "sealed"))
    clean = 0.0
    if s.clean:
        clean = select * (2 * min(s.max_suspects, ceil(SUSPECT * n)) + 2)
        own = own_queries(run.prompt, run.task)
        if own is not None and s.clean_prior == "zero_shot":
            clean += n
        if own is not None and s.relabel == "propose":
            clean += n + explain + select
    compress = select * (3 + 0.5 * s.max_evaluations)
    if s.orders:
        compress += (4 + s.orders) * select / 4
    return {"clean": clean, "compress": compress, "certify": 3.0 * sealed}


def fit_oracle(run: Run, queries: Sequence[Query], design: Design) -> tuple[list[Query], Design, str]:
    """Queries and coalitions of the target's own attributions that fit the budget, and in words what was cut.

    Fewer queries first, down to ten, then fewer coalitions: those are shared by all queries, so that their sampling error
    does not fall with the number of queries. What is in the ledger costs nothing. The choice depends on what the stages
    before have spent, not on how far this one has come, so a run that goes on chooses the same.

    Parameters
    ----------
    run : Run
    queries : sequence of Query
        As many as are wanted, in the order of preference.
    design : Design
        All coalitions that are wanted.

    Raises
    ------
    BudgetExceededError
        When not even the fewest queries and coalitions fit.
    """
    wanted = list(queries)
    rooms = room_left(run, wanted)
    if not rooms:
        return wanted, design, ""
    room = min(rooms, key=lambda one: one.calls)
    done, fewest = _done(run), min(_LEAST_QUERIES, len(wanted))
    for some in _designs(run, design):
        new = _unrecorded(run, wanted, some)
        for n in range(len(wanted), fewest - 1, -1):
            if not new[n - 1] or new[n - 1] + done + _again(run, n, some) <= room.calls:
                return wanted[:n], some, _said(run, room, (len(wanted), design), (n, some))
    # Expected figures may be too high; what later stages ask at the least is certain.
    later = sum(later_calls(run).values())
    certain = 2 * (len(run.splits["select"]) + len(run.splits["sealed"]))
    left = room.calls + max(later - certain, 0)
    cost = new[fewest - 1] + done
    if cost <= left:
        said = _said(run, room, (len(wanted), design), (fewest, some))
        return wanted[:fewest], some, said + " The budget may not hold all of them." if said else ""
    needed = ceil((cost - left) * room.each) if room.unit != "money" else (cost - left) * room.each
    raise BudgetExceededError(
        f"{room.name}: the target's own attributions take {cost:.0f} calls or more ({fewest} queries, {some.n_coalitions}"
        f" coalitions), and {max(left, 0):.0f} are left for them beside the {certain:.0f} that compression and certificate"
        " take at the least; nothing was asked for them.",
        hint=f"Raise the limit by {needed:.6g} or more, give fewer select and sealed queries, or a proxy that is accepted.",
    )


def coalitions_within(run: Run, queries: Sequence[Query], wide: Design, least: int) -> tuple[int, str]:
    """Most coalitions of a design, ``least`` or more, that the budget allows on these queries, and the limit that binds."""
    rooms = room_left(run, queries)
    if not rooms:
        return wide.n_coalitions, ""
    room = min(rooms, key=lambda one: one.calls)
    found = PromptValueFunction(run.prompt, run.task, queries, run.target).recorded(wide.coalitions)
    new = np.cumsum((~found).sum(axis=1))
    # The first fit is there already, so explaining anew is counted for the longer ones alone.
    taken = new + _done(run) + _again(run, len(queries), wide)
    fit = np.flatnonzero((new == 0) | (taken <= room.calls)) + 1
    most = max(int(fit[-1]) if len(fit) else 0, least)
    return most, "" if most == wide.n_coalitions else room.name


def proxies_fit(run: Run, queries: Sequence[Query], design: Design, wide: Design) -> bool:
    """Whether asking all proxies for more coalitions, beside the target's own, stays within the limit on money."""
    room = next((one for one in room_left(run, queries) if one.unit == "money"), None)
    if room is None or run.target.ledger is None:
        return True
    here, _ = _call_sizes(run, queries, "attribute")
    completion = run.task.max_tokens if isinstance(run.task, TextTask) else 1
    needed = 0.0
    for name, meter in run.proxies.items():
        one = _price_of_call(meter, here, completion)
        asked = PromptValueFunction(run.prompt, run.task, queries, meter).recorded(wide.coalitions)
        so_far = run.target.ledger.totals(run=meter.run, role="proxy", stage="attribute").by_model.get(name)
        needed += one * ((~asked).sum() + (0 if so_far is None else so_far.done))
    left = room.calls - _done(run) - _again(run, len(queries), design)
    return needed == 0 or needed <= left * room.each


def room_left(run: Run, queries: Sequence[Query], stage: str = "attribute") -> list[Room]:
    """What every limit leaves for a stage that explains, by name or the target's own attributions; empty without limits."""
    limits, ledger, s = run.target.limits, run.target.ledger, run.settings
    if limits is None or not limits.any or ledger is None:
        return []
    later = sum(later_calls(run).values())
    if stage == "screen" and s.verify != "off":
        # If proxies are accepted. If not, the target explains itself, in what is left then.
        size = min(len(run.splits["explain"]), s.oracle_queries or VERIFY_QUERIES)
        later += min(size * (1 + MEASURED * run.prompt.n_units), s.verify_calls or np.inf)
    calls, tokens, spent = 0, 0, Decimal(0)
    for name in _BEFORE[stage]:
        before = ledger.totals(run=run.target.run, role="target", stage=name)
        calls += before.done + before.unknown
        tokens += before.prompt_tokens + before.completion_tokens
        of_all = ledger.totals(run=run.target.run, stage=name).money
        spent += of_all.get(limits.currency, Decimal(0))
    rooms = []
    if limits.max_calls is not None:
        left = limits.max_calls - calls - later
        rooms.append(Room(f"max_calls = {limits.max_calls}", left, 1.0, "calls"))
    if limits.max_tokens is None and limits.max_money is None:
        return rooms
    here, there = _call_sizes(run, queries, stage)
    completion = run.task.max_tokens if isinstance(run.task, TextTask) else 1
    if limits.max_tokens is not None:
        left = limits.max_tokens - tokens - later * (there + completion)
        each = here + completion
        rooms.append(Room(f"max_tokens = {limits.max_tokens}", left / each, each, "tokens"))
    if limits.max_money is not None and run.target_price is not None:
        costs = [
            call_cost(Usage(round(tokens), completion), run.target_price, batch=run.target.in_batch)
            for tokens in (here, there)
        ]
        if costs[0] and costs[1] is not None:
            left = float(Decimal(str(limits.max_money)) - spent) - later * float(costs[1])
            name = f"max_{'usd' if s.budget_cost is None else 'cost'} = {limits.max_money} {limits.currency}"
            each = float(costs[0])
            if stage == "screen":
                # Proxies are billed beside the target there.
                each += sum(_price_of_call(meter, here, completion) for meter in run.proxies.values())
            rooms.append(Room(name, left / each, each, "money"))
    return rooms


def _price_of_call(meter: Meter, prompt_tokens: float, completion: int) -> float:
    if meter.price is None:
        return 0.0
    return float(call_cost(Usage(round(prompt_tokens), completion), meter.price, batch=meter.in_batch) or 0)


def _call_sizes(run: Run, queries: Sequence[Query], stage: str) -> tuple[float, float]:
    """Prompt tokens of a coalition of the explainer's, and of a prompt as later stages ask, rather too long than too short.

    From the whole and the empty prompts of some queries, which every explanation asks anyway: what the model reports
    for them is in the ledger, so that it is the same for a run that goes on.
    """
    n = run.prompt.n_units
    ends = np.stack([np.ones(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_)])
    texts = [str(run.prompt.render(row, q)) for row in ends.tolist() for q in queries[:3]]
    full, empty = np.array([len(text.encode()) for text in texts]).reshape(2, -1).mean(axis=1).tolist()
    # Verification does not ask the empty prompts.
    asked = run.evaluate(
        run.target, queries[:3], stage, ends[:1] if stage == "verify" else ends
    ).prompt_tokens
    if not (asked > 0).all():
        full, empty = full / 3, empty / 3
    elif stage == "verify":
        full, empty = asked.mean(), empty * asked.mean() / full
    else:
        full, empty = asked.mean(axis=1).tolist()
    share, later = getattr(run.explainer, "keep", 0.5), (1 + KEPT) / 2
    return share * full + (1 - share) * empty, later * full + (1 - later) * empty


def _again(run: Run, n_queries: int, design: Design) -> int:
    """Calls that explaining anew in further rounds of cleaning may take; see ``reexplain_calls``."""
    s = run.settings
    if not s.clean or s.clean_rounds < 2:
        return 0
    return n_queries * design.n_coalitions // 2 if s.reexplain_calls is None else s.reexplain_calls


def screen_within(run: Run, n_rows: int) -> tuple[list[Query], str]:
    """Queries that the screen may use within the budget, each with all its coalitions, and in words if they are not all.

    They are drawn at random before anything is asked for them. What the screen buys, the target's own attributions use.
    """
    queries = list(run.splits["explain"])
    rooms = room_left(run, queries, "screen")
    if not rooms:
        return queries, ""
    room = min(rooms, key=lambda one: one.calls)
    repeated = _NOISE_CALLS
    n = max(0, int((room.calls - repeated) // n_rows))
    if n >= len(queries):
        return queries, ""
    some = sorted(run.rng(21).permutation(len(queries))[: max(n, 1)].tolist())
    return [queries[i] for i in some], (
        f"To stay within {room.name}, proxies are screened on {len(some)} of {len(queries)} queries at most."
    )


def verify_within(run: Run, queries: Sequence[Query]) -> tuple[int | None, str]:
    """Most calls of verification beside the full prompts, which are asked in any case, and in words if a budget says so."""
    rooms = room_left(run, queries, "verify")
    most = run.settings.verify_calls
    if not rooms:
        return most, ""
    room = min(rooms, key=lambda one: one.calls)
    left = max(0, int(room.calls) - len(queries))
    if left >= (len(queries) * (run.prompt.n_units + 1) if most is None else most):
        return most, ""
    return left, (
        f"To stay within {room.name}, verification takes {left} calls at most beside the full prompts; the"
        f" {sum(later_calls(run).values()):.0f} that later stages are expected to take are left for them."
    )


def _done(run: Run) -> int:
    """Calls that the stage itself has made, in this process or before."""
    assert run.target.ledger is not None
    total = run.target.ledger.totals(run=run.target.run, role="target", stage="attribute")
    return total.done + total.unknown


def _designs(run: Run, design: Design) -> Iterator[Design]:
    """The design, and shorter ones that begin it, as far as the technique has such and they determine the units."""
    yield design
    n = design.n_units
    if design.exact or not isinstance(run.explainer, KernelSHAP | WeightedBanzhaf):
        return
    whole = run.wide or design
    for share in _SHARES[1:]:
        size = int(share * design.n_coalitions)
        if size < 2 * n + 2:
            return
        few, all_of_it = nested_designs(run.explainer, n, (size, whole.n_coalitions), rng=run.rng(1))
        # Too short a beginning is drawn anew; then it is not the beginning of what the proxies are asked.
        if run.wide is None or np.array_equal(all_of_it.coalitions, run.wide.coalitions):
            yield few


def _unrecorded(run: Run, queries: Sequence[Query], design: Design) -> FloatArray:
    """Calls that the first 1, 2, ... queries take beyond what is in the ledger, shape ``(n_queries,)``."""
    found = PromptValueFunction(run.prompt, run.task, queries, run.target).recorded(design.coalitions)
    return np.cumsum((~found).sum(axis=0)).astype(np.float64)


def _said(run: Run, room: Room, wanted: tuple[int, Design], had: tuple[int, Design]) -> str:
    if had[0] == wanted[0] and had[1].n_coalitions == wanted[1].n_coalitions:
        return ""
    later = sum(later_calls(run).values())
    return (
        f"To stay within {room.name}, the target explains itself on {had[0]} queries and {had[1].n_coalitions} coalitions"
        f" instead of {wanted[0]} and {wanted[1].n_coalitions}; the {later:.0f} calls that cleaning, compression and"
        " certificate are expected to take are left for them. Its standard errors are larger for it."
    )
