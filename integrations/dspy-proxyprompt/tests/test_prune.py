"""Pruning with scripted models: closed-form answers, and every way to go wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import dspy_scripted as s
import pytest
from dspy_proxyprompt import ProxyPrune

from proxyprompt import Settings
from proxyprompt.errors import BackendError, DataError, InconclusiveError, InputError

QUICK = Settings(interactions="off")
SOME = s.TRAIN[:12]
FEW = s.VAL[:12]
RIGHT = s.harmed_by("nothing harms")


def compile_quickly(one: ProxyPrune, student: Any, lm: Any, **kwargs: Any) -> Any:
    with dspy.context(lm=lm):
        return one.compile(student, **{"trainset": SOME, "valset": FEW, **kwargs})


def test_the_harmful_demo_goes_and_the_result_is_certified(pruner: Any, tmp_path: Path) -> None:
    lm = s.Scripted(s.harmed_by("poison"))
    student = s.program()
    with dspy.context(lm=lm):
        one = pruner(settings=QUICK)
        pruned = one.compile(student, trainset=s.TRAIN[:100], valset=s.VAL[:100])
    assert one.report is not None
    assert one.report.certified
    assert not one.report.predictors[0].demos[2].kept
    assert one.report.predictors[0].demos[2].attribution < -0.1
    assert [d.answer for d in student.demos] == ["fine 0", "fine 1", "poison", "fine 3"]
    assert student._compiled is False
    assert pruned._compiled is True
    assert "poison" not in [d.answer for d in pruned.demos]
    assert pruned.lm is None  # what was in a context stays there
    calls = len(lm.seen)
    with dspy.context(lm=lm):
        again = pruner(settings=QUICK).compile(student, trainset=s.TRAIN[:100], valset=s.VAL[:100])
    assert len(lm.seen) == calls  # the ledger has all of it
    assert [dict(d) for d in again.demos] == [dict(d) for d in pruned.demos]
    assert not any(cache for _, cache in lm.seen)
    assert lm.cache


# --- what is given ---------------------------------------------------------------------------------------


def test_valset_is_required_and_disjoint(pruner: Any) -> None:
    lm = s.Scripted(RIGHT)
    for valset in (None, []):
        with pytest.raises(DataError, match=r"valset: got .* certify what was chosen on it"):
            compile_quickly(pruner(), s.program(), lm, valset=valset)
    with pytest.raises(DataError, match="trainset: got None"):
        compile_quickly(pruner(), s.program(), lm, trainset=None)
    with pytest.raises(DataError, match="valset: 1 of 12 examples have the inputs of an example of trainset"):
        compile_quickly(pruner(), s.program(), lm, trainset=[*SOME, FEW[3]])
    with pytest.raises(DataError, match="valset: 1 of 12 examples are demos"):
        compile_quickly(pruner(), s.program([*s.DEMOS, FEW[5]]), lm)
    with pytest.raises(DataError, match=r"trainset\[0\]: the example does not say .*with_inputs"):
        compile_quickly(pruner(), s.program(), lm, trainset=[dspy.Example(question="x", answer="y")])
    with pytest.raises(DataError, match="trainset: 3 examples that are no demos"):
        compile_quickly(pruner(), s.program(), lm, trainset=SOME[:3])
    with pytest.raises(TypeError):
        pruner().compile(s.program(), SOME, FEW)
    assert not lm.seen


def test_demos_do_not_judge_themselves_and_repetitions_count_once(pruner: Any) -> None:
    one = pruner()
    compile_quickly(
        one, s.program([*s.DEMOS, SOME[0], dict(SOME[1])]), s.Scripted(RIGHT), trainset=[*SOME, SOME[5]]
    )
    assert any("2 examples of trainset are demos" in n for n in one.report.notes)
    assert any("1 examples of trainset repeat" in n for n in one.report.notes)


def test_a_program_without_demos_is_refused(pruner: Any) -> None:
    with pytest.raises(InputError, match=r"no demos to prune. Compile it first"):
        compile_quickly(pruner(), s.program([]), s.Scripted(RIGHT))
    with pytest.raises(InputError, match=r"a dspy.Module is needed"):
        compile_quickly(pruner(), "program", s.Scripted(RIGHT))
    with pytest.raises(InputError, match="no language model, and none is configured"):
        pruner().compile(s.program(), trainset=SOME, valset=FEW)


def test_knn_few_shot_is_refused_with_advice(pruner: Any) -> None:
    import numpy as np

    embed = dspy.Embedder(lambda texts: np.asarray([[len(t), 1.0] for t in texts], dtype=np.float32))
    student = dspy.KNNFewShot(k=2, trainset=SOME, vectorizer=embed).compile(s.program([]))
    with pytest.raises(InputError, match=r"KNNFewShot.*give KNNFewShot a smaller trainset"):
        compile_quickly(pruner(), student, s.Scripted(RIGHT))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"proxies": ["smol"]}, "proxies: got 'smol'"),
        ({"num_threads": 0}, "num_threads: got 0"),
        ({"max_errors": True}, "max_errors: got True"),
        ({"unparsable": "zero"}, "unparsable: got 'zero'"),
        ({"explain_share": 1.0}, "explain_share: got 1.0"),
        ({"tau": 2.0}, "tau: got 2.0"),
        ({"metric": lambda example: 1}, "cannot be called as metric"),
    ],
)
def test_wrong_arguments(pruner: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pruner(**kwargs)


# --- metrics ----------------------------------------------------------------------------------------------


def gepa(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
    assert trace is pred_name is pred_trace is None
    return dspy.Prediction(score=float(gold.answer == pred.answer), feedback="look again")


def gepa_dict(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any, program_trace: Any) -> Any:
    return {"score": float(gold.answer == pred.answer), "feedback": "look again"}


def half(example: Any, pred: Any, trace: Any = None) -> float:
    return 0.5 + 0.5 * (example.answer == pred.answer)


@pytest.mark.parametrize(
    ("metric", "binary", "score"),
    [(s.right, True, 1.0), (gepa, False, 1.0), (gepa_dict, False, 1.0), (half, False, 1.0)],
)
def test_any_metric(pruner: Any, metric: Any, binary: bool, score: float) -> None:
    one = pruner(metric)
    compile_quickly(one, s.program(), s.Scripted(RIGHT))
    assert one.result.task.right_or_wrong is binary
    assert one.report.artifact.summary["before"]["performance"]["value"] == score


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, r"returned 7; scores lie in \[0, 1\].*Divide by the largest"),
        (None, "returned None, which is no score"),
        (float("nan"), "returned NaN"),
        ({"feedback": "x"}, "returned None, which is no score"),
    ],
)
def test_what_is_no_score_is_refused(pruner: Any, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compile_quickly(pruner(lambda e, p, trace=None: value), s.program(), s.Scripted(RIGHT))


def test_a_metric_that_fails_ends_the_run_and_is_no_score_of_0(pruner: Any) -> None:
    def broken(example: Any, prediction: Any, trace: Any = None) -> float:
        return float(prediction.answer == example.anwser)

    lm = s.Scripted(RIGHT)
    with pytest.raises(InputError, match=r"metric: broken raised AttributeError.*question='q"):
        compile_quickly(pruner(broken), s.program(), lm)
    paid = len(lm.seen)
    compile_quickly(pruner(), s.program(), lm)  # mended: what was paid is not paid again
    fresh = s.Scripted(RIGHT)
    one = ProxyPrune(s.right, ledger=pruner().ledger.with_name("other.db"), settings=pruner().settings)
    compile_quickly(one, s.program(), fresh)
    assert len(lm.seen) == len(fresh.seen)
    assert paid > 0


# --- answers that fail ----------------------------------------------------------------------------------


def test_an_outage_is_missing_and_ends_the_run_never_a_score(pruner: Any) -> None:
    def down(messages: Any) -> str:
        raise ConnectionError("the server is gone")

    with pytest.raises(BackendError, match=r"3 runs .* gave no answer \(max_errors=3\).*server is gone"):
        compile_quickly(pruner(max_errors=3, num_threads=1), s.program(), s.Scripted(down))

    def sometimes(messages: Any) -> str:
        if s.luck(s.number(messages)) < 0.5:
            raise ConnectionError("busy")
        return RIGHT(messages)

    with pytest.raises(InconclusiveError, match=r"missing .* busy"):
        compile_quickly(pruner(max_errors=10_000), s.program(), s.Scripted(sometimes))


def test_what_the_adapter_cannot_parse_is_a_wrong_answer_or_missing(pruner: Any) -> None:
    lm = s.Scripted(lambda m: "no field in it" if s.luck(s.number(m)) < 0.4 else RIGHT(m))
    one = pruner()
    with dspy.context(adapter=dspy.ChatAdapter()):
        compile_quickly(one, s.program(), lm)
    assert 0 < one.report.artifact.summary["before"]["performance"]["value"] < 1
    assert any("could not be parsed" in n and "score 0" in n for n in one.report.notes)
    with pytest.raises(InconclusiveError, match="could not parse"):
        compile_quickly(pruner(unparsable="missing", title="x"), s.program([*s.DEMOS, s.example(5000)]), lm)


def test_an_outage_that_an_adapter_covers_with_another_prompt_is_no_answer(pruner: Any) -> None:
    """DSPy 3.0 asks again as JSON after any failure; later versions let it through. Both ways it is missing."""
    one = pruner(max_errors=10_000)
    busy: set[str] = set()

    def once(messages: Any) -> str:
        if s.luck(s.number(messages)) < 0.5 and "completed" in messages[0]["content"]:
            busy.add(s.number(messages))
            raise ConnectionError("busy")
        text = RIGHT(messages)
        return (
            text
            if "completed" in messages[0]["content"]
            else json.dumps({"answer": f"a{s.number(messages)}"})
        )

    with pytest.raises(InconclusiveError, match=r"missing .* busy"):
        compile_quickly(one, s.program(), s.Scripted(once))
    assert busy


# --- proxies ----------------------------------------------------------------------------------------------


def test_proxies_are_screened_by_the_program_itself(pruner: Any) -> None:
    """Two models of one name are told apart; each runs the program, and the target alone certifies."""
    demos = [dspy.Example(question=f"demo {i}", answer="poison" if i == 2 else f"fine {i}") for i in range(7)]
    target, same, other = (
        s.Scripted(s.harmed_by("poison"), "scripted/target"),
        s.Scripted(s.harmed_by("poison"), "scripted/cheap"),
        s.Scripted(s.harmed_by("fine 4", 1.0), "scripted/cheap", max_tokens=9),
    )
    quick = Settings(
        interactions="off",
        clean=False,
        fit_coalitions=20,
        judge_coalitions=8,
        screening_delta=0.3,
        screening_tau=0.5,
    )
    one = pruner(settings=quick, proxies=[same, other], explain_share=0.6)
    compile_quickly(one, s.program(demos), target, trainset=s.TRAIN[:26], valset=s.VAL[:40])
    found = {p["name"]: p for p in one.report.artifact.summary["screening"]["proxies"]}
    assert list(found)[:2] == ["dspy:Predict@scripted/cheap", "dspy:Predict@scripted/cheap#2"]
    assert found["dspy:Predict@scripted/cheap"]["decision"] == "accepted"
    assert found["dspy:Predict@scripted/cheap#2"]["decision"] != "accepted"
    assert target.seen
    assert same.seen
    assert other.seen
    sealed = {f"q{i}" for i in range(1000, 1040)}
    for proxy in (same, other):
        assert not sealed & {f"q{s.number(m)}" for m, _ in proxy.seen}


def test_a_proxy_named_twice_is_refused(pruner: Any) -> None:
    twins = [s.Scripted(RIGHT, "scripted/cheap"), s.Scripted(s.harmed_by("poison"), "scripted/cheap")]
    with pytest.raises(InputError, match="two are the same model, 'scripted/cheap'"):
        compile_quickly(pruner(proxies=twins), s.program(), s.Scripted(RIGHT))
