"""The games of ``variance.py``: closed forms, random families, and the value matrices of ``matrices.py``.

A family takes a repetition's number and returns a value function with its Shapley values. Random families draw a new
game for each repetition, so that no estimator is judged by one lucky game.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np

from proxyprompt.attribution import ExactShapley
from proxyprompt.coalitions import enumerate_coalitions
from proxyprompt.testing import AdditiveGame, AirportGame, GloveGame, UnanimityGame

MATRICES = Path(__file__).parent / "results" / "matrices.npz"


class TableGame:
    """A game given by its values on all coalitions, shape (2**n_units, n_queries)."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.n_units = table, len(table).bit_length() - 1
        everything = ExactShapley().design(self.n_units, len(table), rng=np.random.default_rng(0))
        self.shapley_values = ExactShapley().fit(everything, table).values

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Values, shape (n_rows, n_queries)."""
        return self.table[np.asarray(rows) @ (1 << np.arange(self.n_units))]


def _polynomial(rng: np.random.Generator, n: int, order: int) -> UnanimityGame:
    terms = [
        (units, rng.normal() * 0.5 ** (k - 1))
        for k in range(1, order + 1)
        for units in combinations(range(n), k)
    ]
    return UnanimityGame(n, terms)


def _unanimity(rng: np.random.Generator, n: int) -> UnanimityGame:
    sizes = rng.integers(1, 7, size=n + 2)
    return UnanimityGame(n, [(rng.choice(n, size=s, replace=False), rng.normal()) for s in sizes])


def _sparse(rng: np.random.Generator, n: int) -> UnanimityGame:
    units = rng.permutation(n)[:6]
    terms = [units[:1], units[1:2], units[2:4], units[[0, 4]], units[[1, 2, 5]], units[[0, 3, 4]]]
    return UnanimityGame(n, [(t, rng.normal()) for t in terms])


def _table(rng: np.random.Generator, kind: str, n: int = 10) -> TableGame:
    z = enumerate_coalitions(n).astype(float)
    if kind == "rough":
        values = 0.5 * z @ rng.normal(size=n) + rng.normal(size=len(z))
    elif kind == "parity":
        values = 0.3 * z @ rng.normal(size=n) + np.prod(1 - 2 * z[:, :7], axis=1)
    elif kind == "log-sum":
        values = np.log(0.3 + z @ rng.exponential(size=n))
    else:
        slope = 1.5 * rng.normal(size=n)
        values = 1 / (1 + np.exp(-(z - 0.5) @ slope))
    return TableGame(values[:, None])


def families() -> dict[str, tuple[int, Callable[[int], object]]]:
    """Name to (number of units, game of a repetition)."""

    def drawn(make: Callable[[np.random.Generator], object]) -> Callable[[int], object]:
        return lambda repetition: make(np.random.default_rng([77, repetition]))

    found: dict[str, tuple[int, Callable[[int], object]]] = {
        "additive": (10, drawn(lambda r: AdditiveGame(r.normal(size=(1, 10))))),
        "order 2": (10, drawn(lambda r: _polynomial(r, 10, 2))),
        "order 3": (10, drawn(lambda r: _polynomial(r, 10, 3))),
        "sparse": (10, drawn(lambda r: _sparse(r, 10))),
        "unanimity mix": (10, drawn(lambda r: _unanimity(r, 10))),
        "airport": (10, drawn(lambda r: AirportGame(r.exponential(size=10)))),
        "glove": (10, lambda _: GloveGame(9)),
        "log-sum": (10, drawn(lambda r: _table(r, "log-sum"))),
        "sigmoid": (10, drawn(lambda r: _table(r, "sigmoid"))),
        "rough": (10, drawn(lambda r: _table(r, "rough"))),
        "parity of 7": (10, drawn(lambda r: _table(r, "parity"))),
    }
    if MATRICES.exists():
        with np.load(MATRICES) as stored:
            for name in sorted(stored.files):
                prompt, _, what = name.partition("_")
                if what not in ("demonstrations", "queries"):
                    game = TableGame(stored[name])
                    found[f"{what}, prompt {prompt.removeprefix('prompt')}"] = (10, lambda _, g=game: g)
    found |= {
        "unanimity mix, 24 units": (24, drawn(lambda r: _unanimity(r, 24))),
        "order 3, 24 units": (24, drawn(lambda r: _polynomial(r, 24, 3))),
        "airport, 24 units": (24, drawn(lambda r: AirportGame(r.exponential(size=24)))),
    }
    return found
