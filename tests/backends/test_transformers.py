"""Causal language models from folders: scores by definition, laziness, generation, identity, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxyprompt.backends.base import GenerateRequest, Message, Planner, ScoreRequest
from proxyprompt.backends.embedded import embedded, embedded_model_path
from proxyprompt.backends.transformers import TransformersBackend
from proxyprompt.backends.transformers.pieces import PieceEncoder, cut, may_cut
from proxyprompt.backends.transformers.threads import import_torch, use_threads
from proxyprompt.backends.transformers.tokens import TextTokenizer
from proxyprompt.errors import BackendError, InputError

from .contract import GeneratorContract, ScorerContract, in_order

TOLERANCE = 1e-4
TEXT = "Review: a dull film\nSentiment: negative\n\nReview: a warm, funny film\nSentiment: positive\n\n"
LABELS = (" positive", " negative", " positively warm")
CONTEXT = 200


def write_tokenizer(folder, **config):
    """A byte-level tokenizer in which whole words become one token, so that texts merge at their ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<end>", "<turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "user assistant", " positively", "film films filming"] * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(folder, kind="llama", seed=3, **config):
    torch = import_torch()
    import transformers as tf

    shape = {
        "vocab_size": 420,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **config,
    }
    made = {
        "llama": lambda: tf.LlamaConfig(**shape),
        "gemma3": lambda: tf.Gemma3TextConfig(
            **shape, head_dim=16, sliding_window=9, layer_types=["sliding_attention", "full_attention"]
        ),
        "gemma2": lambda: tf.Gemma2Config(**shape, head_dim=16, sliding_window=9),
    }[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tf.AutoModelForCausalLM.from_config(made).save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For the reference forwards too; ours are told."""
    with use_threads(import_torch(), 1):
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_model(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def sliding_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-gemma")
    write_model(folder, "gemma3")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def plain(folder):
    """Transformers' own model and tokenizer, with nothing of ours in them."""
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_pretrained(str(folder), dtype=import_torch().float32).eval()
    return model, tf.AutoTokenizer.from_pretrained(str(folder))


def by_definition(model, tokenizer, prompt, candidates, special=True):
    """Candidate log-probabilities from full forwards, written out from the definition in the docstring."""
    torch = import_torch()
    alone = tokenizer(prompt, add_special_tokens=special).input_ids
    wholes = [tokenizer(prompt + c, add_special_tokens=special).input_ids for c in candidates]

    def common(ids):
        return next((at for at, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), len(alone))

    start = min(common(ids) for ids in wholes)
    values = []
    for ids in wholes:
        kept = len(ids) - start + 1
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=kept).logits[0]
        rows = logits.double().log_softmax(-1)  # float32 sums over 262,144 entries are off by 1e-4 themselves
        values.append(sum(float(rows[at, token]) for at, token in enumerate(ids[start:])))
    return values


def some_requests():
    demonstrations = [TEXT, "Review: a slow film\nSentiment: negative\n\n"]
    return [
        ScoreRequest(head + f"Review: {query}\nSentiment:", LABELS)
        for head in ("", demonstrations[0], demonstrations[1], "".join(demonstrations))
        for query in ("a film", "a warm film, funny", "films")
    ]


class TestContract(ScorerContract, GeneratorContract):
    tolerance = TOLERANCE

    @pytest.fixture
    def backend(self, folder):
        return TransformersBackend(folder, threads=1)

    @pytest.fixture
    def score_requests(self):
        return some_requests()

    @pytest.fixture
    def generate_requests(self):
        return [
            GenerateRequest(TEXT, max_tokens=5),
            GenerateRequest("Review:", max_tokens=9, stop=("e", "\n")),
        ]


@pytest.mark.parametrize("which", ["folder", "sliding_folder"])
@pytest.mark.parametrize("max_batch_tokens", [None, 7])
def test_scores_follow_the_definition(which, max_batch_tokens, request):
    folder = request.getfixturevalue(which)
    backend = TransformersBackend(folder, threads=1, max_batch_tokens=max_batch_tokens)
    requests = [
        *some_requests(),
        ScoreRequest("Review: a fil", ("m", "ms", "ming", "e")),
        ScoreRequest("Review: a film", ("s", "ing", " positive")),
        ScoreRequest("x", (" positively warm", " positively", "y")),
    ]
    model, tokenizer = plain(folder)
    for asked, result in zip(requests, in_order(backend.score(requests), len(requests)), strict=True):
        expected = by_definition(model, tokenizer, asked.prompt, asked.candidates)
        assert result.logprobs == pytest.approx(expected, abs=TOLERANCE)
        assert result.usage.prompt_tokens == len(tokenizer(asked.prompt).input_ids)


def test_a_merge_across_the_boundary_moves_the_start_for_every_candidate(folder):
    """ "film" is one token: scored as such, although the prompt ends inside it."""
    _, tokenizer = plain(folder)
    prompt = "Review: a fil"
    assert len(tokenizer(prompt + "m").input_ids) < len(tokenizer(prompt).input_ids) + 1
    backend = TransformersBackend(folder, threads=1)
    alone = in_order(backend.score([ScoreRequest(prompt, ("e",))]), 1)[0].logprobs[0]
    together = in_order(backend.score([ScoreRequest(prompt, ("e", "m"))]), 1)[0].logprobs[0]
    assert together < alone


@pytest.mark.parametrize("max_batch_tokens", [None, 11])
def test_every_distinct_token_is_computed_once_and_planned_without_weights(folder, max_batch_tokens):
    backend = TransformersBackend(folder, threads=1, max_batch_tokens=max_batch_tokens)
    requests = some_requests() * 2
    _, tokenizer = plain(folder)
    wholes = [tokenizer(r.prompt + c).input_ids[:-1] for r in requests for c in r.candidates]
    distinct = {tuple(ids[: at + 1]) for ids in wholes for at in range(len(ids))}
    plan = backend.plan(requests)
    assert isinstance(backend, Planner)
    assert "_model" not in vars(backend)
    assert (plan.n_requests, plan.distinct_tokens) == (len(requests), len(distinct))
    assert plan.naive_tokens == sum(map(len, wholes))
    computed: list[int] = []
    in_order(backend.score(requests, on_tokens=computed.append), len(requests))
    assert sum(computed) == len(distinct)
    assert max(computed) <= (max_batch_tokens or 256)


def test_blocks_are_computed_when_asked_for_and_announced_before(folder):
    backend = TransformersBackend(folder, threads=1, max_batch_tokens=16)
    events: list[object] = []
    blocks = backend.score(
        some_requests(), on_send=events.append, on_tokens=lambda n: events.append("tokens")
    )
    assert events == []
    assert "_model" not in vars(backend)
    block = next(blocks)
    assert events.index([index for index, _ in block]) == len(events) - 2
    assert events[-1] == "tokens"
    heard = len(events)
    next(blocks)
    assert len(events) > heard


def test_special_tokens_stand_before_but_never_behind(copy):
    """A tokenizer that closes texts with an end marker would otherwise score the marker."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<turn> $A <end>", special_tokens=[("<turn>", 1), ("<end>", 0)]
    )
    tokenizer.save(str(copy / "tokenizer.json"))
    backend = TransformersBackend(copy, threads=1)
    model, own = plain(copy)
    assert own("a").input_ids[0] == 1
    assert own("a").input_ids[-1] == 0
    prompt = "Review: a film\nSentiment:"
    expected = by_definition(model, own, "<turn>" + prompt, LABELS, special=False)
    result = in_order(backend.score([ScoreRequest(prompt, LABELS)]), 1)[0]
    assert result.logprobs == pytest.approx(expected, abs=TOLERANCE)
    assert backend.count_tokens(prompt) == len(own(prompt).input_ids) - 1


def test_numbers_that_are_not_finite_are_missing_with_a_reason(copy):
    from safetensors.numpy import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    # The check at load sees the same numbers both ways, so it cannot be what notices.
    result = in_order(TransformersBackend(copy, threads=1).score([ScoreRequest("Review:", LABELS)]), 1)[0]
    assert result.logprobs == (None, None, None)
    assert "non-finite" in result.error


# Chat


def test_a_chat_prompt_is_the_template_s_text_with_no_further_special_tokens(copy):
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    backend = TransformersBackend(copy, threads=1, chat_template=True)
    turns = (Message("user", "a film?"), Message("assistant", "positive"), Message("user", "films"))
    text = (
        "<turn>user\na film?<end>\n<turn>assistant\npositive<end>\n<turn>user\nfilms<end>\n<turn>assistant\n"
    )
    model, tokenizer = plain(copy)
    expected = by_definition(model, tokenizer, text, ("positive", "negative"), special=False)
    result = in_order(backend.score([ScoreRequest(turns, ("positive", "negative"))]), 1)[0]
    assert result.logprobs == pytest.approx(expected, abs=TOLERANCE)
    assert backend.count_tokens(turns) == len(tokenizer(text, add_special_tokens=False).input_ids)


def test_chat_turns_without_a_template_are_refused(folder):
    turns = (Message("user", "a film?"),)
    with pytest.raises(InputError, match=r"requests\[0\]\.prompt.*no chat template.*completion style"):
        TransformersBackend(folder).score([ScoreRequest(turns, ("a", "b"))])
    with pytest.raises(BackendError, match=r"chat_template: transformers:.* has no chat template"):
        TransformersBackend(folder, chat_template=True).count_tokens("a")


def test_a_template_s_own_refusal_is_passed_on(copy):
    (copy / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    turns = (Message("user", "a"), Message("user", "b"))
    with pytest.raises(InputError, match=r"refuses these turns \(roles must alternate\)"):
        TransformersBackend(copy).count_tokens(turns)
    with pytest.raises(InputError, match="neither text nor a non-empty tuple of Message"):
        TransformersBackend(copy).count_tokens(())


# Refusals


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ((), r"requests\[1\]\.candidates is empty"),
        ((" a", " a"), r"requests\[1\]\.candidates: .* has duplicates"),
        ((" a", ""), r"requests\[1\]\.candidates: '' adds no token"),
    ],
)
def test_candidates_that_cannot_be_told_apart_are_refused_before_anything_runs(folder, candidates, message):
    backend = TransformersBackend(folder)
    requests = [ScoreRequest("Review:", LABELS), ScoreRequest("Review:", candidates)]
    for ask in (backend.score, backend.plan):
        with pytest.raises(InputError, match=message):
            ask(requests)
    assert "_model" not in vars(backend)


def test_candidates_that_only_the_normalizer_makes_equal_are_refused(copy):
    from tokenizers import Tokenizer, normalizers

    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(copy / "tokenizer.json"))
    with pytest.raises(InputError, match="are not told apart by the tokenizer"):
        TransformersBackend(copy).plan([ScoreRequest("Review:", (" film", " Film"))])


def test_nothing_before_the_candidates_is_refused(folder):
    with pytest.raises(InputError, match=r"requests\[0\]\.prompt: nothing stands before the candidates"):
        TransformersBackend(folder).plan([ScoreRequest("", LABELS)])
    with pytest.raises(InputError, match=r"requests\[0\]\.prompt is empty"):
        TransformersBackend(folder).generate([GenerateRequest("")])
    with pytest.raises(InputError, match=r"requests\[0\]\.max_tokens: 0 must be at least 1"):
        TransformersBackend(folder).generate([GenerateRequest("a", max_tokens=0)])


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs(folder):
    backend = TransformersBackend(folder, threads=1)
    long = ScoreRequest("x" * (CONTEXT + 1), ("y",))
    sent: list[object] = []
    for ask in (
        lambda: backend.score([ScoreRequest("a", ("b",)), long], on_send=sent.append),
        lambda: backend.plan([ScoreRequest("a", ("b",)), long]),
    ):
        with pytest.raises(BackendError, match=r"requests\[1\].*20\d tokens; .* reads at most 200.*fewer"):
            ask()
    assert sent == []
    assert "_model" not in vars(backend)
    assert in_order(backend.score([ScoreRequest("x" * CONTEXT, ("y",))]), 1)[0].error is None
    with pytest.raises(BackendError, match=r"with max_tokens has 249 tokens; .* reads at most 200"):
        backend.generate([GenerateRequest("x" * 200, max_tokens=50)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype: 'int8' is not one of"),
        ({"device": "tpu"}, "device: 'tpu' is not one of"),
        ({"threads": 0}, "threads: 0 must be at least 1"),
        ({"memory_budget": -1}, "memory_budget: -1 must be at least 1"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: 0 must be at least 1"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(InputError, match=message):
        TransformersBackend("anything", **options)


def test_folders_that_hold_no_safe_causal_model_are_refused(copy, tmp_path):
    def identity(folder, **options):
        return TransformersBackend(folder, **options).identity

    with pytest.raises(BackendError, match=r"neither a folder nor a hub id.*config\.json"):
        identity(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackendError, match=r"'empty' has no config\.json.*save_pretrained"):
        identity(tmp_path / "empty")
    with pytest.raises(InputError, match="revision: 'main' was given for a local folder"):
        identity(copy, revision="main")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(BackendError, match=r"\(BertForMaskedLM\) is no causal language model"):
        identity(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(BackendError, match=r"config\.json in 'copy' is not valid JSON"):
        identity(copy)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(BackendError, match="pickled weights are never loaded"):
        identity(copy)


def test_damaged_weights_are_refused(copy):
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:20])
    with pytest.raises(BackendError, match="not a readable safetensors file"):
        _ = TransformersBackend(copy).identity
    from safetensors.numpy import load, save_file

    tensors = load(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        BackendError, match=r"lack 1 weights, the first 'model\.layers\.1\.mlp\.up_proj\.weight'"
    ):
        list(TransformersBackend(copy, threads=1).score([ScoreRequest("Review:", LABELS)]))


def test_a_folder_without_a_fast_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(BackendError, match=r"tokenizer.*tokenizer\.json"):
        TransformersBackend(copy).count_tokens("a")


def test_a_budget_too_small_for_the_prompts_is_refused(folder):
    backend = TransformersBackend(folder, threads=1, memory_budget=20_000)
    with pytest.raises(BackendError, match=r"memory_budget: .* too little"):
        list(backend.score([ScoreRequest("Review:", LABELS)]))


# Identity


def test_the_identity_follows_content_not_place(folder, copy):
    identity = TransformersBackend(folder).identity
    assert TransformersBackend(copy).identity == identity
    assert str(folder) not in json.dumps(identity)
    assert TransformersBackend(copy, device="cpu", threads=1, max_batch_tokens=9).identity == identity
    assert TransformersBackend(copy, dtype="auto").identity == identity
    assert TransformersBackend(copy, dtype="bfloat16").identity != identity
    assert TransformersBackend(copy, chat_template=False).identity != identity


@pytest.mark.parametrize("change", ["weight", "tokenizer", "config", "template"])
def test_the_identity_changes_with_the_model(folder, copy, change):
    if change == "weight":
        from safetensors.numpy import load_file, save_file

        weights = load_file(copy / "model.safetensors")
        weights["model.layers.1.self_attn.k_proj.weight"] += 1e-3
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        assert (copy / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    elif change == "tokenizer":
        text = (copy / "tokenizer.json").read_text()
        (copy / "tokenizer.json").write_text(text.replace('"<turn>"', '"<torn>"'))
    elif change == "config":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    else:
        (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert TransformersBackend(copy).identity != TransformersBackend(folder).identity


def test_identity_and_plan_load_neither_torch_nor_weights(folder):
    code = (
        "import sys\n"
        "from proxyprompt.backends.transformers import TransformersBackend\n"
        f"backend = TransformersBackend({str(folder)!r})\n"
        "assert len(backend.identity['sha256']) == 64 and backend.name\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_a_hub_id_is_known_by_its_commit(copy, tmp_path, monkeypatch):
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = shutil.copytree(copy, tmp_path / "snapshots" / commit)
    asked: list[dict[str, object]] = []

    def cached(name, **options):
        asked.append({"name": name, **options})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    backend = TransformersBackend("owner/tiny", revision="main")
    assert backend.name == "transformers:owner/tiny"
    assert (backend.identity["model"], backend.identity["commit"]) == ("owner/tiny", commit)
    assert asked[0]["local_files_only"] is True
    assert asked[0]["revision"] == "main"
    assert not any("bin" in pattern for pattern in asked[0]["allow_patterns"])


def test_a_hub_id_that_cannot_be_reached_says_what_to_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(name, **options):
        raise LocalEntryNotFoundError("no snapshot, no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        BackendError, match=r"'owner/absent' is not in the local cache.*HF_HUB_OFFLINE.*embedded:"
    ):
        _ = TransformersBackend("owner/absent").identity


# Generation


def greedy(model, tokenizer, prompt, max_tokens):
    torch = import_torch()
    ids = torch.tensor([tokenizer(prompt).input_ids])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
        )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("which", ["folder", "sliding_folder"])
def test_generation_equals_transformers_greedy_generation(which, request):
    folder = request.getfixturevalue(which)
    prompts = [TEXT, "Review:", TEXT + "Review: a film", "Review: a slow, warm film\n", "x", TEXT]
    backend = TransformersBackend(folder, threads=1, max_batch_tokens=13)
    requests = [GenerateRequest(prompt, max_tokens=4 + 3 * at) for at, prompt in enumerate(prompts)]
    results = in_order(backend.generate(requests), len(requests))
    model, tokenizer = plain(folder)
    for asked, result in zip(requests, results, strict=True):
        ids = greedy(model, tokenizer, asked.prompt, asked.max_tokens)
        assert result.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert result.usage.completion_tokens == len([token for token in ids if token != 0])


def test_a_text_ends_at_its_first_stop_string_or_at_the_end_token(copy):
    backend = TransformersBackend(copy, threads=1)
    free = in_order(backend.generate([GenerateRequest(TEXT, max_tokens=12)]), 1)[0]
    stop = free.text[len(free.text) // 2 :][:3]
    cut = in_order(backend.generate([GenerateRequest(TEXT, max_tokens=12, stop=("never", stop))]), 1)[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.usage.completion_tokens < free.usage.completion_tokens
    model, tokenizer = plain(copy)
    first = greedy(model, tokenizer, TEXT, 3)
    assert 0 not in first
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, first[1]]}))
    ended = in_order(
        TransformersBackend(copy, threads=1).generate([GenerateRequest(TEXT, max_tokens=12)]), 1
    )[0]
    assert ended.text == tokenizer.decode(first[: first.index(first[1])])


def test_a_model_without_prefix_sharing_gives_the_same_kind_of_answers(tmp_path):
    write_model(tmp_path, "gemma2")
    write_tokenizer(tmp_path)
    backend = TransformersBackend(tmp_path, threads=1)
    assert not backend.shares_prefixes
    model, tokenizer = plain(tmp_path)
    asked = some_requests()[3:6]
    for one, result in zip(asked, in_order(backend.score(asked), 3), strict=True):
        expected = by_definition(model, tokenizer, one.prompt, one.candidates)
        assert result.logprobs == pytest.approx(expected, abs=TOLERANCE)
    text = in_order(backend.generate([GenerateRequest("Review: a", max_tokens=6)]), 1)[0].text
    assert text == tokenizer.decode(greedy(model, tokenizer, "Review: a", 6), skip_special_tokens=True)


# Tokenising by pieces


def raw_tokenizer(pre_tokenizer=None, vocabulary=(), normalizer=None, added=()):
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: at for at, token in enumerate([*letters, *vocabulary])}
    merges = [(token[:-1], token[-1]) for token in vocabulary]
    raw = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    raw.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.normalizer = normalizer
    raw.add_tokens(list(added))
    return raw


def test_tokenizers_whose_words_could_cross_a_line_are_given_whole_texts():
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

    assert may_cut(raw_tokenizer())
    assert may_cut(raw_tokenizer(vocabulary=("ĊĊ", "ab"), normalizer=normalizers.NFC()))
    assert not may_cut(raw_tokenizer(vocabulary=("Ċa",)))
    assert not may_cut(raw_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not may_cut(raw_tokenizer(pre_tokenizers.Split(Regex(r"\n\w+"), "isolated")))
    assert not may_cut(raw_tokenizer(pre_tokenizers.Metaspace()))
    assert not may_cut(raw_tokenizer(normalizer=normalizers.Strip()))
    assert not may_cut(raw_tokenizer(added=[AddedToken("Xy", lstrip=True)]))
    assert not may_cut(raw_tokenizer(added=[AddedToken("\nXy")]))


def test_a_text_is_the_sum_of_its_pieces():
    text = "Review: a\nSentiment: b\n\nReview: c\n 1\nx"
    assert cut(text) == ["Review: a\n", "Sentiment: b\n\n", "Review: c\n 1\n", "x"]
    assert cut("") == [""]


WORDS = ["a", "film", "The", "'s", "12", "3", ":", ".", "!?", "é", "日", "🙂", "A", "z"]
MARKS = ["<bos>", "<end>", "<turn>", "<|im_end|>"]
LINES = st.lists(
    st.sampled_from(["\n", "\n\n", " ", "  ", "\t", "\r\n", "\u0301", *WORDS, *MARKS]), max_size=30
).map("".join)


@pytest.fixture(scope="module")
def tokenizers_to_try(folder):
    loaded = [TextTokenizer.from_folder(folder)]
    for name in ("smollm2-135m", "gemma-3-270m"):
        loaded.append(TextTokenizer.from_files(embedded_model_path(name)))
    assert all(may_cut(tokenizer.raw) for tokenizer in loaded)
    return loaded


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(LINES, min_size=1, max_size=40), special=st.booleans())
def test_pieces_have_the_tokens_of_the_whole(tokenizers_to_try, texts, special):
    for tokenizer in tokenizers_to_try:
        encoder = PieceEncoder(tokenizer.raw, tokenizer._n_after)
        for ours, whole in zip(
            encoder.encode(texts, special=special),
            tokenizer._encode_whole(texts, special=special),
            strict=True,
        ):
            assert ours.tolist() == whole.tolist()


def test_a_large_batch_goes_by_pieces_and_means_the_same(folder):
    requests = [ScoreRequest(TEXT * (at % 3) + f"Review: film {at}\nSentiment:", LABELS) for at in range(200)]
    backend, other = TransformersBackend(folder), TransformersBackend(folder)
    other._tokenizer._may_cut = False
    assert backend.plan(requests) == other.plan(requests)
    assert backend._tokenizer._pieces is not None
    assert other._tokenizer._pieces is None


# Real models

QUERIES = (
    "a gripping thriller with real feeling",
    "the worst ninety minutes of my life",
    "42 jokes, no laugh",
)


def real_demonstrations(count):
    kinds = (
        ("a dull , lifeless mess that never finds its footing", "negative"),
        ("warm , funny and wonderfully acted from start to end", "positive"),
        ("tries hard to shock , and ends as a parade of clichés", "negative"),
    )
    return "".join(
        f"Review: {text} ({at})\nSentiment: {label}\n\n"
        for at in range(count)
        for text, label in [kinds[at % len(kinds)]]
    )


@pytest.fixture(scope="session", params=["smollm2-135m", "gemma-3-270m"])
def real(request):
    backend = embedded(request.param, threads=1)
    return backend, *plain(backend._files.folder)


def test_real_models_score_as_in_full_forwards_beyond_the_sliding_window(real):
    backend, model, tokenizer = real
    assert backend.shares_prefixes
    labels = (" positive", " negative", " rather negative")
    requests = [
        ScoreRequest(real_demonstrations(count) + f"Review: {query}\nSentiment:", labels)
        for count, query in ((0, QUERIES[0]), (3, QUERIES[1]), (25, QUERIES[2]))
    ]
    assert backend.count_tokens(requests[2].prompt) > 530
    results = in_order(backend.score(requests), len(requests))
    for asked, result in zip(requests, results, strict=True):
        expected = by_definition(model, tokenizer, asked.prompt, asked.candidates)
        assert result.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_real_models_generate_as_transformers_does(real):
    backend, model, tokenizer = real
    prompts = [real_demonstrations(2) + f"Review: {query}\nSentiment:" for query in QUERIES[:2]]
    results = in_order(backend.generate([GenerateRequest(prompt, max_tokens=8) for prompt in prompts]), 2)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.text == tokenizer.decode(greedy(model, tokenizer, prompt, 8), skip_special_tokens=True)


def test_the_tokenizer_of_an_embedded_model_is_the_one_transformers_loads(real):
    backend, _, tokenizer = real
    texts = [
        "",
        " ",
        "a",
        "  two  spaces\n\n\nand lines\n x",
        "12345 + 67,890.12",
        "naïve café — “quoted” 日本語 🙂",
        "\t\tindented\r\n",
        "<|im_start|>user\nhi<|im_end|>",
        "<bos>x<eos>",
        real_demonstrations(3),
    ]
    for special in (True, False):
        ours = [ids.tolist() for ids in backend._tokenizer.encode(texts, special=special)]
        assert ours == [tokenizer(text, add_special_tokens=special).input_ids for text in texts]


def test_smollm2_answers_chat_turns_through_its_own_template():
    backend = embedded("smollm2-135m", threads=1)
    turns = (Message("user", "Is 'a dull film' positive or negative? One word."),)
    model, tokenizer = plain(backend._files.folder)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": turns[0].content}], tokenize=False, add_generation_prompt=True
    )
    assert TextTokenizer.from_folder(backend._files.folder).text(turns, "prompt") == (rendered, False)
    expected = by_definition(model, tokenizer, rendered, ("Positive", "Negative"), special=False)
    result = in_order(backend.score([ScoreRequest(turns, ("Positive", "Negative"))]), 1)[0]
    assert result.logprobs == pytest.approx(expected, abs=TOLERANCE)
