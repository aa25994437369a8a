"""One word for every demonstration, and the numbers behind it."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import Attribution
from proxyprompt.optimize import Cleaning, Confirmation, Round, classify
from proxyprompt.report._schema import VERDICTS


def attribution(mean: list[float], se: float = 0.1) -> Attribution:
    m = np.array(mean)
    zeros, flat = np.zeros(len(m)), np.zeros(40)
    return Attribution(
        np.tile(m, (40, 1)),
        m,
        np.full(len(m), se),
        np.full(len(m), se),
        zeros,
        flat,
        flat,
        flat,
        10,
        True,
        "x",
    )


def cleaning(n: int, confirmed: dict[int, bool]) -> Cleaning:
    found = tuple(
        Confirmation(u, 0.3 if yes else 0.0, 0.1, 0.001 if yes else 0.4, yes) for u, yes in confirmed.items()
    )
    kept = np.array([not confirmed.get(i, False) for i in range(n)])
    rounds = (Round(np.ones(n, dtype=bool), tuple(confirmed), found, 0.05),) if confirmed else ()
    return Cleaning(rounds, kept, 0.05, 60, "")


def names(mean: list[float], confirmed: dict[int, bool], kept: list[bool]) -> list[str]:
    found = classify(attribution(mean), cleaning(len(mean), confirmed), np.array(kept))
    assert [c.unit for c in found] == list(range(len(mean)))
    assert all(c.name in VERDICTS and c.reason for c in found)
    return [c.name for c in found]


def test_the_first_that_holds_decides() -> None:
    mean = [-0.5, -0.5, 0.5, 0.5, 0.05, -0.3]
    confirmed = {0: True, 1: True, 5: False}
    kept = [False, True, False, True, True, False]
    assert names(mean, confirmed, kept) == [
        "harmful",
        "harmful",
        "redundant",
        "useful",
        "unclear",
        "redundant",
    ]


@pytest.mark.parametrize(("mean", "word"), [(0.168, "unclear"), (0.169, "useful")])
def test_useful_is_a_lower_bound_above_zero(mean: float, word: str) -> None:
    """t(39) at 95 % is 1.6849, the standard error 0.1."""
    assert names([mean], {}, [True]) == [word]
    (found,) = classify(attribution([mean]), cleaning(1, {}), np.array([True]))
    assert found.lower_bound == pytest.approx(mean - 0.16849, abs=1e-4)


def test_what_is_spared_is_not_called_harmful() -> None:
    cleaned = cleaning(2, {0: True, 1: True})
    cleaned.kept[1] = True
    found = classify(attribution([-0.5, -0.5]), cleaned, cleaned.kept)
    assert [c.name for c in found] == ["harmful", "unclear"]
    assert "did better with it" in found[1].reason
    assert "did not confirm" not in found[1].reason


def test_nothing_certified_leaves_nothing_redundant() -> None:
    assert names([0.5, 0.0, -0.5], {2: True}, [True, True, True]) == ["useful", "unclear", "harmful"]


def test_reasons_say_what_was_asked() -> None:
    found = classify(
        attribution([-0.3, -0.3, 0.0]),
        cleaning(3, {0: False}),
        np.array([False, True, True]),
        near_copies={2: "d9"},
    )
    assert "did not confirm" in found[0].reason
    assert found[0].suspected
    assert found[0].confirmation is not None
    assert found[1].confirmation is None
    assert found[2].reason.endswith("It does much the same work as d9.")
