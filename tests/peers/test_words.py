"""Words of a query are cut and taken out as LIME's own IndexedString does."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxyprompt.attribution import LIME, Design
from proxyprompt.prompt import FewShotPrompt, Query
from proxyprompt.units import QueryWords

PROMPT = FewShotPrompt((), "", "{input}|{output}")
WORDS = ["good", "bad", "don't", "a_b", "Ü", "e\u0301", "3.5", " ", "  ", ",", "\n", "…"]
TEXT = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=12).map("".join),
    st.text(max_size=25),
).filter(lambda text: re.search(r"\w", text))
MODES = {"separate": {"removal": "mask"}, "together": {"removal": "delete", "repeated": "together"}}


@pytest.mark.parametrize("mode", list(MODES))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, seed=st.integers(0, 99))
def test_perturbed_texts_are_those_of_lime(peer, mode: str, text: str, seed: int) -> None:
    lime_text = peer("lime.lime_text")
    query = Query("q", {"input": text}, "x")
    units = QueryWords(PROMPT, query, split="lime", **MODES[mode])
    theirs = lime_text.IndexedString(text, bow=mode == "together")
    assert [unit.text for unit in units.units] == [str(word) for word in theirs.inverse_vocab]
    keep = np.random.default_rng(seed).random(units.n_units) < 0.6
    assert units.inputs(keep.tolist())["input"] == theirs.inverse_removing(np.flatnonzero(~keep))


def test_the_mask_is_limes_too(peer) -> None:
    lime_text = peer("lime.lime_text")
    text = "so so, good!"
    units = QueryWords(PROMPT, Query("q", {"input": text}, "x"), split="lime", removal="mask", mask="[...]")
    theirs = lime_text.IndexedString(text, bow=False, mask_string="[...]")
    assert (
        units.inputs([False, True, False])["input"] == theirs.inverse_removing([0, 2]) == "[...] so, [...]!"
    )


def test_attributions_of_words_are_those_of_lime(peer) -> None:
    """LIME's explainer reads the model through its own cutting, drawing and regression; ours through ours, on its draw."""
    lime_text = peer("lime.lime_text")
    text = "not good , not bad : just long , long and odd ."
    weights = {"not": -0.3, "good": 0.5, "bad": -0.6, "long": -0.25, "odd": 0.1}

    def score(shown: str) -> float:
        words = shown.split()
        return (
            0.5 + 0.1 * sum(weights.get(w, 0.0) for w in words) - 0.05 * ("not" in words and "bad" in words)
        )

    seen: list[str] = []

    def classify(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        p = np.array([score(t) for t in texts])
        return np.stack([1 - p, p], axis=1)

    explainer = lime_text.LimeTextExplainer(feature_selection="none", random_state=0)
    theirs = dict(explainer.explain_instance(text, classify, num_features=99, num_samples=300).as_list())
    units = QueryWords(PROMPT, Query("q", {"input": text}, "x"), split="lime", repeated="together")
    by_text = {units.inputs(row)["input"]: row for row in _all_rows(units.n_units)}
    rows = np.array([by_text[t] for t in seen])
    ends = np.vstack(
        [np.zeros(units.n_units, dtype=bool), rows]
    )  # ours needs the empty coalition; weight 0 if not drawn
    kernel = np.sqrt(np.exp(-((100 * (1 - np.sqrt(ends.mean(axis=1))) / 25) ** 2)))
    kernel[0] = 0.0
    values = np.array([[score(units.inputs(row.tolist())["input"])] for row in ends])
    ours = LIME().fit(Design(ends, kernel, exact=False), values)
    assert {u.text: v for u, v in zip(units.units, ours.mean, strict=True)} == pytest.approx(
        theirs, abs=1e-10
    )


def _all_rows(n: int) -> list[list[bool]]:
    return [[bool(k >> i & 1) for i in range(n)] for k in range(2**n)]
