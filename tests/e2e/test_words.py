"""A small real model, explained word by word: the word that was planted is the word that is found."""

from __future__ import annotations

import numpy as np

from proxyprompt import (
    Demonstration,
    FewShotPrompt,
    KernelSHAP,
    LabelTask,
    Query,
    QueryWords,
    explain_queries,
    open_model,
)
from proxyprompt.metering import Meter

SHOWN = [
    ("a warm and funny story told with real charm", "positive"),
    ("dull from the first scene to the last", "negative"),
    ("the acting is superb and the music a delight", "positive"),
    ("a lazy , tired script that goes nowhere", "negative"),
]
PLANTED = {"boring": "negative", "wonderful": "positive", "beautiful": "positive"}


def test_planted_words_get_the_largest_attribution() -> None:
    prompt = FewShotPrompt(
        tuple(Demonstration(f"d{i}", {"input": text}, label) for i, (text, label) in enumerate(SHOWN)),
        "Is the sentence from a film review positive or negative? The sentence may be empty.",
        "Sentence: {input}\nSentiment: {output}",
    )
    queries = [
        Query(w, {"input": f"we saw a {w} film on tuesday evening"}, label) for w, label in PLANTED.items()
    ]
    found = explain_queries(
        [QueryWords(prompt, query) for query in queries],
        LabelTask(("negative", "positive")),
        Meter(open_model("embedded:smollm2-135m", options={"threads": 1}), None, role="proxy", run="test"),
        explainer=KernelSHAP(),
        budget=32,
        rng=np.random.default_rng(0),
    )
    for explanation in found:
        credit = explanation.by_label["positive"].mean
        words = [unit.text for unit in explanation.units]
        word = explanation.query.id
        assert words[int(np.abs(credit).argmax())] == word
        assert (credit[words.index(word)] > 0) == (PLANTED[word] == "positive")
        np.testing.assert_allclose(credit, -explanation.by_label["negative"].mean, atol=1e-9)
