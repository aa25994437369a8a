"""One value matrix of a real model: every library gets the same attributions out of it."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt import Demonstration, FewShotPrompt, LabelTask, Query
from proxyprompt.attribution import ExactShapley, KernelSHAP, WeightedBanzhaf
from proxyprompt.backends.embedded import embedded
from proxyprompt.metering import Meter
from proxyprompt.value_function import PromptValueFunction

from .games import TableGame, table

SHOWN = [
    ("warm, funny and never too long", "positive"),
    ("the plot falls asleep before you do", "negative"),
    ("a small film with a big heart", "positive"),
    ("I want my evening back", "negative"),
    ("every joke lands twice", "positive"),
    ("loud, flat and far too proud of itself", "negative"),
]


@pytest.fixture(scope="module")
def game() -> TableGame:
    """Six demonstrations, all 64 coalitions, two queries, log-probabilities of SmolLM2."""
    prompt = FewShotPrompt(
        tuple(Demonstration(f"d{i}", {"input": text}, label) for i, (text, label) in enumerate(SHOWN)),
        demonstration_template="Review: {input}\nSentiment: {output}",
    )
    queries = (
        Query("q0", {"input": "a joy from the first scene on"}, "positive"),
        Query("q1", {"input": "two hours that feel like ten"}, "negative"),
    )
    meter = Meter(embedded("smollm2-135m", threads=1), None, role="target", run="peers")
    function = PromptValueFunction(prompt, LabelTask(("positive", "negative")), queries, meter)
    game = table(function, 6)
    assert np.ptp(game.values, axis=0).min() > 0.3, "the demonstrations move the model"
    return game


def test_every_library_gets_the_same_shapley_values(game, peer, rng) -> None:
    shap, shapiq, torch, captum = peer("shap"), peer("shapiq"), peer("torch"), peer("captum.attr")
    ours = ExactShapley().attribute(game, 6, budget=64, rng=rng).values
    np.testing.assert_allclose(KernelSHAP().attribute(game, 6, budget=64, rng=rng).values, ours, atol=1e-10)
    for query in range(2):
        rows = lambda x, query=query: game.of(query)(np.asarray(x) > 0.5)  # noqa: E731
        masker = shap.maskers.Independent(np.zeros((1, 6)))
        exact = shap.explainers.Exact(rows, masker)(np.ones((1, 6))).values[0]
        kernel = shap.KernelExplainer(rows, np.zeros((1, 6))).shap_values(
            np.ones(6), nsamples=64, l1_reg=False, silent=True
        )
        definition = shapiq.ExactComputer(game.of(query), n_players=6)("SV").get_n_order_values(1)
        orders = captum.ShapleyValues(lambda x, rows=rows: torch.from_numpy(rows(x.numpy()))).attribute(
            torch.ones(1, 6, dtype=torch.float64), perturbations_per_eval=720
        )
        for theirs in (exact, kernel, definition):
            np.testing.assert_allclose(ours[query], theirs, atol=1e-8)
        # captum adds 720 orders up in single precision.
        np.testing.assert_allclose(ours[query], orders[0].numpy(), atol=1e-5)


def test_shapiq_gets_the_same_banzhaf_values(game, peer, rng) -> None:
    ours = WeightedBanzhaf(keep=0.5).attribute(game, 6, budget=64, rng=rng).values
    for query in range(2):
        theirs = peer("shapiq").ExactComputer(game.of(query), n_players=6)("BV").get_n_order_values(1)
        np.testing.assert_allclose(ours[query], theirs, atol=1e-10)
