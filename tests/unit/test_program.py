"""Prompts that a program renders, and the program as a model."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from proxyprompt import (
    Demonstration,
    LabelTask,
    PromptValueFunction,
    Query,
    Settings,
    Splits,
    TextTask,
    build_artifact,
    optimize_prompt,
)
from proxyprompt.backends.base import GenerateRequest, GenerateResult, Message, ScoreResult, Usage
from proxyprompt.errors import BackendError, InputError
from proxyprompt.metering import Meter
from proxyprompt.program import Call, ProgramBackend, ProgramPrompt, Renderings, ScoringProgramBackend

DEMOS = tuple(Demonstration(f"d{i}", {"input": f"in {i}"}, "yes" if i % 2 else "no") for i in range(4))


def render(call: Call) -> tuple[Message, ...]:
    shown = " ".join(call.kept)
    return (Message("system", shown), Message("user", call.query.inputs["input"]))


def query(i: int, reference: str = "yes") -> Query:
    return Query(f"q{i}", {"input": f"query {i}"}, reference)


def test_a_coalition_is_rendered_by_the_program_in_the_order_of_the_prompt() -> None:
    prompt = ProgramPrompt(DEMOS, renderings=Renderings(render))
    assert prompt.render([True, False, True, False], query(0))[0] == Message("system", "d0 d2")
    assert prompt.reorder(["d3", "d0"]).render(None, query(0))[0] == Message("system", "d3 d0")
    assert prompt.subset([False, True, True, False]).render([True, False], query(0))[0].content == "d1"


def test_what_was_not_rendered_is_not_sent() -> None:
    backend = ProgramBackend("p", {}, Renderings(render), generate=lambda c, r: GenerateResult("x"))
    with pytest.raises(InputError, match="not rendered by the program"):
        backend.generate([GenerateRequest("made up")])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="renderings"):
        ProgramPrompt(DEMOS)
    prompt = ProgramPrompt(DEMOS, renderings=Renderings(render))
    with pytest.raises(InputError, match="instruction"):
        prompt.render(None, query(0), instruction="new")
    with pytest.raises(InputError, match="3 entries for 4"):
        prompt.render([True] * 3, query(0))
    with pytest.raises(InputError, match="concurrency: got 0"):
        ProgramBackend("p", {}, Renderings(render), generate=lambda c, r: GenerateResult("x"), concurrency=0)


def test_runs_are_bounded_and_a_failure_still_delivers_what_is_paid() -> None:
    renderings = Renderings(render)
    prompt = ProgramPrompt(DEMOS, renderings=renderings)
    busy, most, lock = [0], [0], threading.Lock()
    barrier = threading.Barrier(3)

    def generate(call: Call, request: GenerateRequest) -> GenerateResult:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        if call.query.id in ("q0", "q1", "q2"):
            barrier.wait(10)
        with lock:
            busy[0] -= 1
        if call.query.id == "q5":
            raise BackendError("the program broke")
        return GenerateResult(call.query.id, Usage(3, 1))

    backend = ProgramBackend("p", {}, renderings, generate=generate, concurrency=3)
    sent: list[int] = []
    got: dict[int, str | None] = {}
    requests = [GenerateRequest(prompt.render(None, query(i))) for i in range(20)]

    def consume() -> None:
        for block in backend.generate(requests, on_send=sent.extend):
            got.update({i: r.text for i, r in block})

    with pytest.raises(BackendError, match="the program broke"):
        consume()
    assert most[0] == 3
    assert len(sent) < 20
    assert set(got) == set(sent) - {5}
    assert all(text == f"q{i}" for i, text in got.items())


def test_the_whole_path_with_a_program_as_target(tmp_path: object) -> None:
    """A program that is right unless it sees d1: cleaning finds it; nothing else needs to stay."""
    rng = np.random.default_rng(0)
    renderings = Renderings(render)
    prompt = ProgramPrompt(DEMOS, renderings=renderings)
    luck = {f"q{i}": rng.random() for i in range(400)}

    def score(call: Call, request: object) -> ScoreResult:
        harmed = "d1" in call.kept and luck[call.query.id] < 0.5
        right = call.query.reference
        answers = ["yes", "no"]
        shown = right if not harmed else answers[1 - answers.index(right)]
        return ScoreResult(tuple(-0.1 if a == shown else -2.4 for a in answers), (False, False), Usage(5, 1))

    target = ScoringProgramBackend(
        "program", {"v": 1}, renderings, generate=lambda c, r: GenerateResult(None), score=score
    )
    queries = [query(i, "yes" if i % 2 else "no") for i in range(400)]
    splits = Splits({"explain": queries[:60], "select": queries[60:200], "sealed": queries[200:]})
    result = optimize_prompt(
        prompt,
        LabelTask(("yes", "no")),
        splits,
        target=target,
        settings=Settings(keep_labels=False, relabel="off", clean_prior="off"),
        ledger=f"{tmp_path}/ledger.db",
    )
    assert isinstance(result.prompt, ProgramPrompt)
    assert "d1" not in [d.id for d in result.prompt.demonstrations]
    assert build_artifact(result).certified


def test_a_binary_metric_of_the_user_takes_the_exact_test() -> None:
    def metric(output: str, references: object) -> float:
        return {"good": 1.0, "half": 0.5}.get(output, 0.0)

    task = TextTask(metric, binary=True)
    assert task.right_or_wrong
    assert not TextTask(metric).right_or_wrong
    with pytest.raises(InputError, match=r"returned 0\.5; with binary=True"):
        task.score(["half"], [("x",)])
    with pytest.raises(InputError, match="binary"):
        TextTask("token_f1", binary=True)
    renderings = Renderings(render)
    backend = ProgramBackend("p", {}, renderings, generate=lambda c, r: GenerateResult("good"))
    function = PromptValueFunction(
        replace(ProgramPrompt(DEMOS, renderings=renderings)),
        task,
        [query(0)],
        Meter(backend, None, role="target", run="r"),
    )
    assert function(np.ones((1, 4), dtype=bool)).tolist() == [[1.0]]
