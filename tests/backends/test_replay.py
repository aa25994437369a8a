from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyprompt.backends.base import (
    GenerateRequest,
    GenerateResult,
    Message,
    ScoreRequest,
    ScoreResult,
    Usage,
)
from proxyprompt.backends.replay import (
    ReplayBackend,
    leave_one_out_recordings,
    load_leave_one_out,
    write_recordings,
)
from proxyprompt.errors import BackendError, DataError, InputError, RecordingMissingError

from .contract import GeneratorContract, ScorerContract, in_order

LABELS = (" a", " b", " c")
CHAT = (Message("system", "be brief"), Message("user", "why?"))
SCORED: dict[str, Any] = {"prompt": "p", "candidates": ["x", "y"], "logprobs": [-1, -2.5]}
TEXT: dict[str, Any] = {"prompt": "p", "max_tokens": 4, "text": "t"}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


class TestContract(ScorerContract, GeneratorContract):
    @pytest.fixture
    def score_requests(self) -> list[ScoreRequest]:
        return [ScoreRequest(f"question {k}", LABELS) for k in range(70)]

    @pytest.fixture
    def generate_requests(self) -> list[GenerateRequest]:
        return [GenerateRequest(f"question {k}", stop=("\n",)) for k in range(70)]

    @pytest.fixture
    def backend(
        self, tmp_path: Path, score_requests: list[ScoreRequest], generate_requests: list[GenerateRequest]
    ) -> ReplayBackend:
        scores = [(r, ScoreResult((-1.0, -2.0, None), (False, True, False))) for r in score_requests]
        texts = [(r, GenerateResult("fine", Usage(3, 1))) for r in generate_requests]
        write_recordings(tmp_path / "all.jsonl", [*scores, *texts])
        return ReplayBackend(tmp_path / "all.jsonl")


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_what_is_written_is_served(tmp_path: Path, name: str) -> None:
    scored = ScoreResult((-0.25, None), (True, False), Usage(7, 1, 5), model_returned="m-1")
    told = GenerateResult("line one\u2028two \N{SNOWMAN}", Usage(7, 3), model_returned="m-1")
    score, generate = ScoreRequest(CHAT, (" yes", " no")), GenerateRequest("p", 9, ("\n", "Q:"))
    assert write_recordings(tmp_path / name, [(score, scored), (generate, told)]) == 2
    backend = ReplayBackend(str(tmp_path / name), model="m-1")
    assert in_order(backend.score([score]), 1) == [scored]
    assert in_order(backend.generate([generate]), 1) == [told]
    assert len(backend) == 2
    assert backend.name == f"replay:{name}"
    assert "recordings=2" in repr(backend)


texts = st.text(max_size=12)
logprobs = st.one_of(st.none(), st.floats(-1e6, 0), st.just(-math.inf))


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.one_of(
        texts,
        st.lists(
            st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts),
            min_size=1,
            max_size=3,
        ).map(tuple),
    ),
    table=st.dictionaries(st.text(min_size=1, max_size=5), logprobs, min_size=1, max_size=4),
)
def test_any_request_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, prompt: Any, table: dict[str, float | None]
) -> None:
    path = tmp_path_factory.mktemp("any") / "r.jsonl"
    request = ScoreRequest(prompt, tuple(table))
    result = ScoreResult(tuple(table.values()), (False,) * len(table))
    write_recordings(path, [(request, result)])
    assert in_order(ReplayBackend(path).score([request]), 1) == [result]


def test_file_is_private_reproducible_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl.gz"
    path.write_text("old")
    path.chmod(0o644)
    pair = (ScoreRequest("p", ("a",)), ScoreResult((-1.0,), (False,)))
    old_mask = os.umask(0)
    try:
        write_recordings(path, [pair])
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = path.read_bytes()
    write_recordings(path, [pair])
    assert path.read_bytes() == first
    assert first[4:8] == bytes(4)  # no time of writing
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.jsonl.gz"]


def test_how_values_were_got_is_recorded(tmp_path: Path) -> None:
    request = ScoreRequest("p", ("a", "b"))
    counted = ScoreResult((-0.5, None), (True, True), evidence="texts", samples=7)
    write_recordings(tmp_path / "r.jsonl", [(request, counted)])
    [[(_, result)]] = ReplayBackend(tmp_path / "r.jsonl").score([request])
    assert (result.evidence, result.samples, result.logprobs) == ("texts", 7, (-0.5, None))
    line = '{"prompt": "p", "candidates": ["a"], "logprobs": [null], "evidence": "guess"}'
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(DataError, match="evidence='guess' must be"):
        ReplayBackend(tmp_path / "bad.jsonl").score([request])


def test_a_failed_call_is_not_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(InputError, match="error='down' cannot be recorded"):
        write_recordings(path, [(ScoreRequest("p", ("a",)), ScoreResult((None,), (False,), error="down"))])
    with pytest.raises(InputError, match="ScoreRequest was paired with a GenerateResult"):
        write_recordings(path, [(ScoreRequest("p", ("a",)), GenerateResult("t"))])  # type: ignore[list-item]
    assert not path.exists()


def test_identity_is_the_file_and_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", SCORED | {"model": "m"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert ReplayBackend(path).identity == {"provider": "replay", "sha256": digest, "model": None}
    assert ReplayBackend(path, model="m", name="mine").identity["model"] == "m"
    assert ReplayBackend(path, name="mine").name == "mine"


def test_order_and_supersets_of_candidates(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.jsonl",
        {"prompt": "p", "candidates": list("abcd"), "logprobs": [-1, -2, -3, None], "censored": [False] * 4},
        {
            "prompt": "p",
            "candidates": list("abc"),
            "logprobs": [-4, -5, -6],
            "censored": [False, True, False],
        },
        {"prompt": "p", "candidates": list("xab"), "logprobs": [-7, -8, -9]},
    )
    backend = ReplayBackend(path)
    wanted = [("c", "b", "a"), ("b", "a"), ("d",), ("b", "x")]
    results = in_order(backend.score([ScoreRequest("p", each) for each in wanted]), 4)
    assert [r.logprobs for r in results] == [(-6.0, -5.0, -4.0), (-5.0, -4.0), (None,), (-9.0, -7.0)]
    assert results[0].censored == (False, True, False)


def test_missing_score_names_the_request(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", SCORED)
    backend = ReplayBackend(path)
    blocks = backend.score(
        [ScoreRequest("p", ("y",)), ScoreRequest("s" * 99 + "end", ("x", "z")), ScoreRequest("p", ("x",))]
    )
    assert [index for index, _ in next(blocks)] == [0]
    with pytest.raises(RecordingMissingError) as caught:
        next(blocks)
    message = str(caught.value)
    assert isinstance(caught.value, BackendError)
    assert "s" * 77 + "end" in message
    assert "s" * 78 not in message
    assert "['x', 'z']" in message
    assert str(path) in message
    assert "holds 1 recordings" in message


def test_missing_text_names_the_request(tmp_path: Path) -> None:
    backend = ReplayBackend(write(tmp_path / "r.jsonl", TEXT | {"model": "m"}), model="m")
    for request in (GenerateRequest(CHAT, 4), GenerateRequest("p", 5), GenerateRequest("p", 4, (".",))):
        with pytest.raises(
            RecordingMissingError, match=f"max_tokens={request.max_tokens}, stop=.*of model 'm'"
        ):
            list(backend.generate([request]))
    with pytest.raises(RecordingMissingError, match=r"\(2 chat turns\) that ends in 'why\?'"):
        list(backend.generate([GenerateRequest(CHAT, 4)]))


def test_models_are_kept_apart(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.jsonl", SCORED | {"model": "m1"}, SCORED | {"model": "m2", "logprobs": [-3, -4]}
    )
    assert in_order(ReplayBackend(path, model="m2").score([ScoreRequest("p", ("x", "y"))]), 1)[
        0
    ].logprobs == (-3, -4)
    with pytest.raises(InputError, match="several models: 'm1', 'm2'"):
        ReplayBackend(path)
    with pytest.raises(InputError, match="model='m3' is not in"):
        ReplayBackend(path, model="m3")


def test_the_same_line_twice_is_one_recording(tmp_path: Path) -> None:
    turned = {"prompt": "p", "candidates": ["y", "x"], "logprobs": [-2.5, -1]}
    assert len(ReplayBackend(write(tmp_path / "r.jsonl", SCORED, "", SCORED, turned, TEXT, TEXT))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object with a prompt"),
        ({"text": "t"}, "must be a JSON object with a prompt"),
        (SCORED | {"promt": 1}, "unknown key 'promt'; known here are candidates, censored"),
        (TEXT | {"censored": []}, "unknown key 'censored'; known here are max_tokens, model"),
        (SCORED | {"prompt": 3}, "prompt=3 must be text or a list of chat turns"),
        (SCORED | {"prompt": []}, r"prompt=\[\] must be text or a list"),
        (SCORED | {"prompt": [{"role": "tool", "content": "x"}]}, "must have a role"),
        (SCORED | {"prompt": [{"role": "user", "content": None}]}, "must have a role"),
        (SCORED | {"prompt": [{"role": "user", "content": "x", "name": 3}]}, "must have a role"),
        (SCORED | {"candidates": []}, r"candidates=\[\] must be a list of one or more"),
        (SCORED | {"candidates": ["x", "x"]}, "must differ"),
        (SCORED | {"candidates": ["x", ""]}, "one or more texts"),
        (SCORED | {"logprobs": [-1]}, "must be a list of 2"),
        ({"prompt": "p", "candidates": ["x"]}, "logprobs=None must be a list of 1"),
        (SCORED | {"logprobs": [-1, 0.5]}, "log-probability 0.5"),
        (SCORED | {"logprobs": [-1, True]}, "log-probability True"),
        ('{"prompt": "p", "candidates": ["x"], "logprobs": [NaN]}', "log-probability nan"),
        ('{"prompt": "p", "candidates": ["x"], "logprobs": [-Infinity]}', "log-probability -inf"),
        (SCORED | {"censored": [True]}, "must be a list of 2 true or false"),
        (SCORED | {"censored": [0, 1]}, "must be a list of 2 true or false"),
        (SCORED | {"usage": {"tokens": 1}}, "usage=.* must map prompt_tokens"),
        (SCORED | {"usage": {"prompt_tokens": -1}}, "usage=.* must map prompt_tokens"),
        (SCORED | {"model": 4}, "model=4 must be text"),
        (TEXT | {"max_tokens": 0}, "max_tokens=0 must be an integer of at least 1"),
        ({"prompt": "p", "text": "t"}, "max_tokens=None must be"),
        (TEXT | {"text": None}, "text=None must be text"),
        (TEXT | {"stop": "x"}, "stop='x' must be a list of texts"),
        (SCORED | {"logprobs": [-1, -2]}, "the same request was answered differently on line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "r.jsonl", SCORED, "", line)
    with pytest.raises(DataError, match=rf"r\.jsonl, line 3: .*{message}"):
        ReplayBackend(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read: No such file"):
        ReplayBackend(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="hold no line"):
        ReplayBackend(write(tmp_path / "empty.jsonl"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"{}")[:-4])
    with pytest.raises(DataError, match="not UTF-8 text or gzip"):
        ReplayBackend(tmp_path / "cut.gz")
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="not UTF-8 text or gzip"):
        ReplayBackend(tmp_path / "binary")


CASE = {
    "id": "c1",
    "bench": "boolq",
    "labels": ["yes", "no"],
    "gold": "yes",
    "roles": ["system", "context", "query"],
    "models": {
        "big": {
            "orig": [-0.1, -2.5],
            "loo": [[-0.2, -1.5], [None, -0.01], [-0.7, -0.7]],
            "orig_retest": [-0.11, -2.4],
        },
        "small": {"orig": [-0.5, -1.0], "loo": [[-0.6, -0.9]]},
    },
}


def scores_file(tmp_path: Path, *cases: dict[str, Any], name: str = "scores.jsonl.gz") -> Path:
    path = tmp_path / name
    text = "".join(json.dumps(case) + "\n" for case in cases).encode()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    return path


@pytest.mark.parametrize("name", ["scores.jsonl.gz", "scores.jsonl"])
def test_leave_one_out_scores_are_read(tmp_path: Path, name: str) -> None:
    (case,) = load_leave_one_out(scores_file(tmp_path, CASE, name=name))
    assert (case.labels, case.roles, case.gold) == (("yes", "no"), ("system", "context", "query"), "yes")
    assert case.scores("big").tolist() == [-0.1, -2.5]
    assert case.scores("big", 2).tolist() == [-0.7, -0.7]
    assert math.isnan(case.scores("big", 1)[0])
    assert case.models["big"].retest is not None
    assert case.models["small"].retest is None


def test_a_missing_leave_one_out_score_is_named(tmp_path: Path) -> None:
    (case,) = load_leave_one_out(scores_file(tmp_path, CASE))
    with pytest.raises(RecordingMissingError, match="'small' for case 'c1' without segment 1 of 3"):
        case.scores("small", 1)
    with pytest.raises(RecordingMissingError, match="'other' for case 'c1'") as raised:
        case.scores("other")
    assert "big, small" in (raised.value.hint or "")


def test_leave_one_out_scores_become_recordings(tmp_path: Path) -> None:
    (case,) = load_leave_one_out(scores_file(tmp_path, CASE))
    texts = ("Answer. ", "It rains. ", "Wet?")
    path = tmp_path / "recordings.jsonl"
    pairs = [p for m in ("big", "small") for p in leave_one_out_recordings(case, texts, m, floor=-9.0)]
    assert write_recordings(path, pairs) == 6
    backend = ReplayBackend(path, model="big")
    (result,) = in_order(backend.score([ScoreRequest("Answer. Wet?", ("no", "yes"))]), 1)
    assert result.logprobs == (-0.01, -9.0)
    assert result.censored == (False, True)
    with pytest.raises(RecordingMissingError, match="model 'small'"):
        list(ReplayBackend(path, model="small").score([ScoreRequest("Answer. Wet?", ("yes", "no"))]))


def test_wrong_leave_one_out_files_are_refused(tmp_path: Path) -> None:
    long = CASE | {"models": {"big": CASE["models"]["big"] | {"loo": [[-1.0, -1.0]] * 4}}}  # type: ignore[index]
    wide = CASE | {"models": {"big": {"orig": [-1.0], "loo": []}}}
    for bad, what in ((long, "4 ablations for 3"), (wide, "line 2"), ({"id": "x"}, "line 2")):
        with pytest.raises(DataError, match=what):
            load_leave_one_out(scores_file(tmp_path, CASE, bad))
    with pytest.raises(InputError, match="holds boolq"):
        load_leave_one_out(scores_file(tmp_path, CASE), bench="anli")
    with pytest.raises(DataError, match="cannot be read"):
        load_leave_one_out(tmp_path / "none.jsonl")
    (case,) = load_leave_one_out(scores_file(tmp_path, CASE))
    with pytest.raises(InputError, match="1 for case 'c1', which has 3"):
        list(leave_one_out_recordings(case, ("one",), "big", floor=-9.0))
    with pytest.raises(InputError, match="at most 0"):
        list(leave_one_out_recordings(case, ("a", "b", "c"), "big", floor=1.0))
