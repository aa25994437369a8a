"""Tasks check labels and score texts."""

from __future__ import annotations

import pytest

from proxyprompt.errors import DataError, InputError
from proxyprompt.prompt import Demonstration, Query
from proxyprompt.task import LabelTask, TextTask, exact_match, token_f1

GOOD = Query("q", {"input": "x"}, "a")


def test_labels_are_checked_on_demonstrations_and_queries() -> None:
    task = LabelTask(("a", "b"))
    task.validate((Demonstration("d", {}, "b"),), (GOOD,))
    with pytest.raises(DataError, match=r"query 'q2': the label 'c' is not allowed; allowed: 'a', 'b'"):
        task.validate((), (Query("q2", {}, "c"),))
    with pytest.raises(DataError, match="demonstration 'd'"):
        task.validate((Demonstration("d", {}, "B"),), ())


@pytest.mark.parametrize(
    ("labels", "message"), [(("a",), "at least two"), (("a", "a"), "twice"), (("a", " "), "empty")]
)
def test_bad_label_sets(labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LabelTask(labels)


def test_choices_per_query() -> None:
    task = LabelTask(None)
    assert task.answers(Query("q", {}, "x", ("x", "y", "z"))) == ("x", "y", "z")
    with pytest.raises(DataError, match="no choices"):
        task.answers(GOOD)


def test_text_scores() -> None:
    assert exact_match("The  Cat!", ["a cat"]) == 1.0
    assert exact_match("A", ["A"]) == 1.0
    assert exact_match("A", ["B"]) == 0.0
    assert token_f1("red big dog", ["the big dog"]) == pytest.approx(0.8)
    assert token_f1("", ["x"]) == 0.0
    assert TextTask("token_f1").score(["x y"], [["z", "x y"]]) == [1.0]


def test_user_metrics_are_held_to_their_range() -> None:
    assert TextTask(lambda out, refs: 0.25).score(["x"], [["y"]]) == [0.25]
    with pytest.raises(InputError, match="returned 2"):
        TextTask(lambda out, refs: 2.0).score(["x"], [["y"]])
    with pytest.raises(InputError, match="metric"):
        TextTask("bleu")
    with pytest.raises(DataError, match="empty"):
        TextTask().validate((), (Query("q", {}, " "),))
