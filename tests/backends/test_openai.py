"""The OpenAI backend against a real server (llama.cpp in this process) and against one that misbehaves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from llama import llama_server

from proxyprompt.backends.base import GenerateRequest, Message, ScoreRequest
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.errors import BackendError, InputError
from proxyprompt.ledger import Ledger
from proxyprompt.metering import Meter

from .contract import GeneratorContract, ScorerContract, in_order

KEY = "canary-key-7c1f"
LABELS = (" positive", " negative")
SHOTS = "".join(
    f"Review: {text}\nSentiment: {label}\n\n"
    for text, label in [
        ("a dull film", "negative"),
        ("a great film", "positive"),
        ("I slept through it", "negative"),
        ("a joy from start to end", "positive"),
    ]
)
REVIEWS = ["truly wonderful and moving", "a boring waste of time", "I hated every minute"]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


# --- a real server ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    """Base URL of llama.cpp's server with SmolLM2-135M, one thread."""
    yield from llama_server()


def prompts() -> list[str]:
    return [f"{SHOTS}Review: {review}\nSentiment:" for review in REVIEWS]


class TestContract(ScorerContract, GeneratorContract):
    tolerance = 1e-3

    @pytest.fixture
    def backend(self, llama: str) -> OpenAIBackend:
        return OpenAIBackend("smol", base_url=llama, concurrency=2)

    @pytest.fixture
    def score_requests(self) -> list[ScoreRequest]:
        return [ScoreRequest(prompt, LABELS) for prompt in prompts()]

    @pytest.fixture
    def generate_requests(self) -> list[GenerateRequest]:
        return [GenerateRequest(prompt, max_tokens=4, stop=("\n",)) for prompt in prompts()[:2]]


class TestRealServer:
    def test_label_log_probabilities_are_those_of_a_direct_call(self, llama: str) -> None:
        with openai.OpenAI(base_url=llama, api_key="any") as client:
            backend = OpenAIBackend("smol", client=client)
            [result] = in_order(backend.score([ScoreRequest(prompts()[0], LABELS)]), 1)
            direct = client.completions.create(
                model="smol", prompt=prompts()[0], max_tokens=1, temperature=0, logprobs=20
            )
        top = direct.choices[0].logprobs.content[0]["top_logprobs"]  # type: ignore[union-attr]
        for label, value in zip(LABELS, result.logprobs, strict=True):
            same = [each["logprob"] for each in top if each["token"].strip() == label.strip()]
            assert value == pytest.approx(math.log(sum(map(math.exp, same))), abs=1e-3)
        assert result.censored == (False, False)
        assert sum(map(math.exp, result.logprobs)) > 0.5
        assert backend.capability == "logprobs"
        assert result.model_returned == "smol"

    def test_labels_are_plausible(self, llama: str) -> None:
        requests = [ScoreRequest(prompt, LABELS) for prompt in prompts()]
        results = in_order(OpenAIBackend("smol", base_url=llama).score(requests), 3)
        assert [r.logprobs[0] > r.logprobs[1] for r in results] == [True, False, False]

    def test_usage_counts_tokens_and_the_cached_part(self, llama: str) -> None:
        backend = OpenAIBackend("smol", base_url=llama)
        tokens: list[int] = []
        request = ScoreRequest(prompts()[1], LABELS)
        in_order(backend.score([request], on_tokens=tokens.append), 1)
        [again] = in_order(backend.score([request], on_tokens=tokens.append), 1)
        assert 50 < again.usage.prompt_tokens < 90
        assert 40 < again.usage.cached_tokens < again.usage.prompt_tokens
        assert again.usage.completion_tokens == 1
        assert tokens[1] == again.usage.prompt_tokens + 1

    def test_a_label_outside_the_list_is_bounded_by_its_end(self, llama: str) -> None:
        prompt = prompts()[0]
        whole = in_order(OpenAIBackend("smol", base_url=llama).score([ScoreRequest(prompt, LABELS)]), 1)[0]
        short = OpenAIBackend("smol", base_url=llama, top_logprobs=1)
        [result] = in_order(short.score([ScoreRequest(prompt, (*LABELS, " zebra"))]), 1)
        assert result.censored == (False, True, True)
        assert result.logprobs[0] == pytest.approx(whole.logprobs[0], abs=1e-3)
        assert result.logprobs[1] == result.logprobs[2] == result.logprobs[0]
        assert result.logprobs[1] > whole.logprobs[1]

    def test_chat_turns_and_text_as_one(self, llama: str) -> None:
        question = "Is the review 'a great, moving film' positive or negative? Answer with one word."
        backend = OpenAIBackend("smol", base_url=llama, api="chat")
        requests = [
            ScoreRequest((Message("user", question),), ("Positive", "Negative")),
            ScoreRequest(question, ("Positive", "Negative")),
        ]
        turns, text = in_order(backend.score(requests), 2)
        assert turns.error is None
        assert turns.logprobs == pytest.approx(text.logprobs, abs=1e-3)
        assert turns.logprobs[0] > turns.logprobs[1]
        auto = OpenAIBackend("smol", base_url=llama)
        [same] = in_order(auto.score(requests[:1]), 1)
        assert same.logprobs == pytest.approx(turns.logprobs, abs=1e-3)

    def test_texts(self, llama: str) -> None:
        backend = OpenAIBackend("smol", base_url=llama)
        requests = [
            GenerateRequest(prompts()[0], 6, ("\n",)),
            GenerateRequest((Message("user", "What is the capital of France?"),), 24),
            GenerateRequest(prompts()[0], 1),
        ]
        completed, chat, one = in_order(backend.generate(requests), 3)
        with openai.OpenAI(base_url=llama, api_key="any") as client:
            direct = client.chat.completions.create(
                model="smol",
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                max_tokens=24,
                temperature=0,
            )
        assert completed.text == one.text == " positive"
        assert chat.text == direct.choices[0].message.content
        assert len(chat.text) > 10
        assert one.usage.completion_tokens == 1

    # --- arguments ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("mode", ["full", "hash", "encrypted"])
    @pytest.mark.parametrize("evidence", ["logprobs", "texts"])
    def test_answers_are_kept_and_found_in_every_store_mode(
        self, llama: str, tmp_path: Path, mode: Any, evidence: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PROXYPROMPT_LEDGER_KEY", "ab" * 32)
        request = ScoreRequest(f"{SHOTS}Review: a great film\nSentiment:", (" positive", " negative"))
        first = None
        for _ in range(2):
            with Ledger(tmp_path / "l.db", store=mode) as ledger:
                backend = OpenAIBackend("smol", base_url=llama, evidence=evidence)
                [result] = Meter(backend, ledger, role="target", run="r").score([request], stage="s")
                assert (ledger.totals().done, ledger.totals().unknown) == (1, 0)
            assert result.fingerprint  # this server names its build
            assert first in (None, result)
            first = result


class TestArguments:
    def test_identity_and_name(self) -> None:
        model = OpenAIBackend("m", api="chat", top_logprobs=5)
        assert model.identity == {
            "provider": "openai-compatible",
            "base_url": "https://api.openai.com/v1",
            "model": "m",
            "api": "chat",
            "top_logprobs": 5,
        }
        assert (model.name, model.capability) == ("openai:m", "unknown")
        assert OpenAIBackend("m", name="mine").name == "mine"
        assert repr(model) == "OpenAIBackend('m', base_url='https://api.openai.com/v1', api='chat')"

    def test_a_key_is_needed_at_the_first_call_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OPENAI_API_KEY")
        model = OpenAIBackend("m")
        assert list(model.score([])) == []
        with pytest.raises(BackendError, match=r"OPENAI_API_KEY is not set\. Set it in the environment"):
            list(model.score([ScoreRequest("p", LABELS)]))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model": " "}, "model=' ' must be a model name"),
            ({"api": "responses"}, "api='responses' must be 'auto'"),
            ({"top_logprobs": 0}, "top_logprobs=0 must be an integer from 1 to 100"),
            ({"concurrency": 1.5}, "concurrency=1.5 must be an integer from 1 to 256"),
            ({"timeout": 0}, "timeout=0 must be a positive number of seconds"),
            ({"rpm": -1}, "rpm=-1 must be a positive number of requests"),
            ({"tpm": True}, "tpm=True must be a positive number of tokens"),
            ({"repeats": 0}, "repeats=0 must be an integer from 1 to 100"),
            ({"max_tries": 0}, "max_tries=0 must be an integer from 1 to 20"),
            ({"evidence": "guess"}, "evidence='guess' must name one or more of logprobs, decisions, texts"),
            ({"evidence": ()}, "must name one or more of"),
            ({"model_change": "stop"}, "model_change='stop' must be 'warn', 'error' or 'ignore'"),
            ({"parameters": {"stream": True}}, "parameters: stream are set by the backend"),
            ({"parameters": {"seed": 1}, "repeats": 3}, "a seed with repeats=3 makes all samples alike"),
            ({"base_url": "http://10.0.0.7:8000/v1"}, "plain http to '10.0.0.7' would show the key"),
            (
                {"base_url": "https://169.254.169.254/v1"},
                "'169.254.169.254' is a link-local or metadata address",
            ),
            ({"base_url": "http://[fd00:ec2::254]/v1", "allow_http": True}, "link-local or metadata address"),
            ({"base_url": "http://2852039166/v1", "allow_http": True}, "link-local or metadata address"),
            ({"base_url": "localhost"}, "base_url is not an http"),
            ({"client": object()}, "client is a object; an openai client is needed"),
        ],
    )
    def test_rules(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            OpenAIBackend(**{"model": "m", **options})

    def test_clients(self) -> None:
        with openai.OpenAI(base_url="http://127.0.0.1:1/v1", api_key="k") as client:
            assert OpenAIBackend("m", client=client).identity["base_url"] == "http://127.0.0.1:1/v1"
            with pytest.raises(InputError, match="client and base_url were both given"):
                OpenAIBackend("m", client=client, base_url="http://x/v1")
        assert OpenAIBackend("m", base_url="http://10.0.0.7/v1", allow_http=True).identity["model"] == "m"

    @pytest.mark.parametrize("candidates", [(), ("",), ("a", " "), ("a", " a")])
    def test_labels(self, candidates: tuple[str, ...]) -> None:
        with pytest.raises(
            InputError, match=r"requests\[1\]: candidates=.* differ by more than the white space"
        ):
            OpenAIBackend("m").score([ScoreRequest("p", LABELS), ScoreRequest("p", candidates)])

    def test_prompts_and_lengths(self) -> None:
        turns = (Message("user", "u"),)
        model = OpenAIBackend("m", api="completions")
        with pytest.raises(InputError, match="chat turns cannot be sent with api='completions'"):
            model.score([ScoreRequest(turns, LABELS)])
        with pytest.raises(InputError, match="chat turns cannot be sent"):
            model.generate([GenerateRequest(turns)])
        with pytest.raises(InputError, match=r"requests\[0\]: max_tokens=0 must be at least 1"):
            model.generate([GenerateRequest("p", 0)])
