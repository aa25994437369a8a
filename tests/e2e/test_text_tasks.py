"""A text task on a real model: generation, the scores of what it wrote, and attributions of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from proxyprompt import Demonstration, FewShotPrompt, Query, TextTask
from proxyprompt.attribution import Design, KernelSHAP, WeightedBanzhaf
from proxyprompt.backends.base import GenerateRequest, GenerateResult
from proxyprompt.backends.embedded import EmbeddedBackend, embedded
from proxyprompt.coalitions import enumerate_coalitions
from proxyprompt.fidelity import score_fidelity
from proxyprompt.ledger import Ledger
from proxyprompt.metering import Meter
from proxyprompt.task import similarity_to_full
from proxyprompt.value_function import PromptValueFunction, Values

# Three demonstrations show the form of the answer, each enough by itself; the third one shows another.
SHOWN = [
    ("Paris", "Paris is the capital of France."),
    ("Tokyo", "Tokyo is the capital of Japan."),
    ("Cairo", "bananas are yellow"),
    ("Rome", "Rome is the capital of Italy."),
]
ODD = 2
PROMPT = FewShotPrompt(
    tuple(Demonstration(f"d{i}", {"input": city}, fact) for i, (city, fact) in enumerate(SHOWN)),
    demonstration_template="City: {input}\nFact: {output}",
)
QUERIES = (
    Query("q0", {"input": "Madrid"}, "Madrid is the capital of Spain."),
    Query("q1", {"input": "Berlin"}, "Berlin is the capital of Germany.", references=("Germany's capital",)),
)
ROWS = enumerate_coalitions(4)
EMPTY, FULL = 0, 15
CAP = 12


def ends_with_a_full_stop(output: str, references: object) -> float:
    return float(output.endswith("."))


METRICS = ("exact_match", "token_f1", "embedding", ends_with_a_full_stop)


@pytest.fixture(scope="module")
def backend() -> EmbeddedBackend:
    return embedded("smollm2-135m", threads=1)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    with Ledger(tmp_path_factory.mktemp("texts") / "ledger.db") as ledger:
        yield ledger


@pytest.fixture(scope="module")
def computed() -> list[int]:
    """Tokens that the model computed, step by step."""
    return []


def function(metric, backend: EmbeddedBackend, ledger: Ledger, computed: list[int]) -> PromptValueFunction:
    meter = Meter(backend, ledger, role="target", run="texts", on_tokens=computed.append)
    return PromptValueFunction(PROMPT, TextTask(metric, max_tokens=CAP), QUERIES, meter)


@pytest.fixture(scope="module")
def values(backend: EmbeddedBackend, ledger: Ledger, computed: list[int]) -> Values:
    """All 16 coalitions and both queries, written once."""
    return function("token_f1", backend, ledger, computed).evaluate(ROWS)


def write(backend: EmbeddedBackend, *requests: GenerateRequest) -> list[GenerateResult]:
    results = dict(pair for block in backend.generate(requests) for pair in block)
    return [results[i] for i in range(len(requests))]


def request(row: int, query: int, stop: tuple[str, ...] = ("\n",), cap: int = CAP) -> GenerateRequest:
    return GenerateRequest(PROMPT.render(ROWS[row].tolist(), QUERIES[query]), cap, stop)


def test_a_batch_writes_what_single_requests_write_and_reads_shared_text_once(
    values: Values, backend: EmbeddedBackend, computed: list[int]
) -> None:
    # Prompts are counted in full; each new token but the last of a text is read once more to get the next.
    naive = sum(
        backend.count_tokens(request(row, query).prompt) for row in range(len(ROWS)) for query in range(2)
    )
    assert sum(computed) < 0.6 * naive
    for row, query in ((EMPTY, 0), (1 << ODD, 0), (1 << ODD, 1), (9, 1)):
        (alone,) = write(backend, request(row, query))
        assert alone.text == values.outputs[row][query]
        assert alone.usage.prompt_tokens == values.prompt_tokens[row, query]


def test_texts_end_at_the_cap_or_before_the_first_stop_string(
    values: Values, backend: EmbeddedBackend
) -> None:
    assert not any("\n" in text for row in values.outputs for text in row)
    free, capped, cut, neither = write(
        backend,
        request(FULL, 0, stop=(), cap=16),
        request(FULL, 0, stop=(), cap=5),
        request(FULL, 0, stop=("never", "tal of", "Spain")),
        request(FULL, 0, stop=("never",), cap=16),
    )
    assert free.usage.completion_tokens == 16
    assert "\n" in free.text
    assert capped.usage.completion_tokens == 5
    assert free.text.startswith(capped.text)
    assert len(capped.text) < len(free.text)
    assert cut.text == free.text[: free.text.index("tal of")]
    assert cut.usage.completion_tokens < 16
    assert neither.text == free.text


def test_all_metrics_score_the_recorded_texts_and_buy_none_again(
    values: Values, backend: EmbeddedBackend, ledger: Ledger, computed: list[int]
) -> None:
    before = len(computed)
    scores = {}
    for metric in METRICS:
        mine = function(metric, backend, ledger, computed)
        scores[metric] = mine(ROWS)
        assert mine.meter.stats.bought == 0
        assert mine.meter.stats.reused == ROWS.shape[0] * 2
    assert len(computed) == before
    for metric, score in scores.items():
        assert score.shape == (16, 2)
        assert ((score >= 0) & (score <= 1)).all()
        assert (score[FULL] == 1.0).all(), metric
        assert (score[[EMPTY, 1 << ODD]] < 1.0).all(), metric
    assert set(np.unique(scores["exact_match"])) == {0.0, 1.0}
    odd = scores["token_f1"][1 << ODD], scores["embedding"][1 << ODD]
    assert all(((score > 0) & (score < 1)).all() for score in odd), (
        "partly right: some shared words, some meaning"
    )
    np.testing.assert_array_equal(scores["token_f1"], values.utility)


@pytest.mark.parametrize("metric", ["token_f1", "embedding"])
def test_the_odd_demonstration_gets_the_least_credit(
    metric: str, values: Values, backend: EmbeddedBackend, ledger: Ledger, computed: list[int]
) -> None:
    scored = function(metric, backend, ledger, computed)
    result = KernelSHAP().attribute(scored, 4, budget=16, rng=np.random.default_rng(0))
    assert result.exact
    assert result.ranking()[0] == ODD
    others = np.delete(result.mean, ODD)
    assert others.min() > 1.3 * result.mean[ODD] > 0
    np.testing.assert_allclose(result.values.sum(axis=1), result.full_values - result.base_values, atol=1e-12)


def test_fidelity_of_a_surrogate_of_the_texts(values: Values) -> None:
    """What is predicted is the likeness to the model's own text on the full prompt."""
    likeness = similarity_to_full(values.outputs, values.outputs[FULL])
    assert (likeness[FULL] == 1.0).all()
    assert (likeness[EMPTY] < 0.6).all()
    judge = np.isin(np.arange(16), [1 << ODD, 3, 9, 14])
    result = score_fidelity(
        Design(ROWS[~judge], np.ones(12), exact=False),
        likeness[~judge],
        ROWS[judge],
        likeness[judge],
        judged_base=likeness[EMPTY],
        judged_full=likeness[FULL],
        explainer=WeightedBanzhaf(0.5),
    )
    assert (result.side_agreement == 1.0).all()
    # The second query's four texts are nearly alike, and R2 is not clipped there.
    assert result.r2[0] > 0.3 > result.r2[1]
