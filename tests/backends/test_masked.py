"""The approximate mode: demonstrations read once, hidden by masks; against forwards with masks written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from proxyprompt import Demonstration, FewShotPrompt, LabelTask, PromptValueFunction, Query, open_model
from proxyprompt.backends.base import GenerateRequest, Message, ScoreRequest, ScoreResult, UnitMask
from proxyprompt.backends.transformers import TransformersBackend
from proxyprompt.backends.transformers.threads import import_torch, use_threads
from proxyprompt.coalitions import uniform_coalitions
from proxyprompt.errors import BackendError, InputError, ModelSpecError
from proxyprompt.ledger import Ledger, request_key
from proxyprompt.metering import Meter

from .contract import in_order
from .test_transformers import write_model, write_tokenizer

TOLERANCE = 1e-4
LABELS = ("positive", "negative")
REVIEWS = ("a warm film", "a dull slow film", "films", "a funny, warm, slow and dull film", "film")
PROMPT = FewShotPrompt(
    tuple(Demonstration(f"d{i}", {"input": text}, LABELS[i % 2]) for i, text in enumerate(REVIEWS)),
    instruction="Is it good?",
    demonstration_template="Review: {input}\nSentiment: {output}",
)
QUERIES = (Query("q0", {"input": "a funny film"}, "positive"), Query("q1", {"input": "dull"}, "negative"))
TASK = LabelTask(LABELS)
COALITIONS = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=bool)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with use_threads(import_torch(), 1):
        yield


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"tiny-{request.param}")
    write_model(folder, request.param)
    write_tokenizer(folder)
    return folder


def masked(folder, **options):
    return TransformersBackend(folder, threads=1, approximate=True, name="tiny", **options)


def requests(coalitions=COALITIONS):
    candidates = tuple(PROMPT.candidate(label) for label in LABELS)
    return [
        ScoreRequest(PROMPT.render(None, query), candidates, PROMPT.unit_mask(row))
        for row in coalitions.tolist()
        for query in QUERIES
    ]


def by_definition(folder, request):
    """First-token log-probabilities of a forward of the whole prompt under masks made here, from scratch."""
    torch = import_torch()
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(str(folder))
    encoded = tokenizer(request.prompt, return_offsets_mapping=True)
    ids, ends = encoded.input_ids, [end for _, end in encoded.offset_mapping]
    n = len(ids)
    query = request.mask.spans[-1][1]
    hidden = [
        any(
            begin < at <= end
            for (begin, end), kept in zip(request.mask.spans, request.mask.kept, strict=True)
            if not kept
        )
        for at in ends
    ]

    def mask(window):
        rows = torch.full((n, n), -torch.inf)
        for i in range(n):
            for j in range(i + 1):
                if i - j < window and not (hidden[j] and ends[i] > query):
                    rows[i, j] = 0.0
        return rows[None, None]

    every = mask(n)
    window = getattr(model.config, "sliding_window", None)
    if model.config.model_type == "gemma3_text":
        every = {"full_attention": every, "sliding_attention": mask(window)}
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), attention_mask=every, use_cache=False).logits[0, -1]
    logprobs = logits.log_softmax(-1)
    return [float(logprobs[tokenizer(c).input_ids[0]]) for c in request.candidates]


def test_values_are_those_of_a_forward_that_hides_the_units_from_what_follows_them(folder):
    asked = [replace(request, candidates=(" film", " dull")) for request in requests()]
    results = in_order(masked(folder).score(asked), len(asked))
    for request, result in zip(asked, results, strict=True):
        # The reference takes a candidate's first token; both of these are one.
        assert result.logprobs == pytest.approx(by_definition(folder, request), abs=TOLERANCE)


def test_with_everything_kept_it_is_the_exact_engine_and_else_it_is_not(folder):
    rows = uniform_coalitions(5, 24, rng=np.random.default_rng(0))
    rows = np.concatenate([COALITIONS[:1], rows[~rows.all(axis=1)]])
    exact, other = (
        PromptValueFunction(PROMPT, TASK, QUERIES, Meter(backend, None, role="proxy", run="r")).evaluate(rows)
        for backend in (TransformersBackend(folder, threads=1), masked(folder))
    )
    assert other.utility[0] == pytest.approx(exact.utility[0], abs=TOLERANCE)
    difference = np.abs(other.utility[1:] - exact.utility[1:])
    assert difference.max() > 0.01
    assert np.isfinite(other.utility).all()
    assert (other.prompt_tokens[0] == exact.prompt_tokens[0]).all()
    assert (other.prompt_tokens[1:] < exact.prompt_tokens[0]).all()


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64])
def test_how_the_work_is_cut_changes_nothing(folder, max_batch_tokens):
    asked = requests()
    whole = in_order(masked(folder).score(asked), len(asked))
    cut = in_order(masked(folder, max_batch_tokens=max_batch_tokens).score(asked[::-1]), len(asked))[::-1]
    for one, other in zip(whole, cut, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
        assert one.usage == other.usage


def test_demonstrations_are_computed_once_and_queries_once_per_coalition(folder):
    backend = masked(folder)
    once = backend.plan(requests(COALITIONS[:1])).distinct_tokens
    branch = backend.plan(requests(COALITIONS[:2])).distinct_tokens - once
    counted: list[int] = []
    asked = requests()
    plan = backend.plan(asked)
    assert plan.distinct_tokens == once + (len(COALITIONS) - 1) * branch
    assert branch < once / 3
    assert len(in_order(backend.score(asked, on_tokens=counted.append), len(asked))) == len(asked)
    assert sum(counted) == plan.distinct_tokens
    assert plan.distinct_tokens < TransformersBackend(folder).plan(rendered()).naive_tokens


def rendered():
    candidates = tuple(PROMPT.candidate(label) for label in LABELS)
    return [ScoreRequest(PROMPT.render(row, q), candidates) for row in COALITIONS.tolist() for q in QUERIES]


def test_prompts_with_different_demonstrations_in_one_batch_stay_apart(folder):
    other = replace(PROMPT, demonstrations=PROMPT.demonstrations[::-1])
    candidates = tuple(PROMPT.candidate(label) for label in LABELS)
    asked = [
        *requests(),
        ScoreRequest(other.render(None, QUERIES[0]), candidates, other.unit_mask([True] * 5)),
    ]
    together = in_order(masked(folder).score(asked), len(asked))
    (alone,) = in_order(masked(folder).score(asked[-1:]), 1)
    assert together[-1].logprobs == pytest.approx(alone.logprobs, abs=TOLERANCE)


def test_spans_leave_what_rendering_the_coalition_leaves():
    for prompt in (PROMPT, replace(PROMPT, instruction=""), replace(PROMPT, separator="")):
        for row in COALITIONS.tolist():
            text, mask = prompt.render(None, QUERIES[0]), prompt.unit_mask(row)
            for (begin, end), kept in reversed(list(zip(mask.spans, mask.kept, strict=True))):
                text = text if kept else text[:begin] + text[end:]
            assert text == prompt.render(row, QUERIES[0])


def test_it_is_another_model_by_name_identity_and_ledger_key(folder, tmp_path):
    exact, other = TransformersBackend(folder, threads=1, name="tiny"), masked(folder)
    assert (exact.name, other.name) == ("tiny", "tiny~masked")
    assert "approximate" not in exact.identity
    assert {**exact.identity, "approximate": other.identity["approximate"]} == other.identity
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for backend in (exact, other):
            meter = Meter(backend, ledger, role="proxy", run="r")
            PromptValueFunction(PROMPT, TASK, QUERIES, meter).evaluate(COALITIONS)
            assert meter.stats.bought == COALITIONS.shape[0] * len(QUERIES)
        again = Meter(masked(folder), ledger, role="proxy", run="r")
        PromptValueFunction(PROMPT, TASK, QUERIES, again).evaluate(COALITIONS)
        assert again.stats.bought == 0


def test_masks_enter_the_key_and_their_absence_leaves_older_keys_as_they_were():
    def key(mask):
        return request_key({"model": "m"}, "score", ScoreRequest("a b c", (" d",), mask), {})

    assert key(None) == "b621aee71c99f05076e1bae5133c1103d8460acebd5cf0d2632778e7f77c68c0"
    keys = {key(None), key(UnitMask(((0, 1),), (True,))), key(UnitMask(((0, 1),), (False,)))}
    assert len(keys) == 3


def test_the_option_is_read_from_model_tables(folder):
    backend = open_model(f"hf:{folder}", options={"approximate": True})
    assert backend.name.endswith("~masked")
    with pytest.raises(ModelSpecError, match="approximate: 'yes' is neither true nor false"):
        open_model(f"hf:{folder}", options={"approximate": "yes"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "mask is missing.*has to know the prompt's units"),
        ({"prompt": (Message("user", "x"),)}, "list of chat turns"),
        ({"mask": UnitMask(((0, 9),), (True, False))}, "1 spans and 2 marks"),
        ({"mask": UnitMask((), ())}, "0 spans and 0 marks"),
        ({"mask": UnitMask(((5, 9), (0, 4)), (True, True))}, "in order"),
        ({"mask": UnitMask(((0, 999),), (True,))}, "inside the prompt"),
    ],
)
def test_requests_it_cannot_answer_are_refused(folder, change, message):
    backend = masked(folder)
    if "prompt" in change:
        backend._tokenizer.template = lambda turns: "x y"
    with pytest.raises(InputError, match=message):
        backend.score([replace(requests()[0], **change)])


def test_a_prompt_without_a_query_is_refused(folder):
    asked = requests()[0]
    end = len(asked.prompt)
    with pytest.raises(InputError, match="nothing of the prompt stands behind"):
        masked(folder).score([replace(asked, mask=UnitMask(((0, end),), (True,)))])


def test_chat_prompts_and_generation_are_refused(folder):
    with pytest.raises(InputError, match="cannot be hidden"):
        replace(PROMPT, style="chat").unit_mask([True] * 5)
    with pytest.raises(InputError, match="writes no text"):
        masked(folder).generate([GenerateRequest("a film", 2)])


def test_a_model_whose_attention_is_not_ours_is_refused(tmp_path):
    write_model(tmp_path, "gemma2")
    write_tokenizer(tmp_path)
    with pytest.raises(BackendError, match=r"attention of tiny~masked cannot be masked"):
        list(masked(tmp_path).score(requests()))


def test_nobody_else_is_sent_a_mask(folder):
    class Other:
        name = "other"
        identity = {"model": "other"}  # noqa: RUF012

        def score(self, requests, **_):
            yield [(i, ScoreResult((-1.0, -2.0))) for i in range(len(requests))]

    with pytest.raises(InputError, match="'other' cannot hide units"):
        Meter(Other(), None, role="proxy", run="r").score(requests(), stage="s")
    with pytest.raises(InputError, match="only the approximate mode hides units"):
        TransformersBackend(folder).score(requests())


def test_an_empty_batch_is_no_work(folder):
    assert list(masked(folder).score([])) == []
    assert masked(folder).plan([]).distinct_tokens == 0
