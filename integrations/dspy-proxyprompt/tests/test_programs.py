"""What DSPy programs are like: copies, frozen parts, loaded demos, adapters, models, threads, other optimizers."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any, Literal

import dspy
import dspy_scripted as s
import pydantic
import pytest
from dspy_proxyprompt import PruneReport, apply, demo_hash
from dspy_proxyprompt._predictions import Codec
from dspy_proxyprompt._program import lm_identity
from dspy_proxyprompt._running import Students
from dspy_proxyprompt._sets import make_sets

from proxyprompt.backends.base import GenerateRequest
from proxyprompt.errors import ArtifactError, InputError
from proxyprompt.program import Call

SOME, FEW = s.TRAIN[:12], s.VAL[:12]
RIGHT = s.harmed_by("nothing harms")
QUESTION = s.example(7)


def students(program: Any, **kwargs: Any) -> tuple[Students, Any]:
    """The program as prompt and model, over all demos of all predictors; and a call with all of them."""
    from dspy_proxyprompt._program import predictors

    units = {f"{p.path}:{i}": (p.index, d) for p in predictors(program) for i, d in enumerate(p.demos)}
    sets = make_sets(SOME, FEW, [], explain_share=0.5, seed=0)
    made = Students(
        program,
        units,
        fixed={},
        examples=sets.by_query,
        codec=Codec({}),
        max_errors=10,
        unparsable="wrong",
        num_threads=1,
        **kwargs,
    )
    return made, Call(tuple(units), sets.splits["explain"][0])


def run(backend: Any, rendered: Any) -> Any:
    [[(_, result)]] = list(backend.generate([GenerateRequest(rendered, 10, ())]))
    return result


class Two(dspy.Module):  # type: ignore[misc]
    """Rewrites the question, then answers."""

    def __init__(self) -> None:
        super().__init__()
        self.rewrite = dspy.Predict("question -> clear")
        self.answer = dspy.Predict("clear -> answer")

    def forward(self, question: str) -> Any:
        return self.answer(clear=self.rewrite(question=question).clear)


def two_steps(messages: Any) -> str:
    """Poison in either predictor's demos turns answers."""
    last = messages[-1]["content"]
    poisoned = "poison" in s.shown(messages)
    if "## question ##" in last:
        number = last.split("[[ ## question ## ]]\nq")[1].split("\n")[0].strip()
        return s.chat(clear=f"bad {number}" if poisoned and s.luck(number) < 0.5 else f"good {number}")
    good, number = last.split("[[ ## clear ## ]]\n")[1].split("\n")[0].split()
    wrong = good == "bad" or (poisoned and s.luck("x" + number) < 0.5)
    return s.chat(answer="wrong" if wrong else f"a{number}")


def two_program() -> Any:
    made = Two()
    made.rewrite.demos = [
        dspy.Example(question=f"r{i}", clear="poison" if i == 1 else "ok") for i in range(3)
    ]
    made.answer.demos = [dspy.Example(clear=f"c{i}", answer="poison" if i == 0 else "ok") for i in range(3)]
    return made


# --- copies ---------------------------------------------------------------------------------------------


def test_the_result_is_a_copy_with_the_same_models_and_the_student_stays(pruner: Any) -> None:
    lm = s.Scripted(RIGHT)
    student = s.program()
    student.set_lm(lm)
    student._compiled = True  # the usual state after an optimizer
    pruned = pruner().compile(student, trainset=SOME, valset=FEW)
    assert pruned is not student
    assert student.lm is lm
    assert pruned.lm is lm
    assert [d.answer for d in student.demos] == [d.answer for d in s.DEMOS]
    assert pruned._compiled
    assert len(student.reset_copy().demos) == 0  # what a pruner must never use
    with pytest.raises(AssertionError, match="Student must be uncompiled"):
        dspy.BootstrapFewShot(metric=s.right).compile(pruned, trainset=SOME)


def test_runs_are_independent(pruner: Any) -> None:
    class Stateful(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.step = dspy.Predict("question -> answer")
            self.seen: list[str] = []

        def forward(self, question: str) -> Any:
            self.seen.append(question)
            return self.step(question=question) if len(self.seen) == 1 else dspy.Prediction(answer="again")

    student = Stateful()
    student.step.demos = list(s.DEMOS)
    student.set_lm(s.Scripted(RIGHT))
    one = pruner()
    one.compile(student, trainset=SOME, valset=FEW)
    assert one.report.artifact.summary["before"]["performance"]["value"] == 1.0
    assert student.seen == []


# --- several predictors, frozen ones ----------------------------------------------------------------------


def test_demos_of_several_predictors_are_explained_jointly_and_each(pruner: Any) -> None:
    student = two_program()
    student.set_lm(s.Scripted(two_steps))
    one = pruner(per_predictor=True)
    pruned = one.compile(student, trainset=s.TRAIN[:40], valset=s.VAL[:80])
    rewrite, answer = one.report.predictors
    assert (rewrite.path, answer.path) == ("rewrite", "answer")
    for part, bad in ((rewrite, 1), (answer, 0)):
        means = [d.attribution for d in part.demos]
        assert min(range(3), key=lambda i: means[i]) == bad
        assert part.demos[bad].attribution < -0.1
        assert part.demos[bad].own_attribution < -0.1
        assert all(abs(d.own_attribution) < 0.05 for i, d in enumerate(part.demos) if i != bad)
        assert part.total_attribution == pytest.approx(sum(means))
    assert "poison" not in [d.clear for d in pruned.rewrite.demos] + [d.answer for d in pruned.answer.demos]
    assert one.report.certified
    assert "alone" in str(one.report)


def test_one_run_of_two_steps_counts_the_tokens_of_both() -> None:
    with dspy.context(lm=s.Scripted(two_steps)):
        made, call = students(two_program())
        rendered = made.renderings.render(call)
    assert isinstance(rendered, str)
    body = json.loads(rendered)
    assert [len(body["demos"][p]) for p in ("rewrite", "answer")] == [3, 3]
    assert json.loads(run(made.target(), rendered).text)["fields"]["answer"]


class Outer(dspy.Module):  # type: ignore[misc]
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.last = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        self.inner(question=question)
        return self.last(question=question)


def test_frozen_parts_are_reported_and_pruned_only_on_request(pruner: Any) -> None:
    inner = dspy.ChainOfThought("question -> answer")
    inner.predict.demos = list(s.DEMOS)
    inner._compiled = True
    student = Outer(inner)
    student.last.demos = list(s.DEMOS[:2])
    assert [name for name, _ in student.named_predictors()] == ["last"]  # DSPy does not see the other
    lm = s.Scripted(lambda m: s.chat(reasoning="so", answer=f"a{s.number(m)}"))
    with dspy.context(lm=lm):
        one = pruner()
        pruned = one.compile(student, trainset=SOME, valset=FEW)
        frozen = next(p for p in one.report.predictors if p.path == "inner.predict")
        assert frozen.frozen
        assert [d.verdict for d in frozen.demos] == ["frozen"] * 4
        assert len(pruned.inner.predict.demos) == 4
        assert any("compiled sub-module, left as they are" in n for n in one.report.notes)
        whole = pruner(include_frozen=True)
        pruned = whole.compile(student, trainset=SOME, valset=FEW)
    assert len(whole.result.original.demonstrations) == 6
    assert len(pruned.inner.predict.demos) == len(next(p for p in whole.report.predictors if p.frozen).order)
    assert any("pruned as asked" in n and "does not hold them" in n for n in whole.report.notes)
    assert "inner" not in json.dumps(list(student.dump_state()))  # the note is true


# --- demos ------------------------------------------------------------------------------------------------


def test_dropped_demos_go_for_free_and_incomplete_ones_come_first(pruner: Any) -> None:
    student = dspy.ChainOfThought("question -> answer")
    student.predict.demos = [
        dspy.Example(question="d0", reasoning="because", answer="full", augmented=True),
        dspy.Example(question="d1", answer="labelled"),
        dspy.Example(question="d2"),
        dspy.Example(reasoning="none asked", answer="d3"),
    ]

    def answer(messages: Any) -> str:
        number = messages[-1]["content"].split("[[ ## question ## ]]\nq")[1].split("\n")[0].strip()
        return s.chat(reasoning="so", answer=f"a{number}")

    lm = s.Scripted(answer)
    with dspy.context(lm=lm):
        one = pruner()
        one.compile(student, trainset=SOME, valset=FEW)
    assert [d.id for d in one.result.original.demonstrations] == ["predict:0", "predict:1"]
    demos = one.report.predictors[0].demos
    assert [d.verdict for d in demos[2:]] == ["dropped by the adapter"] * 2
    assert [d.incomplete for d in demos] == [False, True, True, True]
    assert [d.augmented for d in demos] == [True, False, False, False]
    both = next(m for m, _ in lm.seen if len(m) == 6)
    assert "labelled" in both[2]["content"]  # the second demo stands first
    assert "some input or output fields are not supplied" in both[1]["content"]
    assert any("[2, 3] lack every input or every output" in n for n in one.report.notes)
    assert any("[1] lack fields" in n and "have no reasoning" in n for n in one.report.notes)


def test_only_dropped_demos_need_no_model(pruner: Any) -> None:
    student = s.program([dspy.Example(question="alone"), dspy.Example(answer="alone")])
    one = pruner()
    with dspy.context(lm=s.Scripted(RIGHT)) as _:
        pruned = one.compile(student, trainset=SOME, valset=FEW)
    assert pruned.demos == []
    assert one.report.artifact is None
    assert "no model was asked" in str(one.report)


def test_loaded_demos_are_dictionaries(pruner: Any, tmp_path: Path) -> None:
    s.program().save(tmp_path / "program.json")
    loaded = dspy.Predict("question -> answer")
    loaded.load(tmp_path / "program.json")
    assert all(type(d) is dict for d in loaded.demos)
    assert [demo_hash(d) for d in loaded.demos] == [demo_hash(d) for d in s.DEMOS]
    one = pruner()
    with dspy.context(lm=s.Scripted(RIGHT)):
        pruned = one.compile(loaded, trainset=SOME, valset=FEW)
        assert pruned(question="q5").answer == "a5"


# --- what is sent -----------------------------------------------------------------------------------------


def adapters() -> dict[str, Any]:
    from dspy.adapters.baml_adapter import BAMLAdapter
    from dspy.adapters.xml_adapter import XMLAdapter

    return {
        "none": None,
        "chat": dspy.ChatAdapter(),
        "json": dspy.JSONAdapter(),
        "xml": XMLAdapter(),
        "baml": BAMLAdapter(),
        "two": dspy.TwoStepAdapter(s.Scripted(lambda m: s.chat(answer="a7"), "scripted/extract")),
    }


@pytest.mark.parametrize("name", ["none", "chat", "json", "xml", "baml", "two"])
@pytest.mark.parametrize("reasoned", [False, True])
def test_what_is_measured_is_what_is_sent(name: str, reasoned: bool) -> None:
    student = dspy.ChainOfThought("question -> answer") if reasoned else s.program()
    student.predictors()[0].demos = [*s.DEMOS, dspy.Example(question="x", reasoning="y", answer="{z}")]
    lm = s.Scripted(lambda m: "nothing of use")
    with dspy.context(lm=lm, adapter=adapters()[name]):
        made, call = students(student)
        for kept in (call.kept, call.kept[1::2], ()):
            rendered = made.renderings.render(Call(kept, call.query))
            lm.seen.clear()
            run(made.target(), rendered)
            assert [(t.role, t.content) for t in rendered] == [
                (m["role"], m["content"]) for m in lm.seen[0][0]
            ]
            assert len(rendered) == 2 + 2 * len(kept)


def test_the_extraction_model_of_an_adapter_is_asked_without_cache_too() -> None:
    adapter = adapters()["two"]
    with dspy.context(lm=s.Scripted(lambda m: "seven"), adapter=adapter):
        made, call = students(s.program())
        result = run(made.target(), made.renderings.render(call))
    assert json.loads(result.text)["fields"] == {"answer": "a7"}
    assert [cache for _, cache in adapter.extraction_model.seen] == [False]
    assert adapter.extraction_model.cache


# --- models, threads, usage ---------------------------------------------------------------------------------


def test_a_predictors_own_model_beats_the_context_so_proxies_are_set_on_it() -> None:
    own, context, proxy = (s.Scripted(RIGHT, f"scripted/{n}") for n in ("own", "context", "proxy"))
    student = s.program()
    student.lm = own
    with dspy.context(lm=context):
        made, call = students(student)
        rendered = made.renderings.render(call)
        run(made.target(), rendered)
        assert (len(own.seen), len(context.seen)) == (1, 0)
        run(made.proxy(proxy), rendered)
    assert (len(own.seen), len(context.seen), len(proxy.seen)) == (1, 0, 1)
    assert student.lm is own


def test_threads_see_the_settings_of_the_caller(pruner: Any) -> None:
    seen: list[tuple[str, str]] = []

    class Curious(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            seen.append((type(dspy.settings.adapter).__name__, threading.current_thread().name))
            return self.step(question=question)

    student = Curious()
    student.step.demos = list(s.DEMOS)
    with dspy.context(lm=s.Scripted(RIGHT), adapter=type("Mine", (dspy.ChatAdapter,), {})()):
        pruner().compile(student, trainset=SOME, valset=FEW)
    assert {name for name, _ in seen} == {"Mine"}
    assert not any("MainThread" in thread for _, thread in seen)


def test_secrets_stay_out_of_identities() -> None:
    lm = dspy.LM(
        "openai/m",
        api_key="canary-1",
        api_base="http://user:canary-2@127.0.0.1:1/v1?token=canary-3",
        extra_headers={"Authorization": "Bearer canary-4"},
        max_tokens=17,
    )
    with dspy.context(lm=lm):
        made, _ = students(s.program())
        text = json.dumps(made.target().identity)
    assert "canary" not in text
    assert lm_identity(lm)["kwargs"]["max_tokens"] == 17
    assert made.target().identity["base_url"] == "http://127.0.0.1:1/v1"
    other = dspy.LM("openai/m", api_key="another", api_base="http://127.0.0.1:1/v1", max_tokens=18)
    assert lm_identity(other) != lm_identity(lm)
    mine = s.Scripted(RIGHT)
    before = lm_identity(mine)
    mine.persona = "a pirate"
    assert lm_identity(mine) != before  # what a class of one's own keeps is part of it


def test_a_changed_program_is_another_model() -> None:
    with dspy.context(lm=s.Scripted(RIGHT)):
        one, _ = students(s.program())
        changed = s.program()
        changed.signature = changed.signature.with_instructions("Answer in one word.")
        two, _ = students(changed)
        three, _ = students(two_program())
    assert one.target().identity != two.target().identity
    assert three.target().identity["program"]["modules"][0]["source"]  # the code of one's own modules


# --- predictions as text ------------------------------------------------------------------------------------


class City(pydantic.BaseModel):
    name: str
    people: tuple[int, int]


def test_predictions_come_back_as_what_they_were() -> None:
    codec = Codec({"city": [str, City], "pair": [tuple[int, int]], "kind": [Literal["a", "b"]]})
    made = dspy.Prediction(
        city=City(name="Ulm", people=(1, 2)),
        pair=(3, 4),
        kind="a",
        text="{x}\n\u2028",
        none=None,
        odd=[1.5, {"k": True}],
    )
    back = codec.decode(codec.encode(made))
    assert dict(back.items()) == dict(made.items())
    assert type(back.city) is City
    with pytest.raises(InputError, match=r"the field 'other'.*a City, does not come back"):
        codec.encode(dspy.Prediction(other=City(name="x", people=(0, 0))))
    with pytest.raises(InputError, match=r"returned str; a dspy\.Prediction is needed"):
        codec.encode("text")


# --- save, load, apply ----------------------------------------------------------------------------------------


def test_the_pruned_program_and_its_report_survive_the_disk(pruner: Any, tmp_path: Path) -> None:
    one = pruner()
    student = s.program()
    with dspy.context(lm=s.Scripted(RIGHT)):
        pruned = one.compile(student, trainset=s.TRAIN[:20], valset=s.VAL[:80])
    assert one.report.certified
    assert one.report.n_after < one.report.n_before == 4
    pruned.save(tmp_path / "pruned.json")
    again = dspy.Predict("question -> answer")
    again.load(tmp_path / "pruned.json")
    assert [dict(d) for d in again.demos] == [dict(d) for d in pruned.demos]
    pruned.save(tmp_path / "whole", save_program=True)
    one.report.save(tmp_path / "report.json")
    assert stat.S_IMODE(os.stat(tmp_path / "report.json").st_mode) == 0o600
    read = PruneReport.load(tmp_path / "report.json")
    assert read.predictors == one.report.predictors
    assert read.artifact.prompt == one.report.artifact.prompt
    assert read.artifact.kept == one.report.artifact.kept
    assert str(read) == str(one.report)
    applied = apply(student, tmp_path / "report.json")
    assert [dict(d) for d in applied.demos] == [dict(d) for d in pruned.demos]
    assert len(student.demos) == 4
    with pytest.raises(ArtifactError, match="'self' has 3 demos, the report was made for 4"):
        apply(s.program(s.DEMOS[:3]), read)
    with pytest.raises(ArtifactError, match="3 are at their place unchanged"):
        apply(s.program([*s.DEMOS[:3], dspy.Example(question="demo 3", answer="changed")]), read)
    with pytest.raises(ArtifactError, match="no predictor 'self'; it has rewrite, answer"):
        apply(two_program(), read)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(kind="other"),
        lambda b: b.update(schema=99),
        lambda b: b.pop("predictors"),
        lambda b: b["predictors"][0].update(order=[0, 0]),
        lambda b: b["predictors"][0]["demos"].pop(),
        lambda b: b["artifact"].update(schema=99),
    ],
)
def test_a_report_that_is_none_is_refused(pruner: Any, tmp_path: Path, change: Any) -> None:
    one = pruner()
    with dspy.context(lm=s.Scripted(RIGHT)):
        one.compile(s.program(), trainset=SOME, valset=FEW)
    body = json.loads(one.report.to_json())
    change(body)
    (tmp_path / "r.json").write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match=r"r\.json: "):
        PruneReport.load(tmp_path / "r.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        PruneReport.load(tmp_path / "none.json")


# --- after and among other optimizers -------------------------------------------------------------------------


def test_after_labeled_and_bootstrap_few_shot(pruner: Any) -> None:
    lm = s.Scripted(RIGHT)
    with dspy.context(lm=lm):
        for optimizer in (
            dspy.LabeledFewShot(k=3),
            dspy.BootstrapFewShot(metric=s.right, max_bootstrapped_demos=2, max_labeled_demos=3),
        ):
            more = {} if isinstance(optimizer, dspy.LabeledFewShot) else {"teacher": None}
            compiled = optimizer.compile(dspy.Predict("question -> answer"), trainset=SOME, **more)
            one = pruner()
            pruned = one.compile(compiled, trainset=SOME, valset=FEW)
            assert one.report.n_before == 3
            assert len(pruned.demos) <= 3
            assert any("3 examples of trainset are demos" in n for n in one.report.notes)


def test_after_mipro(pruner: Any) -> None:
    """The real optimizer, with a model that obliges whatever its proposer asks."""
    lm = s.Scripted(s.obliging)
    with dspy.context(lm=lm):
        mipro = dspy.MIPROv2(
            metric=s.right,
            prompt_model=lm,
            task_model=lm,
            auto=None,
            num_candidates=2,
            max_bootstrapped_demos=2,
            max_labeled_demos=2,
            num_threads=1,
            verbose=False,
        )
        compiled = mipro.compile(
            dspy.Predict("question -> answer"),
            trainset=s.TRAIN[:20],
            valset=s.TRAIN[20:26],
            num_trials=2,
            minibatch=False,
            **({"requires_permission_to_run": False} if dspy.__version__ < "3.1" else {}),
        )
        if not compiled.demos:  # among equals the search may prefer the program without
            compiled.demos = compiled.candidate_programs[-1]["program"].demos or list(s.TRAIN[:2])
        one = pruner()
        pruned = one.compile(compiled, trainset=s.TRAIN[:26], valset=FEW)
    assert one.report.n_before == len(compiled.demos) > 0
    assert pruned.signature.instructions == compiled.signature.instructions


def test_better_together_keeps_the_earlier_of_equals(pruner: Any) -> None:
    """Why the pruner runs last, outside: a smaller program with the same score loses."""
    student = s.program([])
    student.set_lm(s.Scripted(RIGHT))
    boot = dspy.LabeledFewShot(k=4)
    one = pruner()
    version = tuple(map(int, dspy.__version__.split(".")[:2]))
    if version < (3, 2):  # takes two fixed optimizers only
        with pytest.raises(TypeError):
            dspy.BetterTogether(metric=s.right, boot=boot, prune=one)
        return
    both = dspy.BetterTogether(metric=s.right, boot=boot, prune=one)
    made = both.compile(
        student,
        trainset=SOME,
        valset=s.VAL[:80],
        strategy="boot -> prune",
        shuffle_trainset_between_steps=False,
    )
    assert one.report.n_after < 4
    assert len(made.demos) == 0  # not even the demos: the empty program scores the same
