"""An estimate in the terminal: a table of stages, and what it means for the budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ._text import visible

__all__ = ["print_estimate"]


class _Estimate(Protocol):
    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        ...


def print_estimate(estimate: _Estimate) -> None:
    """Print it on standard output; numbers are low - expected - high."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    plain = estimate.to_dict()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    table.add_column("model")
    for name in ("calls", "tokens", "money"):
        table.add_column(name, justify="right")
    for one in plain["stages"]:
        tokens = {k: one["prompt_tokens"][k] + one["completion_tokens"][k] for k in one["prompt_tokens"]}
        cells = [one["stage"], one["model"], _whole(one["calls"]), _whole(tokens), _money(one["money"])]
        table.add_row(*(Text(visible(cell)) for cell in cells))
    console = Console(soft_wrap=False)
    if plain["stages"]:
        console.print(table)
    else:
        console.print("Everything that this run can ask is in the ledger.")
    for role in ("target", "proxy"):
        if plain["calls"][role]["high"]:
            console.print(
                f"all, {role}: {_whole(plain['calls'][role])} calls, {_whole(plain['tokens'][role])} tokens",
                highlight=False,
            )
    for currency, amounts in plain["money"].items():
        console.print(Text(visible(f"all: {_money(amounts)} {currency}")))
    for model, how in plain["counting"].items():
        console.print(Text(visible(f"tokens of {model}: {how}")))
    for note in plain["notes"]:
        console.print(Text(visible(f"note: {note}")))


def _whole(bounds: Mapping[str, float]) -> str:
    low, expected, high = (f"{bounds[k]:,.0f}" for k in ("low", "expected", "high"))
    return low if low == high else f"{low} - {expected} - {high}"


def _money(bounds: Mapping[str, float] | None) -> str:
    if bounds is None:
        return "no price"
    low, expected, high = (f"{bounds[k]:,.4f}" for k in ("low", "expected", "high"))
    return low if low == high else f"{low} - {expected} - {high}"
