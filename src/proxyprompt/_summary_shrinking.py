"""How the smaller prompt came about, as plain data and in sentences for a reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._shrinking import Shrinking, caps
from .optimize.compress import Compression
from .pipeline import Result

__all__ = ["choice_sentences", "line_text", "near_copies", "shrinking_dict", "verdict_sentences"]


def shrinking_dict(found: Shrinking, ids: Sequence[str]) -> dict[str, Any]:
    """Stored form of what steered the choice; demonstrations by id."""
    surrogate = found.surrogate.to_dict()
    surrogate["copies"] = [[ids[i], ids[j]] for i, j in found.surrogate.copies]
    orders = None
    if found.orders is not None:
        orders = found.orders.to_dict()
        orders["orders"] = {k: [ids[i] for i in v] for k, v in found.orders.orders.items()}
    return {
        "surrogate": surrogate,
        "swaps": [{"out": ids[s.out], "into": ids[s.into], **s.to_dict()} for s in found.swaps],
        "orders": orders,
        "unit_tokens": None if found.unit_tokens is None else found.unit_tokens.tolist(),
        "labels_kept": None if found.labels is None else list(found.labels),
        "cap_text": found.cap_text,
    }


def near_copies(result: Result) -> dict[int, str]:
    """For a removed demonstration that stands in for a kept one: the id of that one."""
    ids = [d.id for d in result.original.demonstrations]
    found: dict[int, str] = {}
    for pair in result.shrinking.surrogate.copies:
        for gone, stays in (pair, pair[::-1]):
            if not result.kept[gone] and result.kept[stays]:
                found.setdefault(gone, ids[stays])
    return found


def line_text(path: Compression) -> str:
    """Name of the line that the curve has to stay above."""
    bar = "cleaned" if path.cleaned_is_better else "full"
    if path.requirement.tau is not None:
        return f"{path.requirement.tau:.2f} \u00d7 {bar} prompt"
    assert path.requirement.margin is not None
    return f"{bar} prompt \u2212 {100 * path.requirement.margin:.3g} points"


def verdict_sentences(result: Result) -> list[str]:
    """What belongs beside the verdict: a cap that was not met, another order, sealed queries that are not fresh."""
    c, after = result.certificate, result.prompt.n_units
    wanted, said = caps(result.settings), []
    if result.shrinking.cap_text:
        said.append(f"{result.shrinking.cap_text} The prompt that is proposed has {after}.")
    elif wanted and not _within(result):
        said.append(
            f"The cap of {wanted} is not met: no prompt that small was certified. The prompt that is proposed has {after}."
        )
    shipped = c.shipped
    failed = next((t for t in c.tests if t.tested and not t.passed), None)
    if shipped is not None and failed is not None:
        said.append(_stopped_at(failed.n_kept, c.tests[-1].n_kept, shipped.n_kept, failed.order is not None))
    if shipped is not None and shipped.order is not None:
        said.append("The demonstrations stand in a new order, in which the prompt was certified.")
    if c.earlier_looks:
        runs = "An earlier run" if c.earlier_looks == 1 else f"{c.earlier_looks} earlier runs"
        said.append(
            f"{runs} with other settings had looked at these sealed queries: counting every look, the error level is up"
            f" to {min(1.0, (c.earlier_looks + 1) * c.level):.2g} instead of {c.level:.2g}. Fresh sealed queries would mend"
            " that."
        )
    return said


def _stopped_at(failed: int, fewest: int, shipped: int, reordered: bool) -> str:
    """That less would have been proposed than could be proven."""
    if reordered and failed == shipped:
        return f"Another order of the {shipped} was proposed as well, but not certified; they keep the original order."
    return (
        f"The selection split proposed as few as {fewest}, but the sealed queries do not prove that the prompt with"
        f" {failed} holds: {shipped} is the smallest number that is certified."
    )


def _within(result: Result) -> bool:
    s, measured = result.settings, result.certificate.shipped or result.certificate.full
    if s.max_demonstrations is not None and result.prompt.n_units > s.max_demonstrations:
        return False
    return s.max_tokens is None or measured.tokens <= s.max_tokens


def choice_sentences(result: Result) -> list[str]:
    """How the cut was chosen: surrogate, calls saved, swaps and orders tried."""
    path, found, s = result.compression, result.shrinking, result.settings
    ids = [d.id for d in result.original.demonstrations]
    each = "per token that it frees" if s.per == "token" else "by itself"
    walk = (
        "single demonstrations" if found.surrogate.kind == "additive" else "demonstrations and pairs of them"
    )
    said = [
        f"The one whose loss costs least {each} leaves first, by a surrogate of {walk}: {found.surrogate.why}."
    ]
    copies = near_copies(result)
    if copies:
        pairs = ", ".join(f"{ids[gone]} for {stays}" for gone, stays in sorted(copies.items()))
        said.append(f"Near-copies that left because the other one stays: {pairs}.")
    early = sum(p.n_queries < path.n_queries for p in path.points)
    if early:
        said.append(
            f"{early} of {len(path.points)} points were left before all {path.n_queries} queries were asked, because it was"
            f" clear on which side of the line they fall: {path.calls_saved} of {path.calls + path.calls_saved} calls were"
            " not needed."
        )
    if found.labels is not None:
        said.append("No label loses its last demonstration (keep_labels).")
        if path.zero_shot.holds and result.prompt.n_units:
            said.append(
                f"Without that rule (keep_labels = false) none might be needed: with no demonstration at all the target"
                f" reached {path.zero_shot.performance:.1%} on these queries, with all of them {path.full.performance:.1%}."
            )
    elif s.keep_labels:
        said.append("The task has no fixed labels, so none had to be kept.")
    for swap in found.swaps:
        verb = "confirmed" if swap.accepted else "did not confirm"
        said.append(
            f"A swap of {ids[swap.out]} for {ids[swap.into]} promised a gain, which the target {verb} (p ="
            f" {swap.p_value:.2g})."
        )
    orders = found.orders
    if orders is not None:
        text = f"{len(orders.orders)} orders were compared on the {orders.scout}; best: {orders.best}."
        if orders.best != "original":
            verb = "confirmed it" if orders.confirmed else "did not confirm it, so the original order stays"
            text += f" On other queries the target {verb} (p = {orders.p_value:.2g})."
        said.append(text)
    return said
