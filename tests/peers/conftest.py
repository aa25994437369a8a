"""Reference libraries for the tests in this folder. They are never skipped: a missing library is a failure."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from .games import GAMES, TableGame

# shap compiles for twenty seconds what takes it milliseconds on games of this size.
os.environ["NUMBA_DISABLE_JIT"] = "1"


@pytest.fixture
def peer() -> Callable[[str], ModuleType]:
    """``peer("shap")`` imports a reference library."""

    def load(name: str) -> ModuleType:
        try:
            # What these libraries warn of while they load is not ours to mend; what they warn of later still fails.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module(name)
        except ImportError as error:
            pytest.fail(
                f"{name} is not installed ({error}); `make test` installs the reference libraries that"
                " constraints.txt pins."
            )

    return load


@pytest.fixture(params=list(GAMES))
def game(request: pytest.FixtureRequest) -> TableGame:
    """A game with three queries, as the table of its values."""
    return GAMES[request.param]()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
