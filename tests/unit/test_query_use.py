"""Queries that chose something cannot certify later, in whatever run; sealed ones that were looked at are counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from proxyprompt._query_use import earlier_looks, note_use, query_key, refuse_used
from proxyprompt.errors import DataError
from proxyprompt.ledger import Ledger
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened


def prompt(*names: str) -> FewShotPrompt:
    return FewShotPrompt(tuple(Demonstration(n, {"input": f"demo {n}"}, "yes") for n in names))


def queries(*names: str) -> list[Query]:
    return [Query(f"id {n}", {"input": n}, "yes") for n in names]


def test_a_query_is_known_by_what_it_asks() -> None:
    assert query_key(Query("a", {"input": "x"}, "yes")) == query_key(Query("b", {"input": "x"}, "no"))
    assert query_key(Query("a", {"input": "x"}, "yes")) != query_key(Query("a", {"input": "y"}, "yes"))
    assert query_key(Query("a", {"input": "x"}, "p", ("p", "q"))) != query_key(
        Query("a", {"input": "x"}, "p")
    )


@pytest.mark.parametrize("purpose", ["explain", "select"])
def test_queries_that_chose_in_another_run_are_refused(ledger: Ledger, purpose: str) -> None:
    note_use(ledger, "one", purpose, prompt("a", "b", "c"), queries("x", "y"))
    sealed = queries("y", "z")
    with pytest.raises(DataError, match=f"1 of the 2 sealed queries served to {purpose} in an earlier run"):
        refuse_used(ledger, "two", prompt("a", "b", "c"), sealed)
    with pytest.raises(DataError, match="cut from"):
        refuse_used(ledger, "two", prompt("b", "a"), sealed)  # what is left of that prompt
    refuse_used(ledger, "one", prompt("a", "b", "c"), sealed)  # the same run goes on
    refuse_used(ledger, "two", prompt("a", "d"), sealed)  # another prompt
    refuse_used(ledger, "two", prompt("a", "b", "c"), queries("z"))


def test_looks_at_sealed_queries_are_counted_once_a_run(ledger: Ledger) -> None:
    for run in ("one", "one", "two"):
        note_use(ledger, run, "sealed", prompt("a", "b"), queries("x", "y"))
    note_use(ledger, "far", "sealed", prompt("q"), queries("x"))
    assert earlier_looks(ledger, "three", prompt("a", "b"), queries("y", "z")) == 2
    assert earlier_looks(ledger, "three", prompt("a"), queries("y")) == 2
    assert earlier_looks(ledger, "three", prompt("a", "b", "c"), queries("y")) == 2
    assert earlier_looks(ledger, "two", prompt("a", "b"), queries("y")) == 1
    assert earlier_looks(ledger, "three", prompt("a", "b"), queries("z")) == 0
    refuse_used(ledger, "three", prompt("a", "b"), queries("x"))


def test_uses_outlive_the_process(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as first:
        note_use(first, "one", "select", prompt("a"), queries("x"))
    with Ledger(tmp_path / "ledger.db") as second, pytest.raises(DataError):
        refuse_used(second, "two", prompt("a"), queries("x"))
