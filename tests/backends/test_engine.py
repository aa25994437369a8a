"""The prefix-sharing engine against plain forwards of whole prompts."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxyprompt.backends.transformers.attention import IMPLEMENTATION, register
from proxyprompt.backends.transformers.engine import Limits, TrieEngine, check_engine, choose_limits
from proxyprompt.backends.transformers.plain import PlainEngine, choose_engine
from proxyprompt.backends.transformers.threads import choose_threads, import_torch, use_threads
from proxyprompt.backends.transformers.trie import build_trie
from proxyprompt.errors import BackendError

VOCABULARY = 50
TOLERANCE = 1e-4
SHARING = ("llama", "qwen2", "mistral", "gemma3", "gpt2")


def tiny_model(kind):
    torch = import_torch()
    import transformers as tf

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.4,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = {
        "llama": lambda: tf.LlamaConfig(**shape),
        "qwen2": lambda: tf.Qwen2Config(**shape),
        "mistral": lambda: tf.MistralConfig(**shape, sliding_window=7),
        "gemma3": lambda: tf.Gemma3TextConfig(**shape, head_dim=16, sliding_window=6, layer_types=layers),
        "gemma2": lambda: tf.Gemma2Config(**shape, head_dim=16, sliding_window=6),
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, initializer_range=0.4
        ),
        "bloom": lambda: tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    }[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = tf.AutoModelForCausalLM.from_config(config).eval()
    if kind in SHARING:
        register()
        model.set_attn_implementation(IMPLEMENTATION)
    return model


@pytest.fixture(scope="module")
def models():
    made = {}
    with use_threads(import_torch(), 1):
        yield lambda kind: made.setdefault(kind, tiny_model(kind))


def plain_logprobs(model, tokens):
    """Log-softmax after every token, shape (n_tokens, vocabulary), with transformers' own masks."""
    torch = import_torch()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1).double().numpy()


def run(engine, trie, limits):
    values = np.full(trie.read_node.size, np.nan)
    for block in engine.run(trie, limits, lambda owners: None, nullcontext):
        values[block.reads] = block.values
    return values


def every_prefix(paths):
    return {tuple(path[: at + 1]) for path in paths for at in range(len(path))}


@st.composite
def tries(draw, longest=30):
    """Paths that share much (few tokens, grown from one another), and reads anywhere on them."""
    paths = [draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=longest))]
    for _ in range(draw(st.integers(0, 7))):
        stem = draw(st.sampled_from(paths))
        kept = draw(st.integers(0, len(stem)))
        tail = draw(st.lists(st.integers(0, 3), min_size=0 if kept else 1, max_size=longest - kept))
        paths.append(stem[:kept] + tail)
    reads = [
        (index, draw(st.integers(0, len(path) - 1)), draw(st.integers(0, VOCABULARY - 1)), index, 0)
        for index, path in enumerate(paths)
    ]
    reads += [(index, len(path) - 1, 5, index, 1) for index, path in enumerate(paths)]
    limits = Limits(draw(st.integers(1, 40)), draw(st.integers(1, 6)), draw(st.integers(1, 17)))
    return paths, np.array(reads), limits


def arrays(paths):
    return [np.array(path, dtype=np.int64) for path in paths]


@settings(max_examples=150, deadline=None)
@given(tries())
def test_passes_hold_every_node_once_and_show_it_exactly_its_ancestors(case):
    paths, reads, limits = case
    trie = build_trie(arrays(paths), reads, len(paths))
    assert trie.n_nodes == len(every_prefix(paths))
    prefix_of: dict[int, tuple[int, ...]] = {}
    held: list[int] = []
    finished: list[int] = []
    at = 0
    for pass_ in trie.passes(limits.rows, limits.heads, limits.tile_rows):
        assert pass_.start == at
        assert pass_.stop - pass_.start <= limits.rows
        assert pass_.heads.size <= limits.heads
        at = pass_.stop
        for tile in pass_.tiles:
            context = held[: tile.n_held] + (tile.rows + pass_.start).tolist()
            own = list(range(tile.start + pass_.start, tile.stop + pass_.start))
            for row, sees in zip(own, tile.visible, strict=True):
                seen = [(context + own)[key] for key in np.flatnonzero(sees)]
                assert seen[-1] == row
                prefix_of[row] = tuple(int(trie.tokens[node]) for node in seen)
                assert [len(prefix_of[node]) for node in seen] == list(range(1, len(seen) + 1))
        held = held[: pass_.n_keep] + (pass_.keep_rows + pass_.start).tolist()
        assert len(held) <= trie.longest
        finished += pass_.finished.tolist()
    assert at == trie.n_nodes
    assert set(prefix_of.values()) == every_prefix(paths)
    assert sorted(finished) == list(range(len(paths)))
    for node, owner in zip(trie.read_node, trie.read_owner, strict=True):
        prefix = prefix_of[int(node)]
        assert tuple(paths[owner][: len(prefix)]) == prefix


@pytest.mark.parametrize("kind", SHARING)
def test_log_probabilities_equal_a_plain_forward_whatever_the_trie_and_its_cuts(models, kind):
    model = models(kind)

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(tries())
    def holds(case):
        paths, reads, limits = case
        trie = build_trie(arrays(paths), reads, len(paths))
        engine = TrieEngine(model)
        values = run(engine, trie, limits)
        expected = [plain_logprobs(model, path) for path in paths]
        for value, node, target, owner in zip(
            values, trie.read_node, trie.read_target, trie.read_owner, strict=True
        ):
            assert abs(value - expected[owner][trie.depths[node], target]) <= TOLERANCE
        assert engine.tokens_computed == len(every_prefix(paths))
        assert engine.peak_held_tokens <= trie.longest

    holds()


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_the_sliding_window_matters_in_these_models_and_is_kept(models, kind):
    model = models(kind)
    path = np.random.default_rng(0).integers(0, VOCABULARY, 60)
    other = path.copy()
    other[:5] = (other[:5] + 1) % VOCABULARY
    trie = build_trie([path, other], np.array([(0, 59, 3, 0, 0), (1, 59, 3, 1, 0)]), 2)
    engine = TrieEngine(model)
    values = run(engine, trie, Limits(16, 4, 8))
    by_owner = dict(zip(trie.read_owner.tolist(), values.tolist(), strict=True))
    for owner, tokens in enumerate((path, other)):
        assert by_owner[owner] == pytest.approx(plain_logprobs(model, tokens)[-1, 3], abs=TOLERANCE)
    window = {"mistral": 7, "gemma3": 6}[kind]
    assert window in engine.windows.values()


@pytest.mark.parametrize("kind", SHARING)
def test_known_architectures_pass_the_check(models, kind):
    assert check_engine(models(kind)) == ""


@pytest.mark.parametrize("kind", ["gemma2", "bloom"])
def test_an_attention_the_engine_does_not_do_is_found_out_and_computed_plainly(models, kind):
    model = models(kind)
    original = model.config._attn_implementation
    engine = choose_engine(model)
    assert isinstance(engine, PlainEngine)
    assert model.config._attn_implementation == original
    paths = [[3, 4, 5, 6], [3, 4, 7], [3, 4], [9]]
    reads = np.array([(i, len(path) - 1, 8, i, 0) for i, path in enumerate(paths)])
    trie = build_trie(arrays(paths), reads, len(paths))
    values = run(engine, trie, Limits(1, 1, 1))
    for value, owner in zip(values, trie.read_owner, strict=True):
        assert value == pytest.approx(plain_logprobs(model, paths[owner])[-1, 8], abs=TOLERANCE)
    assert engine.tokens_computed == 4 + 3 + 1


def test_a_model_that_ignores_positions_fails_the_check(models, monkeypatch):
    model = models("llama")
    inner = model.model.rotary_emb.forward
    monkeypatch.setattr(model.model.rotary_emb, "forward", lambda x, position_ids: inner(x, position_ids * 0))
    monkeypatch.setattr("proxyprompt.backends.transformers.attention.PassPlan.attend", _forgetful)
    assert "from a plain forward" in check_engine(model)


def _forgetful(self, layer, query, key, value, scaling, window):
    self.fresh[layer], self.windows[layer] = (key, value), window
    return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(1, 2)


def coalition_trie(n_coalitions):
    rng = np.random.default_rng(1)
    demonstrations = rng.integers(0, VOCABULARY, (8, 6))
    queries = rng.integers(0, VOCABULARY, (5, 4))
    paths = []
    for _ in range(n_coalitions):
        kept = demonstrations[rng.random(8) < 0.5].ravel()
        paths += [np.concatenate([[0], kept, query]) for query in queries]
    reads = np.array([(i, path.size - 1, 2, i, 0) for i, path in enumerate(paths)])
    return build_trie(paths, reads, len(paths))


def test_what_is_held_between_passes_does_not_grow_with_the_number_of_coalitions(models):
    peaks = []
    for n_coalitions in (4, 60):
        trie = coalition_trie(n_coalitions)
        engine = TrieEngine(models("llama"))
        run(engine, trie, Limits(32, 32, 16))
        assert engine.tokens_computed == trie.n_nodes
        assert engine.peak_held_tokens <= trie.longest
        peaks.append(engine.peak_held_tokens)
    assert peaks[1] <= 1 + 8 * 6 + 4


def test_nothing_is_computed_before_it_is_asked_for(models):
    trie = coalition_trie(6)
    engine = TrieEngine(models("llama"))
    announced: list[tuple[list[int], int]] = []
    blocks = engine.run(
        trie,
        Limits(20, 20, 16),
        lambda owners: announced.append((owners.tolist(), engine.tokens_computed)),
        nullcontext,
    )
    assert engine.tokens_computed == 0
    assert announced == []
    for done, block in enumerate(blocks, start=1):
        assert engine.tokens_computed == min(20 * done, trie.n_nodes)
        assert len(announced) == done
        owners, computed_before = announced[-1]
        assert owners == block.finished.tolist()
        assert computed_before == 20 * (done - 1)


def test_a_pass_is_made_smaller_to_fit_the_budget_and_an_impossible_budget_is_refused(models):
    model = models("llama")
    wide = choose_limits(model, 100, None, 10**9)
    narrow = choose_limits(model, 100, None, 500_000)
    assert wide.rows == 256
    assert narrow.rows < wide.rows
    assert choose_limits(model, 100, 64, 10**9).rows == 64
    with pytest.raises(BackendError, match=r"memory_budget: .* too little for prompts of 100 tokens.*Allow"):
        choose_limits(model, 100, None, 10_000)


def test_thread_counts_are_put_back(monkeypatch):
    torch = import_torch()
    before = torch.get_num_threads()
    with use_threads(torch, 1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    assert choose_threads(torch) == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= choose_threads(torch) <= before
    assert torch.get_num_threads() == before


def test_running_out_of_memory_says_what_to_set(models, monkeypatch):
    engine = TrieEngine(models("llama"))

    def exhausted(pass_, plan):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(engine, "_forward", exhausted)
    with pytest.raises(BackendError, match=r"Memory ran out while computing 20 tokens.*max_batch_tokens"):
        run(engine, coalition_trie(2), Limits(20, 20, 16))
