"""The Shapley estimators of shap, shapiq and captum behind one signature, for ``variance.py``.

Each takes ``(game, n_units, budget, seed)``, where ``game`` maps a boolean matrix to one value a row and counts the
rows it was asked for, and returns ``n_units`` Shapley values. Settings are the packages' defaults but for the sample
size, which is the largest that stays within the budget, and for the variants that a name states.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

Estimator = Callable[["CountedGame", int, int, int], np.ndarray]


class TooSmall(Exception):
    """The budget is below what this estimator can run with."""


class CountedGame:
    """One query of a game, counting every row that is asked for, repeated or not."""

    def __init__(self, values: Callable[[np.ndarray], np.ndarray], column: int) -> None:
        self.values, self.column, self.evaluations = values, column, 0

    def __call__(self, rows: Any) -> np.ndarray:
        """Values, shape (n_rows,)."""
        matrix = np.atleast_2d(np.asarray(rows)).astype(bool)
        self.evaluations += len(matrix)
        return np.asarray(self.values(matrix))[:, self.column]


def missing_packages() -> list[str]:
    """Peers that are not installed (lightgbm is what shapiq's ProxySPEX learns with)."""
    wanted = ("shap", "shapiq", "captum", "lightgbm")
    return [name for name in wanted if importlib.util.find_spec(name) is None]


def peers() -> dict[str, Estimator]:
    """Every installed peer, by name."""
    absent = missing_packages()
    found: dict[str, Estimator] = {}
    if "shap" not in absent:
        found |= _shap()
    if "shapiq" not in absent:
        found |= _shapiq(with_lightgbm="lightgbm" not in absent)
    if "captum" not in absent:
        found |= _captum()
    return found


def _shap() -> dict[str, Estimator]:
    import shap

    logging.getLogger("shap").setLevel(logging.ERROR)

    def kernel(l1_reg: Any) -> Estimator:
        def run(game: CountedGame, n: int, budget: int, seed: int) -> np.ndarray:
            np.random.seed(seed)
            explainer = shap.KernelExplainer(game, np.zeros((1, n)))
            # The ends are asked for beside the samples.
            return explainer.shap_values(np.ones((1, n)), nsamples=budget - 2, l1_reg=l1_reg, silent=True)[0]

        return run

    def permutation(game: CountedGame, n: int, budget: int, seed: int) -> np.ndarray:
        rounds = budget // (2 * n + 1)
        if rounds < 1:
            raise TooSmall
        explainer = shap.explainers.Permutation(game, shap.maskers.Independent(np.zeros((1, n))), seed=seed)
        return explainer(np.ones((1, n)), max_evals=rounds * (2 * n + 1), silent=True).values[0]

    def sampling(game: CountedGame, n: int, budget: int, seed: int) -> np.ndarray:
        if budget < 4 * n + 6:
            raise TooSmall
        np.random.seed(seed)
        explainer = shap.SamplingExplainer(game, np.zeros((1, n)))
        return explainer.shap_values(np.ones((1, n)), nsamples=budget // 2 - 2, silent=True)[0]

    return {
        "shap Kernel": kernel("num_features(10)"),
        "shap Kernel, no l1": kernel(False),
        "shap Permutation": permutation,
        "shap Sampling": sampling,
    }


def _shapiq(*, with_lightgbm: bool) -> dict[str, Estimator]:
    from shapiq import approximator as a

    def make(cls: Any, **settings: Any) -> Estimator:
        def run(game: CountedGame, n: int, budget: int, seed: int) -> np.ndarray:
            try:
                return cls(n=n, random_state=seed, **settings).approximate(budget, game).get_n_order_values(1)
            except (ValueError, IndexError) as error:  # ProxySPEX indexes past a spectrum of one coefficient
                if "budget" in str(error) or cls is a.ProxySPEX:
                    raise TooSmall from error
                raise

        return run

    found = {
        "shapiq KernelSHAP": make(a.KernelSHAP),
        "shapiq KernelSHAP, paired": make(a.KernelSHAP, pairing_trick=True),
        "shapiq kADDSHAP, order 2": make(a.kADDSHAP, max_order=2),
        "shapiq kADDSHAP, order 2, paired": make(a.kADDSHAP, max_order=2, pairing_trick=True),
        "shapiq kADDSHAP, order 3": make(a.kADDSHAP, max_order=3),
        "shapiq kADDSHAP, order 3, paired": make(a.kADDSHAP, max_order=3, pairing_trick=True),
        "shapiq KernelSHAP-IQ, order 2": make(a.KernelSHAPIQ, max_order=2, index="SII", pairing_trick=True),
        "shapiq PermutationSamplingSV": make(a.PermutationSamplingSV),
        "shapiq StratifiedSamplingSV": make(a.StratifiedSamplingSV),
        "shapiq OwenSamplingSV": make(a.OwenSamplingSV),
        "shapiq SVARM": make(a.SVARM),
        "shapiq SVARM, paired": make(a.SVARM, pairing_trick=True),
        "shapiq UnbiasedKernelSHAP": make(a.UnbiasedKernelSHAP),
        "shapiq UnbiasedKernelSHAP, paired": make(a.UnbiasedKernelSHAP, pairing_trick=True),
        "shapiq SPEX": make(a.SPEX, index="SV", max_order=1),
    }
    if with_lightgbm:
        found["shapiq ProxySPEX"] = make(a.ProxySPEX, index="SV", max_order=1)
    return found


def _captum() -> dict[str, Estimator]:
    import torch
    from captum.attr import KernelShap, ShapleyValueSampling

    def model(game: CountedGame) -> Callable[[Any], Any]:
        return lambda rows: torch.as_tensor(game(rows.numpy() > 0.5))

    def kernel(game: CountedGame, n: int, budget: int, seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        np.random.seed(seed)
        inputs = torch.ones((1, n), dtype=torch.float64)
        out = KernelShap(model(game)).attribute(inputs, baselines=torch.zeros_like(inputs), n_samples=budget)
        return out.numpy()[0]

    def sampling(game: CountedGame, n: int, budget: int, seed: int) -> np.ndarray:
        rounds = (budget - 1) // n
        if rounds < 1:
            raise TooSmall
        torch.manual_seed(seed)
        inputs = torch.ones((1, n), dtype=torch.float64)
        out = ShapleyValueSampling(model(game)).attribute(
            inputs, baselines=torch.zeros_like(inputs), n_samples=rounds
        )
        return out.numpy()[0]

    return {"captum KernelShap": kernel, "captum ShapleyValueSampling": sampling}
